"""`farflung sim`: what it says, how it exits, and what it leaves on the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import farflung
from farflung import cli
from farflung.sim import sweep
from farflung.sim.scenario_file import load_scenario, presets, scenario_text
from farflung.sim.simulate import simulate
from farflung.sim.traces import read_trace

SMALL = """
name = "small"
rounds = 3
[run]
inner_steps = 10
[model]
params = 1e7
tokens_per_step = 1000
[[members]]
count = 3
up_mbit = { loguniform = [50, 500] }
step_ms = 100
jitter = 0.1
"""
TRAINED = """
name = "trained"
fidelity = "training"
rounds = 2
[run]
inner_steps = 2
[model]
task = "builtin:linear"
[[members]]
count = 2
step_ms = 100
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "trained.toml").write_text(TRAINED)
    return "small.toml"


def steady(result: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in result.items() if key != "wall_s"}


def test_listing_presets_loads_nothing_heavy():
    code = (
        "import sys; from farflung.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'hivemind', 'grpc', 'matplotlib', 'numba'} & sys.modules.keys(); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    for arguments in (["sim", "--help"], ["sim", "--list"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [preset.name for preset in presets()]
    assert all(preset.summary in line for preset, line in zip(presets(), lines, strict=True))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--list"),
        (["home40"], "did you mean 'home-40'"),
        (["home-40", "--seeds", "0"], "at least 1"),
        (["home-40", "--seed", "-3"], "-3"),
        (["home-40", "--sweep", "codec"], "key=value"),
        (["home-40", "--sweep", "codek=int8"], "'codec'"),
        (["home-40", "--sweep", "codec=int8,zip"], "zip"),
        (["home-40", "--sweep", "message_loss=0.5"], "changes nothing"),
        (["home-40", "--jobs", "-1"], "-1"),
        (["home-40", "--engine", "cluster"], "ray"),
        (["home-40", "--log", "x.log"], "no event log"),
        (["home-40", "--log", "x.log", "--seeds", "2"], "single run"),
        (["show", "nowhere.toml"], "nowhere.toml"),
        (["diff", "a.log", "b.log"], "a.log"),
        (["trace", "t.csv", "--members", "3", "--hours", "5"], "session_s"),
        (["trace", "t.csv", "--members", "3", "--hours", "5", "--session-s", "soon"], "--session-s"),
        (["trace", "t.csv", "--members", "3", "--hours", "5", "--low", "0.5", "--kind", "weibull"], "session_s"),
    ],
)
def test_a_users_error_is_one_line_that_says_what_to_change(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sim", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("farflung: ")
    assert says in error[-1]
    assert len(error) == 1 or error[0].startswith("1/1 ")
    assert not list(tmp_path.iterdir())


def test_what_is_shown_is_a_scenario(small, capsys, tmp_path):
    assert cli.main(["sim", "show", "home-40"]) == 0
    assert capsys.readouterr().out == scenario_text("home-40")
    for name in ("home-40", small):
        assert cli.main(["sim", "show", name, "--full"]) == 0
        (tmp_path / "full.toml").write_text(capsys.readouterr().out)
        assert load_scenario(tmp_path / "full.toml") == load_scenario(name)


def test_a_sweep_prints_a_table_and_leaves_a_report(small, tmp_path, capsys):
    assert cli.main(["sim", small, "--seeds", "2", "--sweep", "codec=int8,q2", "--jobs", "1", "--plain"]) == 0
    shown = capsys.readouterr()
    assert "q2 at H=10" in shown.out
    assert "farflung-sim/small/report.html" in shown.out
    assert [line.split()[0] for line in shown.err.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]
    folder = tmp_path / "farflung-sim" / "small"
    names = {path.name for path in folder.iterdir()}
    assert {"report.html", "runs.csv", "rounds.csv", "members.csv", "blame.csv", "scenario.toml"} <= names
    assert any(name.endswith(".png") for name in names)
    assert load_scenario(folder / "scenario.toml") == load_scenario(small)
    assert len((folder / "runs.csv").read_text().splitlines()) == 5


def test_json_is_the_results_and_nothing_else(small, tmp_path, capsys):
    arguments = ["sim", small, "--seeds", "2", "--seed", "5", "--sweep", "H=5,10", "--json"]
    assert cli.main([*arguments, "--jobs", "1"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [(item["seed"], item["changes"]) for item in value] == [
        (seed, {"run.inner_steps": text}) for text in ("5", "10") for seed in (5, 6)
    ]
    alone = simulate(small, seed=6, changes={"H": 5})
    assert value[1]["events_digest"] == alone.events_digest
    assert value[1]["utilisation"] == alone.utilisation
    assert value[1]["rounds"] == len(alone.rounds) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"small.toml", "trained.toml"}


def test_exploring_says_what_it_found_and_how_to_see_it_again(monkeypatch, capsys):
    from farflung.sim import explore

    assert cli.main(["sim", "explore", "--seeds", "2", "--jobs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"seeds": 2, "violations": []}
    broken = explore.Violation(7, "one certificate", "two of round 3", "a line")
    monkeypatch.setattr(explore, "explore", lambda seeds, **_: explore.Exploration(len(seeds), (broken,)))
    assert cli.main(["sim", "explore", "--seeds", "3", "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["seeds"] == 3
    assert [item["replay"] for item in value["violations"]] == ["a line"]
    assert cli.main(["sim", "explore", "--seeds", "3"]) == 1
    assert "farflung sim explore --replay 'a line'" in capsys.readouterr().out
    monkeypatch.setattr(explore, "replay", lambda line: broken if line == "a line" else None)
    assert cli.main(["sim", "explore", "--replay", "a line"]) == 1
    assert cli.main(["sim", "explore", "--replay", "another"]) == 0
    assert cli.main(["sim", "explore", "--seeds", "0"]) == 2


@pytest.mark.soak
def test_cores_change_nothing(small, tmp_path, capsys):
    arguments = ["sim", small, "--seeds", "3", "--sweep", "H=5,10", "--json"]
    assert cli.main([*arguments, "--jobs", "1"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert cli.main([*arguments, "--jobs", "2", "--out", "here"]) == 0
    shown = capsys.readouterr()
    assert [steady(item) for item in json.loads(shown.out)] == [steady(item) for item in value]
    assert (tmp_path / "here" / "report.html").exists()
    assert "here/report.html" in shown.err


def test_simulate_is_a_door_of_the_package(small):
    result = farflung.simulate(small, seed=3)
    again = simulate(load_scenario(small), seed=3)
    assert result.events_digest == again.events_digest
    assert result.changes == {}
    assert result.finished
    assert farflung.simulate(small, seed=4).events_digest != result.events_digest


def test_a_training_run_writes_its_log_and_equal_runs_are_equal(small, tmp_path, capsys):
    heard: list[tuple[int, int]] = []
    one = simulate("trained.toml", log=tmp_path / "one.log", tell=lambda done, total: heard.append((done, total)))
    assert heard == [(1, 2), (2, 2)]
    assert cli.main(["sim", "trained.toml", "--log", "two.log", "--json"]) == 0
    (two,) = json.loads(capsys.readouterr().out)
    assert two["events_digest"] == one.events_digest
    assert cli.main(["sim", "diff", "one.log", "two.log"]) == 0
    assert "equal" in capsys.readouterr().out
    assert cli.main(["sim", "trained.toml", "--log", "three.log", "--seed", "1", "--json"]) == 0
    assert cli.main(["sim", "diff", "one.log", "three.log"]) == 1
    assert "first difference in line" in capsys.readouterr().out


def test_a_run_that_fails_is_named_and_the_others_are_reported(small, tmp_path, monkeypatch, capsys):
    right = sweep.run_scenario

    def broken(scenario, seed, **settings):
        if seed == 1:
            raise ZeroDivisionError("oh")
        return right(scenario, seed, **settings)

    monkeypatch.setattr(sweep, "run_scenario", broken)
    assert cli.main(["sim", small, "--seeds", "3", "--jobs", "1", "--json", "--plain"]) == 1
    shown = capsys.readouterr()
    assert [item["seed"] for item in json.loads(shown.out)] == [0, 2]
    assert "farflung: seed 1: ZeroDivisionError in test_sim_cli.py" in shown.err
    assert cli.main(["sim", small, "--seed", "1", "--plain"]) == 70


def test_a_missing_trace_is_an_error_of_the_user(small, tmp_path, capsys):
    churn = '[members.churn]\nkind = "trace"\ntrace = "sessions.csv"\n'
    (tmp_path / "traced.toml").write_text(SMALL + churn)
    assert cli.main(["sim", "traced.toml", "--json", "--plain"]) == 2
    assert "sessions.csv" in capsys.readouterr().err
    arguments = ["--members", "3", "--hours", "2", "--session-s", "exponential(600)", "--gap-s", "60", "--seed", "4"]
    assert cli.main(["sim", "trace", "sessions.csv", *arguments, "--kind", "exponential"]) == 0
    assert len(read_trace(tmp_path / "sessions.csv").sessions) == 3
    capsys.readouterr()
    assert cli.main(["sim", "traced.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["seed"] == 0


@pytest.mark.soak
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_workers_end_with_their_parent(small, tmp_path, number, status):
    (tmp_path / "long.toml").write_text(
        SMALL.replace("rounds = 3", "rounds = 1000000").replace("count = 3", "count = 64")
    )
    command = [sys.executable, "-m", "farflung.cli", "sim", "long.toml", "--jobs", "2", "--plain", "--json"]
    process = subprocess.Popen(
        [*command, "--sweep", "rounds=1,1000000"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(farflung.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("1/2 ")
    workers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(workers) >= 2
    process.send_signal(number) if number == signal.SIGKILL else os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    if number == signal.SIGINT:
        assert "interrupted, 1 of 2 runs were done" in err
        assert "Traceback" not in err
        assert len(json.loads(out)) == 1
    deadline_s = time.monotonic() + 20
    while any(map(runs, workers)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not any(map(runs, workers))


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.soak
@pytest.mark.parametrize("name", [preset.name for preset in presets()])
def test_presets_finish(name):
    result = simulate(name)
    assert result.finished
    assert 0 < result.utilisation < 1
