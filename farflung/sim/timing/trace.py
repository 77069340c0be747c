"""One round as it went: when each member did what. Blame and Gantt charts are read off it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from farflung.sim.timing.exchange import Gathered

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass
class Voting:
    """How the round was closed and certified."""

    closed_s: float
    """When the proposer closed the round."""
    why: str
    """"all": everybody had spoken; "grace"; "deadline"."""
    proposer: int
    proposed_s: float
    views: int
    closing_n: Floats
    """When each member would have closed it, and when all had spoken there (inf: never)."""
    all_n: Floats
    listed_k: NDArray[np.bool_]
    """Which of the announced payloads it lists."""
    proposal_n: Floats
    """When the proposal reached each member."""
    begun_n: Floats
    """When each began to apply it on trial."""
    staged_n: Floats
    voted_n: Floats
    certified_n: Floats
    """When each had the votes of a quorum."""
    deciding_n: Integers
    """Whose vote completed the quorum there."""
    hopeless: bool
    """Whether applying takes longer than the longest view: see `votes.agree`."""


@dataclass
class Trace:
    """Arrays are indexed by member, or by payload (k) in the order of `origin_k`. inf: did not happen."""

    index: int
    began_s: float
    ended_s: float
    entered_n: Floats
    """In this round since."""
    start_n: Floats
    finish_n: Floats
    """Local training that was announced in this round, or is still going on."""
    encoded_n: Floats
    announced_n: Floats
    origin_k: Integers
    heard_kn: Floats
    """When each member had each payload, checked."""
    exchanged_n: Floats
    """When each member had the last listed payload."""
    gathered: Gathered | None
    """None: a collective, or no payload."""
    voting: Voting
    adopted_n: Floats
    steps_n: Integers
    late_why: list[str]
    """Why a member entered the round late."""
    median: int
    """The member whose adoption ended the round."""
    spoke_n: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """Whose payload was listed."""

    @property
    def length_s(self) -> float:
        """From the parent certificate to the median member's adoption."""
        return self.ended_s - self.began_s
