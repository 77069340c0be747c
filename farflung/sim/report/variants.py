"""Runs sorted into variants: what a sweep changed, with all its seeds, in an order that no caller can disturb."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from farflung.protocol.errors import ConfigError
from farflung.sim.results import RunResult

Changes = tuple[tuple[str, str], ...]
UNCHANGED = "as given"


@dataclass(frozen=True)
class Variant:
    """The runs of one setting, by seed."""

    label: str
    """Short and unique in its list: `codec=int8, up_mbit=50`."""

    scenario: str
    changes: Changes
    runs: tuple[RunResult, ...]

    @property
    def typical(self) -> RunResult:
        """The run of the median length: the one to draw where only one can be drawn."""
        ordered = sorted(self.runs, key=lambda run: (run.duration_s, run.seed))
        return ordered[(len(ordered) - 1) // 2]


def variants(results: Iterable[RunResult]) -> list[Variant]:
    """Group runs by scenario and changes: numbers in numeric order, unchanged first, seeds ascending.

    Raises ConfigError if there are no results.
    """
    groups: dict[tuple[str, Changes], list[RunResult]] = {}
    for run in results:
        groups.setdefault((run.scenario, tuple(sorted(run.changes.items()))), []).append(run)
    if not groups:
        raise ConfigError("a report needs at least one finished or stopped run; simulate one first, got 0 results")
    keys = sorted(groups, key=lambda key: (key[0], [(name, _natural(value)) for name, value in key[1]]))
    labels = _labels(keys)
    return [
        Variant(label, *key, tuple(sorted(groups[key], key=lambda run: (run.seed, run.events_digest, run.duration_s))))
        for label, key in zip(labels, keys, strict=True)
    ]


def changed_value(changes: Changes | Mapping[str, str], name: str) -> str | None:
    """What a sweep set `name` to (the last part of a key is enough), or None."""
    pairs = changes.items() if isinstance(changes, Mapping) else changes
    return next((value for key, value in pairs if key == name or key.rpartition(".")[2] == name), None)


def _natural(value: str) -> tuple[int, float, str]:
    try:
        return 0, float(value), value
    except ValueError:
        return 1, 0.0, value


def _labels(keys: Sequence[tuple[str, Changes]]) -> list[str]:
    """Short names of keys where they are unambiguous, and the scenario only where there are several."""
    names = sorted({name for _, changes in keys for name, _ in changes})
    short = {name: name.rpartition(".")[2] for name in names}
    if len(set(short.values())) < len(short):
        short = {name: name for name in names}
    several = len({scenario for scenario, _ in keys}) > 1
    labels = []
    for scenario, changes in keys:
        changed = ", ".join(f"{short[name]}={value}" for name, value in changes)
        parts = ([scenario] if several or (not changed and len(keys) == 1) else []) + ([changed] if changed else [])
        labels.append(": ".join(parts) or UNCHANGED)
    return labels
