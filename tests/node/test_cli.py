"""The command line: what it says, how it exits, and what it leaves on the disk."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from farflung import cli
from farflung.node import saved
from farflung.node.display import Row, doing_text, human_bytes, member_line, members_table, sparkline, status_lines
from farflung.node.logs import JsonFormatter, logging_to
from farflung.node.plot import Curves, plot_losses
from farflung.node.progress import Progress, describe_life, read_progress
from farflung.node.signals import Leave, Signals, StopNow
from farflung.node.store import open_home
from farflung.protocol.certificate import check_certificate, decode_certificate
from farflung.protocol.errors import ConfigError, LocalError, PeerError, TooFewPeers
from farflung.protocol.genesis import decode_genesis
from farflung.protocol.invite import Invite, parse_invite

LOCAL = ["--listen", "127.0.0.1:0"]
LINEAR = 'task = "builtin:linear"\ninner_steps = 2\nrounds = 3\nouter = "sgd(lr=1.0)"\n'


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(LINEAR)
    return path


@pytest.fixture
def founded(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Invite:
    assert cli.main(["new", str(run_file), "--home", str(tmp_path / "home"), *LOCAL]) == 0
    return parse_invite(capsys.readouterr().out.split()[-1])


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from farflung.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'numpy', 'hivemind', 'grpc', 'matplotlib', 'numba'} & sys.modules.keys(); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("new", "join", "status", "invite", "demo"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["join", "hello"], "not an invite"),
        (["join", str(Invite(bytes(20), ("a@b:1",)))[:-9]], "damaged or cut off"),
        (["join"], "farflung new"),
        (["new", "nowhere.toml"], "nowhere.toml"),
        (["join", "--anounce", "x"], "--announce"),
        (["jion"], '"join"'),
        (["join", "farflung1", "--upload-mbit", "-1"], "positive"),
        (["join", "farflung1", "--precision", "int8"], "bf16"),
        (["demo", "--members", "1"], "at least 2 members"),
        (["new", "--listen", "here"], "host:port"),
        (["status"], "no run"),
        (["invite", "--run", "abc"], "'abc'"),
    ],
)
def test_a_users_error_is_one_line_that_says_what_to_change(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FARFLUNG_HOME", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("farflung: ")
    assert error.count("\n") == 1
    assert says in error


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('codek = "q2"', "did you mean 'codec'"),
        ('codec = "zip"', "zip"),
        ('outer = "adam"', "adam"),
        ('task = "no_such_module:Task"', "no_such_module"),
        ("inner_steps = 0", "inner_steps"),
        ("[timing]\ngrace = 1", "grace_ms"),
    ],
)
def test_a_run_file_that_cannot_work_is_refused_by_its_key(line, says, tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text('task = "builtin:linear"\n'.replace("task", "name" if line.startswith("task") else "task") + line)
    assert cli.main(["new", str(path), "--home", str(tmp_path / "home"), *LOCAL]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert not list((tmp_path / "home" / "runs").glob("*"))


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("x"), 2), (TooFewPeers("x"), 3), (PeerError("p", "x"), 1), (LocalError("x"), 70)]
)
def test_the_exit_status_says_whose_fault_it_was(error, code, monkeypatch, capsys):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert cli.main([]) == code
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert ("bug" in text) == (code == 70)


def test_new_writes_a_store_that_a_node_can_start_from(founded: Invite, tmp_path: Path):
    home = open_home(tmp_path / "home")
    (address,) = founded.addresses
    with home.run(founded.run_id) as store:
        assert store.genesis is not None
        genesis = decode_genesis(store.genesis, founded.run_id)
        first = store.certificate(0)
        assert first is not None
        check_certificate(decode_certificate(first), None, genesis, payload_bytes_max=0)
        snapshot = store.latest_snapshot()
        assert snapshot is not None
        assert snapshot.round_index == 0
        assert snapshot.ref.digest == genesis.state_digest
        assert store.certificates.next_round == 1
        assert address == f"{home.identity.peer_id}@127.0.0.1:{(store.directory / 'port').read_text()}"
    assert genesis.admits(founded.secret)
    assert len(founded.secret) == 16


def test_the_example_run_file_is_one(tmp_path, capsys):
    assert cli.main(["new", "--example"]) == 0
    (tmp_path / "example.toml").write_text(capsys.readouterr().out)
    assert cli.main(["new", str(tmp_path / "example.toml"), "--home", str(tmp_path / "home"), *LOCAL]) == 0


@pytest.mark.parametrize(("outer", "noted"), [("sgd(lr=2.8)", False), ("nesterov(lr=0.7,momentum=0.6)", True)])
def test_new_says_which_outer_step_a_preset_goes_with(outer, noted, tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(f'codec = "farflung"\nouter = "{outer}"\n')
    assert cli.main(["new", str(path), "--home", str(tmp_path / "home"), *LOCAL]) == 0
    assert ('note: farflung goes with outer = "sgd(lr=2.8)"' in capsys.readouterr().out) == noted


def test_invite_prints_what_new_printed_and_looks_the_address_up_again(founded: Invite, tmp_path, capsys):
    home = str(tmp_path / "home")
    assert cli.main(["invite", "--home", home]) == 0
    assert parse_invite(capsys.readouterr().out) == founded
    assert cli.main(["invite", "--home", home, "--refresh"]) == 0
    assert parse_invite(capsys.readouterr().out) == founded
    assert cli.main(["invite", "--home", home, "--announce", "example.org:4711"]) == 0
    (address,) = parse_invite(capsys.readouterr().out).addresses
    assert address.endswith("@example.org:4711")


def test_a_port_in_use_is_the_users_to_change(founded: Invite, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        for arguments in (["new"], ["join", "--discovery", "rendezvous", "--plain"]):
            assert cli.main([*arguments, "--home", str(tmp_path / "home"), "--listen", listen]) == 2
            error = capsys.readouterr().err
            assert listen in error
            assert error.count("\n") == 1


def test_two_runs_in_a_home_are_told_apart(founded: Invite, run_file, tmp_path, capsys):
    home = tmp_path / "home"
    assert cli.main(["new", str(run_file), "--home", str(home), *LOCAL]) == 0
    capsys.readouterr()
    assert cli.main(["invite", "--home", str(home)]) == 2
    assert founded.run_id.hex()[:8] in capsys.readouterr().err
    assert saved.saved_invite(home, founded.run_id.hex()[:8]) == founded


def test_join_trains_to_the_end_and_again_finds_it_ended(founded: Invite, tmp_path, capsys):
    home, summary = tmp_path / "home", tmp_path / "summary.json"
    arguments = ["join", "--home", str(home), *LOCAL, "--discovery", "rendezvous", "--plain", "--eval-rounds", "1"]
    assert cli.main([*arguments, "--json", str(summary)]) == 0
    value = json.loads(summary.read_text())
    assert value["train"]["ended"] == "finished"
    assert [at for at, _ in value["train"]["validation"]] == [0, 1, 2, 3]
    losses = [loss for _, loss in value["train"]["validation"]]
    assert losses == sorted(losses, reverse=True)
    capsys.readouterr()
    assert cli.main(["status", "--home", str(home), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["life"] == "finished"
    assert {"round", "phase", "why", "bytes_up", "bytes_down", "invite"} <= row["status"].keys()
    assert {"losses", "validation", "tokens_per_s", "inner_steps", "rounds"} <= row["train"].keys()
    assert cli.main(arguments) == 0


def test_code_that_is_not_farflungs_runs_only_when_it_is_named(tmp_path, monkeypatch, capsys):
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.chdir(examples)
    monkeypatch.syspath_prepend(str(examples))
    home = str(tmp_path / "home")
    assert cli.main(["new", "own_task.toml", "--home", home, *LOCAL]) == 0
    arguments = ["join", "--home", home, *LOCAL, "--discovery", "rendezvous", "--plain"]
    capsys.readouterr()
    assert cli.main(arguments) == 2
    assert "--task own_task:Thirds" in capsys.readouterr().err
    assert cli.main([*arguments, "--task", "own_task:Other"]) == 2
    assert cli.main([*arguments, "--task", "own_task:Thirds"]) == 0


# -- signals ----------------------------------------------------------------------------------------------------------


def test_the_first_signal_waits_for_a_step_to_end_and_the_second_does_not():
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.leaving
        with pytest.raises(Leave), signals.waiting():
            pass
        with pytest.raises(StopNow):
            signal.raise_signal(signal.SIGTERM)
        assert signals.stopping


def test_the_first_signal_ends_a_wait():
    with Signals() as signals, pytest.raises(Leave), signals.waiting():
        signal.raise_signal(signal.SIGTERM)


# -- what is shown ----------------------------------------------------------------------------------------------------

STATUS = {"round": 3, "phase": "waiting", "why": "waiting for payloads of abc", "members": ["me", "abc"], "pid": 1}


def test_a_wait_is_always_explained():
    train = {"round": 3, "step": 30, "inner_steps": 30, "rounds": 9, "losses": [[1, 3.0], [2, 2.0]], "loss": 2.0}
    assert doing_text(STATUS, train) == "waiting for payloads of abc"
    assert doing_text(STATUS, train | {"round": 4}) == "training"
    row = Row("node", STATUS, train, "running")
    assert "why: waiting for payloads of abc" in "\n".join(status_lines(row))
    assert "waiting for payloads of abc" in member_line(row)
    assert members_table([row, Row("other", {}, {}, "done")])


def test_a_process_that_is_gone_is_reported_as_gone():
    own = {"pid": 2**22 + 1, "unix_ms": 0}
    assert "killed or crashed" in describe_life(own, {}, 0)
    assert describe_life(own, {"ended": "left"}, 0) == "left"
    alive = {"pid": os.getpid(), "unix_ms": 0}
    assert describe_life(alive, {}, 1_000) == "running"
    assert describe_life(alive, {}, 60_000).startswith("silent for 60 s")


def test_sparklines_and_units():
    assert sparkline([1.0, float("nan"), 8.0]) == "▁█"
    assert sparkline([]) == ""
    assert (human_bytes(999), human_bytes(1530), human_bytes(2.1e6)) == ("999 B", "1.53 kB", "2.1 MB")


def test_progress_survives_a_restart_and_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr("farflung.node.progress.HISTORY_MAX", 16)
    progress = Progress.resume(tmp_path)
    for index in range(100):
        progress.note_validation(index, 1.0 / (index + 1))
    again = Progress.resume(tmp_path)
    assert again.validation == progress.validation
    assert len(again.validation) <= 16
    assert again.validation[0][0] == 0
    assert again.validation[-1][0] == 99
    (tmp_path / "train.json").write_text("{")
    assert read_progress(tmp_path) is None


def test_a_log_line_is_an_object_with_six_keys(capsys):
    record = logging.LogRecord("farflung", logging.INFO, "", 0, "two\nlines %d", (7,), None)
    record.peer = "abc"
    value = json.loads(JsonFormatter().format(record))
    assert value.keys() == {"time", "level", "peer", "round", "reason", "message"}
    assert (value["peer"], value["round"], value["message"]) == ("abc", None, "two lines 7")
    with logging_to(None):
        logging.getLogger("farflung.node").warning("careful")
    assert capsys.readouterr().out.endswith("warning: careful\n")


def test_a_plot_is_a_picture(tmp_path):
    curves = Curves({"node-0": [(1.0, 3.0), (2.0, 2.0)]}, [(2.0, 2.1)], [(1.0, 3.0)], 1.9)
    plot_losses(tmp_path / "loss.png", curves, title="test")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
