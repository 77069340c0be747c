"""Which samples a member trains on: disjoint shares without a coordinator, in an order that can be replayed.

A map-style dataset (`len`, integer index) is split into 4096 buckets: sample i is in bucket i mod 4096. Each bucket
belongs to the member with the highest hash of (run, member, bucket), so all members agree without talking, a newcomer
takes about 1/n of everybody's buckets, and a departure moves only the buckets of the one that left.

Inside an epoch a bucket is read in an order fixed by (run, epoch, bucket), and a member goes round its buckets in an
order fixed by (run, epoch, certificate, member). All that must be remembered is the epoch and one count per bucket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from farflung.protocol.errors import ConfigError, LocalError
from farflung.protocol.identity import PEER_ID_BYTES, PeerId

BUCKETS = 4096
"""Enough that 256 members still get 16 each, few enough that one count per bucket is 32 KB."""


class RoundView(NamedTuple):
    """What decides a member's share of the data in one round. `members` need not contain `me` before admission."""

    run_id: bytes
    round_index: int
    certificate: bytes
    me: PeerId
    members: tuple[PeerId, ...]
    trained: int = 0
    """Rounds that trained before this one."""


View = Callable[[], RoundView | None]
"""The round as it is now; None when the run is over. Called for every sample: return the same object while it lasts."""


class MapDataset(Protocol):
    """A map-style dataset. With `__getitems__(list of indices)`, whole batches are fetched by one call."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def seed_of(*parts: bytes | str | int) -> int:
    """A 128-bit seed from its parts; the same on every machine, and different for ("a", "bc") and ("ab", "c")."""
    return int.from_bytes(_hash(parts).digest(16), "little")


def generator_of(*parts: bytes | str | int) -> np.random.Generator:
    """A named, seeded stream (PCG64)."""
    return np.random.Generator(np.random.PCG64(seed_of(*parts)))


def uniform_of(count: int, *parts: bytes | str | int) -> npt.NDArray[np.float32]:
    """`count` numbers, uniform in [-0.5, 0.5) on a grid of 2^-24: the same bits on every machine and numpy version."""
    raw = np.random.PCG64(seed_of(*parts)).random_raw(count)
    return ((raw >> np.uint64(40)).astype(np.int32) - (1 << 23)).astype(np.float32) * np.float32(2.0**-24)


def owner_of_buckets(members: Sequence[PeerId], run_id: bytes) -> npt.NDArray[np.int64]:
    """For each of the 4096 buckets, the position in sorted(members) of the member it belongs to."""
    ordered = tuple(sorted(members))
    if not ordered or len(set(ordered)) != len(ordered):
        raise LocalError(f"buckets need distinct members, got {len(ordered)} with {len(set(ordered))} distinct")
    return _owners(ordered, run_id)


def buckets_of(member: PeerId, members: Sequence[PeerId], run_id: bytes) -> list[int]:
    """The member's buckets in increasing order: disjoint between members, and together all 4096.

    Raises LocalError if `member` is not among `members`, or if a member appears twice.
    """
    if member not in members:
        raise LocalError(f"no buckets for one who is not a member: {member}")
    mine = sorted(members).index(member)
    return [int(bucket) for bucket in np.flatnonzero(owner_of_buckets(members, run_id) == mine)]


def solo_view(seed: int = 0, *, me: int = 0, of: int = 1) -> View:
    """The view of member `me` of `of` made-up members that stay in one round: for baselines without a swarm."""
    members = tuple(PeerId(index.to_bytes(PEER_ID_BYTES, "big")) for index in range(of))
    view = RoundView(b"solo" + seed.to_bytes(8, "big"), 0, b"", members[me], members)
    return lambda: view


class Shard:
    """An endless iterator over this member's samples of a dataset, or batches of them; it ends when the view is None.

    Reads no sample twice in an epoch and none of another member's, unless churn moves a bucket: its new owner cannot
    know what the old one has read, so it starts afresh. Both losses are counted, as upper bounds, by the old owner.
    Raises ConfigError if the dataset has no sample for this member.
    """

    def __init__(
        self, dataset: MapDataset, view: View, *, batch: int | None = None, collate: Callable[[Any], Any] | None = None
    ) -> None:
        if batch is not None and batch < 1:
            raise ConfigError(f"a batch has at least one sample, got {batch}")
        if len(dataset) < 1:
            raise ConfigError("the dataset is empty")
        self._dataset, self._view, self._batch = dataset, view, batch
        self._collate = collate if collate is not None else _default_collate
        self._size_b = (len(dataset) - np.arange(BUCKETS, dtype=np.int64) + BUCKETS - 1) // BUCKETS
        self._read_b = np.zeros(BUCKETS, dtype=np.int64)
        self._seen: RoundView | None = None
        self._mine = np.zeros(0, dtype=np.int64)
        self._cycle, self._queue = 0, iter(())  # type: tuple[int, Iterator[int]]
        self._strides: dict[int, tuple[int, int]] = {}
        self.epoch = 0
        self.samples_read = 0
        self.samples_skipped = 0
        """Samples of buckets that moved away before we read them in this epoch."""
        self.samples_repeated = 0
        """Samples of buckets that moved away after we read them in this epoch: their new owner reads them again."""

    def __iter__(self) -> Shard:
        return self

    def __next__(self) -> Any:
        if self._batch is None:
            return self._dataset[self.next_index()]
        indices = [self.next_index() for _ in range(self._batch)]
        fetch = getattr(self._dataset, "__getitems__", None)
        return self._collate(fetch(indices) if fetch is not None else [self._dataset[index] for index in indices])

    def indices(self) -> Iterator[int]:
        """The sample numbers alone: a `sampler` for a DataLoader. What it prefetches belongs to the round before."""
        while True:
            try:
                yield self.next_index()
            except StopIteration:
                return

    def next_index(self) -> int:
        """The number of the next sample. Raises StopIteration when the view is None."""
        view = self._view()
        if view is not self._seen:
            if view is None:
                raise StopIteration
            self._enter(view)
        bucket = next(self._queue, None)
        if bucket is None:
            self._start_cycle()
            bucket = next(self._queue)
        position = int(self._read_b[bucket])
        self._read_b[bucket] += 1
        self.samples_read += 1
        stride, shift = self._stride(bucket)
        return bucket + BUCKETS * ((stride * position + shift) % int(self._size_b[bucket]))

    def state(self) -> dict[str, Any]:
        """Where we are, as JSON: survives a restart in about 12 KB."""
        return {
            "samples": len(self._dataset),
            "epoch": self.epoch,
            "read_b": self._read_b.tolist(),
            "counts": [self.samples_read, self.samples_skipped, self.samples_repeated],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. Raises LocalError if it is not of a dataset this long."""
        try:
            if state["samples"] != len(self._dataset):
                raise LocalError(f"the dataset has {len(self._dataset)} samples, the saved state {state['samples']}")
            read_b = np.asarray(state["read_b"], dtype=np.int64)
            self.epoch = int(state["epoch"])
            self.samples_read, self.samples_skipped, self.samples_repeated = map(int, state["counts"])
        except (KeyError, TypeError, ValueError) as error:
            raise LocalError(f"not the state of a shard: {error}") from None
        if read_b.shape != (BUCKETS,) or bool((read_b < 0).any() or (read_b > self._size_b).any()):
            raise LocalError("the saved state of a shard does not fit its buckets")
        self._read_b, self._seen, self._mine = read_b, None, np.zeros(0, dtype=np.int64)
        self._strides.clear()

    def _enter(self, view: RoundView) -> None:
        """Take up the buckets of a new round; an unadmitted member trains on the share it would have."""
        members = view.members if view.me in view.members else (*view.members, view.me)
        mine = np.asarray(buckets_of(view.me, members, view.run_id), dtype=np.int64)
        lost = np.setdiff1d(self._mine, mine, assume_unique=True)
        read = int(self._read_b[lost].sum())
        self.samples_repeated += read
        self.samples_skipped += int(self._size_b[lost].sum()) - read
        if self._seen is not None and self._seen.run_id != view.run_id:
            self._strides.clear()
        if not self._size_b[mine].any():
            raise ConfigError(f"{len(self._dataset)} samples are too few for {len(members)} members: none is left here")
        self._seen, self._mine = view, mine
        self._cycle, self._queue = 0, iter(())

    def _start_cycle(self) -> None:
        """Queue one sample of each bucket that has any left, in a fresh order; begin an epoch when none has."""
        assert self._seen is not None
        left = self._mine[self._read_b[self._mine] < self._size_b[self._mine]]
        if not len(left):
            self.epoch += 1
            self._read_b[:] = 0
            self._strides.clear()
            left = self._mine[self._size_b[self._mine] > 0]
        view = self._seen
        seed = (view.run_id, self.epoch, view.certificate, view.me.digest, self._cycle)
        self._cycle += 1
        order = np.random.PCG64(seed_of("cycle", *seed)).random_raw(len(left)).argsort(kind="stable")
        self._queue = iter(left[order].tolist())

    def _stride(self, bucket: int) -> tuple[int, int]:
        """(a, c) of the order a * position + c mod size in which the bucket is read in this epoch."""
        known = self._strides.get(bucket)
        if known is None:
            assert self._seen is not None
            size, seed = int(self._size_b[bucket]), seed_of("bucket", self._seen.run_id, self.epoch, bucket)
            stride, shift = 1 + (seed & 0xFFFFFFFF) % size, (seed >> 32) % size
            while gcd(stride, size) != 1:
                stride += 1
            known = self._strides[bucket] = (stride, shift)
        return known


class Sharder(NamedTuple):
    """What a task's `batches` gets: call it with a dataset for this member's share of it."""

    view: View

    def __call__(
        self, dataset: MapDataset, *, batch: int | None = None, collate: Callable[[Any], Any] | None = None
    ) -> Shard:
        """This member's samples (batch=None) or batches of `batch` samples, joined by `collate` (torch's default)."""
        return Shard(dataset, self.view, batch=batch, collate=collate)


def shard(
    dataset: MapDataset, view: View, *, batch: int | None = None, collate: Callable[[Any], Any] | None = None
) -> Shard:
    """This member's share of `dataset`: see `Shard`."""
    return Shard(dataset, view, batch=batch, collate=collate)


def _default_collate(samples: Any) -> Any:
    from torch.utils.data import default_collate

    return default_collate(samples)


def _hash(parts: tuple[bytes | str | int, ...]) -> Any:
    state = hashlib.shake_256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        state.update(b"%c%d:" % (type(part).__name__.encode()[0], len(data)))
        state.update(data)
    return state


@lru_cache(maxsize=512)
def _scores(member: PeerId, run_id: bytes) -> npt.NDArray[np.uint64]:
    return np.frombuffer(_hash(("bucket scores", run_id, member.digest)).digest(8 * BUCKETS), dtype="<u8")


@lru_cache(maxsize=8)
def _owners(ordered: tuple[PeerId, ...], run_id: bytes) -> npt.NDArray[np.int64]:
    best, owner = _scores(ordered[0], run_id).copy(), np.zeros(BUCKETS, dtype=np.int64)
    for index, member in enumerate(ordered[1:], start=1):
        score = _scores(member, run_id)
        wins = score > best
        best[wins], owner[wins] = score[wins], index
    owner.setflags(write=False)
    return owner
