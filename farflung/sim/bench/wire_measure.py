"""What members really send: real nodes in the simulator's world for some rounds, every byte counted where it leaves."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from farflung.node.anchor import Trial, genesis_buffers
from farflung.node.run_file import RunFile, make_genesis
from farflung.node.tasks.load import load_task
from farflung.node.transport.calls import Calls
from farflung.protocol.certificate import Certificate
from farflung.protocol.errors import ConfigError, LocalError
from farflung.protocol.genesis import Timing
from farflung.protocol.identity import Identity
from farflung.protocol.mixing.settings import Mixing
from farflung.sim.bench.wire_count import Way
from farflung.sim.draw import Draw
from farflung.sim.life import SECRET, Life, memory_disk
from farflung.sim.population import populate
from farflung.sim.rng import seeded
from farflung.sim.scenario import Members, Model, Network, Scenario
from farflung.sim.world import Genesis0, World

INNER_STEPS = 4
"""The model is a stub: nothing is learnt here."""

LIMIT_S = 7200.0
"""Of virtual time. A world that is not done by then is stuck."""


@dataclass(frozen=True)
class Rehearsal:
    """A small run to measure. Counted are `rounds` trained rounds after the first two, in which members still meet."""

    way: Way
    members: int
    params: int = 1 << 18
    rounds: int = 8
    reference_rounds: int = 4
    """From one reference to the next; divides `rounds`."""
    outer: str = "sgd(lr=1.0)"
    up_mbit: float = 10.0
    down_mbit: float = 100.0
    latency_s: float = 0.02
    local_s: float = 5.0
    """Of a round's training."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.rounds % self.reference_rounds:
            raise ConfigError(f"{self.rounds} rounds are no multiple of {self.reference_rounds}")


class Measured(NamedTuple):
    """Bytes that one member sent in one round, mean over members and rounds; messages, as in `wire_count`."""

    bulk: float
    """Over bulk connections: payloads, references, accounts, and what asking for them takes."""
    control: float
    """Over control connections."""
    round_s: float
    """From certificate to certificate."""

    @property
    def total(self) -> float:
        """All bytes."""
        return self.bulk + self.control


class _Free:
    """Work takes no time: only lines do."""

    def encode_s(self) -> float:
        return 0.0

    def check_s(self) -> float:
        return 0.0

    def apply_s(self, rows: int) -> float:
        return 0.0


class _Mark(NamedTuple):
    """What all members had sent when the first of them applied a round."""

    bulk: int
    control: int
    at_s: float


def measure(what: Rehearsal, *, seed: int = 0) -> Measured:
    """Run it. Takes about 25 ms for each member and round, and 1 ms for each chunk that moves.

    Raises ConfigError for a way that no run can take, LocalError if a node fails or the rounds never end.
    """
    home = Path(tempfile.mkdtemp(prefix="farflung-wire-", dir=memory_disk()))
    try:
        with seeded(seed):
            return _run(what, seed, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _run(what: Rehearsal, seed: int, home: Path) -> Measured:
    file = _run_file(what)
    task = load_task(file.task, file.task_options)

    def begin(founder: Identity) -> Genesis0:
        genesis, theta_d = make_genesis(file, founder.public_key, SECRET)
        return genesis, theta_d, genesis_buffers(genesis)

    population = populate(_scenario(what), seed, task_params=float(what.params), task_tokens=1.0)
    world = World(begin, task, population.topology, seed=seed, folder=home, limit_s=LIMIT_S)
    for spec in population.members:
        world.lives.append(Life(world, spec, _Free(), lambda now_s: what.local_s / INNER_STEPS))
    world.found(world.lives[0])
    marks: dict[int, _Mark] = {}

    def look(life: Life, certificate: Certificate, tried: Trial) -> None:
        trained = certificate.manifest.trained
        if trained not in marks and len(certificate.manifest.payloads) == what.members:
            marks[trained] = _mark(world)

    world.watchers.append(look)
    for life in world.lives:
        life.start()
    first, last = 2, 2 + what.rounds
    if not world.run(lambda: last in marks) or first not in marks:
        raise LocalError(f"{what.members} members did not train {last} rounds together: {sorted(marks)}")
    began, ended, parts = marks[first], marks[last], what.members * what.rounds
    bulk, control = ended.bulk - began.bulk, ended.control - began.control
    return Measured(bulk / parts, control / parts, (ended.at_s - began.at_s) / what.rounds)


def _mark(world: World) -> _Mark:
    bulk = control = 0
    for life in world.lives:
        transport = life.node.parts.transport if life.node is not None else None
        if not isinstance(transport, Calls):
            raise LocalError(f"member {life.index} is off, or its transport counts nothing")
        bulk, control = bulk + transport.traffic.bulk_sent, control + transport.traffic.control_sent
    return _Mark(bulk, control, world.loop.time())


def _run_file(what: Rehearsal) -> RunFile:
    way = what.way
    mixing = None
    if way.mixes:
        every = what.reference_rounds
        mixing = Mixing(graph=way.graph, ticks=way.ticks, fragments=way.fragments, reference_rounds=every)
    ceiling_s = 600.0 + 10 * what.local_s
    return RunFile(
        name="wire",
        task="builtin:stub",
        task_options={"params": what.params},
        codec=way.codec,
        mode=way.mode,
        mixing=mixing,
        outer=what.outer,
        inner_steps=INNER_STEPS,
        start_members=what.members,
        snapshot_rounds=1000,  # nobody joins; nothing of a snapshot travels
        quorum_percent=100,
        timing=Timing(deadline_ceiling_ms=int(1e3 * ceiling_s)),
    )


def _scenario(what: Rehearsal) -> Scenario:
    members = Members(
        count=what.members,
        up_mbit=Draw.fixed(what.up_mbit),
        down_mbit=Draw.fixed(what.down_mbit),
        step_ms=Draw.fixed(1e3 * what.local_s / INNER_STEPS),
    )
    return Scenario(
        name="wire",
        fidelity="training",
        rounds=what.rounds,
        members=(members,),
        model=Model(task="builtin:stub", options={"params": what.params}),
        network=Network(latency_ms=((1e3 * what.latency_s,),)),
    )
