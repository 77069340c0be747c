"""Error feedback: what one round did not send is carried into the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from farflung.compression.codec import Codec
from farflung.compression.grammar import Arguments
from farflung.compression.scheme import strides
from farflung.compression.stage import Body, Stage, on_codec
from farflung.protocol.errors import LocalError
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import DenseRow, Reason, Verdict
from farflung.protocol.schema import Schema


class Feedback(NamedTuple):
    """A member's private state: one model-sized fp32 vector on the CPU, its schema, and the inner codec's state."""

    error_d: Tensor
    schema: Schema
    inner: Any


def error_feedback(beta: float, inner: Codec) -> Codec:
    """Send inner(beta e + update) and keep e = beta e + update - decoded bytes (arXiv:1901.09847, Alg. 2; DESIGN §3).

    With beta = 1 and no reset, the sum of everything sent plus e is the sum of all updates. beta < 1 forgets:
    SparseLoCo uses 0.95 in place of outer momentum (arXiv:2508.15706). The e of an encode is tentative until `observe`:
    it stays unless the verdict is ANOMALY, which zeroes it. A member that abstained did not encode, so its e is the old
    one. All work is done in e's own memory. `encode` raises LocalError, before it touches e, if an entry of the update
    is not finite or beyond PAYLOAD_ABS_MAX: e would be poisoned for good. What a format cannot carry (saturation,
    underflow) stays in e. Costs nothing on the wire.
    """

    def init(schema: Schema) -> tuple[Feedback, Any]:
        private, shared = inner.init(schema)
        return Feedback(torch.zeros(schema.numel), schema, private), shared

    def encode(update_d: Tensor, private: Feedback, shared: Any, round_index: int) -> tuple[bytes, Feedback]:
        error_d = private.error_d
        _refuse_wild(update_d, error_d)
        for start, stop in strides(0, len(error_d)):
            window_d = error_d[start:stop]
            if beta != 1:
                window_d.mul_(beta)
            window_d.add_(update_d[start:stop].detach().cpu())
        payload, inner_private = inner.encode(error_d, private.inner, shared, round_index)
        read = inner.open(payload, private.schema, shared, round_index)
        for start, stop in strides(0, len(error_d)):
            row = read(start, stop)
            window_d = error_d[start:stop]
            if isinstance(row, DenseRow):
                window_d.sub_(row.value_d)
            else:
                window_d[row.index_k] -= row.value_k
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

    return inner._replace(
        spec=f"ef({beta:g})|{inner.spec}",
        init=init,
        encode=encode,
        observe=observe,
        private_tensors=private_tensors,
        restore_private=restore_private,
    )


def _refuse_wild(update_d: Tensor, error_d: Tensor) -> None:
    if update_d.shape != error_d.shape or update_d.dtype != torch.float32:
        raise LocalError(f"an update has {len(error_d)} fp32, got {update_d.dtype} of shape {tuple(update_d.shape)}")
    low, high = (float(end) for end in update_d.detach().aminmax())
    if not -PAYLOAD_ABS_MAX <= low <= high <= PAYLOAD_ABS_MAX:
        raise LocalError(f"an update must be finite and at most {PAYLOAD_ABS_MAX:g}, got {low:g} to {high:g}")


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    beta = arguments.decimal("beta", 0.001, 1)
    arguments.end()
    return error_feedback(beta, on_codec(inner, arguments.stage))


STAGES = (
    Stage(
        "ef",
        "wrapper",
        "ef(beta)",
        "Error feedback: what a round did not send is carried into the next, times beta.",
        "0",
        "private: 1 vector",
        "arXiv:1901.09847, Alg. 2",
        _build,
        ("ef(1)|bf16",),
    ),
)
