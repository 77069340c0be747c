"""What one simulated run gives, in either fidelity: plain values that reports, sweeps and notebooks read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

CAUSES = ("compute", "straggler", "upload", "download", "latency", "codec", "disk", "deadline", "protocol", "mixing")
"""Whose fault a second of a round's critical path is: training at the median member's pace; waiting for a slower one;
bulk bytes at a sender's or a receiver's line; propagation; encode, decode and aggregate; the disk; waiting for somebody
who never spoke, until the deadline; everything else (votes, views, catching up); and in push-sum and pairs mode from a
certificate until the median member has mixed."""

SEGMENTS = ("train", "wait", "encode", "exchange", "aggregate", "offline")
"""What a member is seen doing in a Gantt chart; a segment's time belongs to exactly one."""


@dataclass(frozen=True)
class Segment:
    """A member does one thing for a while."""

    member: int
    round_index: int
    kind: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Blame:
    """A share of one round's critical path: a cause, and the member behind it (-1: nobody in particular)."""

    cause: str
    member: int
    seconds: float


@dataclass(frozen=True)
class RoundResult:
    """One round, from its parent certificate until the median member applied its own."""

    round_index: int
    start_s: float
    end_s: float
    members: int
    payloads: int
    """Updates that were aggregated."""

    payload_bytes: int
    """Of one member's update (mean); where members mix, of one whole vector as it travels in a tick."""

    views: int = 0
    """View changes that it took."""

    loss: float | None = None
    """Mean training loss of the members that reported; None in timing-only fidelity."""

    validation: float | None = None
    """After the round, where it was measured: of the anchor, or the mean over members who mix and differ."""

    loss_estimate: float | None = None
    """Timing only: from published scaling laws. An estimate, never a measurement."""

    blame: tuple[Blame, ...] = ()
    """Adds up to end_s - start_s."""


@dataclass(frozen=True)
class MemberResult:
    """One member over the whole run."""

    name: str
    up_mbit: float
    down_mbit: float
    step_s: float
    """Mean time of one local step."""

    online_s: float
    train_s: float
    """Time spent in local steps that a certificate counted."""

    steps: int
    tokens: int
    bytes_sent: int
    bytes_received: int
    """Messages and payloads, headers not counted."""

    wire_sent: int = 0
    wire_received: int = 0
    """With headers and acknowledgements."""

    rounds_counted: int = 0
    attacker: str = ""

    @property
    def utilisation(self) -> float:
        """Share of its time online that was local training that counted."""
        return self.train_s / self.online_s if self.online_s > 0 else 0.0


@dataclass(frozen=True)
class RunResult:
    """One run of one scenario with one seed."""

    scenario: str
    seed: int
    fidelity: str
    changes: dict[str, str]
    """What a sweep changed: {"run.codec": "int8"}."""

    members: tuple[MemberResult, ...]
    rounds: tuple[RoundResult, ...]
    duration_s: float
    """Virtual time."""

    finished: bool
    """All rounds were trained within the limit."""

    segments: tuple[Segment, ...] = ()
    """Of the rounds kept for a Gantt chart (a few; see the maker)."""

    events_digest: str = ""
    """Hash of the event log: equal digests, equal runs."""

    wall_s: float = 0.0
    """How long simulating it took. Never part of a digest."""

    notes: tuple[str, ...] = ()
    """What a reader should know: which numbers are estimates, what was refused."""

    final_loss: float | None = None
    """Validation loss at the end if it was measured, else the training loss, else the estimate (see notes)."""

    time_to_goal_s: float | None = None
    extra: dict[str, float] = field(default_factory=dict)
    """Numbers of one fidelity only, by name."""

    @property
    def utilisation(self) -> float:
        """Mean over members of the share of their time online that was training that counted."""
        shares = [member.utilisation for member in self.members if member.online_s > 0]
        return math.fsum(shares) / len(shares) if shares else 0.0

    @property
    def bytes_sent(self) -> int:
        """By all members together."""
        return sum(member.bytes_sent for member in self.members)
