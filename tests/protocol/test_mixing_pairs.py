"""Pair machines in any weather: two who meet move by opposite amounts, and nobody who did not meet moves."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from mixing_pairs_world import PairMember, PairSetting, check_meetings, pair_world
from mixing_world import CALM, ROUND, SKEWED, STORM, Broken, Waits, Weather, World, blob_of, members_of

from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.ledger.amounts import Amount
from farflung.protocol.ledger.messages import Parcel
from farflung.protocol.mixing.clockwork import TickPlan
from farflung.protocol.mixing.meetings import Meet, PairMachine
from farflung.protocol.mixing.notes import Absent, Note, Offer
from farflung.protocol.mixing.push_sum import Close, Get, Split, Stage, Tell

GRAPHS = ("random-matching", "base(k=1)", "ou-equidyn")
LOSSY = Weather(0.3, 0.2, (0.01, 0.4), 0.1, 3.0, (0.02, 1.2), 0.2, 3.0, 0.2)
"""Everything but crashes."""
DOUBLED = Weather(double=1.0, delay_s=(0.01, 2.0))
"""Of everything a second one comes, often after the first has done its work."""
PATIENT = Waits(floor_s=90.0, ceiling_s=90.0, silence_s=90.0, resend_s=0.8)
RIGHT_HEAR = PairMachine.hear


def setting_of(seed: int, waits: Waits) -> PairSetting:
    graph = GRAPHS[seed % 3]
    ticks = 0 if graph == "base(k=1)" else 3
    weight = (1.0, 2.0, 4.0, 0.5)
    return PairSetting(2 + seed % 4, graph, ticks, 1 + seed % 2, waits, lambda index: weight[(index + seed) % 4])


def lived(seed: int) -> World:
    """One seed from beginning to end. Raises Broken where a promise is broken."""
    waits = Waits(resend_s=0.8, history_s=0.5 if seed % 2 else None)
    world = pair_world(seed, STORM, setting_of(seed, waits), curious=seed % 10 == 0).run()
    world.check_time()
    world.counts["one-sided"] = check_meetings(world)
    world.counts["met"] = sum(len(member.moves) for member in world.members if isinstance(member, PairMember))
    return world


def test_meetings_move_both_alike_and_everybody_ends_in_time_on_every_seed():
    events: dict[str, int] = {}
    for seed in range(150):
        for name, count in lived(seed).counts.items():
            events[name] = events.get(name, 0) + count
    assert events["one-sided"]
    assert events["Absent"]
    assert events["met"] > 2 * events["one-sided"]


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
def test_meetings_move_both_alike_on_ten_thousand_seeds(part):
    for seed in range(10_000 + 1000 * part, 10_000 + 1000 * (part + 1)):
        assert lived(seed).steps > 0


def test_while_nobody_is_silent_a_lost_note_costs_time_and_nothing_else():
    """Every planned meeting takes place, at both ends: the mean stays where it is."""
    for seed in range(60):
        world = pair_world(seed, LOSSY, setting_of(seed, PATIENT)).run()
        world.check_time()
        assert check_meetings(world) == 0
        for member in world.members:
            assert isinstance(member, PairMember)
            assert member.machine.clock.given_up == 0
            assert len(member.moves) == len(member.rounds) * sum(len(tick.sends) for tick in member.plan)


def test_calm_pairs_of_an_exact_graph_come_together():
    """base(k=1) with halves: nobody is clipped if everybody may be moved as far as it takes."""
    world = pair_world(1, SKEWED, PairSetting(4, "base(k=1)", 0, 2))
    people = [member for member in world.members if isinstance(member, PairMember)]
    for member in people:
        for pair in member.rounds:
            pair.radius = replace(pair.radius, scale=1e6)
    world.run()
    mean_d = torch.stack([member.phi_d for member in people]).mean(0)
    for member in people:
        assert torch.allclose(torch.cat([pair.z_d for pair in member.rounds]), mean_d, rtol=0, atol=1e-9)


def test_who_has_nothing_is_moved_and_moves_nobody():
    world = pair_world(2, CALM, PairSetting(2, "random-matching", 3, weight=float))
    world.run()
    idle, busy = world.members
    assert isinstance(idle, PairMember)
    assert isinstance(busy, PairMember)
    assert len(idle.moves) == 3
    assert not busy.moves
    assert max(idle.over_s, busy.over_s) < 3.0


def test_an_answer_is_not_answered():
    """Two who have met would otherwise go on for ever: one note sent twice is enough."""
    world = pair_world(3, DOUBLED, PairSetting(2, "random-matching", 3)).run()
    assert check_meetings(world) == 0
    assert world.counts["Offer"] < 60


# -- one machine held in the hand -------------------------------------------------------------------------------------

ME, OTHER, THIRD, *_ = members_of(4)


def machine_of(ticks: int = 2) -> PairMachine:
    """It meets OTHER in every tick."""
    plan = (TickPlan((OTHER,), (OTHER,)),) * ticks
    machine = PairMachine(ME, ROUND, plan, 1, Waits().patience(), lambda peer: 0.0, 0.0)
    assert machine.begin(0.0) == [Split(0)]
    return machine


def offer(tick: int = 0, name: str = "theirs") -> Note:
    return Note(0, tick, Offer(1.0, 1.0), blob_of(name, tick))


MINE = {(OTHER, 0): (Offer(2.0, 1.0), blob_of("mine"))}


def test_what_comes_ahead_of_time_waits_for_the_own_offer():
    machine = machine_of()
    machine.post(0, MINE, 0.0)
    assert machine.hear(OTHER, offer(1), 0.1) == [Get(OTHER, offer(1))]
    assert machine.arrived(OTHER, offer(1), 0.2) == machine.hear(OTHER, offer(1), 0.2) == []
    machine.hear(OTHER, offer(0), 0.3)
    assert machine.arrived(OTHER, offer(0), 0.4) == [Meet(OTHER, offer(0)), Split(1)]
    told, met, close = machine.post(1, MINE, 0.5)
    assert isinstance(told, Tell)
    assert (met, close) == (Meet(OTHER, offer(1)), Close())
    assert machine.stage is Stage.OVER
    assert machine.closed(0.5) == []


def test_after_a_meeting_repeats_are_answered_once_each_and_change_nothing():
    machine = machine_of()
    machine.post(0, MINE, 0.0)
    machine.hear(OTHER, offer(), 0.1)
    machine.arrived(OTHER, offer(), 0.1)
    before = copy.deepcopy(machine)
    (told,) = machine.hear(OTHER, offer(), 0.2)
    assert isinstance(told, Tell)
    assert told.note == Note(0, 0, *MINE[OTHER, 0], again=True)
    assert machine.hear(OTHER, replace(offer(), again=True), 0.2) == []
    assert machine.hear(OTHER, offer(0, "another"), 0.2) == [told]
    assert machine.arrived(OTHER, offer(0, "another"), 0.2) == []
    assert machine == before


def test_a_tick_that_is_over_meets_nobody_any_more():
    machine = machine_of()
    machine.post(0, MINE, 0.0)
    assert machine.hear(OTHER, offer(), 0.1) == [Get(OTHER, offer())]
    assert Split(1) in machine.tick(8.0)
    assert machine.arrived(OTHER, offer(), 8.1) == machine.hear(OTHER, offer(), 8.2) == []
    assert machine.clock.given_up == 1


def test_who_is_absent_is_not_waited_for():
    machine = machine_of()
    machine.post(0, MINE, 0.0)
    assert machine.hear(OTHER, Note(0, 0, Absent()), 0.1) == [Split(1)]
    assert Close() in machine.post(1, MINE, 0.2)


LIES = {
    "another fragment": replace(offer(), fragment=1),
    "a tick that is none": offer(2),
    "a parcel": Note(0, 0, Parcel(ROUND, 0, 0, 0, ROUND, Amount(1, blob_of("x").digest)), blob_of("x")),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_and_changes_nothing(lie):
    machine = machine_of()
    machine.post(0, MINE, 0.0)
    before = copy.deepcopy(machine)
    with pytest.raises(PeerError):
        machine.hear(OTHER, LIES[lie], 0.1)
    with pytest.raises(PeerError):
        machine.hear(THIRD, offer(), 0.1)
    assert machine == before


def test_a_machine_wants_matchings_and_is_posted_to_in_turn():
    plan = (TickPlan((OTHER,), (THIRD,)),)
    with pytest.raises(LocalError, match="matchings"):
        PairMachine(ME, ROUND, plan, 1, Waits().patience(), lambda peer: 0.0, 0.0)
    machine = machine_of()
    for tick, offers in ((1, MINE), (0, {}), (0, {(THIRD, 0): None})):
        with pytest.raises(LocalError):
            machine.post(tick, offers, 0.0)


# -- planted bugs -----------------------------------------------------------------------------------------------------


def answers_answers(patch):
    patch.setattr(
        PairMachine,
        "hear",
        lambda machine, peer, note, now_s: RIGHT_HEAR(machine, peer, replace(note, again=False), now_s),
    )


def meets_before_its_turn(patch):
    patch.setattr(PairMachine, "_may_meet", lambda machine, tick: True)


def repeats_nothing(patch):
    def hear(machine, peer, note, now_s):
        machine._said_s = now_s
        key = (peer, note.fragment, note.tick)
        return [] if key in machine._met else RIGHT_HEAR(machine, peer, note, now_s)

    patch.setattr(PairMachine, "hear", hear)


@pytest.mark.parametrize(
    "plant", [answers_answers, meets_before_its_turn, repeats_nothing], ids=lambda plant: plant.__name__
)
def test_the_world_finds_every_planted_bug(monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises((Broken, KeyError)):
        every_promise()


def every_promise():
    pair_world(3, DOUBLED, PairSetting(2, ticks=3)).run()
    for seed in range(40):
        lived(seed)
        if check_meetings(pair_world(seed, LOSSY, setting_of(seed, PATIENT)).run()):
            raise Broken("a meeting was one-sided while nobody was silent")
