"""From a seed to a schedule: which faults are drawn, and how often. Equal seeds draw equal schedules everywhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from farflung.sim.explore.actions import (
    ANY,
    EVERYBODY,
    RECORDS,
    Action,
    Crash,
    Cut,
    Delay,
    Disk,
    Double,
    Fell,
    Join,
    Kill,
    Leave,
    Lose,
    Quit,
    Skew,
    Slow,
    Straggle,
)
from farflung.sim.explore.schedule import Schedule
from farflung.sim.rng import stream

HORIZON_S = 6.0
"""Faults begin within this: some four rounds."""

ACTIONS = (1, 7)
"""At least and at most so many faults."""

LOUD = ("Announcement", "Proposal", "Promise", "Vote")
"""Messages whose loss costs something."""


class _Dice:
    """What is drawn for one schedule."""

    def __init__(self, seed: int, what: str = "schedule") -> None:
        self._rng: np.random.Generator = stream(seed, "explore", what)

    def whole(self, least: int, most: int) -> int:
        return int(self._rng.integers(least, most + 1))

    def seconds(self, least: float, most: float) -> float:
        """Logarithmic, so that short faults are as common as long ones."""
        return round(float(np.exp(self._rng.uniform(np.log(least), np.log(most)))), 2)

    def time(self) -> float:
        return round(float(self._rng.uniform(0.2, HORIZON_S)), 2)

    def chance(self, share: float) -> bool:
        return bool(self._rng.random() < share)

    def choose(self, options: tuple[str, ...]) -> str:
        return options[self.whole(0, len(options) - 1)]

    def side(self, members: int) -> tuple[int, ...]:
        size = self.whole(1, members - 1)
        return tuple(sorted(int(one) for one in self._rng.permutation(members)[:size]))

    def ends(self, members: int) -> tuple[int, int]:
        """(source, target) of messages."""
        source, target = (int(one) for one in self._rng.permutation(members)[:2])
        match self.whole(0, 3):
            case 0:
                return source, EVERYBODY
            case 1:
                return EVERYBODY, target
        return source, target

    def factor(self) -> float:
        return float(self.choose(("2", "4", "10", "40")))


def _crash(dice: _Dice, n: int) -> Action:
    return Crash(dice.time(), dice.whole(0, n - 1), dice.seconds(0.1, 6))


def _fell(dice: _Dice, n: int) -> Action:
    return Fell(dice.time(), dice.whole(0, n - 1), dice.choose(RECORDS), dice.seconds(0.1, 6))


def _cut(dice: _Dice, n: int) -> Action:
    return Cut(dice.time(), dice.side(n), dice.seconds(0.1, 12))


def _lose(dice: _Dice, n: int) -> Action:
    source, target = dice.ends(n)
    kind = dice.choose((*LOUD, ANY))
    return Lose(dice.time(), source, target, kind, dice.seconds(0.2, 3))


def _delay(dice: _Dice, n: int) -> Action:
    source, target = dice.ends(n)
    kind = dice.choose((*LOUD, ANY))
    return Delay(dice.time(), source, target, kind, dice.seconds(0.05, 4), dice.seconds(0.2, 3))


def _double(dice: _Dice, n: int) -> Action:
    source, target = dice.ends(n)
    kind = dice.choose((*LOUD, "JoinRequest", "Certified"))
    return Double(dice.time(), source, target, kind, dice.seconds(0.02, 4), dice.seconds(0.2, 3))


def _leave(dice: _Dice, n: int) -> Action:
    return Leave(dice.time(), dice.whole(0, n - 1), dice.seconds(0.5, 4))


def _disk(dice: _Dice, n: int) -> Action:
    return Disk(dice.time(), dice.whole(0, n - 1), dice.factor(), dice.seconds(0.2, 4))


def _slow(dice: _Dice, n: int) -> Action:
    return Slow(dice.time(), dice.whole(0, n - 1), dice.factor(), dice.seconds(0.2, 4))


def _straggle(dice: _Dice, n: int) -> Action:
    return Straggle(dice.time(), dice.whole(0, n - 1), dice.factor(), dice.seconds(0.2, 4))


def _skew(dice: _Dice, n: int) -> Action:
    return Skew(dice.time(), dice.whole(0, n - 1), dice.seconds(1, 60), dice.seconds(0.2, 4))


MIX: tuple[tuple[int, Callable[[_Dice, int], Action]], ...] = (
    (5, _crash),
    (4, _fell),
    (4, _cut),
    (5, _lose),
    (2, _delay),
    (2, _double),
    (1, _leave),
    (1, _disk),
    (1, _slow),
    (1, _straggle),
    (1, _skew),
)
"""How often each kind is drawn. Members that go for good and that come late are drawn apart: at most one of each."""

_BAG = tuple(make for weight, make in MIX for _ in range(weight))


MIXING_EVERY = 4
"""Members mix in the world of every fourth seed, from 3 on, in one mode after the other; the others gather."""


def mode_of(seed: int) -> str:
    """The word of a seed's mode."""
    turn, rest = divmod(seed, MIXING_EVERY)
    return "gather" if rest != MIXING_EVERY - 1 else ("push-sum", "flow", "pairs")[turn % 3]


def _of_notes(seed: int, members: int) -> list[Action]:
    """What happens to notes where members mix: they are few, and drawn apart."""
    dice, actions = _Dice(seed, "notes"), list[Action]()
    for _ in range(dice.whole(0, 3)):
        (source, target), at_s, for_s = dice.ends(members), dice.time(), dice.seconds(0.2, 3)
        match dice.whole(0, 2):
            case 0:
                actions.append(Lose(at_s, source, target, "Note", for_s))
            case 1:
                actions.append(Delay(at_s, source, target, "Note", dice.seconds(0.05, 4), for_s))
            case _:
                actions.append(Double(at_s, source, target, "Note", dice.seconds(0.02, 4), for_s))
    return actions


def draw_schedule(seed: int) -> Schedule:
    """The schedule of a seed. Raises ValueError for a negative one."""
    dice = _Dice(seed)
    members = (2, 3, 3, 3, 3, 4, 4, 5)[dice.whole(0, 7)]
    steps, quorum = dice.whole(1, 2), (50, 66, 66, 100)[dice.whole(0, 3)]
    rounds = dice.whole(2, 5) if dice.chance(0.25) else 0
    actions = [_BAG[dice.whole(0, len(_BAG) - 1)](dice, members) for _ in range(dice.whole(*ACTIONS))]
    if members > 2 and dice.chance(0.25):
        gone = dice.whole(0, members - 1)
        actions.append(Kill(dice.time(), gone) if dice.chance(0.7) else Quit(dice.time(), gone))
    if members > 2 and dice.chance(0.25):
        actions.append(Join(dice.time(), members - 1))
    mode = mode_of(seed)
    actions += [] if mode == "gather" else _of_notes(seed, members)
    actions.sort(key=lambda action: (action.at_s, action.text))
    return Schedule(seed, members, rounds, steps, quorum, tuple(actions), mode)
