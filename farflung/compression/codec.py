"""The contract of a codec: a value made of pure functions; the state belongs to the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from farflung.protocol.rows import DenseRow, SparseRow, Verdict
from farflung.protocol.schema import Schema

Private = Any
"""A member's own state (error feedback); an opaque value. `private_tensors` of the codec names what to save."""

Shared = Any
"""State every member holds alike (bases); moves only with a certificate, is part of the state digest."""

Row = DenseRow[Tensor] | SparseRow[Tensor]

Reader = Callable[[int, int], Row]
"""(start, stop) -> that window of a row (see `rows.Rows.window`): start is a multiple of WINDOW_ALIGN, stop another one
or d. Pure, and called from several threads at once. Raises PeerError if the window's bytes are not canonical."""


class Link(NamedTuple):
    """What a member measured of its own line and round, for codecs that choose their rate (see `Codec.tune`)."""

    upload_bps: float
    """Bits per second that the payload left with; 0: not measured yet."""
    download_bps: float
    local_s: float
    """Seconds of the last local phase."""
    members: int


class Records(NamedTuple):
    """Fixed-size records of d coordinates in a format (`scheme.Scheme`), as they were before any entropy coder."""

    scheme: Any
    octets: bytes
    d: int


class Codec(NamedTuple):
    """How a pseudo-gradient becomes a payload and back. All functions are pure, with one leave:

    `encode`, `observe` and `tune` take ownership of the private state they are given and may reuse its memory.
    """

    spec: str
    """Canonical text, e.g. "ef(0.95)|topk(64/4096)|q2"."""

    exact: bool
    """Whether reading gives the same bits on every machine."""

    init: Callable[[Schema], tuple[Private, Shared]]
    """schema -> fresh states."""

    encode: Callable[[Tensor, Private, Shared, int], tuple[bytes, Private]]
    """(update_d fp32 contiguous, private, shared, round) -> (canonical payload, private). Leaves update_d as it was.
    Raises LocalError if update_d is not finite."""

    open: Callable[[bytes, Schema, Shared, int], Reader]
    """(payload, schema, shared, round) -> its reader. Raises PeerError only, here or from the reader, for every byte
    string that `encode` cannot have made; never allocates more than the schema allows. Costs O(1), or at most one pass
    over the payload and memory of its size for codecs that cannot be read window by window (they say so)."""

    check: Callable[[bytes, Schema, Shared, int], None]
    """(payload, schema, shared, round) -> None. Raises PeerError unless every window would decode, every value is
    finite and at most limits.PAYLOAD_ABS_MAX, and the bytes are the canonical ones. Costs one pass over the payload."""

    bits: Callable[[Schema], float]
    """Worst-case payload bits per parameter."""

    observe: Callable[[Private, Verdict], Private] = lambda private, verdict: private
    """What the certificate did with the member's row: commit, forfeit or reset the tentative error feedback."""

    private_tensors: Callable[[Private], dict[str, Tensor]] = lambda private: {}
    """Named tensors to save for a restart; empty when there is no state."""

    restore_private: Callable[[Schema, dict[str, Tensor]], Private] = lambda schema, tensors: None
    """The inverse of `private_tensors`. Raises LocalError if a tensor is missing or has the wrong shape."""

    advance: Callable[[Shared, Tensor, int], Shared] = lambda shared, update_d, round_index: shared
    """(shared, update_d, round) -> shared, with that round's certificate; a new value, the old one stays usable."""

    shared_tensors: Callable[[Shared], dict[str, Tensor]] = lambda shared: {}
    """Named fp32 tensors of the shared state, for the state digest and for joiners; empty when there is none. Names and
    shapes are those of `init` in every round: the length of the state is known before it is fetched."""

    restore_shared: Callable[[Schema, dict[str, Tensor]], Shared] = lambda schema, tensors: None
    """The inverse of `shared_tensors`. Raises LocalError if a tensor is missing or has the wrong shape."""

    ahead: Callable[[Private], Tensor | None] = lambda private: None
    """Own unsent progress to start the next local phase from, [d] fp32: phi <- theta - ahead (DESIGN §3); None: theta.
    A view of the private state, valid until the state is handed over again."""

    tune: Callable[[Private, Link], Private] = lambda private, link: private
    """What was measured since the last encode, told before the next one; only codecs that choose a rate listen."""

    scheme: Any = None
    """The `scheme.Scheme` behind the payload, if there is one: for code that fuses steps."""

    stream: Callable[[Any, Schema, int], bytes] | None = None
    """(a `scheme.Source`, schema, round) -> the payload that `encode` makes of those numbers, if it is made
    run after run and knows no state: for error feedback, which then does all its steps on a run while it is in the
    cache. What changes `encode` must change this or take it away."""

    records: Callable[[bytes, Schema, int], list[Records]] | None = None
    """(payload, schema, round) -> the plain records behind a payload that was checked, for what counts their entropy;
    None: it has none, or nobody has asked yet."""

    def decode(self, payload: bytes, schema: Schema, shared: Shared, round_index: int, start: int, stop: int) -> Row:
        """One window of a payload; `open` once instead where several are read."""
        return self.open(payload, schema, shared, round_index)(start, stop)
