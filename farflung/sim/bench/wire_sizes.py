"""How long everything is that members say in a round: real statements, encoded as nodes encode them.

Statements are those of an ordinary round: numbers of a few digits, masses of 53 bits. What somebody says to a peer
costs the answer too, so every size here is of both ways together.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from farflung.node.runtime import DIGEST_LIST
from farflung.node.transport.server import encode_chunk
from farflung.protocol import messages_pb2 as pb
from farflung.protocol.blob import DIGEST_BYTES, BlobRef, choose_chunk_bytes
from farflung.protocol.certificate import Certificate
from farflung.protocol.genesis import RUN_ID_BYTES
from farflung.protocol.identity import SIGNATURE_BYTES, Identity, PeerId
from farflung.protocol.ledger.amounts import Amount, Tally
from farflung.protocol.ledger.books import Ledger, Terms
from farflung.protocol.ledger.incoming import Incoming
from farflung.protocol.ledger.messages import Parcel, Receipt
from farflung.protocol.ledger.outgoing import Outgoing
from farflung.protocol.manifest import Manifest, Member
from farflung.protocol.mixing.account import Account, Book, Totals
from farflung.protocol.mixing.notes import Note, Offer
from farflung.protocol.statements import Announcement
from farflung.protocol.wire import Certified, Proposal, Statement, Status, Vote, encode_message

ROUND = 100
"""Rounds of two or three digits are what most runs have."""

MASS = Fraction(6_004_799_503_160_661, 1 << 53)
"""Two thirds in fp64: as long as masses get where members' weights differ, or their number is no power of two."""

TOTAL = 1234.5678901234567
"""A sum over coordinates: fp64 has 13 hexadecimal digits, whatever its size."""

STEPS, TOKENS = 30, 100_000
DIGEST, SIGNATURE = b"\xa5" * DIGEST_BYTES, b"\xa5" * SIGNATURE_BYTES
RUN_ID = b"\xa5" * RUN_ID_BYTES


@lru_cache(maxsize=512)
def identity_of(number: int) -> Identity:
    """A member, the same in every process."""
    return Identity((number + 1).to_bytes(32, "big"))


def ref_of(size: int) -> BlobRef:
    """The name of a payload of `size` bytes."""
    return BlobRef(DIGEST, size, choose_chunk_bytes(size))


def told_bytes(statement: Statement) -> int:
    """One statement in its signed envelope, and the peer's "accepted"."""
    message = encode_message(identity_of(0), RUN_ID, ROUND, DIGEST, statement)
    return len(message) + pb.Reply(accepted=True).ByteSize()


# -- what every round has ---------------------------------------------------------------------------------------------


def announcement_of(number: int, payload_bytes: int) -> Announcement:
    """ "This is my payload", of one member."""
    return Announcement(identity_of(number).public_key, ref_of(payload_bytes), STEPS, TOKENS, SIGNATURE)


def announcement_bytes(payload_bytes: int) -> int:
    """Of one announcement to one peer."""
    return told_bytes(announcement_of(0, payload_bytes))


def manifest_of(members: int, payload_bytes: int) -> Manifest:
    """Everybody announces, everybody stays."""
    announcements = tuple(announcement_of(number, payload_bytes) for number in range(members))
    listed = tuple(Member(item.public_key, 1, 0, True) for item in announcements)
    proposer = identity_of(0).peer_id
    return Manifest(RUN_ID, ROUND, DIGEST, proposer, announcements, (), (), listed, started=True, trained=ROUND)


@lru_cache(maxsize=64)
def _proposal_bytes(members: int, payload_bytes: int) -> int:
    return told_bytes(Proposal(0, manifest_of(members, payload_bytes)))


def proposal_bytes(members: int, payload_bytes: int) -> int:
    """Of one proposal to one peer: it grows by the same for every member that it lists (a test)."""
    one, two = (_proposal_bytes(count, payload_bytes) for count in (1, 2))
    return one + (members - 1) * (two - one)


@lru_cache(maxsize=64)
def _certified_bytes(members: int, votes: int, payload_bytes: int) -> int:
    signatures = tuple((identity_of(number).peer_id, SIGNATURE) for number in range(votes))
    certificate = Certificate(manifest_of(members, payload_bytes), 0, DIGEST, signatures)
    return told_bytes(Certified(certificate))


def certified_bytes(members: int, payload_bytes: int) -> int:
    """Of one certificate to one peer; it grows by the same for every member and every vote (a test)."""
    one = _certified_bytes(1, 1, payload_bytes)
    member, vote = (_certified_bytes(2, 1, payload_bytes) - one, _certified_bytes(1, 2, payload_bytes) - one)
    return one + (members - 1) * member + (quorum(members) - 1) * vote


def quorum(members: int) -> int:
    """Votes that make a certificate; of an even number half is enough if the longest-standing member is among them."""
    return -(-members // 2)


@lru_cache(maxsize=1)
def vote_bytes() -> int:
    """Of one vote to one peer."""
    return told_bytes(Vote(0, DIGEST, DIGEST, SIGNATURE))


@lru_cache(maxsize=1)
def status_bytes() -> int:
    """Of one sign of life to one peer."""
    return told_bytes(Status(0, 1_000_000, STEPS))


# -- blobs ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def fetch_bytes(size: int) -> int:
    """What fetching a blob from whoever has it costs beyond its bytes: the list of digests, requests, frames."""
    ref = ref_of(size)
    requests = sum(_request_bytes([index]) for index in range(ref.chunks))
    return _request_bytes([]) + _list_bytes(ref) + requests + _frames_bytes(ref)


@lru_cache(maxsize=256)
def direct_bytes(size: int) -> int:
    """The same from the one who made it, in one go and without a list: how vectors travel between who mix."""
    ref = ref_of(size)
    return _request_bytes(list(range(ref.chunks))) + _frames_bytes(ref)


def _request_bytes(chunks: list[int]) -> int:
    return pb.BlobRequest(run_id=RUN_ID, digest=DIGEST, chunks=chunks).ByteSize()


def _list_bytes(ref: BlobRef) -> int:
    return len(encode_chunk(DIGEST_LIST, b"\xa5" * (ref.chunks * DIGEST_BYTES)))


def _frames_bytes(ref: BlobRef) -> int:
    """Of all chunks: their indices and lengths."""
    spans = [ref.span(index) for index in range(ref.chunks)]
    return sum(
        pb.BlobChunk(index=index).ByteSize() + 1 + -(-(stop - start).bit_length() // 7)
        for index, (start, stop) in enumerate(spans)
    )


@lru_cache(maxsize=256)
def news_bytes(size: int) -> int:
    """What one watcher is told of a blob that arrives here: of every chunk by itself, as on slow lines; then of all."""
    parts = [pb.Holding(digest=DIGEST, chunks=[index]) for index in range(ref_of(size).chunks)]
    whole = [pb.Holding(digest=DIGEST, all=True)]
    return sum(pb.Holdings(holdings=[item]).ByteSize() for item in [*parts, *whole])


@lru_cache(maxsize=1)
def own_news_bytes() -> int:
    """What one watcher is told of a blob that was made here."""
    return pb.Holdings(holdings=[pb.Holding(digest=DIGEST, all=True)]).ByteSize()


# -- mixing -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def parcel_bytes(payload_bytes: int, *, copies: bool) -> int:
    """Of one parcel's note, and of the receipt for it. `copies`: whether it names the edge's copy that it changes."""
    parcel = Parcel(ROUND, 0, 1, 1, ROUND, Amount(MASS, DIGEST))
    note = Note(0, 1, parcel, ref_of(payload_bytes), DIGEST if copies else b"")
    return told_bytes(note) + told_bytes(Note(0, 0, Receipt(ROUND, 0, 2, (), ())))


@lru_cache(maxsize=64)
def offer_bytes(payload_bytes: int) -> int:
    """Of one offer's note."""
    return told_bytes(Note(0, 1, Offer(TOTAL, 1.0), ref_of(payload_bytes)))


@lru_cache(maxsize=1024)
def account_bytes(partners: int, fragments: int, *, ledgers: bool) -> int:
    """Of the account of a mixing with so many partners; pairs keep no ledgers. It grows by the same for every partner
    (a test)."""
    if not ledgers:
        return _account_bytes(0, fragments, ledgers=False)
    none, one = (_account_bytes(count, fragments, ledgers=True) for count in (0, 1))
    return none + partners * (one - none)


@lru_cache(maxsize=64)
def _account_bytes(partners: int, fragments: int, *, ledgers: bool) -> int:
    me = identity_of(0).peer_id
    peers: list[PeerId] = [identity_of(number).peer_id for number in range(1, partners + 1)]
    tally = Tally(1, MASS)
    out = {peer: Outgoing(ROUND, next_seq=1, settled=tally) for peer in peers}
    into = {peer: Incoming(ROUND, low=1, counted=tally) for peer in peers}
    ledger = Ledger(me, Terms(), ROUND, Fraction(1), out=out, into=into) if ledgers else None
    book = Book(ledger, MASS, Totals(started=TOTAL, held=TOTAL, magnitude=TOTAL))
    return len(Account(me, 0, ROUND, (book,) * fragments).canonical_bytes)
