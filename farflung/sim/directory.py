"""The simulator's Directory: everybody's records in one place, a DHT's delays away."""

from __future__ import annotations

import asyncio

from farflung.node.recordbook import RecordBook
from farflung.node.runtime import Clock
from farflung.protocol.errors import TooFewPeers
from farflung.protocol.identity import PeerId
from farflung.protocol.record import PeerRecord
from farflung.sim.fabric import Fabric

STORE_S, GET_S = 0.2, 0.03
"""What the hivemind DHT took on one machine; round trips of the network come on top."""

HOPS = 3
"""Round trips of one lookup in a table of some hundred nodes."""


class Registry:
    """What the DHT holds, for all members of one world."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.records: dict[PeerId, bytes] = {}
        self.online: dict[int, None] = {}
        """Machines that take part in the DHT now."""

    def reaches(self, index: int) -> bool:
        """Whether a machine reaches anybody else of the DHT."""
        others = [other for other in self.online if other != index]
        return not others or any(not self.fabric.cut_between(index, other) for other in others)


class SimDirectory:
    """A `runtime.Directory` of one member."""

    def __init__(self, registry: Registry, index: int, book: RecordBook, clock: Clock) -> None:
        self._registry, self._index, self._book, self._clock = registry, index, book, clock

    async def start(self) -> tuple[str, ...]:
        """Take part."""
        self._registry.online[self._index] = None
        return ()

    async def stop(self) -> None:
        """Take part no longer; records stay until their lease ends."""
        self._registry.online.pop(self._index, None)

    async def publish(self, record: PeerRecord, *, deadline_s: float) -> None:
        """Make a record findable. Raises TooFewPeers in a partition without anybody else."""
        await self._walk(STORE_S)
        self._registry.records[record.peer_id] = record.encode()

    async def lookup(self, *, deadline_s: float) -> list[PeerRecord]:
        """Every live record."""
        await self._walk(GET_S)
        known = [self._registry.records[peer] for peer in sorted(self._registry.records)]
        return self._book.merge(known, self._clock.unix_ms())

    async def _walk(self, took_s: float) -> None:
        topology = self._registry.fabric.topology
        await asyncio.sleep(took_s + 2 * HOPS * topology.one_way_latency_s(self._index, self._index))
        if not self._registry.reaches(self._index):
            raise TooFewPeers("the directory does not answer")
