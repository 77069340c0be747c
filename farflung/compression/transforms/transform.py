"""The codec of a transform: everything that does not depend on which one it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farflung.compression.codec import Codec, Link, Reader, Records
from farflung.compression.scheme import Floats
from farflung.compression.transforms.derived import admit, prefixed, unprefixed
from farflung.protocol.rows import Verdict
from farflung.protocol.schema import Schema


class Carried(NamedTuple):
    """A member's private state in a transform: the schema, what the transform keeps, and the inner codec's state."""

    schema: Schema
    own: Any
    inner: Any


class Transform(NamedTuple):
    """A change of coordinates, there and back."""

    name: str
    """Its stage, as canonical text."""
    derived: Callable[[Schema], Schema]
    """schema -> the schema of what the inner codec encodes; from a cache, it is asked for in every call."""
    forward: Callable[[Floats, Schema, Any, int], tuple[Floats, Any]]
    """(update_d within +-PAYLOAD_ABS_MAX, schema, own state, round) -> (derived vector, own state)."""
    reader: Callable[[Reader, Schema, int], Reader]
    """(the derived vector's reader, schema, round) -> the update's reader, of values within +-PAYLOAD_ABS_MAX."""
    fresh: Callable[[Schema], Any] = lambda schema: None
    """schema -> own state of a new member."""
    save: Callable[[Schema, Any], dict[str, Tensor]] = lambda schema, own: {}
    """(schema, own state) -> named tensors, none of which begins with "inner."."""
    restore: Callable[[Schema, dict[str, Tensor]], Any] = lambda schema, tensors: None
    """The inverse of `save`. Raises LocalError if a tensor is missing or has the wrong shape."""


def transformed(change: Transform, inner: Codec) -> Codec:
    """The inner codec on derived vectors. Encode holds one of them."""

    def init(schema: Schema) -> tuple[Carried, Any]:
        private, shared = inner.init(change.derived(schema))
        return Carried(schema, change.fresh(schema), private), shared

    def encode(update_d: Tensor, private: Carried, shared: Any, round_index: int) -> tuple[bytes, Carried]:
        schema = private.schema
        derived_d, own = change.forward(admit(update_d, schema.numel), schema, private.own, round_index)
        payload, state = inner.encode(torch.from_numpy(derived_d), private.inner, shared, round_index)
        return payload, Carried(schema, own, state)

    def open_(payload: bytes, schema: Schema, shared: Any, round_index: int) -> Reader:
        read = inner.open(payload, change.derived(schema), shared, round_index)
        return change.reader(read, schema, round_index)

    def check(payload: bytes, schema: Schema, shared: Any, round_index: int) -> None:
        inner.check(payload, change.derived(schema), shared, round_index)

    def bits(schema: Schema) -> float:
        derived = change.derived(schema)
        return inner.bits(derived) * derived.numel / schema.numel

    def observe(private: Carried, verdict: Verdict) -> Carried:
        return private._replace(inner=inner.observe(private.inner, verdict))

    def private_tensors(private: Carried) -> dict[str, Tensor]:
        return change.save(private.schema, private.own) | prefixed(inner.private_tensors(private.inner))

    def restore_private(schema: Schema, tensors: dict[str, Tensor]) -> Carried:
        state = inner.restore_private(change.derived(schema), unprefixed(tensors))
        return Carried(schema, change.restore(schema, tensors), state)

    def tune(private: Carried, link: Link) -> Carried:
        return private._replace(inner=inner.tune(private.inner, link))

    def records(payload: bytes, schema: Schema, round_index: int) -> list[Records]:
        found: list[Records] = inner.records(payload, change.derived(schema), round_index) if inner.records else []
        return found

    return Codec(
        spec=f"{change.name}|{inner.spec}",
        exact=inner.exact,
        init=init,
        encode=encode,
        open=open_,
        check=check,
        bits=bits,
        observe=observe,
        private_tensors=private_tensors,
        restore_private=restore_private,
        restore_shared=lambda schema, tensors: inner.restore_shared(change.derived(schema), tensors),
        tune=tune,
        records=records if inner.records else None,
    )
