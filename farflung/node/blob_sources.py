"""Blobs a node holds, whole or still arriving. Those on disk are in `blobfiles.py`; here are the ones in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from farflung.protocol.blob import BlobRef, chunk_digest, describe, split
from farflung.protocol.errors import LocalError, PeerError


class BlobSource(Protocol):
    """A whole blob that can be read."""

    @property
    def ref(self) -> BlobRef:
        """Its name."""

    @property
    def digests(self) -> Sequence[bytes]:
        """The digest of every chunk."""

    def read_chunk(self, index: int) -> bytes:
        """One chunk. Called on the event loop: it may touch the page cache, but must not wait long."""


class PartialBlob(Protocol):
    """A blob that is still arriving. Its digest list has been checked."""

    def have(self) -> set[int]:
        """The chunks that are here: at first those an earlier attempt left."""

    def write_chunk(self, index: int, data: bytes) -> None:
        """Keep a chunk. Raises PeerError unless it hashes to its digest."""

    def read_chunk(self, index: int) -> bytes:
        """A chunk that is here, to relay it."""

    def finish(self) -> BlobSource:
        """All chunks are here: make it a whole blob. Called in a thread; may wait for the disk."""

    def close(self) -> None:
        """No more chunks will come. What is here may be kept for the next attempt."""


Sink = Callable[[BlobRef, Sequence[bytes]], PartialBlob]
"""Where downloads go: makes a partial blob of a name and its checked digest list. Called in a thread."""


class MemoryBlob:
    """A whole blob in memory, in chunks."""

    def __init__(self, ref: BlobRef, digests: Sequence[bytes], chunks: Sequence[bytes | memoryview]) -> None:
        self.ref, self.digests, self._chunks = ref, digests, chunks

    @staticmethod
    def of(data: bytes, chunk_bytes: int | None = None) -> MemoryBlob:
        """Describe `data`, which is not copied."""
        ref, digests = describe(data, chunk_bytes)
        return MemoryBlob(ref, digests, split(data, ref.chunk_bytes))

    def read_chunk(self, index: int) -> bytes:
        """One chunk."""
        return bytes(self._chunks[index])


class MemoryPartial:
    """A blob arriving in memory. Takes room chunk by chunk, never for the announced size."""

    def __init__(self, ref: BlobRef, digests: Sequence[bytes]) -> None:
        self.ref, self.digests = ref, digests
        self._chunks: dict[int, bytes] = {}

    def have(self) -> set[int]:
        """The chunks that are here."""
        return set(self._chunks)

    def write_chunk(self, index: int, data: bytes) -> None:
        """Keep a chunk. Raises PeerError unless it hashes to its digest."""
        if not 0 <= index < self.ref.chunks or chunk_digest(data) != self.digests[index]:
            raise PeerError("?", f"not chunk {index} of blob {self.ref.short}")
        self._chunks[index] = bytes(data)

    def read_chunk(self, index: int) -> bytes:
        """A chunk that is here."""
        return self._chunks[index]

    def finish(self) -> MemoryBlob:
        """The whole blob. Raises LocalError while chunks are missing."""
        if len(self._chunks) != self.ref.chunks:
            raise LocalError(f"blob {self.ref.short} has {len(self._chunks)} of {self.ref.chunks} chunks")
        return MemoryBlob(self.ref, self.digests, [self._chunks[index] for index in range(self.ref.chunks)])

    def close(self) -> None:
        """Nothing to let go of."""


class MemoryBlobs:
    """A sink in memory that keeps unfinished blobs, so that a later attempt resumes."""

    def __init__(self) -> None:
        self._partials: dict[bytes, MemoryPartial] = {}

    def partial(self, ref: BlobRef, digests: Sequence[bytes]) -> MemoryPartial:
        """Begin to receive a blob, or resume."""
        return self._partials.setdefault(ref.digest, MemoryPartial(ref, digests))

    def drop(self, digest: bytes) -> None:
        """Forget an unfinished blob."""
        self._partials.pop(digest, None)


def read_stream(source: BlobSource, arrays: Sequence[NDArray[np.float32]]) -> None:
    """Read a blob into arrays, one after the other, chunk by chunk. The caller has compared their sizes with it."""
    views = [memoryview(array).cast("B") for array in arrays]  # type: ignore[arg-type]
    for index in range(source.ref.chunks):
        data = memoryview(source.read_chunk(index))
        start, offset = source.ref.span(index)[0], 0
        for view in views:
            first, last = max(start - offset, 0), min(start + len(data) - offset, len(view))
            if first < last:
                view[first:last] = data[first + offset - start : last + offset - start]
            offset += len(view)


def read_all(source: BlobSource) -> bytes:
    """The bytes of a blob in one piece."""
    return b"".join(source.read_chunk(index) for index in range(source.ref.chunks))
