"""Is all mass there? What the accounts of one round's mixing say together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from farflung.protocol.errors import LocalError
from farflung.protocol.identity import PeerId
from farflung.protocol.ledger.audit import Discrepancy, audit
from farflung.protocol.ledger.books import Ledger
from farflung.protocol.mixing.account import Account, Book, Totals

WEIGHT_TOLERANCE = Fraction(1, 10**9)
"""Weights are fp64 and move a few dozen times a round."""

NUMERATOR_TOLERANCE = 1e-5
"""Σ s of fp32 numerators, against Σ |s|: K ticks with k messages each round by K k 2**-24 of it at most."""


@dataclass(frozen=True, slots=True)
class MassAudit:
    """`error`: the larger of what the weights and the numerators are off by, relative; 0 if nothing could be compared.

    `limbo`: the part of all weight that nobody held when the books were closed. `unseen`: partners whose accounts are
    missing; the sums over everybody are not judged then, only each member's own books and both ends of every edge.
    """

    round_index: int
    members: int
    error: float
    limbo: float
    unseen: tuple[PeerId, ...]
    discrepancies: tuple[Discrepancy, ...]

    def require(self, me: PeerId) -> None:
        """Raise LocalError, with both ledgers of every discrepancy that involves this member: it then stops."""
        mine = [item for item in self.discrepancies if me in item.members]
        if mine:
            text = "\n".join(map(str, mine))
            raise LocalError(f"mass is not conserved in the mixing of round {self.round_index}\n{text}")


def audit_accounts(accounts: Mapping[PeerId, Account]) -> MassAudit:
    """Compare the accounts of the latest mixing among them; earlier ones, and empty ones, count as unseen.

    So do accounts of fewer or more fragments than most have, which is a discrepancy. Costs O(edges x fragments).
    """
    latest = max((account.round_index for account in accounts.values()), default=0)
    seen = {peer: accounts[peer] for peer in sorted(accounts) if _is_of(accounts[peer], latest)}
    counts = [len(account.books) for account in seen.values()]
    fragments = max(counts, key=lambda count: (counts.count(count), count), default=0)
    found = [
        Discrepancy((peer,), f"has {len(account.books)} fragments, others have {fragments}", ())
        for peer, account in seen.items()
        if len(account.books) != fragments
    ]
    seen = {peer: account for peer, account in seen.items() if len(account.books) == fragments}
    error, limbo, opened = 0.0, Fraction(0), Fraction(0)
    unseen: dict[PeerId, None] = {}
    for part in range(fragments):
        books = {peer: account.books[part] for peer, account in seen.items()}
        ledgers = {peer: book.ledger for peer, book in books.items() if book.ledger is not None}
        if not ledgers:
            error = max(error, _drift([book.totals for book in books.values()], 0.0))
            continue
        result = audit(ledgers, {peer: books[peer].weight for peer in ledgers}, WEIGHT_TOLERANCE)
        found += result.discrepancies
        unseen |= dict.fromkeys(result.unseen)
        limbo, opened = limbo + result.limbo, opened + result.opened
        if not result.unseen:
            drift = _drift([books[peer].totals for peer in ledgers], _adrift(books, ledgers))
            error = max(error, float(abs(result.error) / max(result.opened, Fraction(1))), drift)
            if drift > NUMERATOR_TOLERANCE:
                why = f"numerators are off by {drift:.3g} of their size"
                found.append(Discrepancy(tuple(ledgers), why, ()))
    share = float(limbo / opened) if opened else 0.0
    return MassAudit(latest, len(seen), error, share, tuple(sorted(unseen)), tuple(found))


def _is_of(account: Account, round_index: int) -> bool:
    return bool(account.books) and account.round_index == round_index


def _adrift(books: Mapping[PeerId, Book], ledgers: Mapping[PeerId, Ledger]) -> float:
    """Σ s of what its sender had no word of and its receiver has not counted."""
    left = []
    for peer in sorted(ledgers):
        for item in books[peer].totals.adrift:
            heard = ledgers[item.peer].into.get(peer) if item.peer in ledgers else None
            if heard is None or heard.receipt.decided(item.seq) is not True:
                left.append(item.total)
    return math.fsum(left)


def _drift(totals: list[Totals], adrift: float) -> float:
    """By how much Σ s changed between the beginning and the end, relative to Σ |s|; what is adrift is still there."""
    began = math.fsum(item.started for item in totals)
    ended = math.fsum([adrift, *(item.held for item in totals)])
    size = math.fsum(item.magnitude for item in totals)
    return 0.0 if began == ended else abs(ended - began) / size if size else math.inf
