"""A small byte-level GPT: pre-norm, learned positions, tied embeddings, no biases, no dropout."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from farflung.node.data import uniform_of
from farflung.protocol.errors import ConfigError

VOCABULARY = 256
HEAD_WIDTH = 32


class Gpt(nn.Module):
    """Bytes in, logits of the next byte out.

    About 12 * layers * width^2 + (256 + context) * width parameters, the same bits on every machine for one seed.
    Raises ConfigError if `width` is not a multiple of 32 or a size is below 1.
    """

    def __init__(self, *, layers: int, width: int, context: int, seed: int) -> None:
        if layers < 1 or context < 2 or width < HEAD_WIDTH or width % HEAD_WIDTH:
            raise ConfigError(
                f"a GPT needs layers >= 1, context >= 2 and a width that is a multiple of {HEAD_WIDTH}, "
                f"got {layers}, {context} and {width}"
            )
        super().__init__()
        self.context = context
        with torch.device("meta"):  # draws nothing from the global generator
            self.bytes = nn.Embedding(VOCABULARY, width)
            self.positions = nn.Embedding(context, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
            self.norm = nn.LayerNorm(width, bias=False)
        self.to_empty(device="cpu")
        self._initialise(seed, layers)

    def forward(self, text_bt: Tensor) -> Tensor:
        """[b, t] bytes as int64, t <= context -> [b, t, 256] logits."""
        x_btw = self.bytes(text_bt) + self.positions.weight[: text_bt.shape[1]]
        for block in self.blocks:
            x_btw = block(x_btw)
        return functional.linear(self.norm(x_btw), self.bytes.weight)

    @torch.no_grad()
    def _initialise(self, seed: int, layers: int) -> None:
        """Uniform, deviation 0.5 / sqrt(width); over sqrt(2 * layers) for what writes into the residual stream."""
        usual = 0.5 / math.sqrt(self.bytes.embedding_dim)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            deviation = usual / math.sqrt(2 * layers) if name.endswith(("join.weight", "shrink.weight")) else usual
            noise = torch.from_numpy(uniform_of(parameter.numel(), "gpt", seed, name))
            parameter.copy_(noise.view(parameter.shape) * (deviation * math.sqrt(12)))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a norm and beside a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.split = nn.Linear(width, 3 * width, bias=False)
        self.join = nn.Linear(width, width, bias=False)
        self.norm_perceptron = nn.LayerNorm(width, bias=False)
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.shrink = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_btw: Tensor) -> Tensor:
        """[b, t, w] -> [b, t, w]; position t sees positions up to t."""
        b, t, w = x_btw.shape
        parts = self.split(self.norm_attention(x_btw)).view(b, t, 3, self.heads, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x_btw = x_btw + self.join(mixed.transpose(1, 2).reshape(b, t, w))
        hidden = functional.gelu(self.widen(self.norm_perceptron(x_btw)))
        out: Tensor = x_btw + self.shrink(hidden)
        return out


def mean_loss(model: nn.Module, window_bt: Tensor) -> Tensor:
    """Nats per byte of predicting each byte of the windows but the first."""
    logits: Tensor = model(window_bt[:, :-1])
    loss: Tensor = functional.cross_entropy(logits.flatten(0, 1), window_bt[:, 1:].flatten())
    return loss


@torch.no_grad()
def generate(
    model: nn.Module, prompt: bytes, *, context: int, length: int, temperature: float, generator: torch.Generator
) -> bytes:
    """The prompt and `length` more bytes, drawn one by one with a CPU generator."""
    device = next(model.parameters()).device
    text = list(prompt or b"\n")
    for _ in range(length):
        recent = torch.tensor([text[-context:]], device=device)
        logits = model(recent)[0, -1].float().cpu() / temperature
        text.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
    return bytes(text)
