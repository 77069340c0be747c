"""`farflung bench wire`: what one member sends in one round, counted from the real graphs, payloads and statements.

Everything that one member sends another one receives, so means over members are the same up and down. What grows:

    gather      n - 1 payloads each way
    push-sum    one payload per receiver and tick: K at most on a graph of degree one; and the accounts of n - 1 others
    pairs       one payload per meeting; and those accounts
    all         n - 1 announcements, votes and signs of life; and what is told to many of many: certificates to late
                voters, news of who has what

Counted is an ordinary round: everybody is there, nothing is lost or said twice but signs of life.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from farflung.aggregation.graphs import Mixing, parse_graph, partners_of, plan_round
from farflung.node.mixing_codec import EXACT
from farflung.protocol import limits
from farflung.protocol.errors import ConfigError, LocalError
from farflung.protocol.genesis import MODES, Timing
from farflung.protocol.mixing.settings import FRAGMENTS_MAX, TICKS_MAX
from farflung.sim.bench import wire_sizes as sizes
from farflung.sim.timing.exchange import FLIGHTS

TICK_FLIGHTS = 3
"""One-way delays of a tick: the note, asking for its vector, the vector."""

CERTIFY_FLIGHTS = 2
"""The proposal and the votes."""


@dataclass(frozen=True)
class Way:
    """One way of exchanging. Raises ConfigError for what no run could do."""

    mode: str
    codec: str
    graph: str = ""
    """Who gives to whom, where members mix."""
    ticks: int = 0
    """0: the graph's period."""
    fragments: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES or (self.mode == "gather") != (not self.graph):
            raise ConfigError(f"a way is gather, or push-sum or pairs over a graph, got {self}")
        if not 0 <= self.ticks <= TICKS_MAX or not 1 <= self.fragments <= FRAGMENTS_MAX:
            raise ConfigError(f"0 to {TICKS_MAX} ticks and 1 to {FRAGMENTS_MAX} fragments, got {self}")
        if self.graph:
            parse_graph(self.graph)

    @property
    def mixes(self) -> bool:
        """Whether members mix instead of gathering."""
        return self.mode != "gather"

    @property
    def label(self) -> str:
        """For tables: the mode, how long it mixes, and the codec."""
        length = f", K = {self.ticks or 'period'}" if self.mixes else ""
        return f"{self.mode}{length}, {self.codec}"


class Plan(NamedTuple):
    """What a round's graph asks of members, in parcels."""

    ticks: int
    mean: float
    """Parcels a member sends in the round, mean over members."""
    tallest: float
    """Sum over ticks of the most that anybody sends: for whom everybody waits."""
    partners: float
    """Different members that a member exchanges with, mean over members."""


@dataclass(frozen=True)
class Count:
    """What one member sends, and receives, in one round: bytes, mean over members; messages, not TCP's or TLS's."""

    way: Way
    members: int
    ticks: int
    payload_bytes: int
    """Of one payload, all fragments together."""
    payloads: float
    """How many of them a member sends."""
    payloads_most: float
    """The most that anybody sends, tick by tick: for whom everybody waits."""
    reference: float
    """Of the reference that is published every so many rounds, spread over them."""
    carried: float
    """What goes over the bulk connections besides: requests, lists of digests, frames, accounts."""
    said: float
    """What goes over the control connections: statements, notes, answers, news of who has what."""
    beats: float
    """Signs of life."""
    flights: int
    """One-way delays that follow one another."""

    @property
    def bulk(self) -> float:
        """Payloads and the reference."""
        return self.payloads * self.payload_bytes + self.reference

    @property
    def control(self) -> float:
        """What is no payload."""
        return self.carried + self.said + self.beats

    @property
    def total(self) -> float:
        """All bytes."""
        return self.bulk + self.control

    def wire_s(self, up_bps: float, down_bps: float, latency_s: float) -> float:
        """Seconds of the exchange on equal full-duplex lines, codec and training apart; `latency_s` is one way."""
        bits = 8 * (self.payloads_most * self.payload_bytes + self.reference + self.carried + self.said)
        return bits / min(up_bps, down_bps) + self.flights * latency_s


@dataclass(frozen=True)
class Ground:
    """What all ways are counted on."""

    payload_bytes: Mapping[str, int]
    """Codec -> length of one payload of all parameters."""
    state_bytes: int
    """Of a reference: the parameters and what the outer optimiser keeps."""
    reference_rounds: int
    """How often one is published."""
    round_s: float
    """How long a round lasts: members show that they are alive as long as it does."""


def count(way: Way, members: int, ground: Ground) -> Count:
    """Count one way for `members` members. Costs a plan of the graph. Raises ConfigError for what no run could do."""
    plan = plan_of(way.graph, members, way.ticks, pairs=way.mode == "pairs") if way.mixes else None
    return _count(way, members, ground, plan)


def _count(way: Way, members: int, ground: Ground, plan: Plan | None) -> Count:
    if not 2 <= members <= limits.MEMBERS_MAX:
        raise ConfigError(f"a swarm that exchanges has 2 to {limits.MEMBERS_MAX} members, got {members}")
    size, others = ground.payload_bytes[way.codec], members - 1
    beats = others * sizes.status_bytes() * (1 + int(ground.round_s * 1000 // Timing().resend_ms))
    if plan is None:
        carried, said = others * sizes.fetch_bytes(size), _agreed(members, size) + _news(members, size)
        flights = FLIGHTS + CERTIFY_FLIGHTS
        return Count(way, members, 0, size, others, others, 0.0, carried, said, beats, flights)
    account = sizes.account_bytes(math.ceil(plan.partners), way.fragments, ledgers=way.mode == "push-sum")
    part, parcels = -(-size // way.fragments), plan.mean * way.fragments
    note = sizes.offer_bytes(part) if way.mode == "pairs" else sizes.parcel_bytes(part, copies=way.codec != EXACT)
    share = 1 / members / ground.reference_rounds  # one of all members publishes a reference, now and then
    bulky = others * (account + sizes.fetch_bytes(account)) + parcels * sizes.direct_bytes(part)
    bulky += share * others * sizes.fetch_bytes(ground.state_bytes)
    told = _agreed(members, account) + _news(members, account) + parcels * note
    told += share * _news(members, ground.state_bytes)
    reference, flights = share * others * ground.state_bytes, FLIGHTS + CERTIFY_FLIGHTS + TICK_FLIGHTS * plan.ticks
    return Count(way, members, plan.ticks, size, plan.mean, plan.tallest, reference, bulky, told, beats, flights)


def _agreed(members: int, payload_bytes: int) -> float:
    """Announcement, vote, and a proposal by one of all members, to all others; and the certificate to those whose vote
    comes after a quorum's: they are a round behind, and are told so."""
    others = members - 1
    spoken: float = sizes.announcement_bytes(payload_bytes) + sizes.vote_bytes()
    spoken += sizes.proposal_bytes(members, payload_bytes) / members
    return others * spoken + (members - 1) // 2 * sizes.certified_bytes(members, payload_bytes)


def _news(members: int, size: int) -> float:
    """Everybody has a blob that everybody gets: telling all others of what is here."""
    others = members - 1
    return others * (sizes.own_news_bytes() + others * sizes.news_bytes(size))


@lru_cache(maxsize=4096)
def plan_of(spec: str, members: int, ticks: int, *, pairs: bool) -> Plan:
    """What a round of so many ticks (0: a period) asks of members; of fewer than a period, the mean over rounds.

    Raises ConfigError for pairs over a graph whose ticks are no matchings.
    """
    graph, period = parse_graph(spec), _period(spec, members)
    rounds = range(sizes.ROUND, sizes.ROUND + (period if 0 < ticks < period else 1))
    found = [
        _plan(plan_round(graph, members, ticks or period, run_id=sizes.RUN_ID, round_index=index), pairs=pairs)
        for index in rounds
    ]
    mean, tallest, partners = (math.fsum(part) / len(found) for part in zip(*(item[1:] for item in found), strict=True))
    return Plan(ticks or period, mean, tallest, partners)


def _plan(mixings: Sequence[Mixing], *, pairs: bool) -> Plan:
    if pairs:
        try:
            for mixing in mixings:
                partners_of(mixing)
        except LocalError as error:
            raise ConfigError(str(error)) from None
    members = len(mixings[0])
    sent = [len(column.sends) for mixing in mixings for column in mixing]
    met: list[dict[int, None]] = [{} for _ in range(members)]
    for mixing in mixings:
        for i, column in enumerate(mixing):
            for share in column.sends:
                met[i][share.to] = met[share.to][i] = None
    tallest = sum(max(len(column.sends) for column in mixing) for mixing in mixings)
    return Plan(len(mixings), sum(sent) / members, tallest, sum(map(len, met)) / members)


class Crossing(NamedTuple):
    """Where one way overtakes another: the least number of members for which it is below, and the number from which on
    it always is, up to the most that a run can have. None: never."""

    first: int | None
    always: int | None


def crossing(mixing: Way, gather: Way, ground: Ground, cost: Callable[[Count], float]) -> Crossing:
    """Where mixing costs less than gathering.

    Costs a plan for every number of members for which the most that a graph of this degree can send does not say it.
    """
    degree, first, always = parse_graph(mixing.graph).degree, None, None
    below = True
    for members in range(limits.MEMBERS_MAX, 1, -1):
        gathered, ticks = cost(count(gather, members, ground)), mixing.ticks or _period(mixing.graph, members)
        most = degree(members) * ticks
        bound = Plan(ticks, most, most, min(2 * most, members - 1))
        less = (
            cost(_count(mixing, members, ground, bound)) < gathered or cost(count(mixing, members, ground)) < gathered
        )
        below = below and less
        first, always = members if less else first, members if below else always
    return Crossing(first, always)


@lru_cache(maxsize=4096)
def _period(spec: str, members: int) -> int:
    return parse_graph(spec).period(members)


def count_all(ways: Sequence[Way], members: Sequence[int], ground: Ground) -> list[Count]:
    """Every way for every number of members."""
    return [count(way, n, ground) for n in members for way in ways]
