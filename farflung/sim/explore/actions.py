"""What may go wrong in an explored world: plain values with times, each with a text that parses back to it.

    crash(1,2.5,+3)            member 1 loses power at 2.5 s and starts again 3 s later, from what is on its disk
    cut(0/2,4,+2)              members 0 and 2 cannot reach the others, from 4 s on, for 2 s
    lose(1,*,Vote,3,+0.5)      what member 1 votes is lost on its way to everybody, for half a second

Nothing is drawn while a world runs: a schedule's text is all there is to know about its faults.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, NamedTuple, get_type_hints

from farflung.protocol.errors import ConfigError

EVERYBODY = -1
"""In `source` and `target`: any member. Written `*`."""

ANY = "any"
"""In `kind`: any message."""

RECORDS = ("own", "proposal", "promise", "vote", "certificate")
"""What a member puts on its disk before it says it, and the end of a round."""

MESSAGES = (
    ANY,
    "Announcement",
    "Proposal",
    "Promise",
    "Vote",
    "Status",
    "JoinRequest",
    "LeaveNotice",
    "Certified",
    "Note",
)
"""Control messages by the name of what they say; members who mix tell each other notes."""

ARMED_S = 2.0
"""How long a `fell` waits for its record."""

TIME_MAX_S = 10_000.0
"""Times in a schedule are below this."""


class Form(NamedTuple):
    """How one field is written and read. `read` raises ValueError."""

    write: Callable[[Any], str]
    read: Callable[[str], Any]


def number_text(value: float) -> str:
    """The shortest text of a number that was rounded to milliseconds: no exponent, no trailing zeros."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _number(text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d{1,3})?", text):
        raise ValueError(text)
    return float(text)


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d{1,3}", text):
        raise ValueError(text)
    return int(text)


def _after(mark: str, read: Callable[[str], Any]) -> Callable[[str], Any]:
    def strip(text: str) -> Any:
        if not text.startswith(mark):
            raise ValueError(text)
        return read(text[len(mark) :])

    return strip


def _one_of(words: tuple[str, ...]) -> Form:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(text)
        return text

    return Form(str, read)


_MEMBER = Form(str, _whole)
_ANYBODY = Form(
    lambda member: "*" if member == EVERYBODY else str(member), lambda text: EVERYBODY if text == "*" else _whole(text)
)
_SIDE = Form(lambda side: "/".join(map(str, side)), lambda text: tuple(_whole(part) for part in text.split("/")))
_AT = Form(number_text, _number)
_FOR = Form(lambda value: "+" + number_text(value), _after("+", _number))
_FACTOR = Form(lambda value: "x" + number_text(value), _after("x", _number))

Member = Annotated[int, _MEMBER]
Anybody = Annotated[int, _ANYBODY]
Side = Annotated[tuple[int, ...], _SIDE]
At = Annotated[float, _AT]
For = Annotated[float, _FOR]
Factor = Annotated[float, _FACTOR]
Record = Annotated[str, _one_of(RECORDS)]
Kind = Annotated[str, _one_of(MESSAGES)]


@dataclass(frozen=True)
class Action:
    """One fault. Every kind has `at_s`; those with a `for_s` are over after it. Raises ConfigError for wrong values."""

    name: ClassVar[str] = ""
    at_s: At

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_s") and not 0 <= value <= TIME_MAX_S:
                raise ConfigError(f"{self.name}: {field.name} is 0 to {TIME_MAX_S:g}, got {value}")
            if field.name == "factor" and not 1 <= value <= 1000:
                raise ConfigError(f"{self.name}: a factor is 1 to 1000, got {value}")
        if self.members != tuple(sorted(dict.fromkeys(self.members))):
            raise ConfigError(f"{self.name}: name each member once, in order, got {self.members}")

    @property
    def end_s(self) -> float:
        """When it is over, as far as the schedule says."""
        return self.at_s + float(getattr(self, "for_s", 0.0))

    @property
    def members(self) -> tuple[int, ...]:
        """Those it names."""
        return tuple(getattr(self, key) for key in ("member",) if hasattr(self, key))

    @property
    def text(self) -> str:
        """As it stands in a replay line."""
        forms = forms_of(type(self))
        return f"{self.name}({','.join(form.write(getattr(self, key)) for key, form in forms.items())})"


@dataclass(frozen=True)
class OfMember(Action):
    """A fault of one member."""

    at_s: At
    member: Member


@dataclass(frozen=True)
class Join(OfMember):
    """The member starts for the first time at `at_s` instead of at the beginning."""

    name = "join"


@dataclass(frozen=True)
class Kill(OfMember):
    """The member loses power and never comes back."""

    name = "kill"


@dataclass(frozen=True)
class Quit(OfMember):
    """The member leaves politely, for good."""

    name = "quit"


@dataclass(frozen=True)
class Crash(OfMember):
    """The member loses power and starts again `for_s` later."""

    for_s: For
    name = "crash"


@dataclass(frozen=True)
class Leave(OfMember):
    """The member leaves politely and comes back `for_s` after it began to."""

    for_s: For
    name = "leave"


@dataclass(frozen=True)
class Fell(OfMember):
    """The member loses power as soon as its next record of a kind after `at_s` is on its disk, before it is said."""

    kind: Record
    for_s: For
    name = "fell"

    @property
    def end_s(self) -> float:
        """The latest that it may be back."""
        return self.at_s + ARMED_S + self.for_s


@dataclass(frozen=True)
class Cut(Action):
    """A partition: `side` against everybody else. What was on its way comes through afterwards, as TCP does it."""

    at_s: At
    side: Side
    for_s: For
    name = "cut"

    @property
    def members(self) -> tuple[int, ...]:
        """The side."""
        return self.side


@dataclass(frozen=True)
class Slow(OfMember):
    """The member's line has a `factor` less capacity."""

    factor: Factor
    for_s: For
    name = "slow"


@dataclass(frozen=True)
class Straggle(OfMember):
    """The member's steps take `factor` times as long."""

    factor: Factor
    for_s: For
    name = "straggle"


@dataclass(frozen=True)
class Disk(OfMember):
    """The member's disk takes `factor` times as long."""

    factor: Factor
    for_s: For
    name = "disk"


@dataclass(frozen=True)
class Skew(OfMember):
    """The member's wall clock is `by_s` ahead."""

    by_s: At
    for_s: For
    name = "skew"


@dataclass(frozen=True)
class OfMessages(Action):
    """A fault of control messages that reach `target` from `source` in the window."""

    at_s: At
    source: Anybody
    target: Anybody
    kind: Kind

    @property
    def members(self) -> tuple[int, ...]:
        """Those it names."""
        return tuple(sorted(dict.fromkeys(end for end in (self.source, self.target) if end != EVERYBODY)))

    def meets(self, source: int, target: int, kind: str, now_s: float) -> bool:
        """Whether a message falls under it."""
        ends = self.source in (EVERYBODY, source) and self.target in (EVERYBODY, target)
        return ends and self.kind in (ANY, kind) and self.at_s <= now_s < self.end_s


@dataclass(frozen=True)
class Lose(OfMessages):
    """They are accepted and then forgotten."""

    for_s: For
    name = "lose"


@dataclass(frozen=True)
class Delay(OfMessages):
    """They come `by_s` later, and so out of order."""

    by_s: At
    for_s: For
    name = "delay"


@dataclass(frozen=True)
class Double(OfMessages):
    """They come a second time, `by_s` later."""

    by_s: At
    for_s: For
    name = "double"


KINDS: dict[str, type[Action]] = {
    kind.name: kind
    for kind in (Join, Kill, Quit, Crash, Leave, Fell, Cut, Slow, Straggle, Disk, Skew, Lose, Delay, Double)
}


def forms_of(kind: type[Action]) -> dict[str, Form]:
    """The fields of a kind in the order of its text: whom, then when, then what."""
    hints = get_type_hints(kind, include_extras=True)
    forms = {field.name: hints[field.name].__metadata__[0] for field in fields(kind)}
    forms["at_s"] = forms.pop("at_s")  # after whom
    first = [key for key in forms if key in ("member", "side", "source", "target", "kind")]
    return {key: forms[key] for key in [*first, "at_s", *[key for key in forms if key not in (*first, "at_s")]]}


def parse_action(text: str) -> Action:
    """The action that `text` says. Raises ConfigError with the text."""
    match = re.fullmatch(r"([a-z]+)\(([^()\s]*)\)", text)
    if match is None or match[1] not in KINDS:
        raise ConfigError(f"not an action (known are {', '.join(KINDS)}): {text!r}")
    kind, parts = KINDS[match[1]], match[2].split(",")
    forms = forms_of(kind)
    if len(parts) != len(forms):
        raise ConfigError(f"{kind.name} takes {len(forms)} values ({', '.join(forms)}), got {text!r}")
    values = {}
    for part, (key, form) in zip(parts, forms.items(), strict=True):
        try:
            values[key] = form.read(part)
        except ValueError:
            raise ConfigError(f"{kind.name}: {key} cannot be {part!r}, got {text!r}") from None
    action = kind(**values)
    if action.text != text:
        raise ConfigError(f"write it as {action.text}, got {text!r}")
    return action


def moved(action: Action, **changes: Any) -> Action:
    """The same action with other values, times rounded to what its text holds."""
    rounded = {key: round(value, 3) if key.endswith("_s") else value for key, value in changes.items()}
    return replace(action, **rounded)
