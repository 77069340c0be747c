"""Small worlds for tests: two machines with a wire between them, and a few members that fit a line through points."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from farflung.node.run_file import RunFile, make_genesis
from farflung.node.tasks.load import load_task
from farflung.sim.churn import ALWAYS
from farflung.sim.draw import Draw
from farflung.sim.eventlog import EventLog
from farflung.sim.fabric import Fabric
from farflung.sim.life import SECRET, Life
from farflung.sim.loop import VirtualLoop
from farflung.sim.network.topology import NodeLinks, Topology
from farflung.sim.population import MemberSpec
from farflung.sim.results import RunResult
from farflung.sim.scenario import Members, Model, Network, Run, Scenario
from farflung.sim.training import Training
from farflung.sim.world import World

UP, DOWN, FAR_S = 1e6, 1e9, 0.02
"""Uplinks are the bottleneck; one way takes 20 ms."""

FAST = {"grace_s": 1.0, "deadline_floor_s": 2.0, "deadline_ceiling_s": 10.0}


def wires(n: int = 2, *, up: float = UP, latency_s: float = FAR_S, **more: Any) -> Topology:
    """n equal machines, everybody as far from everybody."""
    return Topology(tuple(NodeLinks(up, DOWN) for _ in range(n)), latency_s=((latency_s,),), **more)


class Wire:
    """A fabric without nodes, and what came out of it."""

    def __init__(self, topology: Topology, log: EventLog | None = None) -> None:
        self.loop = VirtualLoop()
        self.fabric = Fabric(self.loop, topology, log if log is not None else EventLog())
        self.came: list[tuple[str, float]] = []

    def arrived(self, name: str) -> Callable[[], None]:
        return lambda: self.came.append((name, self.loop.time()))


def scenario(n: int = 3, *, rounds: int = 3, members: Any = None, run: Any = None, **more: Any) -> Scenario:
    """n members with quick lines that train `builtin:linear`; `members` and `run` change the defaults of theirs."""
    groups = members if isinstance(members, tuple) else (group(n, **(members or {})),)
    options = more.pop("options", {"features": 16, "samples": 64, "batch": 4, "noise": 0.0})
    inner = {"codec": "fp32", "outer": "sgd(lr=1.0)", "inner_steps": 4, "snapshot_rounds": 2, **FAST, **(run or {})}
    return Scenario(
        name="small",
        fidelity="training",
        rounds=rounds,
        limit_h=more.pop("limit_h", 0.5),
        members=groups,
        model=Model(task="builtin:linear", options=options, **more.pop("model", {})),
        run=Run(**inner),
        network=more.pop("network", Network()),
        **more,
    )


def group(count: int = 1, **changes: Any) -> Members:
    """Members with 100 Mbit/s lines and steps of 100 ms."""
    return Members(**{"count": count, "step_ms": Draw.fixed(100), **changes})


class Trained(NamedTuple):
    """A world that has run."""

    result: RunResult
    training: Training

    @property
    def world(self) -> World:
        return self.training.world


def train(what: Scenario, seed: int = 0, *, log: Path | None = None, prepare: Any = None) -> Trained:
    """Run it and keep the world to look at; its disks are removed."""
    home = Path(tempfile.mkdtemp(prefix="farflung-test-"))
    try:
        torch.set_num_threads(1)
        training = Training(what, seed, home, None, log, None)
        if prepare is not None:
            prepare(training.world)
        return Trained(training.run(0.0), training)
    finally:
        shutil.rmtree(home)


class Free:
    """Work that takes no time."""

    def encode_s(self) -> float:
        return 0.0

    def check_s(self) -> float:
        return 0.0

    def apply_s(self, rows: int) -> float:
        return 0.0


SPEC = MemberSpec(
    index=0,
    name="m",
    group=0,
    up_bytes_per_s=12.5e6,
    down_bytes_per_s=12.5e6,
    region=0,
    last_mile_s=0,
    queue="fq",
    queue_bytes=0,
    loss=0,
    links=(),
    reachable=True,
    data_cap_bytes=0,
    step_s=0.1,
    jitter=0,
    busy_every_s=0,
    busy_for_s=0,
    busy_slowdown=2,
    fsync_s=0.0,
    disk_bytes_per_s=0,
    clock_skew_s=0,
    sessions=ALWAYS,
    attack=None,
)


def by_hand(folder: Path, n: int, *, run: Any = None, wrap: Any = None, step_s: Any = None, seed: int = 0) -> World:
    """A world without a scenario. `wrap(task)` changes what members train, `step_s(now)` how fast."""
    settings = {"codec": "fp32", "outer": "sgd(lr=1.0)", "inner_steps": 4, "rounds": 3, **(run or {})}
    options = settings.pop("task_options", {"features": 16, "samples": 64, "batch": 4})
    file = RunFile(name="w", task="builtin:linear", task_options=options, start_members=n, **settings)
    task: Any = load_task(file.task, file.task_options)

    def begin(founder: Any) -> Any:
        genesis, theta_d = make_genesis(file, founder.public_key, SECRET)
        return genesis, theta_d, {}

    topology = Topology(tuple(NodeLinks(12.5e6, 12.5e6) for _ in range(n)), latency_s=((0.02,),))
    task = wrap(task) if wrap is not None else task
    world = World(begin, task, topology, seed=seed, folder=folder, limit_s=600)
    for index in range(n):
        spec = replace(SPEC, index=index, name=f"m{index}")
        world.lives.append(Life(world, spec, Free(), step_s if step_s is not None else lambda now_s: 0.1))
    world.found(world.lives[0])
    return world


def run_to_the_end(world: World) -> bool:
    """Start everybody; run until everybody has finished."""
    for life in world.lives:
        life.start()
    return world.run(lambda: all(life.trainee is not None and life.trainee.learner.finished for life in world.lives))
