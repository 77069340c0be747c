"""`builtin:stdlib-gpt`: a byte-level GPT that learns to write Python from the standard library installed here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from farflung.node.data import Sharder
from farflung.node.tasks.corpus import Windows, read_corpus
from farflung.node.tasks.gpt import Gpt, generate, mean_loss
from farflung.protocol.errors import ConfigError

EVALUATION_BATCH = 32


@dataclass(frozen=True)
class StdlibGpt:
    """0.84 million parameters by default. Data, initial parameters and samples follow from the options alone."""

    layers: int = 4
    """Blocks; time per step is proportional."""
    width: int = 128
    """A multiple of 32. Parameters grow with its square: 12 * layers * width^2 + (256 + context) * width."""
    context: int = 128
    """Bytes the model sees at once."""
    batch: int = 16
    """Windows of `context` bytes per step."""
    lr: float = 2e-3
    """AdamW's learning rate at its peak."""
    warmup: int = 20
    """Global steps over which the learning rate rises."""
    decay_steps: int = 0
    """Global step at which a cosine reaches a tenth of the peak; 0: the rate stays at its peak."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    validation_windows: int = 128
    """Windows of the fixed validation set, spread evenly over the held-out files."""
    seed: int = 0
    """Initial parameters."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.validation_windows < 1 or self.warmup < 0 or self.decay_steps < 0:
            raise ConfigError("batch and validation_windows must be at least 1, warmup and decay_steps at least 0")
        if not 0 < self.lr < math.inf or self.weight_decay < 0:
            raise ConfigError(f"lr must be positive and weight_decay not negative, got {self.lr}, {self.weight_decay}")

    def build_model(self) -> Gpt:
        """The same bits on every machine."""
        return Gpt(layers=self.layers, width=self.width, context=self.context, seed=self.seed)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW; its fused kernel where there is one."""
        parameters = list(model.parameters())
        fused = parameters[0].device.type in ("cpu", "cuda")
        return torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.95), weight_decay=self.weight_decay, fused=fused)

    def batches(self, shard: Sharder) -> Iterator[Tensor]:
        """[batch, context + 1] bytes as int64."""
        return shard(Windows(read_corpus().train, self.context), batch=self.batch, collate=lambda batch: batch)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Nats per byte."""
        return mean_loss(model, batch)

    def tokens(self, batch: Tensor) -> int:
        """Predicted bytes."""
        return batch.shape[0] * (batch.shape[1] - 1)

    def lr_at(self, step: int) -> float:
        """A straight warm-up, then constant, or a cosine down to 0.1."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if not self.decay_steps:
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, self.decay_steps - self.warmup))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Nats per byte on the fixed validation windows."""
        windows = Windows(read_corpus().validation, self.context)
        chosen = np.linspace(0, len(windows) - 1, min(self.validation_windows, len(windows))).astype(int).tolist()
        device, was_training, total = next(model.parameters()).device, model.training, 0.0
        model.eval()
        for start in range(0, len(chosen), EVALUATION_BATCH):
            part = chosen[start : start + EVALUATION_BATCH]
            total += len(part) * float(mean_loss(model, windows.__getitems__(part).to(device)))
        model.train(was_training)
        return total / len(chosen)

    def sample(
        self, model: nn.Module, prompt: str, *, length: int = 200, temperature: float = 0.8, seed: int = 0
    ) -> str:
        """The prompt and `length` more bytes, the same for the same parameters and seed; not UTF-8 becomes U+FFFD."""
        generator = torch.Generator().manual_seed(seed)
        was_training = model.training
        model.eval()
        text = generate(
            model, prompt.encode(), context=self.context, length=length, temperature=temperature, generator=generator
        )
        model.train(was_training)
        return text.decode("utf-8", errors="replace")

    def data_digest(self) -> str:
        """SHA-256 of the corpus: differs between versions of Python."""
        return read_corpus().digest.hex()
