"""`farflung sim`: simulate a swarm, and what belongs to that. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json as json_text
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from farflung.protocol.errors import ConfigError

if TYPE_CHECKING:
    from farflung.sim.results import RunResult
    from farflung.sim.scenario import Scenario
    from farflung.sim.sweep import Job, Outcome

FOLDER = Path("farflung-sim")
"""Reports go into a folder of the scenario's name in here, in the current one."""

FAILED, INTERRUPTED = 1, 130

Switch = Parameter(negative="")

app = App(name="sim", help="Simulate a swarm: time, utilisation, bytes, and what is in the way.")


@app.default
def run(
    scenario: str = "",
    *,
    seeds: int = 1,
    seed: int = 0,
    sweep: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    out: Path | None = None,
    jobs: int = 0,
    engine: Literal["processes", "ray"] = "processes",
    log: Path | None = None,
    trajectory: Annotated[bool, Switch] = False,
    plain: Annotated[bool, Switch] = False,
    json: Annotated[bool, Switch] = False,
    list_presets: Annotated[bool, Parameter(name="--list", negative="")] = False,
) -> int:
    """Simulate a scenario: a table here; CSV files, plots and an HTML report in a folder.

    Parameters
    ----------
    scenario
        A preset's name or a TOML file.
    seeds
        Runs with different draws of lines, speeds and luck.
    seed
        The first seed.
    sweep
        codec=int8,q2 tries each value; several sweeps try every combination.
    out
        Where the report goes [default: farflung-sim/ and the scenario's name].
    jobs
        Runs at a time; 0: one per core.
    engine
        "ray" uses the cluster that Ray finds.
    log
        Write the event log of a single training run here, for `farflung sim diff`.
    trajectory
        Train once per seed, and answer every network from that; refused where who takes part depends on the network.
    plain
        Lines of text instead of a progress bar.
    json
        Print the results as JSON, and write files only if --out is given.
    list_presets
        Name the presets, and do nothing else.
    """
    if list_presets:
        return _list()
    if not scenario:
        raise ConfigError("name a preset or a scenario file; `farflung sim --list` names the presets, got none")
    if seeds < 1:
        raise ConfigError(f"--seeds is at least 1, got {seeds}")
    from farflung.sim.cli_progress import run_all
    from farflung.sim.scenario_file import load_scenario, scenario_folder
    from farflung.sim.sweep import make_jobs, parse_sweep

    loaded = load_scenario(scenario)
    sweeps = [parse_sweep(text) for text in sweep]
    work = make_jobs(loaded, seeds=range(seed, seed + seeds), sweeps=sweeps, folder=scenario_folder(scenario))
    if trajectory:
        work = _from_trajectories(work)
    if log is not None and (len(work) > 1 or engine == "ray"):
        raise ConfigError(
            f"--log is for a single run in this process: one seed and no sweep, got {len(work)} by {engine}"
        )
    outcome = run_all(work, loaded.name, workers=jobs, engine=engine, log=log, plain=plain)
    if outcome.results and json:
        print(json_text.dumps([facts_of(result) for result in outcome.results], indent=2))
    if outcome.results and (out is not None or not json):
        _report(outcome.results, loaded, out if out is not None else FOLDER / loaded.name, quiet=json, plain=plain)
    return _verdict(outcome, len(work))


@app.command
def show(scenario: str, *, full: Annotated[bool, Switch] = False) -> int:
    """Print a scenario, comments included: something to start your own from.

    Parameters
    ----------
    scenario
        A preset's name or a TOML file.
    full
        Print every setting with its value instead, without comments.
    """
    from farflung.sim.scenario_file import load_scenario, scenario_text, to_toml

    loaded = load_scenario(scenario)
    print(to_toml(loaded, full=True) if full else scenario_text(scenario), end="")
    return 0


@app.command
def trace(
    file: Path,
    *,
    members: int,
    hours: float,
    kind: Literal["weibull", "lognormal", "exponential", "diurnal"] = "weibull",
    session_s: str | None = None,
    gap_s: str | None = None,
    crash: float | None = None,
    low: float | None = None,
    high: float | None = None,
    period_h: float | None = None,
    seed: int = 0,
) -> int:
    """Write a file of made-up sessions, for `churn.kind = "trace"`.

    Parameters
    ----------
    file
        Where to; CSV.
    members
        How many.
    hours
        How long.
    kind
        How they come and go.
    session_s
        How long they stay: "weibull(0.59, 2340)".
    gap_s
        How long they are away: "exponential(1200)".
    crash
        Share of departures without a word.
    low
        diurnal: share online at the quietest hour.
    high
        diurnal: share online at the busiest.
    period_h
        diurnal: length of a day.
    seed
        Another seed is another file.
    """
    from farflung.sim.changes import read_value
    from farflung.sim.draw import Draw
    from farflung.sim.scenario import Churn
    from farflung.sim.traces import generate, write_trace

    draws = {"session_s": session_s, "gap_s": gap_s}
    given: dict[str, Any] = {
        name: read_value(Draw, text, f"--{name.replace('_', '-')}") for name, text in draws.items() if text is not None
    }
    numbers = {"crash": crash, "low": low, "high": high, "period_h": period_h}
    given |= {name: value for name, value in numbers.items() if value is not None}
    made = generate(Churn(kind=kind, **given), members, hours * 3600, seed)
    write_trace(made, file)
    print(f"{sum(map(len, made.sessions))} sessions of {members} members in {hours:g} h: {file}")
    return 0


@app.command
def diff(left: Path, right: Path) -> int:
    """Print where two event logs part; exits with 1 if they do.

    Parameters
    ----------
    left
        An event log.
    right
        Another one.
    """
    from farflung.sim.eventlog import first_divergence

    try:
        found = first_divergence(left, right)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"not an event log that can be read: {error}") from None
    print(found if found is not None else "the logs are equal")
    return FAILED if found is not None else 0


@app.command
def calibrate(*folders: Path, mbit: float | None = None, fsync_ms: float = 0.0, out: Path | None = None) -> int:
    """Fit a scenario to a live swarm, from what its members have on disk; print it, or write it to a file.

    Parameters
    ----------
    folders
        All members' homes, or the folder of `farflung demo --out`. The first run gives the machines, all the lines.
    mbit
        The rate of members' lines, where runs with payloads of different sizes do not tell it.
    fsync_ms
        How long their disks take for a durable write, if you know; else it is a part of the latency.
    out
        Write the scenario there.
    """
    if not folders:
        raise ConfigError("name the members' homes, or the folder of `farflung demo --out`, got none")
    from farflung.sim.calibrate import calibrate as fit

    text = fit(folders, mbit=mbit, fsync_ms=fsync_ms).toml()
    if out is None:
        print(text, end="")
        return 0
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the scenario cannot be written there: {error}") from None
    print(f"scenario: {out}")
    return 0


@app.command
def explore(
    *,
    seeds: int = 100,
    seed: int = 0,
    replay: str = "",
    jobs: int = 0,
    plain: Annotated[bool, Switch] = False,
    json: Annotated[bool, Switch] = False,
) -> int:
    """Let random things go wrong among real nodes, and check what must always hold; exits with 1 if something does not.

    Parameters
    ----------
    seeds
        Worlds to try.
    seed
        The first one.
    replay
        Run exactly what a violation's line says instead.
    jobs
        Worlds at a time; 0: one per core.
    plain
        No progress bar.
    json
        Print seeds and violations as JSON, each with the line that replays it.
    """
    if seeds < 1 or seed < 0:
        raise ConfigError(f"--seeds is at least 1 and --seed at least 0, got {seeds} and {seed}")
    from farflung.sim.cli_progress import explore_all
    from farflung.sim.explore import Exploration
    from farflung.sim.explore import replay as run_again

    if replay:
        again = run_again(replay)
        found = Exploration(1, (again,) if again is not None else ())
    else:
        found = explore_all(range(seed, seed + seeds), jobs=jobs, plain=plain)
    if json:
        violations = [asdict(item) for item in found.violations]
        print(json_text.dumps({"seeds": found.seeds, "violations": violations}, indent=2))
    else:
        for item in found.violations:
            print(f"seed {item.seed}: {item.invariant}: {item.message}\n  {item.command}")
        print(f"{found.seeds} worlds, {len(found.violations)} violations")
    return FAILED if found.violations else 0


def facts_of(result: RunResult) -> dict[str, Any]:
    """One run as plain data: what `--json` prints. Rounds are in rounds.csv. What is not finite becomes null."""
    facts = {name: value for name, value in asdict(result).items() if name not in ("segments", "rounds")}
    facts |= {"utilisation": result.utilisation, "bytes_sent": result.bytes_sent, "rounds": len(result.rounds)}
    return _finite(facts)  # type: ignore[no-any-return]


def _from_trajectories(work: list[Job]) -> list[Job]:
    from farflung.sim.trajectory_shelf import default_shelf

    return [replace(job, shelf=default_shelf()) for job in work]


def _list() -> int:
    from farflung.sim.scenario_file import presets

    known = presets()
    width, kinds = max(len(item.name) for item in known), max(len(item.fidelity) for item in known)
    for item in known:
        print(f"{item.name:<{width}}  {item.fidelity:<{kinds}}  {item.summary}")
    return 0


def _report(results: Sequence[RunResult], scenario: Scenario, folder: Path, *, quiet: bool, plain: bool) -> None:
    from rich.console import Console

    from farflung.sim.report.files import write_csv
    from farflung.sim.report.html import write_html
    from farflung.sim.report.plots import write_plots
    from farflung.sim.report.table import print_table
    from farflung.sim.scenario_file import to_toml

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the report's folder cannot be made, choose another --out: {error}") from None
    (folder / "scenario.toml").write_text(to_toml(scenario), encoding="utf-8")
    if not quiet:
        print_table(results, Console(no_color=plain, highlight=False), scenario)
    write_csv(results, folder)
    write_plots(results, folder, scenario)
    page = write_html(results, scenario, folder)
    print(f"report: {page}", file=sys.stderr if quiet else sys.stdout)


def _verdict(outcome: Outcome, wanted: int) -> int:
    """The exit status, and on stderr what is missing. Raises the error if no run came through."""
    if outcome.failures and not outcome.results and not outcome.interrupted:
        raise outcome.failures[0].error
    for failure in outcome.failures:
        print(f"farflung: {failure}", file=sys.stderr)
    if outcome.interrupted:
        ended = len(outcome.results) + len(outcome.failures)
        print(f"farflung: interrupted, {ended} of {wanted} runs were done", file=sys.stderr)
        return INTERRUPTED
    return FAILED if outcome.failures else 0


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and value - value != 0 else value
