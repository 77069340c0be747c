"""What transforms share: they change the update's coordinates and leave the bytes to the codec behind them.

A transform T makes a derived vector of a derived schema; the inner codec encodes that, and the reader undoes T. What is
canonical is the derived vector's payload: two of them may come to the same fp32 numbers after rounding. Decoded numbers
are cut at +-PAYLOAD_ABS_MAX (the nearest allowed vector), so every payload that the inner codec accepts has a row, and
a transform's `check` is its inner codec's.
"""

from __future__ import annotations

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor

from farflung.compression.codec import Codec, Reader, Row
from farflung.compression.grammar import StageText
from farflung.compression.guards import has_stage, keeps_state, shares_state
from farflung.compression.scheme import Floats, require_update, strides
from farflung.compression.stage import Body, on_codec
from farflung.protocol.errors import LocalError
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import DenseRow

Doubles = NDArray[np.float64]


def admit(update_d: Tensor, d: int) -> Floats:
    """The update as numpy on the CPU, cut at +-PAYLOAD_ABS_MAX; a view where nothing had to change.

    Raises LocalError unless it is a finite vector of d fp32.
    """
    require_update(update_d)
    if len(update_d) != d:
        raise LocalError(f"an update has {d} fp32 here, got {len(update_d)}")
    low, high = (float(end) for end in update_d.detach().aminmax())
    if not np.isfinite(low) or not np.isfinite(high):
        raise LocalError(f"an update must be finite, got {low:g} to {high:g}")
    inside = max(-low, high) <= PAYLOAD_ABS_MAX
    kept_d = update_d.detach().cpu().contiguous()
    admitted_d: Floats = (kept_d if inside else kept_d.clamp(-PAYLOAD_ABS_MAX, PAYLOAD_ABS_MAX)).numpy()
    return admitted_d


def to_floats(values: Doubles) -> Floats:
    """Rounded to fp32, cut at +-PAYLOAD_ABS_MAX."""
    floats: Floats = np.clip(values, -PAYLOAD_ABS_MAX, PAYLOAD_ABS_MAX).astype(np.float32)
    return floats


def fill_dense(row: Row, out_n: Floats) -> None:
    """Write a row of any kind to `out_n`, which holds zeros."""
    if isinstance(row, DenseRow):
        out_n[:] = row.value_d.numpy()
    else:
        out_n[row.index_k.numpy()] = row.value_k.numpy()


def read_whole(read: Reader, d: int) -> Floats:
    """All d coordinates of a reader, dense. Raises what the reader raises."""
    whole_d = np.zeros(d, np.float32)
    for start, stop in strides(0, d):
        fill_dense(read(start, stop), whole_d[start:stop])
    return whole_d


def dense_row(values_d: Floats) -> DenseRow[Tensor]:
    """A row that owns its numbers."""
    return DenseRow(torch.from_numpy(values_d))


def seeded_uniform(label: str, *shape: int) -> Doubles:
    """Numbers evenly spread over (-1, 1), the same on every machine for the same label: multiples of 2**-31."""
    count = int(np.prod(shape))
    octets = blake3(label.encode()).digest(length=4 * count)
    uniform: Doubles = (np.frombuffer(octets, "<i4").astype(np.float64) + 0.5) / 2.0**31
    return uniform.reshape(shape)


def seed_of(label: str, round_index: int, position: int = 0) -> np.uint64:
    """64 random-looking bits, the same for all members."""
    octets = label.encode() + round_index.to_bytes(8, "little") + position.to_bytes(8, "little")
    return np.uint64(int.from_bytes(blake3(octets).digest(length=8), "little"))


def inner_codec(inner: Body | None, stage: StageText, *, fixed: bool) -> Codec:
    """What a transform stands before; `fixed`: whether a derived coordinate means the same in every round.

    Refuses what works on the model's own coordinates only, and a memory of coordinates that are other ones by then.
    """
    codec = on_codec(inner, stage)
    if has_stage(codec, "lookahead"):
        stage.refuse("lookahead belongs before a transform", f"lookahead(1)|...|{stage}|q2")
    if has_stage(codec, "rules"):
        stage.refuse("its tensors are not the model's: rules belong before it", f"rules(1d=fp16, else={stage}|q2)")
    if shares_state(codec):
        stage.refuse("nothing with a shared state may follow a transform", f"{stage}|q2")
    if not fixed and keeps_state(codec):
        stage.refuse(
            "its coordinates change in every round: what remembers them belongs before it", f"ef(1)|{stage}|q2"
        )
    return codec


def prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inner codec's saved tensors, under names of their own."""
    return {f"inner.{name}": tensor for name, tensor in tensors.items()}


def unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `prefixed`; leaves the others out."""
    return {name.removeprefix("inner."): tensor for name, tensor in tensors.items() if name.startswith("inner.")}


def saved_floats(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Floats:
    """A saved tensor. Raises LocalError if it is missing, not fp32, or of another shape."""
    tensor = tensors.get(name)
    if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        found = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
        raise LocalError(f"a saved state needs a tensor {name!r} of fp32 {shape}, got {found}")
    floats: Floats = tensor.detach().cpu().contiguous().clone().numpy()
    return floats
