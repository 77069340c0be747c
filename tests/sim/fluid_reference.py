"""The fluid network once more, slow and plain: everything is computed anew at every event, rates by `filling.balance`.

It shares with the real one only `Topology` and the definition of the rates. Fifo queues are not modelled here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from farflung.sim.network.filling import Flow, balance
from farflung.sim.network.topology import GROWTH_STEPS, INITIAL_WINDOW_BYTES, NodeLinks, Topology


@dataclass
class Transfer:
    source: int
    target: int
    size: float
    left: float
    window: float
    rate: float = 0.0
    booked: float = 0.0
    grow_ns: int | None = None


@dataclass
class ReferenceNetwork:
    """Every connection is cold: give each transfer of the real one a `warm_key` of its own."""

    topology: Topology
    now_ns: int = 0
    transfers: dict[int, Transfer] = field(default_factory=dict)
    begun: int = 0

    def __post_init__(self) -> None:
        nodes, groups = self.topology.nodes, self.topology.groups
        self.capacity = [*(n.up_bytes_per_s for n in nodes), *(n.down_bytes_per_s for n in nodes), *groups * 2]

    def start(self, source: int, target: int, size_bytes: float) -> int:
        wire = size_bytes * self.topology.header_overhead
        window = min(INITIAL_WINDOW_BYTES, self.topology.window_limit_bytes(source, target))
        self.transfers[self.begun] = Transfer(source, target, wire, wire, window)
        self.begun += 1
        return self.begun - 1

    def cap(self, item: Transfer) -> float:
        round_trip_s = self.topology.round_trip_s(item.source, item.target)
        return item.window * self.topology.header_overhead / round_trip_s if round_trip_s else math.inf

    def solve(self) -> None:
        while True:
            for item, rate in zip(self.transfers.values(), balance(self.capacity, self.flows()), strict=True):
                item.rate = rate
            wrong = [item for item in self.transfers.values() if not item.booked / 1.05**2 <= item.rate <= item.booked]
            if not wrong or not self.topology.ack_share:
                break
            for item in wrong:
                item.booked = item.rate * 1.05
        for item in self.transfers.values():
            limit = self.topology.window_limit_bytes(item.source, item.target)
            if item.grow_ns is None and item.rate == self.cap(item) and item.window < limit:
                item.grow_ns = self.growth_ns(int(self.topology.round_trip_s(item.source, item.target) * 1e9))

    def flows(self) -> list[Flow]:
        share, made = self.topology.ack_share, []
        for item in self.transfers.values():
            there = tuple((link, 1.0) for link in self.topology.one_way(item.source, item.target))
            back = tuple((link, share) for link in self.topology.one_way(item.target, item.source)) if share else ()
            made.append(Flow(there, self.cap(item), back, item.booked))
        return made

    def growth_ns(self, round_trip_ns: int) -> int:
        grid_ns = 2 ** int(math.log2(max(round_trip_ns / GROWTH_STEPS, 1)))
        return max(math.floor((self.now_ns + round_trip_ns) / grid_ns + 0.5) * grid_ns, self.now_ns + 1)

    def next_ns(self) -> int | None:
        due = [item.grow_ns for item in self.transfers.values() if item.grow_ns is not None]
        due += [self.end_ns(item) for item in self.transfers.values() if item.rate > 0]
        return min(due, default=None)

    def end_ns(self, item: Transfer) -> int:
        return self.now_ns + max(math.ceil(item.left / item.rate * 1e9 - 1e-3), 0)

    def move_to(self, now_ns: int) -> list[int]:
        """Go to a time no later than the next event; returns what completes there. `solve` must follow."""
        ended = [f for f, item in self.transfers.items() if item.rate > 0 and self.end_ns(item) <= now_ns]
        for item in self.transfers.values():
            item.left = max(item.left - item.rate * (now_ns - self.now_ns) * 1e-9, 0.0)
        self.now_ns = now_ns
        for flow in ended:
            del self.transfers[flow]
        for item in self.transfers.values():
            if item.grow_ns == now_ns:
                item.grow_ns = None
                if item.rate == self.cap(item):
                    limit = self.topology.window_limit_bytes(item.source, item.target)
                    item.window = min(2 * item.window, limit)
        return ended


def random_topology(rng: np.random.Generator, *, fifo: bool = False) -> Topology:
    """Between 2 and 12 nodes; groups, caps, acknowledgements, losses and distances each there or not."""
    nodes, groups, regions = int(rng.integers(2, 13)), int(rng.integers(0, 4)), int(rng.integers(1, 4))
    narrow = rng.random() < 0.3  # equal lines everywhere: ties

    def line() -> float:
        return 1e6 if narrow else float(rng.uniform(0.5e6, 5e6))

    def behind() -> tuple[int, ...]:
        return tuple(int(g) for g in np.flatnonzero(rng.random(groups) < 0.4))

    far = rng.random() < 0.7
    latency = rng.uniform(0.002, 0.1, (regions, regions)) if far else np.zeros((regions, regions))
    return Topology(
        nodes=tuple(
            NodeLinks(line(), line(), behind(), queue="fifo" if fifo and rng.random() < 0.7 else "fq")
            for _ in range(nodes)
        ),
        groups=tuple(float(c) for c in rng.uniform(0.5e6, 8e6, groups)),
        region=tuple(int(r) for r in rng.integers(0, regions, nodes)),
        latency_s=tuple(tuple(float(d) for d in row) for row in latency),
        last_mile_s=tuple(float(d) for d in rng.uniform(0, 0.02, nodes)) if far else (),
        loss=tuple(float(p) for p in rng.choice([0.0, 0.001, 0.02], nodes)) if rng.random() < 0.4 else (),
        ack_share=float(rng.choice([0.0, 0.0218, 0.3])),
        window_bytes=float(rng.choice([4e6, 1e5])),
    )
