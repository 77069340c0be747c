"""Which chunk to ask from whom, and when. Sans-I/O: news, arrivals and the time go in, calls to make come out.

Rarest first over all downloads at once; a blob's origin is asked for this member's own stripe (`stripes.py`), for
others' chunks only when no fresh chunk has appeared anywhere for a while. Few chunks are in flight per peer, more
when they come quickly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from farflung.node.blob_state import (
    ALL,
    PATIENCE_S_MAX,
    PATIENCE_S_MIN,
    Call,
    Download,
    Peer,
    bits,
    mask_of,
)
from farflung.node.runtime import Holding
from farflung.node.stripes import mix, relay_weights
from farflung.protocol import limits
from farflung.protocol.blob import BlobRef
from farflung.protocol.identity import PeerId
from farflung.protocol.record import PeerRecord

CALLS_PER_PEER = 2
"""One arrives while the next is being asked for."""

HOLDINGS_PER_PEER_MAX = 4096
"""Blobs remembered per peer: 16 rounds of the largest swarm. The oldest are forgotten first."""

WINDOW_CHUNKS = 4096
"""Chunks of one blob looked at together: more would cost more time than it finds better choices."""


class Plan:
    """All downloads of one member, and what it knows of its peers."""

    def __init__(self, me: PeerId, seed: int = 0) -> None:
        self.me, self._seed = me, seed
        self.peers: dict[PeerId, Peer] = {}
        self.downloads: dict[bytes, Download] = {}
        self._weights: dict[PeerId, float] = {}
        self._slow: set[PeerId] = set()
        self.my_upload_bytes_per_s = 0

    # -- what happens ------------------------------------------------------------------------------------------------

    def members(self, records: Iterable[PeerRecord]) -> None:
        """Who can be asked now. Records of one's own, if among them, tell the own upload rate."""
        latest = {record.peer_id: record for record in records}
        own = latest.pop(self.me, None)
        self.my_upload_bytes_per_s = own.upload_bytes_per_s if own else self.my_upload_bytes_per_s
        for peer, record in latest.items():
            self.peers.setdefault(peer, Peer(record)).record = record
        for peer, state in self.peers.items():
            state.wanted = peer in latest
        rates = {peer: record.upload_bytes_per_s for peer, record in latest.items()}
        rates[self.me] = self.my_upload_bytes_per_s
        self._weights = relay_weights(rates)
        mean = math.fsum(self._weights.values()) / len(self._weights)
        self._slow = {peer for peer, weight in self._weights.items() if weight < 0.5 * mean}
        ordered = sorted(self._weights)
        for download in self.downloads.values():
            download.share_out(ordered, self._weights)

    def begin(self, ref: BlobRef, origin: PeerId | None, have: Iterable[int], now_s: float) -> Download:
        """Want a blob."""
        salt = self._seed ^ int.from_bytes(ref.digest[8:16], "big") ^ int.from_bytes(self.me.digest[:8], "big")
        download = Download(ref, origin, have, salt, now_s)
        self.downloads[ref.digest] = download
        download.share_out(sorted(self._weights), self._weights)
        if origin in self.peers:
            self.peers[origin].holds[ref.digest] = ALL
        for peer in self.peers:
            self._count(peer, ref.digest, 0)
        return download

    def end(self, download: Download) -> None:
        """The blob is here, or not wanted any more."""
        self.downloads.pop(download.ref.digest, None)

    def heard(self, peer: PeerId, holdings: Iterable[Holding], now_s: float) -> None:
        """News from a watch."""
        state = self.peers.get(peer)
        if state is None:
            return
        state.down = False
        for holding in holdings:
            download = self.downloads.get(holding.digest)
            size = download.ref.chunks if download else limits.BLOB_CHUNKS_MAX
            before = state.holds.pop(holding.digest, 0)
            news = ALL if holding.all else mask_of(holding.chunks, min(size, max(holding.chunks, default=0) + 1))
            state.holds[holding.digest] = before | news
            if download and download.refused.get(peer, math.inf) < math.inf:
                del download.refused[peer]  # it has some now
            if self._count(peer, holding.digest, before) and download:
                download.fresh(now_s)
        while len(state.holds) > HOLDINGS_PER_PEER_MAX:
            del state.holds[next(iter(state.holds))]

    def _count(self, peer: PeerId, digest: bytes, before: int) -> bool:
        """Count a peer's new chunks; whether one is new to everybody but the origin."""
        download, fresh = self.downloads.get(digest), False
        if download is None or peer == download.origin:
            return False
        for index in bits(self.peers[peer].holds.get(digest, 0) & ~before & download.full):
            fresh |= not download.relays[index] and bool(download.missing >> index & 1)
            download.relays[index] += 1
        return fresh

    def lost(self, peer: PeerId) -> None:
        """The watch broke: what the peer holds is unknown."""
        state = self.peers.get(peer)
        if state is None:
            return
        state.down, holds = True, dict(state.holds)
        state.holds.clear()
        for digest, download in self.downloads.items():
            if peer == download.origin:
                state.holds[digest] = ALL
                continue
            for index in bits(holds.get(digest, 0) & download.full):
                download.relays[index] -= 1

    def drop(self, peer: PeerId) -> None:
        """Forget a peer that has no calls."""
        self.lost(peer)
        del self.peers[peer]

    def arrived(self, call: Call, index: int, now_s: float) -> list[Call]:
        """A checked chunk came; returns calls that have nothing left to bring. Chunks come once per call."""
        download, peer, bit = call.download, self.peers[call.peer], 1 << index
        start, stop = download.ref.span(index)
        peer.moved(call, stop - start, now_s)
        several = download.copies.get(index, 0) > 1
        self._release(call, bit)
        if download.missing & bit:
            download.missing &= ~bit
            download.moved_s = now_s
            if call.peer == download.origin and not download.relays[index]:
                download.fresh(now_s)
        others = download.calls if several else ()
        return [other for other in others if not other.left & download.missing and other is not call]

    def ended(self, call: Call) -> None:
        """A call is over; what it did not bring can be asked for again."""
        self._release(call, call.left)
        calls = self.peers[call.peer].calls
        if call in calls:
            calls.remove(call)
            call.download.calls.remove(call)

    def _release(self, call: Call, mask: int) -> None:
        download = call.download
        for index in bits(mask & call.left):
            copies = download.copies.get(index, 0) - 1
            if copies > 0:
                download.copies[index] = copies
            else:
                download.copies.pop(index, None)
                download.in_flight &= ~(1 << index)
        call.left &= ~mask

    def failed(self, peer: PeerId, now_s: float) -> None:
        """A connection broke or stalled: leave the peer alone for a moment, a longer one each time."""
        state = self.peers[peer]
        state.cool_until_s = now_s + min(0.25 * 2**state.faults, 2.0)
        state.faults = min(state.faults + 1, 8)

    def refused(self, peer: PeerId, download: Download, until_s: float) -> None:
        """Do not ask this peer for this blob until then."""
        download.refused[peer] = until_s

    # -- what to do --------------------------------------------------------------------------------------------------

    def next_calls(self, now_s: float) -> list[Call]:
        """Calls to make now. Each has been counted as in flight."""
        made: list[Call] = []
        # Of n downloads from n peers few have anything to be asked for at a time: looked up once, not for every peer.
        wanting = [download for download in self.downloads.values() if download.missing & ~download.in_flight]
        slow = [call for download in self.downloads.values() for call in download.calls if _may_be_late(call, now_s)]
        if not wanting and not slow:
            return made
        for peer, state in self.peers.items():
            while state.wanted and state.cool_until_s <= now_s and len(state.calls) < CALLS_PER_PEER:
                call = self._choose(peer, state, wanting, now_s) or self._duplicate(peer, state, slow, now_s)
                if call is None:
                    break
                made.append(call)
        return made

    def _choose(self, peer: PeerId, state: Peer, wanting: Sequence[Download], now_s: float) -> Call | None:
        best: tuple[tuple[int, int], Download, list[tuple[int, int, int]]] | None = None
        for download in wanting:
            free = state.holds.get(download.ref.digest, 0) & download.missing & ~download.in_flight
            if not free or download.refused.get(peer, 0.0) > now_s:
                continue
            allowed = list(self._allowed(peer, download, free, now_s))
            ranked = sorted((download.relays[index], mix(index, download.salt), index) for index in allowed)
            if ranked and (best is None or ranked[0][:2] < best[0]):
                best = ranked[0][:2], download, ranked
        if best is None:
            return None
        _, download, ranked = best
        count = state.chunks_per_call(download.ref.chunk_bytes)
        return self._ask(peer, state, download, [index for _, _, index in ranked[:count]], now_s)

    def _allowed(self, peer: PeerId, download: Download, free: int, now_s: float) -> Iterator[int]:
        """The chunks among `free` that this peer may be asked for without wasting a slow uplink."""
        owners, relays = download.owners, download.relays
        if peer == download.origin and owners:
            mine = free & download.stripes.get(self.me, 0)
            yield from bits(_window(mine))
            rest = _window(free & ~mine)
            if rest and (download.stalled(now_s) or self._any_down(download)):
                yield from (index for index in bits(rest) if self._steps_in(download, index, now_s))
        elif peer in self._slow and owners and not download.idle(now_s):
            yield from (index for index in bits(_window(free)) if owners[index] == peer or relays[index] == 1)
        else:
            yield from bits(_window(free))

    def _any_down(self, download: Download) -> bool:
        return any(self._is_down(owner) for owner in download.stripes)

    def _is_down(self, owner: PeerId) -> bool:
        return owner != self.me and (owner not in self.peers or self.peers[owner].down)

    def _steps_in(self, download: Download, index: int, now_s: float) -> bool:
        """Whether this member fetches a chunk of another's stripe from the origin."""
        if download.relays[index]:
            return download.idle(now_s) >= 2
        owner, stalled = download.owners[index], download.stalled(now_s)
        if stalled >= 2:
            return True
        if not stalled and not self._is_down(owner):
            return False
        standing = sorted(other for other in download.sharing if other != owner and not self._is_down(other))
        salt = int.from_bytes(download.ref.digest[8:16], "big")
        return bool(standing) and standing[mix(index, salt) % len(standing)] == self.me

    def _duplicate(self, peer: PeerId, state: Peer, slow: Sequence[Call], now_s: float) -> Call | None:
        """A chunk whose call has stalled elsewhere, asked for a second time."""
        for other in slow:
            download = other.download
            late = state.holds.get(download.ref.digest, 0) & other.left & download.missing
            if not late or other.peer == peer or download.refused.get(peer, 0.0) > now_s:
                continue
            if now_s < self._late_s(other, peer):
                continue
            wanted = [index for index in bits(late) if download.copies.get(index, 0) < 2]
            if wanted:
                return self._ask(peer, state, download, wanted[:1], now_s)
        return None

    def _late_s(self, call: Call, helper: PeerId) -> float:
        """When `helper` may be asked for what `call` has not brought: sooner if it is much quicker, and no origin."""
        chunk_s = self.peers[helper].chunk_s(call.download.ref.chunk_bytes)
        return self._late_by_s(call, None if helper == call.download.origin else chunk_s)

    def _late_by_s(self, call: Call, helper_s: float | None) -> float:
        usual_s = self.peers[call.peer].chunk_s(call.download.ref.chunk_bytes)
        patience_s = call.download.first_patience_s if usual_s is None else max(2 * PATIENCE_S_MIN, 4 * usual_s)
        if helper_s is not None and (usual_s is None or usual_s > 4 * helper_s):
            patience_s = min(patience_s, max(PATIENCE_S_MIN, 4 * helper_s))
        return call.last_s + min(patience_s, PATIENCE_S_MAX)

    def _ask(self, peer: PeerId, state: Peer, download: Download, chunks: list[int], now_s: float) -> Call:
        for index in chunks:
            download.copies[index] = download.copies.get(index, 0) + 1
        mask = mask_of(chunks, download.ref.chunks)
        download.in_flight |= mask
        call = Call(peer, download, mask, tuple(sorted(chunks)), now_s, now_s)
        state.calls.append(call)
        download.calls.append(call)
        return call

    def idle_s(self, call: Call) -> float:
        """How long a call may bring nothing before it is given up."""
        chunk_s = self.peers[call.peer].chunk_s(call.download.ref.chunk_bytes)
        return 2 * PATIENCE_S_MAX if chunk_s is None else min(max(2.0, 10 * chunk_s), 2 * PATIENCE_S_MAX)

    def wake_s(self, now_s: float) -> float:
        """When to look again if nothing happens before: the next moment at which somebody's patience ends."""
        times = [state.cool_until_s for state in self.peers.values()]
        helpers = [state for state in self.peers.values() if len(state.calls) < CALLS_PER_PEER]
        speeds = [helper.chunk_s(1) for helper in helpers]
        byte_s = min((speed for speed in speeds if speed is not None), default=None)
        for download in self.downloads.values():
            times += [*download.wake_s(now_s), *download.refused.values()]
            quickest_s = None if byte_s is None else byte_s * download.ref.chunk_bytes
            for call in download.calls if helpers else ():
                sooner_s = self._late_by_s(call, quickest_s)
                times.append(sooner_s if sooner_s > now_s else self._late_by_s(call, None))
        return min((time_s for time_s in times if time_s > now_s), default=now_s + PATIENCE_S_MAX)


def _may_be_late(call: Call, now_s: float) -> bool:
    """Whether a call has not moved for as long as anybody has patience at least."""
    return now_s >= call.last_s + PATIENCE_S_MIN


def _window(mask: int) -> int:
    """The lowest bits, as many as are worth comparing."""
    if mask.bit_length() <= WINDOW_CHUNKS:
        return mask
    low = (mask & -mask).bit_length() - 1
    return mask & (((1 << WINDOW_CHUNKS) - 1) << low)
