"""The picture of mixing runs: what each form of exchange costs, to the members and to their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from farflung.sim.bench.mixing_table import Gap, Line
from farflung.sim.report.drawing import FAINT, INK, SERIES, Drawing, new_drawing, tidy_axes

WORST_PERCENT = 12.0
"""Where the axis ends: what is further away is written at the edge."""

APART = 0.19
"""Of a row's two marks from its middle."""

OF_MEMBERS, OF_MEAN = SERIES[0], SERIES[4]


def draw_gaps(lines: Sequence[Line], *, name: str, title: str, caption: str) -> Drawing:
    """One field per group, a row per form of exchange: gaps to the reference in percent, with the spread over seeds."""
    groups = list(dict.fromkeys(line.entry.group for line in lines))
    by_group = [[line for line in lines if line.entry.group == group] for group in groups]
    heights = [len(group) + 0.8 for group in by_group]
    drawing = new_drawing(name, title, caption, width=8.5, height=0.9 + 0.29 * sum(heights))
    fields = drawing.figure.subplots(
        len(groups), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axes, group, own in zip(fields, groups, by_group, strict=True):
        axes.set_title(group, loc="left", fontsize=9, color=INK)
        for y, line in enumerate(own):
            _draw(axes, y - APART, line.members, OF_MEMBERS)
            _draw(axes, y + APART, line.mean_model, OF_MEAN)
        axes.set_yticks(range(len(own)), [line.entry.label for line in own], fontsize=8)
        axes.set_ylim(len(own) - 0.4, -0.6)
        axes.axvline(0, color=FAINT, linewidth=0.8)
        tidy_axes(axes)
    fields[-1].set_xlim(-2, WORST_PERCENT + 1)
    fields[-1].set_xlabel("loss over that of the row it is compared with, in percent")
    _key(drawing.figure)
    return drawing


def _draw(axes: Any, y: float, gap: Gap, colour: str) -> None:
    percent = 100 * gap.mean
    if percent > WORST_PERCENT:
        text = f"+{percent:.0f}" if math.isfinite(percent) else "lost"
        axes.plot(WORST_PERCENT, y, marker=">", color=colour, markersize=5)
        axes.text(WORST_PERCENT + 0.15, y, text, va="center", fontsize=6.5, color=INK)
        return
    axes.errorbar(percent, y, xerr=100 * gap.spread, fmt="o", color=colour, markersize=4.5, elinewidth=1.2)


def _key(figure: Any) -> None:
    from matplotlib.lines import Line2D

    texts = {"mean of the members' losses": OF_MEMBERS, "loss of the members' mean": OF_MEAN}
    handles = [Line2D([], [], marker="o", linestyle="", color=colour, markersize=4.5) for colour in texts.values()]
    figure.legend(handles, list(texts), loc="outside lower left", ncols=2, frameon=False, fontsize=8)
