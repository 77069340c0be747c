"""One flow's life: it crosses links, moves bytes at a rate, is told a new one, and leaves.

Exactness. Time is integer nanoseconds. A flow's remaining bytes are true at `since_ns` and are only updated when its
rate changes, so nothing accumulates between changes; a flow whose finish is reached is done, whatever rounding left.
Finishes are rounded up to whole nanoseconds, except that a fraction below `ROUNDING_NS` is taken for rounding error.
"""

from __future__ import annotations

import math

from farflung.sim.network.compiling import compiled
from farflung.sim.network.heap import append, rebuild, schedule, unschedule
from farflung.sim.network.layout import FREE, NEVER, TOUCHED, State
from farflung.sim.network.maxmin import enqueue, touch
from farflung.sim.network.topology import BOOKING_STEP, GROWTH_STEPS

ROUNDING_NS = 1e-3
"""Fractions of a nanosecond up to this are rounding: fp64 resolves 1e-4 ns in a transfer of a quarter of an hour."""


@compiled
def _span_ns(duration_s: float) -> int:
    """Seconds in whole nanoseconds, rounded up; NEVER if that is more than a century."""
    span = math.ceil(duration_s * 1e9 - ROUNDING_NS)
    return NEVER if not span < 2.0**61 else max(int(span), 0)


@compiled
def later(now_ns: int, duration_s: float) -> int:
    """That long after now, in whole nanoseconds, rounded up."""
    span = _span_ns(duration_s)
    return NEVER if span == NEVER else now_ns + span


@compiled
def enqueue_path(state: State, slot: int) -> None:
    """All links of this flow need a new level."""
    start = slot * state.main[0].width
    for i in range(start, start + state.flow[slot].crossings):
        enqueue(state, state.crossing[i].link)


@compiled
def queue_s(state: State, node: int) -> float:
    """What a full uplink adds to the way back of what this node receives."""
    capacity = state.link[node].capacity
    return state.node[node].buffer_bytes / capacity if state.node[node].full == 1 and capacity > 0 else 0.0


@compiled
def recap(state: State, slot: int) -> None:
    """Set the cap from the window and the round trip of this instant.

    A queue on the way back lets the window grow by what it holds, so it slows a flow only at the window's limit.
    """
    flow = state.flow[slot]
    flow.cap = flow.window / flow.round_trip_s if flow.round_trip_s > 0 else math.inf
    longest_s = flow.round_trip_s + queue_s(state, flow.target)
    if longest_s > 0:
        flow.cap = min(flow.cap, flow.window_limit / longest_s)
    touch(state, slot)
    enqueue_path(state, slot)


@compiled
def _cross(state: State, slot: int, link: int, share: float) -> None:
    """The flow's next crossing: put it first on the link's list."""
    flow = state.flow[slot]
    index = slot * state.main[0].width + flow.crossings
    flow.crossings += 1
    state.main[0].crossings += 1
    here, head = state.crossing[index], state.link[link].head
    here.link, here.flow, here.next, here.previous = link, slot, head, -1
    here.share, here.per_byte = share, 1.0 / share
    if head >= 0:
        state.crossing[head].previous = index
    state.link[link].head = index


@compiled
def cross_one_way(state: State, slot: int, source: int, target: int, share: float) -> None:
    """All links from source to target, as `Topology.one_way` lists them."""
    nodes, groups = len(state.node), len(state.link) // 2 - len(state.node)
    _cross(state, slot, source, share)
    for end, other, first in ((source, target, 2 * nodes), (target, source, 2 * nodes + groups)):
        for group in state.behind[end]:
            shared = group < 0
            for theirs in state.behind[other]:
                shared = shared or theirs == group
            if not shared:
                _cross(state, slot, first + group, share)
    _cross(state, slot, nodes + target, share)


@compiled
def detach(state: State, slot: int) -> None:
    """Take a flow out of all links and of the heap, and free its slot."""
    flow, main = state.flow[slot], state.main[0]
    start = slot * main.width
    for i in range(start, start + flow.crossings):
        here = state.crossing[i]
        if here.previous >= 0:
            state.crossing[here.previous].next = here.next
        else:
            state.link[here.link].head = here.next
        if here.next >= 0:
            state.crossing[here.next].previous = here.previous
        if state.level[here.link] < math.inf:
            enqueue(state, here.link)
        else:
            state.link[here.link].slack += here.share * (flow.rate if i < start + flow.forward else flow.booked)
    main.crossings -= flow.crossings
    flow.ident = -1
    unschedule(state, len(state.node) + slot)
    state.stacks[FREE, main.free_size] = slot
    main.free_size += 1


@compiled
def count(state: State, slot: int, moved_bytes: float) -> None:
    """Book what a flow and its acknowledgements moved on the access lines."""
    flow, ack_share = state.flow[slot], state.main[0].ack_share
    source, target = state.node[flow.source], state.node[flow.target]
    source.sent += moved_bytes
    target.received += moved_bytes
    target.sent += ack_share * moved_bytes
    source.received += ack_share * moved_bytes


@compiled
def settle(state: State, slot: int, now_ns: int) -> None:
    """Bring the remaining bytes up to date."""
    flow = state.flow[slot]
    moved = min(flow.rate * ((now_ns - flow.since_ns) * 1e-9), flow.remaining)
    flow.remaining -= moved
    flow.since_ns = now_ns
    count(state, slot, moved)


@compiled
def _growth_ns(now_ns: int, round_trip_s: float) -> int:
    """A round trip from now, rounded to the grid of such round trips (`GROWTH_STEPS`), and not now."""
    wait_ns = int(round_trip_s * 1e9)
    grid_ns = 1
    while 2 * grid_ns * GROWTH_STEPS <= wait_ns:
        grid_ns *= 2
    return max((now_ns + wait_ns + grid_ns // 2) // grid_ns * grid_ns, now_ns + 1)


@compiled
def apply(state: State, now_ns: int) -> bool:
    """Give touched flows the rates that levels and caps now say, and find out when each ends or grows.

    False if acknowledgements were booked anew, so that levels must be found again.
    """
    main, nodes = state.main[0], len(state.node)
    wholesale = 4 * main.touched > main.heap_size  # moving items one by one would cost more than a new heap
    for i in range(main.touched):
        slot = state.stacks[TOUCHED, i]
        flow = state.flow[slot]
        flow.touched = 0
        if flow.ident < 0:
            continue
        start, rate = slot * main.width, flow.cap
        for j in range(start, start + flow.crossings):
            rate = min(rate, state.level[state.crossing[j].link] * state.crossing[j].per_byte)
        if rate != flow.rate:
            settle(state, slot, now_ns)
            flow.rate = rate
            flow.finish_ns = later(now_ns, flow.remaining / rate) if rate > 0 else NEVER
        if rate > flow.booked or rate < flow.booked / (1 + BOOKING_STEP) ** 2:
            flow.booked = rate * (1 + BOOKING_STEP)
            for j in range(start + flow.forward, start + flow.crossings):
                enqueue(state, state.crossing[j].link)
        grow_ns = _growth_ns(now_ns, flow.round_trip_s + queue_s(state, flow.target))
        if rate < flow.cap and flow.grow_ns == grow_ns:  # an earlier solve of this instant saw only some of its changes
            flow.grow_ns = NEVER
        if rate == flow.cap and flow.window < flow.window_limit and flow.grow_ns == NEVER:
            flow.grow_ns = grow_ns
        item, due_ns = nodes + slot, min(flow.finish_ns, flow.grow_ns)
        if wholesale:
            state.due_ns[item] = due_ns
            append(state, item)
        elif due_ns != state.due_ns[item] or state.place[item] < 0:
            schedule(state, item, due_ns)
    if wholesale:
        rebuild(state)
    main.touched = 0
    return bool(main.ring_size == 0)
