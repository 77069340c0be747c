"""The contract of a codec: a value made of pure functions; the state belongs to the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from farflung.protocol.rows import DenseRow, SparseRow, Verdict
from farflung.protocol.schema import Schema

Private = Any
"""A member's own state (error feedback); an opaque value. `state_tensors` of the codec names what to save."""

Shared = Any
"""State every member holds alike (bases); moves only with a certificate, is part of the state digest."""


class Codec(NamedTuple):
    """How a pseudo-gradient becomes a payload and back. All eight functions are pure, with one leave:

    `encode` and `observe` take ownership of the private state they are given and may reuse its memory.
    """

    spec: str
    """Canonical text, e.g. "ef(0.95)|topk(64/4096)|q2"."""

    exact: bool
    """Whether decode gives the same bits on every machine."""

    init: Callable[[Schema], tuple[Private, Shared]]
    """schema -> fresh states."""

    encode: Callable[[Tensor, Private, Shared, int], tuple[bytes, Private]]
    """(update_d fp32 contiguous, private, shared, round) -> (canonical payload, private). Leaves update_d as it was.
    Raises LocalError if update_d is not finite."""

    decode: Callable[[bytes, Schema, Shared, int, int, int], DenseRow[Tensor] | SparseRow[Tensor]]
    """(payload, schema, shared, round, start, stop) -> that window of the row (see `rows.Rows.window`).
    Raises PeerError only, for every byte string that `encode` cannot have made; never allocates more than the window
    needs. Whole-payload checks (length, header) are made on every call and cost O(1)."""

    check: Callable[[bytes, Schema, Shared, int], None]
    """(payload, schema, shared, round) -> None. Raises PeerError unless every window would decode, every value is
    finite and at most limits.PAYLOAD_ABS_MAX, and the bytes are the canonical ones. Costs one pass over the payload."""

    observe: Callable[[Private, Verdict], Private]
    """What the certificate did with the member's row: commit, forfeit or reset the tentative error feedback."""

    advance: Callable[[Shared, Tensor], Shared]
    """(shared, update_d) -> shared, with a certificate."""

    bits: Callable[[Schema], float]
    """Worst-case payload bits per parameter."""

    private_tensors: Callable[[Private], dict[str, Tensor]]
    """Named tensors to save for a restart; empty when there is no state."""

    restore_private: Callable[[Schema, dict[str, Tensor]], Private]
    """The inverse of `private_tensors`. Raises LocalError if a tensor is missing or has the wrong shape."""
