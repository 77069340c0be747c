"""An account that says something else than what happened is found, and the right members are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
from mixing_masses import Setting, audited, masses_in, push_world
from mixing_world import CALM, ROUND, STORM, World, members_of

from farflung.protocol.errors import LocalError
from farflung.protocol.identity import PeerId
from farflung.protocol.ledger.amounts import Tally
from farflung.protocol.ledger.books import Ledger
from farflung.protocol.ledger.saved import encode_ledger
from farflung.protocol.mixing.account import Account, Book, Totals
from farflung.protocol.mixing.auditing import MassAudit, audit_accounts

Accounts = dict[PeerId, Account]


def accounts_of(world: World) -> Accounts:
    return {member.me: member.account for member in masses_in(world) if member.account is not None}


SETTING = Setting(n=4, graph="complete", ticks=2, fragments=2, weight=lambda index, part: 1.0 + index)
CLOSED = accounts_of(push_world(5, CALM, SETTING).run())
ONE, TWO, *REST = members_of(4)


def with_book(part: int, change: Callable[[Book], Book], peer: PeerId = ONE) -> Accounts:
    """The accounts of a calm round, one book of one of them changed."""
    books = list(CLOSED[peer].books)
    books[part] = change(books[part])
    return {**CLOSED, peer: replace(CLOSED[peer], books=tuple(books))}


def with_ledger(change: Callable[[Ledger], Ledger]) -> Callable[[Book], Book]:
    def changed(book: Book) -> Book:
        ledger = book.ledger
        assert ledger is not None
        return replace(book, ledger=change(replace(ledger, out=dict(ledger.out), into=dict(ledger.into))))

    return changed


def settled_of(ledger: Ledger, tally: Callable[[Tally], Tally]) -> Ledger:
    ledger.out[TWO] = replace(ledger.out[TWO], settled=tally(ledger.out[TWO].settled))
    return ledger


def counted_of(ledger: Ledger, tally: Callable[[Tally], Tally]) -> Ledger:
    ledger.into[TWO] = replace(ledger.into[TWO], counted=tally(ledger.into[TWO].counted))
    return ledger


EXTRA = Fraction(1, 1 << 20)
TAMPERED: dict[str, tuple[Callable[[Book], Book], tuple[PeerId, ...], str]] = {
    "holds more": (lambda book: replace(book, weight=book.weight + EXTRA), (ONE,), "its books say"),
    "holds less": (lambda book: replace(book, weight=book.weight - EXTRA), (ONE,), "its books say"),
    "began with more": (with_ledger(lambda own: replace(own, opened=own.opened + 1)), (ONE,), "its books say"),
    "a settled parcel is missing": (
        with_ledger(lambda own: settled_of(own, lambda tally: Tally(tally.count - 1, tally.mass))),
        (ONE, TWO),
        "left the one",
    ),
    "settled mass is missing": (
        with_ledger(lambda own: settled_of(own, lambda tally: replace(tally, mass=tally.mass - EXTRA))),
        (ONE, TWO),
        "left the one",
    ),
    "counted too much": (
        with_ledger(lambda own: counted_of(own, lambda tally: replace(tally, mass=tally.mass + EXTRA))),
        (TWO, ONE),
        "reached the other",
    ),
    "counted twice": (
        with_ledger(lambda own: counted_of(own, lambda tally: Tally(tally.count + 1, tally.mass))),
        (TWO, ONE),
        "reached the other",
    ),
}


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("what", TAMPERED)
def test_one_changed_number_is_found_and_its_members_are_named(what, part):
    change, members, words = TAMPERED[what]
    accounts = with_book(part, change)
    found = audit_accounts(accounts)
    named = [item for item in found.discrepancies if words in item.why]
    assert [item.members for item in named] == [members]
    for peer in members:
        ledger = accounts[peer].books[part].ledger
        assert ledger is not None
        with pytest.raises(LocalError, match=f"round {ROUND}") as error:
            found.require(peer)
        assert encode_ledger(ledger).decode() in str(error.value)
        assert all(peer.short in str(error.value) for peer in members)


@pytest.mark.parametrize("what", ["a settled parcel is missing", "counted twice"])
def test_who_has_no_part_in_it_goes_on(what):
    found = audit_accounts(with_book(0, TAMPERED[what][0]))
    for peer in REST:
        found.require(peer)


@pytest.mark.parametrize(
    "totals",
    [
        lambda totals: replace(totals, started=totals.started + 0.01 * totals.magnitude),
        lambda totals: replace(totals, held=totals.held - 0.01 * totals.magnitude),
    ],
)
def test_numerators_that_do_not_add_up_are_found_and_concern_everybody(totals):
    found = audit_accounts(with_book(1, lambda book: replace(book, totals=totals(book.totals))))
    (item,) = found.discrepancies
    assert item.members == tuple(sorted(CLOSED))
    assert "numerators" in item.why
    assert 1e-4 < found.error < 1e-2
    for peer in CLOSED:
        with pytest.raises(LocalError, match="numerators"):
            found.require(peer)


def test_rounding_of_fp32_is_not_a_discrepancy():
    found = audit_accounts(
        with_book(0, lambda book: replace(book, totals=replace(book.totals, held=book.totals.held * (1 + 2e-7))))
    )
    assert not found.discrepancies
    assert 0 < found.error < 1e-6


def test_what_is_adrift_and_was_counted_all_the_same_is_not_counted_twice():
    """A receipt was lost until the end: its sender's books say that it is adrift, its receiver holds it."""
    world = push_world(1, CALM, Setting(n=2, weight=lambda index, part: 1.0))
    lost = world.members[0].me
    world.drop = lambda sender, receiver, note: receiver == lost and type(note.content).__name__ == "Receipt"
    world.run()
    sender, receiver = masses_in(world)
    assert sender.account is not None
    (item,) = sender.account.books[0].totals.adrift
    assert item.peer == receiver.me
    assert item.total != 0
    assert audited(world).limbo == 0


def test_what_is_adrift_and_was_never_counted_is_in_limbo():
    world = push_world(1, CALM, Setting(n=2, weight=lambda index, part: 1.0))
    deaf = world.members[1].me
    world.drop = lambda sender, receiver, note: receiver == deaf and type(note.content).__name__ in ("Parcel", "Fence")
    world.run()
    found = audited(world)
    assert found.limbo == pytest.approx(0.25)
    assert found.unseen == ()


def test_lost_accounts_leave_what_can_be_compared_compared():
    """Without one member's account the sums are not judged; a lie between two others is still found."""
    some = {peer: account for peer, account in CLOSED.items() if peer != REST[0]}
    found = audit_accounts(some)
    assert (found.unseen, found.discrepancies, found.error, found.members) == ((REST[0],), (), 0.0, 3)
    lying = with_book(0, TAMPERED["counted too much"][0])
    del lying[REST[0]]
    assert {item.members for item in audit_accounts(lying).discrepancies} >= {(TWO, ONE)}
    old = {**CLOSED, REST[0]: replace(CLOSED[REST[0]], round_index=ROUND - 1)}
    assert audit_accounts(old).unseen == (REST[0],)
    away = {**CLOSED, REST[0]: Account(REST[0], 1, why="was away")}
    assert audit_accounts(away).unseen == (REST[0],)


def test_books_of_another_number_of_fragments_are_their_members_fault():
    accounts = {**CLOSED, ONE: replace(CLOSED[ONE], books=CLOSED[ONE].books[:1])}
    found = audit_accounts(accounts)
    assert [item.members for item in found.discrepancies] == [(ONE,)]
    assert found.unseen == (ONE,)
    found.require(TWO)
    with pytest.raises(LocalError, match="fragments"):
        found.require(ONE)


def test_nothing_to_compare_is_no_error():
    assert audit_accounts({}) == MassAudit(0, 0, 0.0, 0.0, (), ())
    assert audit_accounts({ONE: Account(ONE, 0)}) == MassAudit(0, 0, 0.0, 0.0, (), ())


def test_pairs_say_by_how_much_their_mean_moved():
    def account(peer: PeerId, began: float, ended: float) -> Account:
        return Account(peer, 0, ROUND, (Book(None, Fraction(1), Totals(began, ended, 4.0)),))

    still = audit_accounts({ONE: account(ONE, 1.0, 2.0), TWO: account(TWO, 3.0, 2.0)})
    assert still == MassAudit(ROUND, 2, 0.0, 0.0, (), ())
    moved = audit_accounts({ONE: account(ONE, 1.0, 2.0), TWO: account(TWO, 3.0, 3.0)})
    assert moved.error == 1.0 / 8
    assert not moved.discrepancies


def test_storms_leave_nothing_to_find():
    seen = 0
    for seed in range(20):
        world = push_world(seed, STORM, SETTING).run()
        seen += not audited(world).unseen
    assert seen > 3
