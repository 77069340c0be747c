"""Virtual time: one order of everything, whole nanoseconds, nothing real, and asyncio's own meaning otherwise."""

import asyncio
import random
import re
import socket
import threading
import time
from fractions import Fraction

import pytest

from farflung.protocol.errors import LocalError
from farflung.sim import loop as loop_module
from farflung.sim.inline import InlineExecutor
from farflung.sim.loop import NS, Deadlock, VirtualLoop, run_virtual


def in_virtual_time(main):
    """Run `main(loop)` and return (its result, the loop)."""
    loop = VirtualLoop()
    return run_virtual(main(loop), loop), loop


@pytest.mark.parametrize("seed", range(5))
def test_timers_ring_in_order_of_time_and_then_of_setting(seed):
    dice = random.Random(seed)
    delays_ns = [dice.randrange(20) for _ in range(300)]
    rang = []

    async def main(loop):
        for number, delay_ns in enumerate(delays_ns):
            loop.call_at_ns(delay_ns, lambda entry=(delay_ns, number): rang.append((*entry, loop.now_ns)))
        await asyncio.sleep(1)

    in_virtual_time(main)
    assert [entry[:2] for entry in rang] == sorted((delay, number) for number, delay in enumerate(delays_ns))
    assert all(now_ns == delay_ns for delay_ns, _, now_ns in rang)


def test_ready_callbacks_run_first_come_first_served_and_before_any_timer():
    seen = []

    async def main(loop):
        loop.call_at_ns(0, seen.append, "timer of now")
        loop.call_soon(lambda: (seen.append("a"), loop.call_soon(seen.append, "c")))
        loop.call_soon(seen.append, "b")
        await asyncio.sleep(0.1)

    in_virtual_time(main)
    assert seen == ["a", "b", "c", "timer of now"]


@pytest.mark.parametrize("begin_s", [0.0, 1.0, 1e6, 9e6])
@pytest.mark.parametrize("delay_s", [1e-12, 1e-9, 1.5e-9, 0.1, 1 / 3])
def test_every_delay_ends_later_than_it_began_and_never_before_it_is_due(begin_s, delay_s):
    async def main(loop):
        await asyncio.sleep(begin_s)
        before_ns, due_s = loop.now_ns, loop.time() + delay_s
        await asyncio.sleep(delay_s)
        assert loop.time() >= due_s
        assert loop.now_ns > before_ns or due_s == before_ns / NS
        assert loop.now_ns - before_ns <= Fraction(delay_s) * NS + 3

    in_virtual_time(main)


def test_a_million_tenths_of_a_second_are_a_hundred_thousand_seconds():
    rings = 0

    def ring(loop):
        nonlocal rings
        rings += 1
        if rings < 1_000_000:
            loop.call_at_ns(loop.now_ns + NS // 10, ring, loop)

    async def main(loop):
        loop.call_at_ns(NS // 10, ring, loop)
        await asyncio.sleep(100_000)
        return loop.time()

    ended_s, _ = in_virtual_time(main)
    assert (rings, ended_s) == (1_000_000, 100_000.0)


def test_sleeping_does_not_add_up_errors_of_floats():
    """A sleep may end up to a nanosecond late (rounded up); a sum of floats would be wrong by more, either way."""

    async def main(loop):
        for _ in range(50_000):
            await asyncio.sleep(0.1)
        return loop.now_ns

    ended_ns, _ = in_virtual_time(main)
    assert 0 <= ended_ns - 50_000 * NS // 10 <= 50_000


def test_a_million_seconds_pass_at_once():
    began_s = time.perf_counter()
    in_virtual_time(lambda loop: asyncio.sleep(1e6))
    assert time.perf_counter() - began_s < 5


def test_a_deadlock_names_every_blocked_task_and_its_line():
    async def waits_for_godot():
        await asyncio.Event().wait()

    async def main(loop):
        tasks = [loop.create_task(waits_for_godot(), name=name) for name in ("vladimir", "estragon")]
        await asyncio.sleep(3)
        await tasks[0]

    with pytest.raises(Deadlock, match=r"at 3\.000 s; 3 tasks wait") as caught:
        in_virtual_time(main)
    for name in ("vladimir", "estragon"):
        assert re.search(rf"{name} at \S*waits_for_godot:\d+", str(caught.value))


def test_time_that_stands_still_is_reported(monkeypatch):
    monkeypatch.setattr(loop_module, "TURNS_MAX", 1000)

    async def main(loop):
        while True:
            await asyncio.sleep(0)

    with pytest.raises(LocalError, match=r"time stands still at 0\.000000 s; 1 tasks wait"):
        in_virtual_time(main)


def test_sockets_processes_signals_and_name_lookups_are_refused():
    async def serve():
        await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)

    async def connect():
        await asyncio.open_connection("127.0.0.1", 9)

    async def spawn():
        await asyncio.create_subprocess_exec("true")

    async def look_up():
        await asyncio.get_running_loop().getaddrinfo("localhost", 1)

    async def read():
        with socket.socket() as plug:
            plug.setblocking(False)
            await asyncio.get_running_loop().sock_recv(plug, 1)

    async def signal():
        asyncio.get_running_loop().add_signal_handler(10, print)

    for real in (serve, connect, spawn, look_up, read, signal):
        with pytest.raises(LocalError, match="no real input or output"):
            run_virtual(real())


def test_another_thread_cannot_call_in():
    errors = []

    def call_in(loop):
        try:
            loop.call_soon_threadsafe(print)
        except LocalError as error:
            errors.append(error)

    async def main(loop):
        thread = threading.Thread(target=call_in, args=(loop,))
        thread.start()
        thread.join()

    in_virtual_time(main)
    assert len(errors) == 1


def test_a_timer_in_the_past_or_at_no_time_is_refused():
    async def main(loop):
        await asyncio.sleep(1)
        with pytest.raises(LocalError, match="1 ns in the past"):
            loop.call_at_ns(NS - 1, print)
        with pytest.raises(LocalError, match="a timer at nan"):
            loop.call_later(float("nan"), print)

    in_virtual_time(main)


class Charging(InlineExecutor):
    """Each piece of work costs as many seconds as it returns."""

    def __init__(self):
        self.thread, self.owed_s = None, 0.0

    def work(self, function, *arguments):
        self.thread = threading.current_thread()
        self.owed_s = function(*arguments)
        return self.owed_s

    def charge(self):
        return self.owed_s


def test_executors_run_at_once_in_this_thread_and_charge_their_price():
    async def main(loop):
        charging, seen = Charging(), []
        waiting = loop.run_in_executor(charging, lambda cost_s: seen.append(cost_s) or cost_s, 2.5)
        assert seen == [2.5]
        assert not waiting.done()
        assert charging.thread is threading.current_thread()
        assert await waiting == 2.5
        assert loop.now_ns == 2.5 * NS
        assert await asyncio.to_thread(max, 3, 4) == 4
        assert loop.now_ns == 2.5 * NS
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(None, lambda: 1 // 0)

    in_virtual_time(main)


def test_what_many_changes_need_once_runs_once_when_nothing_else_is_ready():
    seen = []

    async def main(loop):
        loop.before_time_moves(lambda: seen.append(("evening", loop.now_ns)))
        for _ in range(5):
            await asyncio.sleep(0)
            seen.append(("day", loop.now_ns))
        await asyncio.sleep(1)
        seen.append(("tomorrow", loop.now_ns))

    in_virtual_time(main)
    assert seen == [("day", 0)] * 5 + [("evening", 0), ("tomorrow", NS)]


def test_cancelled_timers_do_not_pile_up():
    async def main(loop):
        for _ in range(20_000):
            async with asyncio.timeout(1e6):
                await asyncio.sleep(0.001)
        return len(loop._heap)

    left, _ = in_virtual_time(main)
    assert left <= 2 * loop_module.CANCELLED_MAX + 2


def test_an_error_nobody_waits_for_ends_the_world():
    def fail():
        raise ValueError("forgotten")

    async def main(loop):
        loop.call_later(1, fail)
        await asyncio.sleep(2)

    with pytest.raises(ValueError, match="forgotten"):
        in_virtual_time(main)


# -- the same programs on the real loop -------------------------------------------------------------------------------

UNIT_S = 0.02
"""Between any two timers of a program: much more than a busy machine is late."""


async def timeouts(note):
    async with asyncio.timeout(3 * UNIT_S):
        await asyncio.sleep(UNIT_S)
        note("in time")
    try:
        async with asyncio.timeout(2 * UNIT_S):
            async with asyncio.timeout(UNIT_S):
                await asyncio.sleep(9)
    except TimeoutError:
        note("too late")
    note(repr(await asyncio.gather(asyncio.wait_for(asyncio.sleep(9), UNIT_S), return_exceptions=True)))
    async with asyncio.timeout(None):
        await asyncio.sleep(UNIT_S)
        note("for ever")


async def gathering(note):
    async def work(name, units):
        try:
            await asyncio.sleep(units * UNIT_S)
        except asyncio.CancelledError:
            note(f"{name} cancelled")
            raise
        note(name)
        if name == "bad":
            raise ValueError(name)
        return name

    note(repr(await asyncio.gather(work("b", 2), work("a", 1), work("c", 3))))
    try:
        async with asyncio.TaskGroup() as tasks:
            for name, units in (("early", 1), ("bad", 2), ("late", 3)):
                tasks.create_task(work(name, units))
    except* ValueError as group:
        note(repr(group.exceptions))
    done, pending = await asyncio.wait(
        [asyncio.create_task(work("x", 1)), asyncio.create_task(work("y", 3))], return_when=asyncio.FIRST_COMPLETED
    )
    note(f"{len(done)} {len(pending)}")
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


async def queues(note):
    queue, lock, gate = asyncio.Queue(2), asyncio.Lock(), asyncio.Condition()

    async def make():
        for number in range(6):
            await queue.put(number)
            note(f"put {number}")
        await queue.put(None)

    async def take(name):
        while True:
            async with lock:
                item = await queue.get()
            if item is None:
                await queue.put(None)
                return
            note(f"{name} takes {item}")

    async def wait():
        async with gate:
            await gate.wait()
            note("open")

    waiter = asyncio.create_task(wait())
    await asyncio.gather(make(), take("left"), take("right"))
    async with gate:
        gate.notify_all()
    await waiter


async def generators(note):
    async def count():
        try:
            for number in range(5):
                await asyncio.sleep(0)
                yield number
        finally:
            note("closed")

    stream = count()
    async for number in stream:
        note(str(number))
        if number == 2:
            break
    await stream.aclose()
    inner = asyncio.create_task(asyncio.sleep(UNIT_S, "kept"))
    outer = asyncio.ensure_future(asyncio.shield(inner))
    await asyncio.sleep(0)
    outer.cancel()
    note(repr(await asyncio.gather(outer, return_exceptions=True)))
    note(await inner)


@pytest.mark.parametrize("program", [timeouts, gathering, queues, generators])
def test_a_program_means_the_same_as_on_the_real_loop(program):
    real, virtual = [], []
    asyncio.run(program(real.append))
    run_virtual(program(virtual.append))
    assert virtual == real
    assert real
