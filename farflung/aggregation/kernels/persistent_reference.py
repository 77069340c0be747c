"""What the kernels of `persistent` mean: the same functions in torch, one rounded operation at a time.

Axes: w is a window of coordinates. All vectors of a call have one type T, fp32 or fp64; those that come first are
written. With fp32 the three steps are `steps_reference`'s of the same name, with x for θ.
"""

from __future__ import annotations

from torch import Tensor


def plain(x_w: Tensor, delta_w: Tensor, lr: float) -> None:
    """x − η Δ in fp64, rounded once to T."""
    x_w.copy_(x_w.double() - lr * delta_w.double())


def heavy_ball(x_w: Tensor, buffer_w: Tensor, delta_w: Tensor, lr: float, momentum: float) -> None:
    """b' = T(μ b + Δ), x' = T(x − η b')."""
    buffer_w.copy_(momentum * buffer_w.double() + delta_w.double())
    x_w.copy_(x_w.double() - lr * buffer_w.double())


def nesterov(x_w: Tensor, buffer_w: Tensor, delta_w: Tensor, lr: float, momentum: float) -> None:
    """b' = T(μ b + Δ), x' = T(x − η (Δ + μ b'))."""
    buffer_w.copy_(momentum * buffer_w.double() + delta_w.double())
    x_w.copy_(x_w.double() - lr * (delta_w.double() + momentum * buffer_w.double()))


def accelerate(out_w: Tensor, y_w: Tensor, before_w: Tensor, pull_w: Tensor, alpha: float, gamma: float) -> None:
    """T(y − α pull + γ (y − before)), the sums from left to right."""
    wide_w = y_w.double()
    out_w.copy_(wide_w - alpha * pull_w.double() + gamma * (wide_w - before_w.double()))
