"""The arrays of a fluid network: records for flows, crossings, links and nodes, and how they are made and grown.

A flow lives in a slot; slots are reused, and their number doubles when all are taken. The j-th link that the flow in
slot f crosses is crossing f * width + j. The crossings of one link are a doubly linked list through all slots, so a
flow comes and goes in constant time and a link of any degree needs no memory of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.sim.network.topology import Topology

Numbers = NDArray[np.float64]

NEVER = np.iinfo(np.int64).max
"""The time of what is not going to happen, in nanoseconds (292 years)."""

FLOW = np.dtype(
    [
        ("ident", np.int64),  # -1: the slot is free
        ("source", np.int64),
        ("target", np.int64),
        ("since_ns", np.int64),  # when `remaining` was true and `rate` began
        ("finish_ns", np.int64),
        ("grow_ns", np.int64),  # when the window doubles, if it still limits the flow
        ("crossings", np.int64),
        ("forward", np.int64),  # the first so many carry data, the others acknowledgements
        ("touched", np.int64),  # 1: the rate may have changed in this instant
        ("remaining", np.float64),  # bytes on the line that are still to be sent, at since_ns
        ("rate", np.float64),  # bytes on the line per second
        ("booked", np.float64),  # the rate that its acknowledgements have room for
        ("cap", np.float64),  # window / round trip, in bytes on the line per second
        ("window", np.float64),  # bytes on the line
        ("window_limit", np.float64),
        ("round_trip_s", np.float64),  # with empty queues
    ]
)
CROSSING = np.dtype(
    [
        ("link", np.int32),
        ("flow", np.int32),
        ("next", np.int32),
        ("previous", np.int32),
        ("share", np.float64),  # bytes on the link per byte of data on its line
        ("per_byte", np.float64),  # one over that
    ]
)
LINK = np.dtype(
    [
        ("capacity", np.float64),
        ("head", np.int64),  # first crossing, -1: none
        ("queued", np.int64),  # 1: waits in `ring` for a new level
        ("slack", np.float64),  # what a link that is not full has left
    ]
)
NODE = np.dtype(
    [
        ("buffer_bytes", np.float64),  # of a fifo uplink, 0: fq
        ("full", np.int64),  # 1: acknowledgements wait behind bulk
        ("watched", np.int64),  # 1: the uplink's level was found anew in this instant
        ("sent", np.float64),  # bytes on the line, until each flow's since_ns
        ("received", np.float64),
    ]
)
MAIN = np.dtype(
    [
        ("heap_size", np.int64),
        ("free_size", np.int64),
        ("ring_first", np.int64),
        ("ring_size", np.int64),
        ("touched", np.int64),
        ("watched", np.int64),
        ("done", np.int64),
        ("dirty_ns", np.int64),  # the instant whose changes are not solved yet, or NEVER
        ("looks_max", np.int64),  # per crossing and instant, before all is filled anew; below zero: always
        ("crossings", np.int64),  # of all flows together
        ("width", np.int64),  # crossings per slot
        ("visits", np.int64),  # crossings looked at by the incremental solver, for good
        ("solves", np.int64),
        ("refills", np.int64),  # instants for which all levels were found anew
        ("ack_share", np.float64),
    ]
)


DONE = np.dtype([("ident", np.int64), ("window", np.float64), ("end_ns", np.int64)])

FREE, TOUCHED, WATCHED = range(3)
"""Rows of `State.stacks`: free slots; flows whose rate may have changed; fifo nodes to look at."""


class State(NamedTuple):
    """Everything a kernel sees. Items of the heap are nodes (fifo queues), then slots (flows)."""

    main: NDArray[Any]
    """One record of `MAIN`."""
    flow: NDArray[Any]
    crossing: NDArray[Any]
    link: NDArray[Any]
    level: Numbers
    """Rate at which each link is full; inf if what crosses it is limited elsewhere."""
    node: NDArray[Any]
    ring: NDArray[np.int32]
    """Links whose level must be found anew, first come, first served; as many places as links."""
    heap: NDArray[np.int32]
    """Items by (due_ns, tie), the earliest first."""
    place: NDArray[np.int32]
    """Where an item is in the heap, -1: nowhere."""
    due_ns: NDArray[np.int64]
    tie: NDArray[np.int64]
    """A flow's id; below zero for a node: of one instant, queues come first, then flows by id."""
    stacks: NDArray[np.int32]
    """See FREE, TOUCHED, WATCHED."""
    behind: NDArray[np.int32]
    """The shared links each node is behind, padded with -1: one row per node."""
    demand: Numbers
    """Scratch, a row per slot: the rate a flow would have if only its other limits held, and its bytes on the link."""
    done: NDArray[Any]
    """Flows that completed in this call, in order, and the window each had then."""


def make_state(topology: Topology, looks_max: int, slots: int = 64) -> State:
    """An idle network. `looks_max`: see `MAIN` and `fluid.SOLVERS`."""
    nodes, links = len(topology.nodes), topology.links
    most_groups = max((len(node.groups) for node in topology.nodes), default=0)
    main = np.zeros(1, MAIN)
    main["width"] = (2 + 2 * most_groups) * (2 if topology.ack_share else 1)
    main["looks_max"], main["dirty_ns"], main["ack_share"] = looks_max, NEVER, topology.ack_share
    link = np.zeros(links, LINK)
    link["capacity"] = [
        *(node.up_bytes_per_s for node in topology.nodes),
        *(node.down_bytes_per_s for node in topology.nodes),
        *topology.groups,
        *topology.groups_down,
    ]
    link["head"] = -1
    node = np.zeros(nodes, NODE)
    node["buffer_bytes"] = [item.buffer_bytes for item in topology.nodes]
    behind = [[*item.groups, *[-1] * (most_groups - len(item.groups))] for item in topology.nodes]
    state = State(
        main=main,
        flow=np.zeros(0, FLOW),
        crossing=np.zeros(0, CROSSING),
        link=link,
        level=np.full(links, np.inf),
        node=node,
        ring=np.zeros(links, np.int32),
        heap=np.zeros(nodes, np.int32),
        place=np.full(nodes, -1, np.int32),
        due_ns=np.full(nodes, NEVER, np.int64),
        tie=np.arange(nodes, dtype=np.int64) - nodes,
        stacks=np.zeros((3, nodes), np.int32),
        behind=np.array(behind, np.int32).reshape(nodes, most_groups),
        demand=np.zeros((0, 2)),
        done=np.zeros(0, DONE),
    )
    return grow(state, slots)


def grow(state: State, slots: int) -> State:
    """The same network with `slots` slots. Old arrays are copied, not changed, except that `main` is shared."""
    old, width, nodes = len(state.flow), int(state.main["width"][0]), len(state.node)
    flow = _longer(state.flow, slots)
    flow["ident"][old:] = -1
    stacks = np.zeros((3, max(slots, nodes)), np.int32)
    stacks[:, : state.stacks.shape[1]] = state.stacks
    size = int(state.main["free_size"][0])
    stacks[FREE, size : size + slots - old] = np.arange(slots - 1, old - 1, -1)
    state.main["free_size"] += slots - old
    place, due_ns = np.full(nodes + slots, -1, np.int32), np.full(nodes + slots, NEVER, np.int64)
    place[: nodes + old], due_ns[: nodes + old] = state.place, state.due_ns
    return state._replace(
        flow=flow,
        crossing=_longer(state.crossing, slots * width),
        heap=_longer(state.heap, nodes + slots),
        place=place,
        due_ns=due_ns,
        tie=_longer(state.tie, nodes + slots),
        stacks=stacks,
        demand=np.zeros((slots, 2)),
        done=np.zeros(slots, DONE),
    )


def _longer(array: NDArray[Any], length: int) -> NDArray[Any]:
    longer = np.zeros(length, array.dtype)
    longer[: len(array)] = array
    return longer
