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
FILE_WIDTH = 150
"""Of tables that go into a file or a pipe."""

Switch = Parameter(negative="")

app = App(name="bench", help="Compare codecs: size, error, speed, time on your line, and what training makes of them.")


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
        try:
            page = write_report(rows, line, folder, write_quality(trained, plan, line, folder) if quality else ())
        except OSError as error:
            raise ConfigError(f"the report cannot be written, choose another --out: {error}") from None
        print(f"report: {page}", file=sys.stderr if json else sys.stdout)
    worse = regressions(rows, baseline) if baseline is not None else []
    for text in worse:
        print(f"regression: {text}", file=sys.stderr)
    return REGRESSED if worse else 0


def _line(link: str, members: int, params: float, local_s: float, threads: int) -> Line:
    from farflung.sim.bench.on_link import Line, parse_link

    up_bps, down_bps = parse_link(link)
    return Line(up_bps, down_bps, members, params, local_s, threads)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Says what is being measured, on stderr."""
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("measuring") as status:
        yield status.update
