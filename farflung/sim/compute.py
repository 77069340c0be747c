"""How long local training takes: what a machine can do, what a model asks of it, and how even its steps are."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from farflung.protocol.errors import ConfigError

T = 1e12


class Gpu(NamedTuple):
    """One device: peak dense FLOP/s on 16-bit inputs (never "with sparsity"), decimal GB of memory, default MFU."""

    peak: float
    memory_gb: float
    mfu: float


GPUS: dict[str, Gpu] = {
    "b200": Gpu(2250 * T, 180, 0.40),
    "h200": Gpu(989.4 * T, 141, 0.40),
    "h100": Gpu(989.4 * T, 80, 0.40),
    "a100-80": Gpu(312 * T, 80, 0.45),
    "a100-40": Gpu(312 * T, 40, 0.45),
    "a10": Gpu(125 * T, 24, 0.35),
    "l40s": Gpu(362 * T, 48, 0.35),
    "l4": Gpu(121 * T, 24, 0.35),
    "t4": Gpu(65 * T, 16, 0.25),
    "v100-32": Gpu(125 * T, 32, 0.30),
    "v100": Gpu(125 * T, 16, 0.30),
    "rtx-5090": Gpu(209.5 * T, 32, 0.40),
    "rtx-4090": Gpu(165.2 * T, 24, 0.40),
    "rtx-4080": Gpu(97.5 * T, 16, 0.40),
    "rtx-4070": Gpu(58.3 * T, 12, 0.40),
    "rtx-4060-ti": Gpu(44.1 * T, 16, 0.40),
    "rtx-3090": Gpu(71.2 * T, 24, 0.40),
    "rtx-3080": Gpu(59.5 * T, 10, 0.40),
    "rtx-3060": Gpu(25.5 * T, 12, 0.40),
    "m3-max": Gpu(14.2 * T, 64, 0.30),
    "cpu": Gpu(1.0 * T, 32, 0.30),
}
"""Peaks from NVIDIA's data sheets and architecture white papers (GA102, AD102, GB202, Hopper, Blackwell; SXM versions).

They are dense tensor-core rates with fp32 accumulation, which is what training uses; on GeForce cards that is twice the
shader rate (4090: 82.6 -> 165.2). Lists that set the 3090's tensor rate (71) beside the 4090's shader rate (82.6) mix
two things. t4 and v100 have no bf16: it is their fp16 rate.
rtx-4060-ti is the 16 GB one. m3-max (40 cores, 64 GB) and cpu (8 cores x 4 GHz x 32 FLOP) have no tensor cores: fp32.

Default MFUs are round figures, not measurements of each card: INTELLECT-1 reports 36-43 % on H100 (arXiv:2412.01152);
older cards and those fed by a narrow memory get less. Set `mfu`, or better a measured `step_ms`, where it matters.
"""

OPTIMIZER_BYTES = {"adamw": 8, "adamw-8bit": 2, "momentum": 4, "sgd": 0}
"""Optimiser state per parameter. AdamW keeps two fp32 moments."""

WEIGHT_BYTES = 8
"""fp32 parameters and gradients; or bf16 ones with an fp32 master copy, which is the same (arXiv:1910.02054, §3.1)."""

ASPECT_RATIO = 128
"""Width / layers of large transformers (GPT-3 175B: 12288 / 96; arXiv:2005.14165, Table 2.1)."""

MICRO_BATCH_TOKENS = 2048
"""Tokens in the device at once, at least: one usual sequence; the rest of a step is gradient accumulation."""

BLOCK_BYTES = 34
"""Activations of one transformer layer per token and unit of width, attention matrix recomputed (arXiv:2205.05198)."""

EPISODES_AT_ONCE = 64
"""Contention episodes drawn together: a few hours' worth."""


def find_gpu(name: str) -> Gpu:
    """The preset of this name. Raises ConfigError that lists the names."""
    if name not in GPUS:
        raise ConfigError(f"gpu is one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name]


def step_time_s(params: float, tokens: float, peak: float, mfu: float) -> float:
    """Seconds of one training step: 6 P tokens / (peak x MFU) (arXiv:2001.08361, §2.1).

    Attention's own 12 x layers x width x context FLOP per token are left out: scenarios do not say how long a context
    is. They would add context / (6 width): a sixth at 1B parameters and 2,048 tokens, 7 % at 13B. Raises ConfigError
    unless all are positive and MFU is at most 1.
    """
    for name, value in (("params", params), ("tokens", tokens), ("peak", peak), ("mfu", mfu)):
        if not 0 < value < math.inf:
            raise ConfigError(f"a step time needs {name} above 0, got {value:g}")
    if mfu > 1:
        raise ConfigError(f"mfu is a share of the peak, at most 1, got {mfu:g}")
    return 6 * params * tokens / (peak * mfu)


def usual_layers(params: float) -> int:
    """Layers of a transformer of this size: 12 layers x width^2 parameters, width = 128 layers. At least 1."""
    return max(1, round(math.cbrt(params / (12 * ASPECT_RATIO**2))))


def memory_bytes(params: float, optimizer: str = "adamw", *, tokens: float = 0.0, layers: int = 0) -> float:
    """What training holds on the device: parameters, gradients, optimiser, and activations if `tokens` is given.

    AdamW: 16 bytes per parameter. Activations are the least that training needs: every layer recomputed from its
    input, one sequence (`MICRO_BATCH_TOKENS`, or all tokens of a smaller step) at a time. Anchor and outer state lie in
    the host's memory. `layers` 0: the usual ones. Raises ConfigError for an unknown optimiser.
    """
    if optimizer not in OPTIMIZER_BYTES:
        raise ConfigError(f"optimizer is one of {', '.join(OPTIMIZER_BYTES)}, got {optimizer!r}")
    layers = layers or usual_layers(params)
    width = math.sqrt(params / (12 * layers))
    activations = min(tokens, MICRO_BATCH_TOKENS) * width * (2 * layers + BLOCK_BYTES)
    return params * (WEIGHT_BYTES + OPTIMIZER_BYTES[optimizer]) + activations


def check_memory(params: float, memory_gb: float, *, tokens: float = 0.0, layers: int = 0) -> None:
    """Refuse a model that AdamW cannot train in `memory_gb` (decimal). ConfigError says by how much it is too big."""
    wanted_gb = memory_bytes(params, tokens=tokens, layers=layers) / 1e9
    if wanted_gb > memory_gb:
        raise ConfigError(
            f"{params:.3g} parameters take {wanted_gb:.1f} GB to train with AdamW (16 bytes each, and activations), "
            f"{wanted_gb - memory_gb:.1f} GB more than there are: choose a smaller model or another device, "
            f"got {memory_gb:g} GB"
        )


class Slowdown(NamedTuple):
    """From start to end every step takes `factor` times as long."""

    start_s: float
    end_s: float
    factor: float


class Paced(Protocol):
    """What `StepTimes` reads of a member."""

    @property
    def step_s(self) -> float:
        """One step of an undisturbed machine: the minimum, not the mean."""

    @property
    def jitter(self) -> float:
        """Mean of what is added to a step, in steps."""

    @property
    def busy_every_s(self) -> float:
        """Mean time from the end of one contention episode to the next; 0: none."""

    @property
    def busy_for_s(self) -> float:
        """Mean length of an episode."""

    @property
    def busy_slowdown(self) -> float:
        """How much slower steps are meanwhile."""


class StepTimes:
    """One member's step durations in virtual time.

    A step is work of `step_s x (1 + jitter x Exp(1))` seconds (shifted exponential, arXiv:1512.02673): `step_s` is the
    minimum and `step_s x (1 + jitter)` the mean. Work done inside a contention episode takes `busy_slowdown` times as
    long, also if the step began before it. Episodes and the pauses between them are exponential and lie on the clock,
    whoever asks; at time 0 an episode is on with the share of time it has in the long run, which leaves the mean pace
    (every + for / slowdown) / (every + for). `slowdowns` (faults) multiply with them.
    """

    def __init__(self, spec: Paced, generator: np.random.Generator, slowdowns: Sequence[Slowdown] = ()) -> None:
        if not 0 < spec.step_s < math.inf:
            raise ConfigError(f"a step takes time: step_s must be above 0, got {spec.step_s:g}")
        self._spec = spec
        self._work, self._episodes = generator.spawn(2)
        self._slowdowns = tuple(slowdowns)
        self._edges = sorted({edge for item in slowdowns for edge in (item.start_s, item.end_s)})
        self._turns: list[float] = [0.0]
        """When quiet and busy take turns; the first stretch begins at 0."""
        share = spec.busy_for_s / (spec.busy_every_s + spec.busy_for_s) if spec.busy_every_s else 0.0
        self._busy_first = bool(spec.busy_every_s) and float(self._episodes.random()) < share

    def step_s(self, now_s: float) -> float:
        """How long the next step takes if it begins now."""
        return self.steps_s(now_s, 1)

    def steps_s(self, now_s: float, count: int) -> float:
        """How long the next `count` steps take, back to back from now.

        The same distribution as one by one, at the cost of one draw: a sum of `count` exponentials is Gamma(count).
        """
        if count < 1:
            return 0.0
        spec = self._spec
        extra = spec.jitter * float(self._work.standard_gamma(count)) if spec.jitter else 0.0
        return self._elapsed_s(now_s, spec.step_s * (count + extra))

    def factor(self, now_s: float) -> float:
        """How many times slower than undisturbed the machine is now."""
        return self._pace(now_s)[0]

    def _elapsed_s(self, now_s: float, work_s: float) -> float:
        elapsed = 0.0
        while True:
            factor, until_s = self._pace(now_s + elapsed)
            room_s = until_s - (now_s + elapsed)
            if work_s * factor <= room_s:
                return elapsed + work_s * factor
            work_s -= room_s / factor
            elapsed = until_s - now_s

    def _pace(self, at_s: float) -> tuple[float, float]:
        """The factor at a time, and until when it holds."""
        factor, until_s = 1.0, math.inf
        if self._spec.busy_every_s:
            self._draw_until(at_s)
            turn = bisect_right(self._turns, at_s)
            until_s = self._turns[turn]
            if (turn % 2 == 1) == self._busy_first:
                factor = self._spec.busy_slowdown
        if self._slowdowns:
            for item in self._slowdowns:
                factor *= item.factor if item.start_s <= at_s < item.end_s else 1.0
            edge = bisect_right(self._edges, at_s)
            until_s = min(until_s, self._edges[edge]) if edge < len(self._edges) else until_s
        return factor, until_s

    def _draw_until(self, at_s: float) -> None:
        """Draw episodes until one ends after `at_s`. How they are drawn does not depend on who asks when."""
        spec = self._spec
        means = (spec.busy_for_s, spec.busy_every_s) if self._busy_first else (spec.busy_every_s, spec.busy_for_s)
        while self._turns[-1] <= at_s:
            lengths = self._episodes.standard_exponential((EPISODES_AT_ONCE, 2)) * np.array(means)
            self._turns += (self._turns[-1] + np.cumsum(lengths.reshape(-1))).tolist()
