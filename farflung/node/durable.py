"""Writing so that neither kill -9 nor a power cut leaves half of anything, and a full disk is a sentence, not a crash.

A file is replaced in four steps: write a temporary one beside it, sync it, rename it, sync the directory. Until the
rename the old bytes are there; after the last step the new ones are, whatever happens.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from farflung.protocol.errors import ConfigError

TEMPORARY = ".tmp"
"""The ending of what was never finished; `sweep` removes it."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_HIDDEN = 0o600
_FILE = 0o644


@contextmanager
def room(path: Path) -> Iterator[None]:
    """Turn "no space left" into a ConfigError that says where; every write to the disk happens inside one."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        where = path if path.is_dir() else path.parent
        where = where.parent if where.suffix == TEMPORARY else where
        raise ConfigError(f"disk full: {error.strerror}; free space in {where} and start again") from error


def _wait(handle: int) -> None:
    """macOS needs F_FULLFSYNC: its fsync does not wait for the disk itself."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(handle)
    else:
        fcntl.fcntl(handle, full)


Wait = Callable[[int], None]
_waits: list[Wait] = [_wait]


@contextmanager
def waiting_by(wait: Wait) -> Iterator[None]:
    """In this block, waiting for the disk is `wait`: in a world whose time is not real, it is only counted there."""
    _waits.append(wait)
    try:
        yield
    finally:
        _waits.remove(wait)


def sync_file(handle: int) -> None:
    """Wait until a file's bytes are on the disk itself."""
    _waits[-1](handle)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk: renames and new files are lost without it."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_file(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> Path:
    """Create a directory and those above it, names synced; returns it."""
    if not path.is_dir():
        make_directory(path.parent)
        with room(path.parent):
            path.mkdir(exist_ok=True)
            sync_directory(path.parent)
    return path


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Write every byte: one `write` may take less, and never more than 2 GiB."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(handle, view) :]


def write_all_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    """The same at an offset."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def read_at(handle: int, size: int, offset: int) -> bytes:
    """`size` bytes at an offset, or fewer where the file ends."""
    pieces: list[bytes] = []
    while size > 0 and (piece := os.pread(handle, min(size, 1 << 30), offset)):
        pieces.append(piece)
        size, offset = size - len(piece), offset + len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@contextmanager
def replacing(path: Path, *, mode: int = _FILE) -> Iterator[int]:
    """A handle to write to; `path` becomes what was written when the block ends well, and stays as it was if not."""
    temporary = path.with_name(path.name + TEMPORARY)
    with room(path):
        try:
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
            try:
                yield handle
                sync_file(handle)
            finally:
                os.close(handle)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def replace_file(path: Path, data: bytes | Iterable[bytes | memoryview], *, mode: int = _FILE) -> None:
    """Make `path` hold exactly these bytes, or leave it as it was."""
    with replacing(path, mode=mode) as handle:
        for piece in [data] if isinstance(data, bytes) else data:
            write_all(handle, piece)


def create_secret(path: Path, data: bytes) -> bool:
    """Create a file that only its owner can read. Returns False, and changes nothing, if it is there already."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    with room(path):
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _HIDDEN)
            try:
                write_all(handle, data)
                sync_file(handle)
            finally:
                os.close(handle)
            os.link(temporary, path)  # unlike a rename this fails when another process was faster
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
    return True


def sweep(directory: Path) -> None:
    """Remove what a crash left unfinished."""
    for path in directory.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)
