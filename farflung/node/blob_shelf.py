"""The giving half of blob exchange: what is here, told to all watchers and read to whoever asks.

Chunks are relayed as soon as they have arrived and been checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from farflung.node.blob_sources import BlobSource, PartialBlob
from farflung.node.meter import Meter
from farflung.node.runtime import DIGEST_LIST, Clock, Holding
from farflung.protocol import limits
from farflung.protocol.blob import BlobRef
from farflung.protocol.errors import PeerError

NEWS_EVERY_S = 0.02
"""Watchers hear of the first new chunk at once, of the next ones together after this time."""

WATCHERS_MAX = 2 * limits.MEMBERS_MAX
"""Members and as many strangers; each costs a queue of news."""

_CHUNKS_PER_NEWS = 200_000
_HOLDINGS_PER_NEWS = 20_000
"""News fit limits.BULK_MESSAGE_BYTES_MAX: at most 4 bytes per chunk and 40 per holding."""


@dataclass(slots=True)
class _Item:
    ref: BlobRef
    digests: Sequence[bytes]
    blob: BlobSource | PartialBlob
    have: set[int] | None  # None: all
    finishing: asyncio.Event = field(default_factory=asyncio.Event)  # cleared while `finish` moves the file

    def __post_init__(self) -> None:
        self.finishing.set()

    def holding(self) -> Holding:
        return Holding(self.ref.digest, self.have is None, () if self.have is None else tuple(sorted(self.have)))


@dataclass(slots=True, eq=False)
class _Watcher:
    whole: set[bytes] = field(default_factory=set)
    chunks: dict[bytes, list[int]] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self) -> list[Holding]:
        listed = [Holding(digest, True, ()) for digest in sorted(self.whole)]
        listed += [Holding(digest, False, tuple(indices)) for digest, indices in self.chunks.items()]
        self.whole, self.chunks = set(), {}
        self.news.clear()
        return listed


class Shelf:
    """The blobs here, by digest."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._items: dict[bytes, _Item] = {}
        self._watchers: dict[_Watcher, None] = {}
        self._stopped = False
        self.sending = Meter()
        """How fast chunks leave."""

    def offer(self, source: BlobSource, *, tell: bool = True) -> None:
        """Serve a whole blob from now on; a partial one of that digest is replaced. `tell`: watchers hear of it."""
        digest, known = source.ref.digest, self._items.get(source.ref.digest)
        self._items[digest] = _Item(source.ref, source.digests, source, None)
        if known is not None:
            known.finishing.set()
        if tell and (known is None or known.have is not None):
            for watcher in self._watchers:
                watcher.whole.add(digest)
                watcher.chunks.pop(digest, None)
                watcher.news.set()

    def begin(self, ref: BlobRef, digests: Sequence[bytes], partial: PartialBlob) -> None:
        """Relay what has arrived of a blob."""
        have = partial.have()
        self._items[ref.digest] = _Item(ref, digests, partial, have)
        self._tell(ref.digest, sorted(have))

    def arrived(self, digest: bytes, index: int) -> None:
        """One more chunk of a partial blob is here."""
        item = self._items.get(digest)
        if item is not None and item.have is not None and index not in item.have:
            item.have.add(index)
            self._tell(digest, [index])

    def hold(self, digest: bytes) -> None:
        """Readers wait from now on: `finish` is at work. `offer` or `release` ends it."""
        if digest in self._items:
            self._items[digest].finishing.clear()

    def release(self, digest: bytes, partial: PartialBlob) -> None:
        """The download of a partial blob has ended; nothing happens if it is whole."""
        item = self._items.get(digest)
        if item is not None and item.blob is partial:
            del self._items[digest]
            item.finishing.set()

    def forget(self, digest: bytes) -> None:
        """Serve a blob no longer. Watchers are not told: a refusal tells who asks."""
        item = self._items.pop(digest, None)
        if item is not None:
            item.finishing.set()

    def get(self, digest: bytes) -> BlobSource | None:
        """A whole blob that is served here."""
        item = self._items.get(digest)
        return item.blob if item is not None and item.have is None else None  # type: ignore[return-value]

    def _tell(self, digest: bytes, indices: list[int]) -> None:
        for watcher in self._watchers if indices else ():
            watcher.chunks.setdefault(digest, []).extend(indices)
            watcher.news.set()

    def stop(self) -> None:
        """End all watches."""
        self._stopped = True
        for watcher in self._watchers:
            watcher.news.set()

    async def watch(self) -> AsyncIterator[list[Holding]]:
        """What is here (one message at least, even if empty), then news."""
        if len(self._watchers) >= WATCHERS_MAX:
            raise PeerError("?", f"{WATCHERS_MAX} peers watch already")
        watcher = _Watcher()
        self._watchers[watcher] = None
        try:
            for part in _portions([item.holding() for item in self._items.values()]) or [[]]:
                yield part
            while not self._stopped:
                told_s = self._clock.now_s()
                await watcher.news.wait()
                early_s = told_s + NEWS_EVERY_S - self._clock.now_s()
                if early_s > 0:
                    await asyncio.sleep(early_s)
                for part in _portions(watcher.take()):
                    yield part
        finally:
            self._watchers.pop(watcher, None)

    async def read(self, digest: bytes, chunks: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """Chunks (indices strictly increasing), or the digest list for none. Raises PeerError for what is not here."""
        item = self._items.get(digest)
        if item is None:
            raise PeerError("?", f"blob {digest[:4].hex()} is not here")
        if any(a >= b for a, b in pairwise(chunks)) or (chunks and chunks[-1] >= item.ref.chunks):
            raise PeerError("?", f"chunks of blob {item.ref.short} out of order or range")
        if not chunks:
            yield DIGEST_LIST, b"".join(item.digests)
        for index in chunks:
            data = await self._read_chunk(digest, index)
            self.sending.begin(self._clock.now_s())
            try:
                yield index, data  # comes back when the line has room for the next one
                self.sending.moved(len(data))
            finally:
                self.sending.end(self._clock.now_s())

    async def _read_chunk(self, digest: bytes, index: int) -> bytes:
        item = self._items.get(digest)
        if item is not None and not item.finishing.is_set():
            await item.finishing.wait()
            item = self._items.get(digest)
        if item is None or (item.have is not None and index not in item.have):
            raise PeerError("?", f"chunk {index} of blob {digest[:4].hex()} is not here")
        try:
            return item.blob.read_chunk(index)
        except FileNotFoundError:  # dropped from disk before it was forgotten here
            raise PeerError("?", f"blob {digest[:4].hex()} is not here any more") from None


def _portions(holdings: list[Holding]) -> list[list[Holding]]:
    """Cut so that each portion fits one message; a long list of chunks becomes several holdings."""
    portions: list[list[Holding]] = []
    room_chunks = room_holdings = 0
    for whole in holdings:
        starts = range(0, len(whole.chunks), _CHUNKS_PER_NEWS) if whole.chunks else range(1)
        for start in starts:
            holding = whole._replace(chunks=whole.chunks[start : start + _CHUNKS_PER_NEWS])
            if room_holdings < 1 or room_chunks < len(holding.chunks):
                portions.append([])
                room_chunks, room_holdings = _CHUNKS_PER_NEWS, _HOLDINGS_PER_NEWS
            portions[-1].append(holding)
            room_chunks, room_holdings = room_chunks - len(holding.chunks), room_holdings - 1
    return portions
