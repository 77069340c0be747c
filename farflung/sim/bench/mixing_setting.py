"""What a run of members that mix is: a form of exchange with its settings, and the training around it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

from farflung.aggregation.gasloc import parse_gasloc
from farflung.aggregation.graphs import parse_graph, partners_of, plan_round
from farflung.aggregation.outer import parse_outer
from farflung.aggregation.pairs import Radius
from farflung.aggregation.persistent import parse_persistent
from farflung.aggregation.weights import parse_weights
from farflung.compression import parse_codec
from farflung.node.tasks.stdlib_gpt import StdlibGpt
from farflung.protocol.errors import ConfigError
from farflung.sim.bench.arena import arena_task
from farflung.sim.bench.mixing_liars import parse_lying

HONEST = ""
"""In place of an attack: nobody lies."""


@dataclass(frozen=True)
class Gather:
    """Everybody gets everybody's pseudo-gradient, and the mean of them: the reference."""

    kind: ClassVar[str] = "gather"

    weights: str = "uniform"
    """How claims become weights (`aggregation.weights`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", parse_weights(self.weights).spec)


@dataclass(frozen=True)
class PushSum:
    """Fresh mass in every round, and so many ticks over a graph. Raises ConfigError for what does not parse."""

    kind: ClassVar[str] = "push-sum"

    ticks: int = 0
    """K; 0: the graph's period."""

    graph: str = "base(k=1)"

    weights: str = "uniform"
    """How claims become mass."""

    loss: float = 0.0
    """Of messages, each by itself."""

    ledger: bool = True
    """Does lost mass go home? The naive form forgets it. Only a run that loses messages may go without."""

    flow: str = ""
    """The codec of every edge, in flow form with copies that start at zero in every round; "": masses as they are."""

    def __post_init__(self) -> None:
        _check_loss(self.loss)
        if self.ticks < 0 or (not self.ledger and not self.loss) or (not self.ledger and self.flow):
            raise ConfigError(
                f"ticks are not negative, and only loss of fp32 messages does without a ledger, got {self}"
            )
        object.__setattr__(self, "graph", parse_graph(self.graph).spec)
        object.__setattr__(self, "weights", parse_weights(self.weights).spec)
        object.__setattr__(self, "flow", parse_codec(self.flow).spec if self.flow else "")


@dataclass(frozen=True)
class Pairs:
    """Members meet two by two. Raises ConfigError for what does not parse or is no matching."""

    kind: ClassVar[str] = "pairs"

    ticks: int = 1

    graph: str = "random-matching"

    radius: float | None = None
    """Differences are clipped to min(τ_i, τ_j), τ being so many usual distances (`pairs.Radius`); None: the plain mean
    of the pair."""

    loss: float = 0.0
    """Of vectors, each by itself: who hears nothing stays where it is, whatever its partner does."""

    attack: str = HONEST
    """What liars tell their partners (`mixing_liars`); "": nobody lies."""

    liars: int = 0
    """Of the members, the last ones."""

    def __post_init__(self) -> None:
        _check_loss(self.loss)
        graph = parse_graph(self.graph)
        for mixing in plan_round(graph, 4, max(1, self.ticks), run_id=b"", round_index=0):
            partners_of(mixing)
        if self.ticks < 1 or self.liars < 0 or bool(self.attack) != bool(self.liars):
            raise ConfigError(f"pairs meet at least once, and an attack has liars, got {self}")
        if self.radius is not None:
            Radius(self.radius)
        object.__setattr__(self, "graph", graph.spec)
        object.__setattr__(self, "attack", parse_lying(self.attack).spec if self.attack else HONEST)


@dataclass(frozen=True)
class Persistent:
    """Mass that lives on from round to round: outer steps go to the numerator. All members weigh the same."""

    kind: ClassVar[str] = "persistent"

    ticks: int = 1
    """After each round's step."""

    graph: str = "base(k=1)"
    """A regular one (`persistent.check_regular`)."""

    loss: float = 0.0
    """Of messages, each by itself."""

    ledger: bool = True
    """Does lost mass go home?"""

    def __post_init__(self) -> None:
        _check_loss(self.loss)
        if self.ticks < 1 or (not self.ledger and not self.loss):
            raise ConfigError(f"a round has a tick, and only loss does without a ledger, got {self}")
        object.__setattr__(self, "graph", parse_graph(self.graph).spec)


@dataclass(frozen=True)
class Accelerated:
    """GASLoC over fresh mass: members step, mix what comes of it, and are accelerated (`aggregation.gasloc`). The outer
    step of such a run is called "gasloc(lr=0.4,alpha=1.0,gamma=0.5)"."""

    kind: ClassVar[str] = "gasloc"

    ticks: int = 1

    graph: str = "base(k=1)"
    """A symmetric one, as all here are but the exponential ones and od-equidyn."""

    loss: float = 0.0
    """Of messages, each by itself; lost mass goes home."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "graph", self.mixing.graph)
        if self.ticks < 1:
            raise ConfigError(f"a round has at least one tick, got {self.ticks}")

    @property
    def mixing(self) -> PushSum:
        """The exchange that pulls."""
        return PushSum(self.ticks, self.graph, loss=self.loss)


Exchange = Gather | PushSum | Pairs | Persistent | Accelerated


class Pace(NamedTuple):
    """How much a member does in a round."""

    steps: int
    batch: int


@dataclass(frozen=True)
class MixSetting:
    """One run. Settings that differ only in `exchange` and `outer` see the same samples from the same parameters."""

    exchange: Exchange
    outer: str
    """Each member's own, on its own pseudo-gradient."""
    seed: int = 0
    """Of initial parameters, of the order of the data, of graphs and of lost messages."""
    rounds: int = 60
    inner_steps: int = 15
    members: int = 16
    paces: tuple[Pace, ...] = ()
    """Members are dealt to these in turn; (): all of them do `inner_steps` with the task's batch."""
    report_every: int = 10
    """Rounds between validations."""
    reference_every: int = 20
    """Rounds after which some honest member's parameters become θ_ref, from which fresh mass and pairs are measured."""
    task: StdlibGpt = field(default_factory=lambda: arena_task(0))

    def __post_init__(self) -> None:
        least = min(self.rounds, self.inner_steps, self.members, self.report_every, self.reference_every)
        if least < 1 or any(min(pace) < 1 for pace in self.paces) or len(self.paces) > self.members:
            raise ConfigError(f"a run has at least one of everything, and a member for each pace, got {self}")
        if self.liars >= self.members:
            raise ConfigError(f"some member must be honest, got {self.liars} liars among {self.members}")
        object.__setattr__(self, "outer", _outer_of(self.exchange, self.outer))

    @property
    def liars(self) -> int:
        """How many of the members lie."""
        return self.exchange.liars if isinstance(self.exchange, Pairs) else 0

    @property
    def honest(self) -> int:
        """How many do not: the first ones."""
        return self.members - self.liars

    @property
    def pace_n(self) -> tuple[Pace, ...]:
        """What each member does in a round."""
        paces = self.paces or (Pace(self.inner_steps, self.task.batch),)
        return tuple(paces[i % len(paces)] for i in range(self.members))

    @property
    def ticks(self) -> int:
        """Of one round; 0 where nobody mixes."""
        if isinstance(self.exchange, Gather):
            return 0
        return self.exchange.ticks or parse_graph(self.exchange.graph).period(self.members)

    @property
    def run_id(self) -> bytes:
        """What seeds the graphs."""
        return b"mixing" + self.seed.to_bytes(8, "big")

    @property
    def key(self) -> dict[str, Any]:
        """What makes this run this run, as plain values."""
        return asdict(self) | {"exchange": {"kind": self.exchange.kind, **asdict(self.exchange)}}


def _outer_of(exchange: Exchange, spec: str) -> str:
    """Canonical text. Raises ConfigError for a step that the exchange cannot take."""
    if isinstance(exchange, Accelerated):
        rule = parse_gasloc(spec)
        return f"gasloc(lr={rule.lr!r},alpha={rule.alpha!r},gamma={rule.gamma!r})"
    if isinstance(exchange, Persistent):
        parse_persistent(spec)
    outer = parse_outer(spec)
    if outer.judged is not None:
        raise ConfigError(f"members that mix are judged by their parameters, which {outer.spec} does not want")
    return outer.spec


def _check_loss(loss: float) -> None:
    if not 0 <= loss < 1:
        raise ConfigError(f"the loss of messages lies from 0 to below 1, got {loss}")
