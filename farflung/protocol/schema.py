"""The shape of what is exchanged: the trainable tensors, in canonical order, as one flat vector.

`Schema` is the only source of dtype and shape when bytes from a peer are decoded; a message never says how large it is.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from farflung.protocol import limits
from farflung.protocol.canonical import encode_canonical
from farflung.protocol.errors import ConfigError


@dataclass(frozen=True)
class TensorSpec:
    """One trainable tensor: its name in the model, its shape, and its dtype there ("float32")."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Schema:
    """Names, shapes and dtypes of the trainable tensors, sorted by name, each tied weight once.

    `fragment_ends` cuts the flat vector into contiguous fragments; one fragment is the default.
    Raises ConfigError if it is empty, unsorted, repeats a name or is larger than `limits` allow.
    """

    tensors: tuple[TensorSpec, ...]
    fragment_ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        if not names:
            raise ConfigError("the model has no trainable tensor")
        if len(names) > limits.TENSORS_MAX:
            raise ConfigError(f"the model has more than {limits.TENSORS_MAX} trainable tensors: {len(names)}")
        if sorted(set(names)) != names:
            raise ConfigError(f"tensor names must be unique and sorted, got {names[:4]}...")
        if not 0 < self.numel <= limits.PARAMETERS_MAX:
            raise ConfigError(f"a model has 1 to {limits.PARAMETERS_MAX} trainable parameters, got {self.numel}")
        ends = self.fragment_ends or (self.numel,)
        if list(ends) != sorted(set(ends)) or ends[-1] != self.numel or ends[0] < 1:
            raise ConfigError(f"fragment ends must strictly increase to {self.numel}, got {ends[:4]}...")
        object.__setattr__(self, "fragment_ends", tuple(ends))

    @cached_property
    def numel(self) -> int:
        """d, the length of the flat vector."""
        return sum(tensor.numel for tensor in self.tensors)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts in the flat vector."""
        starts, position = [], 0
        for tensor in self.tensors:
            starts.append(position)
            position += tensor.numel
        return tuple(starts)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes."""
        return hashlib.sha256(encode_canonical(self.to_json())).digest()

    def to_json(self) -> dict[str, Any]:
        """Plain values for canonical bytes."""
        return {
            "fragment_ends": list(self.fragment_ends),
            "tensors": [[tensor.name, list(tensor.shape), tensor.dtype] for tensor in self.tensors],
        }

    @staticmethod
    def from_json(value: Any) -> Schema:
        """The inverse of `to_json`. Raises ConfigError on anything that is not a schema."""
        try:
            tensors = tuple(
                TensorSpec(str(name), tuple(int(axis) for axis in shape), str(dtype))
                for name, shape, dtype in value["tensors"]
            )
            ends = tuple(int(end) for end in value["fragment_ends"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a model schema: {error}") from None
        if any(axis < 1 for tensor in tensors for axis in tensor.shape):
            raise ConfigError("a model schema has an axis shorter than 1")
        return Schema(tensors, ends)

    def explain_difference(self, theirs: Schema) -> str | None:
        """One line naming the first tensor in which `self` (ours) and `theirs` differ; None if they are equal."""
        ours_by_name = {tensor.name: tensor for tensor in self.tensors}
        theirs_by_name = {tensor.name: tensor for tensor in theirs.tensors}
        for name in sorted(ours_by_name.keys() | theirs_by_name.keys()):
            mine, run = ours_by_name.get(name), theirs_by_name.get(name)
            if mine is None:
                return f"the run has a tensor {name!r} {run.shape if run else ''}, your model has not"
            if run is None:
                return f"your model has a tensor {name!r} {mine.shape}, the run has not"
            if mine.shape != run.shape:
                return f"tensor {name!r} is {run.shape} in the run and {mine.shape} in your model"
            if mine.dtype != run.dtype:
                return f"tensor {name!r} is {run.dtype} in the run and {mine.dtype} in your model"
        if self.fragment_ends != theirs.fragment_ends:
            return "the run cuts the parameters into other fragments than your settings"
        return None
