"""Outer optimisers: the step that a round's update takes on the anchor, with the same bytes on every machine.

All vectors are fp32 on the CPU and of one length d; settings are decimal texts, rounded once to fp64. Per coordinate,
every operation below is one fp64 operation with its own rounding, and `f32` is the rounding to what is stored:

    sgd        θ' = f32(θ − η·g)
    nesterov   b' = f32(μ·b + g)     θ' = f32(θ − η·(g + μ·b'))

θ' uses b' as it is stored, so a step can be recomputed from what a snapshot holds. b starts at zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from farflung.aggregation.rows import array_of
from farflung.aggregation.rule import Entries
from farflung.aggregation.spec import parse_call, parse_decimal
from farflung.aggregation.windows import WINDOW, Visit, map_windows
from farflung.protocol.errors import LocalError

T = TypeVar("T")

LR_MAX = 100.0
"""Beyond this an outer learning rate is a slip of the pen: published ones are at most 1."""


class Step(Protocol):
    """One outer step, written to memory that the caller gives."""

    def __call__(
        self,
        theta_d: Tensor,
        momentum_d: Tensor | None,
        update_d: Tensor,
        *,
        theta_out_d: Tensor,
        momentum_out_d: Tensor | None,
        threads: int = 1,
    ) -> None:
        """Each output may be the very memory of any input, or apart from all; the outputs are apart from each other.

        The momenta are None if the optimiser keeps none. Allocates nothing of size d. Same bytes for any thread count
        and any such sharing. Raises LocalError if a vector is not as described.
        """
        ...


class Plan(Protocol):
    """The same step by windows, for callers who have each window of the update in their cache at some time."""

    def __call__(
        self,
        theta_d: Tensor,
        momentum_d: Tensor | None,
        update_d: Tensor,
        *,
        theta_out_d: Tensor,
        momentum_out_d: Tensor | None,
    ) -> Callable[[slice], None]:
        """Checks the vectors like `Step`; what it returns takes the step on one slice, from any thread."""
        ...


SparseStep = Callable[[slice, Sequence[Entries]], float]
"""(window, pieces of the update there) -> the sum of their squares; zero updates leave their coordinates as they are.
The pieces' squares are added in their order: equal on every machine."""


class OuterOptimizer(NamedTuple):
    """An outer optimiser is a value: what it is called, what it keeps, and a pure step."""

    spec: str
    """Canonical text, e.g. "nesterov(lr=0.7,momentum=0.9)"."""

    lr: float
    momentum: float
    """μ; zero for sgd."""

    state_buffers: int
    """Vectors of length d kept between rounds, zero at the start: 1 for momentum, otherwise 0."""

    step: Step
    plan: Plan

    plan_sparse: Callable[[Tensor, Tensor], SparseStep] | None = None
    """(theta_d, theta_out_d) -> the same step for updates that are mostly zero; None: every coordinate moves anyway."""


def sgd(lr: float) -> OuterOptimizer:
    """θ' = θ − η g. With lr = 1 the members' models are averaged."""

    def plan(
        theta_d: Tensor,
        momentum_d: Tensor | None,
        update_d: Tensor,
        *,
        theta_out_d: Tensor,
        momentum_out_d: Tensor | None,
    ) -> Callable[[slice], None]:
        from farflung.aggregation.kernels import native

        if momentum_d is not None or momentum_out_d is not None:
            raise LocalError("sgd keeps no momentum, got some")
        theta, update, theta_out = _arrays((theta_d, update_d), (theta_out_d,))
        return lambda at: native.sgd(theta_out[at], theta[at], update[at], lr)

    def plan_sparse(theta_d: Tensor, theta_out_d: Tensor) -> SparseStep:
        from farflung.aggregation.kernels import native

        theta, theta_out = _arrays((theta_d,), (theta_out_d,))

        def work(at: slice, pieces: Sequence[Entries]) -> float:
            theta_w, out_w, square = theta[at], theta_out[at], 0.0
            if out_w.ctypes.data != theta_w.ctypes.data:
                out_w[:] = theta_w
            for index_k, value_k in pieces:
                square += native.sgd_sparse(out_w, theta_w, index_k, value_k, lr)
            return square

        return work

    return OuterOptimizer(f"sgd(lr={lr!r})", lr, 0.0, 0, _step_of(plan), plan, plan_sparse)


def nesterov(lr: float, momentum: float) -> OuterOptimizer:
    """b' = μ b + g, θ' = θ − η (g + μ b'): torch's SGD(nesterov=True), DiLoCo's outer step (arXiv:2311.08105)."""

    def plan(
        theta_d: Tensor,
        momentum_d: Tensor | None,
        update_d: Tensor,
        *,
        theta_out_d: Tensor,
        momentum_out_d: Tensor | None,
    ) -> Callable[[slice], None]:
        from farflung.aggregation.kernels import native

        if momentum_d is None or momentum_out_d is None:
            raise LocalError("nesterov needs its momentum and room for the next, got None")
        inputs, outputs = (theta_d, momentum_d, update_d), (theta_out_d, momentum_out_d)
        theta, buffer, update, theta_out, buffer_out = _arrays(inputs, outputs)
        return lambda at: native.nesterov(
            theta_out[at], buffer_out[at], theta[at], buffer[at], update[at], lr, momentum
        )

    return OuterOptimizer(f"nesterov(lr={lr!r},momentum={momentum!r})", lr, momentum, 1, _step_of(plan), plan)


def _step_of(plan: Plan) -> Step:
    def step(
        theta_d: Tensor,
        momentum_d: Tensor | None,
        update_d: Tensor,
        *,
        theta_out_d: Tensor,
        momentum_out_d: Tensor | None,
        threads: int = 1,
    ) -> None:
        work = plan(theta_d, momentum_d, update_d, theta_out_d=theta_out_d, momentum_out_d=momentum_out_d)
        _each_window(work, len(theta_d), threads)

    return step


def parse_outer(spec: str) -> OuterOptimizer:
    """The optimiser that `spec` names: `sgd(lr=1.0)` or `nesterov(lr=0.7,momentum=0.9)`. Raises ConfigError."""
    call = parse_call(spec, {"sgd": ("lr",), "nesterov": ("lr", "momentum")})
    lr = parse_decimal(call, "lr", 0.0, LR_MAX)
    if call.name == "sgd":
        return sgd(lr)
    return nesterov(lr, parse_decimal(call, "momentum", 0.0, 1.0, below=True))


def momentum_gain(momentum: float, momentum_d: Tensor, update_d: Tensor, *, threads: int = 1) -> float:
    """How far the coming Nesterov step goes along the update Δ, in units of ηΔ: A = 1 + μ + μ² <b, Δ> / ||Δ||².

    `momentum_d` is b before the step. The first step has A = 1 + μ; a constant Δ approaches 1 / (1 − μ); below zero the
    step goes against this round's update. Same bits everywhere. 1 + μ if the update is zero.
    """
    from farflung.aggregation.kernels import native

    buffer, update = array_of(momentum_d, len(momentum_d)), array_of(update_d, len(momentum_d))

    def work(at: slice) -> tuple[float, float]:
        return native.dot(buffer[at], update[at]), native.dot(update[at], update[at])

    along = square = 0.0
    for along_w, square_w in _each_window(work, len(update), threads):
        along, square = along + along_w, square + square_w
    return 1.0 + momentum + (momentum * momentum * (along / square) if square else 0.0)


def norm(vector_d: Tensor, *, threads: int = 1) -> float:
    """The Euclidean norm in fp64, window by window: the same bits everywhere, and no fp64 copy of the vector.

    Infinite or NaN if the vector is not finite.
    """
    from farflung.aggregation.kernels import native

    vector = array_of(vector_d, len(vector_d))
    square = 0.0
    for square_w in _each_window(lambda at: native.dot(vector[at], vector[at]), len(vector), threads):
        square += square_w
    return math.sqrt(square) if square >= 0 else math.nan


class Norm:
    """`norm` of a vector that is being written from its front: each window is measured while it is in the cache."""

    def __init__(self, vector_d: Tensor) -> None:
        self._vector = array_of(vector_d, len(vector_d))
        self._done, self._square = 0, 0.0

    def reached(self, stop: int) -> None:
        """Everything before `stop` is as it shall be."""
        from farflung.aggregation.kernels import native

        d = len(self._vector)
        while self._done < d and min(self._done + WINDOW, d) <= stop:
            part_w = self._vector[self._done : self._done + WINDOW]
            self._square += native.dot(part_w, part_w)
            self._done += WINDOW

    def end(self) -> float:
        """The norm, the same bits as `norm`. What was not measured yet is read now."""
        self.reached(len(self._vector))
        return math.sqrt(self._square) if self._square >= 0 else math.nan


def _each_window(work: Callable[[slice], T], d: int, threads: int) -> list[T]:
    def make_visit() -> Visit[T]:
        return lambda start, stop: work(slice(start, stop))

    return map_windows(d, make_visit, threads=threads)


def _arrays(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[NDArray[np.float32], ...]:
    """The vectors' memory. Raises LocalError if an output overlaps another vector other than by being all of it."""
    arrays = [array_of(vector, len(inputs[0])) for vector in inputs + outputs]
    for position in range(len(inputs), len(arrays)):
        for other in range(position):
            apart = abs(arrays[position].ctypes.data - arrays[other].ctypes.data)
            shared = apart < arrays[other].nbytes
            if shared and (apart > 0 or other >= len(inputs)):
                raise LocalError(
                    f"an outer step cannot write to memory that overlaps another vector's by {apart} bytes"
                )
    return tuple(arrays)
