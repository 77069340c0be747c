"""What happened, in order, as lines of text and as one digest: two runs are equal if and only if their digests are.

A line is `time_ns source>target what bytes`, or `time_ns member what detail`; times are whole nanoseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, TextIO

CONTEXT_LINES = 3
"""Lines before a divergence that are shown with it."""


class EventLog:
    """Hashes every event; writes the lines to a file too, if it is given one. Costs about a microsecond an event."""

    def __init__(self, path: Path | None = None) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._file: TextIO | None = _open(path) if path is not None else None
        self.events = 0

    def add(self, line: str) -> None:
        """Keep one event."""
        self._hash.update(line.encode("ascii", "backslashreplace") + b"\n")
        self.events += 1
        if self._file is not None:
            self._file.write(line + "\n")

    def message(self, now_ns: int, source: int, target: int, what: str, size: int) -> None:
        """A message reached its target."""
        self.add(f"{now_ns} {source}>{target} {what} {size}")

    def member(self, now_ns: int, member: int, what: str, detail: str = "") -> None:
        """Something happened to a member."""
        self.add(f"{now_ns} {member} {what} {detail}")

    @property
    def digest(self) -> str:
        """Of everything so far."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _open(path: Path) -> TextIO:
    """A log's file: what peers said need not be ASCII."""
    return path.open("w", encoding="ascii", errors="backslashreplace", newline="\n")


class Divergence(NamedTuple):
    """The first line in which two logs differ; empty where one log has ended."""

    line: int
    left: str
    right: str
    before: tuple[str, ...]
    """The last lines that are still equal."""

    def __str__(self) -> str:
        shared = "".join(f"    {line}\n" for line in self.before)
        left, right = self.left or "(the log ends)", self.right or "(the log ends)"
        return f"first difference in line {self.line}:\n{shared}  - {left}\n  + {right}"


def first_divergence(left: Path, right: Path) -> Divergence | None:
    """Where two event logs part, or None if they are equal. Reads line by line; raises OSError for a missing file."""
    before: list[str] = []
    pairs = zip_longest(_lines(left), _lines(right), fillvalue="")
    for number, (one, other) in enumerate(pairs, start=1):
        if one != other:
            return Divergence(number, one, other, tuple(before))
        before = [*before[1 - CONTEXT_LINES :], one]
    return None


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="ascii") as lines:
        for line in lines:
            yield line.rstrip("\n")
