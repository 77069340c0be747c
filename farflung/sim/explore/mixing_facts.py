"""What is known of mixing in a world that was run: who began what, which parcels left, counted or went home."""

from __future__ import annotations

from dataclasses import dataclass, field

from farflung.protocol.mixing.auditing import MassAudit
from farflung.sim.explore.tally import Floats

Key = tuple[int, int, int]
"""(the other member, fragment, seq) of a parcel, seen from its sender or its receiver."""


@dataclass
class Mixed:
    """What one life of a member did in the mixing of one round, counted without its ledgers."""

    member: int
    life: int
    round_index: int
    began_s: float
    ahead_d: Floats
    """What the local phase brought: φ − θ of this member when it began."""

    opened: float | None
    """Its mass then; None with pairs, where nobody gives anything away."""

    sent: dict[Key, float] = field(default_factory=dict)
    home: dict[Key, float] = field(default_factory=dict)
    """Parcels of its own that came back, and when."""

    counted: list[tuple[Key, float]] = field(default_factory=list)
    """Parcels of others that became part of its mass, with their weights."""

    held: float | None = None
    """Its weight when it closed its books; None: it never did."""

    afterwards: int = 0
    """Parcels that were counted or taken home after that."""

    whole: bool = True
    """Every share was posted, and nobody was waited for in vain."""

    steps: int = 0
    """How often its own parameters moved."""

    gone_s: float | None = None
    """When what it held was dropped before it could be told to the others: its process ended, or it had to start over
    from the chain."""


@dataclass(frozen=True)
class Audited:
    """What a member concluded from the accounts of a round."""

    member: int
    life: int
    audit: MassAudit
    at_s: float
