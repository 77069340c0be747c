"""What happens when: arrivals, ends, growing windows, filling queues, changing links; one solve for all of one instant.

Python calls these through `entries`.
"""

from __future__ import annotations

from farflung.sim.network.compiling import compiled
from farflung.sim.network.flows import apply, count, cross_one_way, detach, later, recap, settle
from farflung.sim.network.heap import first_ns, schedule, unschedule
from farflung.sim.network.layout import FREE, NEVER, WATCHED, Numbers, State
from farflung.sim.network.maxmin import enqueue, find_levels
from farflung.sim.network.topology import FIFO_DUPLEX_LOSS

FULL = 1 - 1e-9
"""A link is full if it carries this share of its capacity."""


BOOKING_ROUNDS = 16
"""Acknowledgements are booked, and what that changes is solved, so often in one instant; two or three suffice."""


@compiled
def solve(state: State, now_ns: int) -> None:
    """Bring levels, rates and queues up to date with everything that changed in this instant."""
    main = state.main[0]
    main.dirty_ns = NEVER
    for _ in range(BOOKING_ROUNDS):
        main.solves += 1
        find_levels(state)
        if apply(state, now_ns):
            break
    for i in range(main.watched):
        node = state.stacks[WATCHED, i]
        state.node[node].watched = 0
        _watch_queue(state, node, now_ns)
    main.watched = 0


@compiled
def _saturated(state: State, node: int) -> bool:
    """Whether data waits in this node's uplink: it is full, and not of acknowledgements alone."""
    used, sends, crossing = 0.0, False, state.link[node].head
    while crossing >= 0:
        here = state.crossing[crossing]
        flow = state.flow[here.flow]
        used += here.share * (flow.rate if flow.source == node else flow.booked)
        sends = sends or flow.source == node
        crossing = here.next
    return sends and used >= state.link[node].capacity * FULL


@compiled
def _watch_queue(state: State, node: int, now_ns: int) -> None:
    """A fifo queue is full once its uplink was saturated for as long as the queue takes to send; empty likewise."""
    if _saturated(state, node) == (state.node[node].full == 1):
        unschedule(state, node)
    elif state.due_ns[node] == NEVER:
        capacity = state.link[node].capacity
        wait_s = state.node[node].buffer_bytes / capacity if capacity > 0 else 0.0
        schedule(state, node, later(now_ns, wait_s))


@compiled
def _turn_queue(state: State, node: int) -> None:
    """The queue is full now, or empty: change the caps and shares of all that this node receives."""
    state.node[node].full = 1 - state.node[node].full
    unschedule(state, node)
    _reprice(state, node)


@compiled
def _reprice(state: State, node: int) -> None:
    """Set caps and shares of everything a fifo node receives from the state of its queue."""
    share = 1.0 / (1.0 - FIFO_DUPLEX_LOSS) if state.node[node].full == 1 else 1.0
    crossing = state.link[len(state.node) + node].head
    while crossing >= 0:
        slot = state.crossing[crossing].flow
        flow = state.flow[slot]
        if flow.target == node:
            start = slot * state.main[0].width
            for i in range(start, start + flow.forward):
                state.crossing[i].share, state.crossing[i].per_byte = share, 1.0 / share
            recap(state, slot)
        crossing = state.crossing[crossing].next


@compiled
def _fire(state: State, item: int, now_ns: int) -> None:
    """Do what is due now for one item of the heap."""
    main, nodes = state.main[0], len(state.node)
    main.dirty_ns = now_ns
    if item < nodes:
        _turn_queue(state, item)
        return
    slot = item - nodes
    flow = state.flow[slot]
    if flow.finish_ns <= now_ns:
        count(state, slot, flow.remaining)
        done = state.done[main.done]
        done.ident, done.window, done.end_ns = flow.ident, flow.window, now_ns
        main.done += 1
        detach(state, slot)
        return
    flow.grow_ns = NEVER
    if flow.rate == flow.cap:  # otherwise something else limits it: no events until that changes
        flow.window = min(2 * flow.window, flow.window_limit)
        recap(state, slot)
    schedule(state, item, flow.finish_ns)


@compiled
def advance(state: State, now_ns: int) -> tuple[int, int]:
    """Let everything happen that is due by now. Returns how many flows completed, and when something is due next.

    If flows completed now, this instant is left to be solved later, since others will probably begin; due is now then.
    """
    main = state.main[0]
    main.done = 0
    while True:
        instant_ns = min(int(main.dirty_ns), first_ns(state))
        if instant_ns == NEVER or instant_ns > now_ns:
            return main.done, instant_ns
        while first_ns(state) == instant_ns:
            _fire(state, state.heap[0], instant_ns)
        if instant_ns == now_ns and main.done > 0:
            return main.done, now_ns
        solve(state, instant_ns)


@compiled
def settle_now(state: State) -> int:
    """Solve the latest instant if that is still to be done. Returns when something is due next."""
    if state.main[0].dirty_ns < NEVER:
        solve(state, state.main[0].dirty_ns)
    return first_ns(state)


@compiled
def start(
    state: State, ident: int, source: int, target: int, line_bytes: float, now_ns: int,
    round_trip_s: float, window: float, window_limit: float,
) -> int:  # fmt: skip
    """A new flow, without a rate until this instant is solved. There must be a free slot, which is returned."""
    main = state.main[0]
    main.dirty_ns = now_ns
    main.free_size -= 1
    slot = state.stacks[FREE, main.free_size]
    flow = state.flow[slot]
    flow.ident, flow.source, flow.target = ident, source, target
    flow.since_ns, flow.grow_ns = now_ns, NEVER
    flow.finish_ns = now_ns if line_bytes <= 0 else NEVER
    flow.remaining, flow.rate, flow.booked, flow.round_trip_s = line_bytes, 0.0, 0.0, round_trip_s
    flow.window, flow.window_limit = window, window_limit
    share = 1.0 / (1.0 - FIFO_DUPLEX_LOSS) if state.node[target].full == 1 else 1.0
    flow.crossings = 0
    cross_one_way(state, slot, source, target, share)
    flow.forward = flow.crossings
    if main.ack_share > 0:
        cross_one_way(state, slot, target, source, main.ack_share)
    state.tie[len(state.node) + slot] = ident
    recap(state, slot)
    return int(slot)


@compiled
def cancel(state: State, slot: int, now_ns: int) -> float:
    """End a flow before its time. Returns the bytes on the line that it still had to move."""
    state.main[0].dirty_ns = now_ns
    settle(state, slot, now_ns)
    detach(state, slot)
    return float(state.flow[slot].remaining)


@compiled
def set_capacity(state: State, link: int, capacity: float, now_ns: int) -> None:
    """A link is faster or slower from now on."""
    state.main[0].dirty_ns = now_ns
    state.link[link].capacity = capacity
    enqueue(state, link)
    if link < len(state.node) and state.node[link].full == 1:
        _reprice(state, link)


@compiled
def use(state: State, used: Numbers) -> None:
    """Bytes on the line per second that each link carries now, what bursts waste included."""
    for link in range(len(state.link)):
        used[link] = 0.0
        crossing = state.link[link].head
        while crossing >= 0:
            here = state.crossing[crossing]
            used[link] += here.share * state.flow[here.flow].rate
            crossing = here.next


@compiled
def totals(state: State, now_ns: int, sent: Numbers, received: Numbers) -> None:
    """Bytes on the line that each node sent and received by now. Changes nothing, so asking leaves no trace."""
    for node in range(len(state.node)):
        sent[node], received[node] = state.node[node].sent, state.node[node].received
    for slot in range(len(state.flow)):
        flow = state.flow[slot]
        if flow.ident >= 0:
            moved = min(flow.rate * ((now_ns - flow.since_ns) * 1e-9), flow.remaining)
            sent[flow.source] += moved
            received[flow.target] += moved
            sent[flow.target] += state.main[0].ack_share * moved
            received[flow.source] += state.main[0].ack_share * moved
