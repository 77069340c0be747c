"""A member of persistent push-sum on a real network: its sum, its ledger, and what is on its way, kept in step.

The ledger says what counts once, what comes home and what must be on disk before a message leaves; here those words
move numerators. The shell carries out what the methods return, in order: at a `Persist` it saves `encode_member`, at a
`Send` of a parcel it also sends `payload`. All has been done by then, so the first `Persist` of a call saves all of it.
After a restart: `decode_member`, then `ledger.resend` to every peer. Wherever the crash came, and whatever was lost,

    Σ x held + Σ x escrowed and not counted there = Σ m θ joined with − Σ m η (Δ + μ b) taken

over the members, and likewise for w. An update that was not saved was not taken: its member trains it again.

Leaving takes a while: the others stop giving to the leaver, whose `hand_over` is repeated until it holds nothing and no
edge to or from it has anything unresolved. Only then may a certificate strike it, or the mass it was still owed would
count twice. Whoever is struck with mass in its hands takes it along; the ledger's `foreign` then says how much.

Memory: a vector for x, one for b, and one per parcel that is not acknowledged. `Terms.window` bounds those per edge; 1
or 2 is right for whole models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from torch import Tensor

from farflung.aggregation.graphs import Share
from farflung.aggregation.mass import Mass, Sums, add_sums, check_vectors
from farflung.aggregation.persistent import PersistentSum
from farflung.protocol.errors import ConfigError, LocalError, PeerError
from farflung.protocol.identity import PeerId
from farflung.protocol.ledger.amounts import Amount
from farflung.protocol.ledger.books import Ledger
from farflung.protocol.ledger.effects import Credit, LedgerEffect, Returned, Settled
from farflung.protocol.ledger.messages import LedgerMessage, Parcel

Escrow = dict[tuple[PeerId, int], Mass]
"""What left and is not known to be resolved: by receiver and sequence number."""


@dataclass(slots=True)
class PersistentMember:
    """One member, sans-I/O. Raises ConfigError if the ledger's mass is fresh in every round."""

    sum: PersistentSum
    ledger: Ledger
    escrow: Escrow = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ledger.terms.fresh:
            raise ConfigError("persistent mass needs a ledger with Terms(fresh=False)")

    def give(self, sends: Sequence[tuple[PeerId, float]]) -> list[LedgerEffect]:
        """Give each peer its share of what is here now. A share stays here if there is no edge, or its window is full;
        below the floor everything stays. Raises LocalError unless the shares are positive and leave something.
        """
        able = [(peer, share) for peer, share in sends if self.ledger.room(peer)]
        parts = self.sum.send([Share(at, share) for at, (_, share) in enumerate(able)])
        effects: list[LedgerEffect] = []
        for at, part in parts.items():
            effects += self._entrust(able[at][0], part, Fraction(part.weight))
        return effects

    def hand_over(self, peer: PeerId) -> list[LedgerEffect]:
        """Give a peer everything: for a leave. Nothing happens if nothing is here, or the edge's window is full."""
        if not self.sum.mass.weight or not self.ledger.room(peer):
            return []
        return self._entrust(peer, self.sum.leave(), self.ledger.balance)

    def payload(self, peer: PeerId, seq: int) -> Tensor:
        """The numerator [d] that a parcel carries, to be read and sent with it, the first time and again.

        Raises KeyError if the parcel is resolved: then nobody needs it.
        """
        return self.escrow[peer, seq].numerator_d

    def hear(self, peer: PeerId, message: LedgerMessage, numerator_d: Tensor | None = None) -> list[LedgerEffect]:
        """Take in a signed message; with a parcel, the numerator that came with it, whose memory is taken over.

        Raises PeerError, and changes nothing, if the ledger does, if the numerator is not the parcel's, or if it has
        entries beyond PAYLOAD_ABS_MAX times its weight; LocalError if it is missing or not of x's kind, which decoding
        should have seen to. A parcel that is decided already is not read.
        """
        arrived = None
        if isinstance(message, Parcel) and self._opens(peer, message):
            arrived = self._checked(peer, message.amount, numerator_d)
        return self._move(self.ledger.hear(peer, message), arrived)

    def open_round(
        self, round_index: int, *, evict: Collection[PeerId] = (), admit: Mapping[PeerId, int] | None = None
    ) -> list[LedgerEffect]:
        """Take in a certificate's changes of membership, as `Ledger.open_round`; what was on its way to those who are
        struck comes home. Raises LocalError if the order is wrong.
        """
        return self._move(self.ledger.open_round(round_index, None, evict=evict, admit=admit), None)

    def _entrust(self, peer: PeerId, part: Mass, weight: Fraction) -> list[LedgerEffect]:
        seq = self.ledger.out[peer].next_seq
        self.escrow[peer, seq] = part
        return self.ledger.send(peer, Amount(weight, numerator_digest(part.numerator_d)))

    def _opens(self, peer: PeerId, parcel: Parcel) -> bool:
        edge = self.ledger.into.get(peer)
        return edge is not None and edge.generation == parcel.generation and edge.is_open(parcel.seq)

    def _checked(self, peer: PeerId, amount: Amount, numerator_d: Tensor | None) -> Mass:
        if numerator_d is None:
            raise LocalError("a parcel is heard when its numerator is here")
        check_vectors(self.sum.mass.numerator_d, numerator_d)
        if numerator_digest(numerator_d) != amount.payload:
            raise PeerError(peer.short, "sent a numerator that is not its parcel's")
        most, threads = float(self.ledger.terms.mass_max), self.sum.mass.threads
        return Mass.received(numerator_d, float(amount.mass), weight_max=most, peer=peer.short, threads=threads)

    def _move(self, effects: Sequence[LedgerEffect], arrived: Mass | None) -> list[LedgerEffect]:
        """Do to numerators what the ledger did to weights; what is left for the shell to do."""
        rest: list[LedgerEffect] = []
        for effect in effects:
            match effect:
                case Credit():
                    assert arrived is not None, "counted without having been open"
                    self.sum.receive(arrived)
                case Returned(peer, seq, _):
                    self.sum.receive(self.escrow.pop((peer, seq)))
                case Settled(peer, seq, _):
                    del self.escrow[peer, seq]
                case _:
                    rest.append(effect)
        return rest


def numerator_digest(numerator_d: Tensor) -> bytes:
    """SHA-256 of a numerator's little-endian bytes: what binds it to its parcel."""
    values = numerator_d.detach().numpy()
    return hashlib.sha256(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data).digest()


def in_flight(members: Mapping[PeerId, PersistentMember]) -> list[Mass]:
    """What has left one of these members and no other has counted: the escrow without what is settled there already.

    For audits of members of one moment, all of them. Read only: the masses are the escrow's own.
    """
    found = []
    for me in sorted(members):
        for (peer, seq), mass in sorted(members[me].escrow.items(), key=lambda item: item[0]):
            edge = members[peer].ledger.into.get(me) if peer in members else None
            same = edge is not None and edge.generation == members[me].ledger.out[peer].generation
            if not (edge is not None and same and edge.receipt.decided(seq) is True):
                found.append(mass)
    return found


def total_of(members: Mapping[PeerId, PersistentMember]) -> Sums:
    """The audit's numbers over what members hold and what is in flight between them: see the module's identity."""
    held = [members[me].sum.sums() for me in sorted(members)]
    return add_sums([*held, *(mass.sums() for mass in in_flight(members))])
