"""How a model's tensors fall into groups, and where a group's coordinates stand in the whole vector and back.

A group is the concatenation of its tensors in canonical order. Order is kept, so every window of the whole is one
contiguous span of each group.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farflung.compression.codec import Row
from farflung.protocol.rows import DenseRow, SparseRow
from farflung.protocol.schema import Schema, TensorSpec

ELSE, VECTORS = "else", "1d"
"""The two rules that are no patterns: every other tensor, and every tensor with fewer than two dimensions."""


class Group(NamedTuple):
    """The tensors of one rule: s segments of the whole vector, neighbours joined."""

    rule: int
    """Which rule of the text made it."""
    schema: Schema
    outside_s: NDArray[np.int64]
    """Where each segment starts in the whole vector."""
    inside_s: NDArray[np.int64]
    """Where each segment starts in the group; one more entry: the group's length."""

    @property
    def d(self) -> int:
        """Coordinates in the group."""
        return self.schema.numel

    def before(self, position: int) -> int:
        """How many of the group's coordinates stand before a position of the whole."""
        segment = int(np.searchsorted(self.outside_s, position, side="right")) - 1
        if segment < 0:
            return 0
        return min(int(self.inside_s[segment] + position - self.outside_s[segment]), int(self.inside_s[segment + 1]))

    def outside(self, index_k: Tensor) -> Tensor:
        """Coordinates of the group as coordinates of the whole; int64."""
        inside_k = index_k.numpy().astype(np.int64)
        segment_k = np.searchsorted(self.inside_s, inside_k, side="right") - 1
        return torch.from_numpy(inside_k + (self.outside_s - self.inside_s[:-1])[segment_k])

    def runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """[start, stop) of the group as stretches of the whole: (start in the group, start in the whole, length)."""
        found, segment = [], int(np.searchsorted(self.inside_s, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.inside_s[segment + 1]))
            found.append((start, int(self.outside_s[segment] + start - self.inside_s[segment]), end - start))
            start, segment = end, segment + 1
        return found

    def gather(self, whole_d: Tensor) -> Tensor:
        """The group's part of a whole vector, copied to the CPU."""
        group_d = torch.empty(self.d)
        for inside, outside, length in self.runs(0, self.d):
            group_d[inside : inside + length] = whole_d[outside : outside + length].detach()
        return group_d

    def scatter(self, group_d: Tensor, whole_d: Tensor) -> None:
        """The inverse of `gather`, in place."""
        for inside, outside, length in self.runs(0, self.d):
            whole_d[outside : outside + length] = group_d[inside : inside + length]


def matching(patterns: tuple[str, ...]) -> Callable[[TensorSpec], int]:
    """Which rule a tensor falls under: the first whose pattern its name matches; the last is `else`."""

    def rule_of(tensor: TensorSpec) -> int:
        for rule, pattern in enumerate(patterns):
            if pattern == ELSE or (pattern == VECTORS and len(tensor.shape) < 2):
                return rule
            if pattern != VECTORS and fnmatchcase(tensor.name, pattern):
                return rule
        return len(patterns) - 1

    return rule_of


def groups_of(schema: Schema, rule_of: Callable[[TensorSpec], int]) -> tuple[Group, ...]:
    """The groups that have tensors, in the order of the rules."""
    tensors: dict[int, list[tuple[TensorSpec, int]]] = {}
    for tensor, offset in zip(schema.tensors, schema.offsets, strict=True):
        tensors.setdefault(rule_of(tensor), []).append((tensor, offset))
    return tuple(_group(rule, tensors[rule]) for rule in sorted(tensors))


def _group(rule: int, items: list[tuple[TensorSpec, int]]) -> Group:
    outside, inside, length, end = [], [], 0, -1
    for tensor, offset in items:
        if offset != end:
            outside.append(offset)
            inside.append(length)
        length, end = length + tensor.numel, offset + tensor.numel
    schema = Schema(tuple(tensor for tensor, _ in items))
    return Group(rule, schema, np.array(outside, np.int64), np.array([*inside, length], np.int64))


def join(parts: list[tuple[Group, int, Row]], start: int, stop: int) -> Row:
    """One window of the whole from the groups' spans, each with its start in the group; sparse if all of them are."""
    if len(parts) == 1 and _length(parts[0][2]) == stop - start:
        return parts[0][2]
    if all(isinstance(row, SparseRow) for _, _, row in parts):
        return _join_sparse(parts, start, stop)
    value_d = torch.zeros(stop - start)
    for group, first, row in parts:
        if isinstance(row, SparseRow):
            value_d[group.outside(row.index_k + first) - start] = row.value_k
            continue
        for inside, outside, length in group.runs(first, first + len(row.value_d)):
            value_d[outside - start : outside - start + length] = row.value_d[inside - first : inside - first + length]
    return DenseRow(value_d)


def _join_sparse(parts: list[tuple[Group, int, Row]], start: int, stop: int) -> SparseRow[Tensor]:
    index_k = torch.cat(
        [group.outside(row.index_k + first) - start for group, first, row in parts if isinstance(row, SparseRow)]
    )
    value_k = torch.cat([row.value_k for _, _, row in parts if isinstance(row, SparseRow)])
    order_k = index_k.argsort()
    return SparseRow(stop - start, index_k[order_k], value_k[order_k])


def _length(row: Row) -> int:
    return row.size if isinstance(row, SparseRow) else len(row.value_d)
