"""From lines and distances to what a whole round may use of them: payload bytes per second, and one-way delays.

All connections of a member are added up here: a connection's limit (window / round trip, loss) counts once per peer.
Slow start is left out: connections stay warm while bulk flows, and its few round trips are little of a round.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.sim.network.topology import FIFO_DUPLEX_LOSS, MATHIS, SEGMENT_BYTES, Topology
from farflung.sim.timing.exchange import EFFICIENCY, Lines

Floats = NDArray[np.float64]

ACK_PASSES = 8
"""What a line carries depends on the acknowledgements of the other direction and the reverse: a contraction by
`ack_share` (2 %) each time, so this many passes leave nothing to see."""


class Distances(NamedTuple):
    """Between all pairs of m members, in seconds."""

    one_way_mm: Floats
    """Row: from; column: to. Zero to oneself."""

    round_trip_mm: Floats


def distances(topology: Topology) -> Distances:
    """Propagation delays with empty queues; a fifo uplink's queue is added to its round trips."""
    region_m = np.array(topology.region, np.int64)
    latency = np.array(topology.latency_s, np.float64)
    mile_m = np.array(topology.last_mile_s, np.float64)
    one_way_mm = latency[np.ix_(region_m, region_m)] + mile_m[:, None] + mile_m[None, :]
    np.fill_diagonal(one_way_mm, 0.0)
    queue_m = np.array(
        [node.buffer_bytes / node.up_bytes_per_s if node.up_bytes_per_s > 0 else 0.0 for node in topology.nodes]
    )
    # Data to j waits for j's acknowledgements, which stand in j's queue.
    return Distances(one_way_mm, one_way_mm + one_way_mm.T + queue_m[None, :])


def usable_lines(topology: Topology, between: Distances, disk_m: Floats, *, efficiency: float = EFFICIENCY) -> Lines:
    """What members can give and take, payload bytes per second, when all of them exchange in both directions.

    Headers, acknowledgements of the other direction, windows and losses, a fifo's duplex loss, and `disk_m` (bytes per
    second that a member can store and check; inf: any) are taken off; then times `efficiency`.
    """
    up_m = np.array([node.up_bytes_per_s for node in topology.nodes], np.float64)
    down_m = np.array([node.down_bytes_per_s for node in topology.nodes], np.float64)
    fifo_m = np.array([node.queue == "fifo" for node in topology.nodes])
    down_m = np.where(fifo_m, down_m * (1 - FIFO_DUPLEX_LOSS), down_m)
    give_m, take_m = up_m.copy(), down_m.copy()
    share = topology.ack_share
    for _ in range(ACK_PASSES):
        level = give_m.sum() / max(1, len(up_m))  # what a member takes when all exchange: no more than uplinks give
        taking_m = np.minimum(take_m, max(level, 0.0))
        give_m = np.maximum(up_m - share * taking_m, 0.0)
        take_m = np.maximum(down_m - share * give_m, 0.0)
    limit_mm = _connection_limits(topology, between)
    give_m = np.minimum(give_m / topology.header_overhead, limit_mm.sum(1)) * efficiency
    take_m = np.minimum(np.minimum(take_m / topology.header_overhead, limit_mm.sum(0)) * efficiency, disk_m)
    groups = len(topology.groups)
    crossing = tuple(
        np.array([index for index, node in enumerate(topology.nodes) if group in node.groups], np.int64)
        for group in range(groups)
    )
    carried = 1 / (topology.header_overhead * (1 + share)) * efficiency
    up_g, down_g = np.array(topology.groups, np.float64), np.array(topology.groups_down, np.float64)
    return Lines(give_m, take_m, up_g * carried, down_g * carried, crossing)


def _connection_limits(topology: Topology, between: Distances) -> Floats:
    """The most one connection carries from row to column, payload bytes per second: window / round trip."""
    passes_m = 1 - np.array(topology.loss, np.float64)
    loss_mm = 1 - passes_m[:, None] * passes_m[None, :]
    with np.errstate(divide="ignore"):
        window_mm = np.where(loss_mm > 0, MATHIS * SEGMENT_BYTES / np.sqrt(loss_mm), topology.window_bytes)
        limit_mm = np.minimum(window_mm, topology.window_bytes) / between.round_trip_mm
    np.fill_diagonal(limit_mm, 0.0)
    return limit_mm
