"""Carrying out a schedule: each action as one script of the world."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from farflung.sim.explore.actions import (
    ARMED_S,
    Action,
    Crash,
    Cut,
    Disk,
    Fell,
    Join,
    Kill,
    Leave,
    OfMessages,
    Quit,
    Skew,
    Slow,
    Straggle,
)
from farflung.sim.explore.ground import LINE_BYTES_PER_S
from farflung.sim.explore.stage import Stage, WatchedLife

DOWN_MIN_S = 0.05
"""Nobody is back sooner."""

LEFTOVER_S = 0.05
"""What still runs for a dead process after this long was forgotten."""


def carry_out(stage: Stage) -> None:
    """Let everything happen that the schedule says, and start those who are there from the beginning."""
    for life in stage.lives:
        if life.index not in stage.schedule.late:
            life.start()
    for number, action in enumerate(stage.schedule.actions):
        if not isinstance(action, (OfMessages, Straggle)):  # those look at the clock themselves
            stage.script(_happen(stage, number, action))


async def _happen(stage: Stage, number: int, action: Action) -> None:
    await asyncio.sleep(action.at_s)
    stage.log.add(f"{stage.loop.now_ns} {action.text}")
    life = stage.lives[action.members[0]]
    assert isinstance(life, WatchedLife)
    match action:
        case Join():
            life.start()
        case Crash():
            await _down(stage, life, action.for_s, life.crash())
        case Leave():
            await _down(stage, life, action.for_s, life.leave())
        case Kill():
            life.gone = True
            await _down(stage, life, 0.0, life.crash())
        case Quit():
            await _down(stage, life, 0.0, life.leave(), back=False)
        case Fell():
            await _wait_and_fell(stage, life, action)
        case Cut():
            stage.fabric.cut(number, action.side)
            await asyncio.sleep(action.for_s)
            stage.fabric.heal(number)
        case Slow() | Disk() | Skew():
            _set(life, action, begins=True)
            await asyncio.sleep(action.for_s)
            _set(life, action, begins=False)


async def _down(
    stage: Stage, life: WatchedLife, for_s: float, end: Coroutine[Any, Any, None], *, back: bool = True
) -> None:
    """End a life and begin the next one `for_s` after that began; what it leaves behind is noted."""
    number, due_s = life.lives, stage.loop.time() + max(for_s, DOWN_MIN_S)
    stage.restarting += 1
    try:
        was_on = life.on
        await end
        if not back:
            life.gone = True
        if was_on:
            await asyncio.sleep(LEFTOVER_S)
            for name in stage.tasks_of(life.index, number):
                stage.facts.leftovers.append(f"task {name!r} outlived life {number} of member {life.index}")
        await asyncio.sleep(max(0.0, due_s - stage.loop.time()))
        life.start()
    finally:
        stage.restarting -= 1
        stage.changed()


async def _wait_and_fell(stage: Stage, life: WatchedLife, action: Fell) -> None:
    written = asyncio.Event()

    def tell(kind: str) -> None:
        if kind == action.kind and not written.is_set() and life.on:
            written.set()
            stage.channels.machines[life.index].die()  # not one word more

    stage.armed.setdefault(life.index, []).append(tell)
    try:
        async with asyncio.timeout(ARMED_S):
            await written.wait()
    except TimeoutError:
        return
    finally:
        stage.armed[life.index].remove(tell)
    await _down(stage, life, action.for_s, life.crash())


def _set(life: WatchedLife, action: Slow | Disk | Skew, *, begins: bool) -> None:
    """Begin or end a fault that others of its kind may overlap."""
    match action:
        case Slow(factor=factor):
            life.line_slower = life.line_slower * factor if begins else life.line_slower / factor
            rate = LINE_BYTES_PER_S / life.line_slower
            life.world.fabric.set_node(life.index, up_bytes_per_s=rate, down_bytes_per_s=rate)
        case Disk(factor=factor):
            life.disk.slower = life.disk.slower * factor if begins else life.disk.slower / factor
        case Skew(by_s=by_s):
            life.clock.skew_s += by_s if begins else -by_s
