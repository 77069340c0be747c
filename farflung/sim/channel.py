"""What stands for `grpc.aio.Channel` in a simulation, as far as the node uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import grpc

from farflung.sim.connection import Call, Connection, call_error
from farflung.sim.machine import Channels

_Code = grpc.StatusCode


class SimChannel:
    """Like `grpc.aio.Channel`, as far as the node uses it. Connects at the first call, and again after a break."""

    def __init__(self, channels: Channels, source: int, address: str) -> None:
        self._channels, self._source = channels, source
        self._target = channels.by_address.get(address, -1)
        self._connection: Connection | None = None

    async def _connected(self) -> Connection:
        if self._target < 0 or self._channels.machines[self._source].dead:
            raise call_error(_Code.UNAVAILABLE, "no such address")
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
                        raise call_error(_Code.INTERNAL, "no answer in the answer")
                    await running.read()  # an answer counts when its status is there
                    return bytes(data)
            except TimeoutError:
                raise call_error(_Code.DEADLINE_EXCEEDED, "Deadline Exceeded") from None
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
            raise call_error(_Code.CANCELLED, "cancelled by the caller")
        if self._call is None:
            connection = await self._channel._connected()
            if self._over:
                raise call_error(_Code.CANCELLED, "cancelled by the caller")
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
