"""What happens next: a binary heap of items by (due_ns, tie) in which every item can be moved or taken out.

An item is in the heap at most once, so the heap is never longer than there are nodes and active flows.
"""

from __future__ import annotations

from farflung.sim.network.compiling import compiled
from farflung.sim.network.layout import NEVER, State


@compiled
def first_ns(state: State) -> int:
    """When the earliest item is due, or NEVER."""
    return state.due_ns[state.heap[0]] if state.main[0].heap_size > 0 else NEVER


@compiled
def schedule(state: State, item: int, due_ns: int) -> None:
    """Put an item at this time, wherever it was before. One that is due NEVER is kept, last."""
    state.due_ns[item] = due_ns
    append(state, item)
    _settle_in(state, state.place[item])


@compiled
def append(state: State, item: int) -> None:
    """See that an item is in the heap, at any place; `rebuild` must follow."""
    if state.place[item] < 0:
        main = state.main[0]
        state.heap[main.heap_size] = item
        state.place[item] = main.heap_size
        main.heap_size += 1


@compiled
def unschedule(state: State, item: int) -> None:
    """Take an item out, if it is in."""
    position = state.place[item]
    state.due_ns[item] = NEVER
    if position >= 0:
        main = state.main[0]
        state.place[item] = -1
        main.heap_size -= 1
        last = main.heap_size
        if position != last:
            state.heap[position] = state.heap[last]
            state.place[state.heap[position]] = position
            _settle_in(state, position)


@compiled
def _before(state: State, a: int, b: int) -> bool:
    due_a, due_b = state.due_ns[a], state.due_ns[b]
    return bool(due_a < due_b or (due_a == due_b and state.tie[a] < state.tie[b]))


@compiled
def _settle_in(state: State, position: int) -> None:
    """Move the item at this position up or down, in a heap that is one but for it."""
    item = state.heap[position]
    while position > 0:
        parent = (position - 1) >> 1
        above = state.heap[parent]
        if not _before(state, item, above):
            break
        state.heap[position] = above
        state.place[above] = position
        position = parent
    state.heap[position] = item
    _sink(state, position)


@compiled
def _sink(state: State, position: int) -> None:
    """Move the item at this position down past everything that is due before it."""
    item = state.heap[position]
    size = state.main[0].heap_size
    while True:
        child = 2 * position + 1
        if child >= size:
            break
        if child + 1 < size and _before(state, state.heap[child + 1], state.heap[child]):
            child += 1
        below = state.heap[child]
        if not _before(state, below, item):
            break
        state.heap[position] = below
        state.place[below] = position
        position = child
    state.heap[position] = item
    state.place[item] = position


@compiled
def rebuild(state: State) -> None:
    """Make a heap of items whose times were changed in place: cheaper than moving each when most have changed."""
    for position in range((state.main[0].heap_size >> 1) - 1, -1, -1):
        _sink(state, position)
