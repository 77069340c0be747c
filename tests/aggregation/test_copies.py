"""The two copies of an edge are equal whenever its sender knows that a message counted (I-15), in any weather.

Flows over ledgers with a window of 1: what `edge_world` loses, repeats, delays, reorders and crashes.
"""

from dataclasses import replace

import pytest
from edge_world import D, rounded, story

from farflung.aggregation.flow import Flow, InEdge, OutEdge, chained
from farflung.protocol.errors import FarflungError
from farflung.protocol.ledger.books import Ledger
from farflung.protocol.ledger.effects import Persist, Returned
from farflung.protocol.ledger.incoming import Incoming

FLOWS = {"int8": Flow(rounded(8)), "int4": Flow(rounded(4)), "2 bits": Flow(rounded(2), 0.5)}
EVENTS = {"Credit", "Settled", "Returned", "compared", "crash", "audited"}


def check_story(seed, flow, fresh):
    """Copies are compared at every acknowledgement by the world itself; here, all that are left when all is quiet."""
    error, world = story(seed, flow=flow, fresh=fresh)
    assert error <= 1e-12
    for who, node in world.nodes.items():
        assert node.mass.numerator_d.isfinite().all()
        assert len(node.mass.numerator_d) == D
        for to, out in node.out.items():
            into = world.nodes[to].into[who]
            assert (out.copy_hash, out.copy_d.numpy().tobytes()) == (into.copy_hash, into.copy_d.numpy().tobytes())
    return world.counts


@pytest.mark.parametrize("fresh", [False, True], ids=["persistent", "fresh"])
@pytest.mark.parametrize("name", FLOWS)
def test_copies_are_equal_after_every_acknowledgement(name, fresh):
    totals = {}
    for seed in range(40):
        for event, count in check_story(seed, FLOWS[name], fresh).items():
            totals[event] = totals.get(event, 0) + count
    assert not EVENTS - totals.keys(), "the storm never blew"
    assert totals["compared"] > 90
    assert totals["crash"] > 40


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("fresh", [False, True], ids=["persistent", "fresh"])
def test_copies_are_equal_over_ten_thousand_schedules(part, fresh):
    for seed in range(1000 + 500 * part, 1000 + 500 * (part + 1)):
        check_story(seed, FLOWS["int8"], fresh)
    assert part < 10


# -- planted bugs -----------------------------------------------------------------------------------------------------


def the_sender_keeps_its_old_copy(patch):
    patch.setattr(OutEdge, "settled", lambda edge: edge._take() and None)


def the_sender_advances_when_a_message_comes_home(patch):
    right = OutEdge.settled

    def returned(edge, mass):
        mass.pour(edge._pending.copy_d, edge._pending.weight)
        right(edge)

    patch.setattr(OutEdge, "returned", returned)


def the_receiver_does_not_check_and_keeps_its_old_copy(patch):
    right = InEdge.receive

    def receive(edge, mass, message, **settings):
        copy_d, at = edge.copy_d, message.copy_hash
        edge.copy_hash = at
        right(edge, mass, message, **settings)
        edge.copy_d = copy_d

    patch.setattr(InEdge, "receive", receive)


def a_repeat_counts_again(patch):
    right = InEdge.receive

    def receive(edge, mass, message, **settings):
        before = edge.copy_hash
        right(edge, mass, message._replace(copy_hash=before), **settings)
        edge.copy_hash = chained(message.copy_hash, message.payload)

    patch.setattr(Incoming, "is_open", lambda edge, seq: True)
    patch.setattr(InEdge, "receive", receive)


def mass_is_taken_back_without_the_receivers_word(patch):
    def fence(ledger, peer):
        edge = ledger.out[peer]
        ledger.out[peer] = replace(edge, epoch=edge.next_seq, escrow=())
        return [*(Returned(peer, item.seq, item.amount) for item in edge.escrow), Persist()]

    patch.setattr(Ledger, "fence", fence)


@pytest.mark.parametrize(
    "plant",
    [
        the_sender_keeps_its_old_copy,
        the_sender_advances_when_a_message_comes_home,
        the_receiver_does_not_check_and_keeps_its_old_copy,
        a_repeat_counts_again,
        mass_is_taken_back_without_the_receivers_word,
    ],
    ids=lambda plant: plant.__name__,
)
def test_every_planted_bug_is_noticed(monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises((AssertionError, FarflungError)):
        _ = [check_story(seed, FLOWS["int8"], False) for seed in range(30)]
