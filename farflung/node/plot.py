"""Loss curves as a picture. matplotlib is imported when one is drawn, and needs no display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

Points = Sequence[tuple[float, float]]
"""(tokens of the whole swarm, nats per byte)"""


@dataclass(frozen=True)
class Curves:
    """What there is to draw; empty parts are left out."""

    training: dict[str, Points] = field(default_factory=dict)
    """Per member: mean over each round's local steps."""
    validation: Points = ()
    """Of the agreed state."""
    baseline: Points = ()
    """Training loss of one process on the same tokens."""
    baseline_validation: float | None = None


def plot_losses(path: Path, curves: Curves, *, title: str = "", unit: str = "nats per byte") -> None:
    """Write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.training.items():
        axes.plot(*_columns(points), linewidth=1, alpha=0.6, label=f"{name}, training")
    if curves.baseline:
        axes.plot(*_columns(curves.baseline), linewidth=1, linestyle=":", color="black", label="one process, training")
    if curves.validation:
        axes.plot(
            *_columns(curves.validation), linewidth=2, marker="o", markersize=3, color="black", label="validation"
        )
    if curves.baseline_validation is not None:
        label = "one process, validation at the end"
        axes.axhline(curves.baseline_validation, linewidth=1, linestyle="--", color="tab:red", label=label)
    axes.set_xlabel("tokens of the whole swarm")
    axes.set_ylabel(f"loss ({unit})")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.savefig(path)


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
