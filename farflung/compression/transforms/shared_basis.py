"""Low rank with one factor known to all: half of PowerSGD's bits, no indices, and payloads that may be averaged."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from farflung.compression.codec import Codec, Link, Reader
from farflung.compression.scheme import Floats
from farflung.compression.stage import require
from farflung.compression.transforms.derived import (
    Doubles,
    admit,
    read_whole,
    saved_floats,
    seeded_uniform,
    to_floats,
)
from farflung.compression.transforms.factors import (
    Factors,
    Layout,
    Part,
    layout_of,
    left_times,
    matrix_of,
    orthonormal,
    reader_of,
    right_times,
)
from farflung.compression.transforms.transform import Carried
from farflung.protocol.errors import LocalError
from farflung.protocol.rows import Verdict
from farflung.protocol.schema import Schema

Side = Literal["P", "Q"]
"""What members send: P = M Q with Q known, or Q = M^T P with P known."""


class Basis(NamedTuple):
    """The state that all members hold alike: what they send in this round, and the other factor of every matrix."""

    sends: Side
    schema: Schema
    known: tuple[Floats, ...]
    """Per matrix, orthonormal up to fp32: [r, n] if P is sent, [r, m] if Q is."""
    inner: Any
    """Shared states of the inner codec, for P and for Q."""


def shared_lowrank(rank: int, inner: Codec) -> Codec:
    """Send M Q while all know Q, then M^T P while all know P, in turn; M^ = (M Q) Q^T or P (M^T P)^T.

    The aggregate's factor of one round, made orthonormal, is the known basis of the next: `advance` computes
    P = orth(A Q) from the decoded aggregate A, and then Q = orth(A^T P). Both sides so follow the power iteration of
    arXiv:1905.13727, Alg. 1, one half per round, and no member sends a basis. Directions that the aggregate does not
    fill are replaced by random ones, the same for all. A projection: ||M - M^|| <= ||M||; linear: the mean of members'
    factors is the factor of their mean, so payloads of a linear inner codec may be summed on the way. On a constant
    matrix of rank <= r the second round is exact up to rounding. Put `ef` before it, not behind: the basis turns.
    Factors are sent divided by the power of two next above sqrt(n) (or m), so that they lie within the update's range.
    Costs r / n and r / m inner parameters per parameter, in turn. State: r x max(m, n) shared numbers per matrix.
    """

    def init(schema: Schema) -> tuple[Carried, Basis]:
        known = []
        for part in _matrices(schema, rank):
            basis_rn = seeded_uniform(f"basis {part.name}", rank, part.columns)
            orthonormal(basis_rn, f"basis {part.name}")
            known.append(to_floats(basis_rn))
        states = [inner.init(layout_of(schema, rank, side).derived) for side in _SIDES]
        shared = Basis("P", schema, tuple(known), tuple(state[1] for state in states))
        return Carried(schema, None, tuple(state[0] for state in states)), shared

    def encode(update_d: Tensor, private: Carried, shared: Basis, round_index: int) -> tuple[bytes, Carried]:
        turn = _SIDES.index(shared.sends)
        derived_d = _project(
            admit(update_d, private.schema.numel), layout_of(private.schema, rank, shared.sends), rank, shared
        )
        payload, state = inner.encode(torch.from_numpy(derived_d), private.inner[turn], shared.inner[turn], round_index)
        states = (state, private.inner[1]) if turn == 0 else (private.inner[0], state)
        return payload, private._replace(inner=states)

    def open_(payload: bytes, schema: Schema, shared: Basis, round_index: int) -> Reader:
        now = layout_of(schema, rank, shared.sends)
        read = inner.open(payload, now.derived, shared.inner[_SIDES.index(shared.sends)], round_index)
        return reader_of(now, _unproject(read_whole(read, now.derived.numel), now, rank, shared))

    def check(payload: bytes, schema: Schema, shared: Basis, round_index: int) -> None:
        turn = _SIDES.index(shared.sends)
        inner.check(payload, layout_of(schema, rank, shared.sends).derived, shared.inner[turn], round_index)

    def bits(schema: Schema) -> float:
        derived = [layout_of(schema, rank, side).derived for side in _SIDES]
        return max(inner.bits(one) * one.numel for one in derived) / schema.numel

    require(rank >= 1, f"a rank is at least 1, got {rank}")
    core = Codec(
        spec=f"lowrank({rank}, shared)|{inner.spec}",
        exact=inner.exact,
        init=init,
        encode=encode,
        open=open_,
        check=check,
        bits=bits,
        advance=lambda shared, update_d, round_index: _turned(
            shared, admit(update_d, shared.schema.numel), rank, round_index
        ),
    )
    return _with_private(rank, inner, _with_shared(rank, inner, core))


def _with_shared(rank: int, inner: Codec, core: Codec) -> Codec:
    """How the basis is saved."""

    def shared_tensors(shared: Basis) -> dict[str, Tensor]:
        found = {}
        for part, known in zip(_matrices(shared.schema, rank), shared.known, strict=True):
            padded = np.zeros((rank, max(part.rows, part.columns)), np.float32)  # of one shape, whoever's turn it is
            padded[:, : known.shape[1]] = known
            found[f"basis.{part.name}"] = torch.from_numpy(padded)
        turn = torch.tensor([float(_SIDES.index(shared.sends))])
        return dict(sorted(found.items())) | {"turn": turn}

    def restore_shared(schema: Schema, tensors: dict[str, Tensor]) -> Basis:
        turn = float(saved_floats(tensors, "turn", (1,))[0])
        if turn not in (0.0, 1.0):
            raise LocalError(f"a shared basis is in turn 0 or 1, got {turn}")
        sends, known = _SIDES[int(turn)], []
        for part in _matrices(schema, rank):
            padded = saved_floats(tensors, f"basis.{part.name}", (rank, max(part.rows, part.columns)))
            known.append(np.ascontiguousarray(padded[:, : part.columns if sends == "P" else part.rows]))
        inside = tuple(inner.restore_shared(layout_of(schema, rank, side).derived, {}) for side in _SIDES)
        return Basis(sends, schema, tuple(known), inside)

    return core._replace(shared_tensors=shared_tensors, restore_shared=restore_shared)


def _with_private(rank: int, inner: Codec, core: Codec) -> Codec:
    """The inner codec has two private states, for P and for Q, and nothing to save in either."""

    def restore_private(schema: Schema, tensors: dict[str, Tensor]) -> Carried:
        derived = (layout_of(schema, rank, side).derived for side in _SIDES)
        return Carried(schema, None, tuple(inner.restore_private(one, {}) for one in derived))

    def observe(private: Carried, verdict: Verdict) -> Carried:
        return private._replace(inner=tuple(inner.observe(state, verdict) for state in private.inner))

    def tune(private: Carried, link: Link) -> Carried:
        return private._replace(inner=tuple(inner.tune(state, link) for state in private.inner))

    return core._replace(restore_private=restore_private, observe=observe, tune=tune)


_SIDES: tuple[Side, Side] = ("P", "Q")


def _matrices(schema: Schema, rank: int) -> list[Part]:
    return [part for part in layout_of(schema, rank, "P").parts if part.rows]


def _unit(length: int) -> float:
    """The smallest power of two whose square is at least `length`."""
    return float(1 << ((length - 1).bit_length() + 1) // 2)


def _project(update_d: Floats, layout: Layout, rank: int, shared: Basis) -> Floats:
    """The derived vector: each matrix times its known factor."""
    derived_d = np.empty(layout.derived.numel, np.float32)
    known = iter(shared.known)
    for part in layout.parts:
        if not part.rows:
            derived_d[part.at : part.at + part.size] = update_d[part.start : part.start + part.size]
            continue
        factor = _times(matrix_of(part, update_d), next(known), shared.sends)
        factor /= _unit(part.columns if shared.sends == "P" else part.rows)
        derived_d[part.at : part.at + factor.size] = to_floats(factor).reshape(-1)
    return derived_d


def _unproject(derived_d: Floats, layout: Layout, rank: int, shared: Basis) -> list[Factors | Floats]:
    factors: list[Factors | Floats] = []
    known = iter(shared.known)
    for part in layout.parts:
        if not part.rows:
            factors.append(derived_d[part.at : part.at + part.size])
            continue
        ours, theirs = (part.rows, part.columns) if shared.sends == "P" else (part.columns, part.rows)
        sent = derived_d[part.at : part.at + rank * ours].reshape(rank, ours).astype(np.float64) * _unit(theirs)
        basis = next(known).astype(np.float64)
        factors.append(Factors(sent, basis) if shared.sends == "P" else Factors(basis, sent))
    return factors


def _times(matrix_mn: Floats, known: Floats, sends: Side) -> Doubles:
    basis = known.astype(np.float64)
    return left_times(matrix_mn, basis) if sends == "P" else right_times(matrix_mn, basis)


def _turned(shared: Basis, update_d: Floats, rank: int, round_index: int) -> Basis:
    """The other side's basis, from the aggregate's factor; empty directions are seeded by the round."""
    turned = []
    for part, known in zip(_matrices(shared.schema, rank), shared.known, strict=True):
        basis = _times(matrix_of(part, update_d), known, shared.sends)
        orthonormal(basis, f"basis {part.name} {round_index}")
        turned.append(to_floats(basis))
    return shared._replace(sends="Q" if shared.sends == "P" else "P", known=tuple(turned))
