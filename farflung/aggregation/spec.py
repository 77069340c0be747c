"""The text in which a run's genesis names a rule, a weight policy or an outer optimiser: `name(key=value, ...)`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from farflung.protocol.errors import ConfigError

SPEC_CHARS_MAX = 200
"""A spec is read by people; the longest of ours has 40 characters."""

_CALL = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(?:\(([^()]*)\)\s*)?", re.ASCII)
_INTEGER = re.compile(r"[0-9]{1,18}")
_DECIMAL = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?")


class Call(NamedTuple):
    """A parsed spec: the name, and each argument's text."""

    text: str
    name: str
    arguments: dict[str, str]


def parse_call(text: str, allowed: Mapping[str, tuple[str, ...]]) -> Call:
    """Split `text`. `allowed` maps each name to its arguments, all of which must be given, by name, once.

    Raises ConfigError that says where (counting characters from 1), what was found and what is allowed.
    """
    match = _CALL.match(text[: SPEC_CHARS_MAX + 1])
    if match is None or len(text) > SPEC_CHARS_MAX:
        raise ConfigError(f"expected one of {_forms(allowed)} at character 1, got {text[:40]!r}")
    name = match[1]
    if name not in allowed:
        raise ConfigError(f"expected one of {_forms(allowed)} at character {match.start(1) + 1}, got {name!r}")
    if match.end() != len(text):
        raise ConfigError(f"expected {_form(name, allowed)} to end at character {match.end() + 1}, got {text!r}")
    arguments: dict[str, str] = {}
    position = match.start(2)
    for piece in match[2].split(",") if (match[2] or "").strip() else ():
        key, _, value = (part.strip() for part in piece.partition("="))
        if key not in allowed[name] or key in arguments or not value:
            raise ConfigError(f"expected {_form(name, allowed)}, got {piece.strip()!r} at character {position + 1}")
        arguments[key] = value
        position += len(piece) + 1
    missing = [key for key in allowed[name] if key not in arguments]
    if missing:
        raise ConfigError(f"expected {_form(name, allowed)}, {missing[0]!r} is missing in {text!r}")
    return Call(text, name, arguments)


def parse_integer(call: Call, key: str, low: int, high: int) -> int:
    """An argument as an integer within [low, high]. Raises ConfigError otherwise."""
    value = call.arguments[key]
    if not _INTEGER.fullmatch(value) or not low <= int(value) <= high:
        raise ConfigError(f"{key!r} in {call.text!r} is an integer from {low} to {high}, got {value!r}")
    return int(value)


def parse_decimal(call: Call, key: str, low: float, high: float, *, below: bool = False) -> float:
    """An argument as the fp64 number nearest to its decimal text, within [low, high], or [low, high) if `below`."""
    value = call.arguments[key]
    number = float(value) if _DECIMAL.fullmatch(value) else float("nan")
    if not low <= number <= high or (below and number == high):
        bound = "less than" if below else "at most"
        raise ConfigError(f"{key!r} in {call.text!r} is a number from {low}, {bound} {high}, got {value!r}")
    return number


def _form(name: str, allowed: Mapping[str, tuple[str, ...]]) -> str:
    keys = ",".join(f"{key}=..." for key in allowed[name])
    return f"{name}({keys})" if keys else name


def _forms(allowed: Mapping[str, tuple[str, ...]]) -> str:
    return ", ".join(_form(name, allowed) for name in allowed)
