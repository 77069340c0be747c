"""Whom this member knows, and how to reach them: the record book, kept fresh by a directory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence

from farflung.node.recordbook import RecordBook
from farflung.node.runtime import Clock, Directory
from farflung.protocol.errors import ConfigError, PeerError, TooFewPeers
from farflung.protocol.identity import Identity, PeerId
from farflung.protocol.record import PeerRecord

log = logging.getLogger(__name__)

LEASE_S = 300.0
"""A record is believed this long; it is published again after a third of it."""

LOOK_S = 2.0
"""How often the directory is asked while somebody wanted is unknown."""

REST_S = 30.0
"""How often it is asked when everybody is known."""

CALL_S = 10.0
"""How long one directory call may take."""


class Peers:
    """Owns the task that publishes this member's record and looks for others'. `record` makes it, unsigned."""

    def __init__(
        self,
        identity: Identity,
        book: RecordBook,
        directory: Directory,
        clock: Clock,
        make_record: Callable[[int, int], PeerRecord],
        save: Callable[[Sequence[bytes]], None],
    ) -> None:
        self.me = identity.peer_id
        self._identity, self.book, self._directory, self._clock = identity, book, directory, clock
        self._make_record, self._save = make_record, save
        self.wanted: Callable[[], Collection[PeerId]] = tuple
        """Whose records are needed; the node sets it once it knows the members."""
        self._task: asyncio.Task[None] | None = None
        self._found = asyncio.Condition()
        self._hurry = asyncio.Event()

    async def start(self) -> None:
        """Publish once and begin to look."""
        self.publish_own()
        self._task = asyncio.create_task(self._keep_fresh(), name="peers")

    async def stop(self) -> None:
        """End the task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def publish_own(self) -> PeerRecord:
        """A fresh record of this member, signed and in the book."""
        record = self._make_record(self._clock.unix_ms(), int(LEASE_S * 1e3)).signed(self._identity)
        self.book.add(record.encode(), self._clock.unix_ms())
        return record

    def record_of(self, peer: PeerId) -> PeerRecord | None:
        """A peer's live record; asking for an unknown one makes the search hurry."""
        record = self.book.get(peer, self._clock.unix_ms())
        if record is None:
            self._hurry.set()
        return record

    def others(self) -> list[PeerRecord]:
        """Everybody known but this member, callable ones only."""
        return [r for r in self.book.live(self._clock.unix_ms()) if r.peer_id != self.me and r.addresses]

    def members(self) -> list[PeerRecord]:
        """Those of `others` that are wanted; all of them while it is not known who is."""
        wanted = set(self.wanted())
        return [record for record in self.others() if not wanted or record.peer_id in wanted]

    async def wait_for_others(self, deadline_s: float) -> list[PeerRecord]:
        """Everybody known, as soon as there is anybody. Raises TimeoutError."""
        async with asyncio.timeout(deadline_s), self._found:
            await self._found.wait_for(lambda: bool(self.others()))
        return self.others()

    async def _keep_fresh(self) -> None:
        publish_at_s, saved = 0.0, list[bytes]()
        while True:
            self._hurry.clear()
            now_s = self._clock.now_s()
            if now_s >= publish_at_s:
                published = await self._attempt(
                    "publish", self._directory.publish(self.publish_own(), deadline_s=CALL_S)
                )
                publish_at_s = now_s + (LEASE_S / 3 if published else LOOK_S)
            found = await self._attempt("lookup", self._directory.lookup(deadline_s=CALL_S))
            async with self._found:
                self._found.notify_all()
            encoded = self.book.encoded(self._clock.unix_ms(), first=self.me)
            if found and encoded != saved:
                saved = encoded
                await asyncio.get_running_loop().run_in_executor(None, self._save, encoded)
            known = {record.peer_id for record in self.others()}
            missing = set(self.wanted()) - known - {self.me}
            await self._rest(LOOK_S if missing or not known else REST_S, publish_at_s)

    async def _rest(self, rest_s: float, publish_at_s: float) -> None:
        """Until it is time again, or somebody unknown is needed (but not more often than every LOOK_S)."""
        rest_s = max(0.0, min(rest_s, publish_at_s - self._clock.now_s()))
        await asyncio.sleep(min(LOOK_S, rest_s))
        if rest_s > LOOK_S:
            try:
                async with asyncio.timeout(rest_s - LOOK_S):
                    await self._hurry.wait()
            except TimeoutError:
                pass

    async def _attempt(self, what: str, call: Awaitable[object]) -> bool:
        try:
            await call
        except (PeerError, TooFewPeers, ConfigError, OSError) as error:
            log.info("directory: %s failed: %s", what, error or type(error).__name__)
            return False
        return True
