"""One round's mixing as a member holds it: the machine, and the carrier that moves vectors for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from farflung.aggregation import pairs, push_sum
from farflung.aggregation.graphs import parse_graph, plan_round
from farflung.aggregation.mass import Mass, Sums, add_sums
from farflung.aggregation.outer import norm
from farflung.aggregation.pairs import Claims, PairRound, Radius
from farflung.node.carriers import FlowCarrier, PairCarrier, Share, WholeCarrier, totals_of
from farflung.node.mixing_codec import MixingCodec, cut
from farflung.node.reference import PAIR_WEIGHT_MIN, Roll
from farflung.node.replica import Replica
from farflung.protocol.errors import LocalError
from farflung.protocol.identity import PeerId
from farflung.protocol.ledger.books import Terms
from farflung.protocol.limits import EDGE_WINDOW_MAX
from farflung.protocol.manifest import Manifest
from farflung.protocol.mixing.account import Account, Book, Totals
from farflung.protocol.mixing.clockwork import plans_of
from farflung.protocol.mixing.meetings import PairMachine
from farflung.protocol.mixing.notes import Note, Offer
from farflung.protocol.mixing.push_sum import Move, Posted, PushSumMachine

if TYPE_CHECKING:
    from farflung.node.mixer import Mixer


LEVEL_CLIP = 0.5
"""Pairs: a late member whose meetings were all shortened by less than this is where its partners are: ordinary ones are
shortened too, as the radius is a median of usual distances."""


def terms_of(exact: bool) -> Terms:
    """The ledgers' terms of a run: copies of edges need one parcel at a time."""
    return Terms(mass_max=Fraction(1 << 9), window=EDGE_WINDOW_MAX if exact else 1)


@dataclass
class MixingRound:
    """`finish` ends it; until then every method is called by one thread at a time."""

    me: PeerId
    round_index: int
    machine: Any
    codec: MixingCodec
    carrier: Any
    began: tuple[Sums, ...]
    behind: int
    replica: Replica
    reference_d: Tensor
    threads: int
    alone: bool
    """Nobody else is on the list."""

    # -- vectors ------------------------------------------------------------------------------------------------------

    def split(self, tick: int) -> Mapping[tuple[PeerId, int], Any]:
        """(peer, fragment) -> what to post, and the blob to put on offer as its second part; None: nothing."""
        if isinstance(self.machine, PushSumMachine):
            shares: Mapping[tuple[PeerId, int], Any] = self.carrier.split(tick, self.machine)
            return shares
        partner = next(iter(self.machine.plan[tick].sends), None)
        offers: Mapping[tuple[PeerId, int], Any] = self.carrier.offers(tick, partner)
        return offers

    def posted(self, share: Any) -> Posted | tuple[Offer, Any]:
        """What the machine is told of a share."""
        return share.posted if isinstance(share, Share) else (share[0], share[1].ref)

    def read(self, peer: PeerId, note: Note, payload: bytes) -> None:
        """A vector is here."""
        self.carrier.read(peer, note, payload)

    def move(self, move: Move) -> None:
        """Mass moves."""
        self.carrier.move(move)

    def meet(self, peer: PeerId, note: Note) -> None:
        """A meeting of pairs."""
        self.carrier.meet(peer, note)

    # -- the end ------------------------------------------------------------------------------------------------------

    def account(self) -> Account:
        """What this member says of the round. To be taken when the machine closes its books."""
        books = []
        for part, began in enumerate(self.began):
            if isinstance(self.machine, PushSumMachine):
                totals = totals_of(self.carrier, part, began, self.machine)
                weight = Fraction(self.carrier.round.masses[part].weight)
                books.append(Book(self.machine.ledgers[part], weight, totals))
            else:
                pair = self.carrier.rounds[part]
                now = _pair_sums(pair)
                books.append(Book(None, Fraction(now.weight), Totals(began.total, now.total, began.magnitude)))
        return Account(self.me, 0, self.round_index, tuple(books))

    def finish(self, trained: int) -> dict[str, float]:
        """The outer step on this member's own parameters; returns numbers for the log."""
        replica, d = self.replica, len(self.reference_d)
        gradient_d = torch.empty(d)
        held = 0.0
        for part, at in enumerate(self.codec.parts):
            mass = self._held(part)
            if mass is None:
                gradient_d[at].zero_()
            else:
                held += mass.weight
                mass.gradient(replica.theta_d[at], self.reference_d[at], out_d=gradient_d[at])
        length = norm(gradient_d, threads=self.threads)
        if not math.isfinite(length):
            raise LocalError(f"round {self.round_index}: the mixing gave numbers that are not finite")
        if not held:
            replica.stay(self.round_index)
        elif self.behind:
            level = trained if self._caught_up() else trained - self.behind  # it trained in this round all the same
            replica.catch_up(gradient_d, round_index=self.round_index, trained=level)
        else:
            replica.step(gradient_d, round_index=self.round_index, trained=trained, threads=self.threads)
        noise = getattr(self.carrier, "noise", 0.0)
        numbers = {"gradient_norm": length, "held_weight": held, "behind": float(self.behind), "noise": noise}
        if isinstance(self.carrier, PairCarrier):
            numbers |= {"met": float(self.carrier.met), "clipped": float(self.carrier.clipped)}
        return numbers

    def _caught_up(self) -> bool:
        """Whether a late member is where the others are now: it heard of them, and no radius held it back by much."""
        if isinstance(self.carrier, PairCarrier):
            return self.alone or (self.carrier.met > 0 and self.carrier.least_clip >= LEVEL_CLIP)
        return self.alone or bool(self.carrier.counted)

    def radii(self, before: list[Radius]) -> list[Radius]:
        """What pairs have learnt of distances."""
        if not isinstance(self.carrier, PairCarrier):
            return before
        rounds = zip(self.carrier.rounds, before, strict=True)
        return [radius if pair is None else pair.radius for pair, radius in rounds]

    def _held(self, part: int) -> Mass | None:
        if isinstance(self.machine, PushSumMachine):
            mass: Mass = self.carrier.round.masses[part]
            return mass if mass.weight else None
        pair = self.carrier.rounds[part]
        return None if pair is None else Mass(pair.z_d, 1.0, threads=self.threads)


def begin_round(mixer: Mixer, manifest: Manifest, roll: Roll, reference_d: Tensor, now_s: float) -> MixingRound:
    """What a certificate asks of this member, with fresh mass. Costs a pass over the parameters.

    `roll` and `reference_d` are as this certificate left them: the anchor may be further when the vectors are made.
    """
    ways, patience = mixer.ways, mixer.patience
    genesis, anchor, replica, mixing = ways.genesis, ways.anchor, ways.replica, ways.genesis.mixing
    me = roll.members.index(ways.me)
    graph = parse_graph(mixing.graph)
    n = len(roll.members)
    ticks = mixing.ticks or graph.period(n)
    plan = plan_round(graph, n, ticks, run_id=genesis.run_id, round_index=manifest.round_index)
    receivers = [[[share.to for share in column.sends] for column in tick] for tick in plan]
    plans = plans_of(ways.me, roll.members, receivers)
    codec = MixingCodec(anchor.codec, cut(genesis.schema.numel, mixing.fragments))
    phi_d = _scaled(replica, roll.scale[me])
    behind = manifest.trained - 1 - replica.trained
    whole = norm(replica.phi_d - replica.theta_d, threads=anchor.threads)
    movement = whole / math.sqrt(len(codec.parts))  # of one fragment
    common = (ways.me, manifest.round_index, plans)
    if genesis.mode == "pairs":
        rounds = _pairs(phi_d, reference_d, replica, roll.mass[me], codec, mixer.radii, anchor.threads)
        began = tuple(_pair_sums(pair) for pair in rounds)
        weights_of = dict(zip(roll.members, roll.mass, strict=True))
        carrier: Any = PairCarrier(rounds, codec, manifest.round_index, weights_of, movement)
        machine: Any = PairMachine(*common, mixing.fragments, patience, ways.heard, now_s)
    else:
        weights = [roll.mass[me]] * mixing.fragments
        holding = push_sum.begin(me, plan, phi_d, reference_d, weights, fragments=codec.parts, threads=anchor.threads)
        began = tuple(mass.sums() for mass in holding.masses)
        given = (holding, roll.members, codec, manifest.round_index, anchor.terms, float(n))
        gamma = mixing.gamma_percent / 100
        carrier = WholeCarrier(*given) if codec.exact else FlowCarrier(*given, gamma, movement)
        opened = tuple(Fraction(weight) for weight in weights)
        machine = PushSumMachine(*common, opened, anchor.terms, patience, ways.heard, now_s)
    return MixingRound(
        ways.me,
        manifest.round_index,
        machine,
        codec,
        carrier,
        began,
        behind,
        replica,
        reference_d,
        anchor.threads,
        n == 1,
    )


def _scaled(replica: Replica, scale: float) -> Tensor:
    """φ, with this member's own movement scaled (fednova)."""
    if scale == 1.0:
        return replica.phi_d
    return torch.lerp(replica.theta_d, replica.phi_d, scale)


def _pairs(
    phi_d: Tensor,
    reference_d: Tensor,
    replica: Replica,
    mass: float,
    codec: MixingCodec,
    radii: Sequence[Radius],
    threads: int,
) -> tuple[PairRound | None, ...]:
    """A round of every fragment. Its own movement is that of this local phase: the reference may be old."""
    claims = Claims(PAIR_WEIGHT_MIN, 1.0)
    if not mass:
        return (None,) * len(codec.parts)
    rounds = []
    for at, radius in zip(codec.parts, radii, strict=True):
        pair = pairs.begin(phi_d[at], reference_d[at], mass, radius, claims, threads=threads)
        pair.movement = norm(phi_d[at] - replica.theta_d[at], threads=threads)
        rounds.append(pair)
    return tuple(rounds)


def _pair_sums(pair: PairRound | None) -> Sums:
    """Of w z: what two who meet conserve together. Nothing of who idles."""
    if pair is None:
        return add_sums(())
    sums = Mass(pair.z_d, 1.0).sums()
    weight = pair.weight
    return Sums(weight, weight * sums.total, weight * sums.magnitude, weight * sums.largest)
