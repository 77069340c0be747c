"""Members of a world of pairs, and what every meeting did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from mixing_world import ROUND, Broken, Member, Waits, Weather, World, blob_of, members_of, plan_of, tick_plans

from farflung.aggregation import pairs
from farflung.aggregation.pairs import Claims, PairRound, Radius
from farflung.protocol.blob import BlobRef
from farflung.protocol.identity import PeerId
from farflung.protocol.mixing.meetings import Meet, PairMachine
from farflung.protocol.mixing.notes import Note, Offer

Key = tuple[PeerId, PeerId, int, int]
"""Who, with whom, fragment, tick."""
D = 8


@dataclass
class PairMember(Member):
    phi_d: torch.Tensor = field(default_factory=lambda: torch.zeros(D, dtype=torch.float64))
    weight: float = 1.0
    """0: it has nothing that anybody should move towards, but is moved itself."""
    fragments: int = 1
    rounds: list[PairRound] = field(init=False)
    offered: dict[tuple[int, int], tuple[pairs.Offer, torch.Tensor]] = field(default_factory=dict)
    read: dict[Key, torch.Tensor] = field(default_factory=dict)
    moves: dict[Key, torch.Tensor] = field(default_factory=dict)
    """w times how far it moved."""

    def __post_init__(self) -> None:
        super().__post_init__()
        zero_d = torch.zeros(D // self.fragments, dtype=torch.float64)
        claims, weight = Claims(0.5, 4.0), self.weight or 1.0
        self.rounds = [
            pairs.begin(piece_d.clone(), zero_d, weight, Radius(), claims)
            for piece_d in self.phi_d.split(D // self.fragments)
        ]

    def build(self, now_s: float) -> PairMachine:
        return PairMachine(self.me, ROUND, self.plan, self.fragments, self.patience, self.world.heard, now_s)

    def shares(self, tick: int) -> dict[tuple[PeerId, int], tuple[Offer, BlobRef] | None]:
        made: dict[tuple[PeerId, int], tuple[Offer, BlobRef] | None] = {}
        for peer in self.plan[tick].sends:
            for part, pair in enumerate(self.rounds):
                said = pair.offer()
                self.offered[part, tick] = said, pair.z_d.clone()
                offer = Offer(said.radius, said.weight), blob_of(self.me, part, tick)
                made[peer, part] = offer if self.weight else None
        return made

    def fetched(self, peer: PeerId, note: Note) -> None:
        other = self.world.by_id[peer]
        assert isinstance(other, PairMember)
        said, z_d = other.offered[note.fragment, note.tick]
        if note.payload != blob_of(peer, note.fragment, note.tick) or note.content != Offer(said.radius, said.weight):
            raise Broken(f"{note} is not what {peer} offered")
        self.read[self.me, peer, note.fragment, note.tick] = z_d

    def move(self, effect: Any) -> None:
        assert isinstance(effect, Meet)
        note, key = effect.note, (self.me, effect.peer, effect.note.fragment, effect.note.tick)
        if key in self.moves or self.closed or effect.peer not in self.plan[note.tick].awaits:
            raise Broken(f"{key} meets twice, or after the end, or out of turn")
        pair, (mine, z_d) = self.rounds[note.fragment], self.offered[note.fragment, note.tick]
        if not torch.equal(pair.z_d, z_d):
            raise Broken(f"{key} meets from somewhere else than it offered")
        assert isinstance(note.content, Offer)
        theirs = pairs.Offer(note.content.radius, note.content.weight)
        pair.meet(theirs, self.read.pop(key), peer=effect.peer.short, mine=mine)
        self.moves[key] = pair.weight * (pair.z_d - z_d)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class PairSetting:
    """A round of pairs."""

    n: int = 4
    graph: str = "random-matching"
    ticks: int = 4
    fragments: int = 1
    waits: Waits = field(default_factory=Waits)
    weight: Callable[[int], float] = lambda index: 1.0


def pair_world(seed: int, weather: Weather, setting: PairSetting, *, curious: bool = False) -> World:
    """A world that has not run yet."""
    members, mixings = members_of(setting.n), plan_of(setting.graph, setting.n, setting.ticks)
    generator = torch.Generator().manual_seed(seed)
    phi_nd = torch.randn(setting.n, D, dtype=torch.float64, generator=generator)

    def make(world: World, at: int, me: PeerId) -> Member:
        plan, weight = tick_plans(me, members, mixings), setting.weight(at)
        return PairMember(me, world, plan, setting.waits, phi_d=phi_nd[at], weight=weight, fragments=setting.fragments)

    return World(seed, weather, setting.n, make, curious)


def check_meetings(world: World) -> int:
    """Two who met moved by opposite amounts, and all are where meetings brought them; how many were one-sided."""
    people = [member for member in world.members if isinstance(member, PairMember)]
    moves = {key: moved_d for member in people for key, moved_d in member.moves.items()}
    alone = 0
    for (me, other, part, tick), moved_d in moves.items():
        back_d = moves.get((other, me, part, tick))
        partner = world.by_id[other]
        assert isinstance(partner, PairMember)
        if back_d is None:
            alone += 1
        elif not torch.allclose(moved_d, -back_d, rtol=0, atol=1e-12):
            raise Broken(f"a meeting of {me} and {other} moved the mean by {(moved_d + back_d).abs().max()}")
    for member in people:
        for part, pair in enumerate(member.rounds):
            began_d = member.phi_d.split(D // member.fragments)[part]
            moved_d = sum((moved for key, moved in member.moves.items() if key[2] == part), torch.zeros_like(began_d))
            if not torch.allclose(pair.weight * (pair.z_d - began_d), moved_d, rtol=0, atol=1e-9):
                raise Broken(f"{member.me} is somewhere else than its meetings brought it")
    return alone
