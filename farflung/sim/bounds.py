"""Refusals that a scenario's checks are made of. Each raises ConfigError with the value that was wrong at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from farflung.protocol.errors import ConfigError
from farflung.sim.draw import Draw


def default_of(owner: object, key: str) -> Any:
    """The default of a dataclass' field; MISSING if it has none."""
    (item,) = (item for item in fields(owner) if item.name == key)  # type: ignore[arg-type]
    return item.default_factory() if item.default_factory is not MISSING else item.default


def positive(where: str, draw: Draw | None) -> None:
    """Refuse a draw that is missing, or surely or often zero."""
    if draw is None:
        raise ConfigError(f"{where} is missing: set it to a number or a draw, got {draw}")
    decisive = {"uniform": draw.numbers[-1:], "normal": draw.numbers[:1], "weibull": draw.numbers[-1:]}
    if not all(number > 0 for number in decisive.get(draw.kind, draw.numbers[: None if draw.kind == "choice" else 1])):
        raise ConfigError(f"{where} must be above 0, got {draw}")


def only(owner: Any, used: Iterable[str], where: str, why: str) -> None:
    """Refuse settings other than `kind` and the `used` ones that are not at their default."""
    for item in fields(owner):
        if item.name not in (*used, "kind"):
            default(owner, item.name, where, why)


def default(owner: Any, key: str, where: str, why: str) -> None:
    """Refuse a setting that is not at its default: it would change nothing."""
    if getattr(owner, key) != default_of(owner, key):
        raise ConfigError(f"{where}: {key} {why}: leave it out, got {plain(getattr(owner, key))!r}")


def positions(where: str, members: tuple[int, ...], size: int) -> None:
    """Refuse positions of members that do not exist."""
    for member in members:
        if not 0 <= member < size:
            raise ConfigError(f"{where}: members are positions from 0 to {size - 1}, got {member}")


def unique(where: str, names: Iterable[object]) -> None:
    """Refuse a name that occurs twice."""
    seen: dict[object, None] = {}
    for name in names:
        if name in seen:
            raise ConfigError(f"{where} must be different, got twice {name!r}")
        seen[name] = None


def one_of(where: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse what is not among the known."""
    if value not in known:
        raise ConfigError(f"{where} is one of {', '.join(known)}, got {value!r}")


def within(where: str, value: float, low: float, high: float) -> None:
    """Refuse what is outside [low, high]."""
    if not low <= value <= high:
        raise ConfigError(f"{where} must be {low:g} to {high:g}, got {value:g}")


def above(where: str, value: float, low: float) -> None:
    """Refuse what is not a finite number above low."""
    if not (value > low and math.isfinite(value)):
        raise ConfigError(f"{where} must be above {low:g}, got {value:g}")


def not_negative(where: str, value: float) -> None:
    """Refuse what is not a finite number from 0 on."""
    if not (value >= 0 and math.isfinite(value)):
        raise ConfigError(f"{where} must not be negative, got {value:g}")


def plain(value: object) -> object:
    """How a value is shown to people."""
    return str(value) if isinstance(value, Draw) else value
