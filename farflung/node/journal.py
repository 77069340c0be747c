"""Files that only grow: certificates, the current round's statements, and a log for people.

A frame is: length (4 bytes, big endian) ‖ CRC-32 of length and data (4 bytes) ‖ data. An append is synced before it
returns. What a crash leaves of the last frame is cut off on opening.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from farflung.node.durable import read_at, replace_file, room, sync_directory, sync_file, write_all_at
from farflung.protocol import limits
from farflung.protocol.errors import ConfigError, LocalError

_HEAD = 8
_JOURNAL = b"farflung journal\0"
_OLD_BYTES_MAX = 1 << 20
"""A journal longer than this is replaced at the next round: reading it at a start takes some milliseconds."""


def _head(data: bytes) -> bytes:
    length = len(data).to_bytes(4, "big")
    return length + zlib.crc32(data, zlib.crc32(length)).to_bytes(4, "big")


def frame(data: bytes) -> bytes:
    """The bytes of one entry."""
    return _head(data) + data


class FrameLog:
    """Entries in the order they were appended. One process at a time; `RunStore`'s lock sees to that.

    `cut_bytes` says how much of a torn tail was removed on opening. Damage before the tail is no crash's doing: the
    rest is then kept beside the file as NAME.damaged, and the log goes on from the last whole entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut_bytes = 0
        self._spans: list[tuple[int, int]] = []
        self._end = 0
        with room(path):
            fresh = not path.exists()
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if fresh:
                sync_directory(path.parent)
        self._scan()

    def _scan(self) -> None:
        size = os.fstat(self._handle).st_size
        while (data := self._frame_at(self._end, size)) is not None:
            self._spans.append((self._end + _HEAD, len(data)))
            self._end += _HEAD + len(data)
        self.cut_bytes = size - self._end
        if self.cut_bytes:
            self._cut()

    def _frame_at(self, start: int, size: int) -> bytes | None:
        head = read_at(self._handle, _HEAD, start)
        length = int.from_bytes(head[:4], "big")
        if len(head) < _HEAD or length > limits.CONTROL_BYTES_MAX or start + _HEAD + length > size:
            return None
        data = read_at(self._handle, length, start + _HEAD)
        return data if head == _head(data) else None

    def _cut(self) -> None:
        tail = read_at(self._handle, self.cut_bytes, self._end)
        if len(tail) > _HEAD + limits.CONTROL_BYTES_MAX or self._holds_a_frame(tail):
            replace_file(self.path.with_name(self.path.name + ".damaged"), tail)
        os.ftruncate(self._handle, self._end)
        sync_file(self._handle)

    def _holds_a_frame(self, tail: bytes) -> bool:
        """Whether a frame with a wrong CRC is followed by more: then it was not the last write that tore."""
        length = int.from_bytes(tail[:4], "big")
        return bool(tail[_HEAD + length :].strip(b"\0"))

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> bytes:
        start, length = self._spans[index]
        return read_at(self._handle, length, start)

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self._end

    def append(self, data: bytes, *, wait: bool = True) -> None:
        """Add an entry; it is on the disk when this returns, or with `wait=False` when the next one is.

        Raises LocalError above limits.CONTROL_BYTES_MAX. When it fails, on a full disk say, the log is as it was.
        """
        if len(data) > limits.CONTROL_BYTES_MAX:
            raise LocalError(f"a log entry of {len(data)} bytes")
        with room(self.path):
            try:
                write_all_at(self._handle, frame(data), self._end)
                if wait:
                    sync_file(self._handle)
            except OSError:
                os.ftruncate(self._handle, self._end)
                raise
        self._spans.append((self._end + _HEAD, len(data)))
        self._end += _HEAD + len(data)

    def close(self) -> None:
        """Let go of the file; closing twice is fine."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class CertificateLog:
    """The run's certificates, consecutive from round 0."""

    def __init__(self, path: Path) -> None:
        self._log = FrameLog(path)

    @property
    def cut_bytes(self) -> int:
        """How much of a torn tail was removed on opening."""
        return self._log.cut_bytes

    @property
    def next_round(self) -> int:
        """The first round without a certificate."""
        return len(self._log)

    def append(self, round_index: int, certificate: bytes) -> None:
        """Keep the certificate of the next round. Raises LocalError for any other round."""
        if round_index != self.next_round:
            raise LocalError(f"certificate {round_index} where {self.next_round} comes next")
        self._log.append(certificate)

    def certificate(self, round_index: int) -> bytes | None:
        """The certificate of a round, if it is here."""
        return self._log[round_index] if 0 <= round_index < len(self._log) else None

    def close(self) -> None:
        """Let go of the file."""
        self._log.close()


class Journal:
    """What this member said in the current round: promises, votes, its own announcement.

    A round begins with a heading of its own behind the entries of the rounds before, which cost nothing but their
    bytes: from time to time the file is replaced by one without them.
    `announced` is the latest earlier round in which it announced a payload (0: none), as its first entry says: what is
    left of an older update is worth nothing any more.
    `round_index` is None before the first `reset`. A journal of a round that already has its certificate is one that
    a crash kept from being reset.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log = FrameLog(path)
        self._heading = 0
        self._check()

    def _check(self) -> None:
        if len(self._log) and not self._log[0].startswith(_JOURNAL):
            raise ConfigError(f"not a journal; move it away and start again: {self._path}")
        headings = (index for index in reversed(range(len(self._log))) if self._log[index].startswith(_JOURNAL))
        self._heading = next(headings, 0)

    @property
    def cut_bytes(self) -> int:
        """How much of a torn tail was removed on opening."""
        return self._log.cut_bytes

    @property
    def round_index(self) -> int | None:
        """The round these entries belong to."""
        return self._number(0) if len(self._log) else None

    @property
    def announced(self) -> int:
        """The latest round before this one in which a payload was announced; 0: none, or an older version's journal."""
        return self._number(1) if len(self._log) else 0

    def _number(self, position: int) -> int:
        start = len(_JOURNAL) + 8 * position
        return int.from_bytes(self._log[self._heading][start : start + 8], "big")

    def reset(self, round_index: int, announced: int = 0) -> None:
        """Begin a round. A crash before its first entry may forget that it began, and leave the round before."""
        heading = _JOURNAL + round_index.to_bytes(8, "big") + announced.to_bytes(8, "big")
        if self._log.size_bytes < _OLD_BYTES_MAX:
            self._log.append(heading, wait=False)
        else:
            replace_file(self._path, frame(heading))
            self._log.close()
            self._log = FrameLog(self._path)
        self._heading = len(self._log) - 1

    def record(self, kind: str, data: bytes) -> None:
        """Add an entry; it is on the disk when this returns. Raises LocalError before the first `reset`."""
        if not len(self._log):
            raise LocalError(f"a journal entry before any round: {kind}")
        name = kind.encode("ascii")
        self._log.append(bytes([len(name)]) + name + data)

    def read(self) -> list[tuple[str, bytes]]:
        """The current round's entries, in order."""
        entries = (self._log[index] for index in range(self._heading + 1, len(self._log)))
        return [(entry[1 : 1 + entry[0]].decode("ascii"), entry[1 + entry[0] :]) for entry in entries]

    def close(self) -> None:
        """Let go of the file."""
        self._log.close()


class RoundLog:
    """One JSON object per line, for people and plots. Not synced: losing its last line in a power cut loses nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with room(path):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._cut_half_a_line()

    def _cut_half_a_line(self) -> None:
        end = os.fstat(self._handle).st_size
        step = 1 << 16
        while end > 0:
            start = max(0, end - step)
            newline = read_at(self._handle, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        os.ftruncate(self._handle, end)

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line."""
        line = json.dumps(entry, sort_keys=True).encode() + b"\n"
        with room(self._path):
            if os.write(self._handle, line) < len(line):  # a full disk took a part of it
                self._cut_half_a_line()
                raise OSError(28, "No space left on device")

    def close(self) -> None:
        """Let go of the file; closing twice is fine."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
