"""What a member says of its last mixing: its books when it closed them, and what it really held then.

An account is the payload of the member's next announcement, so a certificate says whose accounts were seen, and
applying it is checking that all mass is there. It may also name a new reference: the state that offsets are measured
from. Canonical text; a few hundred bytes per partner.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from farflung.protocol import limits
from farflung.protocol.blob import DIGEST_BYTES, BlobRef
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import PeerError
from farflung.protocol.identity import PeerId
from farflung.protocol.ledger.amounts import from_text, to_text
from farflung.protocol.ledger.books import Ledger, Terms
from farflung.protocol.ledger.saved import decode_ledger, encode_ledger
from farflung.protocol.mixing.notes import real, ref_from_json, ref_to_json
from farflung.protocol.mixing.settings import FRAGMENTS_MAX
from farflung.protocol.statements import from_hex, natural

ACCOUNT_BYTES_MAX = 1 << 18
"""Of one account: 8 fragments of 64 partners at 400 bytes are 0.2 MB; an ordinary one has 1 kB."""

WHY_CHARS_MAX = 200

TOTAL_ABS_MAX = 1e30
"""Of one fragment's numerator: a trillion coordinates of a million each, with a weight of a million, are 1e24."""


class Adrift(NamedTuple):
    """A parcel of which its sender had no word when it closed its books, and Σ s of it."""

    peer: PeerId
    seq: int
    total: float


@dataclass(frozen=True, slots=True)
class Totals:
    """Of one fragment's numerator, over its coordinates, in fp64: what it began with, what it held at the end, Σ |s| at
    the beginning, by which errors are measured, and what was adrift, by peer and number: all that its ledger has in
    escrow."""

    started: float
    held: float
    magnitude: float
    adrift: tuple[Adrift, ...] = ()


@dataclass(frozen=True, slots=True)
class Book:
    """One fragment: the ledger, the weight that was really held, and the totals. Pairs have no ledger."""

    ledger: Ledger | None
    weight: Fraction
    totals: Totals


@dataclass(frozen=True, slots=True)
class Account:
    """`behind`: trained rounds that this member's parameters have missed. `round_index`: of the mixing that the books
    are of; 0: none. No books: it took no part in it, and `why` says so. `reference`: the state that this member
    offers as the new reference, until one is taken. `holds`: the digest of the offered reference that it has here."""

    member: PeerId
    behind: int
    round_index: int = 0
    books: tuple[Book, ...] = ()
    why: str = ""
    reference: BlobRef | None = None
    holds: bytes = b""

    @property
    def canonical_bytes(self) -> bytes:
        """One byte string per account."""
        return encode_canonical(
            {
                "behind": self.behind,
                "books": [_book_json(book) for book in self.books],
                "holds": self.holds.hex(),
                "member": str(self.member),
                "reference": None if self.reference is None else ref_to_json(self.reference),
                "round": self.round_index,
                "why": self.why,
            }
        )


def decode_account(data: bytes, terms: Terms) -> Account:
    """The inverse of `canonical_bytes`. `terms`: of the run's ledgers. Raises PeerError."""
    value = decode_canonical(data, bytes_max=ACCOUNT_BYTES_MAX)
    keys = {"behind", "books", "holds", "member", "reference", "round", "why"}
    if not isinstance(value, dict) or value.keys() != keys:
        raise PeerError("?", "a malformed account")
    books, why, ref = value["books"], value["why"], value["reference"]
    if not isinstance(books, list) or len(books) > FRAGMENTS_MAX:
        raise PeerError("?", "an account with malformed books")
    if not isinstance(why, str) or len(why) > WHY_CHARS_MAX or not why.isprintable():
        raise PeerError("?", f"an account whose reason is not {WHY_CHARS_MAX} printable characters")
    account = Account(
        member=PeerId.parse(str(value["member"])),
        behind=natural(value["behind"], "rounds missed"),
        round_index=natural(value["round"], "a round"),
        books=tuple(_book(book, terms) for book in books),
        why=why,
        reference=None if ref is None else ref_from_json(ref),
        holds=b"" if value["holds"] == "" else from_hex(value["holds"], "a digest", DIGEST_BYTES),
    )
    _check_books(account)
    if account.canonical_bytes != data:
        raise PeerError("?", "an account that is not in canonical form")
    return account


def _check_books(account: Account) -> None:
    """Raise PeerError unless all books are this member's, of the round that it names, and of one kind."""
    ledgers = [book.ledger for book in account.books if book.ledger is not None]
    if len(ledgers) not in (0, len(account.books)) or (account.books and not account.round_index):
        raise PeerError("?", "an account with books of no round, or of two kinds")
    for ledger in ledgers:
        if ledger.me != account.member or ledger.round_index != account.round_index or ledger.foreign:
            raise PeerError("?", "an account with somebody else's books, or of another round")
    for book in account.books:
        out = {} if book.ledger is None else book.ledger.out
        wanted = [(peer, item.seq) for peer in sorted(out) for item in out[peer].escrow]
        if [(item.peer, item.seq) for item in book.totals.adrift] != wanted:
            raise PeerError("?", "a book that does not say of every parcel without word what it carried")


def _book_json(book: Book) -> list[Any]:
    totals, ledger = book.totals, book.ledger
    text = None if ledger is None else encode_ledger(ledger).decode("ascii")
    numbers = [totals.started.hex(), totals.held.hex(), totals.magnitude.hex()]
    adrift = [[str(item.peer), item.seq, item.total.hex()] for item in totals.adrift]
    return [text, to_text(book.weight), numbers, adrift]


def _book(value: Any, terms: Terms) -> Book:
    if not isinstance(value, list) or len(value) != 4 or not isinstance(value[2], list) or len(value[2]) != 3:
        raise PeerError("?", "a malformed book")
    if not isinstance(value[3], list) or any(not isinstance(item, list) or len(item) != 3 for item in value[3]):
        raise PeerError("?", "a malformed list of what is adrift")
    text = value[0]
    if not (text is None or isinstance(text, str)):
        raise PeerError("?", "a ledger that is no text")
    ledger = None if text is None else decode_ledger(text.encode("utf-8", "replace"), terms)
    weight = from_text(value[1], limits.MASS_BITS_MAX)
    if weight < 0:
        raise PeerError("?", "a member that holds a negative mass")
    adrift = tuple(
        Adrift(PeerId.parse(str(peer)), natural(seq, "a sequence number"), _total(total))
        for peer, seq, total in value[3]
    )
    started, held, magnitude = map(_total, value[2])
    totals = Totals(started, held, magnitude, adrift)
    if totals.magnitude < 0:
        raise PeerError("?", f"a size below zero: {totals.magnitude}")
    return Book(ledger, weight, totals)


def _total(value: Any) -> float:
    number = real(value)
    if abs(number) > TOTAL_ABS_MAX:
        raise PeerError("?", f"an impossible total: {number}")
    return number
