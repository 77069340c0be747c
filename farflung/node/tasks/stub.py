"""`builtin:stub`: a model of any size that is never trained: for measuring transfers, not learning.

Each step adds pseudo-noise to every parameter at the speed of memory, different for every member and step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from farflung.node.data import Sharder, seed_of, uniform_of
from farflung.protocol.errors import ConfigError

NOISE_LENGTH = (1 << 20) + 7
"""One block of noise is cut out at another place for every stretch: a prime-ish length avoids visible periods."""

STRETCH = 1 << 19
"""Parameters that get one cut; half the block, so that there are half a million different ones."""


@dataclass(frozen=True)
class Stub:
    """`params` fp32 numbers in `tensors` equal tensors. A step of 50 million takes about 0.03 s on one core."""

    params: int = 1_000_000
    """Length of the flat vector; a multiple of `tensors`."""
    tensors: int = 1
    """How many tensors it is cut into."""
    scale: float = 1e-3
    """Amplitude of one step's noise."""
    tokens_per_step: int = 1
    """What one step counts for where weights follow tokens."""
    seed: int = 0
    """Initial parameters and noise."""

    def __post_init__(self) -> None:
        if self.params < 1 or self.tensors < 1 or self.params % self.tensors:
            raise ConfigError(f"params must be a positive multiple of tensors, got {self.params} and {self.tensors}")

    def build_model(self) -> StubModel:
        """All members start with the same pseudo-noise."""
        model = StubModel(self.params // self.tensors, self.tensors)
        noise = torch.from_numpy(uniform_of(NOISE_LENGTH, "stub start", self.seed))
        for index, weight in enumerate(model.weights):
            _add_noise(weight.detach().zero_(), noise, 0.02, seed_of("stub", self.seed, index))
        return model

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Not an optimiser at all: its step adds noise."""
        return NoiseOptimizer(cast(StubModel, model), scale=self.scale, seed=self.seed)

    def batches(self, shard: Sharder) -> Iterator[int]:
        """Numbers that no other member gets in this round."""
        return shard(range(1 << 20))

    def loss(self, model: nn.Module, batch: int) -> Tensor:
        """Zero; remembers the batch for the noise."""
        cast(StubModel, model).nudge = batch
        return torch.zeros((), requires_grad=True)

    def tokens(self, batch: int) -> int:
        """As the options say."""
        return self.tokens_per_step

    def evaluate(self, model: nn.Module) -> float:
        """The mean square of the parameters: shows at least that they are the same everywhere."""
        return math.fsum(float(weight.detach().square().mean()) for weight in model.parameters())


class StubModel(nn.Module):
    """Parameters and nothing else."""

    nudge: int = 0

    def __init__(self, length: int, tensors: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(length)) for _ in range(tensors))


class NoiseOptimizer(torch.optim.Optimizer):
    """φ += noise(seed, step, batch)."""

    def __init__(self, model: StubModel, *, scale: float, seed: int) -> None:
        super().__init__(model.parameters(), {"lr": scale})
        self._model, self._seed = model, seed
        self._noise: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Add one block of noise; counts nothing and needs no gradient."""
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if self._noise is None:
                    self._noise = torch.from_numpy(uniform_of(NOISE_LENGTH, "stub noise", self._seed)).to(parameter)
                _add_noise(parameter, self._noise, group["lr"], seed_of(self._seed, self._model.nudge, index))


def _add_noise(tensor: Tensor, noise: Tensor, scale: float, seed: int) -> None:
    flat, free = tensor.view(-1), NOISE_LENGTH - STRETCH
    for number, start in enumerate(range(0, flat.numel(), STRETCH)):
        stretch = flat[start : start + STRETCH]
        cut = (seed + number * 0x9E3779B97F4A7C15) % free
        stretch.add_(noise[cut : cut + stretch.numel()], alpha=scale)
