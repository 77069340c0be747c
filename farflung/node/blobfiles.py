"""Blobs on disk: payloads, whole or still arriving.

One file per blob, named by its digest:

    the blob ‖ chunk digests (32 each) ‖ size (8, big endian) ‖ chunk size (4) ‖ "ffblob1\\0"

A blob that is still arriving is the same file with the ending `.part`, its missing chunks being holes. Chunks of
a partial file are hashed again when it is opened, so nothing needs to be synced before the end.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from farflung.node.durable import (
    make_directory,
    read_at,
    replacing,
    room,
    sweep,
    sync_directory,
    sync_file,
    write_all,
    write_all_at,
)
from farflung.protocol.blob import DIGEST_BYTES, BlobRef, blob_digest, chunk_digest
from farflung.protocol.errors import LocalError, PeerError

_MAGIC = b"ffblob1\0"
_FOOT_BYTES = 8 + 4 + len(_MAGIC)
_WHOLE = ".blob"
_PART = ".part"


def _trailer(ref: BlobRef, digests: Sequence[bytes]) -> bytes:
    return b"".join(digests) + ref.size.to_bytes(8, "big") + ref.chunk_bytes.to_bytes(4, "big") + _MAGIC


def _read_trailer(handle: int, digest: bytes) -> tuple[BlobRef, list[bytes]] | None:
    """What a file says of itself, or None if it is not the blob of that digest."""
    end = os.fstat(handle).st_size
    foot = read_at(handle, _FOOT_BYTES, max(0, end - _FOOT_BYTES))
    if len(foot) < _FOOT_BYTES or foot[12:] != _MAGIC:
        return None
    try:
        ref = BlobRef(digest, int.from_bytes(foot[:8], "big"), int.from_bytes(foot[8:12], "big"))
    except PeerError:
        return None
    listed = read_at(handle, ref.chunks * DIGEST_BYTES, ref.size)
    digests = [listed[at : at + DIGEST_BYTES] for at in range(0, len(listed), DIGEST_BYTES)]
    whole = end == ref.size + len(listed) + _FOOT_BYTES and len(digests) == ref.chunks
    return (ref, digests) if whole and blob_digest(ref.size, ref.chunk_bytes, digests) == digest else None


class FileSource:
    """A whole blob on disk. Holds no file open; reading after `drop` raises FileNotFoundError."""

    def __init__(self, path: Path, ref: BlobRef, digests: list[bytes]) -> None:
        self.path = path
        self.ref = ref
        self.digests = digests

    def read_chunk(self, index: int) -> bytes:
        """One chunk, not checked again: whoever receives it does."""
        start, stop = self.ref.span(index)
        handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return read_at(handle, stop - start, start)
        finally:
            os.close(handle)

    def map(self) -> memoryview:
        """The blob's bytes, read-only, paged in as they are touched. Stays valid after `drop`."""
        with self.path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), self.ref.size, access=mmap.ACCESS_READ))

    def verify(self) -> bool:
        """Whether the bytes still are what their digests say. Reads every byte."""
        with self.map() as view:
            spans = map(self.ref.span, range(self.ref.chunks))
            pairs = zip(spans, self.digests, strict=True)
            return all(chunk_digest(view[start:stop]) == digest for (start, stop), digest in pairs)


class PartialFile:
    """A blob that is still arriving, resumable after any crash."""

    def __init__(self, path: Path, ref: BlobRef, digests: Sequence[bytes]) -> None:
        self.ref = ref
        self.digests = list(digests)
        self._path = path
        self._have: set[int] = set()
        self._handle = -1
        with room(path):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            trailer = _trailer(ref, self.digests)
            if os.fstat(self._handle).st_size == ref.size + len(trailer):
                self._have = {index for index in range(ref.chunks) if self._holds(index)}
            else:
                os.ftruncate(self._handle, 0)
                write_all_at(self._handle, trailer, ref.size)

    def _holds(self, index: int) -> bool:
        start, stop = self.ref.span(index)
        try:
            if os.lseek(self._handle, start, os.SEEK_DATA) >= stop:
                return False  # a hole: never written
        except OSError:
            pass  # a file system without holes
        return chunk_digest(read_at(self._handle, stop - start, start)) == self.digests[index]

    def write_chunk(self, index: int, data: bytes | memoryview) -> None:
        """Keep a chunk. Raises PeerError unless it hashes to its digest; a chunk that is there already is ignored."""
        if index in self._have:
            return
        if not 0 <= index < self.ref.chunks or chunk_digest(data) != self.digests[index]:
            raise PeerError("?", f"not chunk {index} of blob {self.ref.short}")
        with room(self._path):
            write_all_at(self._handle, data, self.ref.span(index)[0])
        self._have.add(index)

    def have(self) -> set[int]:
        """The chunks that are here."""
        return set(self._have)

    def read_chunk(self, index: int) -> bytes:
        """A chunk that is here, for relaying it before the rest has come. Raises LocalError if it is not."""
        if index not in self._have:
            raise LocalError(f"chunk {index} of blob {self.ref.short} has not come yet")
        start, stop = self.ref.span(index)
        return read_at(self._handle, stop - start, start)

    def finish(self) -> FileSource:
        """Make it a whole blob: on the disk when this returns. Raises LocalError while chunks are missing."""
        if len(self._have) != self.ref.chunks:
            raise LocalError(f"blob {self.ref.short} has {len(self._have)} of {self.ref.chunks} chunks")
        whole = self._path.with_suffix(_WHOLE)
        with room(self._path):
            write_all_at(self._handle, _trailer(self.ref, self.digests), self.ref.size)
            sync_file(self._handle)
            os.replace(self._path, whole)
            sync_directory(whole.parent)
        self.close()
        return FileSource(whole, self.ref, self.digests)

    def close(self) -> None:
        """Let go of the file, which stays for the next start; closing twice is fine."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        self.close()


class BlobFiles:
    """The blobs of one run."""

    def __init__(self, directory: Path) -> None:
        self._directory = make_directory(directory)
        sweep(directory)

    def _path(self, digest: bytes, ending: str = _WHOLE) -> Path:
        return self._directory / (digest.hex() + ending)

    def partial(self, ref: BlobRef, digests: Sequence[bytes]) -> PartialFile:
        """Begin to receive a blob, or resume. `digests` must be the blob's list (`check_list`), or LocalError."""
        if len(digests) != ref.chunks or blob_digest(ref.size, ref.chunk_bytes, digests) != ref.digest:
            raise LocalError(f"a digest list that is not blob {ref.short}'s")
        return PartialFile(self._path(ref.digest, _PART), ref, digests)

    def put(self, data: bytes | memoryview, ref: BlobRef, digests: Sequence[bytes]) -> FileSource:
        """Keep a whole blob whose description is right already; on the disk when this returns."""
        known = self.blob(ref.digest)
        if known is not None:
            return known
        if memoryview(data).nbytes != ref.size:
            raise LocalError(f"{memoryview(data).nbytes} bytes for blob {ref.short} of {ref.size}")
        path = self._path(ref.digest)
        with replacing(path) as handle:
            write_all(handle, data)
            write_all(handle, _trailer(ref, digests))
        return FileSource(path, ref, list(digests))

    def blob(self, digest: bytes) -> FileSource | None:
        """A whole blob, if it is here and its list of digests is sound (its bytes are not read)."""
        path = self._path(digest)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            found = _read_trailer(handle, digest)
        finally:
            os.close(handle)
        return FileSource(path, *found) if found else None

    def drop(self, digest: bytes) -> None:
        """Forget a blob, whole or partial; one that is not here is fine."""
        for ending in (_WHOLE, _PART):
            self._path(digest, ending).unlink(missing_ok=True)

    def blobs(self) -> list[bytes]:
        """Digests of the whole blobs, sorted."""
        return self._listed(_WHOLE)

    def partials(self) -> list[bytes]:
        """Digests of those still arriving, sorted."""
        return self._listed(_PART)

    def _listed(self, ending: str) -> list[bytes]:
        return sorted(bytes.fromhex(path.stem) for path in self._directory.glob(f"*{ending}"))
