"""The text of a codec, taken apart: stages between bars, each a name with arguments, and where each stands.

spec     = stage { "|" stage }
stage    = name [ "(" [ argument { "," argument } ] ")" ]
argument = [ key "=" ] value          a value may itself be a spec; bars and commas inside parentheses belong to it

Columns count from 1 in the text that the user wrote, inside nested specs too. Everything raises ConfigError.
"""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn

from farflung.protocol.errors import ConfigError

SPEC_CHARS_MAX = 2000
"""A longer text is no codec, with every default written out."""

DEPTH_MAX = 8
"""Parentheses within parentheses, with every default written out; three are sensible."""

_NAME = re.compile(r"\s*([a-z][a-z0-9_-]*)\s*", re.ASCII)
_KEY = re.compile(r"\s*([A-Za-z0-9_.*\[\]?-]+)\s*=(.*)", re.ASCII | re.DOTALL)


class Argument(NamedTuple):
    """One argument of a stage: its key, or "" if it stands alone, its text, and the text's column."""

    key: str
    text: str
    column: int


class StageText(NamedTuple):
    """One part between bars, and the column where it starts."""

    name: str
    arguments: tuple[Argument, ...]
    column: int

    def __str__(self) -> str:
        inside = ", ".join(f"{item.key}={item.text}" if item.key else item.text for item in self.arguments)
        return f"{self.name}({inside})" if self.arguments else self.name

    def refuse(self, why: str, *allowed: str, column: int = 0) -> NoReturn:
        """Raise ConfigError about this stage, or about a column within it."""
        hint = f"; allowed: {', '.join(allowed)}" if allowed else ""
        raise ConfigError(f"codec, column {column or self.column}: {why}{hint}; got {str(self)!r}")


def split_stages(text: str, column: int = 1) -> list[StageText]:
    """The stages of a spec that starts at `column`."""
    if len(text) > SPEC_CHARS_MAX:
        raise ConfigError(f"codec, column {column}: at most {SPEC_CHARS_MAX} characters are allowed, got {len(text)}")
    return [_stage(part, at) for part, at in _split(text, "|", column)]


def _stage(part: str, column: int) -> StageText:
    match = _NAME.match(part)
    rest = part[match.end() :] if match else part
    if match is None or (rest and not (rest.startswith("(") and rest.rstrip().endswith(")"))):
        raise ConfigError(f"codec, column {column}: expected name or name(arguments), got {part!r}")
    at = column + match.start(1)
    if not rest:
        return StageText(match[1], (), at)
    opening = column + match.end()
    inside = rest.rstrip()[1:-1]
    if not inside.strip():
        raise ConfigError(f"codec, column {opening}: empty parentheses, got {part!r}")
    return StageText(match[1], tuple(_argument(*item) for item in _split(inside, ",", opening + 1)), at)


def _argument(text: str, column: int) -> Argument:
    match = _KEY.fullmatch(text)
    key, value = (match[1], match[2]) if match else ("", text)
    at = column + (match.start(2) if match else 0) + len(value) - len(value.lstrip())
    if not value.strip():
        raise ConfigError(f"codec, column {at}: an argument is missing, got {text!r}")
    return Argument(key, value.strip(), at)


def _split(text: str, separator: str, column: int) -> list[tuple[str, int]]:
    """Parts at the outermost level, each with its column."""
    parts, depth, first = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth < 0 or depth > DEPTH_MAX:
            what = "a ) without its (" if depth < 0 else f"more than {DEPTH_MAX} parentheses inside each other"
            raise ConfigError(f"codec, column {column + position}: {what}, got {text!r}")
        if letter == separator and depth == 0:
            parts.append((text[first:position], column + first))
            first = position + 1
    if depth:
        raise ConfigError(f"codec, column {column + len(text)}: a ) is missing, got {text!r}")
    return [*parts, (text[first:], column + first)]


class Arguments:
    """The arguments of a stage, taken one by one; `end` refuses what nobody took."""

    def __init__(self, stage: StageText, example: str) -> None:
        self.stage, self._example = stage, example
        self._left = list(stage.arguments)
        keys = [item.key for item in self._left if item.key]
        if len(set(keys)) < len(keys):
            stage.refuse("an argument is given twice", example)

    def take(self, key: str) -> Argument | None:
        """The first argument if it has no key, or else the one of that key; both would be one too many."""
        named = self.named(key)
        if not self._left or self._left[0].key:
            return named
        if named is not None:
            self.stage.refuse(f"{key} is given twice", self._example, column=named.column)
        return self._left.pop(0)

    def named(self, key: str) -> Argument | None:
        """The argument of that key."""
        found = next((item for item in self._left if item.key == key), None)
        if found is not None:
            self._left.remove(found)
        return found

    def rest(self) -> list[Argument]:
        """Everything not taken yet."""
        left, self._left = self._left, []
        return left

    def integer(self, key: str, low: int, high: int, default: int | None = None, *, power_of_two: bool = False) -> int:
        """A whole number from low to high."""
        item = self.take(key)
        if item is None:
            return self._missing(key) if default is None else default
        number = int(item.text) if re.fullmatch(r"[0-9]{1,9}", item.text) else -1
        if not low <= number <= high or (power_of_two and number & (number - 1)):
            what = "a power of two" if power_of_two else "a whole number"
            self.stage.refuse(f"{key} must be {what} from {low} to {high}", self._example, column=item.column)
        return number

    def decimal(self, key: str, low: float, high: float, default: float | None = None, *, keyed: bool = False) -> float:
        """A decimal from low to high, of at most seven digits behind the point; `keyed`: only with its key."""
        item = self.named(key) if keyed else self.take(key)
        if item is None:
            return self._missing(key) if default is None else default
        match = re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,7})?", item.text)
        number = float(match[0]) if match else low - 1
        if not low <= number <= high:
            self.stage.refuse(f"{key} must be a decimal from {low:g} to {high:g}", self._example, column=item.column)
        return number

    def fraction(self, key: str, chunk_min: int, chunk_max: int) -> tuple[int, int]:
        """k/chunk, chunk a power of two within the bounds, 1 <= k <= chunk."""
        item = self.take(key)
        if item is None:
            return self._missing(key)
        match = re.fullmatch(r"([0-9]{1,7})\s*/\s*([0-9]{1,7})", item.text)
        k, chunk = (int(match[1]), int(match[2])) if match else (0, 0)
        if not (chunk_min <= chunk <= chunk_max and chunk & (chunk - 1) == 0 and 1 <= k <= chunk):
            why = f"chunk must be a power of two from {chunk_min} to {chunk_max}, k from 1 to chunk"
            self.stage.refuse(why, self._example, column=item.column)
        return k, chunk

    def word(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of some words."""
        item = self.take(key)
        if item is None:
            return self._missing(key) if default is None else default
        if item.text not in allowed:
            self.stage.refuse(f"{key} must be one of {', '.join(allowed)}", self._example, column=item.column)
        return item.text

    def end(self) -> None:
        """Raise ConfigError if an argument is left over."""
        if self._left:
            item = self._left[0]
            name = item.key or item.text
            self.stage.refuse(f"no such argument: {name}", self._example, column=item.column)

    def _missing(self, key: str) -> NoReturn:
        self.stage.refuse(f"{key} is missing", self._example)
