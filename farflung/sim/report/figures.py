"""The pictures of all variants together: loss over time, whose fault the time is, utilisation, bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from farflung.node.display import human_bytes
from farflung.sim.report.attribution import USEFUL, CauseShare, culprit_text
from farflung.sim.report.bands import (
    Band,
    band_of,
    band_text,
    duration_text,
    figures,
    percent_text,
    quantile,
    time_unit,
)
from farflung.sim.report.drawing import (
    CAUSE_COLOURS,
    INK,
    OTHER_COLOUR,
    SERIES,
    TIP_HINT,
    Drawing,
    colour_key,
    new_drawing,
    text_on,
    tidy_axes,
)
from farflung.sim.report.summary import VariantSummary, goal_text
from farflung.sim.report.variants import Variant
from farflung.sim.results import RunResult

Item = TypeVar("Item")
Floats = npt.NDArray[np.float64]
LINES_MAX = 8
"""Curves in one picture; more cannot be told apart."""

DOTS_MAX = 150
"""Members drawn as dots in one row; of more, evenly spaced ones and both ends."""

GRID_POINTS = 160
LABEL_LETTERS = 44
"""Of a variant's name beside its row."""

NAME_LETTERS = 72
"""Of a curve's name, with its time to the goal, so that two fit side by side."""

CHARACTER_SHARE = 0.0088
"""Width of a letter in a bar, as a part of the longest bar."""

KINDS = {"validation": "validation loss", "loss": "training loss", "loss_estimate": "estimated loss (nats per token)"}
"""Properties of `RoundResult` that a curve may show, the best first, and their names. Losses are in the task's unit."""

ZOOM = 0.55
"""Part of the shortest curve's time from which on the second panel shows the curves enlarged."""


def loss_points(run: RunResult, kind: str) -> tuple[Floats, Floats]:
    """Times (s) and losses of the rounds that have one; what is not finite counts as infinite."""
    pairs = [(item.end_s, getattr(item, kind)) for item in run.rounds if getattr(item, kind) is not None]
    times, losses = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs], float)
    return times, np.where(np.isfinite(losses), losses, np.inf)


def loss_band(variant: Variant, kind: str) -> tuple[Floats, Floats]:
    """Times (s, [t]) and the 10, 50, 90 % quantiles of the loss over seeds ([3, t]). Some run must have such losses.

    From when all seeds have a loss until half of them have ended; one that ended keeps its last.
    """
    curves = [points for points in (loss_points(run, kind) for run in variant.runs) if len(points[0])]
    if len(curves) == 1:
        return curves[0][0], np.stack([curves[0][1]] * 3)
    first = max(times[0] for times, _ in curves)
    last = max(first, quantile(sorted(float(times[-1]) for times, _ in curves), 0.5))
    grid = np.linspace(first, last, GRID_POINTS)
    with np.errstate(invalid="ignore"):
        rows = np.stack([np.interp(grid, times, losses) for times, losses in curves])
    rows = np.sort(np.where(np.isnan(rows), np.inf, rows), axis=0)
    return grid, np.array([[quantile(column, share) for column in rows.T.tolist()] for share in (0.1, 0.5, 0.9)])


def curve_kind(variant: Variant) -> str:
    """The best kind of loss that makes a curve of at least two points, or else a point; "" without losses."""
    lengths = {kind: max(len(loss_points(run, kind)[0]) for run in variant.runs) for kind in KINDS}
    curves = [kind for kind, length in lengths.items() if length > 1] + [kind for kind in KINDS if lengths[kind]]
    return curves[0] if curves else ""


def draw_loss(variants: Sequence[Variant], summaries: Sequence[VariantSummary]) -> Drawing | None:
    """Loss over virtual time with bands over seeds, and when the goal was reached; None without losses."""
    kinds = [curve_kind(variant) for variant in variants]
    shown = thin([index for index, kind in enumerate(kinds) if kind], LINES_MAX)
    if not shown:
        return None
    bands = [loss_band(variants[index], kinds[index]) for index in shown]
    several = len({kinds[index] for index in shown}) > 1
    label = "loss" if several else KINDS[kinds[shown[0]]]
    unit_s, unit = time_unit(max(float(times[-1]) for times, _ in bands))
    left_out = f" {len(shown)} of {len(variants)} variants are drawn." if len(shown) < len(variants) else ""
    note = " Estimates are from published scaling laws, not measurements." * ("loss_estimate" in kinds)
    caption = (
        "Lines: median over seeds, bands: 10 % to 90 %. A seed that ended keeps its last loss. Dots: goal reached."
    )
    title = label.partition(" (")[0].capitalize()
    height = 4.2 + 0.16 * len(shown)
    drawing = new_drawing("loss", f"{title} over virtual time", f"{caption}{note}{left_out}", height=height)
    panels = drawing.figure.subplots(1, 2, width_ratios=(3, 2))
    for axes in panels:
        for place, (index, (times, quantiles)) in enumerate(zip(shown, bands, strict=True)):
            low, middle, high = np.where(np.isfinite(quantiles), quantiles, np.nan)
            axes.fill_between(times / unit_s, low, high, color=SERIES[place], alpha=0.18, linewidth=0)
            name = _line_name(summaries[index]) + f", {KINDS[kinds[index]]}" * several
            style = {"color": SERIES[place], "linewidth": 1.5, "marker": "o" if len(times) == 1 else None}
            axes.plot(times / unit_s, middle, label=name, **style)
            if summaries[index].goal > 0:
                _mark_goal(axes, summaries[index], float(times[-1]), unit_s, SERIES[place])
        axes.set_xlabel(f"virtual time ({unit})")
        tidy_axes(axes, grid="both")
    panels[0].set_ylabel(label)
    panels[0].set_xlim(left=0)
    style = {"loc": "outside lower left", "fontsize": 8, "frameon": False, "labelcolor": "linecolor"}
    handles, names = panels[0].get_legend_handles_labels()
    drawing.figure.legend(handles, names, ncols=2 if max(map(len, names)) < NAME_LETTERS else 1, **style)
    panels[1].set_title("the same, later and closer", fontsize=9, loc="left")
    _zoom(panels[1], bands, unit_s)
    for axes in panels:
        _draw_goal(axes, max(item.goal for item in summaries), enlarged=axes is panels[1])
    return drawing


def _line_name(summary: VariantSummary) -> str:
    if summary.goal_s is None or not summary.reached:
        return short(summary.label, 100)
    return f"{short(summary.label)}: {goal_text(summary)}"


def _draw_goal(axes: Any, goal: float, *, enlarged: bool) -> None:
    """A dashed line; the enlarged panel may be far from it."""
    low, high = axes.get_ylim()
    if goal <= 0 or (enlarged and not low <= goal <= high):
        return
    axes.axhline(goal, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    style = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 8}
    axes.annotate(f"goal {figures(goal)}", (0, goal), xytext=(4, 3), **style)


def _zoom(axes: Any, bands: Sequence[tuple[Floats, Floats]], unit_s: float) -> None:
    """The end of the curves, where goals are reached or not."""
    start = ZOOM * min(float(times[-1]) for times, _ in bands)
    late = np.concatenate([quantiles[:, times >= start].ravel() for times, quantiles in bands])
    late = late[np.isfinite(late)]
    if len(late) > 1 and late.min() < late.max():
        room = 0.08 * float(late.max() - late.min())
        axes.set_ylim(float(late.min()) - room, float(late.max()) + room)
    axes.set_xlim(start / unit_s, 1.01 * max(float(times[-1]) for times, _ in bands) / unit_s)


def draw_path(summaries: Sequence[VariantSummary]) -> Drawing:
    """A bar per variant: mean time of a run's rounds, by whose fault it is."""
    unit_s, unit = time_unit(max(sum(item.seconds for item in summary.path) for summary in summaries))
    drawing = new_drawing(
        "critical_path",
        "Whose fault the time is: critical path of all rounds, mean per run",
        "Grey is training at the median member's pace; what is coloured is lost." + TIP_HINT,
        height=1.7 + 0.42 * len(summaries),
    )
    axes = drawing.figure.add_subplot()
    longest = max(sum(max(item.seconds, 0.0) for item in summary.path) for summary in summaries) / unit_s or 1.0
    order = {cause: place for place, cause in enumerate(CAUSE_COLOURS)}
    used: dict[str, str] = {}
    for row, summary in enumerate(summaries):
        left = 0.0
        for item in sorted(summary.path, key=lambda item: (order.get(item.cause, len(order)), item.cause)):
            width = max(item.seconds, 0.0) / unit_s
            colour = CAUSE_COLOURS.get(item.cause, OTHER_COLOUR)
            used[item.cause] = colour
            (bar,) = axes.barh(row, width, left=left, height=0.7, color=colour, edgecolor="white", linewidth=0.6)
            drawing.tip(bar, f"{summary.label}: {_cause_tip(item)}")
            _label_part(axes, item, left + width / 2, row, width / longest, colour)
            left += width
        total = sum(item.seconds for item in summary.path) / unit_s
        lost = sum(item.share for item in summary.path if item.cause != USEFUL)
        axes.text(
            left + 0.006 * longest, row, f"{figures(total)} {unit}, {percent_text(lost)} lost", va="center", fontsize=8
        )
    axes.set_yticks(range(len(summaries)), [short(summary.label) for summary in summaries])
    axes.invert_yaxis()
    axes.set(xlabel=f"virtual time ({unit})", xlim=(0, 1.2 * longest))
    tidy_axes(axes)
    colour_key(drawing.figure, {cause: used[cause] for cause in sorted(used, key=lambda cause: order.get(cause, 99))})
    return drawing


def draw_utilisation(variants: Sequence[Variant], summaries: Sequence[VariantSummary]) -> Drawing:
    """A row per variant: the median as a bar, the band as a line, every seed as a dot."""
    drawing = new_drawing(
        "utilisation",
        "Utilisation: share of time online that was local training that counted",
        "Bars: median over seeds. Lines: 10 % to 90 %. Dots: seeds.",
        height=1.4 + 0.4 * len(variants),
    )
    axes = drawing.figure.add_subplot()
    for row, (variant, summary) in enumerate(zip(variants, summaries, strict=True)):
        band = summary.utilisation
        if band is None:
            axes.text(1, row, "no number", va="center", fontsize=8)
            continue
        (bar,) = axes.barh(row, 100 * band.median, height=0.62, color="#BFD8E8")
        text = band_text(band, percent_text)
        drawing.tip(bar, f"{variant.label}: {text}")
        dots = [100 * run.utilisation for run in variant.runs if math.isfinite(run.utilisation)]
        axes.plot(dots, [row] * len(dots), ".", color=SERIES[0], markersize=4, alpha=0.45, markeredgewidth=0)
        _whisker(axes, band, row, 100.0, SERIES[0])
        axes.text(101.5, row, text, va="center", fontsize=8, clip_on=False)
    axes.set_yticks(range(len(variants)), [short(variant.label) for variant in variants])
    axes.invert_yaxis()
    axes.set(xlabel="utilisation (%)", xlim=(0, 100))
    tidy_axes(axes)
    return drawing


def draw_bytes(variants: Sequence[Variant]) -> Drawing:
    """A row per variant, a dot per member: bytes sent (above) and received (below) in a run, median over seeds."""
    from matplotlib.ticker import LogLocator

    drawing = new_drawing(
        "bytes",
        "Bytes per member in a run, headers not counted",
        "A dot per member: median over seeds. Circles above the line: sent; triangles below: received.",
        height=1.5 + 0.55 * len(variants),
    )
    axes = drawing.figure.add_subplot()
    for row, variant in enumerate(variants):
        for name, shift, marker, colour in (("sent", -0.14, "o", SERIES[0]), ("received", 0.14, "v", SERIES[1])):
            counts = member_medians(variant, f"bytes_{name}")
            shown = thin(sorted(counts), DOTS_MAX)
            if not shown:
                continue
            axes.plot(shown, [row + shift] * len(shown), marker, color=colour, markersize=4.5, alpha=0.45,
                      markeredgewidth=0, linestyle="none")  # fmt: skip
            side = {"ha": "left", "va": "center", "fontsize": 8, "color": colour}
            told = " to ".join(dict.fromkeys([human_bytes(min(counts)), human_bytes(max(counts))]))
            axes.annotate(
                f"{name} {told}", (max(shown), row + shift), xytext=(8, 0), textcoords="offset points", **side
            )
    tops = [max(member_medians(variant, name), default=0.0) for variant in variants for name in BYTES]
    lows = [min(member_medians(variant, name), default=0.0) for variant in variants for name in BYTES]
    if min(lows) > 0 and max(tops) > 30 * min(lows):
        axes.set_xscale("log", subs=[])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(tops) < 100 * min(lows) else (1,)))
        axes.set_xlim(min(lows) / 1.3, max(tops) * (max(tops) / min(lows)) ** 0.45)
    else:
        axes.set_xlim(0, 1.4 * max(tops) or 1.0)
    axes.xaxis.set_major_formatter(lambda value, _: human_bytes(value))
    axes.set_yticks(range(len(variants)), [short(variant.label) for variant in variants])
    axes.set_ylim(len(variants) - 0.5, -0.5)
    axes.set_xlabel("bytes of a member in a run")
    tidy_axes(axes)
    return drawing


BYTES = ("bytes_sent", "bytes_received")


def member_medians(variant: Variant, name: str) -> list[float]:
    """A property of `MemberResult`, by position: the median over the seeds that have such a member."""
    size = max(len(run.members) for run in variant.runs)
    bands = [
        band_of(float(getattr(run.members[index], name)) for run in variant.runs if index < len(run.members))
        for index in range(size)
    ]
    return [band.median if band else math.nan for band in bands]


def thin(items: Sequence[Item], limit: int) -> list[Item]:
    """At most so many, evenly spaced, first and last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(place * (len(items) - 1) / (limit - 1))] for place in range(limit)]


def short(label: str, letters: int = LABEL_LETTERS) -> str:
    """A label that leaves room for the picture: its middle is cut out if it is longer."""
    half = letters // 2
    return label if len(label) <= letters else f"{label[:half]}…{label[-half:]}"


def _cause_tip(item: CauseShare) -> str:
    text = f"{item.cause} {duration_text(item.seconds)} per run, {percent_text(item.share)} of the time"
    who = culprit_text(item.cause, item.culprit)
    return f"{text}; {percent_text(item.culprit.share)} of it by {who}" if item.culprit and who else text


def _label_part(axes: Any, item: CauseShare, x: float, row: int, room: float, colour: str) -> None:
    share = percent_text(item.share)
    fitting = [text for text in (f"{item.cause} {share}", share) if room >= CHARACTER_SHARE * (len(text) + 1)]
    if not fitting:
        return
    text = fitting[0]
    axes.text(x, row, text, ha="center", va="center", fontsize=7.5, color=text_on(colour))


def _mark_goal(axes: Any, summary: VariantSummary, last_s: float, unit_s: float, colour: str) -> None:
    """When the goal was reached: a dot at the median, a line from 10 % to 90 % of the seeds; not beyond the curve."""
    band = summary.goal_s
    if band is None or band.median > last_s:
        return
    axes.plot(band.median / unit_s, summary.goal, "o", color=colour, markersize=6, zorder=5)
    _whisker(axes, replace(band, high=min(band.high, last_s)), summary.goal, 1 / unit_s, colour)


def _whisker(axes: Any, band: Band, y: float, scale: float, colour: str) -> None:
    if math.isfinite(band.high):
        axes.plot([scale * band.low, scale * band.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
