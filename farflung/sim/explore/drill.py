"""One schedule, from its first second to its verdict."""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from farflung.node.store import Home
from farflung.protocol.certificate import decode_certificate
from farflung.protocol.errors import FarflungError
from farflung.protocol.waiting import why_waiting
from farflung.sim.explore.crowds import look
from farflung.sim.explore.facts import Facts
from farflung.sim.explore.faults import carry_out
from farflung.sim.explore.invariants import first_broken
from farflung.sim.explore.patience import ROUNDS, bound_s, can_go_on, late_ones, tip_of
from farflung.sim.explore.schedule import Schedule
from farflung.sim.explore.stage import Stage
from farflung.sim.life import memory_disk

LOOK_EVERY_S = 0.5
"""Virtual seconds between two looks at what grows and at who has arrived."""


class Verdict(NamedTuple):
    """What a drill found. `broken`: the invariant and how, or None. `digest`: of the world's event log."""

    broken: tuple[str, str] | None
    digest: str
    events: int
    rounds: int
    virtual_s: float


def drill(schedule: Schedule) -> Verdict:
    """Run the world of a schedule and judge it. Costs some 0.3 s; leaves nothing behind."""
    with (
        tempfile.TemporaryDirectory(prefix="farflung-explore-", dir=memory_disk()) as folder,
        _own_garbage(),
    ):
        stage = Stage(schedule, Path(folder))
        facts = stage.facts
        carry_out(stage)
        stage.script(_direct(stage))
        try:
            stage.run(lambda: stage.over)
        except Exception as error:  # whatever it was, it is the finding
            facts.failures.append(f"{type(error).__name__}: {error}")
        gc.collect()
        _note_open_files(stage, facts)
        _read_disks(stage, facts)
        return Verdict(first_broken(facts), stage.log.digest, stage.log.events, stage.certified, stage.loop.time())


@contextmanager
def _own_garbage() -> Iterator[None]:
    """No garbage is collected by chance, where it could run a finaliser; what was there before is not looked at."""
    was_on = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


async def _direct(stage: Stage) -> None:
    """Wait until the last fault is over, then for progress; look around meanwhile."""
    while stage.loop.time() < stage.schedule.calm_s or stage.restarting:
        look(stage)
        await asyncio.sleep(LOOK_EVERY_S)
    goal = tip_of(stage).manifest.trained + ROUNDS
    if stage.genesis.rounds:
        goal = stage.genesis.rounds
    began_s, patience_s = stage.loop.time(), bound_s(stage) * (1 + stage.genesis.rounds)
    while late_ones(stage, goal) and can_go_on(stage):
        if stage.loop.time() > began_s + patience_s:
            stage.facts.stalled = _report(stage, goal, began_s, patience_s)
            break
        look(stage)
        await asyncio.sleep(LOOK_EVERY_S)
    stage.over = True
    stage.changed()


def _report(stage: Stage, goal: int, began_s: float, patience_s: float) -> str:
    lines = []
    for life in late_ones(stage, goal):
        machine = life.node.machine if life.node is not None else None
        doing = life.node.sync.doing if life.node is not None else "starting"
        why = why_waiting(machine, stage.loop.time()) if machine is not None else doing
        at = f"round {machine.round_index}" if machine is not None else "no round"
        lines.append(f"member {life.index} in {at}: {why}")
    return f"all was well from {began_s:.3f} s on, but after {patience_s:.0f} s more: {'; '.join(lines)}"


def _note_open_files(stage: Stage, facts: Facts) -> None:
    """Where the system tells: descriptors of this process that still point into the world's folder."""
    table = Path("/proc/self/fd")
    if not table.is_dir():
        return
    for entry in sorted(os.listdir(table)):
        try:
            target = os.readlink(table / entry)
        except OSError:
            continue
        if target.startswith(f"{stage.folder}/"):
            facts.leftovers.append(f"an open file outlived its node: {target.removeprefix(f'{stage.folder}/')}")


def _read_disks(stage: Stage, facts: Facts) -> None:
    for life in stage.lives:
        try:
            with Home(life.folder).run(stage.genesis.run_id) as store:
                count = store.certificates.next_round
                data = [store.certificate(index) for index in range(count)]
            facts.chains[life.index] = [decode_certificate(item) for item in data if item is not None]
        except FarflungError as error:
            facts.failures.append(f"the disk of member {life.index} cannot be read: {error}")
