"""One round by the rules of the real node: local phase, exchange, closing, votes, adoption.

The same rules as `protocol/round.py` and its parts, seen from outside: a round closes when everybody has spoken, when a
quorum has and the grace window is over, or at the proposer's own adaptive deadline; half a grace window after a quorum,
those who still train send what they have; a vote needs every listed payload; a quorum of votes makes the certificate.
Two simplifications: payloads that a round left behind do not load the lines in the next one, and whoever hurries does
not delay the quorum that made it hurry.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from farflung.sim.timing.exchange import FLIGHTS, Gathered, Lines, gather
from farflung.sim.timing.swarm import RETRIES_MAX, Swarm
from farflung.sim.timing.trace import Trace
from farflung.sim.timing.votes import Heard, Stuck, agree, quorum_since

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

EDGES_S = 3600.0
"""How far beyond the deadline members' comings and goings are looked at, at least; a whole round usually fits."""


def play(swarm: Swarm, index: int, began_s: float) -> Trace:
    """Round `index` from the time the median member entered it. Raises Stuck. Changes only the plans of training."""
    entered_n, late_why = _enter(swarm, index)
    speak_n = np.array([pace.speak.value_s for pace in swarm.pace])
    limit_s = _limit_s(swarm, entered_n, speak_n)
    plan = _train(swarm, index, entered_n, limit_s)
    edges_s = limit_s + max(EDGES_S, 10 * swarm.run.deadline_ceiling_s)
    if swarm.run.exchange == "gather":
        origin_k, heard_kn, gathered = _gather(swarm, index, entered_n, plan.announced_n, limit_s, edges_s)
        hurried = _hurry(swarm, plan, heard_kn)
        if hurried:
            origin_k, heard_kn, gathered = _gather(swarm, index, entered_n, plan.announced_n, limit_s, edges_s)
    else:
        origin_k, heard_kn, gathered = _announcements(swarm, plan.announced_n, limit_s)
    silent_n = _silent(swarm, origin_k, began_s, limit_s)
    voting = agree(swarm, index, entered_n, Heard(origin_k, heard_kn, silent_n, speak_n))
    fsync_n = swarm.fsync_s(voting.certified_n)
    adopted_n = np.maximum(voting.certified_n, voting.staged_n) + 2 * fsync_n
    adopted_n = np.where(np.isfinite(entered_n), adopted_n, np.inf)
    median = _median(swarm, adopted_n)
    spoke_n = np.zeros(swarm.n, bool)
    spoke_n[origin_k[voting.listed_k]] = True
    return Trace(
        index=index,
        began_s=began_s,
        ended_s=max(began_s, float(adopted_n[median])),
        entered_n=entered_n,
        start_n=plan.start_n,
        finish_n=plan.finish_n,
        encoded_n=plan.encoded_n,
        announced_n=plan.announced_n,
        origin_k=origin_k,
        heard_kn=heard_kn,
        exchanged_n=heard_kn[voting.listed_k].max(axis=0) if gathered is not None else voting.begun_n,
        gathered=gathered,
        voting=voting,
        adopted_n=adopted_n,
        steps_n=plan.steps_n,
        late_why=late_why,
        median=median,
        spoke_n=spoke_n,
    )


# -- entering and training --------------------------------------------------------------------------------------------


class Plan:
    """When everybody trains, encodes and announces in this round."""

    def __init__(self, n: int) -> None:
        self.start_n, self.finish_n = np.full(n, np.inf), np.full(n, np.inf)
        self.encoded_n, self.announced_n = np.full(n, np.inf), np.full(n, np.inf)
        self.steps_n = np.zeros(n, np.int64)


def _enter(swarm: Swarm, index: int) -> tuple[Floats, list[str]]:
    entered_n, why = swarm.ready_n.copy(), list(swarm.late_why)
    for member in np.flatnonzero(np.isinf(entered_n)).tolist():
        entered_n[member], why[member] = swarm.return_s(member, index), "protocol"
    return entered_n, why


def _limit_s(swarm: Swarm, entered_n: Floats, speak_n: Floats) -> float:
    """After this no proposer waits any longer, if it has a payload."""
    here = np.flatnonzero(swarm.member_n & np.isfinite(entered_n))
    if len(here) == 0:
        raise Stuck("no member is left, and none comes back")
    ready_s = float(np.median(entered_n[here]))
    return ready_s + float(speak_n[here].max())


def _train(swarm: Swarm, index: int, entered_n: Floats, limit_s: float) -> Plan:
    plan = Plan(swarm.n)
    for member in np.flatnonzero(swarm.member_n & np.isfinite(entered_n)).tolist():
        finish_s = _finish(swarm, member, float(entered_n[member]))
        if not math.isfinite(finish_s):
            continue
        plan.start_n[member], plan.finish_n[member] = swarm.start_n[member], finish_s
        plan.steps_n[member] = swarm.steps_n[member]
        _speak(swarm, index, member, float(entered_n[member]), plan)
    return plan


def _finish(swarm: Swarm, member: int, entered_s: float) -> float:
    """When its local phase ends: planned now, or earlier if it is still at it. A crash begins it anew."""
    presence, pace = swarm.presence[member], swarm.paces[member]
    planned_s = float(swarm.finish_n[member])
    if not math.isnan(planned_s) and (presence.always or presence.powered_until(entered_s) > planned_s):
        return planned_s
    start_s = entered_s
    for _ in range(RETRIES_MAX):
        count = 1 if swarm.kept_steps_n[member] else swarm.run.inner_steps
        finish_s = start_s + pace.steps_s(start_s, count)
        until_s = math.inf if presence.always else presence.powered_until(start_s)
        if finish_s < until_s:
            swarm.start_n[member], swarm.finish_n[member], swarm.steps_n[member] = start_s, finish_s, count
            return finish_s
        swarm.kept_s_n[member], swarm.kept_steps_n[member] = 0.0, 0
        back_s = presence.next_powered(until_s)
        if math.isinf(back_s):
            break
        start_s = back_s + swarm.charges.state_bytes / float(swarm.disk_n[member])
    swarm.start_n[member] = swarm.finish_n[member] = math.nan
    return math.inf


def _speak(swarm: Swarm, index: int, member: int, entered_s: float, plan: Plan) -> None:
    """Encode, put on disk, announce; an attacker may take its time."""
    charges, presence = swarm.charges, swarm.presence[member]
    encoded_s = max(float(plan.finish_n[member]), entered_s) + charges.encode_s
    announced_s = encoded_s + swarm.write_s(member, charges.written_bytes(), encoded_s)
    announced_s += swarm.write_s(member, 0.0, announced_s)
    attack = swarm.attack_of(member, index)
    if attack is not None and attack.kind == "straggle":
        announced_s = max(announced_s, entered_s + attack.strength * swarm.pace[member].speak.value_s)
    plan.encoded_n[member] = encoded_s
    plan.announced_n[member] = announced_s if presence.always else presence.next_connected(announced_s)


def _hurry(swarm: Swarm, plan: Plan, heard_kn: Floats) -> bool:
    """Half a grace window after a quorum is there, training sends what it has. Whether anybody did."""
    if len(heard_kn) == 0:
        return False
    hurry_n = quorum_since(swarm, heard_kn) + swarm.run.grace_s / 2
    late = np.flatnonzero(np.isfinite(plan.finish_n) & (plan.finish_n > hurry_n) & swarm.member_n).tolist()
    for member in late:
        start_s, finish_s = float(plan.start_n[member]), float(plan.finish_n[member])
        step_s = (finish_s - start_s) / int(plan.steps_n[member])
        done = max(1, math.ceil((float(hurry_n[member]) - start_s) / step_s))
        if done >= plan.steps_n[member]:
            continue
        plan.steps_n[member], plan.finish_n[member] = done, start_s + done * step_s
        encoded_s = start_s + done * step_s + swarm.charges.encode_s
        announced_s = encoded_s + swarm.write_s(member, swarm.charges.written_bytes(), encoded_s)
        announced_s += swarm.write_s(member, 0.0, announced_s)
        plan.encoded_n[member] = encoded_s
        presence = swarm.presence[member]
        plan.announced_n[member] = announced_s if presence.always else presence.next_connected(announced_s)
    return bool(late)


# -- exchange ---------------------------------------------------------------------------------------------------------


def _gather(
    swarm: Swarm, index: int, entered_n: Floats, announced_n: Floats, limit_s: float, edges_s: float
) -> tuple[Integers, Floats, Gathered | None]:
    """Whose payload is where and when, latency and checks included."""
    origin_k = _speakers(announced_n, limit_s)
    if len(origin_k) == 0:
        return origin_k, np.empty((0, swarm.n)), None
    announced_k = announced_n[origin_k]
    lines = swarm.lines
    starving = [member for member in range(swarm.n) if _starves(swarm, member, index)]
    mute = np.flatnonzero(~swarm.reachable_n).tolist() + starving
    if mute:
        up_m = lines.up_m.copy()
        up_m[mute] = 0.0
        lines = Lines(up_m, lines.down_m, lines.shared_up, lines.shared_down, lines.crossing)
    changes = swarm.changes(entered_n, float(announced_k.min()), edges_s)
    changes = [item._replace(up=0.0) if item.member in mute else item for item in changes]
    gathered = gather(lines, announced_k, origin_k, swarm.charges.payload_bytes, changes)
    heard_kn = gathered.held_km + FLIGHTS * swarm.between.one_way_mm[origin_k] + swarm.charges.check_s
    heard_kn[np.arange(len(origin_k)), origin_k] = announced_k
    return origin_k, heard_kn, gathered


def _starves(swarm: Swarm, member: int, index: int) -> bool:
    attack = swarm.attack_of(member, index)
    return attack is not None and attack.kind == "starve"


def _speakers(announced_n: Floats, limit_s: float) -> Integers:
    """Who announces in time to matter, and at least the first."""
    first_s = float(announced_n.min(initial=math.inf))
    return np.flatnonzero(np.isfinite(announced_n) & (announced_n <= max(limit_s, first_s)))


def _announcements(swarm: Swarm, announced_n: Floats, limit_s: float) -> tuple[Integers, Floats, None]:
    """Before a collective only announcements travel."""
    origin_k = _speakers(announced_n, limit_s)
    return origin_k, announced_n[origin_k][:, None] + swarm.between.one_way_mm[origin_k], None


def _silent(swarm: Swarm, origin_k: Integers, began_s: float, limit_s: float) -> Floats:
    """Until when members who announce nothing are waited for: until they have left politely; -inf: not at all."""
    silent_n = np.where(swarm.member_n, np.inf, -np.inf)
    silent_n[origin_k] = -np.inf
    for member in np.flatnonzero(np.isposinf(silent_n)).tolist():
        polite = [item.at_s for item in swarm.presence[member].departures(began_s, limit_s) if item.polite]
        if polite:
            silent_n[member] = polite[0] + float(swarm.between.one_way_mm[member].max())
    return silent_n


def _median(swarm: Swarm, adopted_n: Floats) -> int:
    """The member in the middle of those members that adopt. Raises Stuck if nobody does."""
    members = np.flatnonzero(swarm.member_n & np.isfinite(adopted_n))
    if len(members) == 0:
        raise Stuck("nobody can apply the round's result")
    order = members[np.argsort(adopted_n[members], kind="stable")]
    return int(order[(len(order) - 1) // 2])
