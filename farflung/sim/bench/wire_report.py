"""What `farflung bench wire` shows: a table, the crossovers in words, CSV, JSON, a picture and one HTML page."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from farflung.sim.bench.codec_report import escape_markup
from farflung.sim.bench.page import html_table, page, picture, section
from farflung.sim.bench.wire_bench import Ask, Result, plain_row, to_json
from farflung.sim.bench.wire_count import Count, Crossing
from farflung.sim.report.bands import duration_text, figures
from farflung.sim.report.drawing import SERIES, Drawing, house_settings, new_drawing, tidy_axes, write_png

HEADERS = ("members", "way", "ticks", "payloads", "bulk", "control", "total", "exchange")

MARKS = "osD^vPX*"


def bytes_text(size: float) -> str:
    """Three figures in the unit that suits: 870 B, 4.56 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * scale:
            return f"{figures(size / scale)} {unit}"
    return f"{figures(size)} B"


def cells_of(item: Count, ask: Ask) -> tuple[str, ...]:
    """A count as text."""
    return (
        str(item.members),
        item.way.label,
        str(item.ticks) if item.way.mixes else "-",
        figures(item.payloads),
        bytes_text(item.bulk),
        bytes_text(item.control),
        bytes_text(item.total),
        duration_text(item.wire_s(ask.up_bps, ask.down_bps, ask.latency_s)),
    )


def crossing_text(found: Crossing) -> str:
    """ "from 36 members on, for some numbers already from 24"."""
    if found.first is None:
        return "never"
    if found.always is None:
        return f"for some numbers of members from {found.first} on, not for all"
    some = "" if found.first == found.always else f", for some numbers already from {found.first}"
    return f"from {found.always} members on{some}"


def crossovers(result: Result) -> list[str]:
    """Where each way that mixes overtakes each way that gathers, in sentences."""
    return [
        f"{item.mixing.label} sends less than {item.gather.label}: {crossing_text(item.bytes)}; "
        f"is quicker on this line: {crossing_text(item.seconds)}"
        for item in result.overtakings
    ]


def notes(ask: Ask) -> list[str]:
    """What the columns mean."""
    return [
        f"one round of {ask.params:,.0f} parameters: what a member sends, which on average is also what it receives. "
        "payloads: how many; bulk: their bytes and, where members mix, the reference that is published every so many "
        f"rounds. control: everything else, signs of life for {duration_text(ask.round_s)} included. Messages as they "
        "are encoded; TCP, TLS and HTTP/2 add 6 to 8 %",
        "gather: on equal lines a member sends as many payloads as it receives, its own once and others' on the way; a "
        "slow member sends about one, and faster ones relay it. Nobody relays what members mix: a slow member sends as "
        "much as any other",
        f"exchange: every line {ask.up_bps / 1e6:g} Mbit/s up and {ask.down_bps / 1e6:g} down, "
        f"{1e3 * ask.latency_s:g} ms one way; the slower direction, and one delay after the other. Without codec and "
        "training, slow starts and waiting for anybody: at best",
        "pairs, and push-sum with fewer ticks than a period, do not give the mean: members differ and drift together",
    ]


def print_report(result: Result, ask: Ask, console: Console) -> None:
    """The table, where ways overtake each other, and what the columns mean."""
    table = Table(title=f"bytes per member and round, {ask.params:,.0f} parameters", box=SIMPLE_HEAD)
    for name in HEADERS:
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=name != "way", overflow="fold")
    last = None
    for item in result.counts:
        if last not in (None, item.members):
            table.add_section()
        table.add_row(*map(escape_markup, cells_of(item, ask)))
        last = item.members
    console.print(table)
    for text in crossovers(result):
        console.print(text, highlight=False, markup=False)
    for note in notes(ask):
        console.print(note, style="dim", highlight=False, markup=False)


def draw_totals(result: Result, ask: Ask) -> Drawing:
    """Total bytes by number of members, a line per way."""
    caption = (
        f"What one member sends in one round of {ask.params:,.0f} parameters, everything counted. Gather grows with "
        "the number of members, mixing with the number of ticks, and both with the members that are told of it."
    )
    drawing = new_drawing("wire", "Bytes per member and round", caption, height=5.0)
    with house_settings():
        axes: Any = drawing.figure.subplots()
        for number, label in enumerate(dict.fromkeys(item.way.label for item in result.counts)):
            some = [item for item in result.counts if item.way.label == label]
            points = [item.members for item in some], [item.total / 1e6 for item in some]
            look: dict[str, Any] = {"color": SERIES[number % len(SERIES)], "marker": MARKS[number % len(MARKS)]}
            axes.plot(*points, label=label, linewidth=1.2, markersize=4, **look)
        axes.set(xscale="log", yscale="log", xlabel="members", ylabel="MB per member and round")
        axes.set_xticks(ask.members, [str(n) for n in ask.members])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
        tidy_axes(axes, grid="both")
    return drawing


def write_report(result: Result, ask: Ask, folder: Path) -> Path:
    """wire.csv, wire.json, wire.png and report.html in a folder; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "wire.csv", [plain_row(item, ask) for item in result.counts])
    (folder / "wire.json").write_text(json.dumps(to_json(result, ask), indent=2) + "\n", encoding="utf-8")
    drawing = draw_totals(result, ask)
    with house_settings():
        drawn = picture(drawing)
        write_png(drawing, folder)
    found = [*crossovers(result), *notes(ask)]
    body = section("", html_table(HEADERS, [cells_of(item, ask) for item in result.counts], found))
    path = folder / "report.html"
    path.write_text(page("farflung: bytes on the wire", [body, drawn]), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Plain rows, all with the same names."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
