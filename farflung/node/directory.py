"""How members find each other with nothing but our own transport: knock at known addresses, then gossip records.

Nobody in a directory is trusted. A record is believed because its owner signed it, for as long as its lease runs; a
directory can only hide records, and two of them hide less than one (`Combined`).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from farflung.node.recordbook import RecordBook
from farflung.node.runtime import Clock, Directory, Transport
from farflung.protocol import limits
from farflung.protocol.errors import ConfigError, LocalError, PeerError, TooFewPeers
from farflung.protocol.identity import PeerId
from farflung.protocol.record import PeerRecord, decode_record

T = TypeVar("T")

FANOUT = 3
"""Peers asked at once: news reaches 256 members in about log_4(256) = 4 refreshes, and one dead peer delays none."""

DOORS_MAX = 32
"""Addresses knocked at in one go: all of an invite's, and a sample of those saved from before."""

START_S = 10.0
"""How long the first addresses may take to answer: a TLS handshake over a satellite link takes about 3 s."""

GRACE_S = 0.5
"""After the first answer the others get this much longer: more records at once, and no waiting for the dead."""


class Door(NamedTuple):
    """An address to knock at, and who is expected there (None: whoever opens)."""

    peer: PeerId | None
    address: str

    def __str__(self) -> str:
        return self.address if self.peer is None else f"{self.peer}@{self.address}"


def parse_door(text: str) -> Door:
    """Read "peerid@host:port" or "host:port". Raises ConfigError."""
    name, at, address = text.strip().rpartition("@")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"not an address; write host:port or peerid@host:port: {text[:80]!r}")
    try:
        return Door(PeerId.parse(name) if at else None, address)
    except PeerError:
        raise ConfigError(f"not a peer id before the @: {text[:80]!r}") from None


async def first_answers(
    calls: Mapping[str, Coroutine[Any, Any, T]], *, deadline_s: float, grace_s: float
) -> tuple[dict[str, T], dict[str, str]]:
    """Run calls side by side until all have ended, `grace_s` after the first success, or the deadline.

    Returns the answers, and why there is none from the others. Only what a peer or the network can cause is caught.
    """
    clock = asyncio.get_running_loop().time
    tasks = {name: asyncio.ensure_future(call) for name, call in calls.items()}
    waiting, end_s = set(tasks.values()), clock() + deadline_s
    try:
        while waiting and clock() < end_s:
            ended, waiting = await asyncio.wait(waiting, timeout=end_s - clock(), return_when=asyncio.FIRST_COMPLETED)
            if any(task.exception() is None for task in ended):
                end_s = min(end_s, clock() + grace_s)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    answers: dict[str, T] = {}
    failures: dict[str, str] = {}
    for name, task in tasks.items():
        try:
            answers[name] = task.result()
        except asyncio.CancelledError:
            failures[name] = "no answer in time"
        except (PeerError, TooFewPeers, OSError) as error:  # TimeoutError and ConnectionError are OSErrors
            failures[name] = str(error) or type(error).__name__
    return answers, failures


class Rendezvous:
    """A Directory over a Transport that has been started. Any node serves others with `on_records`.

    `addresses` ("host:port") are our own, for the invite. `saved` are encoded records from before a restart, expired
    or not: their addresses are knocked at, too. `alone_ok`: this node has the run on its disk and may wait for others.
    """

    def __init__(
        self,
        transport: Transport,
        book: RecordBook,
        own: PeerId,
        *,
        clock: Clock,
        rng: random.Random,
        addresses: Sequence[str] = (),
        bootstrap: Sequence[str] = (),
        saved: Sequence[bytes] = (),
        alone_ok: bool = False,
        start_s: float = START_S,
    ) -> None:
        self.book = book
        self._transport, self._own, self._clock, self._rng = transport, own, clock, rng
        self._addresses = tuple(addresses)
        mine = {Door(own, address) for address in addresses} | {Door(None, address) for address in addresses}
        doors = [parse_door(text) for text in bootstrap]
        self._bootstrap = [door for door in dict.fromkeys(doors) if door not in mine and door.peer != own]
        self._saved = [door for door in _saved_doors(saved, book.run_id) if door.peer != own]
        self._alone_ok, self._start_s = alone_ok, start_s
        self._opened: dict[Door, PeerId] = {}
        self._published: list[bytes] = []
        self._misses: Counter[PeerId] = Counter()

    async def start(self) -> tuple[str, ...]:
        """Knock; returns "peerid@host:port" for an invite: ours, then those that opened.

        Raises ConfigError if there were addresses to try and nobody answered.
        """
        failures = await self._knock(self._start_s)
        if failures and not self._opened and not self._alone_ok:
            tried = "; ".join(f"{door}: {why}" for door, why in failures.items())
            raise ConfigError(
                f"no member of the run answered. Check this machine's network and firewall, or ask a member for a new "
                f"invite (farflung invite --refresh). Tried {tried}"
            )
        doors = [Door(self._own, address) for address in self._addresses]
        doors += [Door(peer, door.address) for door, peer in self._opened.items()]
        return tuple(str(door) for door in dict.fromkeys(doors))[: limits.ADDRESSES_MAX]

    async def stop(self) -> None:
        """Nothing to end: the transport is the caller's."""

    async def publish(self, record: PeerRecord, *, deadline_s: float) -> None:
        """Push our record to those who opened a door and to a few more. Raises TooFewPeers if nobody took it.

        With nobody known and no address to try, being in our own book is enough: others come to us.
        """
        data = record.encode()
        if len(data) > limits.RECORD_BYTES_MAX:
            raise LocalError(f"our record has {len(data)} bytes; {limits.RECORD_BYTES_MAX} are allowed")
        try:
            self.book.add(data, self._clock.unix_ms())
        except PeerError as error:
            raise LocalError(f"our own record: {error.why}") from None
        self._published = [data]
        opened = set(self._opened.values())
        told = await self._talk([peer for peer in self._callable() if peer.peer_id in opened], deadline_s / 2)
        if not told and (self._bootstrap or self._saved or self._callable()):
            raise TooFewPeers("no peer took our record; trying again later")

    async def lookup(self, *, deadline_s: float) -> list[PeerRecord]:
        """Ask a few peers, or knock again if none answers; returns every live record known now, ours included."""
        await self._talk([], deadline_s / 2)
        return self.book.live(self._clock.unix_ms())

    async def on_records(self, run_id: bytes, records: Sequence[bytes]) -> Sequence[bytes]:
        """The node's `Service.on_records`: take a caller's records, answer with ours. Raises PeerError."""
        if run_id != self.book.run_id:
            raise PeerError("?", f"records of another run: {run_id.hex()[:8]}")
        now_ms = self._clock.unix_ms()
        self.book.merge(records, now_ms)
        return self.book.encoded(now_ms, first=self._own)

    def _callable(self) -> list[PeerRecord]:
        """Peers that can be called: those that answered last time first, chance among equals."""
        live = [peer for peer in self.book.live(self._clock.unix_ms()) if peer.addresses and peer.peer_id != self._own]
        self._misses = Counter({peer.peer_id: self._misses[peer.peer_id] for peer in live})
        return sorted(live, key=lambda peer: (self._misses[peer.peer_id], self._rng.random()))

    async def _talk(self, also: Sequence[PeerRecord], share_s: float) -> bool:
        """Exchange records with a few peers; if none answers, knock again and try once more. Whether any answered."""
        if await self._exchange(also, share_s / 2):
            return True
        await self._knock(share_s)
        return await self._exchange(also, share_s / 2)

    async def _exchange(self, also: Sequence[PeerRecord], deadline_s: float) -> bool:
        chosen = {str(peer.peer_id): peer for peer in [*also, *self._callable()[:FANOUT]]}
        calls = {
            name: self._transport.records(peer, self._published, deadline_s=deadline_s) for name, peer in chosen.items()
        }
        answers, failures = await first_answers(calls, deadline_s=deadline_s, grace_s=GRACE_S)
        for name, records in answers.items():
            self._misses[chosen[name].peer_id] = 0
            self.book.merge(records, self._clock.unix_ms())
        self._misses.update(chosen[name].peer_id for name in failures)
        return bool(answers)

    async def _knock(self, deadline_s: float) -> dict[str, str]:
        """Ask addresses for records; returns why those that did not answer did not."""
        spare = max(0, DOORS_MAX - len(self._bootstrap))
        sample = self._rng.sample(self._saved, min(spare, len(self._saved)))
        doors = {str(door): door for door in [*self._bootstrap[:DOORS_MAX], *sample]}
        calls = {name: self._open(door, deadline_s) for name, door in doors.items()}
        answers, failures = await first_answers(calls, deadline_s=deadline_s, grace_s=GRACE_S)
        self._opened |= {doors[name]: peer for name, peer in answers.items() if peer != self._own}
        return failures

    async def _open(self, door: Door, deadline_s: float) -> PeerId:
        records = await self._transport.introduce(door.address, self.book.run_id, deadline_s=deadline_s)
        now_ms = self._clock.unix_ms()
        if not records:
            raise PeerError("?", "no record")
        host = self.book.add(records[0], now_ms).peer_id
        if door.peer not in (None, host):
            raise PeerError(host.short, "another peer than the invite names lives there now")
        self.book.merge(records[1:], now_ms)
        return host


def _saved_doors(saved: Sequence[bytes], run_id: bytes) -> list[Door]:
    """Where peers lived before a restart; their leases may be over, their signatures must be right."""
    doors: list[Door] = []
    for data in saved:
        try:
            record = decode_record(data, run_id=run_id)
        except PeerError:
            continue
        doors += [Door(record.peer_id, address) for address in record.addresses]
    return list(dict.fromkeys(doors))


class Combined:
    """Several directories as one: publishes to all, merges what they find, and is content if one of them works."""

    def __init__(self, directories: Sequence[Directory], book: RecordBook, clock: Clock) -> None:
        self._directories = tuple(directories)
        self._book, self._clock = book, clock
        self.problems: dict[str, str] = {}
        """What did not work the last time, by backend: for `farflung doctor` and the log."""

    async def start(self) -> tuple[str, ...]:
        """Start all; returns the addresses of those that started. Raises ConfigError if none did.

        Those that did not are asked all the same later on: both backends then try again by themselves.
        """
        results = await asyncio.gather(*(one.start() for one in self._directories), return_exceptions=True)
        addresses: list[str] = []
        for directory, result in zip(self._directories, results, strict=True):
            if isinstance(result, BaseException):
                self._note(directory, result)
            else:
                addresses += result
        if len(self.problems) == len(self._directories):
            raise ConfigError("; ".join(self.problems.values()) or "no directory to find members with")
        return tuple(addresses)

    async def stop(self) -> None:
        """Stop all, also those that did not start."""
        await asyncio.gather(*(one.stop() for one in self._directories))

    async def publish(self, record: PeerRecord, *, deadline_s: float) -> None:
        """Publish everywhere. Raises TooFewPeers if no backend could."""
        calls = {self._name(one): one.publish(record, deadline_s=deadline_s) for one in self._directories}
        answers, self.problems = await first_answers(calls, deadline_s=deadline_s, grace_s=deadline_s)
        if not answers:
            raise TooFewPeers("; ".join(f"{name}: {why}" for name, why in self.problems.items()))

    async def lookup(self, *, deadline_s: float) -> list[PeerRecord]:
        """Every live record any backend found."""
        calls = {self._name(one): one.lookup(deadline_s=deadline_s) for one in self._directories}
        answers, self.problems = await first_answers(calls, deadline_s=deadline_s, grace_s=deadline_s)
        now_ms = self._clock.unix_ms()
        for records in answers.values():
            self._book.merge([record.encode() for record in records], now_ms)
        return self._book.live(now_ms)

    def _note(self, directory: Directory, error: BaseException) -> None:
        if not isinstance(error, (ConfigError, PeerError, TooFewPeers, OSError)):
            raise error
        self.problems[self._name(directory)] = str(error)

    def _name(self, directory: Directory) -> str:
        return f"{type(directory).__name__} {self._directories.index(directory) + 1}"
