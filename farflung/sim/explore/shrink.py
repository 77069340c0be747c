"""From a schedule that breaks an invariant to a small one that still breaks the same: delta debugging.

First whole stretches of actions are left out (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing
Input", IEEE TSE 28(2), 2002, §3), then everything else is made smaller and rounder, again and again until nothing
helps or the budget of runs is spent. What fails while shrinking for another reason is not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from farflung.protocol.errors import ConfigError
from farflung.sim.explore.actions import Action, moved
from farflung.sim.explore.schedule import Schedule

RUNS_MAX = 150
"""Worlds that may be run to shrink one schedule."""

Breaks = Callable[[Schedule], bool]


def shrink(schedule: Schedule, breaks: Breaks, *, runs_max: int = RUNS_MAX) -> Schedule:
    """The smallest schedule found for which `breaks` still holds; it is called at most `runs_max` times."""
    left, tried = runs_max, {schedule.line: None}
    progress = True
    while progress and left:
        progress = False
        for smaller in _smaller(schedule):
            if smaller.line in tried:
                continue
            if not left:
                break
            tried[smaller.line] = None
            left -= 1
            if breaks(smaller):
                schedule, progress = smaller, True
                break
    return schedule


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    """Simpler schedules, the boldest first. Those that are not allowed are left out."""
    yield from _fewer_actions(schedule)
    yield from _allowed(schedule, _fewer_members(schedule))
    for key, value in (("mode", "gather"), ("rounds", 0), ("quorum", 66), ("steps", 1)):
        if getattr(schedule, key) != value:
            yield from _allowed(schedule, [{key: value}])
    for index, action in enumerate(schedule.actions):
        for simpler in _simpler(action):
            actions = (*schedule.actions[:index], simpler, *schedule.actions[index + 1 :])
            yield from _allowed(schedule, [{"actions": actions}])


def _allowed(schedule: Schedule, changes: list[dict[str, object]]) -> Iterator[Schedule]:
    for change in changes:
        try:
            yield replace(schedule, **change)  # type: ignore[arg-type]
        except ConfigError:
            continue


def _fewer_actions(schedule: Schedule) -> Iterator[Schedule]:
    """Without a stretch of actions: all, halves, quarters, and so on down to single ones."""
    count = len(schedule.actions)
    length = count
    while length:
        for start in range(0, count, length):
            yield replace(schedule, actions=schedule.actions[:start] + schedule.actions[start + length :])
        length //= 2


def _fewer_members(schedule: Schedule) -> list[dict[str, object]]:
    """Without the last member, and without what happens to it."""
    last = schedule.members - 1
    kept = tuple(action for action in schedule.actions if last not in action.members)
    return [{"members": last, "actions": kept}] if schedule.members > 2 else []


def _simpler(action: Action) -> Iterator[Action]:
    """One number at a time: rounder, then shorter."""
    for field in fields(action):
        value = getattr(action, field.name)
        if field.name == "factor" and value > 2:
            yield moved(action, factor=2.0)
        if not field.name.endswith("_s"):
            continue
        for rounder in (round(value), round(value, 1)):
            if rounder != value and (rounder or field.name == "at_s"):
                yield moved(action, **{field.name: float(rounder)})
        if field.name in ("for_s", "by_s") and value > 0.2:
            yield moved(action, **{field.name: round(value / 2, 1)})
