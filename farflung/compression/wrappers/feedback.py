"""Error feedback: what one round did not send is carried into the next."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from farflung.compression.codec import Codec
from farflung.compression.grammar import Arguments
from farflung.compression.guards import FEEDBACK, expands, has_stage
from farflung.compression.kernels import ABS_MAX_BITS, fastest
from farflung.compression.parts import decimal_text
from farflung.compression.scheme import spread, strides
from farflung.compression.source import Vector, numbers_of, take_away
from farflung.compression.stage import Body, Stage, on_codec
from farflung.protocol.errors import LocalError
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import Reason, Verdict
from farflung.protocol.schema import Schema


class Feedback(NamedTuple):
    """A member's private state: one model-sized fp32 vector on the CPU, its schema, and the inner codec's state."""

    error_d: Tensor
    schema: Schema
    inner: Any


def error_feedback(beta: float, inner: Codec, *, bound: float | None = None, fused: bool = True) -> Codec:
    """Send inner(beta e + update) and keep e = beta e + update - decoded bytes (arXiv:1901.09847, Alg. 2; DESIGN §3).

    With beta = 1, no bound and no reset, the sum of everything sent plus e is the sum of all updates. beta < 1 forgets:
    SparseLoCo uses 0.95 in place of outer momentum (arXiv:2508.15706). With `bound`, an e longer than bound x
    ||update|| of this round is scaled down to that length (norms in fp64, in a fixed order); an update of zero clears
    it. The e of an encode is tentative until `observe`: it stays unless the verdict is ANOMALY, which zeroes it. A
    member that abstained did not encode, so its e is the old one. All work is done in e's own memory. `encode` raises
    LocalError, before it touches e, if an entry of the update is not finite or beyond PAYLOAD_ABS_MAX: e would be
    poisoned for good. What a format cannot carry (saturation, underflow) stays in e. Costs nothing on the wire.

    `fused`, if `inner` writes run after run: each is added up, written, decoded and subtracted while it is in the
    cache; the bytes and e are the same.
    """
    send = _by_run(inner) if fused and inner.stream else _whole(inner)

    def init(schema: Schema) -> tuple[Feedback, Any]:
        private, shared = inner.init(schema)
        return Feedback(torch.zeros(schema.numel), schema, private), shared

    def encode(update_d: Tensor, private: Feedback, shared: Any, round_index: int) -> tuple[bytes, Feedback]:
        error_d = private.error_d
        _refuse_wild(update_d, error_d, inner.scheme.threads if inner.scheme else 1)
        payload, inner_private = send(np.float32(beta), update_d, private, shared, round_index)
        if bound is not None:
            shorten(error_d, bound * length(update_d))
        return payload, private._replace(inner=inner_private)

    def observe(private: Feedback, verdict: Verdict) -> Feedback:
        if verdict.reason is Reason.ANOMALY:
            private.error_d.zero_()
        return private._replace(inner=inner.observe(private.inner, verdict))

    def private_tensors(private: Feedback) -> dict[str, Tensor]:
        inside = inner.private_tensors(private.inner)
        return {"error": private.error_d} | {f"inner.{name}": tensor for name, tensor in inside.items()}

    def restore_private(schema: Schema, tensors: dict[str, Tensor]) -> Feedback:
        error_d = tensors.get("error")
        if error_d is None or error_d.shape != (schema.numel,) or error_d.dtype != torch.float32:
            found = None if error_d is None else (error_d.dtype, tuple(error_d.shape))
            raise LocalError(f"error feedback needs a tensor 'error' of {schema.numel} fp32, got {found}")
        inside = {name.removeprefix("inner."): tensor for name, tensor in tensors.items() if name.startswith("inner.")}
        return Feedback(error_d.cpu().contiguous().clone(), schema, inner.restore_private(schema, inside))

    limit = "" if bound is None else f", bound={decimal_text(bound)}"
    return inner._replace(
        spec=f"ef({decimal_text(beta)}{limit})|{inner.spec}",
        init=init,
        encode=encode,
        observe=observe,
        private_tensors=private_tensors,
        restore_private=restore_private,
        ahead=lambda private: inner.ahead(private.inner),
        stream=None,
        tune=lambda private, link: private._replace(inner=inner.tune(private.inner, link)),
    )


Send = Callable[[np.float32, Tensor, Feedback, Any, int], tuple[bytes, Any]]
"""(beta, update_d, private, shared, round) -> (payload, the inner codec's state); e is what is left."""


def _whole(inner: Codec) -> Send:
    """For any codec: each step over the whole vector."""

    def send(beta: np.float32, update_d: Tensor, private: Feedback, shared: Any, round_index: int) -> tuple[bytes, Any]:
        error_d, numbers, carry = private.error_d.numpy(), numbers_of(update_d), fastest().carry
        for start, stop in strides(0, len(error_d)):
            carry(error_d[start:stop], numbers(start, stop), beta)
        payload, inner_private = inner.encode(private.error_d, private.inner, shared, round_index)
        read = inner.open(payload, private.schema, shared, round_index)
        for start, stop in strides(0, len(error_d)):
            take_away(error_d[start:stop], read(start, stop))
        return payload, inner_private

    return send


def _by_run(inner: Codec) -> Send:
    """For codecs that write run after run: all steps on one run after the other, or on several threads."""

    def send(beta: np.float32, update_d: Tensor, private: Feedback, shared: Any, round_index: int) -> tuple[bytes, Any]:
        if inner.stream is None:
            raise LocalError(f"{inner.spec} does not write run after run")
        source = Vector(numbers_of(update_d), private.error_d.numpy(), beta)
        return inner.stream(source, private.schema, round_index), private.inner

    return send


def length(vector_d: Tensor) -> float:
    """Euclidean norm in fp64: the same bits for the same vector, wherever it lives."""
    numbers, square_sum = numbers_of(vector_d), fastest().square_sum
    return math.sqrt(sum(square_sum(numbers(start, stop)) for start, stop in strides(0, len(vector_d))))


def shorten(error_d: Tensor, most: float) -> None:
    """Scale a vector on the CPU, in place, to that length if it is longer."""
    found = length(error_d)
    if found > most:
        error_d.mul_(most / found)


def _refuse_wild(update_d: Tensor, error_d: Tensor, threads: int) -> None:
    if update_d.shape != error_d.shape or update_d.dtype != torch.float32:
        raise LocalError(f"an update has {len(error_d)} fp32, got {update_d.dtype} of shape {tuple(update_d.shape)}")
    numbers, top_bits = numbers_of(update_d), fastest().top_bits

    def refuse(start: int, stop: int) -> None:
        if (found := top_bits(numbers(start, stop))) > ABS_MAX_BITS:
            largest = float(np.uint32(found).view(np.float32))
            raise LocalError(f"an update must be finite and at most {PAYLOAD_ABS_MAX:g}, got {largest:g}")

    spread(refuse, len(error_d), threads)


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    beta = arguments.decimal("beta", 0.001, 1)
    given = len(arguments.stage.arguments) > 1
    bound = arguments.decimal("bound", 0.001, 1000) if given else None
    arguments.end()
    codec = on_codec(inner, arguments.stage)
    if has_stage(codec, *FEEDBACK, "lookahead"):
        arguments.stage.refuse("there is error feedback after it already, or a lookahead, which goes first", "ef(1)|q2")
    if expands(codec):
        arguments.stage.refuse(f"error feedback would grow without bound: {expands(codec)}")
    return error_feedback(beta, codec, bound=bound)


STAGES = (
    Stage(
        "ef",
        "wrapper",
        "ef(beta, bound=B)",
        "Error feedback: what a round did not send is carried into the next, times beta; at most B updates long.",
        "0",
        "private: 1 vector",
        "arXiv:1901.09847, Alg. 2",
        _build,
        ("ef(1)|bf16", "ef(0.9, bound=0.5)|int2", "ef(1, bound=2)|topk(64/4096)|q2"),
    ),
)
