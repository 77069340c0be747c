"""How a member reaches the tip: the chain, then a state it can check, then the rounds since, replayed.

A joiner fetches certificates from genesis on and checks every one. The state comes from its own disk, from θ₀ if it
built the same model, or as a snapshot in hash-checked chunks from all members that have it; payloads of the rounds
since are fetched and applied like everybody did. Members serve from disk and go on training.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch

from farflung.node.anchor import Anchor, state_digests
from farflung.node.blob_sources import read_all, read_stream
from farflung.node.blobs import BlobExchange, BlobSource
from farflung.node.peers import Peers
from farflung.node.runtime import Transport
from farflung.node.snapshots import Snapshot
from farflung.node.store import RunStore
from farflung.protocol.blob import BlobRef, choose_chunk_bytes, describe
from farflung.protocol.certificate import Certificate, check_certificate, decode_certificate
from farflung.protocol.errors import ConfigError, LocalError, PeerError, TooFewPeers
from farflung.protocol.genesis import Genesis
from farflung.protocol.manifest import Manifest
from farflung.protocol.record import PeerRecord

log = logging.getLogger(__name__)

CALL_S = 10.0
"""How long one control call may take."""

FIND_S = 60.0
"""How long a joiner looks for any member before it gives up."""

SNAPSHOT_S = 120.0
"""After this long it is asked anew who has which snapshot; what has come of a state or of a payload is kept."""

RETRY_S = 0.5
"""Between two rounds of asking everybody known."""

ROUNDS_BEHIND_MAX = 2
"""A joiner this close to the tip leaves the rest to the round machine, which follows as it goes."""


@dataclass
class StateSync:
    """One member's way to the tip. The anchor is loaded in place."""

    genesis: Genesis
    store: RunStore
    exchange: BlobExchange
    peers: Peers
    transport: Transport
    anchor: Anchor
    doing: str = "starting"
    """For people: what is being fetched or replayed."""

    async def reach_tip(self, pool: Executor) -> Certificate:
        """Bring chain and anchor to the newest round that can be had; returns its certificate.

        Raises TooFewPeers if nobody could be reached and the disk has no chain either, PeerError if what was fetched
        does not lead from genesis to a state that its certificate names.
        """
        stuck = False
        while True:
            await self._reach_chain_tip()
            try:
                reached = await self._reach_state(pool, stuck=stuck)
                newest = await self._reach_chain_tip()
                if newest.manifest.round_index - reached <= ROUNDS_BEHIND_MAX:
                    await self._replay(reached, newest.manifest.round_index, pool)
                    return newest
                stuck = False
            except TimeoutError:
                log.info("payloads of old rounds do not come: others may have dropped them; asking for a newer state")
                stuck = True

    # -- the chain ----------------------------------------------------------------------------------------------------

    @property
    def _payload_bytes_max(self) -> int:
        return self.anchor.payload_bytes_max

    def certificate(self, round_index: int) -> Certificate:
        """A certificate from disk. Raises LocalError if it is not there."""
        data = self.store.certificate(round_index)
        if data is None:
            raise LocalError(f"certificate {round_index} is not on disk")
        return decode_certificate(data)

    async def _reach_chain_tip(self) -> Certificate:
        """Fetch and check certificates until nobody has a newer one; a joiner without any asks again for a while."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + FIND_S
        while True:
            tried = []
            for record in await self._callable(alone_ok=self.store.certificates.next_round > 0):
                try:
                    await self._extend_chain(record)
                except (PeerError, TimeoutError, ConnectionError) as error:
                    tried.append(f"{record.peer_id.short}: {error or type(error).__name__}")
            have = self.store.certificates.next_round
            if have > 0:
                return self.certificate(have - 1)
            if loop.time() > end_s:
                raise TooFewPeers(f"no member could give the run's certificates ({'; '.join(tried)})")
            await asyncio.sleep(RETRY_S)

    async def _callable(self, *, alone_ok: bool) -> list[PeerRecord]:
        known = self.peers.others()
        if known or alone_ok:
            return known
        try:
            return await self.peers.wait_for_others(FIND_S)
        except TimeoutError:
            raise TooFewPeers(f"no member of the run was found in {FIND_S:.0f} s") from None

    async def _extend_chain(self, record: PeerRecord) -> None:
        while True:
            start = self.store.certificates.next_round
            parent = self.certificate(start - 1).manifest if start else None
            chain, tip = await self.transport.chain(record, start, deadline_s=CALL_S)
            if not chain:
                return
            for data in chain:
                certificate = decode_certificate(data, peer=record.peer_id.short)
                check_certificate(certificate, parent, self.genesis, payload_bytes_max=self._payload_bytes_max)
                parent = certificate.manifest
                self.store.append_certificate(parent.round_index, data)
            self.doing = f"fetching certificates: {self.store.certificates.next_round} of {tip + 1}"

    # -- the state ----------------------------------------------------------------------------------------------------

    async def _reach_state(self, pool: Executor, *, stuck: bool) -> int:
        """Bring the anchor to the end of the chain on disk; returns its round. `stuck`: replaying did not work.

        Raises TimeoutError if a payload does not come.
        """
        start = await self._in(pool, self._load_best_here, self._chain_end)
        while stuck or self._should_fetch(start, self._chain_end):
            offer = await self._best_snapshot(after=-1 if start is None else start)
            if offer is None:
                break
            try:
                start, stuck = await self._fetch_snapshot(*offer, pool), False
            except TimeoutError:
                log.info("the state of round %d is slow to come; asking again who has which", offer[0])
        if start is None:
            raise TooFewPeers("no member could give a state to start from")
        goal = self._chain_end
        await self._replay(start, goal, pool)
        return goal

    @property
    def _chain_end(self) -> int:
        """The newest round whose certificate is on disk."""
        return self.store.certificates.next_round - 1

    def _should_fetch(self, start: int | None, goal: int) -> bool:
        """Whether a snapshot is better than replaying: there is nothing to replay on, it is smaller than the payloads
        that are missing here, or these are so old that others have dropped them."""
        if start is None or self._replay_bytes(start, goal) > self._state_size:
            return True
        old = start < last_dropped_round(self.genesis, self.certificate(goal).manifest)
        return self._replay_bytes(start, goal) > 0 and (old or goal - start > self.genesis.snapshot_rounds)

    def _load_best_here(self, goal: int) -> int | None:
        """The newest state this machine has: what the anchor holds, a snapshot, or θ₀."""
        held = self.anchor.round_index
        if 0 < held <= goal and self._matches(held):
            self.anchor.locate(self.certificate)
            return held
        snapshot = self.store.latest_snapshot()
        usable = snapshot is not None and snapshot.round_index <= goal
        if snapshot is not None and usable and self._vouched(snapshot.round_index, snapshot.ref):
            self._load(snapshot)
            return snapshot.round_index
        return 0 if self.anchor.round_index == 0 and self._matches(0) else None

    def reload(self, round_index: int) -> None:
        """Recompute the state of a round from the newest snapshot before it and the payloads on disk.

        Raises PeerError if the disk does not hold what that takes.
        """
        held = (self.store.snapshots.at(index) for index in range(round_index, -1, -1))
        snapshot = next((one for one in held if one is not None and self._vouched(one.round_index, one.ref)), None)
        if snapshot is None:
            raise PeerError("?", f"no snapshot from before round {round_index} to recompute from")
        self._load(snapshot)
        for index in range(snapshot.round_index + 1, round_index + 1):
            self._apply(self.certificate(index))

    def _load(self, snapshot: Snapshot) -> None:
        self.anchor.load(snapshot.round_index, *snapshot.load())
        self.anchor.locate(self.certificate)

    def _vouched(self, round_index: int, ref: BlobRef) -> bool:
        """Whether a snapshot is the certified state: one written from a damaged memory is not."""
        return self.certificate(round_index).state_digest == ref.digest

    def _matches(self, round_index: int) -> bool:
        ref, _ = state_digests(self.anchor.arrays())
        return ref.digest == self.certificate(round_index).state_digest

    @property
    def _state_size(self) -> int:
        return sum(array.nbytes for array in self.anchor.arrays())

    def _replay_bytes(self, start: int, goal: int) -> int:
        """Bytes of payloads that replaying would fetch."""
        total = 0
        for index in range(start + 1, goal + 1):
            for item in self.certificate(index).manifest.payloads:
                if item.payload is not None and self.store.blob(item.payload.digest) is None:
                    total += item.payload.size
        return total

    async def _best_snapshot(self, *, after: int) -> tuple[int, BlobRef] | None:
        """The newest snapshot any member offers that the chain vouches for; the chain grows with what it is ahead."""
        best: tuple[int, BlobRef] | None = None
        size = self._state_size
        for record in self.peers.others():
            try:
                index, ref = await self.transport.snapshot(record, deadline_s=CALL_S)
                if index > self._chain_end:
                    await self._extend_chain(record)
            except (PeerError, TimeoutError, ConnectionError) as error:
                log.info("no snapshot from %s: %s", record.peer_id.short, error or type(error).__name__)
                continue
            sound = (
                after < index <= self._chain_end
                and (ref.size, ref.chunk_bytes) == (size, choose_chunk_bytes(size))
                and self._vouched(index, ref)
            )
            if sound and (best is None or index > best[0]):
                best = index, ref
        return best

    async def _fetch_snapshot(self, round_index: int, ref: BlobRef, pool: Executor) -> int:
        """Fetch a state from everybody who has it; on disk and in the anchor when this returns."""
        self.doing = f"fetching the state of round {round_index} ({ref.size / 1e6:.1f} MB)"
        log.info("%s", self.doing)
        source = await self.exchange.fetch(ref, origin=None, peers=self.peers.others, deadline_s=SNAPSHOT_S)
        await self._in(pool, self._take_in, round_index, source)
        self.exchange.forget(ref.digest)
        self.store.drop(ref.digest)
        kept = self.store.snapshot_source(round_index)
        if kept is not None:
            self.exchange.offer(kept)
        return round_index

    def _take_in(self, round_index: int, source: BlobSource) -> None:
        read_stream(source, self.anchor.arrays())
        self.anchor.loaded(round_index)
        self.anchor.locate(self.certificate)
        self.store.write_snapshot(round_index, self.anchor.theta_d, self.anchor.buffers)

    # -- replaying ----------------------------------------------------------------------------------------------------

    async def _replay(self, start: int, goal: int, pool: Executor) -> None:
        for index in range(start + 1, goal + 1):
            self.doing = f"replaying round {index} of {goal}"
            certificate = self.certificate(index)
            await asyncio.gather(*(self._have(item.payload) for item in certificate.manifest.payloads))
            if self.anchor.offers_blobs:
                payloads = read_payloads(self.store, certificate.manifest)
                further = await self._have(self.anchor.taken(certificate.manifest, payloads))
                if further is not None:
                    await self._in(pool, self.keep, further)
            await self._in(pool, self._apply, certificate)

    async def _have(self, ref: BlobRef | None) -> BlobSource | None:
        """What was fetched. Raises TimeoutError: perhaps everybody has dropped it. What has come of it is kept."""
        if ref is None or self.store.blob(ref.digest) is not None:
            return None
        return await self.exchange.fetch(ref, origin=None, peers=self.peers.others, deadline_s=SNAPSHOT_S)

    def keep(self, source: BlobSource) -> None:
        """Have a blob on disk that was fetched: one that is the state of a snapshot here came from that."""
        if self.store.blob(source.ref.digest) is None:
            data = read_all(source)
            self.store.put(data, *describe(data))

    def _apply(self, certificate: Certificate) -> None:
        trial = self.anchor.try_out(certificate.manifest, read_payloads(self.store, certificate.manifest))
        if trial.ref.digest != certificate.state_digest:
            raise ConfigError(
                f"replaying round {certificate.manifest.round_index} gave another state than the swarm certified: "
                "this machine's arithmetic or disk is not sound"
            )
        self.anchor.commit(certificate.manifest.digest)

    # -- keeping ------------------------------------------------------------------------------------------------------

    def kept_sources(self) -> list[BlobSource]:
        """Everything on disk that others may ask for: the newest snapshots and payloads."""
        sources: list[BlobSource] = []
        for digest in self.store.blobs.blobs():
            payload = self.store.blob(digest)
            if payload is not None:
                sources.append(payload)
        for round_index in self.store.snapshots.rounds():  # last: a reference is a snapshot's state, and pruned first
            snapshot = self.store.snapshot_source(round_index)
            if snapshot is not None:
                sources.append(snapshot)
        return sources

    def prune(self, in_use: Collection[bytes]) -> list[bytes]:
        """Drop payloads that the older of the two newest snapshots has made superfluous; returns what is gone by that.

        Equal updates have equal digests: what a later round lists as well stays, and so does what is `in_use` now. A
        reference that goes with its account is still here as long as it is the state of a snapshot.
        """
        rounds = sorted(self.store.snapshots.rounds())
        oldest = rounds[-2] if len(rounds) > 1 else -1
        newest = self.store.certificates.next_round - 1
        kept = {*in_use}.union(*map(self._payload_digests, range(max(oldest, 0) + 1, newest + 1)))
        old = set[bytes]().union(
            *map(self._payload_digests, range(max(oldest - 2 * self.genesis.snapshot_rounds, 1), oldest + 1))
        )
        dropped = [digest for digest in sorted(old - kept) if self.store.blob(digest) is not None]
        if self.anchor.offers_blobs:
            dropped += sorted(self._offered(dropped) - self._offered(sorted(kept)))
        for digest in dropped:
            self.store.drop(digest)
        states = {self.certificate(index).state_digest for index in rounds}
        return [digest for digest in dropped if digest not in states]

    def _offered(self, payloads: Collection[bytes]) -> set[bytes]:
        """What these payloads, as far as they are on disk, offer besides."""
        sources = (self.store.blob(digest) for digest in payloads)
        offers = (self.anchor.offered(bytes(source.map())) for source in sources if source is not None)
        return {offer.digest for offer in offers if offer is not None}

    def _payload_digests(self, round_index: int) -> set[bytes]:
        data = self.store.certificate(round_index)
        payloads = decode_certificate(data).manifest.payloads if data else ()
        return {item.payload.digest for item in payloads if item.payload is not None}

    async def _in(self, pool: Executor, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


def last_dropped_round(genesis: Genesis, tip: Manifest) -> int:
    """The latest round whose payloads members at `tip` may have dropped: that of the older one of their two newest
    snapshots. The last round of a run has one of its own."""
    each, over = genesis.snapshot_rounds, 0 < genesis.rounds <= tip.trained
    newest = tip.round_index if over else tip.round_index // each * each
    return max(0, (newest - 1) // each * each)


def read_payloads(store: RunStore, manifest: Manifest) -> list[bytes]:
    """The payloads of a manifest, in its order, from disk. Raises LocalError if one is gone."""
    found = []
    for item in manifest.payloads:
        source = store.blob(item.payload.digest) if item.payload is not None else None
        if source is None:
            raise LocalError(f"a payload of round {manifest.round_index} is not on disk")
        found.append(bytes(source.map()))
    return found


def first_state(theta_d: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> tuple[BlobRef, list[bytes]]:
    """The state every member starts from: θ₀ and the first buffers (`anchor.first_buffers`)."""
    return state_digests([theta_d.numpy(), *(buffer.numpy() for buffer in buffers.values())])
