"""Real nodes in threads: the same state on every member, whatever joins, leaves, dies, is slow, lies or breaks."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import replace

import pytest
import torch
from small_world import QUICK, SLACK_S, Player, SmallWorld, eventually
from torch import nn

from farflung.node.anchor import state_digests
from farflung.node.member import HARD_STOP_S
from farflung.node.store import open_home
from farflung.protocol.blob import BlobRef, describe
from farflung.protocol.errors import ConfigError, PeerError
from farflung.protocol.identity import Identity
from farflung.protocol.phase import Phase
from farflung.protocol.statements import Announcement, JoinRequest, LeaveNotice, Slot
from farflung.protocol.wire import Promise, Proposal, Status, Vote, encode_message

pytestmark = pytest.mark.usefixtures("quick_peers")

PATIENT = replace(QUICK, grace_ms=60_000, deadline_floor_ms=60_000, view_floor_ms=10_000, resend_ms=100)
EVERYBODY = {"quorum_percent": 100, "timing": PATIENT}
NESTEROV = "nesterov(lr=0.7,momentum=0.6)"


def make_model() -> nn.Module:
    model = nn.Linear(30, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    return model


def quiet(player: Player) -> float:
    """Some progress that depends on who makes it and when."""
    with torch.no_grad():
        for at, parameter in enumerate(player.model.parameters()):
            phase = 3.0 * player.index + player.steps_taken + at
            grid = torch.linspace(0, 6, parameter.numel()).view(parameter.shape)
            parameter.sub_(0.01 * parameter + 0.003 * torch.sin(grid + phase))
    return 1.0


class Gate:
    """A step that waits at the door of some members' training."""

    def __init__(self, *indices: int) -> None:
        self.indices, self.open = indices, threading.Event()
        self.open.set()
        self.here: set[int] = set()

    def __call__(self, player: Player) -> float:
        if player.index in self.indices and not self.open.is_set():
            self.here.add(player.index)
            assert self.open.wait(SLACK_S)
            self.here.discard(player.index)
        return quiet(player)

    def close(self, players: list[Player]) -> None:
        """Hold the round: all are in the same one, and nobody can end it who is not at the gate."""
        self.open.clear()

        def held() -> bool:
            nodes = [player.node for player in players]
            rounds = {node.machine.round_index for node in nodes} | {node.anchor.round_index + 1 for node in nodes}
            waiting = {player.index for player in players if player.node.machine.phase is Phase.WAITING}
            everybody = {player.index for player in players}
            return len(rounds) == 1 and bool(self.here) and self.here | waiting >= everybody

        eventually(held, "the gate holds the round")


def same_states(world: SmallWorld, *indices: int) -> dict[int, str]:
    """Every logged round has one state on all members; returns them."""
    logs = [world.round_log(index) for index in indices]
    states: dict[int, str] = {}
    for log in logs:
        for round_index, entry in log.items():
            assert states.setdefault(round_index, entry["state"]) == entry["state"], f"round {round_index}"
    return states


def certified_state_is_held(player: Player) -> bool:
    node = player.node
    return state_digests(node.anchor.arrays())[0].digest == node.machine.tip.state_digest


def rounds_of(world: SmallWorld, index: int) -> int:
    return len(world.trained(index))


def counted_in(entry: dict, player: Player) -> bool:
    return str(player.node.me) in entry["payloads"]


# -- the same bytes everywhere ----------------------------------------------------------------------------------------


CODECS = (
    "fp32",
    "int8",
    "ef(1)|q2",
    "ef(0.95)|topk(64/4096)|q2",
    "ef(0.95)|topk(64/4096)|q2|rice",
    "ef(1)|lowrank(2, shared)|int8",
)
"""One of each kind: dense, with private state, sparse, recoded, with shared state. The contract is tested elsewhere."""


@pytest.mark.parametrize("codec", CODECS)
def test_after_every_round_all_members_have_the_certified_state(tmp_path, codec):
    with SmallWorld(tmp_path, make_model, codec=codec, outer=NESTEROV, start_members=3, **EVERYBODY) as world:
        players = [world.play(index, quiet, phases=4) for index in range(3)]
        for player in players:
            player.rest()
        eventually(lambda: min(rounds_of(world, index) for index in range(3)) >= 4, "four rounds")
        states = same_states(world, 0, 1, 2)
        assert len({entry["state"] for entry in world.trained(0)}) == 4, "every round moved the anchor"
        for player in players:
            assert certified_state_is_held(player)
            assert player.node.machine.tip.state_digest.hex() == states[max(states)]
            assert torch.equal(player.held(), players[0].held())


def test_a_late_joiner_fetches_the_state_and_is_counted(tmp_path):
    with SmallWorld(
        tmp_path, make_model, codec="ef(1)|q2", outer=NESTEROV, start_members=2, snapshot_rounds=2, **EVERYBODY
    ) as world:
        players = [world.play(index, quiet) for index in range(2)]
        eventually(lambda: rounds_of(world, 0) >= 5, "five rounds without it")
        late = world.play(2, quiet)
        eventually(lambda: any(counted_in(e, late) for e in world.trained(0)) if late.swarm else False, "counted")
        first = min(late.adopted)
        assert first > 5
        eventually(lambda: first in players[0].adopted)
        assert torch.equal(late.adopted[first], players[0].adopted[first])
        same_states(world, 0, 1, 2)


# -- slow, late, gone -------------------------------------------------------------------------------------------------


def test_a_slow_member_is_hurried_and_counted_with_the_steps_it_made(tmp_path):
    timing = replace(QUICK, grace_ms=1_600, deadline_floor_ms=20_000, resend_ms=50)

    def step(player: Player) -> float:
        if player.index == 2:
            time.sleep(0.1)  # this is what slow training is
        return quiet(player)

    with SmallWorld(tmp_path, make_model, start_members=3, inner_steps=200, quorum_percent=60, timing=timing) as world:
        players = [world.play(index, step) for index in range(3)]

        def hurried() -> bool:
            slow = players[2]
            if slow.swarm is None:
                return False
            mine = [e["payloads"][str(slow.node.me)] for e in world.trained(0) if counted_in(e, slow)]
            return sum(0 < item["steps"] < 200 for item in mine) >= 2

        eventually(hurried, "two rounds with fewer steps")
        same_states(world, 0, 1, 2)


@pytest.mark.parametrize("codec", ["fp32", "ef(1)|q2"])
def test_a_member_that_is_overtaken_in_training_keeps_its_progress(tmp_path, codec):
    timing = replace(QUICK, grace_ms=100, deadline_floor_ms=100, deadline_ceiling_ms=20_000, resend_ms=50)
    gate, trained = Gate(2), dict[int, list[torch.Tensor]]()

    def step(player: Player) -> float:
        loss = gate(player)
        held = [value.detach().reshape(-1) for _, value in sorted(player.model.named_parameters())]
        trained.setdefault(player.index, []).append(torch.cat(held))
        return loss

    settings = {"start_members": 3, "inner_steps": 3, "quorum_percent": 60, "timing": timing}
    with SmallWorld(tmp_path, make_model, codec=codec, **settings) as world:
        players = [world.play(index, step) for index in range(3)]
        slow = players[2]
        eventually(lambda: rounds_of(world, 0) >= 1 and len(slow.adopted) > 1, "a round together")
        gate.open.clear()
        eventually(lambda: gate.here == {2}, "at the gate")
        steps, rounds, reached = len(trained[2]), set(slow.adopted), rounds_of(world, 0)
        start_d = slow.adopted[max(rounds)]
        eventually(lambda: rounds_of(world, 0) >= reached + 2, "rounds without it")
        gate.open.set()
        eventually(lambda: len(slow.adopted) > len(rounds), "adopts again")
        first = min(set(slow.adopted) - rounds)
        progress_d = trained[2][steps] - start_d
        assert progress_d.norm() > 0

        def moved() -> bool:
            """It holds one of the anchors since (the newest when it looked), and its progress on top."""
            anchors = [held_d for at, held_d in players[0].adopted.copy().items() if at >= first]
            return any(torch.allclose(slow.adopted[first] - d, progress_d, rtol=0, atol=1e-6) for d in anchors)

        eventually(moved, "anchor plus progress")
        eventually(lambda: any(counted_in(e, slow) for e in world.trained(0)[reached + 2 :]), "counted again")
        same_states(world, 0, 1, 2)


def test_a_restarted_member_announces_the_same_payload_again(tmp_path):
    gate = Gate(0, 1)
    with SmallWorld(tmp_path, make_model, codec="ef(1)|q2", start_members=3, **EVERYBODY) as world:
        players = [world.play(index, gate) for index in range(3)]
        eventually(lambda: min(rounds_of(world, index) for index in range(3)) >= 2, "two rounds")
        gate.close(players)
        victim = players[2]
        assert victim.node.machine.phase is Phase.WAITING
        me, round_index = victim.node.me, victim.node.machine.round_index
        said = victim.node.machine.attendance.announcements[me]
        error_d = victim.node.local.private.error_d.clone()
        victim.crash()
        world.players.remove(victim)
        again = world.play(2, gate)
        eventually(lambda: "host:3" in world.net.up, "it is back")
        gate.open.set()
        eventually(lambda: round_index in world.round_log(0), "the round ends")
        entry = world.round_log(0)[round_index]
        assert entry["payloads"][str(me)]["digest"] == said.payload.digest.hex()
        assert torch.isfinite(error_d).all()
        eventually(
            lambda: any(counted_in(e, again) for e in world.trained(0)[-1:]) if again.swarm else False, "counted"
        )
        assert min(again.adopted) == round_index + 1, "nothing was trained twice"
        same_states(world, 0, 1, 2)


def test_a_restart_of_all_at_once_resumes_the_same_chain(tmp_path):
    with SmallWorld(tmp_path, make_model, codec="ef(1)|q2", outer=NESTEROV, start_members=3, **EVERYBODY) as world:
        for index in range(3):
            world.play(index, quiet)
        eventually(lambda: min(rounds_of(world, index) for index in range(3)) >= 3, "three rounds")
        for player in world.players:
            player.crash()
        before = same_states(world, 0, 1, 2)
        world.players.clear()
        for index in range(3):
            world.play(index, quiet)
        eventually(lambda: min(map(max, (world.round_log(i) for i in range(3)))) >= max(before) + 3, "three more")
        after = same_states(world, 0, 1, 2)
        assert before.items() <= after.items()


def test_a_leaver_is_released_at_once_and_a_run_goes_on_without_it(tmp_path):
    with SmallWorld(tmp_path, make_model, start_members=3, **EVERYBODY) as world:
        players = [world.play(index, quiet) for index in range(3)]
        eventually(lambda: rounds_of(world, 0) >= 2, "two rounds")
        leaver = players[2]
        me = str(leaver.node.me)
        leaver.stopping.set()
        start_s = time.monotonic()
        leaver.swarm.leave(SLACK_S)
        assert time.monotonic() - start_s < SLACK_S / 2
        assert not leaver.swarm._member._thread.is_alive()
        left = [entry for entry in world.round_log(0).values() if me in entry["left"]]
        eventually(lambda: any(me in entry["left"] for entry in world.round_log(0).values()), "released")
        assert len(left) <= 1
        reached = rounds_of(world, 0)
        eventually(lambda: rounds_of(world, 0) >= reached + 3, "it goes on")
        assert me not in world.trained(0)[-1]["members"]


def test_the_last_member_leaves_without_waiting_for_anybody(tmp_path):
    with SmallWorld(tmp_path, make_model) as world:
        player = world.play(0, quiet, phases=2)
        player.rest()
        start_s = time.monotonic()
        player.swarm.leave(20.0)
        assert time.monotonic() - start_s < 5.0


def test_the_last_two_may_leave_at_the_same_time_and_wait_no_longer_than_they_said(tmp_path):
    with SmallWorld(tmp_path, make_model, start_members=2, **EVERYBODY) as world:
        players = [world.play(index, quiet) for index in range(2)]
        eventually(lambda: rounds_of(world, 0) >= 2, "two rounds")
        start_s = time.monotonic()
        leaving = [threading.Thread(target=player.swarm.leave, args=(3.0,)) for player in players]
        for thread in leaving:
            thread.start()
        for thread in leaving:
            thread.join(SLACK_S)
        assert time.monotonic() - start_s < 3.0 + HARD_STOP_S
        assert not any(player.swarm._member._thread.is_alive() for player in players)


def test_a_finished_run_ends_training_with_the_last_anchor(tmp_path):
    with SmallWorld(tmp_path, make_model, start_members=2, rounds=6, **EVERYBODY) as world:
        players = [world.play(index, quiet) for index in range(2)]
        for player in players:
            player.rest()
            assert player.swarm.finished
        assert torch.equal(players[0].held()[-1], players[1].held()[-1])
        logs = [world.round_log(index).values() for index in (0, 1)]
        assert [max(entry["trained"] for entry in log) for log in logs] == [6, 6]


# -- lies -------------------------------------------------------------------------------------------------------------


class Liar:
    """Speaks with a member's (or a stranger's) key straight into another member's door."""

    def __init__(self, world: SmallWorld, identity: Identity) -> None:
        self.world, self.identity = world, identity

    def push(self, envelope: bytes, to: int = 0) -> str | None:
        """Why the door refused it, or None."""
        service, loop = self.world.net.up[f"host:{to + 1}"]
        try:
            asyncio.run_coroutine_threadsafe(service.on_envelope(envelope), loop).result(SLACK_S)
        except PeerError as error:
            return error.why
        return None

    def say(self, slot: Slot, statement, to: int = 0) -> str | None:
        return self.push(self.sealed(slot, statement), to)

    def sealed(self, slot: Slot, statement) -> bytes:
        return encode_message(self.identity, slot.run_id, slot.round_index, slot.parent, statement)

    def announcement(self, slot: Slot, ref: BlobRef | None, steps: int, tokens: int = 0) -> Announcement:
        return Announcement(self.identity.public_key, ref, steps, tokens).signed(slot, self.identity.sign)


@pytest.fixture
def held_round(tmp_path, caplog):
    """Members 0 and 1 in the middle of a round, and member 2's key in the wrong hands."""
    caplog.set_level(logging.WARNING, "farflung")
    gate = Gate(0, 1)
    timing = replace(QUICK, grace_ms=300, deadline_floor_ms=500, deadline_ceiling_ms=20_000, resend_ms=100)
    settings = {"start_members": 3, "quorum_percent": 60, "timing": timing, "weights": "steps(cap=4)"}
    with SmallWorld(tmp_path, make_model, **settings) as world:
        players = [world.play(index, gate) for index in range(3)]
        eventually(lambda: min(rounds_of(world, index) for index in range(3)) >= 1, "a round")
        gate.open.clear()
        players[2].crash()
        eventually(lambda: gate.here == {0, 1}, "both at the gate")
        gate.close(players[:2])
        yield world, players, gate
        gate.open.set()
        world.net.up.pop("host:3", None)


def goes_on(world: SmallWorld, gate: Gate) -> bool:
    reached = rounds_of(world, 0)
    gate.open.set()
    eventually(lambda: rounds_of(world, 0) >= reached + 2, "the rounds go on")
    same_states(world, 0, 1)
    return True


def test_what_no_peer_signed_is_refused_at_the_door(held_round, caplog):
    world, players, gate = held_round
    node = players[0].node
    slot, stranger = node.machine.slot, Liar(world, Identity(b"s" * 32))
    good = stranger.sealed(slot, Status(0))
    refusals = node.parts.audit.refusals
    broken = bytearray(good)
    broken[-1] ^= 1
    for envelope in (b"", b"\0" * 40, bytes(range(256)) * 10, good[:-3], bytes(broken), b"x" * (1 << 21)):
        assert stranger.push(envelope)
    assert "another run" in str(stranger.say(replace(slot, run_id=bytes(20)), Status(0)))
    assert "somebody else's name" in str(
        stranger.say(slot, Liar(world, Identity(b"t" * 32)).announcement(slot, None, 0))
    )
    assert node.parts.audit.refusals == refusals + 8
    assert sum("refused" in record.message for record in caplog.records) >= 8
    assert goes_on(world, gate)


def test_a_stranger_may_speak_but_is_not_believed(held_round, caplog):
    world, players, gate = held_round
    node = players[0].node
    slot, identity = node.machine.slot, Identity(b"s" * 32)
    stranger = Liar(world, identity)
    draft = node.machine.attendance.draft(node.me)
    ref, _ = describe(b"not mine to give")
    expected = {
        "announces without being a member": stranger.announcement(slot, ref, 3),
        "votes without being a voter": Vote(0, bytes(32), bytes(32), bytes(64)),
        "promises without being a voter": Promise(1, None),
        "proposes in view": Proposal(0, draft),
        "leaves without being a member": LeaveNotice.make(identity.public_key, slot, identity.sign),
        "wrong join secret": JoinRequest.make(slot.run_id, identity.public_key, slot.parent, b"guess", identity.sign),
    }
    for statement in expected.values():
        assert stranger.say(slot, statement) is None, "well-formed: it is the machine that does not believe it"
    for why in expected:
        eventually(lambda why=why: any(why in record.message for record in caplog.records), why)
    assert goes_on(world, gate)
    assert str(identity.peer_id) not in world.trained(0)[-1]["members"]


def test_a_lying_member_is_refused_and_the_round_goes_on(held_round, caplog):
    world, players, gate = held_round
    node = players[0].node
    slot, liar = node.machine.slot, Liar(world, open_home(world.root / "2").identity)
    ref, _ = describe(b"a payload" * 10)
    huge = BlobRef(bytes(32), 10 << 30, 1 << 20)
    elsewhere = replace(slot, parent=bytes(32))
    draft = node.machine.attendance.draft(node.me)
    expected = {
        "10737418240 bytes": (slot, liar.announcement(slot, huge, 3)),
        "a payload of 0 steps": (slot, liar.announcement(slot, ref, 0)),
        "abstains with steps": (slot, liar.announcement(slot, None, 10**18)),
        "wrong signature on an announcement": (slot, liar.announcement(elsewhere, ref, 3)),
        "on another chain": (elsewhere, Status(0)),
        "promises a view it has voted in": (slot, Promise(1, (1, draft))),
        "view 1000 while": (slot, Vote(1000, bytes(32), bytes(32), bytes(64))),
        "wrong signature on a vote": (slot, Vote(0, bytes(32), bytes(32), bytes(64))),
    }
    for where, statement in expected.values():
        assert liar.say(where, statement) is None
    for why in expected:
        eventually(lambda why=why: any(why in record.message for record in caplog.records), why)
    assert not node.machine.attendance.announcements.keys() & {liar.identity.peer_id}
    assert goes_on(world, gate)


def test_a_replayed_message_changes_nothing(held_round):
    world, players, gate = held_round
    node = players[0].node
    slot, liar = node.machine.slot, Liar(world, open_home(world.root / "2").identity)
    before = node.machine.attendance.announcements.copy()
    ref, _ = describe(b"an old payload")
    old = replace(slot, round_index=slot.round_index - 1)
    envelope = liar.sealed(old, liar.announcement(old, ref, 3))
    for _ in range(50):
        assert liar.push(envelope) is None
    eventually(node._inbox.empty, "all heard")
    assert node.machine.attendance.announcements == before
    assert node.machine.slot == slot
    assert goes_on(world, gate)


def test_a_claim_of_10_to_the_18_steps_weighs_as_much_as_the_cap(held_round):
    world, players, gate = held_round
    slot, liar = players[0].node.machine.slot, Liar(world, open_home(world.root / "2").identity)
    codec, schema = players[0].node.anchor.codec, players[0].node.anchor.schema
    private, shared = codec.init(schema)
    payload, _ = codec.encode(torch.full((schema.numel,), 1e-3), private, shared, slot.round_index)
    serve(world, 2, payload)
    ref, _ = describe(payload)
    for to in (0, 1):
        assert liar.say(slot, liar.announcement(slot, ref, 10**18, 10**18), to) is None
    me = str(liar.identity.peer_id)
    gate.open.set()
    eventually(lambda: slot.round_index in world.round_log(0), "the round ends")
    entry = world.round_log(0)[slot.round_index]["payloads"]
    assert entry[me]["steps"] == 10**18
    assert entry[me]["share"] == pytest.approx(4 / (4 + 2 + 2)), "steps(cap=4) beside two members with two steps each"
    assert goes_on(world, gate)


def test_a_payload_that_does_not_decode_is_refused_by_everybody(held_round, caplog):
    world, players, gate = held_round
    slot, liar = players[0].node.machine.slot, Liar(world, open_home(world.root / "2").identity)
    rubbish = b"\xff" * 400
    serve(world, 2, rubbish)
    ref, _ = describe(rubbish)
    for to in (0, 1):
        assert liar.say(slot, liar.announcement(slot, ref, 3), to) is None
    eventually(
        lambda: sum(f"payload {ref.short}" in record.message for record in caplog.records) >= 2, "both refuse it"
    )
    gate.open.set()
    eventually(lambda: slot.round_index in world.round_log(0), "the round ends")
    assert str(liar.identity.peer_id) not in world.round_log(0)[slot.round_index]["payloads"]
    assert goes_on(world, gate)


def serve(world: SmallWorld, index: int, payload: bytes) -> None:
    """Stand in for a crashed member: its address answers again, with one payload."""
    ref, digests = describe(payload)

    class Source:
        def __init__(self) -> None:
            self.ref, self.digests = ref, digests

        def read_chunk(self, at: int) -> bytes:
            start, stop = ref.span(at)
            return payload[start:stop]

    class Exchange:
        sources = {ref.digest: Source()}  # noqa: RUF012

    class Service:
        exchange = Exchange()

        async def on_envelope(self, envelope: bytes) -> None:
            """Not interested."""

    _, loop = world.net.up["host:1"]
    world.net.up[f"host:{index + 1}"] = (Service(), loop)


# -- breakage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["fp32", "ef(1)|q2"])
def test_a_member_that_went_wild_abstains_and_adopts(tmp_path, codec):
    def step(player: Player) -> float:
        if player.index == 1 and len(player.adopted) == 3:
            with torch.no_grad():
                player.model.weight[0, 0] = float("nan")
            return float("nan")
        return quiet(player)

    with SmallWorld(tmp_path, make_model, codec=codec, start_members=3, **EVERYBODY) as world:
        players = [world.play(index, step, phases=5) for index in range(3)]
        for player in players:
            player.rest()
        wild = str(players[1].node.me)
        eventually(lambda: rounds_of(world, 0) >= 5, "five rounds")
        sizes = [entry["payloads"][wild]["bytes"] for entry in world.trained(0)]
        assert [size > 0 for size in sizes] == [True, True, False, True, True]
        assert world.trained(0)[2]["payloads"][wild]["steps"] == 0
        assert torch.equal(players[1].held(), players[0].held())
        assert torch.isfinite(players[1].held()).all()
        same_states(world, 0, 1, 2)


def test_a_flipped_byte_in_the_anchor_is_found_in_the_same_round_and_healed(tmp_path, caplog):
    caplog.set_level(logging.INFO, "farflung")
    gate = Gate(0, 1, 2)
    with SmallWorld(tmp_path, make_model, outer=NESTEROV, start_members=3, snapshot_rounds=2, **EVERYBODY) as world:
        players = [world.play(index, gate) for index in range(3)]
        eventually(lambda: min(rounds_of(world, index) for index in range(3)) >= 3, "three rounds")
        gate.close(players)
        sick = players[1].node
        round_index = sick.machine.round_index
        with sick.anchor.lock:
            sick.anchor.theta_d.view(torch.uint8)[5] ^= 0x10
        assert not certified_state_is_held(players[1])
        gate.open.set()
        eventually(lambda: rounds_of(world, 1) >= rounds_of(world, 0) - 1 >= 5, "it goes on")
        healed = [record for record in caplog.records if "healing" in record.message]
        assert {(record.peer, record.round) for record in healed} == {(sick.me.short, round_index)}
        gate.close(players)
        eventually(lambda: all(certified_state_is_held(player) for player in players), "healed")
        same_states(world, 0, 1, 2)
        gate.open.set()


def test_a_snapshot_of_a_damaged_anchor_is_not_what_heals_it(tmp_path, caplog):
    caplog.set_level(logging.INFO, "farflung")
    gate = Gate(0, 1, 2)
    with SmallWorld(tmp_path, make_model, start_members=3, snapshot_rounds=100, **EVERYBODY) as world:
        players = [world.play(index, gate) for index in range(3)]
        eventually(lambda: min(rounds_of(world, index) for index in range(3)) >= 2, "two rounds")
        gate.close(players)
        sick = players[1].node
        with sick.anchor.lock:
            sick.anchor.theta_d[0] += 1
        sick.store.write_snapshot(sick.anchor.round_index, sick.anchor.theta_d, sick.anchor.buffers)
        gate.open.set()
        eventually(lambda: any("healing" in record.message for record in caplog.records), "noticed")
        reached = rounds_of(world, 1)
        eventually(lambda: rounds_of(world, 1) >= reached + 2, "it goes on")
        same_states(world, 0, 1, 2)


@pytest.mark.parametrize("part", ["append_certificate", "put", "begin_round"])
def test_a_full_disk_ends_training_with_the_reason(tmp_path, part):
    with SmallWorld(tmp_path, make_model) as world:
        player = world.play(0, quiet)
        eventually(lambda: rounds_of(world, 0) >= 2, "two rounds")

        def full(*_):
            raise ConfigError("disk full: no space left")

        setattr(player.node.store, part, full)
        with pytest.raises(ConfigError, match="disk full"):
            player.rest()
        player.error = None
        assert not player.swarm._member._thread.is_alive()
        assert player.swarm.finished


def test_why_a_round_waits_is_always_said(tmp_path):
    gate = Gate(1)
    with SmallWorld(tmp_path, make_model, start_members=2, **EVERYBODY) as world:
        first = world.play(0, gate)
        second = world.play(1, gate)
        eventually(lambda: rounds_of(world, 0) >= 1, "a round")
        gate.open.clear()
        eventually(lambda: second.node.me.short in first.swarm.status["why"], "names whom it waits for")
        assert first.swarm.status["why"].startswith("waiting for payloads of")
        gate.open.set()
