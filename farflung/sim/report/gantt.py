"""What every member did in one round: a row per member, a coloured bar per thing it did."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from farflung.sim.report.attribution import culprit_text, most_lost
from farflung.sim.report.bands import duration_text, figures, time_unit
from farflung.sim.report.drawing import FAINT, SEGMENT_COLOURS, Drawing, colour_key, new_drawing, tidy_axes
from farflung.sim.report.figures import thin
from farflung.sim.report.summary import WORTH_NAMING, VariantSummary
from farflung.sim.report.variants import Variant
from farflung.sim.results import RoundResult, RunResult, Segment

ROWS_MAX = 60
"""Members that are drawn: of more, those to blame in the round and evenly spaced others."""


def kept_rounds(run: RunResult) -> list[RoundResult]:
    """The rounds to draw: the one nearest to the median length and the longest, of those that have segments."""
    drawn = {segment.round_index for segment in run.segments}
    found = [item for item in run.rounds if item.round_index in drawn]
    if not found:
        return []
    middle = median(item.end_s - item.start_s for item in run.rounds)
    typical = min(found, key=lambda item: abs(item.end_s - item.start_s - middle))
    longest = max(found, key=lambda item: item.end_s - item.start_s)
    return [typical] if typical is longest else [typical, longest]


def drawable(variant: Variant) -> RunResult | None:
    """The typical run, or else the first that has segments."""
    runs = [variant.typical, *variant.runs]
    return next((run for run in runs if kept_rounds(run)), None)


def draw_gantt(variant: Variant, summary: VariantSummary, name: str) -> Drawing | None:
    """One or two rounds of the variant's typical run; None if it kept no segments."""
    run = drawable(variant)
    if run is None:
        return None
    rounds = kept_rounds(run)
    rows = rows_of(run, rounds)
    left_out = f" {len(rows)} of {len(run.members)} members are drawn." if len(rows) < len(run.members) else ""
    worst = most_lost(summary.path)
    named = worst is not None and worst.culprit is not None and worst.culprit.share >= WORTH_NAMING
    who = culprit_text(worst.cause, worst.culprit) if worst and named else ""
    drawing = new_drawing(
        name,
        f"What each member did in a round: {variant.label}, seed {run.seed}",
        "Times count from the round's start. " + (f"Most time is lost to {worst.cause}" if worst else "No time is lost")
        + (f", by {who}" if who else "") + f".{left_out}",
        height=1.4 + 0.165 * max(len(rows), 4),
    )  # fmt: skip
    panels = drawing.figure.subplots(1, len(rounds), sharey=True, squeeze=False)[0]
    used: set[str] = set()
    for panel, item, what in zip(panels, rounds, ("a typical one", "the longest that was kept"), strict=False):
        used |= _draw_round(drawing, panel, run, item, rows)
        panel.set_title(
            f"round {item.round_index}, {what}: {duration_text(item.end_s - item.start_s)}", fontsize=9, loc="left"
        )
    first = panels[0]
    labels = [f"{run.members[index].name}  {figures(run.members[index].up_mbit)}↑" for index in rows]
    first.set_yticks(range(len(rows)), labels, fontsize=6.5)
    first.set_ylim(len(rows) - 0.4, -0.6)
    first.set_ylabel("member, uplink (Mbit/s)")
    colour_key(drawing.figure, {kind: colour for kind, colour in SEGMENT_COLOURS.items() if kind in used})
    return drawing


def rows_of(run: RunResult, rounds: Sequence[RoundResult]) -> list[int]:
    """Positions of the members to draw, ascending."""
    size = len(run.members)
    if size <= ROWS_MAX:
        return list(range(size))
    blamed: dict[int, float] = {}
    for item in rounds:
        for blame in item.blame:
            if 0 <= blame.member < size:
                blamed[blame.member] = blamed.get(blame.member, 0.0) + blame.seconds
    worst = sorted(blamed, key=lambda member: (-blamed[member], member))[: ROWS_MAX // 3]
    others = [member for member in range(size) if member not in worst]
    return sorted([*worst, *thin(others, ROWS_MAX - len(worst))])


def _draw_round(drawing: Drawing, axes: Any, run: RunResult, item: RoundResult, rows: Sequence[int]) -> set[str]:
    """Draw one panel; returns the kinds of segments in it."""
    place = {member: row for row, member in enumerate(rows)}
    segments = [one for one in run.segments if one.round_index == item.round_index and one.member in place]
    reach_s = max([item.end_s - item.start_s, *(one.end_s - item.start_s for one in segments)])
    begin_s = min([0.0, *(one.start_s - item.start_s for one in segments)])
    unit_s, unit = time_unit(reach_s)
    for one in segments:
        width, start = (one.end_s - one.start_s) / unit_s, (one.start_s - item.start_s) / unit_s
        colour = SEGMENT_COLOURS[one.kind]
        (bar,) = axes.barh(place[one.member], width, left=start, height=0.78, color=colour, linewidth=0)
        drawing.tip(bar, _tip(run, one))
    axes.axvline((item.end_s - item.start_s) / unit_s, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(begin_s / unit_s, 1.02 * reach_s / unit_s or 1.0)
    axes.set_xlabel(f"virtual time since the round began ({unit}); dashed: its end", fontsize=8)
    tidy_axes(axes)
    return {one.kind for one in segments}


def _tip(run: RunResult, segment: Segment) -> str:
    return f"{run.members[segment.member].name}: {segment.kind} {duration_text(segment.end_s - segment.start_s)}"
