"""The report's pictures as PNG files, and as drawings for the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from farflung.sim.report.drawing import Drawing, house_settings, write_png
from farflung.sim.report.figures import draw_bytes, draw_loss, draw_path, draw_utilisation
from farflung.sim.report.gantt import draw_gantt
from farflung.sim.report.summary import VariantSummary, leader, summarise
from farflung.sim.report.variants import Variant, variants
from farflung.sim.results import RunResult
from farflung.sim.scenario import Scenario

GANTTS_MAX = 6
"""Variants whose rounds are drawn member by member."""


def write_plots(results: Sequence[RunResult], folder: Path, scenario: Scenario | None = None) -> list[Path]:
    """Write loss.png, critical_path.png, utilisation.png, bytes.png and gantt-N.png (N: the variant, from 1).

    Returns what was written: no loss without losses, no Gantt chart without segments. With the scenario the goal is
    drawn. Needs no display, leaves matplotlib's settings alone. Raises ConfigError if there are no results.
    """
    found, summaries = variants(results), summarise(results, scenario)
    folder.mkdir(parents=True, exist_ok=True)
    with house_settings():
        return [write_png(drawing, folder) for drawing in drawings(found, summaries)]


def drawings(found: Sequence[Variant], summaries: Sequence[VariantSummary]) -> Iterator[Drawing]:
    """All pictures, one at a time, so that only one is in memory. Draw them under `house_settings`."""
    loss = draw_loss(found, summaries)
    if loss is not None:
        yield loss
    yield draw_path(summaries)
    yield draw_utilisation(found, summaries)
    yield draw_bytes(found)
    best, _ = leader(summaries)
    places = sorted(range(len(found)), key=lambda place: (summaries[place] is not best, place))[:GANTTS_MAX]
    for place in places:
        gantt = draw_gantt(found[place], summaries[place], f"gantt-{place + 1}")
        if gantt is not None:
            yield gantt
