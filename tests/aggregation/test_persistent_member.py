"""Members with ledgers and disks conserve Σ w and Σ x through everything that can happen (I-1, I-2, I-20)."""

from collections import Counter, deque
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from persistent_world import D, World, peer, run

from farflung.aggregation.mass import Mass
from farflung.aggregation.persistent import PersistentSum, begin, parse_persistent
from farflung.aggregation.persistent_member import PersistentMember, in_flight, numerator_digest, total_of
from farflung.aggregation.persistent_saved import decode_member, encode_member
from farflung.protocol.errors import ConfigError, LocalError, PeerError
from farflung.protocol.ledger.amounts import Amount
from farflung.protocol.ledger.books import Ledger, Terms
from farflung.protocol.ledger.effects import Refused, Returned, Send

TERMS = Terms(fresh=False, window=2)
RULE = parse_persistent("nesterov(lr=0.7,momentum=0.5)")


def pair(dtype=torch.float64, rule=RULE, terms=TERMS):
    """Two members of one run, with models 1 and 3."""
    both = []
    for me, other in ((0, 1), (1, 0)):
        held = begin(torch.full((D,), 1.0 + 2 * me, dtype=dtype), rule)
        ledger = Ledger(peer(me), terms, 0, Fraction(1))
        ledger.open_round(1, None, admit={peer(other): 1})
        both.append(PersistentMember(held, ledger))
    return both


def parcel_of(effects):
    (message,) = [effect.message for effect in effects if isinstance(effect, Send)]
    return message


# Storms


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_mass_survives_300_storms_with_crashes_joins_and_leaves(first):
    events = sum((run(seed).events for seed in range(first, first + 50)), Counter())
    wanted = ("crash", "crashed after", "joined", "left", "counted", "came home")
    assert min(events[name] for name in wanted) > 2, "the storm never blew"


@pytest.mark.soak
@pytest.mark.parametrize("first", range(1000, 11_000, 500))
def test_mass_survives_ten_thousand_storms(first):
    events = sum((run(seed, events=120).events for seed in range(first, first + 500)), Counter())
    assert min(events["left"], events["crash"], events["joined"]) > 20


def test_a_seed_is_one_story():
    one, two = run(11), run(11)
    assert one.events == two.events
    assert [encode_member(member) for member in one.members.values()] == [
        encode_member(member) for member in two.members.values()
    ]


def loses_what_comes_home(patch):
    right = PersistentMember._move

    def move(member, effects, arrived):
        for effect in effects:
            if isinstance(effect, Returned):
                member.escrow[effect.peer, effect.seq] = Mass(torch.zeros(D, dtype=torch.float64), 0.0)
        return right(member, effects, arrived)

    patch.setattr(PersistentMember, "_move", move)


def counts_what_was_lost(patch):
    """Takes a parcel back when its lease is over, without the receiver's word."""
    right = Ledger.fence

    def fence(ledger, peer):
        for member in worlds[-1].members.values() if worlds else ():
            if member.ledger is ledger:
                for seq in [key[1] for key in member.escrow if key[0] == peer]:
                    member.sum.receive(member.escrow[peer, seq].copy())
        return right(ledger, peer)

    worlds, start = [], World.__init__
    patch.setattr(World, "__init__", lambda world, *args: (worlds.append(world), start(world, *args))[1])
    patch.setattr(Ledger, "fence", fence)


def saves_no_escrow(patch):
    right = encode_member
    bare = lambda member: right(PersistentMember(member.sum, member.ledger, {}))  # noqa: E731
    patch.setattr("persistent_world.encode_member", bare)


def scales_steps_by_the_weight(patch):
    right = PersistentSum.update
    patch.setattr(PersistentSum, "update", lambda held, delta_d: right(held, held.mass.weight * delta_d))


@pytest.mark.parametrize(
    "plant",
    [loses_what_comes_home, counts_what_was_lost, saves_no_escrow, scales_steps_by_the_weight],
    ids=lambda plant: plant.__name__,
)
def test_storms_find_every_planted_bug(monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError, LocalError)):
        deque((run(seed) for seed in range(60)), maxlen=0)


# One exchange at a time


def test_a_share_travels_counts_once_and_is_let_go():
    first, second = pair()
    parcel = parcel_of(first.give([(peer(1), 0.5)]))
    assert [mass.weight for mass in in_flight({peer(0): first, peer(1): second})] == [0.5]
    again_d = first.payload(peer(1), parcel.seq).clone()
    receipt = parcel_of(second.hear(peer(0), parcel, again_d.clone()))
    assert (first.sum.mass.weight, second.sum.mass.weight) == (0.5, 1.5)
    assert torch.allclose(second.sum.model(), torch.tensor((0.5 * 1 + 3) / 1.5).double())
    assert not in_flight({peer(0): first, peer(1): second})  # counted there, though still in escrow
    assert parcel_of(second.hear(peer(0), parcel, again_d)) == receipt
    assert second.sum.mass.weight == 1.5
    first.hear(peer(1), receipt)
    assert not first.escrow
    with pytest.raises(KeyError):
        first.payload(peer(1), parcel.seq)
    assert total_of({peer(0): first, peer(1): second}).weight == 2.0


def test_a_parcel_that_cannot_count_any_more_needs_no_numerator():
    first, second = pair()
    missing, early = [parcel_of(first.give([(peer(1), 0.25)])) for _ in range(2)]
    second.hear(peer(0), early, first.payload(peer(1), early.seq).clone())
    before = encode_member(second)
    assert parcel_of(second.hear(peer(0), early)).early == (early.seq,)
    (refused,) = second.hear(peer(0), replace(missing, generation=0))
    assert isinstance(refused, Refused)
    assert encode_member(second) == before


def test_a_fenced_share_comes_home_and_the_late_parcel_counts_no_more():
    first, second = pair()
    parcel = parcel_of(first.give([(peer(1), 0.25)]))
    payload_d = first.payload(peer(1), parcel.seq).clone()
    fence = parcel_of(first.ledger.fence(peer(1)))
    assert first.sum.mass.weight == 0.75  # not before the receiver's word
    first.hear(peer(1), parcel_of(second.hear(peer(0), fence)))
    assert (first.sum.mass.weight, second.sum.mass.weight) == (1.0, 1.0)
    second.hear(peer(0), parcel, payload_d)
    assert (second.sum.mass.weight, first.escrow) == (1.0, {})


def test_shares_are_of_what_was_there_before_the_first_and_stay_where_there_is_no_room():
    first, _ = pair()
    first.ledger.open_round(2, None, admit={peer(7): 2})
    first.give([(peer(1), 0.25), (peer(7), 0.5), (peer(9), 0.125)])  # there is no edge to 9
    assert [first.escrow[peer(at), 0].weight for at in (1, 7)] == [0.25, 0.5]
    assert first.sum.mass.weight == 0.25
    first.give([(peer(1), 0.5)])
    assert not first.give([(peer(1), 0.5)])  # a window of 2 is full
    assert first.sum.mass.weight == 0.125


def test_below_the_floor_nothing_is_given_but_everything_may_be_handed_over():
    first, second = pair(rule=parse_persistent("sgd(lr=1.0)", floor=0.4))
    first.give([(peer(1), 0.625)])
    assert first.sum.mass.weight == 0.375
    assert not first.give([(peer(1), 0.5)])
    parcel = parcel_of(first.hand_over(peer(1)))
    assert (first.sum.mass.weight, float(parcel.amount.mass)) == (0.0, 0.375)
    assert not first.hand_over(peer(1))  # nothing is here
    second.hear(peer(0), parcel, first.payload(peer(1), parcel.seq).clone())
    assert second.sum.mass.weight == 1.375


def test_what_is_on_its_way_to_an_evicted_member_comes_home():
    first, _ = pair()
    first.give([(peer(1), 0.5)])
    first.open_round(2, evict=[peer(1)])
    assert (first.sum.mass.weight, first.escrow, first.ledger.balance) == (1.0, {}, 1)


def test_a_numerator_that_is_not_its_parcels_is_refused_and_nothing_changes():
    first, second = pair()
    parcel = parcel_of(first.give([(peer(1), 0.5)]))
    right_d = first.payload(peer(1), parcel.seq)
    before = encode_member(second)
    huge_d = right_d + 1e9
    forged = replace(parcel, amount=Amount(parcel.amount.mass, numerator_digest(huge_d)))
    heavy = replace(parcel, amount=Amount(Fraction(1 << 30), parcel.amount.payload))
    for message, numerator_d in ((parcel, right_d + 1), (forged, huge_d), (heavy, right_d.clone())):
        with pytest.raises(PeerError):
            second.hear(peer(0), message, numerator_d)
    for numerator_d in (None, right_d.float(), right_d[1:].clone()):
        with pytest.raises(LocalError):
            second.hear(peer(0), parcel, numerator_d)
    with pytest.raises(PeerError, match="no edge"):
        second.hear(peer(9), parcel, right_d.clone())
    assert encode_member(second) == before


def test_fresh_mass_is_not_for_persistent_members():
    with pytest.raises(ConfigError, match="fresh=False"):
        PersistentMember(begin(torch.ones(D), RULE), Ledger(peer(0), Terms(), 0, Fraction(1)))


# Checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", ["sgd(lr=0.5)", "nesterov(lr=0.7,momentum=0.5)"])
def test_a_restored_member_is_the_same_to_the_byte_and_goes_on_alike(dtype, spec):
    """I-20: with escrow, momentum and a ledger in the middle of something."""
    rule, terms, ends = parse_persistent(spec), Terms(fresh=False, window=3), []
    for restart in (False, True):
        first, second = pair(dtype, rule, terms)
        first.sum.claim, parcels = 1.25, []
        for tick in range(4):
            for member in (first, second):
                assert member.sum.update(torch.arange(D).to(dtype) * 0.1 * (tick + 1))
            parcels += [effect.message for effect in first.give([(peer(1), 0.3)]) if isinstance(effect, Send)]
            if restart:
                data = encode_member(first)
                first = decode_member(data, rule, terms)
                assert encode_member(first) == data
            if tick == 2:
                receipt = parcel_of(second.hear(peer(0), parcels[1], first.payload(peer(1), parcels[1].seq).clone()))
                first.hear(peer(1), receipt)
        assert len(first.escrow) == 2
        ends.append((encode_member(first), encode_member(second)))
    assert ends[0] == ends[1]


def test_a_checkpoint_holds_nothing_of_the_memory_it_came_from():
    first, _ = pair()
    first.give([(peer(1), 0.5)])
    data = encode_member(first)
    again = decode_member(data, RULE, TERMS, threads=2)
    for vector in (first.sum.mass.numerator_d, first.payload(peer(1), 0), *first.sum.buffers):
        vector.fill_(float("nan"))
    assert encode_member(again) == data
    assert again.sum.mass.threads == 2


def test_a_damaged_checkpoint_or_another_runs_is_refused():
    first, _ = pair()
    first.give([(peer(1), 0.5)])
    first.give([(peer(1), 0.5)])
    data = encode_member(first)
    for at in range(0, len(data), 7):
        with pytest.raises(ConfigError, match="damaged"):
            decode_member(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], RULE, TERMS)
    for short in (b"", data[:20], data[:-1], data + b"0"):
        with pytest.raises(ConfigError, match="damaged"):
            decode_member(short, RULE, TERMS)
    with pytest.raises(ConfigError, match="momentum"):
        decode_member(data, parse_persistent("sgd(lr=1.0)"), TERMS)
    with pytest.raises(ConfigError, match="does not fit"):
        decode_member(data, RULE, Terms(fresh=False, window=1))
