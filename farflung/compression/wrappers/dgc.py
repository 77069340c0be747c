"""Deep Gradient Compression: momentum before the sparsifier, masked where it was sent."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from farflung.compression.codec import Codec, Link
from farflung.compression.grammar import Arguments
from farflung.compression.guards import has_stage
from farflung.compression.parts import (
    clamp,
    decimal_text,
    norm,
    part_of,
    require_finite,
    saved_vector,
    subtract_row,
    within,
)
from farflung.compression.scheme import strides
from farflung.compression.stage import Body, Stage, on_codec, require
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import DenseRow, Reason, Verdict
from farflung.protocol.schema import Schema


class Velocity(NamedTuple):
    """A member's private state: momentum u and accumulated velocity v, model-sized fp32 on the CPU."""

    momentum_d: Tensor
    velocity_d: Tensor
    schema: Schema
    inner: Any


def dgc(momentum: float, clip: float | None, inner: Codec) -> Codec:
    """u <- m u + x; v <- v + u; send inner(v); where something was sent, u <- 0 and v <- v - sent (arXiv:1712.01887).

    The paper sends exact values, for which v - sent is its v <- 0; with coarser values the rounding stays in v. `clip`:
    x is first scaled down to this norm (§3.2; theirs is the global threshold / sqrt(members)). For sparsifiers: a dense
    format sends everywhere, which leaves no momentum. With m = 0 it is error feedback with beta = 1. An anomaly verdict
    zeroes both vectors; late or cut rows are forfeited. Use no outer momentum on top.
    LocalError, before any state moves, if an entry of the update is not finite or beyond PAYLOAD_ABS_MAX.
    """
    require(0 <= momentum < 1, f"momentum is at least 0 and below 1, got {momentum}")

    def init(schema: Schema) -> tuple[Velocity, Any]:
        private, shared = inner.init(schema)
        return Velocity(torch.zeros(schema.numel), torch.zeros(schema.numel), schema, private), shared

    def encode(update_d: Tensor, private: Velocity, shared: Any, round_index: int) -> tuple[bytes, Velocity]:
        momentum_d, velocity_d, schema, _ = private
        require_finite(update_d, schema.numel, at_most=PAYLOAD_ABS_MAX)
        length = norm(update_d) if clip is not None else 0.0
        scale = float(np.float32(clip / length)) if clip is not None and length > clip else 1.0
        for start, stop in strides(0, schema.numel):
            window_d = update_d[start:stop].detach().cpu()
            momentum_d[start:stop].mul_(momentum).add_(window_d * scale)
            clamp(velocity_d[start:stop].add_(momentum_d[start:stop]))
        payload, inner_private = inner.encode(velocity_d, private.inner, shared, round_index)
        read = inner.open(payload, schema, shared, round_index)
        for start, stop in strides(0, schema.numel):
            row = read(start, stop)
            subtract_row(velocity_d[start:stop], row)
            if isinstance(row, DenseRow):
                momentum_d[start:stop].masked_fill_(row.value_d != 0, 0.0)
            else:
                momentum_d[start:stop][row.index_k.long()[row.value_k != 0]] = 0.0
        return payload, private._replace(inner=inner_private)

    def observe(private: Velocity, verdict: Verdict) -> Velocity:
        if verdict.reason is Reason.ANOMALY:
            private.momentum_d.zero_()
            private.velocity_d.zero_()
        return private._replace(inner=inner.observe(private.inner, verdict))

    def tune(private: Velocity, link: Link) -> Velocity:
        return private._replace(inner=inner.tune(private.inner, link))

    def private_tensors(private: Velocity) -> dict[str, Tensor]:
        own = {"momentum": private.momentum_d, "velocity": private.velocity_d}
        return own | within("inner", inner.private_tensors(private.inner))

    def restore_private(schema: Schema, tensors: dict[str, Tensor]) -> Velocity:
        momentum_d, velocity_d = (saved_vector(tensors, name, schema.numel) for name in ("momentum", "velocity"))
        return Velocity(momentum_d, velocity_d, schema, inner.restore_private(schema, part_of("inner", tensors)))

    clipping = "" if clip is None else f", clip={decimal_text(clip)}"
    return inner._replace(
        spec=f"dgc({decimal_text(momentum)}{clipping})|{inner.spec}",
        init=init,
        encode=encode,
        observe=observe,
        tune=tune,
        private_tensors=private_tensors,
        restore_private=restore_private,
        ahead=lambda private: None,
        stream=None,
    )


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    momentum = arguments.decimal("momentum", 0, 0.9999999)
    clip = arguments.decimal("clip", 0.0000001, PAYLOAD_ABS_MAX) if len(arguments.stage.arguments) > 1 else None
    arguments.end()
    codec = on_codec(inner, arguments.stage)
    for name in ("lookahead", "ef21", "ef", "dgc"):
        if has_stage(codec, name):
            arguments.stage.refuse(
                f"dgc is error feedback already: {name} may not follow", "dgc(0.9)|topk(4/4096)|bf16"
            )
    return dgc(momentum, clip, codec)


STAGES = (
    Stage(
        "dgc",
        "wrapper",
        "dgc(momentum, clip=norm)",
        "Deep Gradient Compression: momentum and what was not sent, both masked where something was sent.",
        "0",
        "private: 2 vectors",
        "arXiv:1712.01887, Alg. 1-2",
        _build,
        (
            "dgc(0.9)|topk(4/4096)|bf16",
            "dgc(0.5, clip=10)|topk(64/4096)|q2",
            "dgc(0.9)|warmup(2, topk(1024/4096)|bf16)|topk(4/4096)|bf16",
        ),
    ),
)
