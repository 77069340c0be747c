"""A book of signed records. Pure: the time is an argument, and the order of merging does not matter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import islice

from farflung.protocol import limits
from farflung.protocol.errors import PeerError
from farflung.protocol.identity import PeerId
from farflung.protocol.record import PeerRecord, decode_record

RECORDS_MAX = 2 * limits.MEMBERS_MAX
"""Records one book holds: every member, and as many who are on their way in or out."""

AHEAD_MS_MAX = 600_000
"""How far in the future a record may be signed: clocks of home computers are off by minutes, not by more."""

LEASE_MS_MAX = 86_400_000
"""A record is believed for a day at most, whatever it says of itself."""

ANSWER_BYTES_MAX = limits.CONTROL_BYTES_MAX // 2
"""Records in one answer: those of 256 members, about 1.3 kB each, fit."""


class RecordBook:
    """The newest believable record of every peer, at most RECORDS_MAX of them.

    Merging is commutative, associative and idempotent: of two records of a peer the later wins (same time: the larger
    bytes), and when there are too many, `kept` peers stay, then those issued last. The caller sets `kept` to the
    members of the run, so that a crowd of strangers cannot push them out.
    """

    def __init__(self, run_id: bytes) -> None:
        self.run_id = run_id
        self.kept: Collection[PeerId] = frozenset()
        self._held: dict[PeerId, tuple[PeerRecord, bytes]] = {}
        self._ordered: tuple[int, int, Sequence[tuple[PeerRecord, bytes]]] = (0, 0, ())
        """Between which times (Unix, ms) the list of those current is right, and the list."""

    def add(self, data: bytes, unix_ms: int) -> PeerRecord:
        """Merge one encoded record; returns it. Raises PeerError if it is forged, expired or from the far future."""
        record = decode_record(data, run_id=self.run_id)
        if not _current(record, unix_ms):
            raise PeerError(record.peer_id.short, _why_not_current(record, unix_ms))
        held = self._held.get(record.peer_id)
        if held is None or (held[0].issued_ms, held[1]) < (record.issued_ms, data):
            self._held[record.peer_id] = (record, data)
            self._ordered = (0, 0, ())
            self._trim()
        return record

    def merge(self, records: Iterable[bytes], unix_ms: int) -> list[PeerRecord]:
        """Merge encoded records; returns the good ones. Bad ones are dropped, and what comes after RECORDS_MAX."""
        known = {data: record for record, data in self._live(unix_ms)}  # checked already: a signature costs 0.1 ms
        good: list[PeerRecord] = []
        for data in islice(records, RECORDS_MAX):
            try:
                good.append(known.get(data) or self.add(data, unix_ms))
            except PeerError:
                continue
        return good

    def _trim(self) -> None:
        if len(self._held) > RECORDS_MAX:
            last = min(self._held.values(), key=lambda one: (one[0].peer_id in self.kept, one[0].issued_ms, one[1]))
            del self._held[last[0].peer_id]

    def _live(self, unix_ms: int) -> Sequence[tuple[PeerRecord, bytes]]:
        """What is current, by peer id; made anew when a record came, a lease ended, or the clock was set back."""
        from_ms, until_ms, ordered = self._ordered
        if not from_ms <= unix_ms < until_ms:
            self._held = {peer: one for peer, one in self._held.items() if _current(one[0], unix_ms)}
            ordered = [self._held[peer] for peer in sorted(self._held, key=lambda peer: peer.digest)]
            until_ms = min((expires_ms(record) for record, _ in ordered), default=unix_ms + 1)
            self._ordered = (unix_ms, until_ms, ordered)
        return ordered

    def get(self, peer: PeerId, unix_ms: int) -> PeerRecord | None:
        """A peer's record, if its lease runs."""
        held = self._held.get(peer)
        return held[0] if held is not None and _current(held[0], unix_ms) else None

    def live(self, unix_ms: int) -> list[PeerRecord]:
        """Records whose lease runs, by peer id."""
        return [record for record, _ in self._live(unix_ms)]

    def encoded(self, unix_ms: int, *, first: PeerId | None = None) -> list[bytes]:
        """The same as bytes, `first`'s at the front, cut at ANSWER_BYTES_MAX."""
        answer: list[bytes] = []
        room = ANSWER_BYTES_MAX
        for _, data in sorted(self._live(unix_ms), key=lambda one: one[0].peer_id != first):
            room -= len(data)
            if room < 0:
                break
            answer.append(data)
        return answer


def expires_ms(record: PeerRecord) -> int:
    """Unix time until which a record is believed."""
    return record.issued_ms + min(record.lease_ms, LEASE_MS_MAX)


def _current(record: PeerRecord, unix_ms: int) -> bool:
    return record.issued_ms - AHEAD_MS_MAX <= unix_ms < expires_ms(record)


def _why_not_current(record: PeerRecord, unix_ms: int) -> str:
    minutes = (unix_ms - record.issued_ms) / 60_000
    if minutes < 0:
        return f"its record is from {-minutes:.0f} minutes in the future: is this machine's clock behind, or its ahead?"
    return f"its record is {minutes:.0f} minutes old: is it gone, or is this machine's clock ahead?"
