"""Max-min fair rates repaired where they changed: exact, and local where the network is sparse.

Every link keeps a water level: the bytes per second it grants each flow, such that it is full if each takes no more
than its other limits allow, sum over flows of min(level, want) = capacity. Data want share x the least of the flow's
cap and of level / share at its other links; acknowledgements want what was booked for them. A flow's rate is that least
over all its links. At a fixed point no link is over its capacity, and every flow meets its cap or a full link on which
nobody takes more bytes than it does: the definition in `filling`. It is reached in finitely many steps from any start:
the lowest true level needs nothing else, the second lowest only that one, and so on.

So after a change only links whose demands changed are looked at again, first come, first served.
"""

from __future__ import annotations

import math

from farflung.sim.network.compiling import compiled
from farflung.sim.network.layout import TOUCHED, WATCHED, Numbers, State

AGREEMENT = 1e-13
"""A level this close to the old one, relatively, is the old one: rounding would otherwise travel for ever. The old
level is what the neighbours see, so differences do not add up: no link is further than this from its fixed point."""

LOOSER = 4.0
"""Where levels found anew do not settle, either (never seen), agreement is loosened by this until they do."""

SLACK_MARGIN = 1e-6
"""Share of its capacity that a link must have left to be taken for not full without a look at what crosses it. What is
left is kept by adding and subtracting: each step may err by 1e-16 of the capacity, and any look starts afresh."""


@compiled
def touch(state: State, slot: int) -> None:
    """This flow's rate may have changed in this instant."""
    if state.flow[slot].touched == 0:
        state.flow[slot].touched = 1
        state.stacks[TOUCHED, state.main[0].touched] = slot
        state.main[0].touched += 1


@compiled
def enqueue(state: State, link: int) -> None:
    """This link's level must be found anew."""
    if state.link[link].queued == 0:
        main = state.main[0]
        state.link[link].queued = 1
        end = main.ring_first + main.ring_size
        size = len(state.ring)
        state.ring[end - size if end >= size else end] = link
        main.ring_size += 1


@compiled
def _watch(state: State, link: int) -> None:
    """If this link is a fifo uplink, its queue may begin to fill or drain in this instant."""
    if link < len(state.node) and state.node[link].buffer_bytes > 0 and state.node[link].watched == 0:
        main = state.main[0]
        state.node[link].watched = 1
        state.stacks[WATCHED, main.watched] = link
        main.watched += 1


@compiled
def find_levels(state: State) -> None:
    """Find the levels of all queued links and of all that depend on them; or all anew, if that is the lesser evil."""
    main = state.main[0]
    if main.looks_max >= 0 and _repair(state, main.looks_max * main.crossings, AGREEMENT):
        return
    main.refills += 1
    for slot in range(len(state.flow)):
        if state.flow[slot].ident >= 0:
            touch(state, slot)
    for link in range(len(state.link)):
        state.level[link] = math.inf
        enqueue(state, link)
    agreement = AGREEMENT
    while not _repair(state, 1000 * main.crossings, agreement):
        agreement *= LOOSER


@compiled
def _repair(state: State, budget: int, agreement: float) -> bool:
    """Work off the queue. False, with links still in it, if that took more than `budget` looks at crossings."""
    main = state.main[0]
    limit = main.visits + budget
    while main.ring_size > 0:
        if main.visits > limit:
            return False
        link = state.ring[main.ring_first]
        main.ring_first = main.ring_first + 1 if main.ring_first + 1 < len(state.ring) else 0
        main.ring_size -= 1
        state.link[link].queued = 0
        _watch(state, link)
        old, new = state.level[link], _level(state, link)
        if new != old and math.fabs(new - old) > agreement * min(new, old):
            state.level[link] = new
            _tell_neighbours(state, link, old, new, agreement)
    return True


@compiled
def _level(state: State, link: int) -> float:
    """The water level of a link, given everybody else's. Leaves what its crossings want in `state.demand`."""
    crossings, flows, levels, demand = state.crossing, state.flow, state.level, state.demand
    width, old, capacity = state.main[0].width, levels[link], state.link[link].capacity
    count, wanted = 0, 0.0
    crossing = state.link[link].head
    while crossing >= 0:
        here = crossings[crossing]
        flow = flows[here.flow]
        least = flow.cap
        start = here.flow * width
        for other in range(start, start + flow.crossings):
            if other != crossing:
                least = min(least, levels[crossings[other].link] * crossings[other].per_byte)
        demand[count, 0] = least
        demand[count, 1] = here.share * (least if crossing < start + flow.forward else flow.booked)
        wanted += demand[count, 1]
        count += 1
        crossing = here.next
    state.main[0].visits += count
    if count == 0 or wanted <= capacity:
        state.link[link].slack = capacity - wanted
        return math.inf
    lowest = capacity / count
    return _water(demand, count, capacity, lowest, old if old < math.inf else lowest)


@compiled
def _water(demand: Numbers, count: int, capacity: float, lowest: float, guess: float) -> float:
    """Solve sum min(level, wanted) = capacity by Newton's method, which is exact: the sum is piecewise linear.

    The sum is concave, so one step from any guess ends at or below the solution, and further steps only rise to it.
    """
    level, rising_to_it = guess, False
    while True:
        frozen, above, highest_frozen, next_wanted = 0.0, 0, 0.0, math.inf
        for i in range(count):
            if demand[i, 1] <= level:
                frozen += demand[i, 1]
                highest_frozen = max(highest_frozen, demand[i, 1])
            else:
                above += 1
                next_wanted = min(next_wanted, demand[i, 1])
        if above == 0:  # only from a guess above everything, or by rounding
            if rising_to_it:
                return level
            level, rising_to_it = lowest, True
            continue
        better = max((capacity - frozen) / above, lowest)
        if (highest_frozen <= better < next_wanted) or (rising_to_it and better <= level):
            return better
        level, rising_to_it = better, True


@compiled
def _tell_neighbours(state: State, link: int, old: float, new: float, agreement: float) -> None:
    """Queue the links that this level makes a difference to. Uses the demands that `_level` has just left.

    Of two links that are full at one rate either may be the one that does not limit: that is no difference.
    """
    crossings, flows, levels, demand = state.crossing, state.flow, state.level, state.demand
    width, i, crossing = state.main[0].width, 0, state.link[link].head
    while crossing >= 0:
        here = crossings[crossing]
        before, after = min(demand[i, 0], old * here.per_byte), min(demand[i, 0], new * here.per_byte)
        if before != after:
            touch(state, here.flow)
        if math.fabs(before - after) > agreement * min(before, after):
            start = here.flow * width
            for j in range(start, start + flows[here.flow].forward):
                other = crossings[j].link
                if j == crossing:
                    continue
                if levels[other] < math.inf:
                    enqueue(state, other)
                else:
                    theirs = state.link[other]
                    theirs.slack -= crossings[j].share * (after - before)
                    if not theirs.slack > SLACK_MARGIN * theirs.capacity:
                        enqueue(state, other)
        i += 1
        crossing = here.next
