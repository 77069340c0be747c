"""One explored world as a value, and as one line of text:

v1 seed=17 members=3 rounds=0 steps=2 quorum=66 crash(1,2.5,+3) cut(0/2,4,+2)
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from farflung.protocol.errors import ConfigError
from farflung.sim.explore.actions import Action, Cut, Join, OfMember, OfMessages, parse_action

VERSION = "v1"
"""Of the line. A line of another version means another world and is refused."""

MEMBERS_MAX = 6
STEPS_MAX = 4
ROUNDS_MAX = 12
MODES = {
    "gather": ("gather", "fp32"),
    "push-sum": ("push-sum", "fp32"),
    "flow": ("push-sum", "int8"),
    "pairs": ("pairs", "fp32"),
}
"""Kinds of runs by the word for them: mode and codec."""
ACTIONS_MAX = 32
SEED_MAX = 1 << 62


@dataclass(frozen=True)
class Schedule:
    """Who there is and what goes wrong. Equal schedules give equal worlds, event by event. Raises ConfigError."""

    seed: int
    """Draws step times and keys."""

    members: int
    """Including those who join late; member 0 founds the run."""

    rounds: int
    """The run is over after so many rounds with payloads; 0: it is endless."""

    steps: int
    """H: local steps per round."""

    quorum: int
    """Percent of the members whose payloads start the grace window."""

    actions: tuple[Action, ...] = ()

    mode: str = "gather"
    """One of MODES; "gather" is not written."""

    def __post_init__(self) -> None:
        bounds = {"seed": (0, SEED_MAX), "members": (1, MEMBERS_MAX), "rounds": (0, ROUNDS_MAX)}
        bounds |= {"steps": (1, STEPS_MAX), "quorum": (1, 100)}
        for key, (least, most) in bounds.items():
            if not least <= getattr(self, key) <= most:
                raise ConfigError(f"a schedule's {key} is {least} to {most}, got {getattr(self, key)}")
        if self.mode not in MODES:
            raise ConfigError(f"a schedule's mode is one of {', '.join(MODES)}, got {self.mode!r}")
        if len(self.actions) > ACTIONS_MAX:
            raise ConfigError(f"a schedule has at most {ACTIONS_MAX} actions, got {len(self.actions)}")
        for action in self.actions:
            if any(member >= self.members for member in action.members):
                raise ConfigError(f"there are {self.members} members, 0 to {self.members - 1}, got {action.text}")
            if isinstance(action, Cut) and not 0 < len(action.side) < self.members:
                raise ConfigError(f"a cut needs somebody on either side, got {action.text}")
            if isinstance(action, OfMember) and isinstance(action, Join) and action.member == 0:
                raise ConfigError(f"member 0 founds the run and cannot join it, got {action.text}")
            if isinstance(action, OfMessages) and action.source == action.target >= 0:
                raise ConfigError(f"nobody sends messages to itself, got {action.text}")
        late = [action.member for action in self.actions if isinstance(action, Join)]
        if len(dict.fromkeys(late)) != len(late):
            raise ConfigError(f"a member joins for the first time once, got {late}")

    @property
    def late(self) -> dict[int, float]:
        """Members who first start later, and when."""
        return {action.member: action.at_s for action in self.actions if isinstance(action, Join)}

    @property
    def calm_s(self) -> float:
        """When the last fault is over."""
        return max((action.end_s for action in self.actions), default=0.0)

    @property
    def line(self) -> str:
        """The replay line."""
        head = [f"{name}={getattr(self, name)}" for name in _NUMBERS]
        head += [] if self.mode == "gather" else [f"mode={self.mode}"]
        return " ".join([VERSION, *head, *(action.text for action in self.actions)])


_NUMBERS = tuple(item.name for item in fields(Schedule) if item.name not in ("actions", "mode"))


def parse_line(line: str) -> Schedule:
    """The schedule of a replay line. Strict: whatever `Schedule.line` would not have written raises ConfigError."""
    version, *parts = line.strip().split(" ")
    if version != VERSION:
        raise ConfigError(f"a replay line begins with {VERSION}, got {version!r}")
    numbers: dict[str, int] = {}
    for key, part in zip(_NUMBERS, parts, strict=False):
        name, _, value = part.partition("=")
        if name != key or not value.isascii() or not value.isdigit():
            raise ConfigError(f"{key}=NUMBER comes here in a replay line, got {part!r}")
        numbers[key] = int(value)
    if len(numbers) < len(_NUMBERS):
        raise ConfigError(f"a replay line gives {', '.join(_NUMBERS)}, got {line!r}")
    rest, mode = parts[len(_NUMBERS) :], "gather"
    if rest and rest[0].startswith("mode="):
        mode = rest.pop(0).removeprefix("mode=")
    schedule = Schedule(**numbers, actions=tuple(parse_action(part) for part in rest), mode=mode)
    if schedule.line != line.strip():
        raise ConfigError(f"write it as {schedule.line!r}, got {line!r}")
    return schedule
