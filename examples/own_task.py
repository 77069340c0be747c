"""A task of your own: four methods are enough. Any torch model, any optimiser, any map-style dataset.

    cd examples
    farflung new own_task.toml                         # prints the two commands below, complete
    farflung join --task own_task:Thirds               # here
    farflung join --task own_task:Thirds farflung1...  # on the other machines, which have this file, too

Code never travels: whoever joins has the file already, and says with --task that it may run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


@dataclass(frozen=True)
class Thirds:
    """Which third of a circle is a noisy point in? Fields are options: [task_options] of the run file sets them."""

    hidden: int = 32
    batch: int = 32
    lr: float = 1e-2

    def build_model(self) -> nn.Module:
        # Every member starts from the founder's parameters, however it builds its own.
        return nn.Sequential(nn.Linear(2, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 3))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.lr)

    def batches(self, shard) -> Iterator[list[Tensor]]:
        # `shard` hands out this member's share of a dataset: disjoint from the others' in every round.
        return shard(TensorDataset(*_points(4096, seed=0)), batch=self.batch)

    def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        inputs_n2, labels_n = batch
        return nn.functional.cross_entropy(model(inputs_n2), labels_n)

    # From here on optional.

    def tokens(self, batch: list[Tensor]) -> int:
        return len(batch[0])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        device = next(model.parameters()).device
        return float(self.loss(model, [part.to(device) for part in _points(512, seed=1)]))


def _points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    angle_n = torch.rand(count, generator=generator) * 2 * torch.pi
    inputs_n2 = torch.stack([angle_n.cos(), angle_n.sin()], 1) + 0.1 * torch.randn(count, 2, generator=generator)
    return inputs_n2, (angle_n * 3 / (2 * torch.pi)).long().clamp(max=2)
