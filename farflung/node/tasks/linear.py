"""`builtin:linear`: over-parameterised linear regression, small enough that a test can know the right answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from farflung.node.data import Sharder, uniform_of
from farflung.protocol.errors import ConfigError


@dataclass(frozen=True)
class Linear:
    """Fewer samples than features, so that zero loss is within reach of every method that works."""

    features: int = 64
    """d, the number of parameters."""
    samples: int = 32
    """Rows of data, over all members; below `features` the loss can reach zero."""
    batch: int = 4
    """Rows per step."""
    lr: float = 0.1
    """Plain SGD's learning rate."""
    noise: float = 0.0
    """Amplitude of the uniform noise on the targets."""
    seed: int = 0
    """Data and initial parameters."""

    def __post_init__(self) -> None:
        if min(self.features, self.samples, self.batch) < 1:
            raise ConfigError("features, samples and batch must be at least 1")

    def data(self) -> tuple[Tensor, Tensor]:
        """(inputs [samples, features] with entries of variance about 1 / features, targets [samples])."""
        x_nd = torch.from_numpy(uniform_of(self.samples * self.features, "x", self.seed)).view(-1, self.features)
        x_nd = x_nd * (12 / self.features) ** 0.5
        truth_d = torch.from_numpy(uniform_of(self.features, "truth", self.seed)) * 12**0.5
        noise_n = torch.from_numpy(uniform_of(self.samples, "noise", self.seed)) * (2 * self.noise)
        return x_nd, x_nd @ truth_d + noise_n

    def build_model(self) -> nn.Module:
        """One weight vector, small and random."""
        with torch.device("meta"):
            model = nn.Linear(self.features, 1, bias=False)
        model.to_empty(device="cpu")
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(uniform_of(self.features, "start", self.seed)).view(1, -1) * 0.1)
        return model

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Plain SGD, without state."""
        return torch.optim.SGD(model.parameters(), lr=self.lr)

    def batches(self, shard: Sharder) -> Iterator[list[Tensor]]:
        """Pairs (inputs [batch, features], targets [batch])."""
        return shard(torch.utils.data.TensorDataset(*self.data()), batch=self.batch)

    def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        """Half the mean squared error."""
        return functional.mse_loss(model(batch[0])[:, 0], batch[1]) / 2

    def tokens(self, batch: list[Tensor]) -> int:
        """Rows."""
        return len(batch[0])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """The loss on all samples."""
        device = next(model.parameters()).device
        return float(self.loss(model, [part.to(device) for part in self.data()]))
