"""What happens to members while a world runs: sessions that begin and end, faults, data caps."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from farflung.node.anchor import Trial
from farflung.protocol.certificate import Certificate
from farflung.sim.life import Life
from farflung.sim.population import Population
from farflung.sim.scenario import Fault
from farflung.sim.world import World


def schedule(world: World, population: Population) -> None:
    """Let everything happen that the population says."""
    for life in world.lives:
        world.script(_come_and_go(world, life))
    for number, fault in enumerate(population.faults):
        world.script(_happen(world, number, fault))
    if any(spec.data_cap_bytes > 0 for spec in population.members):
        world.watchers.append(_watch_caps(world))


async def _until(world: World, when_s: float) -> None:
    await asyncio.sleep(max(0.0, when_s - world.loop.time()))


async def _come_and_go(world: World, life: Life) -> None:
    for session in life.spec.sessions:
        await _until(world, session.start_s)
        life.start()
        if math.isinf(session.end_s):
            return
        await _until(world, session.end_s)
        await (life.crash() if session.crash else life.leave())


async def _happen(world: World, number: int, fault: Fault) -> None:
    """One fault, and its end if it has one. Stragglers are in the step times already."""
    if fault.kind == "straggle":
        return
    await _until(world, fault.at_s)
    world.log.add(f"{world.loop.now_ns} fault {fault.kind} {','.join(map(str, fault.members))}")
    lives = [world.lives[index] for index in fault.members]
    before = [(life.disk.slower, life.clock.skew_s) for life in lives]
    await _begin(world, number, fault, lives)
    if fault.for_s <= 0:
        return
    await asyncio.sleep(fault.for_s)
    world.log.add(f"{world.loop.now_ns} end of {fault.kind}")
    if fault.kind == "partition":
        world.fabric.heal(number)
    for life, (slower, skew_s) in zip(lives, before, strict=True):
        match fault.kind:
            case "crash" | "leave":
                life.start()
            case "slow_disk":
                life.disk.slower = slower
            case "clock_skew":
                life.clock.skew_s = skew_s
            case "link":
                spec = life.spec
                world.fabric.set_node(
                    life.index, up_bytes_per_s=spec.up_bytes_per_s, down_bytes_per_s=spec.down_bytes_per_s
                )


async def _begin(world: World, number: int, fault: Fault, lives: list[Life]) -> None:
    if fault.kind == "partition":
        world.fabric.cut(number, fault.members)
    for life in lives:
        match fault.kind:
            case "crash":
                await life.crash()
            case "leave":
                await life.leave()
            case "slow_disk":
                life.disk.slower = fault.factor
            case "clock_skew":
                life.clock.skew_s = fault.factor
            case "link":
                spec = life.spec
                world.fabric.set_node(
                    life.index,
                    up_bytes_per_s=spec.up_bytes_per_s * fault.factor,
                    down_bytes_per_s=spec.down_bytes_per_s * fault.factor,
                )


def _watch_caps(world: World) -> Callable[[Life, Certificate, Trial], None]:
    """Members whose data is used up go offline for good, politely; looked at after every round."""

    def watch(life: Life, certificate: Certificate, trial: Trial) -> None:
        cap_bytes = life.spec.data_cap_bytes
        if cap_bytes > 0 and not life.gone and sum(world.fabric.wire_bytes(life.index)) > cap_bytes:
            life.gone = True
            world.log.member(world.loop.now_ns, life.index, "has used up its data")
            world.later(life.leave())

    return watch
