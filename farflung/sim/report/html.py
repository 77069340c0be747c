"""One page with everything: the answer in words, pictures, tables, the scenario. It loads nothing from anywhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

import farflung
from farflung.node.display import human_bytes
from farflung.sim.report.attribution import MEANING, advise
from farflung.sim.report.bands import band_of, band_text, duration_text, figures, percent_text
from farflung.sim.report.drawing import house_settings, to_svg
from farflung.sim.report.figures import member_medians
from farflung.sim.report.plots import drawings
from farflung.sim.report.summary import (
    VariantSummary,
    doubts,
    headline,
    leader,
    run_loss_text,
    summarise,
)
from farflung.sim.report.table import PATH_HEADERS, advice_line, path_rows, variant_headers, variant_rows
from farflung.sim.report.variants import Variant, variants
from farflung.sim.results import RunResult
from farflung.sim.scenario import Scenario
from farflung.sim.scenario_file import to_toml

MEMBERS_MAX = 200
"""Rows of a table of members; of more, the least used ones are shown."""

STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, 'DejaVu Sans', sans-serif; color: #222; background: #f4f4f2; margin: 0 }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px }
section, header { background: #fff; border: 1px solid #e2e2de; border-radius: 8px; padding: 14px 22px; margin: 14px 0 }
h1 { margin: 4px 0; font-size: 24px } h2 { font-size: 17px; margin: 6px 0 10px }
.answer { font-size: 19px; line-height: 1.45 } .faint { color: #666; font-size: 13px }
.doubts { border-color: #D55E00; border-left-width: 6px } .advice { border-left: 6px solid #0072B2 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: 4px 9px; border-bottom: 1px solid #e8e8e4; text-align: right; vertical-align: top }
th { border-bottom: 2px solid #999; font-weight: 600 } tr.best td { font-weight: 600; background: #eef5fa }
th.left, td.left { text-align: left }
svg { width: 100%; height: auto; display: block } svg * { stroke-linejoin: round; stroke-linecap: butt }
pre { background: #f4f4f2; padding: 12px; overflow-x: auto; font-size: 13px } code { font-size: 12px }
summary { cursor: pointer; font-weight: 600; padding: 4px 0 }
"""

LEFT = {"variant", "cause", "most to blame", "member", "attacker", "note", "finished", "event log"}
"""Columns of words."""


def write_html(results: Sequence[RunResult], scenario: Scenario, folder: Path) -> Path:
    """Write report.html, a page that works from a disk and without a network; returns its path.

    Equal results give equal bytes, in whatever order they come. Names and notes are escaped: they may say anything.
    Raises ConfigError if there are no results.
    """
    found, summaries = variants(results), summarise(results, scenario)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    parts = [
        _header(results, scenario),
        *_warnings(results, scenario, summaries),
        _overview(summaries),
        *_pictures(found, summaries),
        _causes(summaries),
        _members(found, summaries),
        _runs(found),
        _provenance(found, scenario),
    ]
    title = escape(f"{scenario.name}: farflung simulation")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(parts)
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body><main>\n{body}\n'
        "</main></body></html>\n",
        encoding="utf-8",
    )
    return path


def _header(results: Sequence[RunResult], scenario: Scenario) -> str:
    summary = f'<p class="faint">{escape(scenario.summary)}</p>' if scenario.summary else ""
    answer = escape(headline(results, scenario))
    return f'<header><h1>{escape(scenario.name)}</h1>{summary}<p class="answer">{answer}</p></header>'


def _warnings(results: Sequence[RunResult], scenario: Scenario, summaries: Sequence[VariantSummary]) -> Iterator[str]:
    """What does not hold, what is only an estimate, and what to change."""
    found = doubts(results, scenario)
    if found:
        yield f'<section class="doubts"><h2>Before you believe it</h2>{_list(found)}</section>'
    estimated = [item.label for item in summaries if item.loss_kind == "estimate"]
    if estimated:
        which = "" if len(estimated) == len(summaries) else f" (of {escape('; '.join(estimated))})"
        yield (
            f"<section><h2>Estimates</h2><p>No model was trained: losses{which} and times to a loss are "
            "<b>estimates from published scaling laws</b>, marked est. Times, bytes and utilisation are simulated.</p>"
            "</section>"
        )
    advice = advice_line(advise(leader(summaries)[0].path))
    if advice:
        yield (
            f'<section class="advice"><h2>What to change first</h2><p>{escape(advice)}.</p><p class="faint">A bound '
            "from the records of blame: simulate the change to know what it really brings.</p></section>"
        )


def _overview(summaries: Sequence[VariantSummary]) -> str:
    best = leader(summaries)[0].label if len(summaries) > 1 else ""
    table = _table(variant_headers(summaries), variant_rows(summaries), best=best)
    return _section("All variants", table, "Median over seeds, in brackets 10 % to 90 %.")


def _pictures(found: Sequence[Variant], summaries: Sequence[VariantSummary]) -> Iterator[str]:
    with house_settings():
        for drawing in drawings(found, summaries):
            yield _section(drawing.title, to_svg(drawing), drawing.caption)


def _causes(summaries: Sequence[VariantSummary]) -> str:
    best, _ = leader(summaries)
    tables = [
        _details(item.label, _table(PATH_HEADERS, path_rows(item.path)), opened=item is best) for item in summaries
    ]
    note = (
        "Every second of the rounds' critical path belongs to one cause, and to a member where one can be named. "
        "Lost is all that is not training at the median member's pace."
    )
    seen = {part.cause for item in summaries for part in item.path}
    words = "; ".join(f"{cause}: {meaning}" for cause, meaning in MEANING.items() if cause in seen)
    return _section("Whose fault the time is", "".join(tables), f"{note} {words[:1].upper()}{words[1:]}.")


def _members(found: Sequence[Variant], summaries: Sequence[VariantSummary]) -> str:
    best, _ = leader(summaries)
    tables = []
    for variant in found:
        rows = _member_rows(variant)
        if len(rows) > MEMBERS_MAX:
            rows = rows[:MEMBERS_MAX]
            label = f"{variant.label}: the {MEMBERS_MAX} least used members; members.csv has all"
        else:
            label = variant.label
        tables.append(_details(label, _table(MEMBER_HEADERS, rows), opened=variant.label == best.label))
    note = (
        "Median over seeds, each number on its own; least used first. On the wire: with headers and acknowledgements."
    )
    return _section("Members", "".join(tables), note)


MEMBER_HEADERS = (
    "member",
    "Mbit/s up",
    "Mbit/s down",
    "step",
    "online",
    "utilisation",
    "sent",
    "received",
    "wire, sent",
    "rounds counted",
    "attacker",
)


def _member_rows(variant: Variant) -> list[tuple[str, ...]]:
    """A row per position, the least used first."""
    fields = ("up_mbit", "down_mbit", "step_s", "online_s", "utilisation", "bytes_sent", "bytes_received", "wire_sent",
              "rounds_counted")  # fmt: skip
    texts: tuple[Callable[[float], str], ...] = (
        figures,
        figures,
        duration_text,
        duration_text,
        percent_text,
        human_bytes,
        human_bytes,
        human_bytes,
        figures,
    )
    columns = [member_medians(variant, name) for name in fields]
    order = sorted(range(len(columns[0])), key=lambda index: (columns[fields.index("utilisation")][index], index))
    rows = []
    for index in order:
        people = [run.members[index] for run in variant.runs if index < len(run.members)]
        attacks = sorted({person.attacker for person in people} - {""})
        cells = (text(column[index]) for text, column in zip(texts, columns, strict=True))
        rows.append((people[0].name, *cells, ", ".join(attacks)))
    return rows


def _runs(found: Sequence[Variant]) -> str:
    rows = [
        (
            variant.label,
            str(run.seed),
            "yes" if run.finished else "NO",
            duration_text(run.duration_s),
            "-" if run.time_to_goal_s is None else duration_text(run.time_to_goal_s),
            percent_text(run.utilisation),
            run_loss_text(run),
            human_bytes(run.bytes_sent),
            run.events_digest[:16],
            duration_text(run.wall_s),
        )
        for variant in found
        for run in variant.runs
    ]
    names = ("variant", "seed", "finished", "time", "to goal", "utilisation", "final loss", "sent by all", "event log",
             "simulated in")  # fmt: skip
    note = "Equal digests of event logs (first 16 digits here, all in runs.csv), equal runs."
    return _section("Runs", _details(f"{len(rows)} runs", _table(names, rows), opened=len(rows) <= 10), note)


def _provenance(found: Sequence[Variant], scenario: Scenario) -> str:
    """Notes, numbers of one fidelity only, the scenario, and what made the page."""
    notes = Counter(note for variant in found for run in variant.runs for note in dict.fromkeys(run.notes))
    runs = sum(len(variant.runs) for variant in found)
    told = [note if count == runs else f"{note} ({count} of {runs} runs)" for note, count in sorted(notes.items())]
    names = sorted({name for variant in found for run in variant.runs for name in run.extra})
    rows = [
        (variant.label, *(band_text(band_of(run.extra[name] for run in variant.runs if name in run.extra), figures)
                          for name in names))
        for variant in found
    ]  # fmt: skip
    extra = _section("Further numbers", _table(("variant", *names), rows)) if names else ""
    text = _details("as TOML", f"<pre>{escape(to_toml(scenario))}</pre>", opened=False)
    return (
        (_section("Notes", _list(told)) if told else "")
        + extra
        + _section("The scenario", text, "What a sweep changed is in the names of the variants.")
        + f'<p class="faint">farflung {escape(farflung.__version__)}, {runs} runs, all times virtual.</p>'
    )


def _section(title: str, body: str, note: str = "") -> str:
    faint = f'<p class="faint">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{body}{faint}</section>"


def _details(title: str, body: str, *, opened: bool) -> str:
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{body}</details>"


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], *, best: str = "") -> str:
    """Cells are escaped. The row that begins with `best` is set off."""
    sides = [' class="left"' if name in LEFT else "" for name in names]
    head = "".join(f"<th{side}>{escape(name)}</th>" for name, side in zip(names, sides, strict=True))
    lines = []
    for row in rows:
        cells = "".join(f"<td{side}>{_unbroken(escape(cell))}</td>" for cell, side in zip(row, sides, strict=True))
        mark = ' class="best"' if best and row[0] == best else ""
        lines.append(f"<tr{mark}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _unbroken(text: str) -> str:
    """Keep ranges and numbers with their units on one line."""
    return re.sub(r"(?<=\d) (?=[%a-zA-Zµ]+\b|%)", "\u00a0", text).replace("–", "\u2060–\u2060")
