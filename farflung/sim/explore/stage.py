"""A world whose real nodes are watched: hooks around each new node tell `Facts` what it says, keeps and hears.

The hooks sit on the node's own doors (its outbox, its journal, its inbox, its codec) and change nothing, except that
messages may be lost, delayed or doubled on their way in, as the schedule says.
"""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from farflung.node.data import RoundView
from farflung.node.entries import decode_entry
from farflung.node.mailbox import LocalResult
from farflung.node.shell import Node
from farflung.protocol.blob import BlobRef, describe
from farflung.protocol.certificate import Certificate, certify_first
from farflung.protocol.errors import PeerError, TooFewPeers
from farflung.protocol.identity import PeerId
from farflung.protocol.rows import Verdict
from farflung.protocol.wire import Message, Proposal, Status, decode_message
from farflung.sim.explore.actions import Delay, Double, Lose, OfMessages, Straggle
from farflung.sim.explore.facts import Adopted, Applied, Draft, Facts, Kept, Step, Word
from farflung.sim.explore.ground import AGAIN_S, LATENCY_S, LINE_BYTES_PER_S, STEP_S, SmallCosts, begin, spec_of
from farflung.sim.explore.mixing_watch import watch_mixing
from farflung.sim.explore.schedule import Schedule
from farflung.sim.explore.tally import TallyTask
from farflung.sim.life import Life
from farflung.sim.network.topology import NodeLinks, Topology
from farflung.sim.rng import stream
from farflung.sim.world import World

_OWNER: contextvars.ContextVar[tuple[int, int]] = contextvars.ContextVar("owner", default=(-1, 0))


class Stage(World):
    """The world of one schedule, not yet started."""

    def __init__(self, schedule: Schedule, folder: Path) -> None:
        links = NodeLinks(LINE_BYTES_PER_S, LINE_BYTES_PER_S)
        topology = Topology((links,) * schedule.members, latency_s=((LATENCY_S,),))
        super().__init__(
            lambda identity: begin(identity, schedule),
            TallyTask(0, lambda: 0),
            topology,
            seed=schedule.seed,
            folder=folder,
        )
        self.schedule, self.over = schedule, False
        self.restarting = 0
        """Members that are down and will be back."""

        self.armed: dict[int, list[Callable[[str], None]]] = {}
        """By member: told of every record it makes durable."""

        self._owners: weakref.WeakKeyDictionary[asyncio.Task[Any], tuple[int, int]] = weakref.WeakKeyDictionary()
        self._plain_task = self.loop.create_task
        setattr(self.loop, "create_task", self._create_task)  # noqa: B010  # the instance's own, for this world only
        lives = [WatchedLife(self, index) for index in range(schedule.members)]
        self.lives += lives
        self.found(lives[0])
        self.first_certificate = certify_first(self.genesis, lives[0].identity.sign)
        self.facts = Facts(schedule, self.genesis, {life.peer_id: life.index for life in lives})
        self.loop.set_exception_handler(self._unheard)
        self.messages = [action for action in schedule.actions if isinstance(action, OfMessages)]
        self._read: dict[bytes, Message] = {}

    def _unheard(self, loop: object, context: dict[str, Any]) -> None:
        """An error that nobody waits for, also one that only shows when a task is thrown away."""
        self.facts.failures.append(f"{context.get('message')}: {context.get('exception')!r}")
        self.over = True
        self.changed()

    # -- whose task is it ---------------------------------------------------------------------------------------------

    def _create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = self._plain_task(coro, **options)
        name, owner = task.get_name(), _OWNER.get()
        before, at, member = name.rpartition(" at ")
        if before and at and member.isdigit():  # a call being answered: it belongs to who answers
            owner = (int(member), self.lives[int(member)].lives)
        self._owners[task] = owner
        return task

    def tasks_of(self, member: int, life: int) -> list[str]:
        """Names of what still runs for a life."""
        owned = [task for task, owner in self._owners.items() if owner == (member, life) and not task.done()]
        return sorted(task.get_name() for task in owned)

    # -- what members tell --------------------------------------------------------------------------------------------

    def on_certified(self, life: Life, certificate: Certificate, trial: Any) -> None:
        """See `World`. Contradictions are for the invariants to find."""
        shares = {peer: float(verdict.share) for peer, verdict in trial.verdicts.items()}
        self.facts.applied.append(Applied(life.index, life.lives, certificate, shares, self.loop.time()))
        super().on_certified(life, certificate, trial)

    def on_failure(self, life: Life, error: BaseException) -> None:
        """A node ended badly. Whoever finds nobody tries again later, as a service manager would let it."""
        self.log.member(self.loop.now_ns, life.index, "fails", type(error).__name__)
        if isinstance(error, TooFewPeers):
            self.restarting += 1
            self.later(self._try_again(life, life.lives))
        else:
            where = f"member {life.index} in life {life.lives} at {self.loop.time():.3f} s"
            self.facts.failures.append(f"{where}: {type(error).__name__}: {error}")
            self.over = True
        self.changed()

    async def _try_again(self, life: Life, number: int) -> None:
        try:
            await asyncio.sleep(AGAIN_S)
            if life.lives == number and life.on:
                await life._stop()
                life.start()
        finally:
            self.restarting -= 1

    def _raise_failures(self) -> None:
        """Members' are facts; an error of the explorer's own scripts is not."""
        for index, error in self.failures:
            if index < 0:
                raise error

    def read(self, envelope: bytes) -> Message:
        """What an envelope says; everybody gets the same bytes, so each is read once. Raises PeerError."""
        message = self._read.get(envelope)
        if message is None:
            message = self._read[envelope] = decode_message(envelope, self.genesis.run_id)
        return message


class WatchedLife(Life):
    """A member whose nodes are watched."""

    def __init__(self, stage: Stage, index: int) -> None:
        schedule = stage.schedule
        pace = stream(schedule.seed, "explore", "pace", index)
        slower = [item for item in schedule.actions if isinstance(item, Straggle) and item.member == index]

        def step_s(now_s: float) -> float:
            factor = float(np.prod([item.factor for item in slower if item.at_s <= now_s < item.end_s]))
            return STEP_S * factor * float(pace.uniform(0.8, 1.2))

        super().__init__(stage, spec_of(schedule, index), SmallCosts(), step_s)
        self.stage = stage
        self.line_slower = 1.0
        """By how much faults have slowed its line."""

        self.on_open = self._watch
        self._ready: dict[PeerId, tuple[int, float]] = {}
        self._beats: dict[tuple[PeerId, int], list[float]] = {}

    async def _live(self) -> None:
        _OWNER.set((self.index, self.lives))
        await super()._live()

    async def _stop(self) -> None:
        if self._stopping is None:
            self.drop_mixed()
        await super()._stop()

    def drop_mixed(self) -> None:
        """Whatever this life has mixed and not yet told is gone."""
        for fact in self.stage.facts.mixed:
            if (fact.member, fact.life, fact.gone_s) == (self.index, self.lives, None):
                fact.gone_s = self.clock.now_s()

    def _make_trainee(self, node: Node, box: Any, task: Any, model: nn.Module) -> Any:
        taken = self.stage.facts.steps.setdefault(self.index, [])

        def next_serial() -> int:
            taken.append(Step(self.lives, self.clock.now_s()))
            return len(taken) - 1

        return super()._make_trainee(node, box, TallyTask(self.index, next_serial), model)

    def _adopted(self, view: RoundView) -> None:
        super()._adopted(view)
        if self.node is None or self.trainee is None:
            return
        held, model = self.node.held, self.trainee._model
        ahead_d = (model.weight.detach() - held.theta_d).numpy().copy()  # type: ignore[operator]
        fact = Adopted(self.index, self.lives, held.round_index, ahead_d, self.clock.now_s())
        self.stage.facts.adopted.append(fact)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _watch(self, node: Node) -> None:
        self._ready, self._beats = {}, {}
        self._watch_words(node)
        self._watch_disk(node)
        self._watch_own(node)
        self._watch_door(node)

    def _watch_words(self, node: Node) -> None:
        put, life, heard = node.outbox.put, self.lives, dict[bytes, None]()

        def watched(peer: PeerId, kind: str, envelope: bytes, *, current: bool = True) -> None:
            if kind != "Status" and envelope not in heard:
                heard[envelope] = None
                message = self.stage.read(envelope)
                slot = _slot(message)
                word = Word(self.index, life, slot, message.statement, self.clock.now_s())
                self.stage.facts.said.append(word)
            put(peer, kind, envelope, current=current)

        setattr(node.outbox, "put", watched)  # noqa: B010

    def _watch_disk(self, node: Node) -> None:
        record, append, life, facts = node.store.journal.record, node.store.append_certificate, self.lives, None
        facts = self.stage.facts

        def recorded(kind: str, data: bytes) -> None:
            record(kind, data)
            value, at_s = decode_entry(kind, data)[1], self.clock.now_s()
            facts.kept.append(Kept(self.index, life, node.store.journal.round_index or 0, kind, value, at_s))
            if isinstance(value, Proposal):
                self._note_draft(node, value)
            self._tell(kind)

        def appended(round_index: int, certificate: bytes) -> None:
            append(round_index, certificate)
            self._tell("certificate")

        setattr(node.store.journal, "record", recorded)  # noqa: B010
        setattr(node.store, "append_certificate", appended)  # noqa: B010

    def _tell(self, kind: str) -> None:
        for tell in [*self.stage.armed.get(self.index, ())]:
            tell(kind)

    def _note_draft(self, node: Node, proposal: Proposal) -> None:
        machine, manifest = node.machine, proposal.manifest
        if machine is None:
            return
        round_index = manifest.round_index
        beats = {peer: tuple(times) for (peer, at), times in self._beats.items() if at == round_index}
        draft = Draft(
            self.index,
            round_index,
            manifest.digest,
            frozenset(item.peer_id for item in manifest.announcements),
            frozenset(machine.attendance.announcements),
            {peer: at_s for peer, (at, at_s) in self._ready.items() if at == round_index},
            beats,
            self.clock.now_s(),
        )
        self.stage.facts.drafts.append(draft)

    def _watch_own(self, node: Node) -> None:
        audit, facts, key = node.parts.audit, self.stage.facts, (self.index, self.lives)
        arrived, spoke = audit.arrived, audit.spoke

        def note_arrival(peer: PeerId, ref: BlobRef) -> None:
            self._ready[peer] = (node._round, self.clock.now_s())
            arrived(peer, ref)

        def note_speech(result: LocalResult, ref: BlobRef | None) -> None:
            if ref is None:
                facts.screened.setdefault(key, self.clock.now_s())
            spoke(result, ref)

        setattr(audit, "arrived", note_arrival)  # noqa: B010
        setattr(audit, "spoke", note_speech)  # noqa: B010
        if node.mixer is None:
            self._watch_codec(node)
        else:
            watch_mixing(self, node)

    def _watch_codec(self, node: Node) -> None:
        codec, facts, key = node.anchor.codec, self.stage.facts, (self.index, self.lives)
        facts.settling[key] = ""

        def encode(update_d: torch.Tensor, private: Any, shared: Any, round_index: int) -> tuple[bytes, Any]:
            payload, private = codec.encode(update_d, private, shared, round_index)
            facts.payloads[describe(payload)[0].digest] = payload
            facts.settling[key] += "e"
            return payload, private

        def observe(private: Any, verdict: Verdict) -> Any:
            facts.settling[key] += "o"
            return codec.observe(private, verdict)

        node.anchor.codec = codec._replace(encode=encode, observe=observe)

    def _watch_door(self, node: Node) -> None:
        receive, loop = node.receive, self.world.loop

        def again(envelope: bytes) -> None:
            if self.node is node and self.on:
                try:
                    receive(envelope)
                except PeerError:
                    return

        def received(envelope: bytes) -> None:
            message = self.stage.read(envelope)
            sender, kind = self.stage.facts.index_of[message.sender], type(message.statement).__name__
            now_s, late_s = self.clock.now_s(), 0.0
            for action in self.stage.messages:
                if not action.meets(sender, self.index, kind, now_s):
                    continue
                if isinstance(action, Lose):
                    return
                if isinstance(action, Delay):
                    late_s = max(late_s, action.by_s)
                if isinstance(action, Double):
                    loop.call_later(action.by_s, again, envelope)
            if late_s > 0:
                loop.call_later(late_s, again, envelope)
                return
            machine = node.machine
            if kind == Status.__name__ and machine is not None and machine.round_index == message.round_index:
                self._beats.setdefault((message.sender, message.round_index), []).append(now_s)
            receive(envelope)

        setattr(node, "receive", received)  # noqa: B010


def _slot(message: Message) -> Any:
    from farflung.protocol.statements import Slot

    return Slot(message.run_id, message.round_index, message.parent)
