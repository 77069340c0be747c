"""Whose fault a round's length is: walk back from the median member's adoption, along what each thing waited for."""

from __future__ import annotations

import math

import numpy as np

from farflung.sim.results import Blame
from farflung.sim.timing.exchange import DOWNLOAD, FLIGHTS, IDLE, SHARED, UPLOAD
from farflung.sim.timing.swarm import Swarm
from farflung.sim.timing.trace import Trace

NOBODY = -1


def attribute(swarm: Swarm, trace: Trace) -> tuple[Blame, ...]:
    """The critical path of a round; the seconds add up to its length."""
    walk = _Walk(swarm, trace)
    walk.back()
    return tuple(Blame(cause, member, seconds) for (cause, member), seconds in walk.seconds.items() if seconds > 0)


class _Walk:
    """From the end of a round towards its beginning. `at_s` is how far back it has come."""

    def __init__(self, swarm: Swarm, trace: Trace) -> None:
        self.swarm, self.trace = swarm, trace
        self.at_s = trace.ended_s
        self.seconds: dict[tuple[str, int], float] = {}
        listed = np.flatnonzero(trace.spoke_n)
        lengths = trace.finish_n[listed] - trace.start_n[listed]
        self.usual_s = float(np.median(lengths)) if len(listed) else 0.0

    def to(self, earlier_s: float, cause: str, member: int) -> None:
        """Blame the time back to `earlier_s`; what lies before the round is nobody's."""
        earlier_s = max(min(float(earlier_s), self.at_s), self.trace.began_s)
        if self.at_s > earlier_s:
            key = (cause, member)
            self.seconds[key] = self.seconds.get(key, 0.0) + self.at_s - earlier_s
            self.at_s = earlier_s

    def back(self) -> None:
        """The whole walk."""
        trace, voting, me = self.trace, self.trace.voting, self.trace.median
        self.to(max(voting.certified_n[me], voting.staged_n[me]), "disk", me)
        voter = me
        if voting.certified_n[me] >= voting.staged_n[me]:
            voter = int(voting.deciding_n[me])
            if voting.views:
                self.to(voting.voted_n[voter] + self.swarm.flights_s(voter, me), "protocol", NOBODY)
            self.to(voting.voted_n[voter], "latency", voter)
            self.to(max(voting.staged_n[voter], voting.proposal_n[voter]), "disk", voter)
        if voting.proposal_n[voter] >= voting.staged_n[voter]:
            self._to_closing(voter)
        else:
            self.to(voting.begun_n[voter], "codec", voter)
            if trace.gathered is None:
                self._collective()
            elif voting.begun_n[voter] <= voting.proposal_n[voter]:
                self._to_closing(voter)
            else:
                self._payload(self._last(voter), voter)
        self.to(trace.began_s, "protocol", NOBODY)

    def _last(self, member: int) -> int:
        """The listed payload that reached a member last."""
        heard_k = np.where(self.trace.voting.listed_k, self.trace.heard_kn[:, member], -math.inf)
        return int(np.argmax(heard_k))

    def _collective(self) -> None:
        """A synchronous exchange: as slow as its slowest line."""
        trace, swarm = self.trace, self.swarm
        members = trace.origin_k[trace.voting.listed_k]
        slowest_up = int(members[np.argmin(swarm.lines.up_m[members])])
        slowest_down = int(members[np.argmin(swarm.lines.down_m[members])])
        upload = swarm.lines.up_m[slowest_up] <= swarm.lines.down_m[slowest_down]
        culprit = ("upload", slowest_up) if upload else ("download", slowest_down)
        self.to(trace.voting.proposal_n[members].max(), *culprit)
        self._to_closing(int(members[np.argmax(trace.voting.proposal_n[members])]))

    def _to_closing(self, heard: int) -> None:
        """Back from the proposal's arrival to why the round could not close sooner."""
        trace, voting = self.trace, self.trace.voting
        proposer = voting.proposer
        self.to(voting.proposed_s, "latency", proposer)
        self.to(voting.closed_s, "disk", proposer)
        last = self._last(proposer)
        if voting.why != "all":
            missing, comes = self._missing(proposer)
            self.to(trace.heard_kn[last, proposer], "straggler" if comes else "deadline", missing)
        self._payload(last, proposer)

    def _missing(self, proposer: int) -> tuple[int, bool]:
        """Whom the round waited for in vain: who never came, or else came last; and whether it came at all."""
        trace, late = self.trace, self.swarm.member_n & ~self.trace.spoke_n
        if not late.any():
            return NOBODY, True
        came_n = np.full(self.swarm.n, np.inf)
        came_n[trace.origin_k] = trace.heard_kn[:, proposer]
        latest = int(np.argmax(np.where(late, came_n, -math.inf)))
        return latest, bool(came_n[latest] <= trace.ended_s + self.swarm.run.deadline_ceiling_s)

    def _payload(self, k: int, receiver: int) -> None:
        """Back from a payload's arrival through the exchange and its origin's local phase."""
        trace, swarm = self.trace, self.swarm
        origin = int(trace.origin_k[k])
        if origin != receiver:
            delay = swarm.flights_s(origin, receiver)
            if trace.gathered is not None:
                self.to(trace.heard_kn[k, receiver] - swarm.charges.check_s, "codec", receiver)
                self.to(self.at_s - FLIGHTS * delay, "latency", origin)
                self._bytes(k, receiver)
            else:
                self.to(self.at_s - delay, "latency", origin)
        self.to(trace.announced_n[origin], "upload", origin)
        attack = swarm.attack_of(origin, trace.index)
        if attack is not None and attack.kind == "straggle":
            self.to(trace.encoded_n[origin], "straggler", origin)
        self.to(trace.encoded_n[origin], "disk", origin)
        self.to(max(trace.finish_n[origin], trace.entered_n[origin]), "codec", origin)
        if trace.entered_n[origin] > trace.finish_n[origin]:  # it was still busy with the round before
            self.to(trace.began_s, trace.late_why[origin], origin)
        self._training(origin)

    def _bytes(self, k: int, receiver: int) -> None:
        """The exchange itself, by what limited the receiver."""
        trace = self.trace
        assert trace.gathered is not None
        origin = int(trace.origin_k[k])
        from_s = max(float(trace.announced_n[origin]), trace.began_s)
        if trace.gathered.held_km[k, receiver] <= trace.gathered.sent_k[k]:
            self.to(from_s, "upload", origin)
            return
        shares = trace.gathered.limited(receiver, from_s, self.at_s)
        for limit, cause, member in (
            (DOWNLOAD, "download", receiver),
            (SHARED, "download", NOBODY),
            (UPLOAD, "upload", NOBODY),
            (IDLE, "upload", origin),
        ):
            self.to(self.at_s - shares[limit], cause, member)

    def _training(self, origin: int) -> None:
        """What the origin trained longer than is usual is its own fault."""
        trace = self.trace
        start_s = max(float(trace.start_n[origin]), trace.began_s)
        over_s = max(0.0, self.at_s - start_s - self.usual_s)
        self.to(self.at_s - over_s, "straggler", origin)
        self.to(start_s, "compute", NOBODY)
        self.to(trace.began_s, trace.late_why[origin], origin)
