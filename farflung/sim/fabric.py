"""Bytes between machines in virtual time: bulk shares the lines (`network/`), small messages only wait for them.

A `Pipe` is one direction of one TCP connection: what is put in comes out in order. Bulk messages of one pipe go one
after the other, each as a flow; different pipes share links max-min fairly. Small messages are not flows: they take
latency, their own bytes, and on a `fifo` uplink the queue that bulk has built up there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from farflung.sim.eventlog import EventLog
from farflung.sim.loop import NS, VirtualLoop
from farflung.sim.network.fluid import FluidNetwork
from farflung.sim.network.topology import Topology

SMALL_BYTES = 4096
"""Messages up to this are not flows. At 1 Mbit/s they take 33 ms."""

PACKET_BYTES = 66 + 9
"""What a small message costs beyond its own bytes: Ethernet, IP, TCP with timestamps, and HTTP/2's frame head."""

KEEPALIVE_S = 40.0
"""A connection over which nothing comes through for this long is given up (`links.KEEPALIVE_MS` and its timeout)."""


@dataclass(slots=True, eq=False)
class Parcel:
    """A message on its way. `sent`: its last byte has left the sender; `arrived`: it is there."""

    size: int
    what: str
    arrived: Callable[[], None]
    sent: Callable[[], None] | None = None
    left: float = 0.0


@dataclass(eq=False)
class Pipe:
    """One direction of one connection. `broken` pipes deliver nothing any more."""

    source: int
    target: int
    waiting: deque[Parcel] = field(default_factory=deque)
    moving: Parcel | None = None
    flow: int = -1
    last_ns: int = 0
    """When the latest message arrives: none overtakes it."""

    flying: deque[tuple[asyncio.TimerHandle, Parcel]] = field(default_factory=deque)
    """What has left the sender, in order."""

    held: list[Parcel] = field(default_factory=list)
    """What could not come through a partition; sent again when it heals."""

    broken: bool = False


class Fabric:
    """All pipes, and the one timer that moves their bytes."""

    def __init__(self, loop: VirtualLoop, topology: Topology, log: EventLog) -> None:
        self.loop, self.topology, self.log = loop, topology, log
        self.network = FluidNetwork(topology)
        self._pipes: dict[int, Pipe] = {}
        """By flow."""

        self._timer: asyncio.TimerHandle | None = None
        self._settling = False
        self._up = [node.up_bytes_per_s for node in topology.nodes]
        self._uploads = [0] * len(topology.nodes)
        """Bulk flows that leave a machine now."""

        self.small_sent = [0] * len(topology.nodes)
        self.small_received = [0] * len(topology.nodes)
        self._cuts: dict[int, frozenset[int]] = {}
        self._blocked: dict[int, Pipe] = {}
        self.transfers = 0
        """Flows started so far."""

    # -- sending ------------------------------------------------------------------------------------------------------

    def put(self, pipe: Pipe, parcel: Parcel) -> None:
        """Send a message after those before it."""
        if pipe.broken:
            return
        parcel.left = float(parcel.size)
        small = parcel.size <= SMALL_BYTES
        if small and pipe.moving is None and not pipe.waiting:
            self._send_small(pipe, parcel)
            return
        pipe.waiting.append(parcel)
        self._next(pipe)

    def _next(self, pipe: Pipe) -> None:
        while pipe.moving is None and pipe.waiting and not pipe.broken:
            if self.cut_between(pipe.source, pipe.target):
                self._blocked[id(pipe)] = pipe
                return
            parcel = pipe.waiting.popleft()
            if parcel.size <= SMALL_BYTES:
                self._send_small(pipe, parcel)
            else:
                self._start(pipe, parcel)

    def _start(self, pipe: Pipe, parcel: Parcel) -> None:
        pipe.moving = parcel
        pipe.flow = self.network.start(pipe.source, pipe.target, parcel.left, self.loop.now_ns)
        self._pipes[pipe.flow] = pipe
        self._uploads[pipe.source] += 1
        self.transfers += 1
        self._settle_later()

    def _send_small(self, pipe: Pipe, parcel: Parcel) -> None:
        size = parcel.size + PACKET_BYTES
        self.small_sent[pipe.source] += size
        up = self._up[pipe.source]
        own_s = size / up if up else 0.0
        wait_s = own_s + self.queue_s(pipe.source)
        if parcel.sent is not None:
            self.loop.call_soon(parcel.sent)
        self._deliver(pipe, parcel, self.loop.now_ns + int(wait_s * NS))

    def queue_s(self, node: int) -> float:
        """How long a packet waits behind bulk at a machine's uplink: on `fq` not at all, on `fifo` the whole queue."""
        links, up = self.topology.nodes[node], self._up[node]
        if links.queue != "fifo" or not self._uploads[node] or not up:
            return 0.0
        return links.buffer_bytes / up

    def _deliver(self, pipe: Pipe, parcel: Parcel, left_ns: int) -> None:
        latency_ns = int(self.topology.one_way_latency_s(pipe.source, pipe.target) * NS)
        pipe.last_ns = max(pipe.last_ns, left_ns + latency_ns)
        pipe.flying.append((self.loop.call_at_ns(pipe.last_ns, self._arrive, pipe), parcel))

    def _arrive(self, pipe: Pipe) -> None:
        if pipe.broken:
            return
        parcel = pipe.flying.popleft()[1]
        if self.cut_between(pipe.source, pipe.target) or pipe.held:
            pipe.held.append(parcel)
            self._blocked[id(pipe)] = pipe
            return
        if parcel.size <= SMALL_BYTES:
            self.small_received[pipe.target] += parcel.size + PACKET_BYTES
        self.log.message(self.loop.now_ns, pipe.source, pipe.target, parcel.what, parcel.size)
        parcel.arrived()

    # -- moving bulk --------------------------------------------------------------------------------------------------

    def _settle_later(self) -> None:
        if not self._settling:
            self._settling = True
            self.loop.before_time_moves(self._settle)

    def _settle(self) -> None:
        """All changes of this instant are made: share the links anew, and wait for whatever happens next."""
        self._settling = False
        for flow in self.network.advance(self.loop.now_ns):
            self._complete(flow)
        next_ns = self.network.next_ns()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if next_ns is not None:
            self._timer = self.loop.call_at_ns(max(next_ns, self.loop.now_ns), self._settle_later)

    def _complete(self, flow: int) -> None:
        pipe = self._pipes.pop(flow)
        parcel, pipe.moving, pipe.flow = pipe.moving, None, -1
        assert parcel is not None
        self._uploads[pipe.source] -= 1
        self._deliver(pipe, parcel, self.loop.now_ns)
        if parcel.sent is not None:
            parcel.sent()
        self._next(pipe)

    def close(self, pipe: Pipe) -> None:
        """Break a pipe: what is in it is lost."""
        if pipe.broken:
            return
        pipe.broken = True
        self._blocked.pop(id(pipe), None)
        self._halt(pipe)
        pipe.waiting.clear()
        pipe.flying.clear()
        pipe.held.clear()
        pipe.moving = None

    def _halt(self, pipe: Pipe) -> None:
        if pipe.flow >= 0 and pipe.moving is not None:
            carried = self.network.cancel(pipe.flow, self.loop.now_ns)
            pipe.moving.left = max(1.0, pipe.moving.left - carried)
            del self._pipes[pipe.flow]
            pipe.flow = -1
            self._uploads[pipe.source] -= 1
            self._settle_later()

    # -- partitions ---------------------------------------------------------------------------------------------------

    def cut_between(self, one: int, other: int) -> bool:
        """Whether a partition separates two machines now."""
        return any((one in side) != (other in side) for side in self._cuts.values())

    def cut(self, key: int, side: Sequence[int]) -> None:
        """Begin a partition between `side` and everybody else."""
        self._cuts[key] = frozenset(side)
        for pipe in [*self._pipes.values()]:
            if self.cut_between(pipe.source, pipe.target):
                self._halt(pipe)
                self._blocked[id(pipe)] = pipe
        self._settle_later()

    def heal(self, key: int) -> None:
        """End it. What waited is sent again: TCP's retransmissions."""
        self._cuts.pop(key, None)
        for pipe in [*self._blocked.values()]:
            if self.cut_between(pipe.source, pipe.target):
                continue
            del self._blocked[id(pipe)]
            self._send_again(pipe)
            if pipe.moving is not None:
                parcel, pipe.moving = pipe.moving, None
                self._start(pipe, parcel)
            else:
                self._next(pipe)

    def _send_again(self, pipe: Pipe) -> None:
        """What a partition held, and what flies behind it: TCP hands over nothing before what is missing."""
        if not pipe.held:
            return
        again, pipe.held = [*pipe.held, *(parcel for _, parcel in pipe.flying)], []
        for timer, _ in pipe.flying:
            timer.cancel()
        pipe.flying.clear()
        for parcel in again:
            self._deliver(pipe, parcel, self.loop.now_ns)

    def set_node(
        self, node: int, *, up_bytes_per_s: float | None = None, down_bytes_per_s: float | None = None
    ) -> None:
        """Change a machine's line."""
        if up_bytes_per_s is not None:
            self._up[node] = up_bytes_per_s
        self.network.set_node(node, self.loop.now_ns, up_bytes_per_s=up_bytes_per_s, down_bytes_per_s=down_bytes_per_s)
        self._settle_later()

    def wire_bytes(self, node: int) -> tuple[int, int]:
        """Bytes that crossed a machine's line so far, up and down, headers and acknowledgements included."""
        sent, received = float(self.network.sent_bytes[node]), float(self.network.received_bytes[node])
        return int(sent) + self.small_sent[node], int(received) + self.small_received[node]
