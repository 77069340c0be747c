"""The mixing of one member: carries out what its machine decides, with vectors, messages and the clock.

One task per round works through a queue of notes and arrivals: event in, effects out, carried out in order. What takes
long is done in threads, one thing at a time; vectors are fetched beside it. When the machine is over, the account is
written and the outer step taken; the machine stays to answer partners who are not so far until the next round begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from farflung.aggregation.pairs import Radius
from farflung.node.anchor import Trial
from farflung.node.blobs import BlobExchange
from farflung.node.mixing_report import describe_mass, describe_round, why_mixing
from farflung.node.mixing_round import MixingRound, begin_round
from farflung.node.reference import ReferenceAnchor, Roll
from farflung.node.replica import Replica
from farflung.node.runtime import Clock, Transport
from farflung.protocol.blob import BlobRef, blob_digest, chunk_digest
from farflung.protocol.errors import PeerError
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import PeerId
from farflung.protocol.ledger.effects import Credit
from farflung.protocol.manifest import Manifest
from farflung.protocol.mixing.account import Account
from farflung.protocol.mixing.clockwork import Patience
from farflung.protocol.mixing.meetings import Meet
from farflung.protocol.mixing.notes import Absent, Note
from farflung.protocol.mixing.push_sum import Close, Effect, Get, Move, Split, Stage, Tell
from farflung.protocol.record import PeerRecord
from farflung.protocol.statements import Slot
from farflung.protocol.wire import Message

log = logging.getLogger(__name__)

QUEUE_MAX = 512
"""Notes of one partner waiting for the round's machine: its parts of every tick; it repeats what is dropped."""

EARLY_MAX = 512
"""Notes kept of one member about a round whose certificate is not here yet: its parts of every tick."""

IDLE_S = 10.0
"""How long a partner may send nothing of a vector."""

TRIES = 3
"""To fetch a vector at once; after that its sender's next reminder starts again."""


@dataclass
class Ways:
    """What a mixer is given by its node."""

    me: PeerId
    genesis: Genesis
    anchor: ReferenceAnchor
    replica: Replica
    exchange: BlobExchange
    transport: Transport
    clock: Clock
    record_of: Callable[[PeerId], PeerRecord | None]
    heard: Callable[[PeerId], float | None]
    tell: Callable[[PeerId, str, Slot, Note], None]
    spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
    in_thread: Callable[..., Awaitable[Any]]
    in_loop: Callable[[Callable[[], None]], None]
    """From a thread: have the loop do this soon."""
    over: Callable[[], None]
    """Called when a round's mixing has ended and the replica stands where training goes on."""
    note: Callable[[str], None]


@dataclass
class Mixer:
    """One member's mixing over all rounds."""

    ways: Ways
    patience: Patience = field(init=False)
    account: Account = field(init=False)
    """Of the last mixing; the next announcement carries it."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Of the last mixing, for the log and `farflung status`."""
    busy: bool = False
    """Whether the replica is about to move: training waits."""
    _round: MixingRound | None = None
    _queue: asyncio.Queue[Callable[[float], list[Effect]]] = field(init=False)
    _task: asyncio.Task[None] | None = None
    _fetches: dict[asyncio.Task[None], None] = field(default_factory=dict)
    radii: list[Radius] = field(init=False)
    """Pairs: how far this member lets itself be moved, by fragment; learnt over rounds."""
    _lent: dict[bytes, int] = field(default_factory=dict)
    """Vectors on offer to partners, and to how many: equal shares are equal bytes."""
    _early: dict[int, deque[Message]] = field(default_factory=dict)
    _slot: Slot | None = None
    _serves_until_s: float = -math.inf
    _queued: dict[PeerId, int] = field(default_factory=dict)
    """Notes of each partner that wait for the machine."""
    _complained: dict[tuple[PeerId, int], None] = field(default_factory=dict)
    """(peer, round) of whom something was said already."""
    _vectors: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.patience = Patience.of(self.ways.genesis)
        self.account = Account(self.ways.me, 0, why="has not mixed yet")
        self._queue = asyncio.Queue()
        mixing = self.ways.genesis.mixing
        self.radii = [Radius(mixing.radius_percent / 100) for _ in range(mixing.fragments)]

    # -- from the node ------------------------------------------------------------------------------------------------

    def begin(self, manifest: Manifest) -> None:
        """A certificate was applied: mix with whom it lists. Without this member on the list nothing happens.

        `anchor.roll` is this certificate's. Should this member still mix after the one before, others have gone on
        without it: it ends that mixing, which partners may be waiting for, and has missed this round.
        """
        ways, roll = self.ways, self.ways.anchor.roll
        assert roll is not None
        if self._task is not None:
            self._queue.put_nowait(self._hurry)
            return
        self._slot = manifest.slot
        early = self._early.pop(manifest.round_index, deque())
        self._early = {index: notes for index, notes in self._early.items() if index > manifest.round_index}
        self._end_round()
        if ways.me not in roll.members or not any(roll.mass):
            ways.replica.stay(manifest.round_index)
            if not any(roll.mass):  # nobody did a step: nobody has missed anything
                ways.replica.trained += manifest.trained - ways.anchor.trained_before
            return
        if ways.replica.phi_round != manifest.round_index:  # announced by the process before this one
            self.sit_out(manifest)
            ways.replica.stay(manifest.round_index)
            return
        self.busy = True
        self._queue, self._queued = asyncio.Queue(), {}
        for message in early:
            self.hear(message)
        self._task = ways.spawn(self._run(manifest, roll, ways.anchor.theta_d), f"mix {manifest.round_index}")

    def after(self, manifest: Manifest, trial: Trial) -> Trial:
        """A certificate was applied: require that all mass was there, then mix; the trial with this mixer's numbers.

        Raises LocalError if this member's books do not fit others'.
        """
        audited = self.ways.anchor.audited
        if audited is not None:
            for item in audited.discrepancies:
                names = ", ".join(peer.short for peer in item.members)
                self.ways.note(f"mass is not conserved: {names}: {item.why[:200]}")
            audited.require(self.ways.me)
        mine = {f"mix_{name}": value for name, value in self.numbers.items()}
        self.begin(manifest)
        return trial._replace(numbers=trial.numbers | mine)

    def sit_out(self, manifest: Manifest) -> None:
        """This process came up after the announcement: φ is gone, so whoever waits for this member is told not to."""
        self._slot = manifest.slot
        self.account = Account(self.ways.me, 0, why="started after its announcement")

    def hear(self, message: Message) -> None:
        """A partner's note; what is of a round to come is kept."""
        note, slot = message.statement, self._slot
        assert isinstance(note, Note)
        current = slot.round_index if slot is not None else -1
        if message.round_index > current:
            early = self._early.setdefault(message.round_index, deque())
            if sum(kept.sender == message.sender for kept in early) < EARLY_MAX:
                early.append(message)
            if len(self._early) > 2:
                del self._early[max(self._early)]
            return
        if slot is None or (message.round_index, message.parent) != (slot.round_index, slot.parent):
            return  # of a round that is over here and there
        if self._task is not None or (self.busy and self._round is None):
            if self._queued.get(message.sender, 0) < QUEUE_MAX:
                self._queued[message.sender] = self._queued.get(message.sender, 0) + 1
                self._queue.put_nowait(lambda now_s: self._machine_hears(message.sender, note, now_s))
        elif self._round is not None:
            self._answer(message.sender, note)
        else:
            self._decline(message.sender, note, slot)

    def serves(self, now_s: float) -> bool:
        """Whether partners may still count on this member: it mixes, or its partner of a pair may not have fetched."""
        return self.busy or now_s < self._serves_until_s

    async def stop(self) -> None:
        """End what runs; the replica stays as it is."""
        tasks = [task for task in (self._task, *self._fetches) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task, self.busy = None, False
        self._end_round()

    @property
    def why(self) -> str:
        """What the mixing waits for, and for whom; nothing while there is none."""
        if not self.busy:
            return ""
        return why_mixing(self._round) if self._round is not None else "about to mix"

    def status(self) -> dict[str, Any]:
        """For `farflung status`: where the mixing is, and whether mass was conserved in the last one audited."""
        replica, audited = self.ways.replica, self.ways.anchor.audited
        live = {} if self._round is None else describe_round(self._round)
        return {"mass": describe_mass(audited), "last": self.numbers, "trained": replica.trained, **live}

    def _hurry(self, now_s: float) -> list[Effect]:
        assert self._round is not None
        effects: list[Effect] = self._round.machine.hurry(now_s)
        return effects

    # -- one round ----------------------------------------------------------------------------------------------------

    async def _run(self, manifest: Manifest, roll: Roll, reference_d: Tensor) -> None:
        ways, began_s = self.ways, self.ways.clock.now_s()
        current = self._round = await self._think(lambda: begin_round(self, manifest, roll, reference_d, began_s))
        machine = current.machine
        await self._carry_out(machine.begin(ways.clock.now_s()))
        while machine.stage is not Stage.OVER:
            wait_s = machine.wake_s - ways.clock.now_s()
            try:
                async with asyncio.timeout(None if wait_s == math.inf else max(0.0, wait_s)):
                    step = await self._queue.get()
            except TimeoutError:
                step = machine.tick
            await self._carry_out(step(ways.clock.now_s()))
        trained = manifest.trained
        self.numbers = await self._think(lambda: current.finish(trained))
        self.radii = current.radii(self.radii)
        self.numbers |= {"seconds": ways.clock.now_s() - began_s, "given_up": float(machine.clock.given_up)}
        while not self._queue.empty():  # what came in meanwhile is late; the next round may begin from here on
            self._say_late(self._queue.get_nowait())
        self._task, self.busy = None, False
        if ways.genesis.mode == "pairs":
            self._serves_until_s = ways.clock.now_s() + self.patience.settle_s
        ways.over()

    async def _carry_out(self, effects: list[Any]) -> None:
        current = self._round
        assert current is not None
        for effect in effects:
            match effect:
                case Split(tick):
                    shares = await self._think(partial(current.split, tick))
                    for share in shares.values():
                        if share is not None:
                            self._lend(share[1])
                    posted = {key: None if share is None else current.posted(share) for key, share in shares.items()}
                    await self._carry_out(current.machine.post(tick, posted, self.ways.clock.now_s()))
                case Tell(peer, note):
                    self._tell(peer, note)
                case Get(peer, note):
                    task = self.ways.spawn(self._get(current, peer, note), f"vector from {peer.short}")
                    self._fetches[task] = None
                    task.add_done_callback(lambda done: self._fetches.pop(done, None))
                case Move():
                    await self._think(partial(current.move, effect))
                    if not isinstance(effect.effect, Credit):
                        self._unlend(effect.effect.amount.payload)
                case Meet(peer, note):
                    try:
                        await self._think(partial(current.meet, peer, note))
                    except PeerError as error:
                        self._complain(peer, error)
                case Close():
                    self.account = await self._think(current.account)
                    await self._carry_out(current.machine.closed(self.ways.clock.now_s()))

    async def _think(self, work: Callable[[], Any]) -> Any:
        """In a thread, one thing at a time: vectors are not for two. If cancelled, it first waits for the thread."""
        async with self._vectors:
            task = asyncio.ensure_future(self.ways.in_thread(work))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                await asyncio.gather(task, return_exceptions=True)
                raise

    # -- vectors ------------------------------------------------------------------------------------------------------

    def _lend(self, blob: Any) -> None:
        self.ways.exchange.offer(blob, tell=False)
        self._lent[blob.ref.digest] = self._lent.get(blob.ref.digest, 0) + 1

    def _unlend(self, digest: bytes) -> None:
        """One partner needs this vector no more."""
        self._lent[digest] -= 1
        if not self._lent[digest]:
            del self._lent[digest]
            self.ways.exchange.forget(digest)

    async def _get(self, current: MixingRound, peer: PeerId, note: Note) -> None:
        """Fetch one vector and say what came of it."""
        step = current.machine.missed
        payload = None
        try:
            payload = await self._fetch(current, peer, note)
            await self._think(lambda: current.read(peer, note, payload))
            step = current.machine.arrived
        except (PeerError, TimeoutError, ConnectionError) as error:
            log.debug("no vector from %s: %s", peer.short, error)
            if isinstance(error, PeerError) and payload is not None:  # refusing to give it may have good reasons
                self._complain(peer, error)
        if current is self._round:
            if self._task is not None:
                self._queue.put_nowait(lambda now_s: step(peer, note, now_s))
            else:
                self._say_late(lambda now_s: step(peer, note, now_s))

    async def _fetch(self, current: MixingRound, peer: PeerId, note: Note) -> bytes:
        ref, record = note.payload, self.ways.record_of(peer)
        assert ref is not None
        if ref.size > current.codec.bytes_max(note.fragment):
            raise PeerError(peer.short, f"offers a vector of {ref.size} bytes")
        if record is None:
            raise ConnectionError("its address is not known")
        for _ in range(TRIES - 1):
            with contextlib.suppress(TimeoutError, ConnectionError):
                return await self._chunks(record, ref)
        return await self._chunks(record, ref)

    async def _chunks(self, record: PeerRecord, ref: BlobRef) -> bytes:
        pieces, digests = [], []
        stream = self.ways.transport.fetch(record, ref, tuple(range(ref.chunks)), idle_s=IDLE_S)
        async for _, data in stream:
            pieces.append(data)
            digests.append(chunk_digest(data))
        if blob_digest(ref.size, ref.chunk_bytes, digests) != ref.digest:
            raise PeerError(record.peer_id.short, f"other bytes than those of vector {ref.short}")
        return b"".join(pieces)

    # -- notes --------------------------------------------------------------------------------------------------------

    def _machine_hears(self, peer: PeerId, note: Note, now_s: float) -> list[Effect]:
        assert self._round is not None
        self._queued[peer] = max(0, self._queued.get(peer, 0) - 1)
        try:
            effects: list[Effect] = self._round.machine.hear(peer, note, now_s)
        except PeerError as error:
            self._complain(peer, error)
            return []
        return effects

    def _answer(self, peer: PeerId, note: Note) -> None:
        """The round is over here: say what became of a parcel, or what was offered."""
        self._say_late(lambda now_s: self._machine_hears(peer, note, now_s))

    def _say_late(self, step: Callable[[float], list[Effect]]) -> None:
        """The books are closed: whatever a step would do, only what it says to partners still matters."""
        for effect in step(self.ways.clock.now_s()):
            if isinstance(effect, Tell):
                self._tell(effect.peer, effect.note)

    def _decline(self, peer: PeerId, note: Note, slot: Slot) -> None:
        """This member takes no part in the round: nobody needs to wait for it. What it may have counted before it
        died must not come home as well, so it says nothing of parcels: they lapse with the round."""
        if not isinstance(note.content, Absent):
            self.ways.tell(peer, "absent", slot, Note(note.fragment, note.tick, Absent()))

    def _complain(self, peer: PeerId, error: PeerError) -> None:
        """Say what was wrong with a partner's note or vector, once a round."""
        key = peer, self._slot.round_index if self._slot is not None else 0
        if key not in self._complained:
            self._complained = {known: None for known in self._complained if known[1] == key[1]} | {key: None}
            self.ways.note(f"mixing: {error}")

    def _tell(self, peer: PeerId, note: Note) -> None:
        slot, content = self._slot, note.content
        assert slot is not None
        kind = f"{type(content).__name__} {note.fragment} {note.tick} {getattr(content, 'seq', 0)}"
        self.ways.tell(peer, kind, slot, note)

    def _end_round(self) -> None:
        for task in self._fetches:
            task.cancel()
        for digest in self._lent:
            self.ways.exchange.forget(digest)
        self._lent.clear()
        self._round = None
