"""What a node sees of the world. Two worlds exist: the real one (asyncio, grpc.aio, the DHT) and the simulator's.

There is no `if simulated` anywhere in the node: it is given one of each of these.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol

from farflung.protocol.blob import BlobRef
from farflung.protocol.record import PeerRecord


class Clock(Protocol):
    """Where the time comes from."""

    def now_s(self) -> float:
        """Monotonic seconds: for waits and durations."""

    def unix_ms(self) -> int:
        """Milliseconds since 1970: for leases and logs only, never for the protocol's order."""


class SystemClock:
    """The machine's clocks."""

    def now_s(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def unix_ms(self) -> int:
        """Milliseconds since 1970."""
        return time.time_ns() // 1_000_000


class Holding(NamedTuple):
    """News of which chunks of a blob a member holds: all of them, or these in addition."""

    digest: bytes
    all: bool
    chunks: tuple[int, ...]


class Service(Protocol):
    """What a node answers to its peers. The transport calls it; every method may raise PeerError to refuse.

    Arguments come unchecked from the network except for their sizes.
    """

    async def on_envelope(self, envelope: bytes) -> None:
        """A signed control message."""

    async def on_records(self, run_id: bytes, records: Sequence[bytes]) -> Sequence[bytes]:
        """A caller's peer records; answers with those known here (own first)."""

    async def on_genesis(self, run_id: bytes) -> bytes:
        """Canonical genesis bytes."""

    async def on_chain(self, run_id: bytes, from_round: int) -> tuple[Sequence[bytes], int]:
        """Consecutive canonical certificates from a round on (at most limits.CHAIN_ANSWER_MAX), and the tip's round."""

    async def on_snapshot(self, run_id: bytes) -> tuple[int, BlobRef]:
        """The newest state on disk: the round it follows, and the blob."""

    def on_watch(self, run_id: bytes) -> AsyncIterator[Sequence[Holding]]:
        """Which blobs this node holds: everything at first, then news as it happens."""

    def on_fetch(self, run_id: bytes, digest: bytes, chunks: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """Chunks of a blob (index, bytes), or its digest list as (DIGEST_LIST, bytes) when `chunks` is empty."""


DIGEST_LIST = 0xFFFFFFFF
"""The index under which a blob's list of chunk digests travels."""


class Transport(Protocol):
    """How a node calls its peers. Every call ends by its deadline.

    Calls raise PeerError when the peer refuses or answers nonsense, and TimeoutError or ConnectionError when it
    cannot be reached in time. A call reuses one connection per peer for control and another for bulk.
    """

    async def start(self, service: Service) -> tuple[str, ...]:
        """Listen; returns the addresses ("host:port") to announce. Raises ConfigError if the port is taken."""

    async def stop(self) -> None:
        """Close everything: listeners, connections, running calls."""

    @property
    def certificate_der(self) -> bytes:
        """The TLS certificate callers must pin; empty without TLS."""

    @property
    def bytes_sent(self) -> int:
        """Bytes of messages handed to the network so far (control and bulk, framing not counted)."""

    @property
    def bytes_received(self) -> int:
        """The same, inbound."""

    async def deliver(self, to: PeerRecord, envelope: bytes, *, deadline_s: float) -> None:
        """Hand over one signed control message; returns when the peer accepted it."""

    async def records(self, to: PeerRecord, records: Sequence[bytes], *, deadline_s: float) -> list[bytes]:
        """Exchange peer records."""

    async def genesis(self, to: PeerRecord, *, deadline_s: float) -> bytes:
        """The run's genesis bytes."""

    async def chain(self, to: PeerRecord, from_round: int, *, deadline_s: float) -> tuple[list[bytes], int]:
        """Certificates from a round on, and the peer's tip."""

    async def snapshot(self, to: PeerRecord, *, deadline_s: float) -> tuple[int, BlobRef]:
        """The peer's newest snapshot."""

    def watch(self, to: PeerRecord) -> AsyncIterator[list[Holding]]:
        """What the peer holds, as it changes, until the connection breaks (ConnectionError) or the caller stops."""

    def fetch(
        self, to: PeerRecord, ref: BlobRef, chunks: Sequence[int], *, idle_s: float
    ) -> AsyncIterator[tuple[int, bytes]]:
        """Chunks in the order asked (or the digest list, for none). TimeoutError if nothing comes for `idle_s`."""

    async def introduce(self, address: str, run_id: bytes, *, deadline_s: float) -> list[bytes]:
        """Ask an address nobody vouched for yet for its records: its own (first) and those it knows.

        The connection is accepted only if the first record's signature covers the certificate it presented.
        """


class Directory(Protocol):
    """How members find each other's records."""

    async def start(self) -> tuple[str, ...]:
        """Begin; returns the addresses that go into an invite. Raises ConfigError if no bootstrap address answers."""

    async def stop(self) -> None:
        """Leave quietly: no traceback, no orphan process."""

    async def publish(self, record: PeerRecord, *, deadline_s: float) -> None:
        """Make a signed record findable until its lease ends."""

    async def lookup(self, *, deadline_s: float) -> list[PeerRecord]:
        """Every live record of the run that could be found; signatures checked, later records win."""
