"""What the round machine promises: never two certificates for a round, and progress whenever a quorum can talk."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from protocol_world import TIMING, Faults, World

from farflung.protocol.statements import Announcement
from farflung.protocol.waiting import why_waiting
from farflung.protocol.wire import Proposal, Vote


def started(world: World) -> World:
    for peer in world.peers:
        peer.start()
    return world


def test_members_gather_then_train():
    world = started(World(0, 4))
    world.run(world.everybody_past(8))
    last = world.peers[0].disk.chain[-1].manifest
    assert last.started
    assert len(last.members) == len(last.payloads) == 4


def test_one_member_alone_goes_on():
    world = started(World(1, 1))
    world.run(world.everybody_past(5))


@pytest.mark.parametrize("seed", range(40))
def test_agreement_under_loss_doubling_reordering_and_crashes(seed):
    faults = Faults(loss=0.2, double=0.2, delay_s=(0.01, 1.5))
    world = World(seed, 2 + seed % 5, faults=faults)
    world.crash_rate = 0.01
    started(world)
    world.run_for(40.0)
    world.crash_rate = 0.0
    reached = max(world.rounds(peer) for peer in world.peers)
    world.run(world.everybody_past(reached + 3), limit_s=900.0)


@pytest.mark.parametrize("victim", range(4))
def test_the_others_go_on_when_a_member_dies_for_good(victim):
    world = started(World(100 + victim, 4))
    world.run(world.everybody_past(6))
    dead = world.peers[victim]
    dead.crash()
    dead.gone = True
    start_s = world.now_s
    world.run(world.everybody_past(12))
    assert dead.peer_id not in world.peers[victim - 1].disk.chain[-1].manifest.member_of
    assert world.now_s - start_s < 6 * 12


def test_a_restarted_member_catches_up_and_is_counted_again():
    world = started(World(7, 4))
    world.run(world.everybody_past(6))
    victim = world.peers[2]
    victim.crash()
    victim.gone = True
    world.run(world.everybody_past(8))
    victim.start()
    victim.gone = False
    world.run(world.everybody_past(12))
    assert victim.peer_id in {item.peer_id for item in world.peers[0].disk.chain[-1].manifest.payloads}


def losing_first_copies(world: World, kinds: tuple[type, ...]) -> None:
    """Whatever is said for the first time, from anybody to anybody, is lost."""
    said: set[tuple] = set()

    def lose(sender, to, statement) -> bool:
        if not isinstance(statement, kinds):
            return False
        key = (sender.peer_id, to.peer_id, repr(statement))
        fresh = key not in said
        said.add(key)
        return fresh

    world.lose = lose


@pytest.mark.parametrize("kind", [Announcement, Proposal, Vote])
def test_what_was_lost_is_said_again(kind):
    world = started(World(21, 3, quorum_percent=100, timing=replace(TIMING, deadline_floor_ms=20_000)))
    losing_first_copies(world, (kind,))
    world.run(world.everybody_past(10))
    manifests = [certificate.manifest for certificate in world.peers[0].disk.chain]
    trained = [item for before, item in pairwise(manifests) if before.started]
    assert len(trained) >= 6
    assert all(len(item.payloads) == 3 for item in trained), "nobody was left out for a lost message"


def test_a_member_that_was_left_out_is_told_how_its_round_ended():
    world = started(World(22, 4))
    world.run(world.everybody_past(5))
    victim, others = world.peers[3], world.peers[:3]
    world.cut = {(a.peer_id, victim.peer_id) for a in others} | {(victim.peer_id, a.peer_id) for a in others}
    victim.gone = True
    world.run(lambda: victim.peer_id not in others[0].disk.chain[-1].manifest.member_of)
    world.cut, victim.gone = set(), False
    world.run(lambda: victim.peer_id in others[0].disk.chain[-1].manifest.member_of, limit_s=world.now_s + 60)
    world.run(world.everybody_past(world.rounds(others[0]) + 2))


def test_a_late_joiner_is_admitted_and_a_wrong_secret_is_not():
    world = started(World(8, 3))
    world.run(world.everybody_past(4))
    late = world.add_peer(50)
    stranger = world.add_peer(51, secret=b"guess")
    late.start()
    stranger.start()
    stranger.gone = True
    world.run(world.everybody_past(9))
    members = world.peers[0].disk.chain[-1].manifest.member_of
    assert late.peer_id in members
    assert stranger.peer_id not in members
    assert any("wrong join secret" in text for text in world.refusals)


def test_a_leaver_is_released_at_once_and_nobody_waits_for_it():
    world = started(World(9, 4))
    world.run(world.everybody_past(5))
    leaver = world.peers[3]
    world.leave(leaver)
    world.run(lambda: not leaver.machine.is_member)
    leaver.crash()
    leaver.gone = True
    start_s = world.now_s
    world.run(world.everybody_past(world.rounds(world.peers[0]) + 3))
    assert world.now_s - start_s < 3 * 3.5


def test_a_minority_waits_and_heals():
    world = started(World(10, 5))
    world.run(world.everybody_past(5))
    left, right = world.peers[:2], world.peers[2:]
    world.cut = {(a.peer_id, b.peer_id) for a in left for b in right} | {
        (b.peer_id, a.peer_id) for a in left for b in right
    }
    before = world.rounds(left[0])
    world.run_for(120.0)
    assert world.rounds(left[0]) <= before + 1
    assert world.rounds(right[0]) >= before + 3
    world.cut = set()
    world.run(world.everybody_past(world.rounds(right[0]) + 3), limit_s=2000.0)


def test_half_with_the_longest_standing_member_goes_on_and_the_other_half_waits():
    world = started(World(11, 2))
    world.run(world.everybody_past(5))
    founder, other = world.peers
    other.crash()
    other.gone = True
    world.run(world.everybody_past(9))
    assert founder.machine.is_member


def test_everybody_restarting_at_once_resumes():
    world = started(World(12, 4))
    world.run(world.everybody_past(6))
    for peer in world.peers:
        peer.crash()
    world.run_for(5.0)
    for peer in world.peers:
        peer.start()
    world.run(world.everybody_past(10))


def test_the_same_seed_gives_the_same_chain():
    def tip(seed: int) -> bytes:
        world = World(seed, 4, faults=Faults(loss=0.1, double=0.1, delay_s=(0.01, 0.8)))
        started(world)
        world.run(world.everybody_past(6))
        return world.peers[0].disk.chain[6].manifest.digest

    assert tip(3) == tip(3)


@pytest.mark.soak
@pytest.mark.parametrize("block", range(40))
def test_agreement_in_a_thousand_worlds(block):
    for seed in range(1000 + 25 * block, 1025 + 25 * block):
        test_agreement_under_loss_doubling_reordering_and_crashes(seed)


def test_a_run_ends_for_everybody_after_its_rounds():
    world = started(World(13, 4, rounds=9, faults=Faults(loss=0.2)))
    world.run(world.everybody_past(9))
    world.run_for(60.0)
    assert {peer.disk.chain[-1].manifest.trained for peer in world.peers} == {9}
    assert len({peer.disk.chain[-1].manifest.digest for peer in world.peers}) == 1
    assert all(why_waiting(peer.machine, world.now_s) == "the run is over" for peer in world.peers)
