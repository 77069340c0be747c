"""A scenario: one question to the simulator, as values. `scenario_file.py` reads them from TOML, presets included.

Every setting is used by at least one fidelity, and refused (`ConfigError`) where it would change nothing: the checks
are in `scenario_checks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from farflung.sim import scenario_checks as checks
from farflung.sim.draw import Draw
from farflung.sim.mixing_checks import check_mixing, check_mode

FIDELITIES = ("timing", "training")
EXCHANGES = ("gather", "star", "ring", "butterfly")
QUEUES = ("fq", "fifo")
CHURNS = ("weibull", "lognormal", "exponential", "diurnal", "trace")
FAULTS = ("crash", "leave", "partition", "slow_disk", "clock_skew", "link", "straggle")
ATTACKS = ("sign_flip", "noise", "garbage", "straggle", "equivocate", "starve")

_ZERO = Draw.fixed(0)
_HUNDRED = Draw.fixed(100)


@dataclass(frozen=True)
class Run:
    """What the swarm agrees on: the genesis, in short. Specs are parsed by the rooms that own them."""

    codec: str = "ef(1)|q2"
    """How updates travel."""

    rule: str = "mean"
    """How they are combined. Timing only: what combining costs."""

    outer: str = "nesterov(lr=0.7,momentum=0.6)"
    """How the anchor moves. Timing only: whether there is a momentum that joiners have to fetch."""

    weights: str = "uniform"
    """Training only: what members count for."""

    mode: str = "gather"
    """Training only: how updates meet: "gather", "push-sum" or "pairs". The last two take a codec without state, such
    as fp32, int8 or int4."""

    mixing: dict[str, object] = field(default_factory=dict)
    """Training only: how members mix in push-sum and pairs mode, as in a run file's [mixing]; what is left out follows
    the mode."""

    inner_steps: int = 100
    """H: local steps of a round."""

    exchange: str = "gather"
    """gather; and in timing-only fidelity also the classical star, ring and butterfly, to compare with."""

    grace_s: float = 5.0
    """How long a round stays open after a quorum has spoken."""

    quorum_percent: int = 66
    """Share of the members whose updates start the grace window."""

    deadline_floor_s: float = 10.0
    """A round's adaptive deadline is never shorter."""

    deadline_ceiling_s: float = 600.0
    """... and never longer; it is also the deadline while there is no history."""

    snapshot_rounds: int = 10
    """Every so many rounds a member writes its state to disk, for joiners and restarts."""

    def __post_init__(self) -> None:
        checks.check_run(self)
        check_mode(self)


@dataclass(frozen=True)
class Model:
    """What is trained, or how big it would be."""

    params: float = 0.0
    """Parameters that time and bytes are charged for. Timing only: required, any size. Training: 0 charges the task's
    own; more makes the small model stand in for a big one (bytes and compute are scaled by the ratio)."""

    layers: int = 0
    """Of the big model; only for memory estimates. 0: from params by the usual aspect ratio."""

    task: str = ""
    """Training only: "builtin:stdlib-gpt" and the like, or "module:object" of your own."""

    options: dict[str, object] = field(default_factory=dict)
    """Training only: the task's options."""

    tokens_per_step: float = 0.0
    """Tokens of one inner step of one member: gives the pace of members with a `gpu`, and in timing-only fidelity the
    loss estimate. Required there unless every member has `step_ms`; in training 0 is the task's own batch."""

    tokens: float = 0.0
    """Timing only: the budget within which the loss goal is to be met; 0: 20 tokens per parameter (Chinchilla)."""

    def __post_init__(self) -> None:
        checks.check_model(self)


@dataclass(frozen=True)
class Churn:
    """How members come and go: sessions and gaps are drawn independently, or come from a trace file."""

    kind: str = "weibull"
    """weibull, lognormal, exponential: `session_s` and `gap_s`; diurnal: `low`, `high`, `period_h`; trace: `trace`."""

    session_s: Draw | None = None
    """How long a member stays. Not for diurnal and trace."""

    gap_s: Draw | None = None
    """How long it is away."""

    crash: float = 1.0
    """Share of departures without a word; the others leave politely. Not for trace: the file says it."""

    low: float = 0.5
    """diurnal: share of members online at the quietest hour."""

    high: float = 1.0
    """diurnal: share at the busiest."""

    period_h: float = 24.0
    """diurnal: length of a day."""

    trace: str = ""
    """trace: a file of sessions (see `traces.py`), relative to the scenario file."""

    def __post_init__(self) -> None:
        checks.check_churn(self)


@dataclass(frozen=True)
class Members:
    """A group of members that are alike up to what is drawn for each."""

    count: int = 1
    """How many. The first member of the first group is the founder: it never churns and is never drawn to attack."""

    name: str = "member"
    """Of the group; groups have different names."""

    up_mbit: Draw = _HUNDRED
    """Uplink, decimal Mbit/s."""

    down_mbit: Draw = _HUNDRED
    """Downlink, decimal Mbit/s."""

    region: str = ""
    """One of the network's regions; empty: the first."""

    last_mile_ms: Draw = _ZERO
    """One-way delay between the machine and its region's backbone, added at both ends of a path."""

    queue: str = "fq"
    """fifo: a home router without queue management, acknowledgements wait behind bulk; fq: they do not."""

    queue_ms: float = 100.0
    """How much a fifo uplink queues."""

    loss: float = 0.0
    """Share of packets lost on the last mile; limits TCP by Mathis' formula."""

    link: str = ""
    """Name of a shared link (household, campus, transit) that everything of this group crosses."""

    reachable: bool = True
    """False: behind NAT; it calls others, nobody can call it (what it holds cannot be fetched: it is a leaf)."""

    data_cap_gb: float = 0.0
    """It goes offline for good when it has sent and received this much; 0: no cap."""

    gpu: str = ""
    """A preset of `compute.GPUS`; gives the step time from model size and tokens. Exclusive with `step_ms`."""

    mfu: float = 0.0
    """Model FLOP utilisation; 0: the preset's."""

    step_ms: Draw | None = None
    """A measured step time."""

    speed_sigma: float = 0.0
    """Lognormal spread of speed between members (sigma of the logarithm), fixed for a run."""

    jitter: float = 0.0
    """Each step takes 1 + this x Exp(1) times as long (shifted exponential)."""

    busy_every_s: float = 0.0
    """Mean time between two contention episodes (somebody plays a game); 0: none."""

    busy_for_s: float = 0.0
    """Mean length of an episode."""

    busy_slowdown: float = 2.0
    """How much slower steps are meanwhile."""

    memory_gb: float = 0.0
    """GPU memory; a model that does not fit is refused. 0: the preset's, or not checked."""

    fsync_ms: float = 0.0
    """How long one durable write to disk takes."""

    disk_mb_s: float = 0.0
    """Throughput of the disk; 0: not charged."""

    clock_skew_s: Draw = _ZERO
    """Training only: how far the wall clock is ahead."""

    join_after_s: Draw = _ZERO
    """When it first appears."""

    churn: Churn | None = None
    """Its sessions; None: it stays."""

    def __post_init__(self) -> None:
        checks.check_members(self)


@dataclass(frozen=True)
class SharedLink:
    """A line that several members share: a household's, a campus's, a transatlantic cable's."""

    name: str
    up_mbit: float
    down_mbit: float

    def __post_init__(self) -> None:
        checks.check_link(self)


@dataclass(frozen=True)
class Network:
    """Between the members."""

    regions: tuple[str, ...] = ("world",)
    """Names of places."""

    latency_ms: tuple[tuple[float, ...], ...] = ((20.0,),)
    """One way, from region to region; the diagonal is within a region."""

    links: tuple[SharedLink, ...] = ()
    """Lines that several members share; `[[network.link]]` in a file."""

    header_overhead: float = 1514 / 1448
    """Bytes on the wire per byte of payload (Ethernet, MTU 1500)."""

    window_mb: float = 4.0
    """What one TCP connection may have in flight."""

    message_loss: float = 0.0
    """Training only: share of control calls that never arrive (their caller waits until its deadline)."""

    def __post_init__(self) -> None:
        checks.check_network(self)


@dataclass(frozen=True)
class Fault:
    """Something that happens once."""

    kind: str
    """One of FAULTS; clock_skew in training only."""

    at_s: float
    """When, in virtual time."""

    members: tuple[int, ...] = ()
    """Whom it hits, by position in the scenario's list of members. A partition cuts these off from all others."""

    for_s: float = 0.0
    """How long it lasts: a crashed member restarts, a partition heals. 0: for good."""

    factor: float = 1.0
    """slow_disk, straggle: how many times slower; link: times the capacity; clock_skew: seconds."""

    def __post_init__(self) -> None:
        checks.check_fault(self)


@dataclass(frozen=True)
class Attack:
    """Some members lie, or use the network as a weapon."""

    kind: str
    """One of ATTACKS, or the text of one of `farflung.sim.attacks`, "alie(z=1.5)" for instance; in timing-only fidelity
    straggle and starve."""

    members: tuple[int, ...] = ()
    """Who, by position in the scenario's list of members."""

    count: int = 0
    """Instead of `members`: this many, drawn by the seed (never the founder)."""

    strength: float = 1.0
    """sign_flip: times the honest update; noise: standard deviations of it; straggle: share of the deadline used;
    starve: share of the others that get nothing."""

    from_round: int = 1
    """The first round in which they do it."""

    def __post_init__(self) -> None:
        checks.check_attack(self)


@dataclass(frozen=True)
class Scenario:
    """One question to the simulator."""

    name: str
    """Letters, digits, dot, dash and underscore: folders are named after it."""

    members: tuple[Members, ...]
    """Groups; members are numbered through all of them, from 0."""

    model: Model
    summary: str = ""
    """One sentence for people."""

    fidelity: str = "timing"
    """"timing": any model size, losses are estimates. "training": real nodes train in the loop."""

    rounds: int = 20
    """The run's length in rounds that trained."""

    limit_h: float = 1000.0
    """Virtual time after which a run is stopped, and reported as unfinished."""

    loss_goal: float = 0.0
    """For time to loss; 0: none asked."""

    run: Run = field(default_factory=Run)
    network: Network = field(default_factory=Network)
    faults: tuple[Fault, ...] = ()
    """`[[fault]]` in a file."""

    attacks: tuple[Attack, ...] = ()
    """`[[attack]]` in a file."""

    def __post_init__(self) -> None:
        checks.check_scenario(self)
        check_mixing(self)

    @property
    def size(self) -> int:
        """How many members there are in all."""
        return sum(group.count for group in self.members)
