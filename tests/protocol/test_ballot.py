"""Votes of one view make a certificate, a promise is kept for ever, and a bound proposer repeats what may be chosen."""

from __future__ import annotations

import pytest
from forge import PAYLOAD_BYTES_MAX, STATE, Run
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.protocol.ballot import VIEWS_AHEAD_MAX, Ballot
from farflung.protocol.certificate import check_certificate, vote_bytes
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.identity import Identity
from farflung.protocol.manifest import Manifest
from farflung.protocol.wire import Promise, Vote

RUN = Run(3)
A, B, C = RUN.identities
ONE = RUN.manifest()
OTHER = RUN.build(RUN.parent)
KEYS = {identity.peer_id: identity for identity in RUN.identities}


def ballot(me: Identity = A) -> Ballot:
    return Ballot(RUN.parent, me.peer_id)


def vote(who: Identity, view: int, manifest: Manifest = ONE, state: bytes = STATE) -> Vote:
    return Vote(view, manifest.digest, state, who.sign(vote_bytes(RUN.slot, view, manifest.digest, state)))


def hear(book: Ballot, who: Identity, view: int, manifest: Manifest = ONE, state: bytes = STATE) -> None:
    book.hear_vote(who.peer_id, vote(who, view, manifest, state))


def test_two_of_three_equal_votes_make_a_certificate():
    book = ballot()
    book.hear_proposal(book.proposer(0), 0, ONE)
    hear(book, B, 0)
    assert book.certificate() is None
    hear(book, C, 0)
    certificate = book.certificate()
    assert certificate is not None
    check_certificate(certificate, RUN.parent, RUN.genesis, payload_bytes_max=PAYLOAD_BYTES_MAX)


@pytest.mark.parametrize(
    "votes",
    [
        [(B, 0, ONE, STATE), (C, 1, ONE, STATE)],
        [(B, 0, ONE, STATE), (C, 0, OTHER, STATE)],
        [(B, 0, ONE, STATE), (C, 0, ONE, bytes(32))],
        [(B, 0, ONE, STATE), (B, 1, ONE, STATE), (C, 2, ONE, STATE)],
    ],
)
def test_votes_that_differ_in_anything_are_not_added_up(votes):
    book = ballot()
    for view, manifest in ((0, ONE), (1, OTHER), (2, ONE)):
        book.hear_proposal(book.proposer(view), view, manifest)
    for who, view, manifest, state in votes:
        hear(book, who, view, manifest, state)
    assert book.certificate() is None


def test_a_certificate_needs_the_manifest_and_any_order_will_do():
    book = ballot()
    hear(book, B, 0)
    hear(book, C, 0)
    assert book.certificate() is None
    book.hear_proposal(book.proposer(0), 0, ONE)
    assert book.certificate() is not None


def test_only_the_rightful_proposer_is_heard_and_only_once():
    book = ballot()
    right = book.proposer(0)
    wrong = next(who.peer_id for who in RUN.identities if who.peer_id != right)
    with pytest.raises(PeerError, match="proposes in view 0"):
        book.hear_proposal(wrong, 0, ONE)
    assert not book.proposals
    book.hear_proposal(right, 0, ONE)
    book.hear_proposal(right, 0, ONE)
    with pytest.raises(PeerError, match="equivocation"):
        book.hear_proposal(right, 0, OTHER)
    assert book.proposals == {0: ONE}


def test_votes_are_refused_unless_a_voter_signed_one_per_view():
    book = ballot()
    stranger = Identity(b"z" * 32)
    with pytest.raises(PeerError, match="without being a voter"):
        book.hear_vote(stranger.peer_id, vote(stranger, 0))
    with pytest.raises(PeerError, match="wrong signature"):
        book.hear_vote(B.peer_id, vote(C, 0))
    hear(book, B, 0)
    hear(book, B, 0)
    with pytest.raises(PeerError, match="equivocation"):
        hear(book, B, 0, OTHER)
    with pytest.raises(PeerError, match="equivocation"):
        hear(book, B, 0, state=bytes(32))
    hear(book, B, 1, OTHER)
    with pytest.raises(PeerError, match="view"):
        hear(book, C, VIEWS_AHEAD_MAX + 1)
    assert len(book.votes) == 2


def test_a_promise_ends_voting_in_earlier_views_for_good():
    book = ballot()
    book.enter_view(2)
    assert not book.may_vote(1)
    assert book.may_vote(2)
    with pytest.raises(LocalError):
        book.cast(1, ONE, STATE)
    with pytest.raises(LocalError):
        book.enter_view(2)
    book.cast(2, ONE, STATE)
    assert not book.may_vote(2)
    assert book.enter_view(5) == Promise(5, (2, ONE))


def test_a_later_proposer_is_bound_to_the_latest_vote_it_was_told_of():
    book = ballot()
    book.hear_promise(A.peer_id, Promise(3, None))
    assert not book.has_promises(3)
    book.hear_promise(B.peer_id, Promise(3, (0, OTHER)))
    assert book.has_promises(3)
    assert book.bound_manifest(3) == OTHER
    book.hear_promise(C.peer_id, Promise(3, (2, ONE)))
    assert book.bound_manifest(3) == ONE
    assert book.bound_manifest(2) is None


def test_impossible_promises_are_refused():
    book = ballot()
    for who, promise in (
        (Identity(b"z" * 32), Promise(1, None)),
        (B, Promise(1, (1, ONE))),
        (B, Promise(VIEWS_AHEAD_MAX + 1, None)),
    ):
        with pytest.raises(PeerError):
            book.hear_promise(who.peer_id, promise)
    book.hear_promise(B.peer_id, Promise(1, (0, ONE)))
    book.hear_promise(B.peer_id, Promise(1, None))
    assert book.bound_manifest(1) == ONE, "a promise is not taken back"


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12))
def test_a_voter_never_votes_twice_in_a_view_nor_before_its_promise(acts):
    book, cast, promised = ballot(), [], 0
    for view, votes in acts:
        if votes and book.may_vote(view):
            book.cast(view, ONE, STATE)
            cast.append(view)
            assert view >= promised
        elif not votes and view > book.view:
            assert book.enter_view(view).voted == ((cast[-1], ONE) if cast else None)
            promised = view
    assert cast == sorted(set(cast))
