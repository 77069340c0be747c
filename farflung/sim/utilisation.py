"""Which share of its time a swarm computes: what published tables say, from their descriptions.

    required_bandwidth_gbit   the bandwidth at which training in data centres reaches a utilisation (layer by layer)
    utilisation               the same model the other way round: the utilisation at a bandwidth
    predicted_utilisation     a plain synchronous swarm that averages by ring all-reduce over TCP (one formula)
    literature_utilisation    the formula usually quoted, for comparison: too simple by half

Utilisations are fractions (0.5 is 50 %), everywhere. These are closed models of homogeneous machines; for links that
differ, churn and stragglers ask the simulator itself (`timing.py`, `world.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from farflung.protocol.errors import ConfigError
from farflung.sim import overlap

LINE_EFFICIENCY = 0.9
"""The one calibrated constant of `predicted_utilisation`: share of a line's nominal rate that payload gets.

Rounded from a fit to the eight cells H = 8 and 128 x 50 Mbit/s to 5 Gbit/s of github.com/Adnan082/diloco-measured
(@07b7885, Apache-2.0; four L40S, 30.8M fp32 parameters, NCCL over TCP, tc tbf with 32 kB bursts, 27 ms per step):
median error 5.6 %, largest 18.8 %; 0.895 .. 0.905 keep them below 6 % and 20 %. Headers alone would cost 4 %."""

INNER_STEPS = 100
"""H of the published table."""

FRAGMENT_LAYERS = 3
"""Layers of a streaming fragment in the published table."""

_SWEEPS_MAX = 10
"""How many times the published sweep (four decades) the search goes on beyond either end."""

_SWEEP_POINTS = 50


@dataclass(frozen=True)
class Method:
    """What a training method sends, and how often."""

    every_step: bool
    """Gradients after each step (True), or outer gradients once in H steps."""

    in_fragments: bool
    """The model goes out in fragments spread over the H steps, or all at once after the last."""

    overlap_steps: int
    """Steps computed while an exchange is under way."""

    bits_per_param: float
    """On the wire."""


METHODS = {
    "data_parallel": Method(every_step=True, in_fragments=False, overlap_steps=0, bits_per_param=16),
    "vanilla_diloco": Method(every_step=False, in_fragments=False, overlap_steps=0, bits_per_param=16),
    "streaming_diloco": Method(every_step=False, in_fragments=True, overlap_steps=0, bits_per_param=16),
    "streaming_overlapped": Method(every_step=False, in_fragments=True, overlap_steps=1, bits_per_param=16),
    "streaming_overlapped_fp4": Method(every_step=False, in_fragments=True, overlap_steps=1, bits_per_param=4),
}
"""The five methods of Table 4 of arXiv:2501.18512: bf16 on the wire unless the name says FP4."""


def grid_gbit(place: int) -> float:
    """Bandwidth number `place` of the published sweep, `logspace(-1, 3, 50)` Gbit/s: 0 .. 49, each 1.21 times the last.

    Other places continue the sweep at the same ratio, to both sides.
    """
    return float(10 ** (4 * place / (_SWEEP_POINTS - 1) - 1))


def utilisation(
    *,
    params: float,
    layers: int,
    step_s: float,
    method: str,
    gbit: float,
    inner_steps: int | None = None,
    fragment_layers: int | None = None,
    members: int = 2,
) -> float:
    """Share of the time that is computing, in (0, 1], when each member has a link of `gbit` Gbit/s.

    params          of the whole model, spread evenly over its `layers`
    step_s          seconds one inner step computes: a third forward, two thirds backward
    method          one of METHODS
    inner_steps     H, 100 by default; not for data_parallel, which exchanges every step
    fragment_layers layers of a fragment, 3 by default; for the streaming methods only
    members         a ring moves 2 (1 - 1 / members) times the payload over each link; 1 member sends nothing

    The model is that of `overlap.py`, in its steady state; nothing in it is fitted. Latency is left out. Raises
    ConfigError for an unknown method, a setting that the method does not have, and impossible numbers.
    """
    at_gbit = _forward(params, layers, step_s, method, inner_steps, fragment_layers, members)
    return at_gbit(_positive("gbit", gbit))


def required_bandwidth_gbit(
    *,
    params: float,
    layers: int,
    step_s: float,
    method: str,
    target: float,
    inner_steps: int | None = None,
    fragment_layers: int | None = None,
    members: int = 2,
    reading: str = "published",
) -> float:
    """Gbit/s each member needs for a compute utilisation of `target`: the cells of Table 4 of arXiv:2501.18512.

    `target` is a fraction between 0 and 1 (0.5 for 50 %; 50 is refused); the others are the arguments of `utilisation`.
    The answer is a point of the published sweep, `grid_gbit(place)`, so its resolution is a factor of 1.21; needs below
    0.1 or above 1000 Gbit/s continue that grid. Which point, is the `reading`:

    "published"   the last one whose utilisation does not exceed the target: how the table reads (no fitted parameter:
                  50 of 50 known cells within one grid step, 41 exact). It falls short of the target by up to one step
    "sufficient"  the first one that reaches the target: what to buy

    Raises ConfigError like `utilisation`, and for a target outside (0, 1), a single member, or an unknown reading.
    """
    if not 0 < target < 1:
        raise ConfigError(f"target is a fraction between 0 and 1 (0.5 for 50 %): change it, got {target}")
    if reading not in ("published", "sufficient"):
        raise ConfigError(f'reading must be "published" or "sufficient", got {reading!r}')
    if members < 2:
        raise ConfigError(f"one member needs no bandwidth; members must be at least 2, got {members}")
    at_gbit = _forward(params, layers, step_s, method, inner_steps, fragment_layers, members)
    if reading == "published":
        return grid_gbit(_first_place(lambda place: at_gbit(grid_gbit(place)) > target, target) - 1)
    return grid_gbit(_first_place(lambda place: at_gbit(grid_gbit(place)) >= target, target))


def predicted_utilisation(
    *,
    params: float,
    members: int,
    inner_steps: int,
    step_s: float,
    mbit: float,
    bytes_per_param: float = 4.0,
    line_efficiency: float = LINE_EFFICIENCY,
) -> float:
    """Share of the time that is computing, in (0, 1], of synchronous members on equal lines of `mbit` Mbit/s.

    `inner_steps` steps of `step_s` seconds, then everybody waits for one ring all-reduce: each line carries
    2 (members - 1) / members x params x bytes_per_param bytes at `line_efficiency` of its rate, and nothing overlaps.
    One member alone: 1.0. `line_efficiency` is the only calibrated number; recalibrate it on your own cluster.

    Measured against real runs (see LINE_EFFICIENCY): too high by 19 % where the line is slowest and rounds are short,
    too low by 18 % where it is slow and rounds are long, else within 6 %. Only line_efficiency x step_s matters, so
    the constant also absorbs an error in step_s. Raises ConfigError for impossible numbers.
    """
    if not 0 < line_efficiency <= 1:
        raise ConfigError(
            f"line_efficiency is a share of the line's rate, above 0 and at most 1, got {line_efficiency}"
        )
    compute_s = _whole("inner_steps", inner_steps) * _positive("step_s", step_s)
    ring_bytes = _ring_factor(members) * _positive("params", params) * _positive("bytes_per_param", bytes_per_param)
    return compute_s / (compute_s + 8 * ring_bytes / (line_efficiency * 1e6 * _positive("mbit", mbit)))


def literature_utilisation(
    *, params: float, inner_steps: int, step_s: float, mbit: float, bytes_per_param: float = 4.0
) -> float:
    """The formula usually quoted, CU = H t / (H t + S / B): the payload once over the line at its full rate.

    For comparison only. Over all 48 runs behind LINE_EFFICIENCY's source it is off by 45 % (median) and 89 % (largest).
    """
    compute_s = _whole("inner_steps", inner_steps) * _positive("step_s", step_s)
    payload_bytes = _positive("params", params) * _positive("bytes_per_param", bytes_per_param)
    return compute_s / (compute_s + 8 * payload_bytes / (1e6 * _positive("mbit", mbit)))


def _forward(
    params: float,
    layers: int,
    step_s: float,
    name: str,
    inner_steps: int | None,
    fragment_layers: int | None,
    members: int,
) -> Callable[[float], float]:
    """Check everything once; return utilisation as a function of Gbit/s, which never falls."""
    if name not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}; got {name!r}")
    method = METHODS[name]
    schedule = _schedule(name, method, _whole("layers", layers), inner_steps, fragment_layers)
    layer_bits = _ring_factor(members) * method.bits_per_param * _positive("params", params) / layers
    seconds = _positive("step_s", step_s)
    return lambda gbit: overlap.steady_utilisation(schedule, step_s=seconds, layer_transfer_s=layer_bits / (1e9 * gbit))


def _schedule(
    name: str, method: Method, layers: int, inner_steps: int | None, fragment_layers: int | None
) -> overlap.Schedule:
    if method.every_step and inner_steps is not None:
        raise ConfigError(f"{name} exchanges every step: leave inner_steps out, got {inner_steps}")
    if not method.in_fragments and fragment_layers is not None:
        raise ConfigError(f"{name} has no fragments: leave fragment_layers out, got {fragment_layers}")
    if method.every_step:
        return overlap.whole_model(inner_steps=1, layers=layers)
    steps = INNER_STEPS if inner_steps is None else _whole("inner_steps", inner_steps)
    if not method.in_fragments:
        return overlap.whole_model(inner_steps=steps, layers=layers)
    size = FRAGMENT_LAYERS if fragment_layers is None else _whole("fragment_layers", fragment_layers)
    return overlap.fragments(inner_steps=steps, layers=layers, fragment_layers=size, overlap_steps=method.overlap_steps)


def _first_place(enough: Callable[[int], bool], target: float) -> int:
    """The first place of the grid where `enough`, which stays true from there on. Bisection."""
    low, high = -1, _SWEEP_POINTS - 1
    for _ in range(_SWEEPS_MAX):
        if not enough(low):
            break
        low, high = low - _SWEEP_POINTS, low
    for _ in range(_SWEEPS_MAX):
        if enough(high):
            break
        low, high = high, high + _SWEEP_POINTS
    if enough(low) or not enough(high):
        raise ConfigError(f"no bandwidth worth naming gives this target: move it away from 0 and 1, got {target}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _ring_factor(members: int) -> float:
    """How many times its payload a member's line carries, each way, in a ring all-reduce: 2 (1 - 1 / members)."""
    return 2 * (1 - 1 / _whole("members", members))


def _whole(name: str, value: int) -> int:
    if not math.isfinite(value) or int(value) != value or value < 1:
        raise ConfigError(f"{name} must be a whole number from 1 on, got {value}")
    return int(value)


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} must be a positive number, got {value}")
    return float(value)
