"""An asyncio loop whose time is a number: it jumps to the next timer when nothing is ready, and nothing real can wait.

Order is total: ready callbacks run first come, first served; timers by (time, sequence). The clock is whole nanoseconds
from zero, so that it never drifts and a delay, however small, ends later than it began. Executors run inline; sockets,
signals, subprocesses and other threads are refused, because they would bring the real clock in.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import math
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from farflung.protocol.errors import LocalError
from farflung.sim.inline import InlineExecutor

T = TypeVar("T")

NS = 1_000_000_000
"""Nanoseconds in a second."""

TURNS_MAX = 1_000_000
"""Callbacks at one instant: more than this is a loop that waits for itself."""

CANCELLED_MAX = 1024
"""Cancelled timers that may lie in the heap before it is cleaned, if they are also the larger half of it."""

# fmt: off
_REAL = (
    "add_reader", "remove_reader", "add_writer", "remove_writer", "sock_recv", "sock_recv_into", "sock_sendall",
    "sock_connect", "sock_accept", "sock_sendto", "sock_recvfrom", "sock_recvfrom_into", "sock_sendfile",
    "create_connection", "create_server", "create_unix_connection", "create_unix_server",
    "create_datagram_endpoint", "connect_accepted_socket", "start_tls", "sendfile", "connect_read_pipe",
    "connect_write_pipe", "subprocess_exec", "subprocess_shell", "add_signal_handler", "remove_signal_handler",
    "getaddrinfo", "getnameinfo",
)
# fmt: on
"""What would wait for the real world."""


class Deadlock(LocalError):
    """Nothing is ready, no timer is set, and somebody still waits. The message names every blocked task."""


_Base: Any = asyncio.AbstractEventLoop


class VirtualLoop(_Base):  # type: ignore[misc]  # most of an event loop is input and output, which are refused
    """See the module. Give it to `run_virtual`, or to `asyncio.Runner` as its loop factory."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._ready: deque[asyncio.Handle] = deque()
        self._heap: list[tuple[int, int, asyncio.TimerHandle]] = []
        self._sequence = self._cancelled = self._made = self._turns = 0
        self._numbers: WeakKeyDictionary[asyncio.Task[Any], int] = WeakKeyDictionary()
        self._running = self._stopping = self._closed = False
        self._evening: list[Callable[[], object]] = []
        self._handler: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object] | None = None
        self._generators: dict[int, Any] = {}
        self.callbacks = 0
        """How many have run: the simulator's unit of work."""

    # -- time ---------------------------------------------------------------------------------------------------------

    def time(self) -> float:
        """Seconds since the loop began."""
        return self.now_ns / NS

    def ns_at(self, when_s: float) -> int:
        """The first nanosecond at which `time()` is not before `when_s`; now for what is past."""
        if not math.isfinite(when_s):
            raise LocalError(f"a timer at {when_s} s")
        when_ns = math.ceil(when_s * NS)
        if when_ns / NS < when_s:
            when_ns += 1
        return max(when_ns, self.now_ns)

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Run after what is ready already."""
        self._check_open()
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """Run `delay` seconds from now."""
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """Run at a time. Timers of one nanosecond run in the order in which they were set."""
        return self.call_at_ns(self.ns_at(when), callback, *args, context=context)

    def call_at_ns(
        self, when_ns: int, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """The same in whole nanoseconds; the past is refused."""
        self._check_open()
        if when_ns < self.now_ns:
            raise LocalError(f"a timer {self.now_ns - when_ns} ns in the past")
        handle = asyncio.TimerHandle(when_ns / NS, callback, args, self, context)
        handle._scheduled = True  # type: ignore[attr-defined]  # so that cancel() tells `_timer_handle_cancelled`
        self._sequence += 1
        heapq.heappush(self._heap, (when_ns, self._sequence, handle))
        return handle

    def before_time_moves(self, callback: Callable[[], object]) -> None:
        """Run when nothing is ready any more at this instant: what many changes of one instant need only once."""
        self._evening.append(callback)

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """As `call_soon`: there is one thread. From another one this is refused."""
        if not self._running or asyncio._get_running_loop() is not self:
            raise LocalError("another thread calls into virtual time")
        return self.call_soon(callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        if not handle._scheduled:  # type: ignore[attr-defined]  # it rang already: asyncio.sleep cancels what rang
            return
        self._cancelled += 1
        if self._cancelled > CANCELLED_MAX and 2 * self._cancelled > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[2].cancelled()]
            heapq.heapify(self._heap)
            self._cancelled = 0

    # -- running ------------------------------------------------------------------------------------------------------

    def run_forever(self) -> None:
        """Until `stop`. Raises Deadlock when nothing can ever happen again."""
        self._check_open()
        if self._running or asyncio._get_running_loop() is not None:
            raise LocalError("a virtual loop inside a running loop")
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=self._generator_begins, finalizer=self._generator_ends)
        self._running, self._stopping, self._turns = True, False, 0
        asyncio._set_running_loop(self)
        try:
            while not self._stopping:
                if self._ready:
                    self._run_ready()
                elif self._evening:
                    due, self._evening = self._evening, []
                    for callback in due:
                        callback()
                elif not self._jump():
                    raise Deadlock(f"nothing can happen any more at {self.time():.3f} s; {self.blocked()}")
        finally:
            self._running = False
            asyncio._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)

    def _run_ready(self) -> None:
        ready = self._ready
        while ready and not self._stopping:
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()
            self._turns += 1
            self.callbacks += 1
            if self._turns > TURNS_MAX:
                raise LocalError(f"time stands still at {self.time():.6f} s; {self.blocked()}")

    def _jump(self) -> bool:
        """Go to the next timer, and make all of its instant ready. False if there is none."""
        heap = self._heap
        while heap and heap[0][2].cancelled():
            heapq.heappop(heap)
            self._cancelled = max(0, self._cancelled - 1)
        if not heap:
            return False
        if heap[0][0] > self.now_ns:
            self.now_ns, self._turns = heap[0][0], 0
        while heap and heap[0][0] == self.now_ns:
            handle = heapq.heappop(heap)[2]
            handle._scheduled = False  # type: ignore[attr-defined]
            if not handle.cancelled():
                self._ready.append(handle)
            else:
                self._cancelled = max(0, self._cancelled - 1)
        return True

    def run_until_complete(self, future: Coroutine[Any, Any, T]) -> T:
        """Run until it is done; returns its result or raises its error."""
        task = asyncio.ensure_future(future, loop=self)

        def stop(_: asyncio.Future[T]) -> None:
            self.stop()

        task.add_done_callback(stop)
        try:
            self.run_forever()
        except BaseException:
            if task.done() and not task.cancelled():
                task.exception()
            raise
        finally:
            task.remove_done_callback(stop)
        return task.result()

    def stop(self) -> None:
        """End `run_forever` after the present callback."""
        self._stopping = True

    def is_running(self) -> bool:
        """Whether it runs."""
        return self._running

    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Forget everything that was to come."""
        if self._running:
            raise LocalError("a running loop cannot be closed")
        self._ready.clear()
        self._heap.clear()
        self._closed = True

    def blocked(self) -> str:
        """Every task that waits, and where: for reports of a deadlock."""
        tasks = sorted(asyncio.all_tasks(self), key=self.number_of)
        return f"{len(tasks)} tasks wait: " + "; ".join(f"{task.get_name()} at {_place(task)}" for task in tasks)

    # -- making things ------------------------------------------------------------------------------------------------

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """A task of this loop; it begins after what is ready already."""
        self._check_open()
        task = asyncio.Task(coro, loop=self, **options)
        self._made += 1
        self._numbers[task] = self._made
        return task

    def number_of(self, task: asyncio.Task[Any]) -> int:
        """Tasks are numbered in the order in which they were made; names may be shared."""
        return self._numbers.get(task, 0)

    def run_in_executor(self, executor: Executor | None, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Run now, in this thread; the result is there after what an `InlineExecutor` charges, other ones nothing."""
        self._check_open()
        done: asyncio.Future[T] = self.create_future()
        error: BaseException | None = None
        result: Any = None
        inline = executor if isinstance(executor, InlineExecutor) else None
        try:
            result = inline.work(func, *args) if inline is not None else func(*args)
        except Exception as raised:
            error = raised
        cost_s = inline.charge() if inline is not None else 0.0

        def finish() -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)

        if cost_s > 0:
            self.call_later(cost_s, finish)
        else:
            self.call_soon(finish)
        return done

    # -- errors, debug, generators ------------------------------------------------------------------------------------

    def get_debug(self) -> bool:
        """Never: debug mode measures real time."""
        return False

    def set_debug(self, enabled: bool) -> None:
        """Nothing to set."""

    def get_task_factory(self) -> Any:
        """None: tasks are asyncio's own."""
        return None

    def get_exception_handler(self) -> Any:
        """What is told of errors nobody waits for."""
        return self._handler

    def set_exception_handler(self, handler: Any) -> None:
        """Tell this one of errors nobody waits for."""
        self._handler = handler

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """Raise it: in a simulation an error nobody waits for is a bug."""
        error = context.get("exception")
        if isinstance(error, BaseException):
            raise error
        raise LocalError(f"asyncio: {context.get('message')}")

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """An error nobody waits for."""
        if self._handler is not None:
            self._handler(self, context)
        else:
            self.default_exception_handler(context)

    def _generator_begins(self, generator: Any) -> None:
        self._generators[id(generator)] = None

    def _generator_ends(self, generator: Any) -> None:
        self._generators.pop(id(generator), None)
        if not self._closed:
            self.create_task(generator.aclose(), name="close a generator")

    async def shutdown_asyncgens(self) -> None:
        """Nothing is kept alive here."""
        self._generators.clear()

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """There is none."""

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the virtual loop is closed")


def _refused(name: str) -> Callable[..., Any]:
    def refuse(self: VirtualLoop, *args: Any, **named: Any) -> Any:
        raise LocalError(f"no real input or output in virtual time: {name}")

    refuse.__name__ = name
    return refuse


for _name in _REAL:
    setattr(VirtualLoop, _name, _refused(_name))


def _place(task: asyncio.Task[Any]) -> str:
    """The innermost line of a task's own code."""
    frames = task.get_stack(limit=1)
    if not frames:
        return "its end"
    frame = frames[-1]
    return f"{frame.f_code.co_qualname}:{frame.f_lineno}"


def run_virtual(main: Coroutine[Any, Any, T], loop: VirtualLoop | None = None) -> T:
    """Run a coroutine in virtual time from zero to its end; what is left running is cancelled.

    Raises Deadlock if it waits for something that cannot come, and whatever it raises.
    """
    loop = loop if loop is not None else VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        _cancel_all(loop)
        loop.close()


def _cancel_all(loop: VirtualLoop) -> None:
    tasks = sorted(asyncio.all_tasks(loop), key=loop.number_of)
    if not tasks:
        return
    for task in tasks:
        task.cancel()

    async def wait() -> None:
        await asyncio.gather(*tasks, return_exceptions=True)

    loop.run_until_complete(wait())
