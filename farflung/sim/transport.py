"""The simulator's Transport: the real calls and the real handlers, on simulated channels."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from farflung.node.runtime import Clock, Service
from farflung.node.transport.calls import Calls
from farflung.node.transport.flow import Traffic, UploadCap
from farflung.node.transport.links import Links
from farflung.node.transport.server import Handlers
from farflung.sim.channel import SimChannel
from farflung.sim.machine import Channels


def address_of(index: int) -> str:
    """Where a member's machine answers."""
    return f"10.{index >> 16 & 255}.{index >> 8 & 255}.{index & 255}:4400"


class SimTransport(Calls):
    """A `runtime.Transport` of one member. Announces no address if it is not `reachable`: it only calls others."""

    def __init__(self, run_id: bytes, channels: Channels, index: int, clock: Clock, *, reachable: bool = True) -> None:
        self._channels, self._index, self._clock, self._reachable = channels, index, clock, reachable
        self._peers = Links(tls=False, opened=lambda address, _: SimChannel(channels, index, address))
        super().__init__(run_id, self._peers, Traffic())
        self._handlers: Handlers | None = None
        self.addresses: tuple[str, ...] = (address_of(index),) if reachable else ()

    async def start(self, service: Service) -> tuple[str, ...]:
        """Answer from now on."""
        self._handlers = Handlers(service, self._run_id, self.traffic, UploadCap(None, self._clock))
        self._channels.by_address[address_of(self._index)] = self._index
        self._channels.machines[self._index].listen(self._handlers.generic() if self._reachable else ())
        return self.addresses

    async def stop(self) -> None:
        """Close everything."""
        await self._peers.close()
        self._channels.machines[self._index].silence()
        if self._handlers is not None:
            await self._handlers.wind_up()

    @property
    def certificate_der(self) -> bytes:
        """None: in one process nobody needs to prove where an answer comes from."""
        return b""

    @contextlib.asynccontextmanager
    async def _open_door(self, plain: str, deadline_s: float) -> AsyncIterator[tuple[Any, bytes]]:
        channel = SimChannel(self._channels, self._index, plain)
        try:
            yield channel, b""
        finally:
            await channel.close()
