"""When training waits for its exchanges: layers become ready during a backward pass and queue on one link.

The model behind the utilisation tables of Streaming DiLoCo (arXiv:2501.18512). A step computes for `step_s`: a third of
it forward, two thirds backward, last layer first, all layers alike. What a step sends of a layer is ready when that
layer's backward ends. An exchange (all gradients; all outer gradients; one fragment of layers) is applied as a whole:
the step that needs it starts when its last layer has arrived. Latency and the cost of combining are left out.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from farflung.protocol.errors import ConfigError

ROUNDS_MAX = 5_000
"""Rounds that have not become alike by then fall behind by less than a step in thousands: the mean of half is taken."""

TOLERANCE_STEPS = 1e-9
"""Two states whose times differ by less, in steps, are the same."""


@dataclass(frozen=True)
class Schedule:
    """What one round of `inner_steps` steps sends, and when it is needed."""

    inner_steps: int
    """Steps after which everything repeats."""

    layers: int
    """Of the whole model, numbered from 0 in the order of the forward pass."""

    sends: tuple[tuple[int, tuple[int, ...]], ...]
    """(step of the round, layers sent after it), ascending by step."""

    overlap_steps: int = 0
    """Steps that may be computed between sending and applying. 0: the very next step needs it."""

    def __post_init__(self) -> None:
        if self.inner_steps < 1 or self.layers < 1 or self.overlap_steps < 0:
            wrong = (self.inner_steps, self.layers, self.overlap_steps)
            raise ConfigError(f"inner_steps and layers start at 1, overlap_steps at 0: got {wrong}")
        steps = [step for step, _ in self.sends]
        if steps != sorted(set(steps)) or any(not 0 <= step < self.inner_steps for step in steps):
            raise ConfigError(f"sends name different steps of the round, ascending: got {steps}")
        for _, sent in self.sends:
            if not sent or len(set(sent)) < len(sent) or any(not 0 <= layer < self.layers for layer in sent):
                raise ConfigError(f"a send names different layers below {self.layers}: got {list(sent)}")


def whole_model(*, inner_steps: int, layers: int) -> Schedule:
    """Everything after the last step of a round; with `inner_steps` = 1 this is data-parallel training."""
    return Schedule(inner_steps, layers, ((inner_steps - 1, tuple(range(layers))),))


def fragments(*, inner_steps: int, layers: int, fragment_layers: int, overlap_steps: int) -> Schedule:
    """Streaming: n = ceil(layers / fragment_layers) fragments; fragment k is sent after step floor(k inner_steps / n).

    Layer i belongs to fragment i mod n (the strided pattern of arXiv:2501.18512). Fragments that fall on one step
    travel together.
    """
    if fragment_layers < 1:
        raise ConfigError(f"fragment_layers must be at least 1, got {fragment_layers}")
    count = -(-layers // fragment_layers)
    sent_by_step: dict[int, list[int]] = {}
    for fragment in range(count):
        sent_by_step.setdefault(fragment * inner_steps // count, []).extend(range(fragment, layers, count))
    sends = tuple((step, tuple(sorted(sent))) for step, sent in sorted(sent_by_step.items()))
    return Schedule(inner_steps, layers, sends, overlap_steps)


def steady_utilisation(schedule: Schedule, *, step_s: float, layer_transfer_s: float) -> float:
    """Share of the time that is computing, in (0, 1], once the pattern of computing and waiting repeats.

    `layer_transfer_s` is how long the link needs for one layer. There is no run length to choose: rounds are played
    until two of them end alike (how far the link is booked, what is still to arrive).
    """
    if not (step_s > 0 and layer_transfer_s >= 0):
        raise ConfigError(f"step_s must be positive, layer_transfer_s not negative: got {(step_s, layer_transfer_s)}")
    transfer = layer_transfer_s / step_s  # from here on, times are in steps
    plan = {step: (len(sent) * transfer, _alone(schedule.layers, sent, transfer)) for step, sent in schedule.sends}
    round_steps, overlap = schedule.inner_steps, schedule.overlap_steps
    now = booked = 0.0  # the start of the next step; when the link is free again
    due: deque[tuple[int, float]] = deque()  # (step that needs it, when it arrives)
    then = 0.0
    before: tuple[float, ...] = (math.inf,)
    halfway = 0.0
    for played in range(ROUNDS_MAX):
        for step in range(played * round_steps, (played + 1) * round_steps):
            if due and due[0][0] == step:
                now = max(now, due.popleft()[1])
            if step % round_steps in plan:
                busy, alone = plan[step % round_steps]
                booked = max(booked + busy, now + alone)
                due.append((step + 1 + overlap, booked))
            now += 1.0
        # What lies in the past no longer matters: clipped, or the state would never repeat.
        state = tuple(max(0.0, time - now) for time in (booked, *(arrival for _, arrival in due)))
        if _alike(state, before):
            return min(1.0, round_steps / (now - then))
        then, before = now, state
        if played == ROUNDS_MAX // 2 - 1:
            halfway = now
    return min(1.0, (ROUNDS_MAX - ROUNDS_MAX // 2) * round_steps / (now - halfway))


def _alone(layers: int, sent: tuple[int, ...], transfer: float) -> float:
    """When the last of these layers has arrived on an idle link, in steps after the start of the sending step.

    A queue served in order is free at the latest of: some layer becomes ready, and it and all behind it are served.
    """
    ready_then_rest = (
        1 / 3 + 2 / 3 * (layers - layer) / layers + (len(sent) - place) * transfer
        for place, layer in enumerate(sorted(sent, reverse=True))
    )
    return max(ready_then_rest)


def _alike(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return len(one) == len(other) and all(
        abs(a - b) <= TOLERANCE_STEPS * max(1.0, a) for a, b in zip(one, other, strict=True)
    )
