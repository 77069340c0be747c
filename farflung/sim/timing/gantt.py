"""Who does what in a round, as segments for a Gantt chart."""

from __future__ import annotations

import math

from farflung.sim.results import Segment
from farflung.sim.timing.swarm import Swarm
from farflung.sim.timing.trace import Trace


def segments(swarm: Swarm, trace: Trace) -> tuple[Segment, ...]:
    """Every member from the beginning of the round to its end; the parts of one member do not overlap."""
    found: list[Segment] = []
    for member in range(swarm.n):
        found += _of_member(swarm, trace, member)
    return tuple(found)


def _of_member(swarm: Swarm, trace: Trace, member: int) -> list[Segment]:
    """Cut [began, ended) at what happened to one member, in order."""
    voting, at_s, found = trace.voting, trace.began_s, list[Segment]()

    def until(end_s: float, kind: str) -> None:
        nonlocal at_s
        end_s = min(end_s, trace.ended_s)
        if end_s > at_s:
            found.append(Segment(member, trace.index, kind, at_s, end_s))
            at_s = end_s

    presence = swarm.presence[member]
    if not presence.connected(at_s):
        until(presence.next_connected(at_s), "offline")
    entered_s = float(trace.entered_n[member])
    until(entered_s, "exchange" if trace.late_why[member] in ("protocol", "download") else "aggregate")
    off_s = presence.connected_until(at_s) if presence.connected(at_s) else at_s
    for end_s, kind in (
        (float(trace.start_n[member]), "wait"),
        (float(trace.finish_n[member]), "train"),
        (float(trace.announced_n[member]), "encode"),
        (float(trace.exchanged_n[member]), "exchange"),
        (float(voting.begun_n[member]), "wait"),
        (float(voting.staged_n[member]), "aggregate"),
        (trace.ended_s, "wait"),
    ):
        if math.isfinite(end_s):
            until(min(end_s, off_s), kind)
    until(trace.ended_s, "offline")
    return found
