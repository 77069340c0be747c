"""The command line. Nothing heavy is imported before a command needs it: `farflung --help` does not load torch.

Exit status: 0 well; 2 the user can fix it, and one line says how; 3 too few peers; 70 our own bug; 130 interrupted.
"""

from __future__ import annotations

import json as json_text
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from farflung import __version__
from farflung.protocol.errors import ConfigError, FarflungError, LocalError, TooFewPeers

if TYPE_CHECKING:
    from farflung.node.display import Row

USAGE, TOO_FEW, BUG, INTERRUPTED = 2, 3, 70, 130

_HOME_HELP = (
    "Where identity, chain and checkpoints are kept [default: $FARFLUNG_HOME, or farflung among the user's data]."
)
HomeOption = Annotated[Path | None, Parameter(help=_HOME_HELP)]
RunOption = Annotated[str, Parameter(help="The first letters of a run's id, where a home has several.")]
ListenOption = Annotated[str, Parameter(help="Accept connections there; port 0 takes a free one and keeps it.")]
AnnounceOption = Annotated[
    tuple[str, ...],
    Parameter(help="host:port that others should use instead, behind a forwarded port for instance.", negative=""),
]
Switch = Parameter(negative="")

app = App(
    name="farflung",
    help="Train one model on machines that are far apart and thinly connected.",
    version=__version__,
    result_action="return_value",
    help_format="plaintext",
)


@app.command
def new(
    run_file: Path | None = None,
    *,
    home: HomeOption = None,
    listen: ListenOption = "0.0.0.0:0",
    announce: AnnounceOption = (),
    example: Annotated[bool, Switch] = False,
) -> int:
    """Create a run and print the invite.

    Parameters
    ----------
    run_file
        TOML with the run's settings; without it the built-in model is trained with the defaults.
    example
        Print a run file to start from, and do nothing else.
    """
    from farflung.aggregation.outer import parse_outer
    from farflung.compression.presets import PRESETS
    from farflung.node.founding import found_run
    from farflung.node.run_file import EXAMPLE, RunFile, read_run_file
    from farflung.node.store import open_home

    if example:
        print(EXAMPLE, end="")
        return 0
    _import_from_here()
    run = read_run_file(run_file) if run_file is not None else RunFile()
    founded = found_run(run, open_home(_home(home)), listen=listen, announce=announce)
    where = f" --home {home}" if home is not None else ""
    here = f"{where} --listen {founded.listen}" + "".join(f" --announce {address}" for address in announce)
    task = "" if run.task.startswith("builtin:") else f" --task {run.task}"
    genesis = founded.genesis
    size = f"{genesis.schema.numel:,} parameters"
    rule = f"{genesis.rule}, {genesis.start_members} to start"
    print(f"run {genesis.run_id.hex()[:8]}: {genesis.name}, {size}, {rule}, kept in {founded.directory}")
    preset = PRESETS.get(run.codec.strip().lower())
    if preset is not None and parse_outer(preset.outer).spec != genesis.outer:
        print(f'note: {run.codec} goes with outer = "{preset.outer}"; this run has "{genesis.outer}"')
    print(f"\nStart training on this machine:\n\n  farflung join{here}{task}")
    print("\nOn every other machine (the invite holds the join secret; keep it among members):")
    print(f"\n  farflung join{task} {founded.invite}")
    return 0


@app.command
def join(
    invite: str = "",
    *,
    home: HomeOption = None,
    run: RunOption = "",
    name: str = "",
    listen: ListenOption = "0.0.0.0:0",
    announce: AnnounceOption = (),
    upload_mbit: float | None = None,
    discovery: Literal["both", "dht", "rendezvous"] = "both",
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    accumulate: int = 1,
    clip_norm: float | None = None,
    threads: int | None = None,
    eval_rounds: int = 5,
    task: str = "",
    log_json: Annotated[bool, Switch] = False,
    plain: Annotated[bool, Switch] = False,
    json: Path | None = None,
) -> int:
    """Join a run and train. Resumes by itself; Ctrl-C leaves politely, twice at once.

    Parameters
    ----------
    invite
        What `farflung new` or `farflung invite` printed. Without it, go on with this home's run.
    name
        Shown to the other members.
    upload_mbit
        Cap on bulk uploads.
    discovery
        How members are found: the hivemind DHT, the invite's addresses, or both.
    device
        "auto" takes CUDA, then MPS, then the CPU.
    precision
        Of the forward pass; parameters keep their type.
    accumulate
        Batches per step.
    clip_norm
        Scale this member's gradients down to this norm.
    threads
        CPU threads for training and for decoding.
    eval_rounds
        Evaluate after every so many rounds, and at the end; 0: never.
    task
        Allow this run's own task, "module:object": its code runs on this machine.
    log_json
        One JSON object per line: time, level, peer, round, reason, message.
    plain
        Lines of text instead of a live display.
    json
        Write a summary here at the end.
    """
    from farflung.node.logs import hush_libraries

    hush_libraries()
    from farflung.node import joining
    from farflung.node.join_view import show
    from farflung.node.opening import JoinSettings
    from farflung.node.saved import saved_invite
    from farflung.node.signals import Signals
    from farflung.node.store import open_home
    from farflung.node.trainer import TrainerSettings
    from farflung.node.training_loop import LoopSettings
    from farflung.protocol.invite import parse_invite

    root = _home(home)
    settings = JoinSettings(
        home=root,
        name=name,
        listen=listen,
        announce=announce,
        upload_mbit=upload_mbit,
        discovery=discovery,
        threads=threads or 1,
    )
    trainer = TrainerSettings(
        device=device, precision=precision, accumulate=accumulate, clip_norm=clip_norm, threads=threads
    )
    loop = LoopSettings(trainer, eval_rounds=eval_rounds, task=task)
    if task:
        _import_from_here()
    parsed = parse_invite(invite) if invite else None
    opened = open_home(root)
    with Signals() as signals:
        chosen = parsed if parsed is not None else saved_invite(root, run)
        with joining.joining(opened, chosen, settings, loop, signals) as one, show(one, plain=plain, as_json=log_json):
            code = one.train()
    if json is not None:
        joining.write_summary(json, one.summary)
    return code


@app.command
def status(*, home: HomeOption = None, run: RunOption = "", json: Annotated[bool, Switch] = False) -> int:
    """Say what this machine's nodes are doing, why a round waits, and for whom.

    Parameters
    ----------
    json
        Everything that is known, as JSON.
    """
    from farflung.node.display import status_lines

    rows = _rows(_home(home), run)
    if json:
        print(_json([{"life": row.life, "status": row.status, "train": row.train} for row in rows]))
    else:
        print("\n\n".join("\n".join(status_lines(row)) for row in rows))
    return 0


@app.command
def recheck(
    *,
    home: HomeOption = None,
    run: RunOption = "",
    round_index: Annotated[int | None, Parameter(name="--round")] = None,
    json: Annotated[bool, Switch] = False,
) -> int:
    """Recompute members' shares from the geometry in the round log. Exits with 1 if a round does not follow from it.

    Parameters
    ----------
    round_index
        Only this round [default: all that were logged].
    json
        One object per round.
    """
    from farflung.node.recheck import recheck_runs
    from farflung.node.saved import saved_runs

    found = recheck_runs(saved_runs(_home(home), run), round_index)
    print("\n".join(_json(item._asdict()) if json else item.text for item in found))
    return 1 if any(item.wrong for item in found) else 0


@app.command
def invite(
    *,
    home: HomeOption = None,
    run: RunOption = "",
    announce: AnnounceOption = (),
    refresh: Annotated[bool, Switch] = False,
) -> int:
    """Print an invite to this home's run.

    Parameters
    ----------
    refresh
        Look this machine's addresses up again: for when they have changed.
    """
    from farflung.node.saved import refreshed, saved_invite, saved_runs
    from farflung.node.store import open_home, read_status
    from farflung.protocol.invite import parse_invite

    root = _home(home)
    saved = saved_invite(root, run)
    directory = saved_runs(root, saved.run_id.hex())[0]
    if text := (read_status(directory) or {}).get("invite"):
        saved = parse_invite(text)
    if refresh or announce:
        saved = refreshed(saved, str(open_home(root).identity.peer_id), directory, announce)
    print(saved)
    return 0


app.command("farflung.node.demo_cli:demo", name="demo", help="Train a real swarm on this machine.")

app.command(
    "farflung.sim.cli:app", name="sim", help="Simulate a swarm: time, utilisation, bytes, and what is in the way."
)

app.command("farflung.sim.bench.cli:app", name="bench", help="Compare codecs on your line, and rules among liars.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors of the user and of the network are one line on stderr."""
    try:
        result = app(sys.argv[1:] if arguments is None else list(arguments), exit_on_error=False, print_error=False)
    except (CycloptsError, ConfigError) as error:
        return _fail(error, USAGE)
    except TooFewPeers as error:
        return _fail(error, TOO_FEW)
    except LocalError as error:
        return _fail(f"{error}. This is a bug in farflung: please file it, with the log", BUG)
    except FarflungError as error:
        return _fail(error, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def _fail(error: object, code: int) -> int:
    print(f"farflung: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _home(given: Path | None) -> Path:
    from farflung.node.saved import default_home

    return given.expanduser() if given is not None else default_home()


def _rows(root: Path, run: str) -> list[Row]:
    import time

    from farflung.node.display import Row
    from farflung.node.progress import describe_life, read_progress
    from farflung.node.saved import saved_runs
    from farflung.node.store import read_status

    rows = []
    for directory in saved_runs(root, run):
        status = read_status(directory) or {"run_id": directory.name, "why": "`farflung join` starts it"}
        train = read_progress(directory) or {}
        rows.append(Row(directory.name[:8], status, train, describe_life(status, train, time.time_ns() // 1_000_000)))
    return rows


def _json(value: Any) -> str:
    return json_text.dumps(value, indent=2, sort_keys=True)


def _import_from_here() -> None:
    """Let `--task module:object` name a file in the current folder, as `python -m` would."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


if __name__ == "__main__":
    sys.exit(main())
