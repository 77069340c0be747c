"""A small world for round machines: messages are lost, doubled, delayed and reordered; members crash and come back.

Everything is drawn from one seed, so a failing seed is the failure again. The "state" after a round is a hash of the
state before and the manifest: what a deterministic training step would give.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from farflung.protocol import blob
from farflung.protocol.certificate import Certificate, certify_first
from farflung.protocol.effects import (
    Apply,
    Broadcast,
    CatchUp,
    Fetch,
    Heal,
    Heard,
    Held,
    Leave,
    Note,
    Own,
    Persist,
    Send,
    Stage,
    Staged,
    Tick,
)
from farflung.protocol.errors import PeerError
from farflung.protocol.genesis import Genesis, Timing, secret_digest
from farflung.protocol.identity import Identity, PeerId
from farflung.protocol.phase import Phase, Self
from farflung.protocol.round import RoundMachine
from farflung.protocol.schema import Schema, TensorSpec
from farflung.protocol.statements import Announcement
from farflung.protocol.waiting import why_waiting
from farflung.protocol.wire import Message, Promise, Proposal, Vote

SECRET = b"open sesame, said the swarm"
STATE_0 = hashlib.sha256(b"theta zero").digest()
TIMING = Timing(grace_ms=2_000, deadline_floor_ms=500, deadline_ceiling_ms=20_000, view_floor_ms=1_000, resend_ms=500)


def make_identity(index: int) -> Identity:
    return Identity(hashlib.sha256(b"test peer %d" % index).digest())


def make_genesis(founder: Identity, **changes) -> Genesis:
    base = Genesis(
        name="world",
        founder=founder.public_key,
        state_digest=STATE_0,
        schema=Schema((TensorSpec("w", (8,), "float32"),)),
        secret_digest=secret_digest(SECRET),
        timing=TIMING,
    )
    return replace(base, **changes)


def apply_manifest(state: bytes, manifest_digest: bytes) -> bytes:
    return hashlib.sha256(state + manifest_digest).digest()


@dataclass
class Faults:
    loss: float = 0.0
    double: float = 0.0
    delay_s: tuple[float, float] = (0.01, 0.1)
    train_s: tuple[float, float] = (1.0, 2.0)
    fetch_s: tuple[float, float] = (0.05, 0.3)
    stage_s: tuple[float, float] = (0.01, 0.1)


@dataclass
class Disk:
    """What survives a crash."""

    chain: list[Certificate]
    journal: list[tuple[str, object]] = field(default_factory=list)
    blobs: set[bytes] = field(default_factory=set)


class Peer:
    """The shell of one machine."""

    def __init__(self, world: World, identity: Identity, first: Certificate, *, secret: bytes = SECRET) -> None:
        self.world, self.identity, self.secret = world, identity, secret
        self.disk = Disk([first])
        self.alive, self.generation = False, 0
        self.machine: RoundMachine | None = None
        self.states: dict[int, bytes] = {}
        self.gone = False

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    def start(self) -> None:
        self.alive, self.generation = True, self.generation + 1
        self.states = {0: STATE_0}
        for certificate in self.disk.chain[1:]:
            self._advance_state(certificate)
        me = Self(self.peer_id, self.identity.public_key, self.identity.sign, 1 << 20, self.secret)
        self.machine = RoundMachine(self.world.genesis, me, self.disk.chain[-1])
        self._carry_out(self.machine.begin(self.world.now_s, self.disk.journal))
        if self.alive:
            self._train()
        self._schedule_tick()

    def crash(self) -> None:
        self.alive, self.machine = False, None
        self.generation += 1

    def handle(self, event) -> None:
        if not self.alive or self.machine is None:
            return
        before = self.machine.round_index
        try:
            effects = self.machine.handle(event, self.world.now_s)
        except PeerError as error:
            self.world.refusals.append(str(error))
            return
        self._carry_out(effects)
        if self.alive and self.machine.round_index != before:
            self._train()
        self._schedule_tick()

    def later(self, delay_s: float, event_of: Callable[[], object | None]) -> None:
        generation = self.generation

        def act() -> None:
            if self.alive and self.generation == generation and (event := event_of()) is not None:
                self.handle(event)

        self.world.at(self.world.now_s + delay_s, act)

    def _schedule_tick(self) -> None:
        if not self.alive:
            return
        wake_s = max(self.machine.wake_s, self.world.now_s + 1e-3)
        self.later(wake_s - self.world.now_s, lambda: Tick() if self.machine.wake_s <= self.world.now_s else None)

    def _train(self) -> None:
        if self.machine.wants_steps:
            round_index = self.machine.round_index
            delay_s = self.world.draw(self.world.faults_of(self).train_s)
            self.later(delay_s, lambda: self._own(round_index))

    def _own(self, round_index: int):
        machine = self.machine
        if machine.round_index != round_index or machine.phase is not Phase.TRAINING:
            return None
        data = b"payload %d of %s, trained in life %d" % (round_index, self.peer_id.digest, self.generation)
        ref, _ = blob.describe(data)
        self.disk.blobs.add(ref.digest)
        bare = Announcement(self.identity.public_key, ref, 10, 100)
        return Own(bare.signed(machine.slot, self.identity.sign))

    def _carry_out(self, effects) -> None:
        world, faults = self.world, self.world.faults_of(self)
        for effect in effects:
            if not self.alive:
                return
            if world.crash_between_effects(self):
                self.crash()
                world.at(world.now_s + world.draw((0.1, 8.0)), self.start)
                return
            match effect:
                case Broadcast(slot, statement):
                    assert self.is_durable(statement), f"said before it was on disk: {statement}"
                    world.check_said(self, slot, statement)
                    audience = {*self.machine.parent.member_of, *self.machine.attendance.joins}
                    for other in world.peers:
                        if other is not self and other.peer_id in audience:
                            world.send(self, other, slot, statement)
                case Send(peer, slot, statement):
                    world.send(self, world.peer(peer), slot, statement)
                case Persist(kind, value):
                    self.disk.journal.append((kind, value))
                case Fetch(announcement):
                    self._fetch(announcement.payload.digest, world.draw(faults.fetch_s))
                case Stage(manifest):
                    state = apply_manifest(self.states[manifest.round_index - 1], manifest.digest)
                    world.check_stage(self, manifest)
                    self.later(world.draw(faults.stage_s), lambda m=manifest, s=state: self._staged(m, s))
                case Apply(certificate):
                    self.disk.chain.append(certificate)
                    self.disk.journal.clear()
                    self._advance_state(certificate)
                    world.applied(self, certificate)
                case CatchUp(peer, _):
                    self._catch_up(world.peer(peer))
                case Heal():
                    raise AssertionError("states differ in a world that is deterministic")
                case Note():
                    pass

    def _staged(self, manifest, state):
        return Staged(manifest.digest, state) if self.machine.staging == manifest.digest else None

    def is_durable(self, statement) -> bool:
        match statement:
            case Announcement():
                return ("own", statement) in self.disk.journal
            case Promise():
                return ("promise", statement) in self.disk.journal
            case Proposal():
                return ("proposal", statement) in self.disk.journal
            case Vote(view, digest, state):
                kept = [value for kind, value in self.disk.journal if kind == "vote"]
                return any((at, manifest.digest, result) == (view, digest, state) for at, manifest, result in kept)
        return True

    def _fetch(self, digest: bytes, delay_s: float) -> None:
        def arrive():
            if digest in self.disk.blobs or any(p.alive and digest in p.disk.blobs for p in self.world.peers):
                self.disk.blobs.add(digest)
                return Held(digest)
            self._fetch(digest, delay_s)
            return None

        self.later(delay_s, arrive)

    def _catch_up(self, other: Peer) -> None:
        def answer():
            index = len(self.disk.chain)
            if other.alive and index < len(other.disk.chain):
                certificate = other.disk.chain[index]
                text = certificate.canonical_bytes
                return Heard(self.world.certified_message(other, text))
            return None

        self.later(self.world.draw(self.world.faults_of(self).delay_s), answer)

    def _advance_state(self, certificate: Certificate) -> None:
        index = certificate.manifest.round_index
        self.states[index] = apply_manifest(self.states[index - 1], certificate.manifest.digest)
        assert self.states[index] == certificate.state_digest


class World:
    """Peers, a clock and a heap of things to come."""

    def __init__(self, seed: int, members: int, *, faults: Faults | None = None, **genesis_changes) -> None:
        self.random = random.Random(seed)
        self.now_s, self._sequence = 0.0, 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self.faults = faults or Faults()
        self.slow: dict[PeerId, Faults] = {}
        self.refusals: list[str] = []
        self.certified: dict[int, bytes] = {}
        self.said: dict[tuple, dict] = {}
        self.crash_rate = 0.0
        self.cut: set[tuple[PeerId, PeerId]] = set()
        self.lose: Callable[[Peer, Peer, object], bool] = lambda sender, to, statement: False
        identities = [make_identity(index) for index in range(members)]
        self.genesis = make_genesis(identities[0], start_members=members, **genesis_changes)
        first = certify_first(self.genesis, identities[0].sign)
        self.peers = [Peer(self, identity, first) for identity in identities]

    def add_peer(self, index: int, *, secret: bytes = SECRET) -> Peer:
        peer = Peer(self, make_identity(index), self.peers[0].disk.chain[0], secret=secret)
        self.peers.append(peer)
        return peer

    def peer(self, peer_id: PeerId) -> Peer:
        return next(item for item in self.peers if item.peer_id == peer_id)

    def faults_of(self, peer: Peer) -> Faults:
        return self.slow.get(peer.peer_id, self.faults)

    def draw(self, span: tuple[float, float]) -> float:
        return self.random.uniform(*span)

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (when_s, self._sequence, act))

    def crash_between_effects(self, peer: Peer) -> bool:
        return self.crash_rate > 0 and self.random.random() < self.crash_rate

    def send(self, sender: Peer, to: Peer, slot, statement) -> None:
        if (sender.peer_id, to.peer_id) in self.cut or self.lose(sender, to, statement):
            return
        public_key = sender.identity.public_key
        message = Message(sender.peer_id, public_key, slot.run_id, slot.round_index, slot.parent, statement)
        copies = 0 if self.random.random() < self.faults.loss else 1
        copies += self.random.random() < self.faults.double
        for _ in range(copies):
            self.at(self.now_s + self.draw(self.faults.delay_s), lambda: to.handle(Heard(message)))

    def certified_message(self, sender: Peer, text: bytes) -> Message:
        from farflung.protocol.certificate import decode_certificate
        from farflung.protocol.wire import Certified

        statement = Certified(decode_certificate(text))
        return Message(sender.peer_id, sender.identity.public_key, self.genesis.run_id, 0, bytes(32), statement)

    def check_stage(self, peer: Peer, manifest) -> None:
        held = peer.disk.blobs
        assert all(item.payload.digest in held for item in manifest.payloads), "staged without holding every payload"

    def check_said(self, peer: Peer, slot, statement) -> None:
        """An honest peer keeps its word over crashes: one payload a round, one vote a view, none before a promise."""
        said = self.said.setdefault((peer.peer_id, slot), {"votes": {}, "promises": {}})
        votes, promises = said["votes"], said["promises"]
        match statement:
            case Announcement():
                assert said.setdefault("payload", statement) == statement, "two payloads in one round"
            case Vote(view, manifest_digest, state_digest):
                fresh, vote = view not in votes, (manifest_digest, state_digest)
                assert votes.setdefault(view, vote) == vote, f"two votes in view {view}"
                assert not fresh or view >= max(promises, default=0), f"a vote in view {view} after a promise"
            case Promise(view, voted):
                before = max((one for one in votes if one < view), default=-1)
                assert (voted[0] if voted else -1) >= before, f"a promise of view {view} that hides a vote"
                assert promises.setdefault(view, voted) == voted, f"two promises of view {view}"

    def applied(self, peer: Peer, certificate: Certificate) -> None:
        """The safety property: never two certified manifests for one round."""
        index, digest = certificate.manifest.round_index, certificate.manifest.digest
        assert self.certified.setdefault(index, digest) == digest, f"two certificates for round {index}"

    def run(self, until: Callable[[], bool], limit_s: float = 600.0) -> None:
        while not until():
            assert self._heap, "nothing left to happen"
            self.now_s, _, act = heapq.heappop(self._heap)
            assert self.now_s <= limit_s, self.describe()
            act()

    def run_for(self, span_s: float) -> None:
        end_s = self.now_s + span_s
        while self._heap and self._heap[0][0] <= end_s:
            self.now_s, _, act = heapq.heappop(self._heap)
            act()
        self.now_s = end_s

    def rounds(self, peer: Peer) -> int:
        return peer.disk.chain[-1].manifest.round_index

    def everybody_past(self, round_index: int) -> Callable[[], bool]:
        return lambda: all(self.rounds(peer) >= round_index for peer in self.peers if not peer.gone)

    def describe(self) -> str:
        return "\n".join(
            f"{peer.peer_id.short} round {self.rounds(peer)} "
            + (f"{peer.machine.phase} {why_waiting(peer.machine, self.now_s)}" if peer.alive else "dead")
            for peer in self.peers
        )

    def leave(self, peer: Peer) -> None:
        peer.handle(Leave())
