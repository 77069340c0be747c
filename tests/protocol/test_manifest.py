"""Nobody can forge a manifest or a certificate, choose the next members, or make two quorums that do not meet."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from forge import PAYLOAD_BYTES_MAX, STATE, Run
from protocol_world import SECRET, make_identity

from farflung.protocol import limits
from farflung.protocol.blob import BlobRef
from farflung.protocol.certificate import check_certificate, decode_certificate
from farflung.protocol.errors import PeerError
from farflung.protocol.manifest import (
    Manifest,
    Member,
    check_manifest,
    decode_manifest,
    is_quorum,
    longest_standing,
    proposer_order,
)
from farflung.protocol.statements import JoinRequest

RUN = Run(4)
GOOD = RUN.manifest()
STRANGER = make_identity(77)


def check(manifest: Manifest, run: Run = RUN, secret: bytes | None = SECRET) -> None:
    check_manifest(
        manifest,
        run.parent,
        run.genesis,
        payload_bytes_max=PAYLOAD_BYTES_MAX,
        recent_tips=[run.first.manifest.digest, run.parent.digest],
        secret=secret,
    )


def test_a_sound_manifest_is_accepted_and_comes_back():
    check(GOOD)
    check(RUN.build(RUN.parent), RUN)
    assert decode_manifest(GOOD.canonical_bytes) == GOOD
    assert len(GOOD.payloads) == 3
    late = RUN.join(STRANGER, RUN.first.manifest.digest)
    grown = RUN.build(RUN.parent, joined=[late], left=[RUN.leave(RUN.identities[2])])
    check(grown)
    assert STRANGER.peer_id in grown.member_of
    assert RUN.identities[2].peer_id not in grown.member_of


def forged() -> dict[str, Manifest]:
    announce, leave, build, parent = RUN.announce, RUN.leave, RUN.build, RUN.parent
    one, two = RUN.identities[1], RUN.identities[2]
    huge = BlobRef(bytes(32), PAYLOAD_BYTES_MAX + 1, 1 << 20)
    wrong_secret = JoinRequest.make(RUN.genesis.run_id, STRANGER.public_key, parent.digest, b"guess", STRANGER.sign)
    no_secret = JoinRequest.make(RUN.genesis.run_id, STRANGER.public_key, parent.digest, b"", STRANGER.sign)
    other_run = Run(4, name="another")
    members = {member.peer_id: member for member in GOOD.members}
    promoted = replace(members[one.peer_id], since=0)
    return {
        "another parent": replace(GOOD, parent=bytes(32)),
        "another round": replace(GOOD, round_index=3),
        "another run": replace(GOOD, run_id=bytes(20)),
        "a proposer who is nobody": build(parent, proposer=STRANGER),
        "no proposer": replace(GOOD, proposer=None),
        "a missing member": replace(GOOD, members=GOOD.members[1:]),
        "an extra member": replace(GOOD, members=(*GOOD.members, Member(STRANGER.public_key, 3, 0, True))),
        "a member made older": replace(
            GOOD, members=tuple(promoted if m.peer_id == one.peer_id else m for m in GOOD.members)
        ),
        "an absence forgotten": replace(
            build(parent, announcements=[announce(one, b"x")]), members=build(parent, announcements=[]).members
        ),
        "training that did not start": replace(GOOD, started=not GOOD.started),
        "an announcement twice": replace(GOOD, announcements=(GOOD.announcements[0], *GOOD.announcements)),
        "announcements out of order": replace(GOOD, announcements=GOOD.announcements[::-1]),
        "a stranger's announcement": build(parent, announcements=[announce(STRANGER, b"x")]),
        "an announcement with another's signature": build(
            parent, announcements=[replace(announce(one, b"x"), signature=announce(two, b"x").signature)]
        ),
        "an announcement of another run": build(parent, announcements=[other_run.announce(one, b"x")]),
        "a changed weight": build(parent, announcements=[replace(announce(one, b"x"), steps=6)]),
        "a payload too large": build(parent, announcements=[announce(one, b"x", payload=huge)]),
        "a payload of no steps": build(parent, announcements=[announce(one, b"x", steps=0)]),
        "an abstention with steps": build(parent, announcements=[announce(one, steps=3)]),
        "a join without the secret": build(parent, joined=[no_secret]),
        "a join with a wrong secret": build(parent, joined=[wrong_secret]),
        "a join with an old tip": build(parent, joined=[RUN.join(STRANGER, bytes(32))]),
        "a join of a member": build(parent, joined=[RUN.join(one, parent.digest)]),
        "a join with another's signature": build(
            parent, joined=[replace(RUN.join(STRANGER, parent.digest), signature=bytes(64))]
        ),
        "a leave of a stranger": build(parent, left=[leave(STRANGER)]),
        "a leave nobody signed": build(parent, left=[replace(leave(one), signature=bytes(64))]),
        "a leave of another round": build(parent, left=[other_run.leave(one)]),
    }


@pytest.mark.parametrize("what", forged())
def test_a_forged_manifest_is_refused(what):
    manifest = forged()[what]
    assert manifest.digest != GOOD.digest
    with pytest.raises(PeerError):
        check(manifest)


def test_a_crowd_cannot_be_admitted_at_once():
    crowd = [make_identity(100 + at) for at in range(limits.JOINS_PER_ROUND_MAX + 1)]
    manifest = RUN.build(RUN.parent, joined=[RUN.join(identity, RUN.parent.digest) for identity in crowd])
    with pytest.raises(PeerError):
        check(manifest)


# -- certificates -----------------------------------------------------------------------------------------------------


def check_one(certificate, run: Run = RUN) -> None:
    check_certificate(certificate, run.parent, run.genesis, payload_bytes_max=PAYLOAD_BYTES_MAX)


def test_a_quorum_of_voters_makes_a_certificate_and_it_comes_back():
    certificate = RUN.certify(GOOD, RUN.identities[1:], view=3)
    check_one(certificate)
    assert decode_certificate(certificate.canonical_bytes) == certificate
    check_one(RUN.certify(GOOD, [RUN.identities[0], RUN.identities[3]]))  # half, with the longest-standing one
    check_certificate(RUN.first, None, RUN.genesis, payload_bytes_max=PAYLOAD_BYTES_MAX)


def forged_certificates():
    three = RUN.identities[1:]
    good = RUN.certify(GOOD, three)
    other = RUN.certify(GOOD, three, view=1)
    mixed = sorted([*good.signatures[:1], *other.signatures[1:]])
    return {
        "half without the longest-standing": RUN.certify(GOOD, RUN.identities[1:3]),
        "nobody's": replace(good, signatures=()),
        "one vote": RUN.certify(GOOD, RUN.identities[:1]),
        "a voter twice": replace(good, signatures=(good.signatures[0], good.signatures[0], good.signatures[1])),
        "votes out of order": replace(good, signatures=good.signatures[::-1]),
        "a stranger's vote": RUN.certify(GOOD, [*three, STRANGER]),
        "a stranger's vote instead": RUN.certify(GOOD, [*RUN.identities[1:3], STRANGER]),
        "another state": replace(good, state_digest=bytes(32)),
        "another view": replace(good, view=1),
        "votes of two views": replace(good, signatures=tuple(mixed)),
        "a signature of zeros": replace(good, signatures=tuple((who, bytes(64)) for who, _ in good.signatures)),
        "signatures exchanged": replace(
            good,
            signatures=tuple(
                (who, sign) for (who, _), (_, sign) in zip(good.signatures, good.signatures[::-1], strict=True)
            ),
        ),
        "another manifest": replace(good, manifest=RUN.build(RUN.parent)),
        "a forged manifest": RUN.certify(replace(GOOD, members=GOOD.members[1:]), RUN.identities),
        "the parent's": RUN.certify(RUN.parent, RUN.identities),
    }


@pytest.mark.parametrize("what", forged_certificates())
def test_a_forged_certificate_is_refused(what):
    with pytest.raises(PeerError):
        check_one(forged_certificates()[what])


def test_the_first_certificate_is_the_founders_own():
    stranger_first = Run(1, name="theirs").first
    wrong_state = replace(RUN.first, state_digest=STATE)
    by_somebody = RUN.certify(RUN.first.manifest, [STRANGER], state=RUN.genesis.state_digest)
    for certificate in (stranger_first, wrong_state, by_somebody, replace(RUN.first, signatures=())):
        with pytest.raises(PeerError):
            check_certificate(certificate, None, RUN.genesis, payload_bytes_max=PAYLOAD_BYTES_MAX)


# -- quorums and turns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("spread", [False, True])
def test_any_two_quorums_share_a_voter(n, spread):
    voters = [Member(make_identity(at).public_key, at if spread else 0, 0, True) for at in range(n)]
    ids = [member.peer_id for member in voters]
    quorums = [frozenset(some) for size in range(n + 1) for some in combinations(ids, size) if is_quorum(voters, some)]
    assert frozenset(ids) in quorums
    assert all(one & other for one in quorums for other in quorums)
    assert all(2 * len(one) >= n for one in quorums)
    majorities = [frozenset(some) for some in combinations(ids, n // 2 + 1)]
    assert set(majorities) <= set(quorums), "more than half always suffices"


def test_strangers_do_not_count_and_nobody_is_no_quorum():
    voters = [Member(make_identity(at).public_key, 0, 0, True) for at in range(3)]
    assert not is_quorum(voters, {make_identity(at).peer_id for at in range(5, 12)})
    assert not is_quorum([], set())
    assert longest_standing([]) is None


def test_everybody_has_a_turn_and_the_silent_come_last():
    assert sorted(proposer_order(RUN.parent)) == sorted(member.peer_id for member in RUN.parent.voters)
    silent = RUN.identities[2]
    spoke = [RUN.announce(who, b"%d" % at) for at, who in enumerate(RUN.identities) if who is not silent]
    assert proposer_order(RUN.build(RUN.parent, announcements=spoke))[-1] == silent.peer_id
    orders = {proposer_order(Run(4, name=f"run {at}").parent)[0] for at in range(30)}
    assert len(orders) == 4, "the first turn moves round"


def test_a_silent_member_is_left_out_after_the_limit_and_the_last_voter_never():
    run = Run(3)
    manifest, silent = run.parent, run.identities[2]
    for _ in range(limits.ABSENT_ROUNDS_MAX):
        assert silent.peer_id in manifest.member_of
        run.slot = replace(run.slot, round_index=manifest.round_index + 1, parent=manifest.digest)
        manifest = run.build(manifest, announcements=[run.announce(who, b"x") for who in run.identities[:2]])
    assert silent.peer_id not in manifest.member_of
    run = Run(2)
    gone = run.build(run.parent, left=[run.leave(who) for who in run.identities])
    assert list(gone.member_of) == [run.identities[0].peer_id]
    assert gone.voters
