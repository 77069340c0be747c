"""One member's machine: its disk, and a real node on it that is started, killed and started again."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from farflung import __version__
from farflung.node.anchor import Trial
from farflung.node.answers import Answers
from farflung.node.assembly import Surroundings, assemble, make_anchor
from farflung.node.audit import Audit
from farflung.node.data import RoundView, seed_of
from farflung.node.durable import create_secret
from farflung.node.mailbox import LocalResult
from farflung.node.peers import Peers
from farflung.node.recordbook import RecordBook
from farflung.node.shell import Node
from farflung.node.store import Home, open_home
from farflung.protocol.blob import BlobRef
from farflung.protocol.certificate import Certificate
from farflung.protocol.identity import PeerId
from farflung.protocol.record import PeerRecord
from farflung.sim.clock import SimClock
from farflung.sim.directory import SimDirectory
from farflung.sim.population import MemberSpec
from farflung.sim.trainee import NoticeBox, Trainee
from farflung.sim.transport import SimTransport
from farflung.sim.workers import Costs, Disk, Workers

if TYPE_CHECKING:
    from farflung.sim.world import World

LEAVE_S = 8.0
"""How long a user waits for a polite leave."""

SECRET = b"sixteen bytes or more, for everybody in this world"


def memory_disk() -> str | None:
    """A folder in memory where there is one: nodes write what they keep, and nobody reads it after the run."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and os.access(shared, os.W_OK) else None


def identity_seed(seed: int, index: int) -> bytes:
    """A member's private key: the same in every process."""
    return seed_of("simulator", seed, "identity", index).to_bytes(16, "little") * 2


@dataclass(eq=False)
class Times:
    """When things happened to one member in one round, in seconds; NaN-free: what did not happen is None."""

    adopted_s: float | None = None
    trained_s: float | None = None
    spoke_s: float | None = None
    applied_s: float | None = None
    arrived_s: dict[PeerId, float] = field(default_factory=dict)
    loss: float | None = None
    counted: bool = False
    train_s: float = 0.0


class SimAudit(Audit):
    """The real audit; it also tells the world when."""

    life: Life

    def spoke(self, result: LocalResult, ref: BlobRef | None) -> None:
        """See `Audit`."""
        super().spoke(result, ref)
        if ref is not None and self.life.node is not None and self.life.node.mixer is not None:
            self.life.world.channels.charge_plainly(ref.digest)  # an account, whatever the model
        times = self.life.times(result.round_index)
        times.spoke_s, times.loss = self.clock.now_s(), result.loss

    def arrived(self, peer: PeerId, ref: BlobRef) -> None:
        """See `Audit`."""
        super().arrived(peer, ref)
        machine = self.life.node.machine if self.life.node is not None else None
        if machine is not None:
            self.life.times(machine.round_index).arrived_s.setdefault(peer, self.clock.now_s())

    def certified(self, certificate: Certificate, trial: Trial, *, counted: bool) -> None:
        """See `Audit`."""
        super().certified(certificate, trial, counted=counted)
        times = self.life.times(certificate.manifest.round_index)
        times.applied_s, times.counted = self.clock.now_s(), counted
        self.life.world.on_certified(self.life, certificate, trial)

    def refused(self, peer: str, why: str, *, round_index: int) -> None:
        """See `Audit`."""
        super().refused(peer, why, round_index=round_index)
        self.life.world.on_refused(self.life, peer, why)


class Life:
    """A member over the whole world: on or off, with what it has on disk."""

    def __init__(self, world: World, spec: MemberSpec, costs: Costs, step_s: Callable[[float], float]) -> None:
        self.world, self.spec, self.index = world, spec, spec.index
        self.clock = SimClock(world.loop, spec.clock_skew_s)
        self.disk = Disk(spec.fsync_s, spec.disk_bytes_per_s)
        self._costs, self._step_s = costs, step_s
        self.lives = 0
        self.folder = world.folder / f"member-{self.index}"
        self.node: Node | None = None
        self.trainee: Trainee | None = None
        self.change: Callable[[Life, LocalResult], LocalResult] | None = None
        self.encode: Callable[[bytes, int], bytes] | None = None
        """An attacker's: (payload, round) -> what is sent instead."""

        self.train_on: Callable[[Any], Any] | None = None
        """An attacker's: the task that it trains on instead."""

        self.before_speaking: Callable[[Life, LocalResult], Awaitable[None]] | None = None
        self.on_open: Callable[[Node], None] | None = None
        """Called with every new node of this member."""

        self._tasks: list[asyncio.Task[None]] = []
        self._stopping: asyncio.Event | None = None
        self._again = False
        self.wanted = False
        """Whether its session says that it should be on."""

        self.held: dict[int, None] = {}
        """Faults that keep it off meanwhile."""

        self.ailments: dict[int, tuple[str, float]] = {}
        """Faults that make it slower or wrong meanwhile: kind and factor."""

        self.finished = False
        """A life of it has seen the run's end."""

        self.gone = False
        """It will not come back."""

        self.history: dict[int, Times] = {}
        self.train_s = self.online_s = 0.0
        self._on_since_s: float | None = None
        self.bytes = [0, 0]
        """Sent and received in earlier lives."""

        self.steps = self.tokens = 0
        create = world.folder / f"member-{self.index}"
        create.mkdir(parents=True)
        create_secret(create / "identity.key", identity_seed(world.seed, self.index))
        self.identity = open_home(create).identity

    @property
    def on(self) -> bool:
        """Whether its process runs."""
        return bool(self._tasks)

    @property
    def peer_id(self) -> PeerId:
        """Who it is."""
        return self.identity.peer_id

    def times(self, round_index: int) -> Times:
        """Of one round."""
        return self.history.setdefault(round_index, Times())

    # -- on and off ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin a life: from what is on disk, like the real thing. While the one before ends: as soon as it has."""
        if self._stopping is not None:
            self._again = True
        if self.on or self.gone or self._stopping is not None:
            return
        self.lives += 1
        self._on_since_s = self.clock.now_s()
        self.world.log.member(self.world.loop.now_ns, self.index, "starts")
        self._tasks = [self.world.loop.create_task(self._live(), name=f"life {self.index}")]

    def resume(self) -> None:
        """Start if the session wants it and no fault keeps it off."""
        if self.wanted and not self.held:
            self.start()

    async def crash(self) -> None:
        """kill -9: the disk is what was written, and peers hear of it only from connections that are reset."""
        if not self.on:
            await self._stop()
            return
        self.world.log.member(self.world.loop.now_ns, self.index, "crashes")
        after = self.world.folder / f"member-{self.index}.{self.lives}"
        shutil.copytree(self.folder, after)
        old, self.folder = self.folder, after
        self.world.channels.machines[self.index].die()
        await self._stop()
        shutil.rmtree(old)

    async def leave(self) -> None:
        """Leave politely; returns when it is released, or after as long as a user would wait."""
        number = self.lives
        if self.on and self.node is not None:
            self.world.log.member(self.world.loop.now_ns, self.index, "leaves")
            self.node.leave()
            await asyncio.wait([self._tasks[0]], timeout=LEAVE_S)
        if self.lives == number:  # or somebody else has ended that life meanwhile, and begun another
            await self._stop()

    async def _stop(self) -> None:
        """End this life, whatever it is doing; returns when nothing of it is left."""
        if self._stopping is not None:
            await self._stopping.wait()
            return
        self._stopping = ended = asyncio.Event()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self.world.channels.machines[self.index].silence()
        self._account()
        self.node = self.trainee = None
        self._stopping = None
        ended.set()
        self.world.changed()
        if self._again:
            self._again = False
            self.start()

    def _account(self) -> None:
        """Add this life's sums to the member's."""
        if self._on_since_s is None:
            return
        self.online_s += self.clock.now_s() - self._on_since_s
        self._on_since_s = None
        if self.node is not None:
            self.bytes = [*self._real_traffic()]
            self.steps += self.node.parts.audit.steps
            self.tokens += self.node.parts.audit.tokens
        if self.trainee is not None:
            self.train_s += self.trainee.train_s

    def traffic(self) -> tuple[int, int]:
        """Bytes of messages sent and received in all lives so far; bulk as that of the model that is charged."""
        (sent, received), machine = self._real_traffic(), self.world.channels.machines[self.index]
        return sent + machine.charged_sent, received + machine.charged_received

    def _real_traffic(self) -> tuple[int, int]:
        sent, received = self.bytes
        if self.node is not None:
            sent += self.node.parts.transport.bytes_sent
            received += self.node.parts.transport.bytes_received
        return sent, received

    # -- one life -----------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        training: asyncio.Task[None] | None = None
        try:
            async with AsyncExitStack() as stack:
                task, model = self.world.task, self.world.task.build_model()
                task = self.train_on(task) if self.train_on is not None else task
                box = NoticeBox()
                node = await self._open(stack, model, box)
                self.node = node
                if self.on_open is not None:
                    self.on_open(node)
                self.trainee = self._make_trainee(node, box, task, model)
                training = self.world.loop.create_task(self._train(), name=f"training {self.index}")
                self._tasks.append(training)
                await node.run()
                box.post_stop()
                await training
            self.finished = True
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.world.on_failure(self, error)
        finally:
            if training is not None and not training.done():
                training.cancel()
                await asyncio.wait([training])

    async def _train(self) -> None:
        assert self.trainee is not None
        try:
            await self.trainee.run()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.world.on_failure(self, error)
            return
        if self.trainee.learner.finished:
            self.world.on_finished(self)

    def _make_trainee(self, node: Node, box: NoticeBox, task: Any, model: nn.Module) -> Trainee:
        change, before = self.change, self.before_speaking
        return Trainee(
            node,
            box,
            task,
            model,
            self.clock,
            seed=seed_of("simulator", self.world.seed, "training", self.index, self.lives) % (1 << 63),
            step_s=self._step_s,
            change=None if change is None else lambda result: change(self, result),
            before=None if before is None else lambda result: before(self, result),
            data=seed_of("simulator", self.world.seed, "data").to_bytes(16, "little"),
            adopted=self._adopted,
            over=self._over,
        )

    def _adopted(self, view: RoundView) -> None:
        self.times(view.round_index).adopted_s = self.clock.now_s()
        self.world.on_adopted(self, view)

    def _over(self, result: LocalResult) -> None:
        times = self.times(result.round_index)
        times.trained_s, times.train_s = self.clock.now_s(), result.train_s

    async def _open(self, stack: AsyncExitStack, model: nn.Module, box: NoticeBox) -> Node:
        world, run_id = self.world, self.world.genesis.run_id
        home = Home(self.folder)
        store = stack.enter_context(home.run(run_id))
        store.write_genesis(world.genesis.canonical_bytes)
        workers = Workers(world.desk, self.disk, self._costs, world.loop.time)
        book = RecordBook(run_id)
        answers = Answers(book, store, home.identity.peer_id, self.clock)
        transport = SimTransport(run_id, world.channels, self.index, self.clock, reachable=self.spec.reachable)
        await transport.start(answers)
        stack.push_async_callback(transport.stop)
        directory = SimDirectory(world.registry, self.index, book, self.clock)
        await directory.start()
        stack.push_async_callback(directory.stop)
        peers = Peers(home.identity, book, directory, self.clock, self._record_of(transport), store.save_peers)
        await peers.start()
        stack.push_async_callback(peers.stop)
        anchor = make_anchor(world.genesis, model)
        workers.charge_for(anchor)
        if self.encode is not None:
            anchor.codec = anchor.codec._replace(encode=_other_payload(anchor.codec.encode, self.encode))
        audit = SimAudit(home.identity.peer_id, self.clock, transport, store.rounds.append)
        audit.life = self
        around = Surroundings(
            home.identity,
            SECRET,
            store,
            transport,
            peers,
            answers,
            self.clock,
            box,
            workers,
            lambda work: world.loop.run_in_executor(workers, work),
        )
        return assemble(stack, around, world.genesis, anchor, invite="", audit=audit)

    def _record_of(self, transport: SimTransport) -> Callable[[int, int], PeerRecord]:
        def make(issued_ms: int, lease_ms: int) -> PeerRecord:
            return PeerRecord(
                run_id=self.world.genesis.run_id,
                public_key=self.identity.public_key,
                addresses=transport.addresses,
                certificate_der=b"",
                issued_ms=issued_ms,
                lease_ms=lease_ms,
                name=self.spec.name,
                version=__version__,
            )

        return make


def _other_payload(
    encode: Callable[..., tuple[bytes, Any]], change: Callable[[bytes, int], bytes]
) -> Callable[..., Any]:
    def lie(update_d: torch.Tensor, private: Any, shared: Any, round_index: int) -> tuple[bytes, Any]:
        payload, private = encode(update_d, private, shared, round_index)
        return change(payload, round_index), private

    return lie
