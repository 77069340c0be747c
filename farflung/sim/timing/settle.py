"""After a round: who counted, who is still a member, who was admitted, what everybody moved, what deadlines learn."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from farflung.protocol.limits import ABSENT_ROUNDS_MAX, JOINS_PER_ROUND_MAX
from farflung.sim.timing.collectives import star_hub
from farflung.sim.timing.swarm import Swarm
from farflung.sim.timing.trace import Trace

Floats = NDArray[np.float64]


def settle(swarm: Swarm, trace: Trace) -> None:
    """Carry the state of `swarm` over a round's certificate."""
    _learn(swarm, trace)
    followed_n = _followed(swarm, trace)
    _move_bytes(swarm, trace, followed_n)
    _count_training(swarm, trace)
    _locate(swarm, trace, followed_n)
    _members(swarm, trace, followed_n)
    _snapshots(swarm, trace, followed_n)
    _caps(swarm, trace)


def _followed(swarm: Swarm, trace: Trace) -> NDArray[np.bool_]:
    """Who went through this round: those who came back only after its end are still on their way."""
    returned_late = np.isinf(swarm.ready_n) & (trace.entered_n > trace.ended_s)
    followed_n = np.isfinite(trace.adopted_n) & ~returned_late
    for member in np.flatnonzero(followed_n).tolist():
        presence, adopted_s = swarm.presence[member], float(trace.adopted_n[member])
        if presence.always or not presence.connected(adopted_s):
            followed_n[member] = presence.always
        elif adopted_s > trace.ended_s:  # after an absence the round is long over: it looks for the tip instead
            entered_s = float(trace.entered_n[member])
            followed_n[member] = presence.connected(entered_s) and presence.connected_until(entered_s) > adopted_s
    return followed_n


def _learn(swarm: Swarm, trace: Trace) -> None:
    voting = trace.voting
    for member in np.flatnonzero(np.isfinite(trace.adopted_n)).tolist():
        certified_s, closing_s = float(voting.certified_n[member]), float(voting.closing_n[member])
        if voting.all_n[member] <= certified_s:
            swarm.pace[member].speak.observe(float(voting.all_n[member] - trace.entered_n[member]))
        if voting.views == 0 and math.isfinite(closing_s):
            swarm.pace[member].certify.observe(certified_s - closing_s)


def _move_bytes(swarm: Swarm, trace: Trace, followed_n: NDArray[np.bool_]) -> None:
    size, listed = swarm.charges.payload_bytes, int(trace.voting.listed_k.sum())
    for member in np.flatnonzero(followed_n & np.isinf(swarm.ready_n)).tolist():
        fetched, _ = swarm.catch_up_bytes(member, trace.index)
        swarm.received_n[member] += fetched
        others_n = np.where(np.arange(swarm.n) == member, 0.0, swarm.lines.up_m * swarm.member_n)
        swarm.sent_n += fetched * others_n / max(others_n.sum(), 1.0)
    swarm.round_bytes = listed * size
    if trace.gathered is not None:
        received_n = trace.gathered.received_m
        swarm.received_n += received_n
        swarm.sent_n += _uploaded(swarm, trace, float(received_n.sum()))
        return
    members = trace.origin_k[trace.voting.listed_k]
    if swarm.run.exchange == "star" and listed > 1:
        moved_n = np.where(np.isin(np.arange(swarm.n), members), size, 0.0)
        moved_n[star_hub(swarm.lines, members)] = (listed - 1) * size
    else:
        moved_n = np.where(np.isin(np.arange(swarm.n), members), 2 * (listed - 1) / max(1, listed) * size, 0.0)
    swarm.sent_n += moved_n
    swarm.received_n += moved_n


def _uploaded(swarm: Swarm, trace: Trace, total: float) -> Floats:
    """Who sent it: each origin its payload about once, the rest relays as `node/stripes.py` weighs them."""
    size, sent_n = swarm.charges.payload_bytes, np.zeros(swarm.n)
    if total <= 0:
        return sent_n
    own = min(size, total / len(trace.origin_k))
    sent_n[trace.origin_k] = own
    up_m = np.where(np.isfinite(trace.entered_n) & swarm.reachable_n, swarm.lines.up_m, 0.0)
    giving = up_m > 0
    n = int(giving.sum())
    duration = max(1 / float(up_m[giving].min()), n * (n - 1) / float(up_m.sum())) if n else 0.0
    weight_n = np.maximum(up_m * duration - 1, 0.0)
    rest = max(0.0, total - own * len(trace.origin_k))
    weight_n = weight_n if weight_n.sum() > 0 else giving.astype(np.float64)
    return sent_n + rest * weight_n / max(1.0, float(weight_n.sum())) if rest > 0 else sent_n


def _count_training(swarm: Swarm, trace: Trace) -> None:
    """What was listed counts; what came late is forfeited, or kept for next time without error feedback."""
    for member in np.flatnonzero(np.isfinite(trace.finish_n)).tolist():
        length_s = float(trace.finish_n[member] - trace.start_n[member])
        steps = int(trace.steps_n[member])
        if trace.spoke_n[member]:
            swarm.counted_s_n[member] += length_s + swarm.kept_s_n[member]
            swarm.counted_steps_n[member] += steps + swarm.kept_steps_n[member]
            swarm.counted_rounds_n[member] += 1
            swarm.kept_s_n[member], swarm.kept_steps_n[member] = 0.0, 0
        elif trace.finish_n[member] > trace.voting.certified_n[member]:
            continue  # it heard of the certificate while it trained: it goes on, and its steps count next time
        elif not swarm.charges.remembers:
            swarm.kept_s_n[member] += length_s
            swarm.kept_steps_n[member] += steps
        swarm.start_n[member] = swarm.finish_n[member] = math.nan


def _locate(swarm: Swarm, trace: Trace, followed_n: NDArray[np.bool_]) -> None:
    """Who enters the next round when, and who has to find its way back."""
    voting = trace.voting
    for member in range(swarm.n):
        if followed_n[member]:
            swarm.applied_n[member] = trace.index
            slow = voting.begun_n[member] > voting.certified_n[member]
            swarm.late_why[member] = "download" if slow else "codec"
        elif math.isinf(swarm.ready_n[member]) and trace.entered_n[member] > trace.ended_s:
            swarm.start_n[member] = swarm.finish_n[member] = math.nan  # it is still on its way
        else:
            presence, entered_s = swarm.presence[member], float(trace.entered_n[member])
            here = presence.connected(entered_s)
            swarm.lost_n[member] = presence.connected_until(entered_s) if here else entered_s
            swarm.applied_n[member] = trace.index - 1
            swarm.start_n[member] = swarm.finish_n[member] = math.nan
            swarm.kept_s_n[member], swarm.kept_steps_n[member] = 0.0, 0
    swarm.ready_n = np.where(followed_n & swarm.reachable_n, trace.adopted_n, np.inf)


def _members(swarm: Swarm, trace: Trace, followed_n: NDArray[np.bool_]) -> None:
    """The next manifest's members, by the rules of `protocol.manifest.next_members`."""
    closed_s = trace.voting.closed_s
    was_n = swarm.member_n.copy()
    for member in np.flatnonzero(was_n).tolist():
        swarm.absent_n[member] = 0 if trace.spoke_n[member] else swarm.absent_n[member] + 1
        left = any(item.polite for item in swarm.presence[member].departures(trace.began_s, closed_s))
        if left or swarm.absent_n[member] >= ABSENT_ROUNDS_MAX:
            swarm.member_n[member] = False
    if not swarm.member_n.any():
        swarm.member_n[np.flatnonzero(was_n)[0]] = True
    heard_n = trace.entered_n + swarm.between.one_way_mm[:, trace.voting.proposer]
    waiting = np.flatnonzero(~was_n & followed_n & swarm.reachable_n & (heard_n <= closed_s))
    for member in waiting[:JOINS_PER_ROUND_MAX].tolist():
        swarm.member_n[member], swarm.absent_n[member] = True, 0


def _snapshots(swarm: Swarm, trace: Trace, followed_n: NDArray[np.bool_]) -> None:
    """While a snapshot is written, nothing new can be applied on trial."""
    if trace.index % swarm.run.snapshot_rounds:
        return
    for member in np.flatnonzero(followed_n).tolist():
        at_s = float(trace.adopted_n[member])
        swarm.snapshot_n[member] = at_s + swarm.write_s(member, swarm.charges.state_bytes, at_s)


def _caps(swarm: Swarm, trace: Trace) -> None:
    """Whoever has used up its data leaves after the round, with a word."""
    used = np.flatnonzero(swarm.sent_n + swarm.received_n >= swarm.cap_n)
    for member in used.tolist():
        if member not in swarm.capped:
            swarm.capped.append(member)
            at_s = float(trace.adopted_n[member])
            swarm.presence[member].cut(at_s if math.isfinite(at_s) else trace.ended_s, math.inf, polite=True)
