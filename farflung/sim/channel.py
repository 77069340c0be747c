"""Calls over the simulated network that behave like gRPC's: the real client and the real handlers meet here.

`SimChannel` stands for `grpc.aio.Channel`, `Machine` for the server of one member's process. Requests and answers are
the bytes of the real serialiser; statuses and errors are gRPC's own.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, NoReturn

import grpc
import numpy as np

from farflung.node.transport.links import CONNECT_MS
from farflung.sim.fabric import KEEPALIVE_S, Fabric, Parcel, Pipe

HEAD_BYTES = 60
"""HTTP/2 headers of a call or of its end, once compression knows the names, and the message's own prefix."""

HANDSHAKE_BYTES = 2_000
"""TLS with one small certificate, each way."""

HANDSHAKE_TRIPS = 3
"""TCP, TLS and HTTP/2 settings."""

AHEAD = 2
"""Messages of one stream that may wait at the sender: one on its way and one ready."""

_Code = grpc.StatusCode


class _Details(NamedTuple):
    """What a generic handler looks at."""

    method: str
    invocation_metadata: tuple[()] = ()


class _Aborted(Exception):
    """A handler refused."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code, self.details = code, details


class _Context:
    """What a handler gets as its context."""

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn:
        raise _Aborted(code, details)


class Machine:
    """One member's machine: where its process answers, while it runs."""

    def __init__(self, world: Channels, index: int) -> None:
        self._world, self.index = world, index
        self.generic: Sequence[Any] = ()
        """The process's handlers; empty while nobody listens."""

        self.handled: dict[int, asyncio.Task[None]] = {}
        self.connections: dict[int, Connection] = {}
        self.dead = False
        """Without power: it neither calls nor answers."""

        self.lies: Callable[[str, int, bytes], bytes | None] | None = None
        """An attacker's hook: (method, caller, answer or streamed message) -> what is sent instead; None: nothing."""

    def handler(self, method: str) -> Any:
        """The handler of a method."""
        for generic in self.generic:
            found = generic.service(_Details(method))
            if found is not None:
                return found
        return None

    def listen(self, generic: Sequence[Any]) -> None:
        """A process answers from now on."""
        self.generic, self.dead = generic, False

    def die(self) -> None:
        """Lose power."""
        self.dead = True
        self.silence()

    def silence(self) -> None:
        """The process is gone: connections break, what was being answered ends."""
        self.generic = ()
        for connection in [*self.connections.values()]:
            connection.break_up(f"member {self.index} is gone")
        for task in [*self.handled.values()]:
            task.cancel()
        self.handled.clear()


class Channels:
    """Everything that calls need to know of each other."""

    def __init__(
        self,
        fabric: Fabric,
        *,
        message_loss: float = 0.0,
        rng: np.random.Generator | None = None,
        scale: float = 1.0,
    ) -> None:
        self.fabric, self.loop, self._scale = fabric, fabric.loop, scale
        self.machines = [Machine(self, index) for index in range(len(fabric.topology.nodes))]
        self._message_loss, self._rng = message_loss, rng
        self._calls = 0
        self.by_address: dict[str, int] = {}

    def charged(self, name: str, size: int) -> int:
        """How large a message counts: bulk stands for that of a bigger model."""
        return size if name != "Fetch" or self._scale == 1.0 else math.ceil(size * self._scale)

    def lost(self) -> bool:
        """Whether a control call never arrives."""
        return self._message_loss > 0 and self._rng is not None and float(self._rng.random()) < self._message_loss

    def next_call(self) -> int:
        """A number no other call has."""
        self._calls += 1
        return self._calls


class Connection:
    """One TCP connection, with the calls on it."""

    def __init__(self, channels: Channels, source: int, target: int) -> None:
        self.channels, self.fabric, self.loop = channels, channels.fabric, channels.loop
        self.source, self.target = source, target
        self.out, self.back = Pipe(source, target), Pipe(target, source)
        self.calls: dict[int, Call] = {}
        self.ready: asyncio.Future[None] = self.loop.create_future()
        self.gone = ""
        self._watch: asyncio.TimerHandle | None = None
        self._number = channels.next_call()
        for end in (source, target):
            channels.machines[end].connections[self._number] = self
        self._shake_hands()

    def _shake_hands(self) -> None:
        topology = self.fabric.topology
        trip_s = topology.one_way_latency_s(self.source, self.target) + topology.one_way_latency_s(
            self.target, self.source
        )
        if self.fabric.cut_between(self.source, self.target):
            self.loop.call_later(CONNECT_MS / 1e3, self.break_up, "no answer")
            return
        if not self.channels.machines[self.target].generic:
            self.loop.call_later(trip_s, self.break_up, "connection refused")
            return
        self.loop.call_later((HANDSHAKE_TRIPS - 1) * trip_s, self._last_trip)

    def _last_trip(self) -> None:
        if self.gone:
            return
        hello = Parcel(HANDSHAKE_BYTES, "hello", self._answer_hello)
        self.fabric.put(self.out, hello)
        self.loop.call_later(CONNECT_MS / 1e3, self._check_open)

    def _answer_hello(self) -> None:
        self.fabric.put(self.back, Parcel(HANDSHAKE_BYTES, "hello", self._open))

    def _open(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)
            self._watch = self.loop.call_later(KEEPALIVE_S / 2, self._keep_alive)

    def _check_open(self) -> None:
        if not self.ready.done():
            self.break_up("no answer")

    def _keep_alive(self) -> None:
        """Give up what has been silent in a partition for long; looks every half of the time that is allowed."""
        if self.gone:
            return
        wait_s = KEEPALIVE_S / 2
        cut = self.fabric.cut_between(self.source, self.target)
        if cut and self._silent:
            self.break_up("keepalive: no answer")
            return
        self._silent = cut
        self._watch = self.loop.call_later(wait_s, self._keep_alive)

    _silent = False

    def break_up(self, why: str) -> None:
        """All calls on it end: the caller hears UNAVAILABLE, the answering side is cancelled."""
        if self.gone:
            return
        self.gone = why
        for pipe in (self.out, self.back):
            self.fabric.close(pipe)
        if self._watch is not None:
            self._watch.cancel()
        for end in (self.source, self.target):
            self.channels.machines[end].connections.pop(self._number, None)
        if not self.ready.done():
            self.ready.set_exception(_error(_Code.UNAVAILABLE, why))
            self.ready.exception()
        for call in [*self.calls.values()]:
            call.end(_Code.UNAVAILABLE, why)
            call.stop_answer()
        self.calls.clear()


class Call:
    """One call, seen from both sides."""

    def __init__(self, connection: Connection, method: str, request: bytes) -> None:
        self._connection, self.method, self._request = connection, method, request
        self._number = connection.channels.next_call()
        self._name = method.rpartition("/")[2]
        self._inbox: deque[bytes] = deque()
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._news = asyncio.Event()
        self._ahead, self._room = 0, asyncio.Event()
        connection.calls[self._number] = self
        parcel = Parcel(len(request) + HEAD_BYTES, self._name, self._reached)
        connection.fabric.put(connection.out, parcel)

    # -- the answering side -------------------------------------------------------------------------------------------

    def _reached(self) -> None:
        if self._code is None:
            machine = self._machine
            task = self._connection.loop.create_task(self._answer(), name=f"{self._name} at {machine.index}")
            machine.handled[self._number] = task
            task.add_done_callback(lambda _: machine.handled.pop(self._number, None))

    @property
    def _machine(self) -> Machine:
        return self._connection.channels.machines[self._connection.target]

    async def _answer(self) -> None:
        handler, context = self._machine.handler(self.method), _Context()
        try:
            if handler is None:
                raise _Aborted(_Code.UNIMPLEMENTED, f"no method {self.method}")
            if handler.response_streaming:
                stream = handler.unary_stream(self._request, context)
                try:
                    async for data in stream:
                        await self._push(data)
                finally:
                    await stream.aclose()
            else:
                await self._push(await handler.unary_unary(self._request, context))
        except _Aborted as refusal:
            self._send_end(refusal.code, refusal.details)
        else:
            self._send_end(_Code.OK, "")

    async def _push(self, data: bytes) -> None:
        """Send one message; waits while as many as may be ahead are still at the sender."""
        machine, connection = self._machine, self._connection
        if machine.lies is not None:
            changed = machine.lies(self._name, connection.source, data)
            if changed is None:
                await asyncio.Event().wait()
            data = changed if changed is not None else data
        while self._ahead >= AHEAD:
            self._room.clear()
            await self._room.wait()
        self._ahead += 1
        size = connection.channels.charged(self._name, len(data)) + 14
        connection.fabric.put(connection.back, Parcel(size, self._name, lambda: self._take(data), self._sent))

    def _sent(self) -> None:
        self._ahead -= 1
        self._room.set()

    def _send_end(self, code: grpc.StatusCode, details: str) -> None:
        connection = self._connection
        parcel = Parcel(HEAD_BYTES + len(details), f"{self._name}:{code.name}", lambda: self.end(code, details))
        connection.fabric.put(connection.back, parcel)

    def stop_answer(self) -> None:
        """The caller does not wait any more."""
        task = self._machine.handled.get(self._number)
        if task is not None:
            task.cancel()

    # -- the calling side ---------------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        if self._code is None:
            self._inbox.append(data)
            self._news.set()

    def end(self, code: grpc.StatusCode, details: str) -> None:
        """The call is over."""
        if self._code is None:
            self._code, self._details = code, details
            self._connection.calls.pop(self._number, None)
            self._news.set()

    def cancel(self) -> bool:
        """Stop reading; the other side hears of it a latency later."""
        if self._code is not None:
            return False
        connection = self._connection
        self.end(_Code.CANCELLED, "cancelled by the caller")
        connection.fabric.put(connection.out, Parcel(HEAD_BYTES, f"{self._name}:cancel", self.stop_answer))
        return True

    async def read(self) -> Any:
        """The next message, or `grpc.aio.EOF`. Raises AioRpcError when the call failed."""
        while not self._inbox and self._code is None:
            self._news.clear()
            await self._news.wait()
        if self._inbox:
            return self._inbox.popleft()
        if self._code is _Code.OK:
            return grpc.aio.EOF  # type: ignore[attr-defined]
        assert self._code is not None
        raise _error(self._code, self._details)

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> bytes:
        data = await self.read()
        if data is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise StopAsyncIteration
        return bytes(data)


class SimChannel:
    """Like `grpc.aio.Channel`, as far as the node uses it. Connects at the first call, and again after a break."""

    def __init__(self, channels: Channels, source: int, address: str) -> None:
        self._channels, self._source = channels, source
        self._target = channels.by_address.get(address, -1)
        self._connection: Connection | None = None

    async def _connected(self) -> Connection:
        if self._target < 0 or self._channels.machines[self._source].dead:
            raise _error(_Code.UNAVAILABLE, "no such address")
        if self._connection is None or self._connection.gone:
            self._connection = Connection(self._channels, self._source, self._target)
        connection = self._connection
        await asyncio.shield(connection.ready)
        return connection

    def unary_unary(self, method: str, *_: object) -> Callable[..., Coroutine[Any, Any, bytes]]:
        """A callable that sends one message and waits for one."""

        async def call(request: bytes, *, timeout: float | None = None) -> bytes:
            running: Call | None = None
            try:
                async with asyncio.timeout(timeout):
                    connection = await self._connected()
                    if self._channels.lost():
                        await asyncio.Event().wait()
                    running = Call(connection, method, request)
                    data = await running.read()
                    if data is grpc.aio.EOF:  # type: ignore[attr-defined]
                        raise _error(_Code.INTERNAL, "no answer in the answer")
                    return bytes(data)
            except TimeoutError:
                raise _error(_Code.DEADLINE_EXCEEDED, "Deadline Exceeded") from None
            finally:
                if running is not None:
                    running.cancel()

        return call

    def unary_stream(self, method: str, *_: object) -> Callable[..., _Stream]:
        """A callable that sends one message and reads many."""
        return lambda request: _Stream(self, method, request)

    async def close(self, grace: float | None = None) -> None:
        """Break the connection."""
        if self._connection is not None:
            self._connection.break_up("the channel was closed")


class _Stream:
    """A streaming call that connects when it is first read."""

    def __init__(self, channel: SimChannel, method: str, request: bytes) -> None:
        self._channel, self._method, self._request = channel, method, request
        self._call: Call | None = None
        self._over = False

    async def read(self) -> Any:
        if self._over:
            raise _error(_Code.CANCELLED, "cancelled by the caller")
        if self._call is None:
            connection = await self._channel._connected()
            self._call = Call(connection, self._method, self._request)
        return await self._call.read()

    def cancel(self) -> bool:
        self._over = True
        return self._call.cancel() if self._call is not None else False

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> bytes:
        data = await self.read()
        if data is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise StopAsyncIteration
        return bytes(data)


def _error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details, "")
