"""Push-sum machines in any weather: they end in time, every share is in one place, and the accounts say so."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from fractions import Fraction

import pytest
from mixing_masses import Setting, audited, check_mass, check_mean, masses_in, push_world
from mixing_world import CALM, ROUND, SKEWED, STORM, Broken, Waits, World, blob_of, members_of

from farflung.aggregation.graphs import parse_graph
from farflung.protocol.deadline import AdaptiveDeadline
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.ledger.amounts import Amount
from farflung.protocol.ledger.books import Terms
from farflung.protocol.ledger.leases import Leases
from farflung.protocol.ledger.messages import Fence, Parcel, Receipt
from farflung.protocol.mixing.clockwork import Patience, TickPlan
from farflung.protocol.mixing.notes import Note, Offer
from farflung.protocol.mixing.push_sum import Get, Move, Posted, PushSumMachine, Split, Stage, Tell

GRAPHS = (
    "base(k=1)",
    "one-peer-exponential",
    "exponential",
    "random-matching",
    "ring",
    "complete",
    "base(k=2)",
    "od-equidyn",
)
RIGHT_CARRY, RIGHT_CLOSED = PushSumMachine._carry_out, PushSumMachine.closed


def setting_of(seed: int) -> Setting:
    """Something different for every seed; weights 0 to 3, so that some have nothing to give."""
    return Setting(
        n=2 + seed % 3 + (seed % 40 == 0),
        graph=GRAPHS[seed % len(GRAPHS)],
        ticks=0 if seed % 3 else 4,
        fragments=1 + (seed % 7 == 0),
        window=1 if seed % 5 == 0 else 64,
        waits=Waits(resend_s=0.8, history_s=0.5 if seed % 2 else None),
        weight=lambda index, part: float((7 * index + 3 * part + seed) % 4),
    )


def lived(seed: int) -> World:
    """One seed from beginning to end. Raises Broken where a promise is broken."""
    world = push_world(seed, STORM, setting_of(seed), curious=seed % 12 == 0).run()
    world.check_time()
    check_mass(world)
    world.count("audited in part" if audited(world).unseen else "audited in full")
    return world


def test_mass_is_conserved_and_everybody_ends_in_time_on_every_seed():
    events: dict[str, int] = {}
    for seed in range(300):
        for name, count in lived(seed).counts.items():
            events[name] = events.get(name, 0) + count
    wanted = {"Parcel", "Fence", "Receipt", "NoneType", "Credit", "Settled", "Returned", "Lapsed", "stays"}
    wanted |= {"audited in part", "audited in full"}
    assert not wanted - events.keys(), "the storm never blew"


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
def test_mass_is_conserved_on_ten_thousand_seeds(part):
    for seed in range(10_000 + 1000 * part, 10_000 + 1000 * (part + 1)):
        assert lived(seed).steps > 0


def test_a_seed_is_one_story():
    def story(seed: int) -> str:
        world = push_world(seed, STORM, setting_of(seed)).run()
        told = [repr(world.log), *(member.account_bytes.hex() for member in masses_in(world))]
        return hashlib.sha256("".join(told).encode()).hexdigest()

    assert story(11) == story(11) != story(12)


@pytest.mark.parametrize("graph", GRAPHS)
def test_without_loss_a_period_is_the_exact_mean_however_far_members_are_apart(graph):
    seen = 0
    for n in (1, 2, 3, 5, 6, 8):
        if not parse_graph(graph).exact(n):
            continue
        setting = Setting(n=n, graph=graph, fragments=2, weight=lambda index, part: 1.0 + (index + part) % 3)
        for seed in range(3):
            world = push_world(seed, SKEWED, setting).run()
            world.check_time()
            check_mass(world)
            check_mean(world)
            found = audited(world)
            assert found.error < 1e-12 and found.limbo == 0 and found.unseen == () and found.members == n
            seen += 1
    assert seen or graph in ("random-matching", "od-equidyn")


# -- how long it takes ------------------------------------------------------------------------------------------------


def test_nobody_waits_for_who_says_nothing():
    setting = Setting(n=6, weight=lambda index, part: float(index == 2))
    world = push_world(1, CALM, setting).run()
    check_mean(world)
    assert all(member.over_s < 0.6 * len(member.plan) for member in world.members)


@pytest.mark.parametrize("graph", ["base(k=1)", "one-peer-exponential"])
def test_who_says_nothing_is_asked_if_its_word_is_lost(graph):
    """In a directed graph the receiver has nothing else to say to it."""
    waits = Waits(floor_s=50.0, ceiling_s=50.0, silence_s=50.0)
    world = push_world(1, CALM, Setting(n=6, graph=graph, waits=waits, weight=lambda index, part: float(index % 2)))
    lost: set[object] = set()

    def first_ones(sender, receiver, note):
        key = (sender, receiver, note.tick)
        new = note.content is None and key not in lost
        lost.add(key) if new else None
        return new

    world.drop = first_ones
    world.run()
    check_mass(world)
    assert len(lost) > 3
    for member in world.members:
        assert member.machine.clock.given_up == 0
        assert member.over_s < len(member.plan) * (waits.resend_s + 0.6)


@pytest.mark.parametrize("away_s", [0.5, float("inf")])
def test_who_restarts_is_asked_once_and_who_is_silent_is_waited_for_once(away_s):
    waits = Waits(floor_s=50.0, ceiling_s=50.0, silence_s=4.0, settle_s=1.0)
    world = push_world(3, CALM, Setting(n=4, graph="complete", ticks=3, waits=waits))
    world.vanish(world.members[1], 0.0, away_s)
    world.run()
    check_mass(world)
    back = away_s < 1
    for member in world.members[:1] + world.members[2:]:
        took_s = [member.tick_ended_s[tick] - began_s for tick, (began_s, _) in member.tick_began_s.items()]
        assert took_s[0] <= (1.5 if back else 4.0 + 1e-9) and max(took_s[1:]) < 1.0
        assert member.machine.clock.given_up == (0 if back else 3)
    if not back:
        assert max(member.over_s for member in world.members if member.over) < 6.0
    found = audited(world)
    assert found.unseen == (world.members[1].me,) and found.members == 3


def test_who_is_late_is_waited_for_until_the_deadline_and_not_longer(monkeypatch):
    """Its vectors never come, but it is heard."""
    waits = Waits(floor_s=2.0, ceiling_s=5.0)
    world = push_world(3, CALM, Setting(n=3, graph="complete", ticks=3, waits=waits))
    slow = world.members[0].me
    right = World.fetch

    def fetch(self, receiver, stamp, peer, note):
        if peer != slow:
            right(self, receiver, stamp, peer, note)

    monkeypatch.setattr(World, "fetch", fetch)
    world.run()
    world.check_time()
    check_mass(world)
    audited(world)
    for member in world.members[1:]:
        for tick, (began_s, deadline_s) in member.tick_began_s.items():
            assert member.tick_ended_s[tick] == pytest.approx(began_s + deadline_s, abs=1e-6)
        assert member.machine.clock.given_up == 3
    assert world.members[0].machine.unresolved == 0


def test_ticks_without_partners_teach_nothing():
    patience = Waits().patience()
    plan = (TickPlan((), ()),) * 3
    machine = PushSumMachine(members_of(1)[0], ROUND, plan, (Fraction(1),), Terms(), patience, lambda peer: 0.0, 0.0)
    effects, now_s = machine.begin(5.0), 5.0
    while machine.stage is Stage.SPLITTING:
        (split,) = effects
        now_s += 1
        effects = machine.post(split.tick, {}, now_s)
    assert machine.stage is Stage.OVER and now_s == 8.0
    assert not patience.tick.seen_s


# -- one machine held in the hand -------------------------------------------------------------------------------------

ME, OTHER, THIRD, *_ = members_of(4)


def machine_of(ticks: int = 2, **changes) -> PushSumMachine:
    """It gives to OTHER, and is given by OTHER, in every tick."""
    patience = Patience(AdaptiveDeadline(1.0, 8.0, 6), 3.0, 2.0, 0.4)
    plan = (TickPlan((OTHER,), (OTHER,)),) * ticks
    machine = PushSumMachine(ME, ROUND, plan, (Fraction(1),), Terms(), patience, lambda peer: 0.0, 0.0)
    assert machine.begin(0.0) == [Split(0)]
    return machine


def posted(mass: Fraction = Fraction(1, 2), name: object = "mine") -> dict[object, Posted]:
    return {(OTHER, 0): Posted(mass, blob_of(name))}


def parcel(seq: int = 0, tick: int = 0, mass: Fraction = Fraction(1, 4), **changes) -> Note:
    ref = blob_of("theirs", seq)
    bare = Parcel(ROUND, 0, min(seq, 0), seq, ROUND, Amount(mass, ref.digest))
    return Note(0, tick, replace(bare, **changes), ref)


def moves(effects) -> list[Move]:
    return [effect for effect in effects if isinstance(effect, Move)]


def test_what_a_partner_gives_ahead_of_time_counts_at_once_and_moves_when_its_tick_is_split():
    machine = machine_of()
    machine.post(0, posted(), 0.1)
    ahead = parcel(1, tick=1)
    assert machine.hear(OTHER, ahead, 0.2) == [Get(OTHER, ahead)]
    told = machine.arrived(OTHER, ahead, 0.3)
    assert [type(effect) for effect in told] == [Tell] and told[0].note.content.early == (1,)
    effects = machine.hear(OTHER, parcel(0), 0.4) + machine.arrived(OTHER, parcel(0), 0.5)
    assert [move.effect.seq for move in moves(effects)] == [0] and effects[-1] == Split(1)
    assert [move.effect.seq for move in moves(machine.post(1, posted(Fraction(5, 8)), 0.6))] == [1]


LIES = {
    "another fragment": replace(parcel(), fragment=1),
    "a tick that is none": replace(parcel(), tick=2),
    "an offer": Note(0, 0, Offer(1.0, 1.0), blob_of("x")),
    "of a later generation": parcel(generation=ROUND + 1),
    "of an earlier generation": parcel(generation=ROUND - 1),
    "of a later round": parcel(round_index=ROUND + 1),
    "too much": parcel(mass=Fraction(1 << 40)),
    "too little": parcel(mass=Fraction(1, 1 << 50)),
    "out of its window": parcel(seq=64),
    "takes for resolved what is not": parcel(seq=5, oldest=5),
    "a receipt for what never left": Note(0, 0, Receipt(ROUND, 0, 3, (), ())),
    "a fence for nothing": Note(0, 0, Fence(ROUND, 70, 0, ROUND)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_and_changes_nothing(lie):
    machine = machine_of()
    machine.post(0, posted(), 0.1)
    before = copy.deepcopy(machine)
    with pytest.raises(PeerError):
        machine.hear(OTHER, LIES[lie], 0.2)
    assert machine == before


def test_strangers_and_who_is_not_awaited_are_refused():
    machine = machine_of()
    machine.post(0, posted(), 0.1)
    before = copy.deepcopy(machine)
    for content in (parcel(), Note(0, 0, Receipt(ROUND, 0, 0, (), ())), Note(0, 0, Fence(ROUND, 1, 0, ROUND))):
        with pytest.raises(PeerError):
            machine.hear(THIRD, content, 0.2)
    assert machine.hear(THIRD, Note(0, 0, None), 0.2) == []
    assert machine == before


def test_repeats_cost_one_fetch_and_one_credit():
    machine = machine_of()
    machine.post(0, posted(), 0.0)
    heard = [effect for _ in range(4) for effect in machine.hear(OTHER, parcel(), 0.1)]
    assert heard == [Get(OTHER, parcel())]
    assert machine.missed(OTHER, parcel(), 0.2) == []
    assert machine.hear(OTHER, parcel(), 0.3) == [Get(OTHER, parcel())]
    assert len(moves(machine.arrived(OTHER, parcel(), 0.3))) == 1
    assert not moves(machine.arrived(OTHER, parcel(), 0.3)) and not moves(machine.hear(OTHER, parcel(), 0.3))


def ended(machine: PushSumMachine) -> PushSumMachine:
    """With a share of its own that nobody confirmed."""
    machine.post(0, posted(), 0.0)
    machine.hear(OTHER, Note(0, 0, None), 0.1)
    machine.post(1, posted(Fraction(1, 4), "again"), 0.1)
    machine.hear(OTHER, Note(0, 1, None), 0.2)
    assert machine.stage is Stage.SETTLING and machine.waits_for() == (OTHER,)
    now_s = 0.2
    while machine.stage is not Stage.OVER:
        now_s = machine.wake_s
        machine.tick(now_s)
    return machine


def test_after_the_books_are_closed_late_parcels_are_void_and_their_senders_are_told():
    machine = ended(machine_of())
    books = copy.deepcopy(machine.ledgers)
    taken = machine.ledgers
    assert machine.hear(OTHER, parcel(), 9.0) == machine.arrived(OTHER, parcel(), 9.0) == []
    lapsed = machine.closed(9.0)
    assert [type(move.effect).__name__ for move in moves(lapsed)] == ["Lapsed", "Lapsed"]
    assert taken == books and machine.unresolved == 0 and machine.wake_s == float("inf")
    (told,) = machine.hear(OTHER, parcel(), 9.5)
    assert told.note.content.void == (0,) or told.note.content.low == 1
    assert told.note.content.decided(0) is False
    assert machine.closed(10.0) == []


def test_a_machine_is_posted_to_in_turn():
    machine = machine_of()
    for tick, shares in ((1, posted()), (0, {}), (0, {(THIRD, 0): None})):
        with pytest.raises(LocalError):
            machine.post(tick, shares, 0.0)
    with pytest.raises(LocalError, match="books"):
        machine.closed(0.0)
    machine.post(0, posted(), 0.0)
    with pytest.raises(LocalError):
        machine.post(1, posted(), 0.0)


# -- planted bugs -----------------------------------------------------------------------------------------------------


def counts_before_its_turn(patch):
    def carry(machine, part, effects, note=None):
        now = None if note is None else replace(note, tick=max(0, min(note.tick, machine.clock.tick)))
        RIGHT_CARRY(machine, part, effects, now)

    patch.setattr(PushSumMachine, "_carry_out", carry)


def goes_on_counting_while_the_books_are_taken(patch):
    patch.setattr(PushSumMachine, "_is_sealed", False)

    def closed(machine, now_s):
        patch.setattr(PushSumMachine, "_is_sealed", True)
        try:
            return RIGHT_CLOSED(machine, now_s)
        finally:
            patch.setattr(PushSumMachine, "_is_sealed", False)

    patch.setattr(PushSumMachine, "closed", closed)


def closes_the_very_books_that_were_taken(patch):
    patch.setattr("farflung.protocol.mixing.push_sum.replace", lambda ledger, **changes: ledger)


def fetches_but_forgets_to_count(patch):
    patch.setattr(PushSumMachine, "arrived", PushSumMachine.missed)


def sleeps_through_its_leases(patch):
    patch.setattr(Leases, "wake_s", 1e9)


def takes_what_came_home_for_settled(patch):
    def carry(machine, part, effects, note=None):
        RIGHT_CARRY(machine, part, [effect for effect in effects if type(effect).__name__ != "Returned"], note)

    patch.setattr(PushSumMachine, "_carry_out", carry)


@pytest.mark.parametrize(
    "plant",
    [
        counts_before_its_turn,
        goes_on_counting_while_the_books_are_taken,
        closes_the_very_books_that_were_taken,
        fetches_but_forgets_to_count,
        sleeps_through_its_leases,
        takes_what_came_home_for_settled,
    ],
    ids=lambda plant: plant.__name__,
)
def test_the_world_finds_every_planted_bug(monkeypatch, plant):
    plant(monkeypatch)
    exact = Setting(n=6, fragments=2)
    with pytest.raises(Broken):
        for seed in range(80):
            check_mean(push_world(seed, SKEWED, exact).run()) if seed < 5 else None
            lived(3 * seed)
