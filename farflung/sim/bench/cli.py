"""`farflung bench`: compare schemes on this machine. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json as json_text
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from farflung.protocol.errors import ConfigError

if TYPE_CHECKING:
    from farflung.sim.bench.on_link import Line

FOLDER = Path("farflung-bench")
REGRESSED = 1
PARAMS_MAX = 1e9
"""Of made-up rows: payloads of all members are held at once, 32 GB of them for 16 members and 16 bits."""

WIRE_PARAMS_MAX = 1e12
"""Of counted bytes: a trillion."""

FILE_WIDTH = 150
"""Of tables that go into a file or a pipe."""

Switch = Parameter(negative="")

app = App(
    name="bench",
    help="Compare codecs on your line, rules among liars, and ways of exchanging: error, speed, bytes, training.",
)


@app.command
def codec(
    *,
    spec: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    updates: Annotated[tuple[Literal["trained", "gauss", "heavy"], ...], Parameter(negative="")] = ("trained",),
    size: int = 1 << 22,
    link: str = "",
    members: int = 8,
    params: float = 1e9,
    local_s: float = 30.0,
    threads: int = 1,
    repeats: int = 5,
    quality: Annotated[bool, Switch] = False,
    rounds: int = 100,
    seeds: int = 3,
    jobs: int = 1,
    baseline: Path | None = None,
    out: Path | None = None,
    json: Annotated[bool, Switch] = False,
    plain: Annotated[bool, Switch] = False,
    list_stages: Annotated[bool, Parameter(name="--list", negative="")] = False,
) -> int:
    """Measure codecs: a table here; CSV, plots and an HTML report in a folder. Exits with 1 if something regressed.

    Parameters
    ----------
    spec
        A codec's text or a preset's name; repeat it for several [default: every preset].
    updates
        What is encoded: pseudo-gradients of the built-in model (made once and kept), or made-up numbers.
    size
        Parameters of made-up updates.
    link
        Also say how long an exchange takes on this line: 20mbit, or 20mbit/100mbit for up and down.
    members
        Of the swarm on that line.
    params
        Of the model on that line.
    local_s
        Seconds of a local phase of that model.
    threads
        Also measure that many encoders at once; codec time on the line is divided among them.
    repeats
        The shortest of so many runs counts.
    quality
        Also train a small model with each of them, with data-parallel and with uncompressed DiLoCo; takes a minute per
        codec, seed and 100 rounds, and goes on where it was stopped.
    rounds
        Of that training.
    seeds
        Of that training.
    jobs
        Trainings at a time, each on one core.
    baseline
        What --json printed earlier, or a report's codecs.json: say what got worse.
    out
        Where the report goes [default: farflung-bench/codec].
    json
        Print the rows as JSON instead of the table, and write a report only if --out is given.
    plain
        Lines of text instead of colours and a progress bar.
    list_stages
        Print every stage and preset, and do nothing else.
    """
    from rich.console import Console

    console = Console(no_color=plain, highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    if list_stages:
        from farflung.sim.bench.catalogue import print_catalogue

        print_catalogue(console)
        return 0
    from farflung.sim.bench.codec_bench import Ask, regressions, run_bench, to_json
    from farflung.sim.bench.codec_report import print_table, write_report
    from farflung.sim.bench.quality_table import Plan, plain_rows, print_quality, train_all, write_quality

    plan = Plan(rounds, seeds, jobs)
    line = _line(link, members, params, local_s, threads) if link else None
    ask = Ask(specs=spec, updates=updates, params=size, threads=threads, repeats=repeats, line=line)
    folder = out if out is not None else FOLDER / "codec"
    with _progress(quiet=plain or json) as tell:
        rows = run_bench(ask, tell)
        trained = train_all([row.spec for row in rows], rows, line, plan, folder, tell) if quality else []
    if json:
        found = to_json(rows, line) | ({"quality": plain_rows(trained)} if quality else {})
        print(json_text.dumps(found, indent=2))
    else:
        print_table(rows, line, console)
    if quality and not json:
        print_quality(trained, plan, line, console)
    if out is not None or not json:
        _report(
            lambda: write_report(rows, line, folder, write_quality(trained, plan, line, folder) if quality else ()),
            quiet=json,
        )
    worse = regressions(rows, baseline) if baseline is not None else []
    for text in worse:
        print(f"regression: {text}", file=sys.stderr)
    return REGRESSED if worse else 0


@app.command
def rule(
    *,
    rule: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    members: int = 16,
    liars: int = 3,
    codec: str = "ef(1)|q2",
    attack: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    updates: Literal["trained", "gauss", "heavy"] = "trained",
    params: float = 1 << 20,
    weights: str = "uniform",
    threads: int = 1,
    repeats: int = 5,
    quality: Annotated[bool, Switch] = False,
    rounds: int = 30,
    seeds: int = 1,
    jobs: int = 1,
    out: Path | None = None,
    json: Annotated[bool, Switch] = False,
    plain: Annotated[bool, Switch] = False,
    list_rules: Annotated[bool, Parameter(name="--list", negative="")] = False,
) -> int:
    """Measure rules among liars: tables here; CSV, a map of rules and attacks, and an HTML report in a folder.

    Parameters
    ----------
    rule
        A rule's text; repeat it for several [default: one of each kind]. Without an f it is asked to survive --liars.
    members
        Of the round, liars included.
    liars
        Members that collude.
    codec
        What updates are sent through, with error feedback over some rounds: a text or a preset's name.
    attack
        What the liars do; repeat it for several [default: one of each kind].
    updates
        Pseudo-gradients of a small model, each member's from its own data (made once and kept), or made-up numbers.
    params
        Parameters of made-up updates, and of the rows on which rules are timed.
    weights
        How members' claims become weights: uniform, steps(cap=...), tokens(cap=...), ...
    threads
        Of every rule. They change no bit.
    repeats
        The shortest of so many runs counts.
    quality
        Also train a small model among liars under each rule and attack; takes 40 s a run on one core, for each rule,
        attack and seed, and goes on where it was stopped.
    rounds
        Of that training.
    seeds
        Of that training.
    jobs
        Trainings at a time, each on one core.
    out
        Where the report goes [default: farflung-bench/rule].
    json
        Print the rows as JSON instead of the tables, and write a report only if --out is given.
    plain
        Lines of text instead of colours and a progress bar.
    list_rules
        Print every rule and every attack, and do nothing else.
    """
    from rich.console import Console

    console = Console(no_color=plain, highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    if list_rules:
        from farflung.sim.bench.rule_catalogue import print_catalogue

        print_catalogue(console)
        return 0
    from farflung.sim.bench.quality_table import Plan
    from farflung.sim.bench.rule_bench import Ask, run_bench
    from farflung.sim.bench.rule_quality import plain_rows, print_quality, train_all, write_quality
    from farflung.sim.bench.rule_report import print_report, to_json, write_report

    if not 1 <= params <= PARAMS_MAX:
        raise ConfigError(f"--params is from 1 to {PARAMS_MAX:.0e}: every payload is in memory, got {params}")
    plan = Plan(rounds, seeds, jobs)
    ask = Ask(rule, members, liars, codec, attack, updates, int(params), weights, threads, repeats)
    folder = out if out is not None else FOLDER / "rule"
    with _progress(quiet=plain or json) as tell:
        rows = run_bench(ask, tell)
        grid = train_all(rows, ask, plan, folder, tell) if quality else None
    if json:
        found = to_json(rows, ask) | ({"quality": plain_rows(grid)} if grid is not None else {})
        print(json_text.dumps(found, indent=2))
    else:
        print_report(rows, ask, console)
        if grid is not None:
            print_quality(grid, plan, ask, console)
    if out is not None or not json:
        _report(
            lambda: write_report(rows, ask, folder, write_quality(grid, plan, ask, folder) if grid is not None else ()),
            quiet=json,
        )
    return 0


@app.command
def wire(
    *,
    members: Annotated[tuple[int, ...], Parameter(negative="")] = (4, 8, 16, 32, 64, 128, 256),
    params: float = 1 << 20,
    codec: str = "int8",
    gather: Annotated[tuple[str, ...], Parameter(negative="")] = ("ef(1)|q2", "int8"),
    graph: str = "base(k=1)",
    ticks: Annotated[tuple[int, ...], Parameter(negative="")] = (0, 2),
    outer: str = "nesterov(lr=0.7,momentum=0.6)",
    reference_rounds: int = 20,
    fragments: int = 1,
    link: str = "10mbit/100mbit",
    latency_ms: float = 20.0,
    round_s: float = 30.0,
    out: Path | None = None,
    json: Annotated[bool, Switch] = False,
    plain: Annotated[bool, Switch] = False,
) -> int:
    """Count the bytes of a round as a swarm grows: gather, push-sum and pairs, and where one overtakes another.

    Parameters
    ----------
    members
        Of the swarm; repeat it for several.
    params
        Of the model.
    codec
        What members that mix send: a text or a preset's name.
    gather
        What members that gather send; repeat it for several.
    graph
        Who gives to whom in push-sum.
    ticks
        Exchanges of a push-sum round, 0 for a whole period; repeat it for several.
    outer
        The outer optimiser: what it keeps travels with the reference of members that mix.
    reference_rounds
        How often one is published.
    fragments
        Into how many parts members that mix cut the model.
    link
        Every member's line: 20mbit, or 20mbit/100mbit for up and down.
    latency_ms
        From any member to any other, one way.
    round_s
        Seconds from round to round, training included: members show that they are alive meanwhile.
    out
        Where the report goes [default: farflung-bench/wire].
    json
        Print the rows as JSON instead of the table, and write a report only if --out is given.
    plain
        Lines of text instead of colours.
    """
    from rich.console import Console

    from farflung.sim.bench.on_link import parse_link
    from farflung.sim.bench.wire_bench import Ask, run_bench, to_json
    from farflung.sim.bench.wire_report import print_report, write_report

    console = Console(no_color=plain, highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    line = (*parse_link(link), latency_ms / 1e3)
    ask = Ask(members, _whole(params), gather, codec, graph, ticks, outer, reference_rounds, fragments, *line, round_s)
    result = run_bench(ask)
    if json:
        print(json_text.dumps(to_json(result, ask), indent=2))
    else:
        print_report(result, ask, console)
    if out is not None or not json:
        _report(lambda: write_report(result, ask, out if out is not None else FOLDER / "wire"), quiet=json)
    return 0


def _whole(params: float) -> int:
    if not (1 <= params <= WIRE_PARAMS_MAX):
        raise ConfigError(f"--params is from 1 to {WIRE_PARAMS_MAX:.0e}, got {params}")
    return int(params)


def _line(link: str, members: int, params: float, local_s: float, threads: int) -> Line:
    from farflung.sim.bench.on_link import Line, parse_link

    up_bps, down_bps = parse_link(link)
    return Line(up_bps, down_bps, members, params, local_s, threads)


def _report(write: Callable[[], Path], *, quiet: bool) -> None:
    """Write a report and say where it is. Raises ConfigError if it cannot be written."""
    try:
        page = write()
    except OSError as error:
        raise ConfigError(f"the report cannot be written, choose another --out: {error}") from None
    print(f"report: {page}", file=sys.stderr if quiet else sys.stdout)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Says what is being measured, on stderr."""
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("measuring") as status:
        yield status.update
