"""What a node answers to its peers (`runtime.Service`), from the moment it listens on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from farflung.node.blobs import BlobExchange
from farflung.node.recordbook import RecordBook
from farflung.node.runtime import Clock, Holding
from farflung.node.store import RunStore
from farflung.protocol import limits
from farflung.protocol.blob import BlobRef
from farflung.protocol.errors import PeerError
from farflung.protocol.identity import PeerId

if TYPE_CHECKING:
    from farflung.node.shell import Node


class Answers:
    """Serves records at once, what is on disk as soon as it is there, and messages once there is a `node`."""

    def __init__(self, book: RecordBook, store: RunStore, me: PeerId, clock: Clock) -> None:
        self._book, self._store, self._me, self._clock = book, store, me, clock
        self.node: Node | None = None
        self.exchange: BlobExchange | None = None

    async def on_envelope(self, envelope: bytes) -> None:
        """A signed control message."""
        if self.node is None:
            raise PeerError(self._me.short, "is still starting")
        self.node.receive(envelope)

    async def on_records(self, run_id: bytes, records: Sequence[bytes]) -> Sequence[bytes]:
        """Peer records, own first."""
        self._check(run_id)
        now_ms = self._clock.unix_ms()
        self._book.merge(records, now_ms)
        return self._book.encoded(now_ms, first=self._me)

    async def on_genesis(self, run_id: bytes) -> bytes:
        """Canonical genesis bytes."""
        self._check(run_id)
        data = self._store.genesis
        if data is None:
            raise PeerError(self._me.short, "does not know the genesis yet")
        return data

    async def on_chain(self, run_id: bytes, from_round: int) -> tuple[Sequence[bytes], int]:
        """Certificates, oldest first, within what one message holds."""
        self._check(run_id)
        chain: list[bytes] = []
        room = limits.CONTROL_BYTES_MAX
        for index in range(from_round, from_round + limits.CHAIN_ANSWER_MAX):
            data = self._store.certificate(index)
            if data is None or (chain and len(data) > room):
                break
            chain.append(data)
            room -= len(data)
        return chain, max(0, self._store.certificates.next_round - 1)

    async def on_snapshot(self, run_id: bytes) -> tuple[int, BlobRef]:
        """The newest state on disk."""
        self._check(run_id)
        snapshot = self._store.latest_snapshot()
        if snapshot is None:
            raise PeerError(self._me.short, "has no snapshot yet")
        return snapshot.round_index, snapshot.ref

    def on_watch(self, run_id: bytes) -> AsyncIterator[Sequence[Holding]]:
        """Which blobs are here."""
        return self._blobs(run_id).on_watch(run_id)

    def on_fetch(self, run_id: bytes, digest: bytes, chunks: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """Chunks of a blob."""
        return self._blobs(run_id).on_fetch(run_id, digest, chunks)

    def _blobs(self, run_id: bytes) -> BlobExchange:
        self._check(run_id)
        if self.exchange is None:
            raise PeerError(self._me.short, "is still starting")
        return self.exchange

    def _check(self, run_id: bytes) -> None:
        if run_id != self._book.run_id:
            raise PeerError("?", f"asks about another run: {run_id.hex()[:8]}")
