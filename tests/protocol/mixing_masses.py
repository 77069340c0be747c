"""Members of a push-sum world, with real masses, and the truth: where every share is, exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from mixing_world import ROUND, Broken, Member, Waits, Weather, World, blob_of, members_of, plan_of, tick_plans

from farflung.aggregation import push_sum
from farflung.aggregation.graphs import Mixing
from farflung.aggregation.mass import Mass
from farflung.aggregation.push_sum import PushSumRound
from farflung.protocol.blob import BlobRef
from farflung.protocol.identity import PeerId
from farflung.protocol.ledger.books import Terms
from farflung.protocol.ledger.effects import Credit, Lapsed, Returned, Settled
from farflung.protocol.ledger.messages import Parcel
from farflung.protocol.mixing.account import Account, Adrift, Book, Totals, decode_account
from farflung.protocol.mixing.auditing import MassAudit, audit_accounts
from farflung.protocol.mixing.notes import Note
from farflung.protocol.mixing.push_sum import Move, Posted, PushSumMachine

Key = tuple[PeerId, PeerId, int, int]
"""A share: sender, receiver, fragment, seq."""
D = 8


@dataclass
class Truth:
    """Where every share is. `sent`: exact weight; a share that is in none of the others is adrift."""

    sent: dict[Key, Fraction] = field(default_factory=dict)
    vectors: dict[Key, Mass] = field(default_factory=dict)
    """A copy of what each share carried, never counted."""
    blobs: dict[bytes, Key] = field(default_factory=dict)
    credited: dict[Key, None] = field(default_factory=dict)
    home: dict[Key, None] = field(default_factory=dict)
    settled: dict[Key, None] = field(default_factory=dict)
    void: dict[Key, None] = field(default_factory=dict)
    """Counted by a member that has lost its memory since, and home again."""

    def adrift(self) -> list[Key]:
        return [key for key in self.sent if key not in self.credited and key not in self.home]


@dataclass
class MassMember(Member):
    index: int = 0
    mixings: tuple[Mixing, ...] = ()
    weights: tuple[float, ...] = ()
    terms: Terms = field(default_factory=Terms)
    truth: Truth = field(default_factory=Truth)
    phi_d: torch.Tensor = field(default_factory=lambda: torch.zeros(D, dtype=torch.float64))
    holding: PushSumRound = field(init=False)
    exact: list[Fraction] = field(init=False)
    totals: list[tuple[float, float]] = field(init=False)
    """Σ s and Σ |s| in the beginning, by fragment."""
    account: Account | None = None
    account_bytes: bytes = b""
    read: dict[Key, Mass] = field(default_factory=dict)
    escrow: dict[Key, Mass] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = len(self.weights)
        edges = [D * part // parts for part in range(parts + 1)]
        cuts = tuple(slice(*edge) for edge in itertools.pairwise(edges))
        zero_d = torch.zeros(D, dtype=torch.float64)
        self.holding = push_sum.begin(self.index, self.mixings, self.phi_d, zero_d, self.weights, fragments=cuts)
        self.exact = [Fraction(weight) for weight in self.weights]
        self.totals = [(mass.sums().total, mass.sums().magnitude) for mass in self.holding.masses]

    def crash(self) -> None:
        super().crash()
        self.account = None

    def build(self, now_s: float) -> PushSumMachine:
        opened = tuple(Fraction(weight) for weight in self.weights)
        return PushSumMachine(self.me, ROUND, self.plan, opened, self.terms, self.patience, self.world.heard, now_s)

    def shares(self, tick: int) -> dict[tuple[PeerId, int], Posted | None]:
        shares: dict[tuple[PeerId, int], Posted | None] = {}
        for at, parts in self.holding.send().items():
            peer = self.world.members[at].me
            for part, mass in enumerate(parts):
                weight = Fraction(mass.weight)
                if weight < self.terms.mass_min or not self.machine.room(peer, part):
                    self.holding.masses[part].absorb(mass)
                    shares[peer, part] = None
                    self.world.count("stays")
                    continue
                ref = self._lend(peer, part, mass)
                shares[peer, part] = Posted(weight, ref)
        return shares

    def _lend(self, peer: PeerId, part: int, mass: Mass) -> BlobRef:
        key = (self.me, peer, part, self.machine.ledgers[part].out[peer].next_seq)
        ref = blob_of(key)
        self.truth.sent[key] = Fraction(mass.weight)
        self.truth.vectors[key], self.escrow[key] = mass.copy(), mass
        self.truth.blobs[ref.digest] = key
        self.exact[part] -= Fraction(mass.weight)
        return ref

    def fetched(self, peer: PeerId, note: Note) -> None:
        assert note.payload is not None
        assert isinstance(note.content, Parcel)
        key = self.truth.blobs[note.payload.digest]
        if key != (peer, self.me, note.fragment, note.content.seq):
            raise Broken(f"{note} names the vector of {key}")
        self.read[key] = self.truth.vectors[key].copy()

    def move(self, effect: Any) -> None:
        assert isinstance(effect, Move)
        part, moved, truth = effect.fragment, effect.effect, self.truth
        self.world.count(type(moved).__name__)
        if self.account is not None and not isinstance(moved, Lapsed):
            raise Broken(f"{moved} after the books were closed")
        if isinstance(moved, Credit):
            key = (moved.peer, self.me, part, moved.seq)
            if key in truth.credited or key in truth.home or truth.sent.get(key) != moved.amount.mass:
                raise Broken(f"{key} is counted twice, or came home, or changed")
            if self.terms.window == 1 and any(k[:3] == key[:3] and k[3] > key[3] for k in truth.credited):
                raise Broken(f"{key} is counted after a later one of its edge")
            truth.credited[key] = None
            self.exact[part] += moved.amount.mass
            self.holding.masses[part].absorb(self.read.pop(key))
            return
        key = (self.me, moved.peer, part, moved.seq)
        if key in truth.settled or key in truth.home or key not in self.escrow:
            raise Broken(f"{key} is resolved twice")
        mass = self.escrow.pop(key)
        if isinstance(moved, Returned):
            if key in truth.credited:
                if self.world.by_id[moved.peer].machine is not None:
                    raise Broken(f"{key} is counted and came home")
                truth.void[key] = None
            truth.home[key] = None
            self.exact[part] += moved.amount.mass
            self.holding.masses[part].absorb(mass)
        elif isinstance(moved, Settled):
            if key not in truth.credited:
                # Counted in the books already, and in the mass as soon as that tick's shares have left.
                receiver = self.world.by_id[moved.peer]
                assert isinstance(receiver, MassMember)
                waits = receiver.machine is None or any(
                    (move.effect.peer, receiver.me, move.fragment, move.effect.seq) == key
                    for move in receiver.machine._early
                )
                if not waits:
                    raise Broken(f"{key} is settled and nobody counted it")
            truth.settled[key] = None

    def close(self) -> None:
        machine: PushSumMachine = self.machine
        books = []
        for part, mass in enumerate(self.holding.masses):
            ledger, (began, magnitude) = machine.ledgers[part], self.totals[part]
            if ledger.balance != self.exact[part]:
                raise Broken(f"{self.me} holds {self.exact[part]}, its books say {ledger.balance}")
            adrift = tuple(
                Adrift(peer, item.seq, self.escrow[self.me, peer, part, item.seq].sums().total)
                for peer in sorted(ledger.out)
                for item in ledger.out[peer].escrow
            )
            totals = Totals(began, mass.sums().total, magnitude, adrift)
            books.append(Book(ledger, Fraction(mass.weight), totals))
        self.account = Account(self.me, 0, ROUND, tuple(books))
        self.account_bytes = self.account.canonical_bytes


@dataclass(frozen=True)
class Setting:
    """A push-sum round. `ticks` 0: a period."""

    n: int = 4
    graph: str = "base(k=1)"
    ticks: int = 0
    fragments: int = 1
    window: int = 64
    waits: Waits = field(default_factory=Waits)
    weight: Callable[[int, int], float] = lambda index, part: 1.0


def push_world(seed: int, weather: Weather, setting: Setting, *, curious: bool = False) -> World:
    """A world that has not run yet."""
    truth, members = Truth(), members_of(setting.n)
    mixings = plan_of(setting.graph, setting.n, setting.ticks)
    generator = torch.Generator().manual_seed(seed)
    phi_nd = torch.randn(setting.n, D, dtype=torch.float64, generator=generator)
    terms = Terms(window=setting.window)

    def make(world: World, at: int, me: PeerId) -> Member:
        weights = tuple(setting.weight(at, part) for part in range(setting.fragments))
        plan = tick_plans(me, members, mixings)
        return MassMember(
            me,
            world,
            plan,
            setting.waits,
            index=at,
            mixings=mixings,
            weights=weights,
            terms=terms,
            truth=truth,
            phi_d=phi_nd[at],
        )

    return World(seed, weather, setting.n, make, curious)


def masses_in(world: World) -> list[MassMember]:
    return [member for member in world.members if isinstance(member, MassMember)]


def check_mass(world: World) -> None:
    """All mass is somewhere: with members, crashed or not, or adrift. Weights exactly, numerators to rounding."""
    members = masses_in(world)
    truth = members[0].truth
    for part in range(len(members[0].weights)):
        adrift = [key for key in truth.adrift() if key[2] == part]
        opened = sum(Fraction(member.weights[part]) for member in members)
        void = [key for key in truth.void if key[2] == part]
        here = sum(member.exact[part] for member in members) - sum(truth.sent[key] for key in void)
        if here + sum(truth.sent[key] for key in adrift) != opened:
            raise Broken(f"mass is not conserved: {float(here)} of {float(opened)}")
        began_d = sum(m.phi_d[m.holding.fragments[part]] * m.weights[part] for m in members)
        now_d = sum((m.holding.masses[part].numerator_d for m in members), torch.zeros_like(began_d))
        now_d = now_d + sum((truth.vectors[key].numerator_d for key in adrift), torch.zeros_like(began_d))
        now_d = now_d - sum((truth.vectors[key].numerator_d for key in void), torch.zeros_like(began_d))
        if not torch.allclose(now_d, began_d, rtol=0, atol=1e-9):
            raise Broken(f"numerators are off by {(now_d - began_d).abs().max()}")
        for member in members:
            if abs(Fraction(member.holding.masses[part].weight) - member.exact[part]) > Fraction(1, 10**12):
                raise Broken("a weight is not what was moved")


def check_mean(world: World) -> None:
    """Everybody holds the mean of all, by weight, and nobody was waited for in vain."""
    members = masses_in(world)
    for part in range(len(members[0].weights)):
        total = sum(member.weights[part] for member in members)
        mean_d = sum(m.phi_d[m.holding.fragments[part]] * m.weights[part] for m in members) / total
        for member in members:
            ratio_d = member.holding.masses[part].ratio()
            if member.machine.clock.given_up or not torch.allclose(ratio_d, mean_d, rtol=0, atol=1e-9):
                raise Broken(f"{member.me} is off the mean by {(ratio_d - mean_d).abs().max()}")


def audited(world: World) -> MassAudit:
    """The audit of the accounts as they travel. Raises Broken if it finds something, or not what is true."""
    members = masses_in(world)
    accounts = {}
    for member in members:
        if member.account is not None:
            if member.account.canonical_bytes != member.account_bytes:
                raise Broken("an account changed after the books were taken")
            accounts[member.me] = decode_account(member.account_bytes, member.terms)
    found = audit_accounts(accounts)
    if found.discrepancies or found.error > 1e-9:
        raise Broken(f"the audit found {found}")
    if accounts and not found.unseen and len(accounts) == len(members):
        truth, parts = members[0].truth, range(len(members[0].weights))
        opened = sum(Fraction(member.weights[part]) for member in members for part in parts)
        adrift = sum(truth.sent[key] for key in truth.adrift())
        if opened and found.limbo != float(adrift / opened):
            raise Broken(f"the audit says that {found.limbo} is in limbo; it is {float(adrift / opened)}")
    return found
