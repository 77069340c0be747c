"""Blob exchange: give what is here, get what is wanted from any member that has it, relay while it arrives.

`blob_shelf.py` gives, `blob_plan.py` decides what to ask from whom; here are the calls that carry it out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from farflung.node.blob_plan import Plan
from farflung.node.blob_shelf import Shelf
from farflung.node.blob_sources import (
    BlobSource,
    MemoryBlob,
    MemoryBlobs,
    MemoryPartial,
    PartialBlob,
    Sink,
    read_all,
)
from farflung.node.blob_state import Call, Download
from farflung.node.meter import Meter
from farflung.node.runtime import Clock, Holding, Transport
from farflung.node.streams import closing
from farflung.protocol import limits
from farflung.protocol.blob import BlobRef, check_list
from farflung.protocol.errors import PeerError
from farflung.protocol.identity import PeerId
from farflung.protocol.record import PeerRecord

__all__ = ["BlobExchange", "BlobSource", "MemoryBlob", "MemoryBlobs", "MemoryPartial", "PartialBlob", "read_all"]

LIST_IDLE_S = 30.0
"""How long one peer may take for a digest list: on a full 10 Mbit/s uplink it waits behind other members' chunks."""

LIST_NEXT_S = 2.0
"""After this the next peer is asked for the list as well."""

LOOK_AGAIN_S = 1.0
"""The caller's list of peers is read again at least this often while something is wanted."""

REFUSED_S = 2.0
"""A peer that refused a blob is asked for it again after this long."""

WATCH_AGAIN_S, WATCH_AGAIN_S_MAX = 0.25, 2.0
"""A broken watch is tried again after this, doubling."""

_PUMP_SHARE = 4
"""Deciding may take one part in this of the event loop's time, however many chunks arrive."""

_PUMP_PAIR_S = 2e-6
"""Deciding waits at least this for every peer and download, to hear of several chunks at once: 3 ms among 40."""

_log = logging.getLogger(__name__)
_UNREACHABLE = (ConnectionError, TimeoutError)
T = TypeVar("T")
Peers = Callable[[], Iterable[PeerRecord]]


class _Wanted:
    """One blob that callers wait for."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self.waiting = 0
        self.task: asyncio.Task[BlobSource]
        self.partial: PartialBlob | None = None
        self.news = asyncio.Event()
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class _Lied(Exception):
    """A chunk was not what its digest says; the peer has been named."""


class BlobExchange:
    """One member's blobs. The node checks the run id before it hands `on_watch` and `on_fetch` over.

    `in_thread` runs what may wait for the disk: the sink and `PartialBlob.finish`.
    """

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        me: PeerId,
        sink: Sink,
        *,
        rng_seed: int = 0,
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]] = asyncio.to_thread,
    ) -> None:
        self._transport, self._clock, self._me, self._sink, self._in_thread = transport, clock, me, sink, in_thread
        self._shelf, self._plan = Shelf(clock), Plan(me, rng_seed)
        self._wanted: dict[bytes, _Wanted] = {}
        self._calls: dict[Call, asyncio.Task[None]] = {}
        self._watches: dict[PeerId, asyncio.Task[None]] = {}
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._pump: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._stopped = False
        self._receiving = Meter()

    async def start(self) -> None:
        """Nothing runs until something is wanted; `fetch` may be called at once."""

    async def stop(self) -> None:
        """End all downloads and watches; nothing is left running."""
        self._stopped = True
        self._shelf.stop()
        while self._tasks:
            for task in [*self._tasks]:
                task.cancel()
            await asyncio.wait([*self._tasks])

    # -- giving ------------------------------------------------------------------------------------------------------

    def offer(self, source: BlobSource, *, tell: bool = True) -> None:
        """Serve a blob from now on. Offering it again is fine. `tell`: watchers hear of it."""
        self._shelf.offer(source, tell=tell)

    def forget(self, digest: bytes) -> None:
        """Serve a blob no longer. A download of it goes on: cancel its `fetch` to end that."""
        self._shelf.forget(digest)

    def on_watch(self, run_id: bytes) -> AsyncIterator[Sequence[Holding]]:
        """See `runtime.Service`."""
        return self._shelf.watch()

    def on_fetch(self, run_id: bytes, digest: bytes, chunks: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """See `runtime.Service`."""
        return self._shelf.read(digest, chunks)

    def take_speeds_bps(self) -> tuple[float, float]:
        """Bits per second that chunks left and arrived with, while any did, since this was last asked; 0: never yet.

        Others' lines and this member's both show: a slow origin makes arrivals slow.
        """
        now_s = self._clock.now_s()
        return self._shelf.sending.take_bps(now_s), self._receiving.take_bps(now_s)

    # -- getting -----------------------------------------------------------------------------------------------------

    async def fetch(
        self, ref: BlobRef, origin: PeerId | None, peers: Peers, *, deadline_s: float | None = None
    ) -> BlobSource:
        """Get a blob from whoever has it; it is served here from its first chunk on.

        `origin` made it, and is spared: it uploads the blob about once, the others relay. `peers` is asked again and
        again who is there. The caller has compared `ref.size` with its own bound. Without a deadline this waits until
        somebody has it. Raises TimeoutError; ConfigError if the disk is full. Cancel it to give up: what the sink
        kept is used by the next attempt.
        """
        here = self._shelf.get(ref.digest)
        if here is not None:
            return here
        while (wanted := self._wanted.get(ref.digest)) is not None and wanted.task.cancelling():
            await asyncio.wait([wanted.task])
        if wanted is None:
            wanted = self._wanted[ref.digest] = _Wanted(peers)
            wanted.task = self._spawn(self._download(ref, origin, wanted), f"blob {ref.short}")
        wanted.waiting += 1
        try:
            async with asyncio.timeout(deadline_s):
                return await asyncio.shield(wanted.task)
        finally:
            wanted.waiting -= 1
            if not wanted.waiting and not wanted.task.done():
                wanted.task.cancel()
                await asyncio.gather(wanted.task, return_exceptions=True)

    async def _download(self, ref: BlobRef, origin: PeerId | None, wanted: _Wanted) -> BlobSource:
        download: Download | None = None
        try:
            self._look_around()
            digests = await self._digest_list(ref, origin, wanted)
            partial = wanted.partial = await self._to_the_end(lambda: self._sink(ref, digests))
            have = partial.have()
            self._shelf.begin(ref, digests, partial)
            download = self._plan.begin(ref, origin, have, self._clock.now_s())
            if download.missing:
                self._poke()
                await wanted.complete
            self._shelf.hold(ref.digest)
            source: BlobSource = await self._to_the_end(partial.finish)
            self._shelf.offer(source)
            return source
        finally:
            self._wanted.pop(ref.digest, None)
            if download is not None:
                self._plan.end(download)
                await self._end_calls(download)
            if wanted.partial is not None:
                self._shelf.release(ref.digest, wanted.partial)
                wanted.partial.close()
            if not wanted.complete.cancel() and not wanted.complete.cancelled():
                wanted.complete.exception()  # seen, if nobody waited for it
            self._poke()

    async def _to_the_end(self, work: Callable[[], T]) -> T:
        """Run in a thread; if cancelled, first wait for the thread: it works on files that are closed after this."""
        task = asyncio.ensure_future(self._in_thread(work))
        try:
            result: T = await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            raise
        return result

    async def _end_calls(self, download: Download) -> None:
        tasks = [task for call, task in self._calls.items() if call.download is download]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # -- the list of chunk digests -----------------------------------------------------------------------------------

    async def _digest_list(self, ref: BlobRef, origin: PeerId | None, wanted: _Wanted) -> list[bytes]:
        """Ask the origin, then one peer after the other, without waiting long for any, until one list is right."""
        asked: dict[PeerId, asyncio.Task[list[bytes]]] = {}
        try:
            while True:
                for record in [*self._likely(ref, origin, wanted), None]:
                    if record is not None and record.peer_id not in asked:
                        asked[record.peer_id] = self._spawn(self._ask_list(record, ref), f"list {ref.short}")
                    if asked:
                        await asyncio.wait(asked.values(), timeout=LIST_NEXT_S, return_when=asyncio.FIRST_COMPLETED)
                    for peer in [peer for peer, task in asked.items() if task.done()]:
                        try:
                            return asked.pop(peer).result()
                        except (PeerError, *_UNREACHABLE) as error:
                            _log.debug("no digest list of %s from %s: %s", ref.short, peer.short, error)
                if not asked:
                    await _within(LOOK_AGAIN_S, wanted.news.wait())
                    wanted.news.clear()
        finally:
            for task in asked.values():
                task.cancel()
            await asyncio.gather(*asked.values(), return_exceptions=True)

    def _likely(self, ref: BlobRef, origin: PeerId | None, wanted: _Wanted) -> list[PeerRecord]:
        """Peers in the order to ask them: the origin, those known to hold some of it, the rest."""
        records = {record.peer_id: record for record in wanted.peers() if record.peer_id != self._me}
        held = {peer for peer, state in self._plan.peers.items() if ref.digest in state.holds}
        return sorted(records.values(), key=lambda record: (record.peer_id != origin, record.peer_id not in held))

    async def _ask_list(self, record: PeerRecord, ref: BlobRef) -> list[bytes]:
        async with closing(self._transport.fetch(record, ref, (), idle_s=LIST_IDLE_S)) as stream:
            async for _, data in stream:
                return check_list(ref, data, peer=record.peer_id.short)
        raise PeerError(record.peer_id.short, "no digest list")

    # -- watching ----------------------------------------------------------------------------------------------------

    def _look_around(self) -> None:
        """Read the callers' lists of peers again, and watch whoever is new."""
        lists = dict.fromkeys(wanted.peers for wanted in self._wanted.values())  # mostly one, for many blobs
        records = {record.peer_id: record for peers in lists for record in peers()}
        self._plan.members(records.values())
        gone = [peer for peer, state in self._plan.peers.items() if not state.wanted and not state.calls]
        for peer in gone if len(self._plan.peers) > 2 * limits.MEMBERS_MAX else ():
            self._plan.drop(peer)
            if peer in self._watches:
                self._watches[peer].cancel()
        for peer in records:
            if peer != self._me and peer not in self._watches and not self._stopped:
                self._watches[peer] = self._spawn(self._watch(peer), f"watch {peer.short}")

    async def _watch(self, peer: PeerId) -> None:
        """Hear what a peer holds; through broken connections as long as anything is wanted."""
        pause_s = WATCH_AGAIN_S
        try:
            self._plan.peers[peer].down = False
            while True:
                try:
                    async with closing(self._transport.watch(self._plan.peers[peer].record)) as stream:
                        async for holdings in stream:
                            self._plan.heard(peer, holdings, self._clock.now_s())
                            for holding in holdings:
                                if holding.digest in self._wanted:
                                    self._wanted[holding.digest].news.set()
                            self._poke()
                            pause_s = WATCH_AGAIN_S
                except (PeerError, *_UNREACHABLE) as error:
                    _log.debug("watching %s: %s", peer.short, error)
                self._plan.lost(peer)
                self._poke()
                if not self._wanted:
                    return
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, WATCH_AGAIN_S_MAX)
        finally:
            self._watches.pop(peer, None)

    # -- asking for chunks -------------------------------------------------------------------------------------------

    def _poke(self) -> None:
        """Something changed: decide again."""
        self._changed.set()
        if self._wanted and not self._stopped and (self._pump is None or self._pump.done()):
            self._pump = self._spawn(self._make_calls(), "blob calls")

    async def _make_calls(self) -> None:
        """Carry out the plan's decisions until nothing is wanted."""
        looked_s = -LOOK_AGAIN_S
        while self._wanted:
            self._changed.clear()
            now_s = self._clock.now_s()
            if now_s - looked_s >= LOOK_AGAIN_S:
                self._look_around()
                looked_s = now_s
            for call in self._plan.next_calls(now_s):
                self._calls[call] = self._spawn(self._run_call(call), f"fetch {call.download.ref.short}")
            took_s = self._clock.now_s() - now_s
            pairs = len(self._plan.peers) * len(self._plan.downloads)
            await asyncio.sleep(max(_PUMP_SHARE * took_s, _PUMP_PAIR_S * pairs))
            wait_s = min(self._plan.wake_s(now_s), looked_s + LOOK_AGAIN_S) - self._clock.now_s()
            await _within(max(wait_s, 0.001), self._changed.wait())

    async def _run_call(self, call: Call) -> None:
        plan, download, peer = self._plan, call.download, call.peer
        record = plan.peers[peer].record
        self._receiving.begin(self._clock.now_s())
        try:
            stream = self._transport.fetch(record, download.ref, call.asked, idle_s=plan.idle_s(call))
            async with closing(stream):
                async for index, data in stream:
                    self._receiving.moved(len(data))
                    self._take(call, index, data)
        except _Lied:
            pass
        except PeerError as error:
            _log.info("peer %s refused blob %s: %s", peer.short, download.ref.short, error.why)
            plan.refused(peer, download, self._clock.now_s() + REFUSED_S)
        except _UNREACHABLE as error:
            _log.debug("fetching from %s: %s", peer.short, error)
            plan.failed(peer, self._clock.now_s())
        except Exception as error:  # our disk: whoever waits for the blob is told
            wanted = self._wanted.get(download.ref.digest)
            if wanted is not None and not wanted.complete.done():
                wanted.complete.set_exception(error)
        finally:
            self._receiving.end(self._clock.now_s())
            plan.ended(call)
            del self._calls[call]
            self._poke()

    def _take(self, call: Call, index: int, data: bytes) -> None:
        """Check and keep a chunk. A liar is named, and not asked for this blob again."""
        download, digest = call.download, call.download.ref.digest
        wanted = self._wanted.get(digest)
        if wanted is None or wanted.partial is None:
            return
        if download.missing >> index & 1:
            try:
                wanted.partial.write_chunk(index, data)
            except PeerError as error:
                _log.warning("%s", PeerError(call.peer.short, f"sent wrong bytes: {error.why}"))
                self._plan.refused(call.peer, download, float("inf"))
                raise _Lied from None
            self._shelf.arrived(digest, index)
        for other in self._plan.arrived(call, index, self._clock.now_s()):
            self._calls[other].cancel()
        if not download.missing and not wanted.complete.done():
            wanted.complete.set_result(None)

    def _spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name=name)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return task


async def _within(limit_s: float, event: Awaitable[Any]) -> None:
    """Wait for something, but not longer than that."""
    try:
        async with asyncio.timeout(limit_s):
            await event
    except TimeoutError:
        pass
