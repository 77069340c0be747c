"""One simulated TCP connection and the calls on it: the real client and the real handlers meet here.

Requests and answers are the bytes of the real serialiser; statuses and errors are gRPC's own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import grpc

from farflung.node.transport.links import CONNECT_MS
from farflung.sim.fabric import KEEPALIVE_S, Parcel, Pipe
from farflung.sim.machine import Aborted, Channels, Context, Machine

HEAD_BYTES = 60
"""HTTP/2 headers of a call or of its end, once compression knows the names, and the message's own prefix."""

HANDSHAKE_BYTES = 2_000
"""TLS with one small certificate, each way."""

HANDSHAKE_TRIPS = 3
"""TCP, TLS and HTTP/2 settings."""

AHEAD = 2
"""Messages of one stream that may wait at the sender: one on its way and one ready."""

_Code = grpc.StatusCode


class Connection:
    """One TCP connection, with the calls on it."""

    def __init__(self, channels: Channels, source: int, target: int) -> None:
        self.channels, self.fabric, self.loop = channels, channels.fabric, channels.loop
        self.source, self.target = source, target
        self.out, self.back = Pipe(source, target), Pipe(target, source)
        self.calls: dict[int, Call] = {}
        self.answering: dict[int, asyncio.Task[None]] = {}
        """Answers at work, also those whose caller does not listen any more."""

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

    def break_up(self, why: str, by: int | None = None) -> None:
        """All calls on it end: the caller hears UNAVAILABLE, the answering side is cancelled.

        At the end where it broke (`by`; None: at both) at once, at the other a latency later; across a partition only
        keepalive tells.
        """
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
            self.ready.set_exception(call_error(_Code.UNAVAILABLE, why))
            self.ready.exception()
        away_s = 0.0
        if by is not None:
            cut = self.fabric.cut_between(self.source, self.target)
            away_s = KEEPALIVE_S if cut else self.fabric.topology.one_way_latency_s(self.source, self.target)
        for delay_s, ending in (
            (0.0 if by != self.target else away_s, self._end_calls),
            (0.0 if by != self.source else away_s, self._end_answers),
        ):
            if delay_s > 0:
                self.loop.call_later(delay_s, ending)
            else:
                ending()

    def _end_calls(self) -> None:
        for call in [*self.calls.values()]:
            call.end(_Code.UNAVAILABLE, self.gone)
        self.calls.clear()

    def _end_answers(self) -> None:
        for task in [*self.answering.values()]:
            task.cancel()


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
            machine.handled[self._number] = self._connection.answering[self._number] = task
            task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._machine.handled.pop(self._number, None)
        self._connection.answering.pop(self._number, None)

    @property
    def _machine(self) -> Machine:
        return self._connection.channels.machines[self._connection.target]

    async def _answer(self) -> None:
        handler, context = self._machine.handler(self.method), Context()
        try:
            if handler is None:
                raise Aborted(_Code.UNIMPLEMENTED, f"no method {self.method}")
            if handler.response_streaming:
                stream = handler.unary_stream(self._request, context)
                try:
                    async for data in stream:
                        await self._push(data)
                finally:
                    await stream.aclose()
            else:
                await self._push(await handler.unary_unary(self._request, context))
        except Aborted as refusal:
            self._send_end(refusal.code, refusal.details)
        except Exception as error:
            self._send_end(_Code.UNKNOWN, f"a bug in what answers {self._name}: {error!r}")
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
        ends = connection.target, connection.source
        size = connection.channels.charged_message(self._name, data, *ends, self._request) + 14
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
        raise call_error(self._code, self._details)

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> bytes:
        data = await self.read()
        if data is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise StopAsyncIteration
        return bytes(data)


def call_error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    """What a caller gets that gRPC could not serve."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details, "")
