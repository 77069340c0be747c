"""Peers with slow uplinks in virtual time: hours of transfer take a second, and every run is the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from farflung.node.blobs import BlobExchange, MemoryBlobs
from farflung.node.runtime import DIGEST_LIST
from farflung.protocol.identity import PeerId
from farflung.protocol.record import PeerRecord

RUN = b"run" * 10
NEVER = 1e6  # seconds; the loop resolves nanoseconds up to here


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time stands still while anything can run, and jumps to the next timer when nothing can."""

    virtual_s = 0.0

    def time(self) -> float:
        return self.virtual_s

    def _run_once(self) -> None:
        if not self._ready and not self._stopping:
            assert self._scheduled, "everybody waits for nothing"
            self.virtual_s = max(self.virtual_s, self._scheduled[0]._when)
        super()._run_once()


def run_virtual(main: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class LoopClock:
    """The running loop's time."""

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def unix_ms(self) -> int:
        return int(self.now_s() * 1000)


async def inline(work: Callable[[], Any]) -> Any:
    """No threads in virtual time."""
    return work()


@dataclass(eq=False)
class Node:
    """A member: its exchange, its uplink (chunks leave one by one, streams take turns) and what it uploaded."""

    net: SlowNetwork
    record: PeerRecord
    upload_bytes_per_s: float
    exchange: BlobExchange = field(init=False)
    sink: MemoryBlobs = field(default_factory=MemoryBlobs)
    up: bool = True
    silent: bool = False
    lies: bool = False
    sent: dict[bytes, int] = field(default_factory=dict)
    asked: list[tuple[PeerId, bytes, tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.uplink = asyncio.Lock()
        self.streams: set[asyncio.Task[Any]] = set()
        self.exchange = BlobExchange(self, LoopClock(), self.id, self.sink.partial, rng_seed=7, in_thread=inline)

    @property
    def id(self) -> PeerId:
        return self.record.peer_id

    def crash(self) -> None:
        self.up = False
        for task in list(self.streams):
            task.cancel("crashed")

    # -- runtime.Transport, as far as blobs need it ------------------------------------------------------------------

    async def watch(self, to: PeerRecord):
        node = self.net.nodes[to.peer_id]
        async for holdings in self._guarded(node, node.exchange.on_watch(RUN)):
            await asyncio.sleep(self.net.latency_s)
            yield holdings

    async def fetch(self, to: PeerRecord, ref, chunks, *, idle_s: float):
        node = self.net.nodes[to.peer_id]
        node.asked.append((self.id, ref.digest, tuple(chunks)))
        answer = self._guarded(node, node.exchange.on_fetch(RUN, ref.digest, chunks))
        try:
            await asyncio.sleep(self.net.latency_s)
            while True:
                async with asyncio.timeout(idle_s):
                    if node.silent:
                        await asyncio.sleep(NEVER)
                    try:
                        index, data = await anext(answer)
                    except StopAsyncIteration:
                        return
                    await node.upload(ref.digest, len(data))
                    if not node.up:
                        raise ConnectionError("crashed")
                yield index, data[:-1] + b"!" if node.lies and index != DIGEST_LIST else data
        finally:
            await answer.aclose()

    async def upload(self, digest: bytes, size: int) -> None:
        async with self.uplink:
            await asyncio.sleep(size / self.upload_bytes_per_s)
        self.sent[digest] = self.sent.get(digest, 0) + size

    async def _guarded(self, node: Node, stream):
        """A stream that breaks when the node at its other end does."""
        reader = asyncio.current_task()
        try:
            while True:
                if not node.up or not self.up:
                    raise ConnectionError("not there")
                step = asyncio.ensure_future(anext(stream))
                node.streams.add(step)
                try:
                    item = await step
                except StopAsyncIteration:
                    return
                except asyncio.CancelledError:
                    if reader is not None and reader.cancelling():
                        step.cancel()
                        await asyncio.wait([step])
                        raise
                    raise ConnectionError("crashed") from None
                finally:
                    node.streams.discard(step)
                yield item
        finally:
            await stream.aclose()


class SlowNetwork:
    """Members that all know each other."""

    def __init__(self, rates: list[float], *, latency_s: float = 0.02, hints: bool = False) -> None:
        self.latency_s = latency_s
        made = []
        for index, rate in enumerate(rates):
            hint = int(rate) if hints else 0
            key = bytes([index]) * 32
            record = PeerRecord(RUN, key, (f"host:{index + 1}",), b"", 0, 1 << 40, upload_bytes_per_s=hint)
            made.append(Node(self, record, rate))
        self.all = made
        self.nodes = {node.id: node for node in made}

    def records(self) -> list[PeerRecord]:
        return [node.record for node in self.all]

    def fetch(self, node: Node, ref, origin: Node | None, **kwargs):
        return node.exchange.fetch(ref, origin.id if origin else None, self.records, **kwargs)

    async def stop(self) -> None:
        for node in self.all:
            await node.exchange.stop()
