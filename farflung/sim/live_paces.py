"""Members' paces from their phases: how long each takes for its local steps, and how much that differs.

A phase is what passes from one anchor to a member's update. What slows all members in a round alike (a busy machine
that they share) moves the mean only; what slows one makes the others wait, and that is the spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.protocol.errors import ConfigError
from farflung.sim.compute import StepTimes
from farflung.sim.live_logs import Seen
from farflung.sim.rng import stream

STEADY_MAX = 0.7
"""Spread of a phase, in spreads of independent steps, up to which `jitter` can explain it; beyond, episodes do."""

MODELLED_ROUNDS = 400
SLOWDOWN_MAX = 50.0


class Estimate(NamedTuple):
    """A fitted number with its standard error; nan: it was given or assumed, not measured."""

    value: float
    error: float


class Pace(NamedTuple):
    """One member's steps, as `compute.StepTimes` wants them."""

    step_s: float
    jitter: float = 0.0
    busy_every_s: float = 0.0
    busy_for_s: float = 0.0
    busy_slowdown: float = 2.0


def mean_of(values: NDArray[np.float64]) -> Estimate:
    """The mean of independent numbers [r], r at least 2."""
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)))


def text_of(estimate: Estimate) -> str:
    """For people."""
    known = f" +- {estimate.error:.2g}" if math.isfinite(estimate.error) else ""
    return f"{estimate.value:.4g}{known}"


def tidy(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")


def relative_spread(seen: Seen) -> Estimate:
    """Standard deviation of a member's phase, of what is neither its own pace nor the round's common luck.

    Two-way analysis of variance of the logarithms. What slows all members in a round alike is no spread: it does not
    make them wait for each other.
    """
    log_rm = np.log(seen.train_rm)
    rest_rm = log_rm - log_rm.mean(axis=0) - log_rm.mean(axis=1, keepdims=True) + log_rm.mean()
    freedom = (log_rm.shape[0] - 1) * (log_rm.shape[1] - 1)
    spread = math.sqrt(float((rest_rm**2).sum()) / freedom)
    return Estimate(spread, spread / math.sqrt(2 * freedom))


def fit_paces(seen: Seen, beside_s: float) -> tuple[list[Pace], dict[str, Estimate]]:
    """Paces by member. `beside_s` of each phase the simulator adds by itself (encoding, disk)."""
    steps, estimates = seen.genesis.inner_steps, {}
    phases = [mean_of(seen.train_rm[:, member]) for member in range(len(seen.names))]
    spread = relative_spread(seen)
    share = spread.value * math.sqrt(steps)
    if share <= STEADY_MAX:
        jitter = Estimate(share / (1 - share), spread.error * math.sqrt(steps) / (1 - share) ** 2)
        estimates["jitter"] = Estimate(tidy(jitter.value), jitter.error)
        paces = [Pace((phase.value - beside_s) / steps / (1 + jitter.value), jitter.value) for phase in phases]
    else:
        slowdown = _fit_episodes(spread.value)
        estimates["busy_slowdown"] = Estimate(tidy(slowdown), math.nan)
        paces = [_busy(phase.value - beside_s, steps, slowdown) for phase in phases]
    for name, phase, pace in zip(seen.names, phases, paces, strict=True):
        if not pace.step_s > 0:
            raise ConfigError(
                f"member {name}: nothing is left for its {steps} steps of a phase of {phase.value:.3g} s besides "
                f"{beside_s:.3g} s for its update: give a smaller fsync_ms"
            )
        known = phase.error / phase.value
        estimates[f"{name}.step_ms"] = Estimate(pace.step_s * 1e3, pace.step_s * 1e3 * known)
    return paces, estimates


def _busy(phase_s: float, steps: int, slowdown: float) -> Pace:
    """Half of the time `slowdown` times slower, in episodes about as long as a phase; the mean phase is kept."""
    return Pace(phase_s / steps * (1 + 1 / slowdown) / 2, 0.0, phase_s, phase_s, slowdown)


def _fit_episodes(spread: float) -> float:
    """The slowdown that makes phases differ so much. Raises ConfigError if none does."""

    def spread_of(slowdown: float) -> float:
        times = StepTimes(_busy(1.0, 1, slowdown), stream(0, "calibrate", "episodes"))
        phases, now_s = [], 0.0
        for _ in range(MODELLED_ROUNDS):
            phases.append(times.step_s(now_s))
            now_s += phases[-1]
        return float(np.std(np.log(phases)))

    low, high = 1.01, SLOWDOWN_MAX
    if spread_of(high) < spread:
        raise ConfigError(
            f"members differ too much from round to round to be described: calibrate while nothing else runs on their "
            f"machines, got a spread of {100 * spread:.0f} %"
        )
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spread_of(middle) < spread else (low, middle)
    return high


def slowest_s(paces: Sequence[Pace], steps: int) -> float:
    """How long the slowest member's phase takes on average: rounds wait for it."""
    times = [StepTimes(pace, stream(0, "calibrate", "slowest", member)) for member, pace in enumerate(paces)]
    now_s = 0.0
    for _ in range(MODELLED_ROUNDS):
        now_s += max(item.steps_s(now_s, steps) for item in times)
    return now_s / MODELLED_ROUNDS
