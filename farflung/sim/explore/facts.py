"""What is known of a world that was run: everything that was said, kept, trained and certified, seen from outside.

Facts are gathered by hooks around real nodes (`stage.py`) and judged by `invariants.py`. Nothing here asks a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from farflung.protocol.certificate import Certificate
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import PeerId
from farflung.protocol.statements import Slot
from farflung.protocol.wire import Statement
from farflung.sim.explore.mixing_facts import Audited, Mixed
from farflung.sim.explore.schedule import Schedule
from farflung.sim.explore.tally import Floats


@dataclass(frozen=True)
class Word:
    """A statement that a member sent for the first time in a life."""

    member: int
    life: int
    slot: Slot
    statement: Statement
    at_s: float


@dataclass(frozen=True)
class Kept:
    """A record that a member made durable."""

    member: int
    life: int
    round_index: int
    kind: str
    value: object
    at_s: float


@dataclass(frozen=True)
class Applied:
    """A round that a member applied while it took part in it, and the shares it gave."""

    member: int
    life: int
    certificate: Certificate
    shares: Mapping[PeerId, float]
    at_s: float


@dataclass(frozen=True)
class Adopted:
    """A member trains on: what its parameters are ahead of the anchor that includes `rounds`."""

    member: int
    life: int
    rounds: int
    ahead_d: Floats
    at_s: float


@dataclass(frozen=True)
class Step:
    """One local step; its serial is its place in the member's list."""

    life: int
    at_s: float


@dataclass(frozen=True)
class Draft:
    """A proposer draws up a manifest: what it knew then."""

    proposer: int
    round_index: int
    digest: bytes
    listed: frozenset[PeerId]
    announced: frozenset[PeerId]
    """Members whose announcement of the round had come through."""
    ready: Mapping[PeerId, float]
    """Members whose payload was whole and sound on its disk, and since when."""
    beats: Mapping[PeerId, tuple[float, ...]]
    """When it heard each member's heartbeats of the round."""
    at_s: float


@dataclass
class Facts:
    """Of one world."""

    schedule: Schedule
    genesis: Genesis
    index_of: dict[PeerId, int]
    said: list[Word] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    applied: list[Applied] = field(default_factory=list)
    adopted: list[Adopted] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    steps: dict[int, list[Step]] = field(default_factory=dict)
    payloads: dict[bytes, bytes] = field(default_factory=dict)
    """By digest: what was encoded."""

    accounts: dict[bytes, bytes] = field(default_factory=dict)
    """By digest: what members who mix announced."""

    mixed: list[Mixed] = field(default_factory=list)
    audits: list[Audited] = field(default_factory=list)
    screened: dict[tuple[int, int], float] = field(default_factory=dict)
    """(member, life) -> when it first refused an update of its own: its steps until then are gone. Where members mix:
    when it last did, or had to start over from the chain."""

    settling: dict[tuple[int, int], str] = field(default_factory=dict)
    """(member, life) -> "e" for every update encoded and "o" for every verdict it was told of, in order."""

    chains: dict[int, list[Certificate]] = field(default_factory=dict)
    """What is on each member's disk at the end."""

    crowds: list[str] = field(default_factory=list)
    """Whatever had grown beyond its bound, with numbers."""

    leftovers: list[str] = field(default_factory=list)
    """Tasks and files that outlived their node."""

    stalled: str = ""
    """Why progress did not resume in time; empty if it did."""

    failures: list[str] = field(default_factory=list)
    """What ended a node, a script or the world itself."""

    def chain(self) -> list[Certificate]:
        """The longest chain on any disk."""
        return max(self.chains.values(), key=len, default=[])

    def certificates(self) -> list[tuple[int, Certificate]]:
        """Everything that anybody holds or held for certified: (member, certificate)."""
        on_disk = [(member, item) for member, chain in sorted(self.chains.items()) for item in chain]
        return [*((fact.member, fact.certificate) for fact in self.applied), *on_disk]
