"""Compressed push-sum in flow form: both ends of an edge hold one copy of the sender's ratio, and mass flows by it.

Per edge i -> j and message, with C the codec, a the share of the tick's mixing and γ <= 1:

    q = C(s_i / w_i − c)     c' = c + q      p = γ a w_i
    w_i −= p                 s_i −= p c'     at the sender, when it sends
    w_j += p                 s_j += p c'     at the receiver, when it counts the message

Only q's payload and p travel. Whatever C throws away, the same p c' leaves one end and reaches the other, so mass is
conserved for any codec, up to one rounding at each end; w is exact. Where c is the ratio, this is push-sum. As members
agree, ratios stand still, copies catch up with them and what C throws away goes to zero. (CHOCO's public copies,
arXiv:1902.00340, for push-sum; kept per edge, so that a lost message leaves no trace: with one copy per member 5 % of
silent loss left an error of 1.4.) Copies of numerators would never catch up under loss: weights keep changing, and
numerators with them. Measured over 8 members and 20 % loss: with copies of numerators int8 stays at an error of 1.6e-3
for ever; with copies of ratios int8, int4 and 3 bits are below 1e-7 after 40 ticks and at 1e-15 after 80.

A message moves c at the receiver when it counts, and at the sender when it is known to have counted; if it came home
instead, the flow is undone and c stays. So one message is under way per edge at a time, and both ends' copies are equal
after every acknowledgement. That is checked: a message names, by a hash, the payloads its copy was made of.

Copies start at zero. Where they restart with every round, the first message on an edge sends C(s / w) itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from farflung.aggregation.graphs import Share
from farflung.aggregation.mass import Mass, check_vectors, sweep
from farflung.protocol.errors import ConfigError, LocalError, PeerError
from farflung.protocol.limits import PAYLOAD_ABS_MAX

GAMMA_SPARSE_MAX = 0.1
"""Measured with 5 % of the coordinates per message and 20 % loss: γ = 1 diverges; after 800 ticks 0.5 is at 1e-3,
0.1 at 2e-10. Copies of numerators needed 0.05 (with 0.2 they stalled at 5e-3); the bound stays on the safe side."""

GAMMA_COARSE_MAX = 0.5
"""For fewer than 3 bits. Measured with levels -1, 0 and 1 and 20 % loss: γ = 1 never settles; 0.7 and 0.5 do, and are
at 1e-5 and 1e-7 after 80 ticks. 3 bits settle with γ = 1."""

ORIGIN = hashlib.sha256(b"farflung edge copy\0").digest()
"""The hash of a copy that nothing was added to: all zeros."""


class FlowCodec(NamedTuple):
    """A codec as two functions and what `check_flow` must know about it. Decoding gives the same bits everywhere."""

    spec: str
    encode: Callable[[Tensor], bytes]
    """Vector [d] of the masses' type -> payload."""

    decode: Callable[[bytes], Tensor]
    """Payload -> vector [d] of the masses' type. Raises PeerError if the payload is malformed or of another length."""

    kept: float
    """The part of the coordinates that a payload carries; 1 for dense codecs."""

    value_bits: float
    """Bits per value carried, its scale apart: 8, 4, ..., 1 for a bare sign."""


@dataclass(frozen=True, slots=True)
class Flow:
    """The rule of all edges of a run: a codec and γ. Raises ConfigError for what is known not to settle."""

    codec: FlowCodec
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_flow(self.codec, self.gamma)


def check_flow(codec: FlowCodec, gamma: float) -> None:
    """Raise ConfigError, with the measured reason, unless this codec settles with this γ."""
    if not 0 < gamma <= 1:
        raise ConfigError(f"gamma of push-sum flows lies above 0 and within 1, got {gamma}")
    if codec.value_bits <= 1:
        raise ConfigError(
            "bare signs cannot carry push-sum: copies overshoot for ever and members never agree; use int8 or int4, "
            f"got {codec.spec!r}"
        )
    if codec.value_bits < 3 and gamma > GAMMA_COARSE_MAX:
        raise ConfigError(
            "a codec of fewer than 3 bits on push-sum edges needs a smaller gamma: with 1 members never agree; set "
            f"gamma <= {GAMMA_COARSE_MAX} or use int8 or int4, got {codec.spec!r} and gamma = {gamma}"
        )
    if codec.kept < 1 and gamma > GAMMA_SPARSE_MAX:
        raise ConfigError(
            "a sparse codec on push-sum edges needs a small gamma: with 5 % of the coordinates gamma = 1 diverges; set "
            f"gamma <= {GAMMA_SPARSE_MAX} or use int8 or int4, got {codec.spec!r} and gamma = {gamma}"
        )


class FlowMessage(NamedTuple):
    """What travels."""

    payload: bytes
    weight: float
    """p: what left w at the sender is what arrives."""

    copy_hash: bytes
    """Of the copy that the payload is to be added to: 32 bytes."""


class _Pending(NamedTuple):
    copy_d: Tensor
    weight: float
    copy_hash: bytes


@dataclass(slots=True)
class OutEdge:
    """The sender's end of an edge: its copy, and the one message that may be under way."""

    flow: Flow
    copy_d: Tensor
    copy_hash: bytes = ORIGIN
    _pending: _Pending | None = field(default=None, repr=False)

    @property
    def busy(self) -> bool:
        """Is a message under way? Then this tick's share stays at home."""
        return self._pending is not None

    def send(self, mass: Mass, part: float) -> FlowMessage:
        """Let `part` of the mass's weight flow out, and say so. Until `settled` or `returned` the edge is busy.

        Costs an encoding, a decoding and three passes. Raises LocalError if the edge is busy, or the part is not
        positive or leaves nothing.
        """
        if self._pending is not None or not 0 < part < mass.weight:
            raise LocalError(
                f"an edge sends one message at a time, of a part; busy: {self.busy}, {part}, {mass.weight}"
            )
        payload = self.flow.codec.encode(mass.lag(self.copy_d))
        next_d = advanced(self.copy_d, self.flow.codec.decode(payload), mass.threads)
        weight = mass.drain(next_d, part)
        self._pending = _Pending(next_d, weight, chained(self.copy_hash, payload))
        return FlowMessage(payload, weight, self.copy_hash)

    @property
    def said_d(self) -> Tensor:
        """The copy [d] once what is under way has counted. Raises LocalError if nothing is."""
        if self._pending is None:
            raise LocalError("no message is under way on this edge")
        return self._pending.copy_d

    def settled(self) -> None:
        """The message counted there: the copies agree on the new one. Raises LocalError if none was under way."""
        pending = self._take()
        self.copy_d, self.copy_hash = pending.copy_d, pending.copy_hash

    def returned(self, mass: Mass) -> None:
        """The message can no longer count there: its flow comes home, the copy stays. Raises LocalError likewise."""
        pending = self._take()
        mass.pour(pending.copy_d, pending.weight)

    def _take(self) -> _Pending:
        pending, self._pending = self._pending, None
        if pending is None:
            raise LocalError("no message was under way on this edge")
        return pending


@dataclass(slots=True)
class InEdge:
    """The receiver's end of an edge: its copy of the sender's ratio."""

    flow: Flow
    copy_d: Tensor
    copy_hash: bytes = ORIGIN

    def receive(self, mass: Mass, message: FlowMessage, *, weight_max: float, peer: str) -> None:
        """Count a message: let its flow in and advance the copy. To be called once per message: the ledger sees to it.

        Raises PeerError, and changes nothing, if the message builds on another copy, its weight does not lie above 0
        and within weight_max, the payload is malformed, or the copy would hold entries that are not finite or beyond
        PAYLOAD_ABS_MAX.
        """
        self.count(mass, message, self.check(message, weight_max=weight_max, peer=peer, threads=mass.threads))

    def check(self, message: FlowMessage, *, weight_max: float, peer: str, threads: int = 1) -> Tensor:
        """The copy [d] if the message counts; nothing changes. For `count`, later. Raises PeerError as `receive`."""
        from farflung.aggregation.kernels import mass as kernels

        if message.copy_hash != self.copy_hash:
            raise PeerError(
                peer, f"sent a change to copy {message.copy_hash.hex()[:8]}, not {self.copy_hash.hex()[:8]}"
            )
        if not 0 < message.weight <= weight_max:
            raise PeerError(peer, f"sent a mass of weight {message.weight}, the most there is being {weight_max}")
        next_d = advanced(self.copy_d, self.flow.codec.decode(message.payload), threads)
        copy = next_d.numpy()
        pieces = sweep(len(copy), threads, lambda at: kernels.measure(copy[at]))
        size, largest = sum(piece[1] for piece in pieces), max((piece[2] for piece in pieces), default=0.0)
        if not (math.isfinite(size) and largest <= PAYLOAD_ABS_MAX):
            raise PeerError(peer, f"sent a change that makes its ratio as large as {largest}")
        return next_d

    def count(self, mass: Mass, message: FlowMessage, next_d: Tensor) -> None:
        """Let a checked message's flow in. Raises LocalError if another message counted since it was checked."""
        if message.copy_hash != self.copy_hash:
            raise LocalError("a message that was checked against another copy")
        mass.pour(next_d, message.weight)
        self.copy_d, self.copy_hash = next_d, chained(self.copy_hash, message.payload)


def send_flows(mass: Mass, sends: Sequence[Share], edges: Mapping[int, OutEdge]) -> dict[int, FlowMessage]:
    """One tick of one member: receiver -> message, every share being γ times that of the weight at the tick's start.

    The share of an edge that is still busy stays at home, and so does everything of a mass without weight: it has
    nothing to say. Raises KeyError if an edge is missing.
    """
    whole, messages = mass.weight, dict[int, FlowMessage]()
    for receiver, share in sends:
        edge = edges[receiver]
        if whole and not edge.busy:
            messages[receiver] = edge.send(mass, edge.flow.gamma * share * whole)
    return messages


def advanced(copy_d: Tensor, change_d: Tensor, threads: int = 1) -> Tensor:
    """c + q [d], one rounding: the same bits at both ends. Neither argument is changed."""
    from farflung.aggregation.kernels import mass as kernels

    check_vectors(copy_d, change_d)
    next_d = copy_d.clone()
    out, change = next_d.numpy(), change_d.numpy()
    sweep(len(out), threads, lambda at: kernels.absorb(out[at], change[at]))
    return next_d


def chained(copy_hash: bytes, payload: bytes) -> bytes:
    """The hash of a copy after a payload was added to it: it stands for the copy, as decoding is exact."""
    return hashlib.sha256(copy_hash + hashlib.sha256(payload).digest()).digest()
