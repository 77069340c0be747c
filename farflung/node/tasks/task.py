"""The contract of a task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from farflung.node.data import Sharder
from farflung.protocol.errors import ConfigError

Batch = Any
"""Whatever `batches` yields and `loss` takes. Tensors in it, also nested ones, are moved to the training device."""


@runtime_checkable
class Task(Protocol):
    """Four methods; nothing in them may depend on ambient randomness.

    A task may also have:

    * `tokens(batch) -> int`: what one batch counts for where weights follow tokens (default: `count_tokens`);
    * `lr_at(step) -> float`: the learning rate's factor at a certified global step (default: 1);
    * `evaluate(model) -> float`: validation loss, nats per token, the same number for the same parameters;
    * `sample(model, prompt) -> str`: something to look at;
    * `data_digest() -> str`: hex digest of the data, so that members can see whether they have the same.
    """

    def build_model(self) -> nn.Module:
        """The model, on the CPU. Members with equal options build the same parameters, or adopt the run's anyway."""

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The inner optimiser of the model, which by now is on the training device."""

    def batches(self, shard: Sharder) -> Iterator[Batch]:
        """This member's batches, endless: usually `shard(dataset, batch=...)`."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of one batch: a scalar with a gradient."""


REQUIRED = ("build_model", "build_optimizer", "batches", "loss")


def count_tokens(batch: Batch) -> int:
    """Elements of the batch's tensor: itself, its `input_ids`, or its first member. Raises ConfigError otherwise."""
    if isinstance(batch, Tensor):
        return batch.numel()
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        return int(batch["input_ids"].numel())
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Tensor):
        return batch[0].numel()
    raise ConfigError(f"say how many tokens a batch has (`tokens(batch) -> int`): it is a {type(batch).__name__}")


def bits_per_byte(nats_per_byte: float) -> float:
    """The unit in which byte-level models are compared."""
    return nats_per_byte / math.log(2)
