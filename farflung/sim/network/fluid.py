"""Transfers in virtual time: flows that share links max-min fairly, as a machine without sockets, threads or clock.

    network = FluidNetwork(Topology((NodeLinks(1e6, 1e6),) * 2))
    flow = network.start(0, 1, size_bytes=5e5, now_ns=0)
    while (due_ns := network.next_ns()) is not None:
        completed = network.advance(due_ns)

The time comes in with every call and never goes back. The changes of one instant are solved together, when `next_ns` or
`rate` is asked for or time goes on: start all that begins in an instant before asking. A flow is complete when its last
byte has left its bottleneck: propagation is the caller's to add. Memory is bounded by the flows that were active at
once, and by the connections used in the last seconds.

Model. Every full link grants each flow the same bytes per second, or all it wants; bytes are those on the line (payload
x header overhead), and each transfer also loads the way back with acknowledgements (`filling.balance`). A flow is no
faster than its window per round trip; the window starts at ten segments, doubles per round trip while it is what limits
the flow, and ends at `window_bytes` or what losses allow. While bulk fills a node's fifo uplink, round trips of what it
receives grow by the queue, and bursts cost `FIFO_DUPLEX_LOSS` of the way there; a queue fills and drains in the time it
takes to send it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.protocol.errors import ConfigError, LocalError
from farflung.sim.network.entries import ENTRIES
from farflung.sim.network.layout import NEVER, State, grow, make_state
from farflung.sim.network.topology import INITIAL_WINDOW_BYTES, RETRANSMISSION_MARGIN_S, Topology

SOLVERS = {"auto": 16, "incremental": 1 << 20, "dense": -1}
"""How rates are found, as looks at every crossing after which repairing what changed is given up and all is found anew.

"dense" finds all anew at every instant. Repairing was cheaper in everything measured (benchmarks/fluid_network.py), a
40-node all-to-all included, so "auto" repairs, with a bound for what was not measured. The rates are the same."""

_NEVER = int(NEVER)


class Use(NamedTuple):
    """Which share of every link is in use, 0 to 1."""

    up_n: NDArray[np.float64]
    down_n: NDArray[np.float64]
    group_up_g: NDArray[np.float64]
    group_down_g: NDArray[np.float64]


class _Flow(NamedTuple):
    slot: int
    size_bytes: float
    connection: Hashable


@dataclass(slots=True)
class _Connection:
    """What a connection remembers: how many flows it has, or how it was left, until that makes no difference."""

    timeout_ns: int
    active: int = 0
    latest: int = -1
    window: float = 0.0
    end_ns: int = 0
    cold_ns: int = 0


class FluidNetwork:
    """All flows of one world. Costs a few microseconds per call and changed rate (benchmarks/fluid_network.py).

    Raises ConfigError for settings and nodes that do not exist, LocalError for calls out of order and unknown flows.
    """

    def __init__(self, topology: Topology, *, solver: str = "auto") -> None:
        if solver not in SOLVERS:
            raise ConfigError(f"the solver is one of {', '.join(SOLVERS)}, not {solver!r}")
        self.topology = topology
        self._state: State = make_state(topology, SOLVERS[solver])
        self._flows: dict[int, _Flow] = {}
        self._connections: dict[Hashable, _Connection] = {}
        self._idle: dict[Hashable, None] = {}  # the longest idle connection first
        self._unreported: dict[int, float] = {}  # completed in a call that was not `advance`: id, size
        self._last = -1
        self._now_ns = 0
        self._next_ns = _NEVER
        self._cold = INITIAL_WINDOW_BYTES * topology.header_overhead

    def start(
        self, source: int, target: int, size_bytes: float, now_ns: int, *, warm_key: Hashable | None = None
    ) -> int:
        """Begin to send `size_bytes` of payload; returns the flow's id, larger than every id before.

        `warm_key` names the connection, by default one per ordered
        pair of nodes: it keeps its window for the next flow, halved once per `RETRANSMISSION_MARGIN_S` + round trip of
        idleness. Flows of one connection at one time have a window each; a later one begins with that of the latest.
        """
        if source == target or not (0 <= source < len(self._state.node) and 0 <= target < len(self._state.node)):
            raise ConfigError(f"a flow needs two different nodes below {len(self._state.node)}, not {source, target}")
        if not 0 <= size_bytes < math.inf:
            raise ConfigError(f"size_bytes must be 0 or more and finite, got {size_bytes}")
        self._catch_up(now_ns)
        if len(self._flows) == len(self._state.flow):
            self._state = grow(self._state, 2 * len(self._flows))
        self._last += 1
        topology, overhead = self.topology, self.topology.header_overhead
        round_trip_s = topology.round_trip_s(source, target)
        limit = topology.window_limit_bytes(source, target) * overhead
        key = (source, target) if warm_key is None else warm_key
        window = min(self._open(key, round_trip_s, now_ns), limit)
        slot = ENTRIES.start(
            *(self._state, self._last, source, target, size_bytes * overhead, now_ns),
            *(round_trip_s, window, limit),
        )
        self._flows[self._last] = _Flow(slot, size_bytes, key)
        self._connections[key].latest = self._last
        self._next_ns = now_ns
        return self._last

    def cancel(self, flow: int, now_ns: int) -> float:
        """End a flow now; returns the payload it carried: all of it if it had completed and was not reported yet."""
        self._catch_up(now_ns)
        if flow in self._unreported:
            return self._unreported.pop(flow)
        item = self._find(flow)
        window = float(self._state.flow["window"][item.slot])
        left = ENTRIES.cancel(self._state, item.slot, now_ns)
        self._close(flow, window, now_ns)
        self._next_ns = now_ns
        return item.size_bytes - min(left / self.topology.header_overhead, item.size_bytes)

    def carried(self, flow: int, now_ns: int) -> float:
        """Payload bytes of an active (or not yet reported) flow that have been carried by now."""
        self._catch_up(now_ns)
        if flow in self._unreported:
            return self._unreported[flow]
        item = self._find(flow)
        record = self._state.flow[item.slot]
        moved = float(record["rate"]) * ((now_ns - int(record["since_ns"])) * 1e-9)
        left = max(float(record["remaining"]) - moved, 0.0)
        return item.size_bytes - min(left / self.topology.header_overhead, item.size_bytes)

    def next_ns(self) -> int | None:
        """When `advance` has something to do: a flow completes, a window grows, a queue turns. None: never."""
        if self._unreported:
            return self._now_ns
        self._settle()
        return None if self._next_ns == _NEVER else self._next_ns

    def advance(self, now_ns: int) -> list[int]:
        """Let everything happen that is due by now; returns the flows that have completed, in order of (time, id)."""
        self._check_time(now_ns)
        completed = [flow for flow, _ in self._run(now_ns)]
        self._now_ns = now_ns
        if self._unreported:
            completed = [*self._unreported, *completed]
            self._unreported.clear()
        return completed

    def set_node(
        self,
        node: int,
        now_ns: int,
        *,
        up_bytes_per_s: float | None = None,
        down_bytes_per_s: float | None = None,
    ) -> None:
        """Change an access line from now on. 0 stops what crosses it, acknowledgements too. A fifo keeps its bytes."""
        if not 0 <= node < len(self._state.node):
            raise ConfigError(f"there are {len(self._state.node)} nodes, none has the index {node}")
        if up_bytes_per_s is not None:
            self._set(node, up_bytes_per_s, now_ns)
        if down_bytes_per_s is not None:
            self._set(len(self._state.node) + node, down_bytes_per_s, now_ns)

    def set_group(self, group: int, now_ns: int, bytes_per_s: float) -> None:
        """Change a shared link, in both directions, from now on."""
        groups = len(self.topology.groups)
        if not 0 <= group < groups:
            raise ConfigError(f"there are {groups} shared links, none has the index {group}")
        for link in (group, groups + group):
            self._set(2 * len(self._state.node) + link, bytes_per_s, now_ns)

    def rate(self, flow: int) -> float:
        """Payload bytes per second of an active flow, at the time of the last call."""
        self._settle()
        return float(self._state.flow["rate"][self._find(flow).slot]) / self.topology.header_overhead

    def utilisation(self) -> Use:
        """How full every link is now. Costs a look at every crossing. A link of capacity 0 counts as unused."""
        self._settle()
        nodes, groups = len(self._state.node), len(self.topology.groups)
        used = np.zeros(len(self._state.link))
        ENTRIES.use(self._state, used)
        capacity = self._state.link["capacity"]
        share = np.divide(used, capacity, out=np.zeros_like(used), where=capacity > 0)
        return Use(*np.split(share, [nodes, 2 * nodes, 2 * nodes + groups]))

    @property
    def sent_bytes(self) -> NDArray[np.float64]:
        """Bytes on the line that each node has sent by the time of the last call: headers and acknowledgements too."""
        return self._totals()[0]

    @property
    def received_bytes(self) -> NDArray[np.float64]:
        """The same, received."""
        return self._totals()[1]

    @property
    def active(self) -> int:
        """Number of flows that have begun and neither completed nor been cancelled."""
        return len(self._flows)

    def _totals(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        sent, received = np.zeros(len(self._state.node)), np.zeros(len(self._state.node))
        ENTRIES.totals(self._state, self._now_ns, sent, received)
        return sent, received

    def _set(self, link: int, bytes_per_s: float, now_ns: int) -> None:
        if not 0 <= bytes_per_s < math.inf:
            raise ConfigError(f"a capacity is in bytes per second, finite, 0 or more, got {bytes_per_s}")
        self._catch_up(now_ns)
        ENTRIES.set_capacity(self._state, link, bytes_per_s, now_ns)
        self._next_ns = now_ns

    def _find(self, flow: int) -> _Flow:
        try:
            return self._flows[flow]
        except KeyError:
            raise LocalError(f"no such flow, or it has ended: {flow}") from None

    def _check_time(self, now_ns: int) -> None:
        if now_ns < self._now_ns:
            raise LocalError(f"the time was {self._now_ns} ns and cannot go back to {now_ns}")

    def _catch_up(self, now_ns: int) -> None:
        """Let happen what is due before now. What is due now waits for the other changes of this instant."""
        self._check_time(now_ns)
        if self._next_ns < now_ns:
            self._unreported.update(self._run(now_ns - 1))
        self._now_ns = now_ns

    def _settle(self) -> None:
        """Share the links anew if anything has changed in the instant of the last call."""
        if self._next_ns <= self._now_ns:
            self._next_ns = ENTRIES.settle_now(self._state)

    def _run(self, now_ns: int) -> list[tuple[int, float]]:
        """Let happen what is due by now; returns the flows that completed, with their sizes."""
        if self._next_ns > now_ns:
            return []
        count, self._next_ns = ENTRIES.advance(self._state, now_ns)
        done = self._state.done[:count].tolist() if count else ()
        return [(flow, self._close(flow, window, end_ns)) for flow, window, end_ns in done]

    def _open(self, key: Hashable, round_trip_s: float, now_ns: int) -> float:
        """The window that a new flow of this connection begins with, in bytes on the line."""
        while self._idle:
            oldest = next(iter(self._idle))
            if self._connections[oldest].cold_ns > now_ns:
                break
            del self._idle[oldest], self._connections[oldest]
        timeout_ns = round((RETRANSMISSION_MARGIN_S + round_trip_s) * 1e9)
        connection = self._connections.setdefault(key, _Connection(timeout_ns))
        self._idle.pop(key, None)
        connection.active += 1
        if connection.active > 1:
            latest = self._flows.get(connection.latest)
            return connection.window if latest is None else float(self._state.flow["window"][latest.slot])
        halvings = (now_ns - connection.end_ns) // connection.timeout_ns
        return max(math.ldexp(connection.window, -min(halvings, 64)), self._cold)

    def _close(self, flow: int, window: float, now_ns: int) -> float:
        """Forget a flow, whose window its connection remembers as long as it makes a difference. Returns its size."""
        item = self._flows.pop(flow)
        connection = self._connections[item.connection]
        connection.active -= 1
        connection.window, connection.end_ns = window, now_ns
        if not connection.active:
            halvings = math.ceil(math.log2(max(window / self._cold, 1.0)))
            connection.cold_ns = now_ns + halvings * connection.timeout_ns
            self._idle[item.connection] = None
        return item.size_bytes
