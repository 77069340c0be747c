"""Push-sum machines in any weather: they end in time, every share is in one place, and the accounts say so."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from mixing_masses import Setting, audited, check_mass, check_mean, masses_in, push_world
from mixing_world import CALM, SKEWED, STORM, Broken, Waits, World

from farflung.aggregation.graphs import parse_graph
from farflung.protocol.ledger.leases import Leases
from farflung.protocol.mixing.push_sum import PushSumMachine

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
            assert found.error < 1e-12
            assert found.limbo == 0
            assert found.unseen == ()
            assert found.members == n
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


@pytest.mark.parametrize(("away_s", "says_absent"), [(0.5, True), (0.5, False), (float("inf"), True)])
def test_who_restarts_is_asked_once_and_who_is_silent_is_waited_for_once(away_s, says_absent):
    waits = Waits(floor_s=50.0, ceiling_s=50.0, silence_s=4.0, settle_s=1.0)
    world = push_world(3, CALM, Setting(n=4, graph="complete", ticks=3, waits=waits))
    world.says_absent = says_absent
    world.vanish(world.members[1], 0.0, away_s)
    world.run()
    check_mass(world)
    back = away_s < 1
    for member in world.members[:1] + world.members[2:]:
        took_s = [member.tick_ended_s[tick] - began_s for tick, (began_s, _) in member.tick_began_s.items()]
        assert took_s[0] <= (1.5 if back else 4.0 + 1e-9)
        assert max(took_s[1:]) < 1.0
        assert member.machine.clock.given_up == (0 if back else 3)
    assert max(member.over_s for member in world.members if member.over) < 6.0
    if back:  # all that was meant for it came home
        assert all(member.machine.unresolved == 0 for member in world.members if member.over)
    found = audited(world)
    assert found.unseen == (world.members[1].me,)
    assert found.members == 3


@pytest.mark.parametrize("graph", ["base(k=1)", "one-peer-exponential"])
def test_slow_lines_are_learnt_and_waited_for_in_every_round(graph):
    """A median over ticks would never have seen them, and fences would follow the fast ones' patience."""
    setting, kept = Setting(n=8, graph=graph, waits=Waits(ceiling_s=60.0)), {}
    for round_seed in range(4):
        world = push_world(round_seed, CALM, setting)
        world.slow[world.members[2].me] = 6.0
        for member in world.members:
            member.patience = kept.setdefault(member.me, member.patience)
        world.run()
        check_mass(world)
        check_mean(world)
    assert all(6.0 < patience.tick.value_s < 40.0 for patience in kept.values())


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
    with pytest.raises(Broken):
        every_promise()


def every_promise():
    for seed in range(5):
        check_mean(push_world(seed, SKEWED, Setting(n=6, fragments=2)).run())
    for seed in range(80):
        lived(3 * seed)
