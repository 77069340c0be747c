"""Control messages on their way out: one short queue and one sender per peer, so that a slow peer delays nobody else.

Messages are repeated by the round machine until they are answered, so one that cannot be delivered is dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable

from farflung.node.runtime import Transport
from farflung.protocol.errors import PeerError
from farflung.protocol.identity import PeerId
from farflung.protocol.record import PeerRecord
from farflung.protocol.wire import Status

WAITING_MAX = 32
"""Messages waiting for one peer. A newer one of the same kind replaces the older; beyond this the oldest goes."""

SIGN_OF_LIFE = Status.__name__
"""This kind says only what every message says: who is there, and in which round."""

COMPANY_S = 0.25
"""A sign of life waits this long for another message to the same peer, which makes it superfluous. A round begins with
one; where rounds are short the announcement follows at once."""

log = logging.getLogger(__name__)


class Outbox:
    """Owns one task per peer that has something to hear. `record_of` gives a peer's record, if it is known."""

    def __init__(
        self, transport: Transport, record_of: Callable[[PeerId], PeerRecord | None], deadline_s: float
    ) -> None:
        self._transport, self._record_of, self._deadline_s = transport, record_of, deadline_s
        self._waiting: dict[PeerId, OrderedDict[str, bytes]] = {}
        self._tasks: dict[PeerId, asyncio.Task[None]] = {}
        self._alone: dict[PeerId, asyncio.Event] = {}
        """Set when a waiting sign of life gets company."""
        self.unreachable: dict[PeerId, str] = {}
        """Peers whose last message could not be delivered, and why."""

    def put(self, peer: PeerId, kind: str, envelope: bytes, *, current: bool = True) -> None:
        """Send soon. `kind` names what a newer message replaces. `current`: it also says in which round this member is,
        as a sign of life does; notes of a mixing are of the round before."""
        queue = self._waiting.setdefault(peer, OrderedDict())
        if kind != SIGN_OF_LIFE and current:
            queue.pop(SIGN_OF_LIFE, None)
        if kind != SIGN_OF_LIFE and peer in self._alone:
            self._alone[peer].set()
        queue[kind] = envelope
        if len(queue) > WAITING_MAX:
            queue.popitem(last=False)
        if peer not in self._tasks:
            self._tasks[peer] = asyncio.create_task(self._send_all(peer), name=f"outbox {peer.short}")

    async def stop(self) -> None:
        """Drop what waits; returns when no sender runs."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def flush(self, deadline_s: float) -> None:
        """Wait until everything was sent or dropped, at most `deadline_s`."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=deadline_s)

    async def _send_all(self, peer: PeerId) -> None:
        queue = self._waiting[peer]
        try:
            while queue:
                if [*queue] == [SIGN_OF_LIFE]:
                    await self._company(peer)
                record = self._record_of(peer)
                if record is None:
                    self.unreachable[peer] = "its address is not known yet"
                    queue.clear()
                    return
                _, envelope = queue.popitem(last=False)
                try:
                    await self._transport.deliver(record, envelope, deadline_s=self._deadline_s)
                    self.unreachable.pop(peer, None)
                except PeerError as error:
                    log.debug("%s refused a message: %s", peer.short, error.why)
                    self.unreachable.pop(peer, None)
                except (TimeoutError, ConnectionError) as error:
                    self.unreachable[peer] = str(error) or type(error).__name__
                    queue.clear()
        finally:
            del self._tasks[peer]

    async def _company(self, peer: PeerId) -> None:
        self._alone[peer] = more = asyncio.Event()
        try:
            async with asyncio.timeout(COMPANY_S):
                await more.wait()
        except TimeoutError:
            pass
        finally:
            del self._alone[peer]
