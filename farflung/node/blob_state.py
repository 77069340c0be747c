"""What a member knows of its peers and of the blobs that are arriving. `blob_plan.py` decides with it.

Sets of chunks are integers used as bit masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from farflung.node.stripes import stripe_owners
from farflung.protocol.blob import BlobRef
from farflung.protocol.identity import PeerId
from farflung.protocol.record import PeerRecord

CHUNKS_PER_CALL_MAX = 16
"""What one call may ask for, when chunks arrive quickly; more could not be moved to another peer that gets faster."""

CALL_S_MIN, CALL_S_MAX = 0.05, 1.0
"""A call asks for about what arrives in two round trips, within these."""

PATIENCE_S_MIN, PATIENCE_S_MAX = 0.25, 30.0
"""A download or call is stalled after four times its usual interval, within these."""

FIRST_PATIENCE_S_MIN, FIRST_PATIENCE_S_MAX = 0.5, 10.0
FIRST_BYTES_PER_S = 125_000
"""The same, before anything is known of an origin's speed: as long as all its chunks in flight take at 1 Mbit/s. A
member that has just come back does not fetch its stripe yet, and small payloads must not wait for it."""

ALL = -1


def bits(mask: int) -> list[int]:
    """Indices of the bits set, rising."""
    if 8 * mask.bit_count() > mask.bit_length():
        return [index for index, bit in enumerate(reversed(f"{mask:b}")) if bit == "1"]
    indices = []
    while mask:  # few bits: take them off one by one
        lowest = mask & -mask
        indices.append(lowest.bit_length() - 1)
        mask ^= lowest
    return indices


def mask_of(indices: Iterable[int], size: int) -> int:
    """The inverse of `bits`, for indices below `size`; others are dropped."""
    row = bytearray(-(-size // 8))
    for index in indices:
        if 0 <= index < size:
            row[index >> 3] |= 1 << (index & 7)
    return int.from_bytes(row, "little")


@dataclass(eq=False, slots=True)
class Call:
    """One request in flight: chunks of one blob from one peer."""

    peer: PeerId
    download: Download
    left: int
    """Chunks still to come."""
    asked: tuple[int, ...]
    started_s: float
    last_s: float
    """When it last moved."""


@dataclass(eq=False, slots=True)
class Peer:
    """What is known of one peer."""

    record: PeerRecord
    holds: dict[bytes, int] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    wanted: bool = True
    """Whether it is a member now."""
    down: bool = False
    """Whether it could not be watched; not known at first."""
    cool_until_s: float = 0.0
    faults: int = 0
    latency_s: float = CALL_S_MAX
    _bytes: float = 0.0
    _seconds: float = 0.0
    _moved_s: float = 0.0

    def moved(self, call: Call, size: int, now_s: float) -> None:
        """A chunk arrived from it."""
        if call.last_s == call.started_s:
            self.latency_s = min(self.latency_s, now_s - call.started_s)
        since_s = max(self._moved_s, min(item.started_s for item in self.calls))
        self._bytes, self._seconds = 0.9 * self._bytes + size, 0.9 * self._seconds + now_s - since_s
        self._moved_s = call.last_s = now_s
        self.faults = 0

    def chunk_s(self, size: int) -> float | None:
        """Seconds that `size` bytes from it take lately, or None before anything came."""
        return size * self._seconds / self._bytes if self._bytes else None

    def chunks_per_call(self, size: int) -> int:
        """How many chunks to ask for at once."""
        chunk_s = self.chunk_s(size)
        if chunk_s is None:
            return 1
        call_s = min(max(2 * self.latency_s, CALL_S_MIN), CALL_S_MAX)
        return max(1, min(CHUNKS_PER_CALL_MAX, int(call_s / max(chunk_s, 1e-9))))


class Download:
    """One blob that is arriving."""

    def __init__(self, ref: BlobRef, origin: PeerId | None, have: Iterable[int], salt: int, now_s: float) -> None:
        self.ref, self.origin, self.salt = ref, origin, salt
        self.full = (1 << ref.chunks) - 1
        self.missing = self.full & ~mask_of(have, ref.chunks)
        self.copies: dict[int, int] = {}
        """Chunks in flight, and in how many calls."""
        self.in_flight = 0
        self.relays = [0] * ref.chunks
        """How many peers other than the origin hold each chunk."""
        self.calls: list[Call] = []
        """Those under way."""
        self.refused: dict[PeerId, float] = {}
        """Peers not to be asked for this blob until then; liars for ever."""
        self.owners: list[PeerId] = []
        self.stripes: dict[PeerId, int] = {}
        self._members: tuple[tuple[PeerId, float], ...] = ()
        self.moved_s = now_s
        """When something last happened to it: a chunk arrived, here or fresh elsewhere."""
        self._fresh_s, self._gap_s, self._longest_gap_s = now_s, 0.0, 0.0

    def share_out(self, members: Sequence[PeerId], weights: Mapping[PeerId, float]) -> None:
        """Compute the stripes again if members or weights changed."""
        key = tuple((peer, weights[peer]) for peer in members if peer != self.origin)
        if self.origin is None or key == self._members or not key:
            return
        self._members = key
        turn = int.from_bytes(self.ref.digest[:4], "big")
        self.owners = stripe_owners([peer for peer, _ in key], weights, self.ref.chunks, turn)
        listed: dict[PeerId, list[int]] = {}
        for index, owner in enumerate(self.owners):
            listed.setdefault(owner, []).append(index)
        self.stripes = {owner: mask_of(indices, self.ref.chunks) for owner, indices in listed.items()}

    @property
    def sharing(self) -> tuple[PeerId, ...]:
        """Everybody among whom the chunks are shared out, also those whose share of a small blob is none."""
        return tuple(peer for peer, _ in self._members)

    def fresh(self, now_s: float) -> None:
        """A chunk that only the origin held is somewhere else now."""
        gap_s, self._fresh_s, self.moved_s = now_s - self._fresh_s, now_s, now_s
        self._gap_s = gap_s if not self._gap_s else 0.8 * self._gap_s + 0.2 * gap_s
        self._longest_gap_s = max(gap_s, 0.9 * self._longest_gap_s)

    @property
    def first_patience_s(self) -> float:
        """Patience before any chunk has come."""
        in_flight = max(1, len(self.stripes)) * min(self.ref.chunk_bytes, self.ref.size)
        return min(max(in_flight / FIRST_BYTES_PER_S, FIRST_PATIENCE_S_MIN), FIRST_PATIENCE_S_MAX)

    @property
    def patience_s(self) -> float:
        """After this long without a fresh chunk the origin is idle, or somebody does not fetch its stripe."""
        if not self._longest_gap_s:
            return self.first_patience_s
        return min(max(4 * self._gap_s, 1.5 * self._longest_gap_s, PATIENCE_S_MIN), PATIENCE_S_MAX)

    def stalled(self, now_s: float) -> int:
        """How many times patience has run out: after once the next in line steps in, after twice everybody."""
        return int((now_s - self._fresh_s) / self.patience_s + 1e-9)

    def idle(self, now_s: float) -> int:
        """The same, counted from the last chunk that came here: relays are not getting anywhere."""
        return int((now_s - self.moved_s) / self.patience_s + 1e-9)

    def wake_s(self, now_s: float) -> list[float]:
        """When `stalled` and `idle` next grow."""
        patience_s = self.patience_s
        since = (self._fresh_s, self.moved_s)
        return [at_s + (int((now_s - at_s) / patience_s + 1e-9) + 1) * patience_s for at_s in since]
