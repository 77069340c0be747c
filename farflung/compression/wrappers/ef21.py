"""EF21: members send the change of an estimate of their update, and everybody adds it to the estimate they know."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from farflung.compression.codec import Codec, Link, Reader, Row
from farflung.compression.grammar import Arguments
from farflung.compression.guards import has_stage
from farflung.compression.parts import (
    add_rows,
    clamp,
    in_order,
    part_of,
    put_row,
    require_finite,
    saved_vector,
    within,
)
from farflung.compression.scheme import strides
from farflung.compression.stage import Body, Stage, on_codec
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import DenseRow, Reason, Verdict
from farflung.protocol.schema import Schema


class Estimate(NamedTuple):
    """A member's private state: g, and what the last encode sent, which belongs to g unless a verdict says otherwise.
    The first verdict adds it to g or drops it, and leaves zeros.

    Both None until the first encode: then g is what the swarm knows, so that a joiner does not shift the mean.
    """

    estimate_d: Tensor | None
    sent_d: Tensor | None
    schema: Schema
    inner: Any


class Known(NamedTuple):
    """What all members know: G, the mean of the members' g, and the inner codec's shared state."""

    mean_d: Tensor
    inner: Any


def ef21(inner: Codec) -> Codec:
    """g <- g + C(x - g); a row is G + C(x - g), G the last certified update (arXiv:2106.05203, Alg. 2).

    Members need not know each other's g: if all of them take part with equal weights, the mean of the rows is
    G + mean C = the mean of the new g, and that is the next G. For a fixed x, ||g - x||^2 <= (1 - alpha)^t ||x||^2 with
    C's contraction alpha. The condition is the price: who is absent, late, cut or leaves keeps a g that G no longer
    holds, or the other way round, and the offset stays (up to rounding, too, G is only near the mean); a left-out row
    counts as zero, so the update of a round in which m of n took part lacks (1 - m/n) G. For closed swarms and a mean
    over equal weights; elsewhere take `ef`. A row that a verdict left out (late, cut, anomaly) is not added to g.

    Private: 2 vectors, shared: 1. Rows are dense and saturate at PAYLOAD_ABS_MAX. Nothing on the wire beyond C.
    LocalError, before any state moves, if an entry of the update is not finite or beyond PAYLOAD_ABS_MAX.
    """

    def init(schema: Schema) -> tuple[Estimate, Known]:
        private, shared = inner.init(schema)
        return Estimate(None, None, schema, private), Known(torch.zeros(schema.numel), shared)

    def encode(update_d: Tensor, private: Estimate, shared: Known, round_index: int) -> tuple[bytes, Estimate]:
        schema = private.schema
        require_finite(update_d, schema.numel, at_most=PAYLOAD_ABS_MAX)
        estimate_d, sent_d = _settled(private, shared)
        sent_d.copy_(update_d.detach()).sub_(estimate_d)
        payload, inner_private = inner.encode(clamp(sent_d), private.inner, shared.inner, round_index)
        read = inner.open(payload, schema, shared.inner, round_index)
        for start, stop in strides(0, schema.numel):
            put_row(sent_d[start:stop], read(start, stop))
        return payload, Estimate(estimate_d, sent_d, schema, inner_private)

    def open_(payload: bytes, schema: Schema, shared: Known, round_index: int) -> Reader:
        read_change = inner.open(payload, schema, shared.inner, round_index)

        def read(start: int, stop: int) -> Row:
            change = read_change(start, stop)  # first, so that it refuses a span that is no window
            return add_rows(DenseRow(shared.mean_d[start:stop]), change)

        return read

    def check(payload: bytes, schema: Schema, shared: Known, round_index: int) -> None:
        inner.check(payload, schema, shared.inner, round_index)

    plain = Codec(f"ef21|{inner.spec}", inner.exact, init, encode, open_, check, inner.bits)
    return _with_states(plain, inner)


def _settled(private: Estimate, shared: Known) -> tuple[Tensor, Tensor]:
    """g with what was sent before, in its own memory, and a vector to work in."""
    if private.estimate_d is None or private.sent_d is None:
        return shared.mean_d.clone(), torch.zeros_like(shared.mean_d)
    return clamp(private.estimate_d.add_(private.sent_d)), private.sent_d


def _with_states(plain: Codec, inner: Codec) -> Codec:
    """The part of `ef21` that keeps, moves and saves its states."""

    def observe(private: Estimate, verdict: Verdict) -> Estimate:
        if private.estimate_d is not None and private.sent_d is not None:
            if verdict.reason is Reason.KEPT:
                clamp(private.estimate_d.add_(private.sent_d))
            if verdict.reason is not Reason.ABSTAINED:  # settled: a later verdict finds nothing to add or take back
                private.sent_d.zero_()
        return private._replace(inner=inner.observe(private.inner, verdict))

    def tune(private: Estimate, link: Link) -> Estimate:
        return private._replace(inner=inner.tune(private.inner, link))

    def private_tensors(private: Estimate) -> dict[str, Tensor]:
        own = {} if private.estimate_d is None else {"estimate": private.estimate_d, "sent": private.sent_d}
        found = {name: tensor for name, tensor in own.items() if tensor is not None}
        return found | within("inner", inner.private_tensors(private.inner))

    def restore_private(schema: Schema, tensors: dict[str, Tensor]) -> Estimate:
        inside = inner.restore_private(schema, part_of("inner", tensors))
        if "estimate" not in tensors and "sent" not in tensors:
            return Estimate(None, None, schema, inside)
        saved = [saved_vector(tensors, name, schema.numel) for name in ("estimate", "sent")]
        return Estimate(saved[0], saved[1], schema, inside)

    def advance(shared: Known, update_d: Tensor, round_index: int) -> Known:
        mean_d = clamp(update_d.detach().cpu().clone())
        return Known(mean_d, inner.advance(shared.inner, update_d, round_index))

    def shared_tensors(shared: Known) -> dict[str, Tensor]:
        return in_order({"mean": shared.mean_d} | within("inner", inner.shared_tensors(shared.inner)))

    def restore_shared(schema: Schema, tensors: dict[str, Tensor]) -> Known:
        mean_d = saved_vector(tensors, "mean", schema.numel)
        return Known(mean_d, inner.restore_shared(schema, part_of("inner", tensors)))

    return plain._replace(
        observe=observe,
        tune=tune,
        private_tensors=private_tensors,
        restore_private=restore_private,
        advance=advance,
        shared_tensors=shared_tensors,
        restore_shared=restore_shared,
    )


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    arguments.end()
    codec = on_codec(inner, arguments.stage)
    for name in ("lookahead", "ef21", "ef", "dgc"):
        if has_stage(codec, name):
            arguments.stage.refuse(f"ef21 is error feedback already: {name} may not follow", "ef21|topk(64/4096)|q2")
    return ef21(codec)


STAGES = (
    Stage(
        "ef21",
        "wrapper",
        "ef21",
        "EF21: sends the change of an estimate; for swarms in which everybody takes part with equal weight.",
        "0",
        "private: 2 vectors; shared: 1",
        "arXiv:2106.05203, Alg. 2",
        _build,
        ("ef21|topk(64/4096)|bf16", "ef21|q2"),
    ),
)
