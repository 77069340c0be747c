"""Who is connected to whom, how fast and how far: the static half of the fluid network, and its physical constants.

Links are numbered once: node n sends on link n and receives on link N + n; what is behind shared link g sends on link
2 N + g and receives on 2 N + G + g, with N nodes and G shared links. Nothing is kept per pair of nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from farflung.protocol.errors import ConfigError

SEGMENT_BYTES = 1448
"""Payload of one TCP segment: 1500 bytes of MTU less IP, TCP and time stamps."""

FRAME_BYTES = 1514
"""The same segment on the line, with Ethernet's header: what shapers and queues count."""

ACK_BYTES = 66
"""An acknowledgement without payload on the line."""

HEADER_OVERHEAD = FRAME_BYTES / SEGMENT_BYTES
"""Bytes on the line per byte of payload: 1.0456 (a 25 MB flow through tbf fits within 0.4 %)."""

ACK_SHARE = ACK_BYTES / (2 * FRAME_BYTES)
"""Bytes of acknowledgement per byte on the line: one for every second segment (delayed acknowledgements): 2.2 %."""

BOOKING_STEP = 0.05
"""Acknowledgements get room on the way back for a rate this much above the flow's, and other room only when the flow
outgrows that or falls below it by twice as much. A flow's unused room is up to 0.22 % of its rate. Without such steps
every change travels on through acknowledgements (2 % of 2 % of 2 % ...) to every other flow: 10 times the work."""

INITIAL_WINDOW_BYTES = 10 * SEGMENT_BYTES
"""A cold connection sends ten segments in its first round trip (RFC 6928)."""

RETRANSMISSION_MARGIN_S = 0.2
"""A retransmission timeout is a round trip and this (Linux). An idle connection halves its window once per timeout
(RFC 2861), until it is cold again."""

GROWTH_STEPS = 32
"""Windows double on a grid of the largest power of two nanoseconds that fits into a round trip this many times: what
grows at nearly one time is solved once. Each doubling is early or late by up to 1.6 % of the round trip."""

MATHIS = 1.22
"""Window of a loss-based sender in segments, times sqrt(loss) (Mathis et al., CCR 27(3), 1997)."""

QUEUE_S = 0.1
"""Drop-tail buffer of an uplink unless its size is given: what the line sends in this time. Homes have 50-400 ms."""

FIFO_DUPLEX_LOSS = 0.08
"""Share of a transfer's forward bottleneck that is lost while its acknowledgements wait behind bulk in a full FIFO.

Acknowledgements that waited arrive in bursts, and so does what they release. The mean of what fits each of six recorded
full-duplex scenarios (tests/data/reality_netns.csv: cubic, 20 Mbit/s, 40 ms): rings with 25 to 400 ms of queue 0.03 to
0.09, meshes of 6 and 4 nodes with a flow to everyone 0.11 and 0.18. One number cannot be right for all: expect 10 %.
"""


@dataclass(frozen=True)
class NodeLinks:
    """One node's access line. Full duplex: its two directions do not share capacity."""

    up_bytes_per_s: float
    """Capacity in bytes on the line per second, towards the network. 0: nothing gets out, also no acknowledgement."""
    down_bytes_per_s: float
    """The same, towards the node."""
    groups: tuple[int, ...] = ()
    """Shared links (a household's line, a transit) that its traffic crosses, except that to nodes behind them too."""
    queue: str = "fq"
    """"fifo": acknowledgements wait behind bulk (bufferbloat); "fq": they pass it."""
    queue_bytes: float | None = None
    """Drop-tail buffer of a fifo uplink; None: `QUEUE_S` at `up_bytes_per_s`. Refused for fq, where it does nothing."""

    def __post_init__(self) -> None:
        for name in ("up_bytes_per_s", "down_bytes_per_s"):
            _check_capacity(name, getattr(self, name))
        if self.queue not in ("fifo", "fq"):
            raise ConfigError(f'a queue is "fifo" or "fq", not {self.queue!r}')
        if len(dict.fromkeys(self.groups)) != len(self.groups):
            raise ConfigError(f"a node is behind a shared link once: name every group once, not {self.groups}")
        if self.queue_bytes is not None:
            if self.queue == "fq":
                raise ConfigError(
                    f"queue_bytes has no effect on an fq uplink: drop it, or say fifo, {self.queue_bytes}"
                )
            if not 0 < self.queue_bytes < math.inf:
                raise ConfigError(f"queue_bytes must be positive and finite, got {self.queue_bytes}")

    @property
    def buffer_bytes(self) -> float:
        """Size of the uplink's fifo buffer; 0 for fq."""
        if self.queue == "fq":
            return 0.0
        return QUEUE_S * self.up_bytes_per_s if self.queue_bytes is None else self.queue_bytes


@dataclass(frozen=True)
class Topology:
    """All links and distances. Empty per-node tuples mean: the same plain value for every node (see each field)."""

    nodes: tuple[NodeLinks, ...]
    groups: tuple[float, ...] = ()
    """Capacity of every shared link in bytes/s, out of what is behind it (full duplex)."""
    groups_down: tuple[float, ...] = ()
    """The same, into what is behind it; empty: as fast as out of it."""
    region: tuple[int, ...] = ()
    """Region of each node; empty: all in region 0."""
    latency_s: tuple[tuple[float, ...], ...] = ((0.0,),)
    """One-way delay from region (row) to region (column); the diagonal is within a region."""
    last_mile_s: tuple[float, ...] = ()
    """Delay of each node's own line, added at both ends; empty: none."""
    loss: tuple[float, ...] = ()
    """Packet loss probability of each node's line; empty: none. Both ends' losses combine and limit the window to
    1.22 segments / sqrt(p), as for cubic and reno; the resent bytes themselves are not counted."""
    header_overhead: float = HEADER_OVERHEAD
    """Bytes on the line per byte of payload, >= 1."""
    ack_share: float = ACK_SHARE
    """Bytes of acknowledgement per byte on the line that the way back carries, < 1; 0: acknowledgements are free."""
    window_bytes: float = 4e6
    """Largest window of a connection: a transfer is never faster than this per round trip."""

    def __post_init__(self) -> None:
        n = len(self.nodes)
        for name, plain in (("region", 0), ("last_mile_s", 0.0), ("loss", 0.0)):
            if not getattr(self, name):
                object.__setattr__(self, name, (plain,) * n)
            if len(getattr(self, name)) != n:
                raise ConfigError(f"{name} needs one value for each of {n} nodes, got {len(getattr(self, name))}")
        if not self.groups_down:
            object.__setattr__(self, "groups_down", self.groups)
        if len(self.groups_down) != len(self.groups):
            raise ConfigError(f"{len(self.groups)} shared links have that many down rates, got {len(self.groups_down)}")
        for capacity in (*self.groups, *self.groups_down):
            _check_capacity("groups", capacity)
        for node in self.nodes:
            for group in node.groups:
                if not 0 <= group < len(self.groups):
                    raise ConfigError(f"there are {len(self.groups)} shared links, none has the index {group}")
        self._check_distances()
        if not 1 <= self.header_overhead < math.inf:
            raise ConfigError(f"header_overhead must be at least 1, got {self.header_overhead}")
        if not 0 <= self.ack_share < 1:
            raise ConfigError(f"ack_share must be in [0, 1), got {self.ack_share}")
        if not INITIAL_WINDOW_BYTES <= self.window_bytes < math.inf:
            raise ConfigError(f"window_bytes must be at least {INITIAL_WINDOW_BYTES}, got {self.window_bytes}")

    def _check_distances(self) -> None:
        regions = len(self.latency_s)
        for row in self.latency_s:
            if len(row) != regions:
                raise ConfigError(f"latency_s must be square: {regions} rows, but a row of {len(row)}")
            for delay_s in row:
                _check_delay("latency_s", delay_s)
        for region in self.region:
            if not 0 <= region < regions:
                raise ConfigError(f"latency_s has {regions} regions, none has the index {region}")
        for delay_s in self.last_mile_s:
            _check_delay("last_mile_s", delay_s)
        for probability in self.loss:
            if not 0 <= probability < 1:
                raise ConfigError(f"loss must be in [0, 1), got {probability}")

    @property
    def links(self) -> int:
        """Number of one-way links: two per node and two per shared link."""
        return 2 * (len(self.nodes) + len(self.groups))

    def one_way_latency_s(self, a: int, b: int) -> float:
        """Propagation delay from node a to node b: between their regions, and both last miles."""
        return self.latency_s[self.region[a]][self.region[b]] + self.last_mile_s[a] + self.last_mile_s[b]

    def round_trip_s(self, a: int, b: int) -> float:
        """There and back, with empty queues."""
        return self.one_way_latency_s(a, b) + self.one_way_latency_s(b, a)

    def window_limit_bytes(self, a: int, b: int) -> float:
        """The largest window a transfer from a to b reaches: `window_bytes`, or what the losses allow (Mathis 1997)."""
        loss = 1 - (1 - self.loss[a]) * (1 - self.loss[b])
        return min(self.window_bytes, MATHIS * SEGMENT_BYTES / math.sqrt(loss)) if loss else self.window_bytes

    def one_way(self, source: int, target: int) -> list[int]:
        """The links that data from source to target crosses, uplink first; not those that both are behind."""
        n, g = len(self.nodes), len(self.groups)
        here, there = self.nodes[source].groups, self.nodes[target].groups
        up = [2 * n + group for group in here if group not in there]
        down = [2 * n + g + group for group in there if group not in here]
        return [source, *up, *down, n + target]

    def path(self, source: int, target: int) -> list[tuple[int, float]]:
        """Every (link, share) of a transfer: 1 for the links data crosses, `ack_share` for those of the way back."""
        forward = [(link, 1.0) for link in self.one_way(source, target)]
        return forward + ([(link, self.ack_share) for link in self.one_way(target, source)] if self.ack_share else [])


def _check_capacity(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name} is a capacity in bytes per second, finite, 0 or more, got {value}")


def _check_delay(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name} is a delay in seconds, 0 or more, got {value}")
