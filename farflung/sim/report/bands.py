"""Medians and bands over seeds, where some seeds may never have got there; and numbers in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

LOW, HIGH = 0.1, 0.9
"""The band's quantiles: 10 % of the seeds are below it, 10 % above."""

NEVER = math.inf
"""What a seed that never got there counts as: it moves the median as it should, instead of being left out."""


@dataclass(frozen=True)
class Band:
    """Median and 10-90 % band of a number over seeds; infinite where too many of them never got there."""

    low: float
    median: float
    high: float
    count: int
    """Values it was made from."""

    never: int = 0
    """How many of them were infinite."""


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of numbers in ascending order, by linear interpolation (numpy's default); infinite numbers are allowed."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    if low == high or position == below:
        return low
    return min(high, low + (position - below) * (high - low))


def band_of(values: Iterable[float]) -> Band | None:
    """None if there is nothing to show. What is not a number is left out: `doubts` names it."""
    ordered = sorted(value for value in values if not math.isnan(value))
    if not ordered:
        return None
    never = sum(1 for value in ordered if value == math.inf)
    low, median, high = (quantile(ordered, share) for share in (LOW, 0.5, HIGH))
    return Band(low, median, high, len(ordered), never)


def band_text(band: Band | None, text: Callable[[float], str], *, never: str = "never") -> str:
    """`37 h (31–45)`; one figure where the band has no width; a dash where there is nothing to show.

    `text` writes a number and its unit, `never` is how infinity reads.
    """
    if band is None:
        return "-"
    low, median, high = (text(value) if math.isfinite(value) else never for value in (band.low, band.median, band.high))
    if low == high:
        return median
    (number, _, unit), others = low.partition(" "), (median.partition(" ")[2], high.partition(" ")[2])
    if others == (unit, unit):  # the unit once is enough
        return f"{median} ({number}–{high.partition(' ')[0]})"
    return f"{median} ({low} to {high})"


UNITS = (("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 72 * 3600.0), ("d", 86400.0, math.inf))
"""Units of time, their length in seconds, and up to where they are used."""


def duration_text(seconds: float, *, like_s: float | None = None) -> str:
    """Three figures in the unit that suits, or that suits `like_s`: 0.42 s, 59 s, 12.5 min, 37.2 h, 12.3 d."""
    measure = abs(seconds if like_s is None else like_s)
    unit, unit_s = next(((unit, unit_s) for unit, unit_s, limit_s in UNITS if measure < limit_s), ("d", 86400.0))
    return f"{figures(seconds / unit_s)} {unit}"


def duration_band_text(band: Band | None, *, never: str = "never") -> str:
    """`37.2 h (31–45)`: all in the median's unit."""
    like_s = band.median if band and math.isfinite(band.median) else None
    return band_text(band, lambda seconds: duration_text(seconds, like_s=like_s), never=never)


def time_unit(longest_s: float) -> tuple[float, str]:
    """Length in seconds and name of the unit for an axis that reaches this far."""
    for limit, unit_s, unit in ((180, 1.0, "s"), (7200, 60.0, "min"), (120 * 3600, 3600.0, "h")):
        if longest_s <= limit:
            return unit_s, unit
    return 86400.0, "days"


def figures(value: float) -> str:
    """Three significant figures without an exponent: 0.0123, 4.2, 1234; what is not finite says so."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    rounded = f"{value:.{min(decimals, 9)}f}"
    return rounded.rstrip("0").rstrip(".") if "." in rounded else rounded


def percent_text(share: float) -> str:
    """81 %; one decimal below ten, so that small shares do not vanish."""
    return f"{100 * share:.0f} %" if abs(share) >= 0.0995 or share == 0 else f"{100 * share:.1f} %"


def count_text(count: float) -> str:
    """Parameters as people say them: 330k, 1B, 1.5T."""
    for unit in ("", "k", "M", "B"):
        if abs(count) < 999.5:
            return f"{figures(count)}{unit}"
        count /= 1000
    return f"{figures(count)}T"
