"""How masses and offsets travel between members who mix: what a machine's `Split`, `Move` and `Meet` mean in vectors.

Three kinds: whole numerators (fp32: splitting and adding them is exact), flows along edges with copies (codecs that
round), and offsets of pairs. All run in worker threads, one call at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from farflung.aggregation.flow import Flow, FlowMessage, InEdge, OutEdge
from farflung.aggregation.mass import Mass, Sums
from farflung.aggregation.outer import norm
from farflung.aggregation.pairs import Offer as PairOffer
from farflung.aggregation.pairs import PairRound
from farflung.aggregation.push_sum import PushSumRound
from farflung.node.blob_sources import MemoryBlob
from farflung.node.mixing_codec import MixingCodec
from farflung.protocol.errors import LocalError
from farflung.protocol.identity import PeerId
from farflung.protocol.ledger.books import Terms
from farflung.protocol.ledger.effects import Credit, Returned
from farflung.protocol.ledger.messages import Parcel
from farflung.protocol.mixing.account import Adrift, Totals
from farflung.protocol.mixing.notes import Note, Offer
from farflung.protocol.mixing.push_sum import Move, Posted, PushSumMachine


class Share(NamedTuple):
    """One receiver's part of a tick: what the machine posts, and the vector to be put on offer."""

    posted: Posted
    blob: MemoryBlob


Shares = dict[tuple[PeerId, int], Share | None]
Key = tuple[PeerId, int, int]
"""(peer, fragment, seq) of a parcel."""


class MassCarrier(Protocol):
    """Moves a member's masses as its machine says."""

    def split(self, tick: int, machine: PushSumMachine) -> Shares:
        """Divide for a tick; what is not posted has stayed."""

    def read(self, peer: PeerId, note: Note, payload: bytes) -> None:
        """A parcel's vector is here: decode and keep it until it counts. Raises PeerError if it cannot count."""

    def move(self, move: Move) -> None:
        """Mass moves: counted, settled, home or lapsed."""

    def sums(self, part: int) -> Sums:
        """Of what is held now."""

    def adrift(self, part: int, machine: PushSumMachine) -> tuple[Adrift, ...]:
        """Σ s of every parcel without word."""


@dataclass
class WholeCarrier:
    """Whole numerators: a parcel is a payload of s, and w is in its note. Escrow is the payload itself."""

    round: PushSumRound
    members: tuple[PeerId, ...]
    codec: MixingCodec
    round_index: int
    terms: Terms
    weight_max: float
    counted: int = 0
    """Parcels that were counted here."""
    _read: dict[Key, Mass] = field(default_factory=dict)
    _escrow: dict[Key, tuple[bytes, float]] = field(default_factory=dict)

    def split(self, tick: int, machine: PushSumMachine) -> Shares:
        """See `MassCarrier`."""
        shares: Shares = {}
        for at, parts in sorted(self.round.send().items()):
            peer = self.members[at]
            for part, mass in enumerate(parts):
                fits = Fraction(mass.weight) >= self.terms.mass_min and machine.room(peer, part) > 0
                if not fits:
                    self.round.masses[part].absorb(mass)
                    shares[peer, part] = None
                    continue
                payload = self.codec.encode(part, mass.numerator_d, self.round_index)
                seq = machine.ledgers[part].out[peer].next_seq
                self._escrow[peer, part, seq] = payload, mass.sums().total
                blob = MemoryBlob.of(payload)
                shares[peer, part] = Share(Posted(Fraction(mass.weight), blob.ref), blob)
        return shares

    def read(self, peer: PeerId, note: Note, payload: bytes) -> None:
        """See `MassCarrier`."""
        assert isinstance(note.content, Parcel)
        numerator_d = self.codec.decode(note.fragment, payload, self.round_index)
        weight = float(note.content.amount.mass)
        mass = Mass.received(numerator_d, weight, weight_max=self.weight_max, peer=peer.short)
        self._read[peer, note.fragment, note.content.seq] = mass

    def move(self, move: Move) -> None:
        """See `MassCarrier`."""
        effect, part = move.effect, move.fragment
        key = (effect.peer, part, effect.seq)
        held = self.round.masses[part]
        if isinstance(effect, Credit):
            held.absorb(self._read.pop(key))
            self.counted += 1
            return
        payload, _ = self._escrow.pop(key)
        if isinstance(effect, Returned):
            numerator_d = self.codec.decode(part, payload, self.round_index)
            held.absorb(Mass(numerator_d, float(effect.amount.mass)))

    def sums(self, part: int) -> Sums:
        """See `MassCarrier`."""
        return self.round.masses[part].sums()

    def adrift(self, part: int, machine: PushSumMachine) -> tuple[Adrift, ...]:
        """See `MassCarrier`."""
        return _adrift(part, machine, {key: total for key, (_, total) in self._escrow.items()})


@dataclass
class FlowCarrier:
    """Flows (`aggregation.flow`): a parcel is a change to the edge's copy; copies start at zero in every round."""

    round: PushSumRound
    members: tuple[PeerId, ...]
    codec: MixingCodec
    round_index: int
    terms: Terms
    weight_max: float
    gamma: float
    movement: float
    """How far the local phase went, a fragment's part of ‖φ − θ_i‖: by this what rounding leaves out is measured."""
    counted: int = 0
    noise: float = 0.0
    """What rounding left out of the first messages, relative to that; offsets grow as their reference ages."""
    _out: dict[tuple[PeerId, int], OutEdge] = field(default_factory=dict)
    _in: dict[tuple[PeerId, int], InEdge] = field(default_factory=dict)
    _read: dict[Key, tuple[FlowMessage, Tensor]] = field(default_factory=dict)
    """Messages and the copies that they lead to."""
    _total: dict[Key, float] = field(default_factory=dict)
    _flows: list[Flow] = field(init=False)

    def __post_init__(self) -> None:
        parts = range(len(self.round.masses))
        self._flows = [self.codec.flow(part, self.gamma, self.round_index) for part in parts]

    def split(self, tick: int, machine: PushSumMachine) -> Shares:
        """See `MassCarrier`. Shares are of what was held when the tick began; a busy edge's stays."""
        shares: Shares = {}
        sends = self.round.plan[tick][self.round.me].sends
        self.round.tick = tick + 1
        for part, mass in enumerate(self.round.masses):
            whole, total = mass.weight, mass.sums().total
            for share in sends:
                peer, flowing = self.members[share.to], self.gamma * share.share * whole
                edge = self._edge_to(peer, part)
                if Fraction(flowing) < self.terms.mass_min or edge.busy or not machine.room(peer, part):
                    shares[peer, part] = None
                    continue
                ratio_d = mass.ratio() if tick == 0 and self.movement else None
                message = edge.send(mass, flowing)
                if ratio_d is not None:
                    self.noise = max(self.noise, norm(ratio_d - edge.said_d) / self.movement)
                blob = MemoryBlob.of(message.payload)
                seq = machine.ledgers[part].out[peer].next_seq
                before, total = total, mass.sums().total
                self._total[peer, part, seq] = before - total
                shares[peer, part] = Share(Posted(Fraction(message.weight), blob.ref, message.copy_hash), blob)
        return shares

    def read(self, peer: PeerId, note: Note, payload: bytes) -> None:
        """See `MassCarrier`. Whether it fits the edge's copy is seen now: what has counted cannot be refused."""
        assert isinstance(note.content, Parcel)
        message = FlowMessage(payload, float(note.content.amount.mass), note.copy_hash)
        edge, threads = self._edge_from(peer, note.fragment), self.round.masses[note.fragment].threads
        next_d = edge.check(message, weight_max=self.weight_max, peer=peer.short, threads=threads)
        self._read[peer, note.fragment, note.content.seq] = message, next_d

    def move(self, move: Move) -> None:
        """See `MassCarrier`."""
        effect, part = move.effect, move.fragment
        key, held = (effect.peer, part, effect.seq), self.round.masses[part]
        if isinstance(effect, Credit):
            self._edge_from(effect.peer, part).count(held, *self._read.pop(key))
            self.counted += 1
            return
        self._total.pop(key)
        out = self._out[effect.peer, part]
        if isinstance(effect, Returned):
            out.returned(held)
        else:
            out.settled()

    def sums(self, part: int) -> Sums:
        """See `MassCarrier`."""
        return self.round.masses[part].sums()

    def adrift(self, part: int, machine: PushSumMachine) -> tuple[Adrift, ...]:
        """See `MassCarrier`."""
        return _adrift(part, machine, self._total)

    def _edge_to(self, peer: PeerId, part: int) -> OutEdge:
        if (peer, part) not in self._out:
            self._out[peer, part] = OutEdge(self._flows[part], torch.zeros_like(self.round.masses[part].numerator_d))
        return self._out[peer, part]

    def _edge_from(self, peer: PeerId, part: int) -> InEdge:
        if (peer, part) not in self._in:
            self._in[peer, part] = InEdge(self._flows[part], torch.zeros_like(self.round.masses[part].numerator_d))
        return self._in[peer, part]


def _adrift(part: int, machine: PushSumMachine, totals: Mapping[Key, float]) -> tuple[Adrift, ...]:
    ledger = machine.ledgers[part]
    return tuple(
        Adrift(peer, item.seq, totals[peer, part, item.seq])
        for peer in sorted(ledger.out)
        for item in ledger.out[peer].escrow
    )


def totals_of(carrier: MassCarrier, part: int, began: Sums, machine: PushSumMachine) -> Totals:
    """What the account says of a fragment's numerator."""
    return Totals(began.total, carrier.sums(part).total, began.magnitude, carrier.adrift(part, machine))


@dataclass
class PairCarrier:
    """Offsets of pairs: each tells the other where it was before they meet. A member without mass idles."""

    rounds: tuple[PairRound | None, ...]
    """By fragment; None: it brings nothing, and stays where it is."""

    codec: MixingCodec
    round_index: int
    weights: Mapping[PeerId, float]
    """What each member counts for, as certified; what a partner says of itself is not asked."""
    movement: float
    met: int = 0
    clipped: int = 0
    least_clip: float = 1.0
    """By what the most shortened meeting was multiplied."""
    noise: float = 0.0
    """See `FlowCarrier`."""
    _offers: dict[tuple[int, int], PairOffer] = field(default_factory=dict)
    _read: dict[tuple[PeerId, int, int], Tensor] = field(default_factory=dict)

    def offers(self, tick: int, partner: PeerId | None) -> dict[tuple[PeerId, int], tuple[Offer, MemoryBlob] | None]:
        """This tick's offer of every fragment, and where this member is."""
        made: dict[tuple[PeerId, int], tuple[Offer, MemoryBlob] | None] = {}
        for part, pair in enumerate(self.rounds if partner is not None else ()):
            assert partner is not None
            if pair is None:
                made[partner, part] = None
                continue
            offer = self._offers[part, tick] = pair.offer()
            payload = self.codec.encode(part, pair.z_d, self.round_index)
            if self.movement and not self.codec.exact:
                lost = norm(pair.z_d - self.codec.decode(part, payload, self.round_index))
                self.noise = max(self.noise, lost / self.movement)
            blob = MemoryBlob.of(payload)
            made[partner, part] = Offer(offer.radius, offer.weight), blob
        return made

    def read(self, peer: PeerId, note: Note, payload: bytes) -> None:
        """A partner's vector is here. Raises PeerError if it cannot be read."""
        self._read[peer, note.fragment, note.tick] = self.codec.decode(note.fragment, payload, self.round_index)

    def meet(self, peer: PeerId, note: Note) -> None:
        """Move towards the partner. Raises PeerError, having changed nothing, if it cannot be believed."""
        theirs_d = self._read.pop((peer, note.fragment, note.tick))
        pair, said = self.rounds[note.fragment], note.content
        if pair is None:
            return
        if not isinstance(said, Offer):
            raise LocalError("a meeting without an offer")
        mine = self._offers[note.fragment, note.tick]
        meeting = pair.meet(PairOffer(said.radius, self.weights[peer]), theirs_d, peer=peer.short, mine=mine)
        self.met += 1
        self.clipped += meeting.clip < 1
        self.least_clip = min(self.least_clip, meeting.clip)
