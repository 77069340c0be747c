"""What must be true where members mix: functions of the facts, as in `invariants.py`, which puts them in its order."""

from __future__ import annotations

import math
from itertools import pairwise

from farflung.node.mixing_codec import EXACT
from farflung.node.mixing_round import terms_of
from farflung.protocol.mixing.account import decode_account
from farflung.protocol.mixing.auditing import NUMERATOR_TOLERANCE
from farflung.sim.explore.facts import Facts
from farflung.sim.explore.mixing_facts import Mixed
from farflung.sim.explore.tally import SERIALS, serials_in, strange_in

WEIGHT_ABS_MAX = 1e-9
"""What rounding may do to a member's weight, which is at most 1 when a round begins."""


def mass_is_conserved(facts: Facts) -> str:
    """Every parcel becomes part of one member's mass, or its sender's again, or is lost with a member that died or when
    a round ends, and never two of these. Members step once in a round, and their accounts never contradict."""
    rounds: dict[int, dict[int, Mixed]] = {}
    for fact in facts.mixed:
        known = rounds.setdefault(fact.round_index, {})
        if fact.member in known:
            lives = known[fact.member].life, fact.life
            return f"round {fact.round_index}: member {fact.member} mixes twice, in lives {lives[0]} and {lives[1]}"
        known[fact.member] = fact
    for mixed in rounds.values():
        for fact in mixed.values():
            why = _own(fact) or _parcels(fact, mixed)
            if why:
                return f"round {fact.round_index}: member {fact.member} {why}"
        why = _exact(facts, mixed)
        if why:
            return why
    return _accounts(facts)


def _own(fact: Mixed) -> str:
    """One member's books, kept here: what it opened, less what it sent, and what came in and home."""
    if fact.steps > 1 or fact.afterwards:
        return f"steps {fact.steps} times, and moves {fact.afterwards} parcels after it closed its books"
    keys = [key for key, _ in fact.counted]
    if len(keys) != len({*keys}):
        return f"counts a parcel twice: (sender, fragment, seq) {sorted(keys)}"
    if not fact.home.keys() <= fact.sent.keys():
        return f"takes home what it never sent: {sorted(fact.home.keys() - fact.sent.keys())}"
    if fact.opened is None or fact.held is None:
        return ""
    home = [fact.sent[key] for key in fact.home]
    expected = math.fsum([fact.opened, *(mass for _, mass in fact.counted), *home, *(-m for m in fact.sent.values())])
    wrong = abs(expected - fact.held) > WEIGHT_ABS_MAX
    return f"holds {fact.held!r}, and its parcels say {expected!r}" if wrong else ""


def _parcels(fact: Mixed, mixed: dict[int, Mixed]) -> str:
    """What a member counted, its sender gave, and did not get back while this member's count stands."""
    for (sender, part, seq), mass in fact.counted:
        other, key = mixed.get(sender), (fact.member, part, seq)
        if other is None or other.sent.get(key) != mass:
            given = None if other is None else other.sent.get(key)
            return f"counts {mass!r} in parcel {seq} of member {sender}, which gave {given!r}"
        home_s = other.home.get(key)
        if home_s is not None and (fact.gone_s is None or fact.gone_s > home_s):
            return f"counted parcel {seq} of member {sender}, which went home as well at {home_s:.3f} s"
    return ""


def _exact(facts: Facts, mixed: dict[int, Mixed]) -> str:
    """A whole period of an exact graph in which nothing was lost or late gives everybody the mean."""
    everybody = [*mixed.values()]
    index = everybody[0].round_index
    certificate = next((item for item in facts.chain() if item.manifest.round_index == index), None)
    if facts.schedule.mode != "push-sum" or certificate is None:
        return ""
    listed = len(certificate.manifest.payloads)
    opened, held = [fact.opened for fact in everybody], [fact.held for fact in everybody]
    whole = len(everybody) == listed and all(fact.whole and not fact.home for fact in everybody)
    if not whole or None in held or None in opened:
        return ""
    mean = math.fsum(mass for mass in opened if mass is not None) / listed
    off = max(abs(mass - mean) for mass in held if mass is not None)
    return f"round {index}: nothing was lost, and weights {held} are not the mean {mean}" if off > 1e-9 else ""


def _accounts(facts: Facts) -> str:
    for fact in facts.audits:
        audit = fact.audit
        where = f"member {fact.member} at {fact.at_s:.3f} s, of the mixing of round {audit.round_index}"
        if audit.discrepancies:
            return f"{where}: {audit.discrepancies[0].why}"
        if facts.schedule.mode != "pairs" and audit.error > NUMERATOR_TOLERANCE:
            return f"{where}: mass is off by {audit.error:.3g}"
    return ""


def references_are_offered(facts: Facts) -> str:
    """The certified state is the one before, or what a listed account offers; and it is listed who says so itself."""
    terms = terms_of(facts.genesis.codec == EXACT)
    for before, item in pairwise(facts.chain()):
        manifest, offered = item.manifest, {before.state_digest}
        for listed in manifest.payloads:
            data = facts.accounts.get(listed.payload.digest) if listed.payload is not None else None
            if data is None:
                return f"round {manifest.round_index} lists an account that nobody wrote"
            account = decode_account(data, terms)
            if account.member != listed.peer_id:
                return f"round {manifest.round_index}: an account in somebody else's name"
            if account.reference is not None:
                offered.add(account.reference.digest)
        if item.state_digest not in offered:
            return f"round {manifest.round_index}: the certified state is one that nobody offered"
    return ""


def mixed_steps_count_once(facts: Facts) -> str:
    """A member brings each of its steps into one mixing; while it trains on, each step of this life has been brought
    or is still in its parameters, once."""
    brought: dict[tuple[int, int], int] = {}
    for fact in facts.mixed:
        if strange_in(fact.ahead_d, fact.member):
            return f"round {fact.round_index}: member {fact.member} brings other things than its own steps, once"
        for serial in serials_in(fact.ahead_d, fact.member):
            before = brought.setdefault((fact.member, serial), fact.round_index)
            if before != fact.round_index:
                return f"step {serial} of member {fact.member} was mixed in rounds {before} and {fact.round_index}"
    for adopted in facts.adopted:
        member, ahead = adopted.member, {*serials_in(adopted.ahead_d, adopted.member)}
        if strange_in(adopted.ahead_d, member):
            return f"member {member} at {adopted.at_s:.3f} s: its parameters hold other things than its own steps"
        since_s = facts.screened.get((member, adopted.life), -1.0)
        for serial, step in enumerate(facts.steps.get(member, [])[:SERIALS]):
            if step.life != adopted.life or not since_s < step.at_s < adopted.at_s:
                continue
            counted = brought.get((member, serial), adopted.rounds + 1) <= adopted.rounds
            if counted == (serial in ahead):
                fate = "mixed and kept" if counted else "lost"
                return f"step {serial} of member {member} was {fate}, as of {adopted.at_s:.3f} s"
    return ""
