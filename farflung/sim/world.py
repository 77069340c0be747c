"""A world: members with real nodes, one virtual clock, one fluid network, one seed.

    world = World(genesis, theta_d, task, population, seed=0, folder=...)
    world.run(until=lambda: world.certified >= 20)

Training, exploration and calibration are this with different members, faults and ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from farflung.node.anchor import Trial
from farflung.node.data import RoundView
from farflung.node.store import Home
from farflung.node.tasks.task import Task
from farflung.protocol.certificate import Certificate, certify_first
from farflung.protocol.errors import LocalError, PeerError, TooFewPeers
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import Identity
from farflung.sim.directory import Registry
from farflung.sim.eventlog import EventLog
from farflung.sim.fabric import Fabric
from farflung.sim.life import Life
from farflung.sim.loop import VirtualLoop, run_virtual
from farflung.sim.machine import Channels
from farflung.sim.network.topology import Topology
from farflung.sim.rng import stream
from farflung.sim.signatures import remembered_signatures
from farflung.sim.stand_in import stands_in
from farflung.sim.workers import Desk

AGAIN_S = 5.0
"""After so long a member that found nobody tries again."""

LOOK_S = 60.0
"""The condition to run on is looked at this often, whatever happens."""


@contextmanager
def _quiet_nodes() -> Iterator[None]:
    """What nodes warn of is in the event log and the results; forty of them would fill the screen."""
    logger = logging.getLogger("farflung")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


Genesis0 = tuple[Genesis, torch.Tensor, dict[str, torch.Tensor]]
"""A run's beginning: genesis, θ₀, and the outer buffers' first values."""


class World:
    """See the module. `scale`: how many bytes a bulk byte stands for."""

    def __init__(
        self,
        begin: Callable[[Identity], Genesis0],
        task: Task,
        topology: Topology,
        *,
        seed: int,
        folder: Path,
        log: EventLog | None = None,
        message_loss: float = 0.0,
        scale: float = 1.0,
        limit_s: float = 1e9,
    ) -> None:
        self._begin, self.task, self.seed, self.folder = begin, task, seed, folder
        self.limit_s, self._scale = limit_s, scale
        self.loop = VirtualLoop()
        self.log = log if log is not None else EventLog()
        self.desk = Desk()
        self.fabric = Fabric(self.loop, topology, self.log)
        self.channels = Channels(self.fabric, message_loss=message_loss, rng=stream(seed, "message loss"), scale=scale)
        self.registry = Registry(self.fabric)
        self.lives: list[Life] = []
        self.genesis: Genesis
        self.certificates: dict[int, Certificate] = {}
        """By round, from whoever applied it first."""

        self.certified = 0
        """The latest round that anybody applied."""

        self.applied_s: dict[int, list[float]] = {}
        self.failures: list[tuple[int, BaseException]] = []
        self.refusals = 0
        self.watchers: list[Callable[[Life, Certificate, Trial], None]] = []
        self.adopters: list[Callable[[Life, RoundView], None]] = []
        """Told when a member trains on, or ends its run, with other parameters."""

        self._change = asyncio.Event()
        self._scripts: list[Coroutine[Any, Any, None]] = []
        self._late: list[asyncio.Task[None]] = []
        self._running: list[asyncio.Task[None]] = []

    # -- building -----------------------------------------------------------------------------------------------------

    def found(self, founder: Life) -> None:
        """Write genesis, certificate 0 and the first snapshot to the founder's disk."""
        with stands_in(self._scale):  # a state's digest depends on how it is cut
            self.genesis, theta_d, buffers = self._begin(founder.identity)
        with Home(founder.folder).run(self.genesis.run_id) as store:
            store.write_genesis(self.genesis.canonical_bytes)
            store.append_certificate(0, certify_first(self.genesis, founder.identity.sign).canonical_bytes)
            with stands_in(self._scale):
                store.write_snapshot(0, theta_d, buffers)

    def script(self, work: Coroutine[Any, Any, None]) -> None:
        """Something that happens while the world runs: sessions, faults."""
        self._scripts.append(work)

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, until: Callable[[], bool]) -> bool:
        """Until the condition holds (looked at when anything was certified, finished or failed), or the limit.

        Returns whether it holds. Raises the first failure of a member that is not an attacker's doing.
        """
        with self.desk.open(), stands_in(self._scale), remembered_signatures(), _quiet_nodes():
            return run_virtual(self._main(until), self.loop)

    async def _main(self, until: Callable[[], bool]) -> bool:
        scripts = [self._spawn(work, f"script {number}") for number, work in enumerate(self._scripts)]
        self._running = scripts
        try:
            try:
                async with asyncio.timeout_at(self.limit_s):
                    while not until():
                        self._change.clear()
                        with suppress(TimeoutError):
                            async with asyncio.timeout(LOOK_S):
                                await self._change.wait()
                        self._raise_failures()
                return True
            except TimeoutError:
                return until()
        finally:
            for script in scripts:
                script.cancel()
            for task in [*scripts, *self._late]:
                await asyncio.wait([task])
            for life in self.lives:
                life.gone = True
                await life._stop()
            self._raise_failures()

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Something that a member does to itself; awaited at the end."""
        self._late.append(self._spawn(work, f"later {len(self._late)}"))

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A task whose error ends the run."""
        task = self.loop.create_task(work, name=name)
        task.add_done_callback(self._note_error)
        return task

    def _note_error(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures.append((-1, error))
            self._change.set()

    @property
    def is_quiet(self) -> bool:
        """Whether no session and no fault is still to come."""
        return all(script.done() for script in self._running)

    def changed(self) -> None:
        """Look at the condition again."""
        self._change.set()

    def _raise_failures(self) -> None:
        for index, error in self.failures:
            if index < 0:  # no member's: what was to happen to the world cannot
                raise error
            raise LocalError(f"member {index} failed at {self.loop.time():.3f} s: {error!r}") from error

    # -- what members tell --------------------------------------------------------------------------------------------

    def on_certified(self, life: Life, certificate: Certificate, trial: Trial) -> None:
        """A member applied a round."""
        index = certificate.manifest.round_index
        known = self.certificates.setdefault(index, certificate)
        if known.manifest.digest != certificate.manifest.digest or known.state_digest != certificate.state_digest:
            self.failures.append((life.index, LocalError(f"two certificates for round {index}")))
        self.log.member(self.loop.now_ns, life.index, "applies", f"{index} {certificate.state_digest.hex()[:16]}")
        self.applied_s.setdefault(index, []).append(self.loop.time())
        self.certified = max(self.certified, index)
        for watcher in self.watchers:
            watcher(life, certificate, trial)
        self._change.set()

    def on_adopted(self, life: Life, view: RoundView) -> None:
        """A member took a new anchor."""
        self.log.member(self.loop.now_ns, life.index, "adopts", str(view.round_index))
        for adopter in self.adopters:
            adopter(life, view)

    def on_refused(self, life: Life, peer: str, why: str) -> None:
        """A member did not believe something."""
        self.refusals += 1
        self.log.member(self.loop.now_ns, life.index, "refuses", f"{peer} {why}")

    def on_finished(self, life: Life) -> None:
        """A member's run is over."""
        self.log.member(self.loop.now_ns, life.index, "finishes")
        self._change.set()

    def on_failure(self, life: Life, error: BaseException) -> None:
        """A member's node or training ended badly."""
        self.log.member(self.loop.now_ns, life.index, "fails", type(error).__name__)
        if isinstance(error, TooFewPeers):
            self.later(self._try_again(life, life.lives))
        elif life.spec.attack is None or not isinstance(error, PeerError):
            self.failures.append((life.index, error))
        self._change.set()

    async def _try_again(self, life: Life, number: int) -> None:
        """Nobody was there to join: its user starts it again after a while."""
        await asyncio.sleep(AGAIN_S)
        if life.lives == number and life.on:
            await life._stop()
            life.resume()
