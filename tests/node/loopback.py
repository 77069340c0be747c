"""Nodes with real gRPC on loopback, and a service that does what its test says."""

import asyncio
from dataclasses import replace

from farflung.node.blobs import BlobExchange, MemoryBlobs
from farflung.node.runtime import Holding, SystemClock
from farflung.node.transport.addresses import split_address
from farflung.node.transport.grpc import GrpcTransport
from farflung.protocol.blob import BlobRef
from farflung.protocol.identity import Identity
from farflung.protocol.record import PeerRecord

RUN = b"r" * 32
QUICK = 5.0


class Echo:
    """A service that does what its test says; by default it accepts everything."""

    def __init__(self) -> None:
        self.envelopes: list[bytes] = []
        self.known: list[bytes] = []
        self.answer = self.accept
        self.exchange: BlobExchange | None = None
        self.closed = asyncio.Event()

    async def accept(self) -> None:
        pass

    async def on_envelope(self, envelope):
        self.envelopes.append(envelope)
        await self.answer()

    async def on_records(self, run_id, records):
        return [*self.known, *records]

    async def on_genesis(self, run_id):
        return b"genesis"

    async def on_chain(self, run_id, from_round):
        return [b"certificate"] * 40, from_round + 40

    async def on_snapshot(self, run_id):
        return 7, BlobRef(b"d" * 32, 100, 1 << 14)

    async def on_watch(self, run_id):
        try:
            yield [Holding(b"d" * 32, False, (1, 2, 300)), Holding(b"e" * 32, True, ())]
            await asyncio.Event().wait()
        finally:
            self.closed.set()

    async def on_fetch(self, run_id, digest, chunks):
        async for item in self.exchange.on_fetch(run_id, digest, chunks):
            yield item


class Node:
    """A transport, its service and its record."""

    def __init__(self, seed: int = 1, **settings) -> None:
        self.identity, self.service = Identity(bytes([seed]) * 32), Echo()
        self.transport = GrpcTransport(RUN, **({"listen": "127.0.0.1:0"} | settings))
        self.sink = MemoryBlobs()
        self.exchange = BlobExchange(self.transport, SystemClock(), self.identity.peer_id, self.sink.partial)
        self.service.exchange = self.exchange

    async def __aenter__(self):
        self.addresses = await self.transport.start(self.service)
        self.record = self.make_record()
        self.service.known = [self.record.encode()]
        return self

    async def __aexit__(self, *_):
        await self.exchange.stop()
        await self.transport.stop()

    def make_record(self, issued_ms: int = 1, **changes) -> PeerRecord:
        key, certificate = self.identity.public_key, self.transport.certificate_der
        record = PeerRecord(RUN, key, self.addresses, certificate, issued_ms, lease_ms=1 << 50)
        return replace(record, **changes).signed(self.identity)

    @property
    def port(self) -> int:
        return split_address(self.addresses[0])[1]
