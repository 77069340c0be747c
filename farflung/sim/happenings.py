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
        life.wanted = True
        life.resume()
        if math.isinf(session.end_s):
            return
        await _until(world, session.end_s)
        life.wanted = False
        await (life.crash() if session.crash else life.leave())


async def _happen(world: World, number: int, fault: Fault) -> None:
    """One fault, and its end if it has one. Stragglers are in the step times already."""
    if fault.kind == "straggle":
        return
    await _until(world, fault.at_s)
    world.log.add(f"{world.loop.now_ns} fault {fault.kind} {','.join(map(str, fault.members))}")
    if fault.kind == "partition":
        world.fabric.cut(number, fault.members)
    lives = [world.lives[index] for index in fault.members]
    ending = [world.loop.create_task(_hit(world, number, fault, life), name=f"fault {number}") for life in lives]
    if fault.for_s > 0:
        await _until(world, fault.at_s + fault.for_s)
    for task in ending:
        await task
    if fault.for_s > 0:
        world.log.add(f"{world.loop.now_ns} end of {fault.kind}")
        if fault.kind == "partition":
            world.fabric.heal(number)
        for life in lives:
            _recover(world, number, life)


async def _hit(world: World, number: int, fault: Fault, life: Life) -> None:
    match fault.kind:
        case "crash":
            life.held[number] = None
            await life.crash()
        case "leave":
            life.held[number] = None
            await life.leave()
        case "slow_disk" | "clock_skew" | "link":
            life.ailments[number] = (fault.kind, fault.factor)
            _feel(world, life)


def _recover(world: World, number: int, life: Life) -> None:
    life.held.pop(number, None)
    life.ailments.pop(number, None)
    _feel(world, life)
    life.resume()


def _feel(world: World, life: Life) -> None:
    """Put what ails a member now into effect: factors multiply, seconds of skew add up."""
    spec, ailments = life.spec, life.ailments.values()
    life.disk.slower = math.prod(factor for kind, factor in ailments if kind == "slow_disk")
    life.clock.skew_s = spec.clock_skew_s + math.fsum(factor for kind, factor in ailments if kind == "clock_skew")
    part = math.prod(factor for kind, factor in ailments if kind == "link")
    up, down = spec.up_bytes_per_s * part, spec.down_bytes_per_s * part
    world.fabric.set_node(life.index, up_bytes_per_s=up, down_bytes_per_s=down)


def _watch_caps(world: World) -> Callable[[Life, Certificate, Trial], None]:
    """Members whose data is used up go offline for good, politely; looked at after every round."""

    def watch(life: Life, certificate: Certificate, trial: Trial) -> None:
        cap_bytes = life.spec.data_cap_bytes
        if cap_bytes > 0 and not life.gone and sum(world.fabric.wire_bytes(life.index)) > cap_bytes:
            life.gone = True
            world.log.member(world.loop.now_ns, life.index, "has used up its data")
            world.later(life.leave())

    return watch
