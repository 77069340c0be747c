"""The swarm's state on disk, and this member's own.

A snapshot is a directory `round-000012` with `state.safetensors` (θ and the outer buffers, fp32) and `manifest.json`
(round, digests, the caller's meta). The *state stream* is θ's bytes followed by the buffers' in order; its blob
digest is in the certificates, and its chunks are served straight from the file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.node.durable import make_directory, read_at, replace_file, replacing, room, sync_directory
from farflung.node.tensorfile import Stored, float_vector, read_header, read_into, slabs, write_tensors
from farflung.protocol import limits
from farflung.protocol.blob import DIGEST_BYTES, BlobRef, blob_digest, choose_chunk_bytes, chunk_digest
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import ConfigError, LocalError, PeerError

KEEP = 2
"""Snapshots kept: one to load, and one in case the disk ate it."""

_STATE = "state.safetensors"
_MANIFEST = "manifest.json"
_THETA = "theta"
_MANIFEST_BYTES_MAX = (2 * DIGEST_BYTES * limits.BLOB_CHUNKS_MAX) + (16 << 20)


class _Chunks:
    """Chunk digests of a stream that comes in pieces of any size; copies only where a chunk straddles two pieces."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._begun = bytearray()
        self._digests: list[bytes] = []

    def feed(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            size = self._chunk_bytes - len(self._begun)
            piece, view = view[:size], view[size:]
            if len(piece) < self._chunk_bytes:
                self._begun += piece
                piece = memoryview(self._begun)
            if len(piece) == self._chunk_bytes:
                self._digests.append(chunk_digest(piece))
                self._begun = bytearray()

    def end(self) -> list[bytes]:
        return self._digests + ([chunk_digest(memoryview(self._begun))] if self._begun else [])


class Snapshot(NamedTuple):
    """One snapshot on disk, as its manifest describes it."""

    path: Path
    round_index: int
    ref: BlobRef
    digests: list[bytes]
    buffers: tuple[str, ...]
    meta: dict[str, Any]

    def verify(self) -> None:
        """Raise ConfigError unless the state's bytes are the ones that were written. Reads every byte."""
        with (self.path / _STATE).open("rb", buffering=0) as file:
            start, stop = self._span(read_header(file.fileno())[0])
            chunks = _Chunks(self.ref.chunk_bytes)
            for slab in slabs(file.fileno(), start, stop):
                chunks.feed(slab)
        self._expect(chunks)

    def load(self) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """θ and the buffers in fresh memory, checked as they are read. Raises ConfigError if they are damaged."""
        chunks = _Chunks(self.ref.chunk_bytes)
        arrays: dict[str, NDArray[np.float32]] = {}
        with (self.path / _STATE).open("rb", buffering=0) as file:
            places = read_header(file.fileno())[0]
            self._span(places)
            for name, place in places.items():
                arrays[name] = np.empty(place.shape, np.float32)
                view = arrays[name].view(np.uint8).data
                read_into(file.fileno(), place, view)
                chunks.feed(view)
        self._expect(chunks)
        return arrays.pop(_THETA), arrays

    def _span(self, places: Mapping[str, Stored]) -> tuple[int, int]:
        """Where the state stream lies in the file."""
        ends = list(places.values())
        joined = all(one.stop == two.start for one, two in pairwise(ends))
        if tuple(places) != (_THETA, *self.buffers) or not joined or ends[-1].stop - ends[0].start != self.ref.size:
            raise ConfigError(f"{self.path.name}: tensors that do not fit its manifest: {', '.join(places)}")
        return ends[0].start, ends[-1].stop

    def _expect(self, chunks: _Chunks) -> None:
        if chunks.end() != self.digests:
            raise ConfigError(f"{self.path.name}: the state is damaged")


class SnapshotSource:
    """A snapshot's state stream as a blob. Keeps its file open: it outlives the snapshot's directory."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.ref = snapshot.ref
        self.digests = snapshot.digests
        self._handle = os.open(snapshot.path / _STATE, os.O_RDONLY | os.O_CLOEXEC)
        self._start = snapshot._span(read_header(self._handle)[0])[0]

    def read_chunk(self, index: int) -> bytes:
        """One chunk, not checked again: whoever receives it does."""
        start, stop = self.ref.span(index)
        return read_at(self._handle, stop - start, self._start + start)

    def close(self) -> None:
        """Let go of the file; closing twice is fine."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.close()


class Snapshots:
    """The snapshots of one run. `problems` says, for people, which were found damaged, and how."""

    def __init__(self, directory: Path) -> None:
        self._directory = make_directory(directory)
        self._sound: set[int] = set()
        self._lock = threading.Lock()
        self.problems: list[str] = []
        for path in directory.glob("round-*.*"):  # unfinished, outlived, or damaged before the last restart
            shutil.rmtree(path, ignore_errors=True)

    def write(
        self, round_index: int, theta: Any, buffers: Mapping[str, Any], meta: Mapping[str, Any] | None = None
    ) -> Snapshot:
        """Write the state after a round; on the disk when this returns. fp32 vectors (numpy, torch on the CPU).

        `meta` must have a canonical form. Older snapshots go when KEEP newer ones are sound and on the disk.
        """
        entries = [float_vector(_THETA, theta), *(float_vector(name, buffer) for name, buffer in buffers.items())]
        if len(buffers) >= limits.STATE_BUFFERS_MAX:
            raise LocalError(f"{len(entries)} vectors in a snapshot; {limits.STATE_BUFFERS_MAX} are allowed")
        size = sum(entry.size for entry in entries)
        chunks = _Chunks(choose_chunk_bytes(size))
        path = self._directory / f"round-{round_index:06d}"
        temporary = path.with_suffix(".tmp")
        with room(self._directory):
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir()
                with replacing(temporary / _STATE) as handle:
                    write_tensors(handle, entries, {"round": str(round_index)}, chunks.feed)
                digests = chunks.end()
                ref = BlobRef(blob_digest(size, choose_chunk_bytes(size), digests), size, choose_chunk_bytes(size))
                snapshot = Snapshot(path, round_index, ref, digests, tuple(buffers), dict(meta or {}))
                replace_file(temporary / _MANIFEST, _manifest(snapshot))
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            with self._lock:
                self._enter(temporary, snapshot)
        return snapshot

    def _enter(self, temporary: Path, snapshot: Snapshot) -> None:
        if snapshot.path.exists():
            _discard(snapshot.path, ".old")
        os.replace(temporary, snapshot.path)
        sync_directory(self._directory)
        self._sound.add(snapshot.round_index)
        sound = [old for old in reversed(self._listed()) if self._is_sound(old)]
        for old in sound[KEEP:]:
            self._sound.discard(old.round_index)
            _discard(old.path, ".old")

    def latest(self) -> Snapshot | None:
        """The newest sound snapshot. Each is verified once; a damaged one is set aside and noted in `problems`."""
        with self._lock:
            return next((snapshot for snapshot in reversed(self._listed()) if self._is_sound(snapshot)), None)

    def at(self, round_index: int) -> Snapshot | None:
        """The snapshot after that round, if it is here and sound."""
        with self._lock:
            found = (one for one in self._listed() if one.round_index == round_index)
            return next((one for one in found if self._is_sound(one)), None)

    def rounds(self) -> list[int]:
        """The rounds there are snapshots of, rising."""
        with self._lock:
            return [snapshot.round_index for snapshot in self._listed()]

    def source(self, round_index: int) -> SnapshotSource | None:
        """The state stream of a snapshot, to serve from."""
        with self._lock:
            found = [snapshot for snapshot in self._listed() if snapshot.round_index == round_index]
            return SnapshotSource(found[0]) if found and self._is_sound(found[0]) else None

    def _listed(self) -> list[Snapshot]:
        paths = sorted(path for path in self._directory.glob("round-*") if not path.suffix)
        found = [(path, _read_manifest(path)) for path in paths]
        for path, snapshot in found:
            if snapshot is None:
                self._set_aside(path, f"{path.name}: its manifest is damaged")
        return sorted((one for _, one in found if one is not None), key=lambda one: one.round_index)

    def _is_sound(self, snapshot: Snapshot) -> bool:
        if snapshot.round_index in self._sound:
            return True
        try:
            snapshot.verify()
        except (ConfigError, OSError) as error:
            self._set_aside(snapshot.path, f"{snapshot.path.name}: {error}")
            return False
        self._sound.add(snapshot.round_index)
        return True

    def _set_aside(self, path: Path, problem: str) -> None:
        self.problems.append(problem)
        aside = path.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)


def _discard(path: Path, ending: str) -> None:
    """Rename first: a directory that is half removed must not look like a snapshot."""
    doomed = path.with_suffix(ending)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _manifest(snapshot: Snapshot) -> bytes:
    body = {
        "buffers": list(snapshot.buffers),
        "chunk_bytes": snapshot.ref.chunk_bytes,
        "chunks": b"".join(snapshot.digests).hex(),
        "digest": snapshot.ref.digest.hex(),
        "meta": snapshot.meta,
        "round": snapshot.round_index,
        "size": snapshot.ref.size,
    }
    return encode_canonical({"sha256": hashlib.sha256(encode_canonical(body)).hexdigest(), "snapshot": body})


def _read_manifest(path: Path) -> Snapshot | None:
    try:
        value = decode_canonical((path / _MANIFEST).read_bytes(), bytes_max=_MANIFEST_BYTES_MAX)
        body = value["snapshot"]
        if hashlib.sha256(encode_canonical(body)).hexdigest() != value["sha256"]:
            return None
        ref = BlobRef(bytes.fromhex(body["digest"]), body["size"], body["chunk_bytes"])
        listed = bytes.fromhex(body["chunks"])
        digests = [listed[at : at + DIGEST_BYTES] for at in range(0, len(listed), DIGEST_BYTES)]
        return Snapshot(path, body["round"], ref, digests, tuple(body["buffers"]), body["meta"])
    except (OSError, PeerError, KeyError, TypeError, ValueError):
        return None
