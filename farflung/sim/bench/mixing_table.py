"""What a set of mixing runs says: how far each form of exchange ends from what it is compared with, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import stdev
from typing import Any, NamedTuple

from farflung.sim.bench.mixing_loop import MixOutcome
from farflung.sim.bench.mixing_setting import MixSetting
from farflung.sim.bench.runs import FinishedRuns


class Entry(NamedTuple):
    """One row of the table: a run of every seed."""

    group: str
    label: str
    setting: MixSetting
    """Its seed, and its task's, are replaced."""
    reference: str
    """Label of the row it is compared with, seed by seed: the same samples, from the same parameters."""


class Gap(NamedTuple):
    """A relative difference of losses to the reference's, over seeds."""

    mean: float
    """Infinite if training was lost with one of the seeds."""
    spread: float
    """Standard deviation over seeds; 0 for one seed, of which nothing is known."""


class Line(NamedTuple):
    """One row over all seeds that have both its run and its reference's."""

    entry: Entry
    seeds: int
    members_loss: float
    """Mean of the members' losses."""
    mean_loss: float
    """Loss of the mean of the members' parameters."""
    members: Gap
    mean_model: Gap
    worst_loss: float
    """Of the worst member with the worst seed."""
    apart: float
    mass_error_max: float
    members_by_seed: tuple[float, ...]
    """Gaps of the members' losses."""


def lines_of(
    runs: FinishedRuns[MixSetting, MixOutcome], entries: Sequence[Entry], seeds: Iterable[int], seeded: Any
) -> list[Line]:
    """A line for every entry with a finished run and reference. `seeded(entry, seed)` is the setting of one run."""
    by_label = {entry.label: entry for entry in entries}
    seeds, found = tuple(seeds), []
    for entry in entries:
        settings = [(seeded(entry, seed), seeded(by_label[entry.reference], seed)) for seed in seeds]
        pairs = [(runs[own], runs[other]) for own, other in settings if own in runs and other in runs]
        if pairs:
            found.append(_line(entry, pairs))
    return found


def rows_of(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """For people: losses, gaps in percent and their standard deviations over seeds; what was lost has none."""
    return [
        {
            "row": line.entry.label,
            "members": _finite(line.members_loss),
            "mean model": _finite(line.mean_loss),
            "compared with": line.entry.reference,
            "members %": _finite(100 * line.members.mean),
            "sd": _spread(line, line.members),
            "mean model %": _finite(100 * line.mean_model.mean),
            "sd ": _spread(line, line.mean_model),
            "apart": _finite(line.apart),
            "seeds": line.seeds,
        }
        for line in lines
    ]


def cells_of(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """For machines: all of it, unrounded."""
    return [
        {
            "group": line.entry.group,
            "row": line.entry.label,
            "exchange": str(line.entry.setting.exchange),
            "outer": line.entry.setting.outer,
            "compared_with": line.entry.reference,
            "seeds": line.seeds,
            "members_loss": _finite(line.members_loss),
            "mean_model_loss": _finite(line.mean_loss),
            "members_gap": _finite(line.members.mean),
            "members_gap_sd": line.members.spread,
            "mean_model_gap": _finite(line.mean_model.mean),
            "mean_model_gap_sd": line.mean_model.spread,
            "worst_member_loss": _finite(line.worst_loss),
            "apart": _finite(line.apart),
            "mass_error_max": line.mass_error_max,
        }
        for line in lines
    ]


def _line(entry: Entry, pairs: Sequence[tuple[MixOutcome, MixOutcome]]) -> Line:
    members = tuple(_relative(own.loss, other.loss) for own, other in pairs)
    mean_model = tuple(_relative(own.mean_loss, other.mean_loss) for own, other in pairs)
    owns = [own for own, _ in pairs]
    return Line(
        entry,
        len(pairs),
        _mean([own.loss for own in owns]),
        _mean([own.mean_loss for own in owns]),
        _gap(members),
        _gap(mean_model),
        max(own.worst for own in owns),
        _mean([own.apart for own in owns]),
        max(own.mass_error_max for own in owns),
        members,
    )


def _spread(line: Line, gap: Gap) -> float | None:
    """In percent, if there is more than one seed."""
    return 100 * gap.spread if line.seeds > 1 else None


def _gap(values: Sequence[float]) -> Gap:
    finite = all(math.isfinite(value) for value in values)
    return Gap(_mean(values), stdev(values) if finite and len(values) > 1 else 0.0)


def _relative(own: float, other: float) -> float:
    return own / other - 1 if math.isfinite(own) else math.inf


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
