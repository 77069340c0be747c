"""What must be true of every world, whatever goes wrong in it. Each invariant is a function of the facts.

It returns "" if it holds, and otherwise one sentence that says who, which round and what. The order is that of blame:
the first that fails names the violation. Add one by writing a function and putting it into `INVARIANTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from farflung.protocol.blob import describe
from farflung.protocol.certificate import Certificate
from farflung.protocol.manifest import Manifest
from farflung.protocol.statements import Announcement
from farflung.protocol.wire import Promise, Proposal, Vote
from farflung.sim.explore.facts import Draft, Facts, Word
from farflung.sim.explore.ground import LATENCY_S
from farflung.sim.explore.mixing_laws import mass_is_conserved, mixed_steps_count_once, references_are_offered
from farflung.sim.explore.tally import SERIALS, WIDTH, read_payload, serials_in, strange_in


def one_certificate(facts: Facts) -> str:
    """No two certificates of one round differ in manifest or state: over all members, all lives, and all disks."""
    known: dict[int, tuple[int, Certificate]] = {}
    for member, item in facts.certificates():
        index = item.manifest.round_index
        first, other = known.setdefault(index, (member, item))
        if (other.manifest.digest, other.state_digest) != (item.manifest.digest, item.state_digest):
            return f"round {index} has two certificates: members {first} and {member} hold different ones"
    return ""


def votes_make_a_quorum(facts: Facts) -> str:
    """A certificate carries votes of more than half of its parent's voters, or of half with the longest-standing one,
    and each of them really cast that vote."""
    cast = set()
    for kept in facts.kept:
        match kept.kind, kept.value:
            case "vote", (int(view), Manifest() as manifest, bytes(state_digest)):
                cast.add((kept.member, view, manifest.digest, state_digest))
    for chain in facts.chains.values():
        for parent, item in pairwise(chain):
            voters = {member.peer_id: member.since for member in parent.manifest.members if member.voter}
            names = [peer for peer, _ in item.signatures]
            eldest = min(voters, key=lambda peer: (voters[peer], peer))
            half = 2 * len(names) - len(voters)
            index = item.manifest.round_index
            if len(names) != len({*names}) or not {*names} <= voters.keys() or (half, eldest in names) < (0, True):
                return f"the certificate of round {index} has {len(names)} votes of {len(voters)} voters"
            for peer in names:
                vote = facts.index_of[peer], item.view, item.manifest.digest, item.state_digest
                if vote not in cast:
                    return f"the certificate of round {index} counts a vote that member {vote[0]} never cast"
    return ""


def members_keep_their_word(facts: Facts) -> str:
    """In one round a member announces one payload, votes and proposes once in a view, promises a view once, votes in
    none before one that it promised, and hides no vote from a promise: over all its lives.

    What it made durable counts too: it enters each thing once, and its views only grow.
    """
    for (member, index), kept in _by_round(facts).items():
        for kind in ("vote", "promise", "proposal", "own"):
            views = [_view_of(value) for what, value in kept if what == kind]
            if views != sorted(dict.fromkeys(views)):
                return f"member {member} in round {index} enters its {kind} twice or out of order, views {views}"
    books: dict[tuple[int, int, bytes], _Book] = {}
    for word in facts.said:
        key = word.member, word.slot.round_index, word.slot.parent
        broken = books.setdefault(key, _Book()).enter(word)
        if broken:
            return f"member {word.member} in round {word.slot.round_index}, life {word.life}: {broken}"
    return ""


def _by_round(facts: Facts) -> dict[tuple[int, int], list[tuple[str, object]]]:
    """What each member made durable in each round, in order."""
    found: dict[tuple[int, int], list[tuple[str, object]]] = {}
    for kept in facts.kept:
        found.setdefault((kept.member, kept.round_index), []).append((kept.kind, kept.value))
    return found


def _view_of(value: object) -> int:
    """Of a durable record; an announcement has none."""
    match value:
        case Promise(view) | Proposal(view):
            return view
        case (int(view), *_):
            return view
    return 0


class _Book:
    """What one member said in one round."""

    def __init__(self) -> None:
        self.payload: Announcement | None = None
        self.votes: dict[int, tuple[bytes, bytes]] = {}
        self.promises: dict[int, int] = {}
        self.proposals: dict[int, bytes] = {}

    def enter(self, word: Word) -> str:
        match word.statement:
            case Announcement() as item:
                self.payload = self.payload or item
                return "" if self.payload == item else "announces two payloads"
            case Proposal(view, manifest):
                known = self.proposals.setdefault(view, manifest.digest)
                return "" if known == manifest.digest else f"proposes two manifests in view {view}"
            case Vote(view, manifest_digest, state_digest):
                fresh, vote = view not in self.votes, (manifest_digest, state_digest)
                if self.votes.setdefault(view, vote) != vote:
                    return f"votes twice in view {view}"
                late = fresh and view < max(self.promises, default=0)
                return f"votes in view {view} after it promised view {max(self.promises)}" if late else ""
            case Promise(view, voted):
                last = voted[0] if voted else -1
                if max((one for one in self.votes if one < view), default=-1) > last:
                    return f"promises view {view} and hides that it has voted"
                same = self.promises.setdefault(view, last) == last
                return "" if same else f"promises view {view} twice"
        return ""


def states_are_recomputed(facts: Facts) -> str:
    """The certified state of every round is what its payloads give, computed here anew: their mean in fp64, rounded
    once to fp32, taken from the anchor. Where members mix, it is a reference that somebody offered."""
    if facts.genesis.mode != "gather":
        return references_are_offered(facts)
    theta_d = np.zeros(WIDTH, np.float32)
    for certificate in facts.chain()[1:]:
        manifest = certificate.manifest
        rows = [_payload(facts, item) for item in manifest.payloads]
        if any(row is None for row in rows):
            return f"round {manifest.round_index} lists a payload that nobody encoded"
        if rows:
            update_d = (np.sum(np.array(rows, np.float64), axis=0) / len(rows)).astype(np.float32)
            theta_d = (theta_d.astype(np.float64) - update_d).astype(np.float32)
        if describe(theta_d.tobytes())[0].digest != certificate.state_digest:
            return f"round {manifest.round_index}: the certified state is not what its {len(rows)} payloads give"
    return ""


def steps_count_once(facts: Facts) -> str:
    """Mass is conserved: no step is in two certified payloads, and while a member trains on, each step that it took
    in this life is either certified or still in its parameters, once (a screened update's steps may be gone)."""
    if facts.genesis.mode != "gather":
        return mixed_steps_count_once(facts)
    certified: dict[tuple[int, int], int] = {}
    for certificate in facts.chain()[1:]:
        index = certificate.manifest.round_index
        for item in certificate.manifest.payloads:
            member, update_d = facts.index_of[item.peer_id], _payload(facts, item)
            if update_d is None or strange_in(-update_d, member):
                return f"round {index}: the payload of member {member} holds other things than its own steps, once"
            for serial in serials_in(update_d, member):
                before = certified.setdefault((member, serial), index)
                if before != index:
                    return f"step {serial} of member {member} was counted in rounds {before} and {index}"
    for fact in facts.adopted:
        ahead = set(serials_in(fact.ahead_d, fact.member))
        if strange_in(fact.ahead_d, fact.member):
            return f"member {fact.member} at {fact.at_s:.3f} s: its parameters hold other things than its own steps"
        screened_s = facts.screened.get((fact.member, fact.life), -1.0)
        for serial, step in enumerate(facts.steps.get(fact.member, [])[:SERIALS]):
            if step.life != fact.life or not screened_s < step.at_s < fact.at_s:
                continue
            counted = certified.get((fact.member, serial), fact.rounds + 1) <= fact.rounds
            if counted == (serial in ahead):
                fate = "counted and kept" if counted else "lost"
                return f"step {serial} of member {fact.member} was {fate}, as of {fact.at_s:.3f} s"
    return ""


def verdicts_come_once(facts: Facts) -> str:
    """Every update that a member encodes is settled exactly once, before it encodes the next one. What a life before
    had encoded may be settled first."""
    for (member, life), signs in sorted(facts.settling.items()):
        rest = signs.removeprefix("o") if (member, life) not in facts.screened else ""
        if rest.removesuffix("e").replace("eo", ""):
            return f"member {member} in life {life} encoded (e) and settled (o) its updates in the order {signs}"
    return ""


def shares_sum_to_one(facts: Facts) -> str:
    """Uniform weights: each of n listed payloads has the share 1/n, and nobody else has any. Where members mix, whoever
    missed rounds or has trained nothing weighs less, or nothing."""
    for fact in facts.applied:
        listed = {item.peer_id for item in fact.certificate.manifest.payloads}
        shares, gathers = dict(fact.shares), facts.genesis.mode == "gather"
        wrong = any(abs(share * len(listed) - 1.0) > 1e-9 if gathers else share < 0.0 for share in shares.values())
        if {*shares} != listed or wrong or (shares and abs(sum(shares.values()) - 1.0) > 1e-9):
            return f"round {fact.certificate.manifest.round_index}: member {fact.member} gave {sorted(shares.values())}"
    return ""


def what_is_here_is_listed(facts: Facts) -> str:
    """Whoever draws up a manifest lists every payload that has been whole and sound on its disk for a while."""
    for draft in _fresh_drafts(facts):
        for peer, since_s in draft.ready.items():
            if draft.at_s - since_s > SETTLED_S and peer in draft.announced and peer not in draft.listed:
                return _left_out(facts, draft, facts.index_of[peer], f"held its payload since {since_s:.3f} s")
    return ""


def the_announced_is_heard(facts: Facts) -> str:
    """Whoever draws up a manifest has heard the announcement of everybody whose heartbeat of the same round has
    reached it twice since that announcement: a member repeats what it said, until it is heard."""
    for draft in _fresh_drafts(facts):
        for kept in facts.kept:
            if kept.kind != "own" or kept.round_index != draft.round_index or kept.member == draft.proposer:
                continue
            assert isinstance(kept.value, Announcement)
            after_s = max(kept.at_s, _disturbed_until(facts, kept.member, draft)) + SETTLED_S
            beats = [at_s for at_s in draft.beats.get(kept.value.peer_id, ()) if after_s < at_s]
            heard = kept.value.peer_id in draft.announced
            if not heard and len(beats) >= 2 and draft.at_s - beats[1] > SETTLED_S:
                return _left_out(facts, draft, kept.member, f"heard its heartbeats at {beats[0]:.3f} s and later")
    return ""


SETTLED_S = 2 * LATENCY_S + 0.1
"""Longer than a message that is on its way and not disturbed takes to be worked off."""


def _disturbed_until(facts: Facts, member: int, draft: Draft) -> float:
    """The end of the last fault of messages between a member and a proposer that began before its draft."""
    from farflung.sim.explore.actions import EVERYBODY, Delay, Disk, OfMessages

    ends = [0.0]
    for action in facts.schedule.actions:
        if isinstance(action, OfMessages) and action.at_s <= draft.at_s:
            meets = action.source in (EVERYBODY, member) and action.target in (EVERYBODY, draft.proposer)
            ends.append(action.end_s + (action.by_s if isinstance(action, Delay) else 0.0) if meets else 0.0)
        if isinstance(action, Disk) and action.member in (member, draft.proposer) and action.at_s <= draft.at_s:
            ends.append(action.end_s)  # whoever waits for its disk works nothing off
    return max(ends)


def _left_out(facts: Facts, draft: Draft, member: int, why: str) -> str:
    return (
        f"round {draft.round_index}: member {draft.proposer} left member {member} out of the manifest it drew up at "
        f"{draft.at_s:.3f} s, though it {why}"
    )


def _fresh_drafts(facts: Facts) -> list[Draft]:
    """Manifests when they were drawn up; later proposals of the same one only repeat it."""
    first: dict[bytes, Draft] = {}
    for draft in facts.drafts:
        first.setdefault(draft.digest, draft)
    return [*first.values()]


def _payload(facts: Facts, item: Announcement) -> np.ndarray[tuple[int], np.dtype[np.float32]] | None:
    payload = facts.payloads.get(item.payload.digest) if item.payload is not None else None
    return None if payload is None else read_payload(payload)


def memory_is_bounded(facts: Facts) -> str:
    """Nothing that a node keeps grows beyond a bound that follows from the number of members (`crowds.py`)."""
    return facts.crowds[0] if facts.crowds else ""


def nothing_outlives_its_node(facts: Facts) -> str:
    """No task and no open file of a process is left once it is gone."""
    return facts.leftovers[0] if facts.leftovers else ""


def progress_resumes(facts: Facts) -> str:
    """After the last fault is over, every member that is on applies new rounds within the bound of `patience.py`,
    unless so many are gone for good that there is no quorum."""
    return facts.stalled


def nothing_fails(facts: Facts) -> str:
    """No node ends with an error, no task dies unheard, and time neither ends nor stands still."""
    return facts.failures[0] if facts.failures else ""


class Invariant(NamedTuple):
    """One law and its name in reports."""

    name: str
    broken: Callable[[Facts], str]


INVARIANTS: tuple[Invariant, ...] = tuple(
    Invariant(law.__name__.replace("_", " "), law)
    for law in (
        one_certificate,
        votes_make_a_quorum,
        mass_is_conserved,
        members_keep_their_word,
        states_are_recomputed,
        steps_count_once,
        verdicts_come_once,
        shares_sum_to_one,
        what_is_here_is_listed,
        the_announced_is_heard,
        nothing_fails,
        memory_is_bounded,
        nothing_outlives_its_node,
        progress_resumes,
    )
)


def first_broken(facts: Facts) -> tuple[str, str] | None:
    """The first invariant that does not hold, and how: (name, sentence)."""
    for invariant in INVARIANTS:
        sentence = invariant.broken(facts)
        if sentence:
            return invariant.name, sentence
    return None
