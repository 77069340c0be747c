"""Members who mix, in virtual time: notes are lost, doubled, late and reordered, vectors do not come, members vanish.

Everything is drawn from one seed. A member here is what a node's shell is: it carries out a machine's effects, with
real masses. What must be true of any member and machine is checked in every step; `Broken` says what is not.
"""

from __future__ import annotations

import copy
import hashlib
import heapq
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from farflung.aggregation.graphs import Mixing, parse_graph, plan_round
from farflung.protocol.blob import BlobRef
from farflung.protocol.deadline import AdaptiveDeadline
from farflung.protocol.identity import PeerId
from farflung.protocol.mixing.clockwork import Patience, TickPlan, plans_of
from farflung.protocol.mixing.notes import Absent, Fence, Note, Parcel, Receipt
from farflung.protocol.mixing.push_sum import Close, Get, Split, Stage, Tell

RUN_ID, ROUND = bytes(20), 7
BEAT_S, BEAT_DELAY_S = 0.5, 0.2
"""Members say something this often, whatever they do, and it takes so long."""
STEPS_MAX = 12_000


class Broken(AssertionError):
    """What mixing promised is not true. A planted bug must end in this one."""


@dataclass(frozen=True)
class Weather:
    """What the world does to members."""

    loss: float = 0.0
    double: float = 0.0
    delay_s: tuple[float, float] = (0.01, 0.1)
    straggle: float = 0.0
    """Of notes, how many take up to `straggle_s`."""
    straggle_s: float = 3.0
    fetch_s: tuple[float, float] = (0.02, 0.3)
    fetch_fails: float = 0.0
    start_s: float = 0.0
    """Members begin within so long of each other."""
    split_s: float = 0.0
    crash: float = 0.0
    """Chance of each member to vanish at some time in the first seconds; half of those come back."""
    crash_within_s: float = 6.0


CALM = Weather()
SKEWED = Weather(delay_s=(0.01, 0.6), fetch_s=(0.02, 1.0), start_s=3.0, split_s=0.3)
STORM = Weather(0.3, 0.2, (0.01, 0.4), 0.1, 3.0, (0.02, 1.2), 0.2, 3.0, 0.2, 0.15)


@dataclass(frozen=True)
class Waits:
    floor_s: float = 1.0
    ceiling_s: float = 8.0
    silence_s: float = 3.0
    settle_s: float = 2.0
    resend_s: float = 0.4
    history_s: float | None = None
    """How long earlier rounds took."""

    def patience(self) -> Patience:
        tick = AdaptiveDeadline(self.floor_s, self.ceiling_s, 6)
        if self.history_s is not None:
            tick.observe(self.history_s)
        return Patience(tick, self.silence_s, self.settle_s, self.resend_s)


def peer_of(index: int) -> PeerId:
    return PeerId(hashlib.sha256(b"%d" % index).digest()[:20])


def members_of(n: int) -> tuple[PeerId, ...]:
    return tuple(sorted(peer_of(index) for index in range(n)))


@lru_cache(maxsize=512)
def plan_of(graph: str, n: int, ticks: int) -> tuple[Mixing, ...]:
    """`ticks` 0: a whole period."""
    spec = parse_graph(graph)
    return plan_round(spec, n, ticks or spec.period(n), run_id=RUN_ID, round_index=ROUND)


def tick_plans(me: PeerId, members: tuple[PeerId, ...], plan: tuple[Mixing, ...]) -> tuple[TickPlan, ...]:
    return plans_of(me, members, [[[share.to for share in column.sends] for column in tick] for tick in plan])


def blob_of(*parts: object) -> BlobRef:
    """The name of a vector: nobody reads the bytes, but no two may share one."""
    return BlobRef(hashlib.sha256(repr(parts).encode()).digest(), 64, 1 << 14)


@dataclass
class Member(ABC):
    """A node's shell: the machine, what it works on, and the checks that hold in any weather."""

    me: PeerId
    world: World
    plan: tuple[TickPlan, ...]
    waits: Waits
    machine: Any = None
    patience: Patience = field(init=False)
    began_s: float = math.nan
    over_s: float = math.nan
    down_s: float = math.inf
    back_s: float = math.inf
    asked_splits: list[int] = field(default_factory=list)
    tick_began_s: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Tick -> when its shares left, and the deadline then."""
    tick_ended_s: dict[int, float] = field(default_factory=dict)
    closed: bool = False
    stamp: int = 0
    """Counts this member's lives: what was begun in an earlier one is forgotten."""
    wakes_s: float = math.inf
    early: list[tuple[PeerId, Note]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.patience = self.waits.patience()

    # -- what kinds of mixing differ in -------------------------------------------------------------------------------

    @abstractmethod
    def build(self, now_s: float) -> Any:
        """The machine."""

    @abstractmethod
    def shares(self, tick: int) -> Any:
        """What `post` takes."""

    @abstractmethod
    def move(self, effect: Any) -> None:
        """Carry out what moves vectors. Raises Broken after the books were closed."""

    @abstractmethod
    def close(self) -> None:
        """Take the books."""

    @abstractmethod
    def fetched(self, peer: PeerId, note: Note) -> None:
        """A vector is here."""

    # -- events -------------------------------------------------------------------------------------------------------

    def is_up(self, now_s: float) -> bool:
        return not self.down_s <= now_s < self.back_s

    @property
    def over(self) -> bool:
        return self.machine is not None and self.machine.stage is Stage.OVER

    def start(self, now_s: float) -> None:
        if self.down_s <= now_s:
            return  # came back after the certificate: it takes no part
        self.began_s, self.machine = now_s, self.build(now_s)
        self.carry_out(self.machine.begin(now_s), now_s)
        for peer, note in self.early:
            self.hear(peer, note, now_s)

    def crash(self) -> None:
        """All of this round is in memory, and gone: the account too, which has not been announced yet."""
        self.machine, self.stamp = None, self.stamp + 1

    def hear(self, peer: PeerId, note: Note, now_s: float) -> None:
        if self.down_s <= now_s:
            self._decline(peer, note)
        elif self.machine is None:
            self.early.append((peer, note))
        else:
            self.carry_out(self.machine.hear(peer, note, now_s), now_s)

    def _decline(self, peer: PeerId, note: Note) -> None:
        """What a restarted member counted before is gone with it: whatever its partners still have goes home."""
        content, told = note.content, []
        if isinstance(content, Parcel | Fence):
            end = content.seq + 1 if isinstance(content, Parcel) else content.epoch
            told.append(Receipt(content.generation, content.epoch, end, (), tuple(range(content.oldest, end))))
        if content is not None and not isinstance(content, Absent):
            told.append(Absent() if self.world.says_absent else None)
        for answer in told:
            self.world.tell(self, peer, Note(note.fragment, note.tick, answer))

    def got(self, stamp: int, peer: PeerId, note: Note, came: bool, now_s: float) -> None:
        if self.machine is None or stamp != self.stamp:
            return
        if came:
            self.fetched(peer, note)
        step = self.machine.arrived if came else self.machine.missed
        self.carry_out(step(peer, note, now_s), now_s)

    def wake(self, now_s: float) -> None:
        if self.machine is None or now_s != self.wakes_s:
            return  # something else happened meanwhile, and it wakes at another time
        self.wakes_s = math.nan
        self.carry_out(self.machine.tick(now_s), now_s)

    def post(self, tick: int, shares: Any, now_s: float) -> None:
        self.tick_began_s[tick] = now_s, self.patience.tick.value_s
        self.carry_out(self.machine.post(tick, shares, now_s), now_s)

    def carry_out(self, effects: list[Any], now_s: float) -> None:
        world, stamp = self.world, self.stamp
        for effect in effects:
            world.log.append((now_s, self.me, effect))
            match effect:
                case Split(tick):
                    self.asked_splits.append(tick)
                    self.tick_ended_s[tick - 1] = now_s
                    shares, later_s = self.shares(tick), world.dice.uniform(0.0, world.weather.split_s)
                    world.at(
                        now_s + later_s, lambda at_s, t=tick, s=shares: self._if_same(stamp, self.post, t, s, at_s)
                    )
                case Tell(peer, note):
                    world.tell(self, peer, note)
                case Get(peer, note):
                    world.fetch(self, stamp, peer, note)
                case Close():
                    self.tick_ended_s.setdefault(len(self.plan) - 1, now_s)
                    self.over_s = now_s
                    self.close()
                    later_s = world.dice.choice([0.0, 0.0, 0.5])
                    world.at(now_s + later_s, lambda at_s: self._if_same(stamp, self._closed, at_s))
                case _:
                    self.move(effect)
        self._check(now_s)

    def _closed(self, now_s: float) -> None:
        self.closed = True
        self.carry_out(self.machine.closed(now_s), now_s)

    def _if_same(self, stamp: int, act: Callable[..., None], *args: Any) -> None:
        if self.machine is not None and self.stamp == stamp:
            act(*args)

    def _check(self, now_s: float) -> None:
        machine = self.machine
        if self.asked_splits != list(range(len(self.asked_splits))):
            raise Broken(f"splits were asked for as {self.asked_splits}")
        if machine.stage is Stage.SETTLING:
            self.tick_ended_s.setdefault(len(self.plan) - 1, now_s)
        wake_s = machine.wake_s
        if not wake_s > now_s:
            raise Broken(f"wakes at {wake_s} when it is {now_s}, {machine.stage}: a busy loop")
        if self.over and wake_s < math.inf:
            raise Broken("wakes after it is over")
        if self.world.curious and machine.stage is not Stage.OVER:
            self._check_sleep(now_s, wake_s)
        if wake_s != self.wakes_s:
            self.wakes_s = wake_s
            self.world.at(wake_s, self.wake)

    def _check_sleep(self, now_s: float, wake_s: float) -> None:
        """Nothing is due before it wakes, however often it is asked."""
        soon_s = now_s + 0.99 * min(wake_s - now_s, 100.0)
        alone = copy.copy(self.machine)
        partners = [peer for tick in alone.plan for peer in (*tick.sends, *tick.awaits)]
        alone.heard = {peer: self.machine.heard(peer) for peer in partners}.get
        shadow = copy.deepcopy(alone)
        if soon_s == wake_s:
            return  # no number lies between
        if shadow.tick(soon_s) or shadow.stage is not self.machine.stage:
            raise Broken(f"something was due at {soon_s}, and it would have slept until {wake_s}")


@dataclass
class World:
    """A seed's story. `make` builds member number i of the sorted members."""

    seed: int
    weather: Weather
    n: int
    make: Callable[[World, int, PeerId], Member]
    curious: bool = False
    now_s: float = 0.0
    members: tuple[Member, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    log: list[tuple[float, PeerId, Any]] = field(default_factory=list)
    drop: Callable[[PeerId, PeerId, Note], bool] = lambda sender, receiver, note: False
    """Notes that are lost besides those that the weather takes."""
    says_absent: bool = True
    """Or who came back says of every tick that it has nothing."""
    slow: dict[PeerId, float] = field(default_factory=dict)
    """Members on slow lines: so many seconds more for every vector, in either direction."""
    steps: int = 0
    _heap: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    _order: int = 0

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.members = tuple(self.make(self, at, peer) for at, peer in enumerate(members_of(self.n)))
        self.by_id = {member.me: member for member in self.members}

    def at(self, when_s: float, act: Callable[[float], None]) -> None:
        if when_s < math.inf:
            self._order += 1
            heapq.heappush(self._heap, (when_s, self._order, act))

    def run(self) -> World:
        dice, weather = self.dice, self.weather
        for member in self.members:
            if dice.random() < weather.crash:
                self.vanish(
                    member, dice.uniform(0.0, weather.crash_within_s), dice.choice([math.inf, dice.uniform(0.5, 5)])
                )
            self.at(dice.uniform(0.0, weather.start_s), member.start)
        while self._heap:
            self.steps += 1
            if self.steps > STEPS_MAX:
                raise Broken(f"{STEPS_MAX} steps and no end: a busy loop, or a storm of notes")
            self.now_s, _, act = heapq.heappop(self._heap)
            act(self.now_s)
        return self

    def vanish(self, member: Member, down_s: float, away_s: float) -> None:
        member.down_s, member.back_s = down_s, down_s + away_s
        self.at(down_s, lambda _: member.crash())

    def count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    # -- the network --------------------------------------------------------------------------------------------------

    def heard(self, peer: PeerId) -> float | None:
        """When a member was heard last: the last beat that is here by now."""
        member = self.by_id[peer]
        until_s = self.now_s - BEAT_DELAY_S
        if member.down_s <= until_s < member.back_s:
            until_s = member.down_s
        return None if until_s < 0 else math.floor(until_s / BEAT_S) * BEAT_S

    def tell(self, sender: Member, to: PeerId, note: Note) -> None:
        if self.curious and Note.from_json(note.to_json()) != note:
            raise Broken(f"{note} does not come back")
        self.count(type(note.content).__name__)
        weather, dice = self.weather, self.dice
        if self.drop(sender.me, to, note):
            return
        for _ in range(1 + (dice.random() < weather.double)):
            if dice.random() >= weather.loss:
                slow = dice.random() < weather.straggle
                delay_s = dice.uniform(*weather.delay_s) + slow * dice.uniform(0.0, weather.straggle_s)
                self.at(self.now_s + delay_s, lambda now_s: self._deliver(sender.me, to, note, now_s))

    def _deliver(self, sender: PeerId, to: PeerId, note: Note, now_s: float) -> None:
        receiver = self.by_id[to]
        if receiver.is_up(now_s):
            receiver.hear(sender, note, now_s)

    def fetch(self, receiver: Member, stamp: int, peer: PeerId, note: Note) -> None:
        """The vector comes from its sender, if that is still there when it has come, and the line holds."""
        self.count("fetch")
        dice, sender = self.dice, self.by_id[peer]
        fails, takes_s = dice.random() < self.weather.fetch_fails, dice.uniform(*self.weather.fetch_s)
        takes_s += self.slow.get(peer, 0.0) + self.slow.get(receiver.me, 0.0)

        def come(now_s: float) -> None:
            came = not fails and sender.machine is not None and sender.is_up(now_s)
            receiver.got(stamp, peer, note, came, now_s)

        self.at(self.now_s + takes_s, come)

    # -- what holds in any weather ------------------------------------------------------------------------------------

    @property
    def alive(self) -> list[Member]:
        """Who took part from beginning to end."""
        return [member for member in self.members if member.machine is not None]

    def check_time(self) -> None:
        """Everybody was done in time: ticks within their deadlines, the round within the sum of them."""
        for member in self.alive:
            waits, ticks = member.waits, len(member.plan)
            if not member.over or member.asked_splits != list(range(ticks)):
                raise Broken(f"{member.me} is {member.machine.stage} after splits {member.asked_splits}")
            for tick, (began_s, deadline_s) in member.tick_began_s.items():
                if member.tick_ended_s[tick] > began_s + deadline_s + 1e-9:
                    raise Broken(f"tick {tick} took {member.tick_ended_s[tick] - began_s}, not {deadline_s}")
            most_s = (ticks + 1) * waits.ceiling_s + waits.settle_s + ticks * self.weather.split_s
            if member.over_s - member.began_s > most_s + 1e-9:
                raise Broken(f"the round took {member.over_s - member.began_s}, not {most_s}")
