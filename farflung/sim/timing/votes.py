"""How a round is closed and certified: the proposer's deadline, views, votes. The rules of `protocol/round.py`.

What matters for large models: a voter applies a proposal on trial before it votes, and a view lasts as long as
certificates took lately, at first `view_floor_ms`, doubled with every view. A view that ends before anybody has voted
makes a new manifest, and what was applied for the old one is done in vain; once somebody has voted, the manifest stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.protocol.limits import VIEW_DOUBLINGS_MAX
from farflung.sim.rng import stream
from farflung.sim.timing.collectives import collective_s
from farflung.sim.timing.swarm import Swarm
from farflung.sim.timing.trace import Voting

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

VIEWS_MAX = 64
"""Proposers that may fail one after the other in a round; then the run has lost its quorum."""

PROMISE_FLIGHTS = 2
"""A later view's proposer first hears promises, which others make when they hear of the view."""


class Stuck(Exception):
    """No certificate can come about any more."""


class Heard(NamedTuple):
    """What members know of each other's payloads in a round."""

    origin_k: Integers
    heard_kn: Floats
    """When each member has each payload, checked; for a collective, when it was announced there."""
    silent_n: Floats
    """Until when members without a payload are waited for; inf: to the end; -inf: not at all."""
    speak_n: Floats
    """Everybody's adaptive deadline, from when it entered the round."""


@dataclass(frozen=True)
class _Attempt:
    """One manifest on its way to a certificate."""

    proposer: int
    closed_s: float
    proposed_s: float
    listed_k: NDArray[np.bool_]
    proposal_n: Floats
    begun_n: Floats
    staged_n: Floats
    voted_n: Floats


def quorum_since(swarm: Swarm, heard_kn: Floats) -> Floats:
    """When each member held a quorum of payloads (`genesis.quorum_percent` of the members)."""
    need = -(-int(swarm.member_n.sum()) * swarm.run.quorum_percent // 100)
    if len(heard_kn) < need:
        return np.full(swarm.n, np.inf)
    since_n: Floats = np.partition(heard_kn, need - 1, axis=0)[need - 1]
    return since_n


def agree(swarm: Swarm, index: int, entered_n: Floats, heard: Heard) -> Voting:
    """From payloads to everybody's certificate. Raises Stuck.

    Where applying takes longer than the longest view, this version's nodes would change views for ever. Such a round is
    marked `hopeless` and played as if `view_floor_ms` left time to apply twice.
    """
    if len(heard.origin_k) == 0:
        raise Stuck("nobody has anything to say any more")
    closing_n, grace_n, all_n = _closing(swarm, entered_n, heard)
    patience_n = np.array([pace.certify.value_s for pace in swarm.pace])
    found = _attempts(swarm, index, entered_n, heard, closing_n, all_n, patience_n)
    hopeless = found is None
    if found is None:
        patience_n = np.maximum(patience_n, 2 * swarm.charges.apply_s(len(heard.origin_k)))
        found = _attempts(swarm, index, entered_n, heard, closing_n, all_n, patience_n)
    if found is None:
        raise Stuck(f"no proposer of {VIEWS_MAX} had the time it took")
    attempt, views = found
    certified_n, deciding_n = _certify(swarm, entered_n, attempt.voted_n)
    closed_s, proposer = attempt.closed_s, attempt.proposer
    why = "all" if closed_s >= all_n[proposer] else "grace" if closed_s >= grace_n[proposer] else "deadline"
    return Voting(
        closed_s=closed_s,
        why=why,
        proposer=proposer,
        proposed_s=attempt.proposed_s,
        views=views,
        closing_n=closing_n,
        all_n=all_n,
        listed_k=attempt.listed_k,
        proposal_n=attempt.proposal_n,
        begun_n=attempt.begun_n,
        staged_n=attempt.staged_n,
        voted_n=attempt.voted_n,
        certified_n=certified_n,
        deciding_n=deciding_n,
        hopeless=hopeless,
    )


def _closing(swarm: Swarm, entered_n: Floats, heard: Heard) -> tuple[Floats, Floats, Floats]:
    """When each member would close the round; when grace is over; when all had spoken there (`closing_time`)."""
    heard_kn, silent_n = heard.heard_kn, heard.silent_n
    absent = bool(np.isposinf(silent_n).any())
    all_n = np.full(swarm.n, np.inf) if absent else np.maximum(heard_kn.max(axis=0), silent_n.max())
    grace_n = quorum_since(swarm, heard_kn) + swarm.run.grace_s
    first_n = heard_kn.min(axis=0)
    closing_n = np.minimum(all_n, np.maximum(first_n, np.minimum(grace_n, entered_n + heard.speak_n)))
    return np.maximum(closing_n, entered_n), grace_n, all_n


def _attempts(
    swarm: Swarm,
    index: int,
    entered_n: Floats,
    heard: Heard,
    closing_n: Floats,
    all_n: Floats,
    patience_n: Floats,
) -> tuple[_Attempt, int] | None:
    """Proposals, view by view, until one has the time it takes: it and its view. None: none ever will."""
    voters = np.flatnonzero(swarm.member_n)
    order = voters[stream(swarm.seed, "proposer", index).permutation(len(voters))]
    order = order[np.argsort(swarm.absent_n[order] > 0, kind="stable")]
    patience_v = patience_n[voters]
    waiting_s, flight_s = float(closing_n[voters].min()), float(swarm.between.one_way_mm.max())
    attempt, bound, turn_s, free_n = None, False, -math.inf, np.full(swarm.n, -np.inf)
    for view in range(VIEWS_MAX):
        stretch = 2.0 ** min(view, VIEW_DOUBLINGS_MAX)
        proposer = int(order[view % len(order)])
        due_s = turn_s + PROMISE_FLIGHTS * flight_s
        due_s = max(due_s, -math.inf if bound else float(closing_n[proposer]))
        end_s = max(waiting_s, turn_s) + float(patience_v.min()) * stretch
        if math.isfinite(due_s) and due_s <= end_s and _is_there(swarm, proposer, due_s):
            if attempt is not None and bound:
                attempt = _again(swarm, attempt, proposer, due_s)
            else:
                attempt = _propose(swarm, entered_n, heard, proposer, due_s, all_n, free_n)
            end_v = np.maximum(closing_n[voters], attempt.proposal_n[voters]) + patience_v * stretch
            end_s = float(end_v.min())
            needed_s = _quorum_s(swarm, entered_n, attempt.voted_n)
            if needed_s + flight_s <= end_s or swarm.run.exchange != "gather":
                return attempt, view
            bound = bound or float(attempt.voted_n[voters].min()) <= end_s
            apply_s = swarm.charges.apply_s(int(attempt.listed_k.sum()))
            if not bound and view >= VIEW_DOUBLINGS_MAX and apply_s > float(patience_v.min()) * stretch:
                return None
            free_n = np.where(attempt.begun_n < end_s, attempt.staged_n, -np.inf)
        turn_s = end_s
        if math.isinf(turn_s):
            break
    if attempt is None:
        raise Stuck("nobody is left to close the round")
    if math.isinf(_quorum_s(swarm, entered_n, attempt.voted_n)):
        raise Stuck("too few voters are left for a certificate")
    return None


def _is_there(swarm: Swarm, member: int, at_s: float) -> bool:
    return bool(swarm.reachable_n[member]) and swarm.presence[member].connected(at_s)


def _propose(
    swarm: Swarm, entered_n: Floats, heard: Heard, proposer: int, closed_s: float, all_n: Floats, free_n: Floats
) -> _Attempt:
    """A manifest of what the proposer holds, and how long everybody takes to vote for it."""
    listed_k = heard.heard_kn[:, proposer] <= closed_s
    count = int(listed_k.sum())
    proposed_s = closed_s + swarm.write_s(proposer, 0.0, closed_s)
    proposal_n = proposed_s + swarm.between.one_way_mm[proposer]
    if swarm.run.exchange == "gather":
        have_n = heard.heard_kn[listed_k].max(axis=0)
        foreseen_n = (have_n >= all_n) & bool(listed_k.all() and np.isneginf(free_n).all())
        begun_n = np.where(foreseen_n, have_n, np.maximum(have_n, proposal_n))
        begun_n = np.maximum(np.maximum(begun_n, entered_n), np.maximum(free_n, swarm.snapshot_n))
        staged_n = begun_n + swarm.charges.apply_s(count)
    else:
        begun_n = _collective(swarm, heard.origin_k[listed_k], proposal_n, entered_n)
        staged_n = begun_n + _combine_s(swarm, count)
    attempt = _Attempt(proposer, closed_s, proposed_s, listed_k, proposal_n, begun_n, staged_n, staged_n)
    return _voted(swarm, attempt)


def _again(swarm: Swarm, attempt: _Attempt, proposer: int, at_s: float) -> _Attempt:
    """The same manifest, proposed once more: what has been applied stays."""
    proposed_s = at_s + swarm.write_s(proposer, 0.0, at_s)
    proposal_n = proposed_s + swarm.between.one_way_mm[proposer]
    return _voted(swarm, replace(attempt, proposal_n=proposal_n))


def _voted(swarm: Swarm, attempt: _Attempt) -> _Attempt:
    voted_n = np.maximum(attempt.staged_n, attempt.proposal_n)
    return replace(attempt, voted_n=voted_n + swarm.fsync_s(voted_n))


def _cast(swarm: Swarm, entered_n: Floats, voted_n: Floats) -> tuple[Integers, Floats, int]:
    """The voters, when each one's vote goes out, and how many it takes.

    More than half; exactly half with the longest-standing voter, the founder while it is there (`manifest.is_quorum`).
    """
    voters = np.flatnonzero(swarm.member_n)
    cast_v = np.where(np.isfinite(entered_n[voters]), voted_n[voters], np.inf)
    for place, member in enumerate(voters.tolist()):
        presence = swarm.presence[member]
        if not presence.always and math.isfinite(cast_v[place]):
            cast_v[place] = presence.next_connected(float(cast_v[place]))
    half, odd = divmod(len(voters), 2)
    return voters, cast_v, half if not odd and np.isfinite(cast_v[0]) else half + 1


def _quorum_s(swarm: Swarm, entered_n: Floats, voted_n: Floats) -> float:
    """When a quorum has voted."""
    _, cast_v, need = _cast(swarm, entered_n, voted_n)
    return float(np.partition(cast_v, need - 1)[need - 1])


def _certify(swarm: Swarm, entered_n: Floats, voted_n: Floats) -> tuple[Floats, Integers]:
    """When each member has a quorum's votes, and whose was the last of them. Raises Stuck if none will come."""
    voters, cast_v, need = _cast(swarm, entered_n, voted_n)
    arrived_vn = cast_v[:, None] + swarm.between.one_way_mm[voters]
    place_n = np.argpartition(arrived_vn, need - 1, axis=0)[need - 1]
    certified_n: Floats = arrived_vn[place_n, np.arange(swarm.n)]
    if np.isinf(certified_n).all():
        raise Stuck("too few voters are left for a certificate")
    return certified_n, voters[place_n]


def _collective(swarm: Swarm, members: Integers, proposal_n: Floats, entered_n: Floats) -> Floats:
    """When everybody has the result. A member that vanishes meanwhile makes the others begin again without it."""
    begun_s, took_s = float(proposal_n[members].max()), 0.0
    while len(members):
        size = swarm.charges.payload_bytes
        took_s = collective_s(swarm.run.exchange, swarm.lines, members, size, swarm.between.one_way_mm)
        lost = [member for member in members.tolist() if not _stays(swarm, member, begun_s, begun_s + took_s)]
        if not lost:
            break
        members = members[~np.isin(members, lost)]
        begun_s += took_s + swarm.run.deadline_floor_s
    if len(members) == 0:
        raise Stuck("nobody was left in the collective")
    have_n = np.full(swarm.n, np.inf)
    have_n[members] = begun_s + took_s
    others = np.flatnonzero(np.isinf(have_n) & np.isfinite(entered_n))
    with np.errstate(divide="ignore"):
        fetch_n = swarm.charges.payload_bytes / swarm.lines.down_m[others]
    have_n[others] = np.maximum(begun_s + took_s, entered_n[others]) + fetch_n
    return have_n


def _stays(swarm: Swarm, member: int, start_s: float, end_s: float) -> bool:
    presence = swarm.presence[member]
    return presence.always or (presence.connected(start_s) and presence.connected_until(start_s) > end_s)


def _combine_s(swarm: Swarm, n: int) -> float:
    """Combining n payloads, encoding the result and decoding it: all at the hub of a star, 1 / n at each otherwise."""
    costs, d = swarm.charges.costs, swarm.charges.params
    share = 1.0 if swarm.run.exchange == "star" else 1.0 / n
    return share * (costs.aggregate_s(d, n) + costs.encode_s(d)) + swarm.charges.apply_s(1)
