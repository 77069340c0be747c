"""A codec's shared state as one vector: the last part of the state stream, after θ and the outer buffers.

The codec's named tensors (`Codec.shared_tensors`) follow each other in the order of their names, flattened row by row.
Their names and shapes follow from the schema, so the vector's length does too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from farflung.compression.codec import Codec, Shared
from farflung.protocol.errors import LocalError
from farflung.protocol.schema import Schema

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def shapes_of(codec: Codec, shared: Shared) -> Shapes:
    """Names and shapes of the shared tensors in their order; empty if there are none. LocalError if one is not fp32."""
    tensors = codec.shared_tensors(shared)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise LocalError(f"a shared tensor is fp32 on the CPU, {name!r} is {tensor.dtype} on {tensor.device}")
    return tuple((name, tuple(tensors[name].shape)) for name in sorted(tensors))


def shared_vector(codec: Codec, shared: Shared, shapes: Shapes) -> Tensor | None:
    """A copy of the shared tensors in one vector; None if there are none.

    Raises LocalError unless they are named and shaped like `shapes`: the state stream never changes its length.
    """
    found = shapes_of(codec, shared)
    if found != shapes:
        raise LocalError(f"{codec.spec}: shared tensors changed their names or shapes: {found[:4]} after {shapes[:4]}")
    if not shapes:
        return None
    tensors = codec.shared_tensors(shared)
    return torch.cat([tensors[name].detach().reshape(-1) for name, _ in shapes])


def shared_from(codec: Codec, schema: Schema, vector: Tensor, shapes: Shapes) -> Shared:
    """The inverse of `shared_vector`. The vector is copied."""
    tensors, start = {}, 0
    for name, shape in shapes:
        size = math.prod(shape)
        tensors[name] = vector[start : start + size].clone().reshape(shape)
        start += size
    return codec.restore_shared(schema, tensors)
