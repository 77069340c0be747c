"""One peer: the thin shell that carries out what the round machine decides.

One task works through the inbox: event in, effects out, carried out in order, so that nothing is said before it is on
disk. Fetching payloads and trying out manifests run beside it and come back as events. Everything the shell touches is
given to it (`runtime.py`), so the simulator runs the same code.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from farflung.compression.codec import Link
from farflung.node.anchor import Anchor
from farflung.node.audit import Audit
from farflung.node.blobfiles import FileSource
from farflung.node.blobs import BlobExchange
from farflung.node.entries import decode_entry, encode_entry
from farflung.node.local_phase import LocalPhase
from farflung.node.mailbox import LocalResult, Mailbox
from farflung.node.mixer import Mixer
from farflung.node.mixing_parts import mixing_parts
from farflung.node.outbox import Outbox
from farflung.node.peers import Peers
from farflung.node.pursuit import Pursuit
from farflung.node.reference import ReferenceAnchor
from farflung.node.replica import Replica
from farflung.node.report import describe
from farflung.node.runtime import Clock, Transport
from farflung.node.state_sync import SNAPSHOT_S, StateSync, read_payloads
from farflung.node.store import RunStore
from farflung.protocol.blob import BlobRef
from farflung.protocol.certificate import Certificate
from farflung.protocol.effects import (
    Apply,
    Broadcast,
    CatchUp,
    Effect,
    Event,
    Fetch,
    Heal,
    Heard,
    Held,
    Leave,
    Note,
    Own,
    Persist,
    Refused,
    Send,
    Stage,
    Staged,
    Tick,
)
from farflung.protocol.errors import ConfigError, FarflungError, LocalError, PeerError
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import Identity, PeerId
from farflung.protocol.manifest import Manifest
from farflung.protocol.mixing.notes import Note as MixingNote
from farflung.protocol.phase import Phase, Self
from farflung.protocol.round import RECENT_TIPS, RoundMachine
from farflung.protocol.statements import Announcement, Slot
from farflung.protocol.wire import Certified, Message, Statement, decode_message, encode_message

log = logging.getLogger(__name__)

INBOX_MAX = 4096
"""Events waiting for the machine. A member of 256 hears some thousand messages a round; more than this is a flood."""

CALL_S = 10.0
"""How long one control call may take."""

SNAPSHOTS_SERVED = 3
"""Snapshots offered to joiners: one more than are kept, for those who are still fetching it."""

REPORT_S = 1.0
"""How often status.json is written."""

FLUSH_S = 1.0
"""How long a leaver's last messages may take."""


@dataclass
class Parts:
    """What a node is made of."""

    genesis: Genesis
    identity: Identity
    secret: bytes
    store: RunStore
    transport: Transport
    exchange: BlobExchange
    peers: Peers
    anchor: Anchor
    clock: Clock
    mailbox: Mailbox
    audit: Audit
    invite: str
    """A fresh one, for others."""

    workers: Executor | None = None
    """Where what takes long is done (disk, codec, aggregation); None: threads of the node's own."""


class Node:
    """A member, or somebody on the way to become one. `run` lives until `leave`, the run's end, or an error."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.genesis, self.store, self.anchor, self.clock = parts.genesis, parts.store, parts.anchor, parts.clock
        self.me = parts.identity.peer_id
        self.outbox = Outbox(parts.transport, parts.peers.record_of, CALL_S)
        self.sync = StateSync(parts.genesis, parts.store, parts.exchange, parts.peers, parts.transport, parts.anchor)
        self.machine: RoundMachine | None = None
        self._inbox: asyncio.Queue[Event] = asyncio.Queue(INBOX_MAX)
        self._pool = parts.workers or ThreadPoolExecutor(max(2, self.anchor.threads), "farflung")
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._fetching: dict[bytes, asyncio.Task[None]] = {}
        self._further: dict[bytes, asyncio.Task[None]] = {}
        """Fetches of what payloads offer besides: they may take longer than a round."""
        self._trying = asyncio.Lock()
        self._snapshot: asyncio.Task[None] | None = None
        self._served: deque[bytes] = deque()
        self.pursuit = Pursuit(parts.genesis, parts.peers, parts.transport, parts.audit)
        self.local: LocalPhase
        self.mixer: Mixer | None = None
        if isinstance(self.anchor, ReferenceAnchor):
            self.local, self.mixer = mixing_parts(self)
        else:
            self.local = self._phase()
        self.held: Anchor | Replica = self.anchor if self.mixer is None else self.mixer.ways.replica
        """What this member's training stands on: the anchor, or its own parameters where members mix."""
        self._left = asyncio.Event()
        self._lost = asyncio.Event()
        self._failed: asyncio.Future[None] | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Reach the tip, take part until the end, and close nothing: what was given belongs to the caller.

        Raises what went wrong: LocalError for our bugs, ConfigError for a full disk and the like.
        """
        self._failed = asyncio.get_running_loop().create_future()
        self._spawn(self._report(), "status")
        try:
            await self._in_thread(self.local.restore)
            while not self._left.is_set():
                self.machine = None  # what still runs for the one before finds that it is gone
                self.parts.peers.wanted = tuple  # and until there is another, anybody may help
                self._forget_fetches()
                if self.mixer is not None:
                    await self.mixer.stop()  # nothing is heard any more, and its reference is about to be overwritten
                async with self._trying:
                    tip = await self.sync.reach_tip(self._pool)
                self.local.reached(tip.manifest)
                if self.mixer is not None:
                    self.mixer.sit_out(tip.manifest)
                self.local.overtaken(lambda index: self.sync.certificate(index).manifest, tip.manifest.round_index)
                for source in self.sync.kept_sources():
                    self.parts.exchange.offer(source)
                await self._enter(tip)
                await self._take_part()
            await self.outbox.flush(FLUSH_S)
        finally:
            await self._end()

    async def _take_part(self) -> None:
        """Work until this member has left, or is so far behind that fetching the state again is quicker."""
        self._lost.clear()
        assert self._failed is not None
        waits: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(wait) for wait in (self._work(), self._left.wait(), self._lost.wait())
        ]
        try:
            await asyncio.wait([*waits, self._failed], return_when=asyncio.FIRST_COMPLETED)
            for ended in (waits[0], self._failed):
                if ended.done():
                    await ended
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def leave(self) -> None:
        """Ask to be released politely; `run` returns when the next manifest does so, or at once if nobody is there."""
        if self.machine is not None and set(self.machine.parent.member_of) == {self.me}:
            self._left.set()
        else:
            self._give(Leave())

    def local_result(self, result: LocalResult) -> None:
        """From training: the local phase of a round is over. Answered by a notice in the mailbox."""
        if self.machine is not None and self.local.accepts(result, self.machine):
            members = len(self.machine.parent.member_of)
            self._spawn(self._speak(result, self.machine.slot, members), f"encode {result.round_index}")

    def receive(self, envelope: bytes) -> None:
        """A control message from the network: checked here, believed or not by the machine. Raises PeerError."""
        if self.machine is None:
            raise PeerError("?", "is still starting")
        try:
            message = decode_message(envelope, self.genesis.run_id)
        except PeerError as error:
            self.parts.audit.refused(error.peer, error.why, round_index=self._round)
            raise
        if isinstance(message.statement, MixingNote):
            self._hear_note(message)
            return
        if self._inbox.full():
            raise PeerError(message.sender.short, "sends too many messages at once")
        self._inbox.put_nowait(Heard(message))

    def _hear_note(self, message: Message) -> None:
        """What partners say while they mix is about their mixing's round, not about the machine's."""
        machine, mixer = self.machine, self.mixer
        roll = self.anchor.roll if isinstance(self.anchor, ReferenceAnchor) else None
        mixing = () if roll is None else roll.members  # who leaves with a certificate still mixes after it
        if machine is None or mixer is None or message.sender not in {*machine.parent.member_of, *mixing}:
            raise PeerError(message.sender.short, "tells this member of a mixing it takes no part in")
        machine.heard_s[message.sender] = self.clock.now_s()
        mixer.hear(message)

    def mixed(self) -> None:
        """The mixing of a round has ended: training may go on from what it gave."""
        machine = self.machine
        self._save_if_due()
        if machine is not None:
            self.local.welcome(machine)
            self._after(machine.round_index)

    async def _end(self) -> None:
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.outbox.stop()
        if self.mixer is not None:
            await self.mixer.stop()
        if self.local.wants_saving(math.inf):
            try:
                await self._in_thread(self.local.save)
            except ConfigError as error:  # a full disk: what ended this node is worth more than what is lost
                self.parts.audit.note(f"own state could not be saved: {error}", round_index=self._round)
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def _enter(self, tip: Certificate) -> None:
        """Start the machine from the tip on disk, with what this round's journal remembers."""
        identity = self.parts.identity
        me = Self(
            peer_id=self.me,
            public_key=identity.public_key,
            sign=identity.sign,
            payload_bytes_max=self.anchor.payload_bytes_max,
            secret=self.parts.secret,
        )
        machine = RoundMachine(self.genesis, me, tip)
        machine.recent_tips.extendleft(self._earlier_tips(tip))
        journal = self.store.journal
        if journal.round_index != machine.round_index:
            self.store.begin_round(machine.round_index, self.local.announced)
        self.machine = machine
        self._forget_fetches()  # a new machine asks again for what it needs to hold
        self.parts.peers.wanted = self._audience
        await self._carry_out(machine.begin(self.clock.now_s(), [decode_entry(*entry) for entry in journal.read()]))
        self.local.welcome(machine)

    def _earlier_tips(self, tip: Certificate) -> list[bytes]:
        """Digests of the manifests before the tip, latest first: requests to join may name them."""
        last = tip.manifest.round_index
        return [
            self.sync.certificate(index).manifest.digest for index in range(last - 1, max(-1, last - RECENT_TIPS), -1)
        ]

    async def _report(self) -> None:
        """Keep status.json fresh."""
        while True:
            await self._in_thread(self.store.write_status, describe(self))
            await asyncio.sleep(REPORT_S)

    # -- the one loop -------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        machine = self.machine
        assert machine is not None
        while True:
            wait_s = max(0.0, machine.wake_s - self.clock.now_s())
            try:
                async with asyncio.timeout(wait_s):  # wait_for can swallow a cancellation before 3.12
                    event: Event = await self._inbox.get()
            except TimeoutError:
                event = Tick()
            if isinstance(event, Own) and not self.local.hand_over(machine):
                self.local.welcome(machine)
                continue
            before = machine.round_index
            try:
                effects = machine.handle(event, self.clock.now_s())
            except PeerError as error:
                self.parts.audit.refused(error.peer, error.why, round_index=before)
                continue
            await self._carry_out(effects)
            self._after(before)

    async def _carry_out(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Persist):
                await self._in_thread(self.store.journal.record, effect.kind, encode_entry(effect))
            elif isinstance(effect, Apply):
                await self._apply(effect.certificate)
            else:
                self._carry_out_now(effect)

    def _carry_out_now(self, effect: Effect) -> None:
        match effect:
            case Broadcast(slot, statement):
                envelope = self._envelope(slot, statement)
                for peer in self._audience():
                    self.outbox.put(peer, type(statement).__name__, envelope)
            case Send(peer, slot, statement):
                self.outbox.put(peer, type(statement).__name__, self._envelope(slot, statement))
            case Fetch(announcement):
                self._fetch(announcement)
            case Stage(manifest):
                self._spawn(self._try_out(manifest), f"try out {manifest.round_index}")
            case Heal(certificate):
                self._spawn(self._heal(certificate), f"heal {certificate.manifest.round_index}")
            case CatchUp(peer, round_index):
                machine = self.machine
                if machine is not None and self.pursuit.wanted(round_index):
                    self._spawn(self._catch_up(peer, machine), f"catch up from {peer.short}")
            case Note(text):
                self.parts.audit.note(text, round_index=self._round)

    def _after(self, before: int) -> None:
        """What a change of round or phase means outside the machine."""
        machine = self.machine
        assert machine is not None
        if machine.round_index != before:
            self._feed(machine)
            self.local.welcome(machine)
        over = machine.phase is Phase.DONE and not machine.behind
        alone = machine.parent.member_of.keys() == {self.me}  # nobody is there to be told, or to release me
        ending = machine.certificate  # known, perhaps not applied: those who stay need not serve a leaver any more
        released = not machine.is_member or (ending is not None and self.me not in ending.manifest.member_of)
        serves = self.mixer is not None and self.mixer.serves(self.clock.now_s())  # then partners count on this member
        if not serves and (over or (machine.leaving and (alone or released))):
            self._left.set()
        if self.mixer is None or not self.mixer.busy:
            self.local.hurry(machine)

    async def _speak(self, result: LocalResult, slot: Slot, members: int) -> None:
        """Encode, put on disk, announce; or abstain."""
        link = Link(*self.parts.exchange.take_speeds_bps(), result.train_s, members)
        spoken = await self._in_thread(self.local.encode, result, link)
        if spoken.source is not None:
            self.parts.exchange.offer(spoken.source)
        self.parts.audit.spoke(result, spoken.ref)
        bare = Announcement(self.parts.identity.public_key, spoken.ref, spoken.steps, spoken.tokens)
        await self._inbox.put(Own(bare.signed(slot, self.parts.identity.sign)))

    # -- payloads -----------------------------------------------------------------------------------------------------

    def _fetch(self, announcement: Announcement) -> None:
        ref = announcement.payload
        assert ref is not None
        if ref.digest not in self._fetching:
            task = self._spawn(self._get_payload(announcement, ref), f"fetch {ref.short}")
            self._fetching[ref.digest] = task

    async def _get_payload(self, announcement: Announcement, ref: BlobRef) -> None:
        peer, round_index = announcement.peer_id, self._round
        while self.store.blob(ref.digest) is None:
            members = self.parts.peers.members
            try:
                await self.parts.exchange.fetch(ref, origin=peer, peers=members, deadline_s=SNAPSHOT_S)
            except TimeoutError:
                machine = self.machine
                if machine is None or machine.certificate is None:
                    continue
                if any(item.payload == ref for item in machine.missing(machine.certificate.manifest)):
                    self._lost.set()  # the round is long over for others: they may have dropped its payloads
                return
        held = self.store.blob(ref.digest)
        if held is None:
            raise LocalError(f"a fetched payload is not on disk: {ref.short}")
        self.parts.exchange.offer(held)
        try:
            offer = await self._in_thread(self._check_payload, held, round_index, peer)
        except PeerError as error:
            self.parts.audit.refused(peer.short, f"payload {ref.short}: {error.why}", round_index=round_index)
            await self._inbox.put(Refused(ref.digest, error.why))
            return
        if offer is not None and offer.digest not in self._further and self.store.blob(offer.digest) is None:
            self._further[offer.digest] = task = self._spawn(self._get_further(offer, peer), f"fetch {offer.short}")
            task.add_done_callback(lambda done: self._further.pop(offer.digest, None))
        self.parts.audit.arrived(peer, ref)
        await self._inbox.put(Held(ref.digest))

    def _check_payload(self, held: FileSource, round_index: int, peer: PeerId) -> BlobRef | None:
        """What a sound payload offers besides. For a thread: it may be large. Raises PeerError for others."""
        payload = bytes(held.map())
        self.anchor.check(payload, round_index, peer)
        return self.anchor.offered(payload)

    async def _get_further(self, ref: BlobRef, origin: PeerId | None) -> None:
        """What a payload offers besides: nobody waits for it as long as no manifest takes it. An offer nobody has any
        more is given up; one that a manifest took (no origin) raises TimeoutError then."""
        members = self.parts.peers.members
        try:
            source = await self.parts.exchange.fetch(ref, origin=origin, peers=members, deadline_s=SNAPSHOT_S)
        except (TimeoutError, FileNotFoundError):
            if origin is None:
                raise
            return  # it was withdrawn; if it still stands, the next round's accounts offer it again
        await self._in_thread(self.sync.keep, source)
        self.parts.exchange.offer(source)

    # -- the state ----------------------------------------------------------------------------------------------------

    async def _try_out(self, manifest: Manifest) -> None:
        async with self._trying:
            if self.machine is None or self.machine.staging != manifest.digest:
                return
            if self._snapshot is not None:
                await self._snapshot
            payloads = await self._in_thread(read_payloads, self.store, manifest)
            taken = await self._in_thread(self.anchor.taken, manifest, payloads)
            if taken is not None and self.store.blob(taken.digest) is None:
                try:
                    await self._get_further(taken, None)
                except TimeoutError:
                    self._lost.set()  # most have it, but they do not give it: reach the tip in another way
                    return
            trial = await self._in_thread(self.anchor.try_out, manifest, payloads)
            await self._inbox.put(Staged(manifest.digest, trial.ref.digest))

    async def _apply(self, certificate: Certificate) -> None:
        manifest = certificate.manifest
        data, announced = certificate.canonical_bytes, self.local.announced
        await self._in_thread(self.store.end_round, manifest.round_index, data, announced)
        trial = self.anchor.commit(manifest.digest)
        if self.mixer is not None:
            trial = self.mixer.after(manifest, trial)
        counted = self.local.judge(manifest, trial.verdicts)
        self.parts.audit.certified(certificate, trial, counted=counted)
        self._forget_fetches()
        if manifest.round_index % self.genesis.snapshot_rounds == 0 or manifest.trained == self.genesis.rounds:
            self._snapshot = self._spawn(self._take_snapshot(manifest.round_index), "snapshot")
        self._save_if_due()

    def _save_if_due(self) -> None:
        if self.local.wants_saving(self.clock.now_s()):
            self._spawn(self._in_thread(self.local.save), "save own state")

    def _forget_fetches(self) -> None:
        for task in self._fetching.values():
            task.cancel()
        self._fetching.clear()

    async def _take_snapshot(self, round_index: int) -> None:
        theta, buffers = self.anchor.theta_d, self.anchor.buffers
        await self._in_thread(self.store.write_snapshot, round_index, theta, buffers)
        source = self.store.snapshot_source(round_index)
        assert source is not None
        self.parts.exchange.offer(source)
        self._served.append(source.ref.digest)
        oldest = self._served.popleft() if len(self._served) > SNAPSHOTS_SERVED else None
        if oldest is not None and oldest not in self._served:  # void rounds end in the same state, and its digest
            self.parts.exchange.forget(oldest)
        announced = self.machine.attendance.announcements if self.machine is not None else {}
        in_use = {item.payload.digest for item in announced.values() if item.payload}
        for digest in await self._in_thread(self.sync.prune, in_use):
            self.parts.exchange.forget(digest)

    async def _heal(self, certificate: Certificate) -> None:
        """My trial differs from what a quorum signed: recompute it from disk, or fetch it; if it differs again, stop"""
        index = certificate.manifest.round_index
        self.parts.audit.note("my state differs from the certified one; healing", round_index=index)
        async with self._trying:
            if self.machine is None or self.machine.certificate != certificate:
                return
            try:
                await self._in_thread(self.sync.reload, index - 1)
            except PeerError as error:
                self.parts.audit.note(f"cannot recompute it here, fetching it: {error.why}", round_index=index)
                self._lost.set()
                return
            manifest = certificate.manifest
            trial = await self._in_thread(lambda: self.anchor.try_out(manifest, read_payloads(self.store, manifest)))
            if trial.ref.digest != certificate.state_digest:
                raise LocalError(
                    f"round {index}: this machine computes state {trial.ref.short}, the swarm certified "
                    f"{certificate.state_digest.hex()[:8]}, twice; its arithmetic or its disk is not sound"
                )
            await self._inbox.put(Staged(manifest.digest, trial.ref.digest))

    async def _catch_up(self, peer: PeerId, machine: RoundMachine) -> None:
        if await self.pursuit.chase(peer, machine):
            self._feed(machine)
        elif self.pursuit.hopeless:
            self._lost.set()

    def _feed(self, machine: RoundMachine) -> None:
        """Give the machine the certificate of its round, if it was fetched."""
        certificate = self.pursuit.due(machine.round_index)
        if certificate is not None:
            manifest, key = certificate.manifest, self.parts.identity.public_key
            statement = Certified(certificate)
            message = Message(self.me, key, manifest.run_id, manifest.round_index, manifest.parent, statement)
            self._give(Heard(message))

    # -- small things -------------------------------------------------------------------------------------------------

    @property
    def _round(self) -> int:
        return self.machine.round_index if self.machine is not None else self.anchor.round_index

    def _audience(self) -> list[PeerId]:
        """Who should hear what this member says: the round's members, and those who ask to become some."""
        machine = self.machine
        assert machine is not None
        audience = ({*machine.parent.member_of} | {*machine.attendance.joins}) - {self.me}
        return sorted(audience, key=lambda peer: peer.digest)

    def _phase(self) -> LocalPhase:
        parts = self.parts
        return LocalPhase(parts.genesis, parts.store, parts.anchor, parts.clock, parts.mailbox, parts.audit, self.me)

    def _envelope(self, slot: Slot, statement: Statement) -> bytes:
        return encode_message(self.parts.identity, slot.run_id, slot.round_index, slot.parent, statement)

    def _give(self, event: Event) -> None:
        self._spawn(self._inbox.put(event), type(event).__name__)

    def in_loop(self, what: Callable[[], None]) -> None:
        """From a thread: have the loop do this soon."""
        assert self._failed is not None
        self._failed.get_loop().call_soon_threadsafe(what)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A task of this node: awaited or cancelled at the end; an error in it ends the node."""
        task = asyncio.create_task(work, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, FarflungError):
                log.debug("task %s: %s", task.get_name(), error)
            if self._failed is not None and not self._failed.done():
                self._failed.set_exception(error)
