"""One push-sum machine held in the hand: what it says to what it hears, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from fractions import Fraction

import pytest
from mixing_world import ROUND, Waits, blob_of, members_of

from farflung.protocol.deadline import AdaptiveDeadline
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.ledger.amounts import Amount
from farflung.protocol.ledger.books import Terms
from farflung.protocol.ledger.messages import Fence, Parcel, Receipt
from farflung.protocol.mixing.clockwork import Patience, TickPlan
from farflung.protocol.mixing.notes import Absent, Note, Offer
from farflung.protocol.mixing.push_sum import MISSES_MAX, Close, Get, Move, Posted, PushSumMachine, Split, Stage, Tell

ME, OTHER, THIRD, *_ = members_of(4)


def machine_of(ticks: int = 2, terms: Terms | None = None) -> PushSumMachine:
    """It gives to OTHER, and is given by OTHER, in every tick."""
    patience = Patience(AdaptiveDeadline(1.0, 8.0, 6), 3.0, 2.0, 0.4)
    plan = (TickPlan((OTHER,), (OTHER,)),) * ticks
    machine = PushSumMachine(ME, ROUND, plan, (Fraction(1),), terms or Terms(), patience, lambda peer: 0.0, 0.0)
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
    assert [type(effect) for effect in told] == [Tell]
    assert told[0].note.content.early == (1,)
    effects = machine.hear(OTHER, parcel(0), 0.4) + machine.arrived(OTHER, parcel(0), 0.5)
    assert [move.effect.seq for move in moves(effects)] == [0]
    assert effects[-1] == Split(1)
    assert [move.effect.seq for move in moves(machine.post(1, posted(Fraction(5, 8)), 0.6))] == [1]


def test_one_parcel_at_a_time_is_not_fetched_before_the_last_one_has_moved():
    """It is a change to the edge's copy, which moves with the mass."""
    machine = machine_of(3, Terms(window=1))
    machine.post(0, posted(), 0.1)
    machine.hear(OTHER, parcel(0, tick=1), 0.2)
    machine.arrived(OTHER, parcel(0, tick=1), 0.2)
    following = parcel(1, tick=2, oldest=1)
    assert machine.hear(OTHER, following, 0.3) == []
    machine.hear(OTHER, Note(0, 0, None), 0.4)
    assert len(moves(machine.post(1, {(OTHER, 0): None}, 0.5))) == 1
    assert machine.hear(OTHER, following, 0.6) == [Get(OTHER, following)]


def test_whoever_waits_asks_by_its_receipt_and_is_told_that_nothing_is_under_way():
    machine = machine_of()
    machine.post(0, {(OTHER, 0): None}, 0.0)
    assert machine.wake_s == 0.4
    (asked,) = machine.tick(0.4)
    assert asked == Tell(OTHER, Note(0, 0, Receipt(ROUND, 0, 0, (), ())))
    assert machine.hear(OTHER, asked.note, 0.5) == [Tell(OTHER, Note(0, 0, None))]
    assert machine.hear(OTHER, replace(asked.note, tick=1), 0.5) == []
    assert machine.hear(OTHER, parcel(), 0.6) == [Get(OTHER, parcel())]
    assert machine.tick(0.8) == []


def test_who_has_something_under_way_does_not_say_that_it_has_nothing():
    machine = machine_of()
    machine.post(0, posted(), 0.0)
    assert machine.hear(OTHER, Note(0, 0, Receipt(ROUND, 0, 0, (), ())), 0.1) == []
    moved, *told = machine.hear(OTHER, Note(0, 0, Receipt(ROUND, 0, 1, (), ())), 0.2)
    assert isinstance(moved, Move)
    assert told == []


def test_nothing_is_expected_of_who_is_absent_and_nothing_is_given_to_it():
    machine = machine_of()
    machine.post(0, posted(), 0.0)
    assert machine.hear(OTHER, Note(0, 0, Absent()), 0.1) == [Split(1)]
    assert machine.room(OTHER, 0) == 0
    *_, close = machine.post(1, {(OTHER, 0): None}, 0.2)
    assert close == Close()  # it may have counted what it was given before it died, and never says so: that lapses
    assert machine.unresolved > 0
    (lapsed,) = machine.closed(0.3)
    assert type(lapsed.effect).__name__ == "Lapsed"


def test_a_vector_that_does_not_come_is_not_waited_for_but_may_still_come():
    machine = machine_of()
    machine.post(0, posted(), 0.0)
    note = parcel()
    for again in range(MISSES_MAX):
        assert machine.stage is Stage.WAITING
        assert Get(OTHER, note) in machine.hear(OTHER, note, 0.1 + again)
        machine.missed(OTHER, note, 0.2 + again)
    assert machine.stage is Stage.SPLITTING
    assert Get(OTHER, note) in machine.hear(OTHER, note, 9.0)
    moves = machine.arrived(OTHER, note, 9.1)
    assert [type(move.effect).__name__ for move in moves if isinstance(move, Move)] == ["Credit"]


def test_in_a_hurry_nobody_is_waited_for():
    machine = machine_of()
    machine.post(0, posted(), 0.0)
    assert machine.hurry(0.1) == [Split(1)]
    *_, close = machine.post(1, posted(), 0.2)
    assert close == Close()


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
    assert not moves(machine.arrived(OTHER, parcel(), 0.3))
    assert not moves(machine.hear(OTHER, parcel(), 0.3))


def ended(machine: PushSumMachine) -> PushSumMachine:
    """With a share of its own that nobody confirmed."""
    machine.post(0, posted(), 0.0)
    machine.hear(OTHER, Note(0, 0, None), 0.1)
    machine.post(1, posted(Fraction(1, 4), "again"), 0.1)
    machine.hear(OTHER, Note(0, 1, None), 0.2)
    assert machine.stage is Stage.SETTLING
    assert machine.waits_for() == (OTHER,)
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
    assert taken == books
    assert machine.unresolved == 0
    assert machine.wake_s == float("inf")
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


def test_ticks_without_partners_teach_nothing():
    patience = Waits().patience()
    plan = (TickPlan((), ()),) * 3
    machine = PushSumMachine(members_of(1)[0], ROUND, plan, (Fraction(1),), Terms(), patience, lambda peer: 0.0, 0.0)
    effects, now_s = machine.begin(5.0), 5.0
    while machine.stage is Stage.SPLITTING:
        (split,) = effects
        now_s += 1
        effects = machine.post(split.tick, {}, now_s)
    assert machine.stage is Stage.OVER
    assert now_s == 8.0
    assert not patience.tick.seen_s
