"""Who takes part in one run: every member of a scenario with its own line, machine and habits, drawn by the seed.

Each number has a stream of its own, named by group, position in the group and setting. So a change to one group or one
setting never changes what another draws, and two scenarios with equal seeds differ only where their texts differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from farflung.protocol.errors import ConfigError
from farflung.sim.churn import ALWAYS, Session, clipped, sessions
from farflung.sim.compute import Slowdown, check_memory, find_gpu, step_time_s
from farflung.sim.draw import Draw
from farflung.sim.network.topology import NodeLinks, Topology
from farflung.sim.rng import stream
from farflung.sim.scenario import Attack, Fault, Members, Network, Scenario
from farflung.sim.traces import Trace, read_trace, sessions_of

MBIT_BYTES = 125_000
"""Bytes in a decimal megabit: what providers sell and `tc` counts."""

FOUNDER = 0
"""Member 0 founds the run: it is there from 0 to the end, whatever its group's churn and `join_after_s`, and is never
drawn as an attacker (it can be named as one)."""


@dataclass(frozen=True)
class MemberSpec:
    """One member. Rates are bytes on the line per second, before headers are taken off."""

    index: int
    name: str
    """Its group's name and its position in the scenario: "member-07"."""
    group: int
    """Position of its `Members` in the scenario."""
    up_bytes_per_s: float
    down_bytes_per_s: float
    region: int
    last_mile_s: float
    queue: str
    queue_bytes: float
    """Buffer of a fifo uplink; 0 for fq."""
    loss: float
    links: tuple[int, ...]
    """Shared links that everything crosses, by position in the scenario's network."""
    reachable: bool
    data_cap_bytes: float
    """0: none."""
    step_s: float
    """One step of the charged model on the undisturbed machine: the minimum (see `compute.StepTimes`)."""
    jitter: float
    busy_every_s: float
    busy_for_s: float
    busy_slowdown: float
    fsync_s: float
    disk_bytes_per_s: float
    """0: not charged."""
    clock_skew_s: float
    sessions: tuple[Session, ...]
    """In order. One that never ends is for good; the first begins when the member first appears. May be empty."""
    attack: Attack | None


@dataclass(frozen=True)
class Population:
    """All members, the network between them, and what will happen to them."""

    members: tuple[MemberSpec, ...]
    topology: Topology
    faults: tuple[Fault, ...]

    def slowdowns(self, member: int) -> tuple[Slowdown, ...]:
        """The member's `straggle` faults, for `compute.StepTimes`."""
        return tuple(
            Slowdown(fault.at_s, fault.at_s + fault.for_s if fault.for_s else math.inf, fault.factor)
            for fault in self.faults
            if fault.kind == "straggle" and member in fault.members
        )


@dataclass(frozen=True)
class _Charged:
    """The model that time is charged for; zeros: not known."""

    params: float
    layers: int
    tokens: float


def populate(
    scenario: Scenario, seed: int, folder: Path | None = None, *, task_params: float = 0.0, task_tokens: float = 0.0
) -> Population:
    """Draw every member and lay the network out.

    `folder` is where the scenario's traces are. `task_params` and `task_tokens` (training only) are the size and the
    tokens per step of the task's own model: they count where the scenario gives none. 1,000 members take 0.2 s, and
    2 us for each session. Raises ConfigError for what only shows now: a trace that does not fit, a GPU that is unknown
    or too small, a step time that cannot be known, a line without capacity.
    """
    model = scenario.model
    charged = _Charged(model.params or task_params, model.layers, model.tokens_per_step or task_tokens)
    attacks = _attackers(scenario, seed)
    members: list[MemberSpec] = []
    for number, group in enumerate(scenario.members):
        pace_s = _group_step_s(group, charged)
        trace = _trace_of(group, folder)
        for position in range(group.count):
            index = len(members)
            drawn = _Draws(seed, number, position)
            members.append(
                _member(
                    scenario,
                    group,
                    drawn,
                    index=index,
                    step_s=_step_s(group, drawn, pace_s),
                    own_sessions=_sessions(scenario, group, drawn, trace, founder=index == FOUNDER),
                    attack=attacks.get(index),
                )
            )
    return Population(tuple(members), _topology(scenario.network, members), scenario.faults)


@dataclass(frozen=True)
class _Draws:
    """The streams of one member. A fixed number needs none."""

    seed: int
    group: int
    position: int

    def number(self, key: str, draw: Draw) -> float:
        """The member's value of a setting."""
        if draw.is_fixed:
            return draw.numbers[0]
        return draw.sample(stream(self.seed, "member", self.group, self.position, key))


def _member(
    scenario: Scenario,
    group: Members,
    drawn: _Draws,
    *,
    index: int,
    step_s: float,
    own_sessions: tuple[Session, ...],
    attack: Attack | None,
) -> MemberSpec:
    width = max(2, len(str(scenario.size - 1)))
    network = scenario.network
    up = _rate(group, "up_mbit", drawn.number("up_mbit", group.up_mbit), index)
    links = [link.name for link in network.links]
    return MemberSpec(
        index=index,
        name=f"{group.name}-{index:0{width}d}",
        group=drawn.group,
        up_bytes_per_s=up,
        down_bytes_per_s=_rate(group, "down_mbit", drawn.number("down_mbit", group.down_mbit), index),
        region=network.regions.index(group.region) if group.region else 0,
        last_mile_s=drawn.number("last_mile_ms", group.last_mile_ms) / 1e3,
        queue=group.queue,
        queue_bytes=up * group.queue_ms / 1e3 if group.queue == "fifo" else 0.0,
        loss=group.loss,
        links=(links.index(group.link),) if group.link else (),
        reachable=group.reachable,
        data_cap_bytes=group.data_cap_gb * 1e9,
        step_s=step_s,
        jitter=group.jitter,
        busy_every_s=group.busy_every_s,
        busy_for_s=group.busy_for_s,
        busy_slowdown=group.busy_slowdown,
        fsync_s=group.fsync_ms / 1e3,
        disk_bytes_per_s=group.disk_mb_s * 1e6,
        clock_skew_s=drawn.number("clock_skew_s", group.clock_skew_s),
        sessions=own_sessions,
        attack=attack,
    )


def _rate(group: Members, key: str, mbit: float, index: int) -> float:
    if not mbit > 0:
        raise ConfigError(f"members {group.name!r}: member {index} drew no {key}: draw from above 0, got {mbit:g}")
    return mbit * MBIT_BYTES


def _group_step_s(group: Members, charged: _Charged) -> float | None:
    """The step time of a group with a GPU; None: each member draws `step_ms`. Refuses a model that does not fit."""
    where = f"members {group.name!r}"
    gpu = find_gpu(group.gpu) if group.gpu else None
    memory_gb = group.memory_gb or (gpu.memory_gb if gpu else 0.0)
    try:
        if memory_gb and charged.params:
            check_memory(charged.params, memory_gb, tokens=charged.tokens, layers=charged.layers)
        if gpu is None:
            if group.step_ms is None:
                raise ConfigError(f"give a gpu or step_ms, got {group.gpu!r} and {group.step_ms}")
            return None
        if not (charged.params and charged.tokens):
            raise ConfigError(
                "a gpu's step time follows from model.params and model.tokens_per_step: give both, or step_ms, "
                f"got {charged.params:g} and {charged.tokens:g}"
            )
        return step_time_s(charged.params, charged.tokens, gpu.peak, group.mfu or gpu.mfu)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _step_s(group: Members, drawn: _Draws, pace_s: float | None) -> float:
    """A member's own undisturbed step: the group's or its own measured time, times its lognormal speed (median 1)."""
    if pace_s is None and group.step_ms is not None:
        pace_s = drawn.number("step_ms", group.step_ms) / 1e3
    spread = drawn.number("speed", Draw("lognormal", (1.0, group.speed_sigma))) if group.speed_sigma else 1.0
    if not pace_s or not math.isfinite(pace_s * spread):
        raise ConfigError(f"members {group.name!r}: a step must take time: draw step_ms above 0, got {pace_s}")
    return pace_s * spread


def _trace_of(group: Members, folder: Path | None) -> Trace | None:
    if group.churn is None or group.churn.kind != "trace":
        return None
    path = Path(group.churn.trace)
    if not path.is_absolute():
        if folder is None:
            raise ConfigError(
                f"members {group.name!r}: a trace's path is relative to the scenario file, and this scenario has none: "
                f"give the folder or an absolute path, got {group.churn.trace!r}"
            )
        path = folder / path
    trace = read_trace(path)
    return Trace(tuple(sessions_of(trace, group.count, name=path.name)))


def _sessions(
    scenario: Scenario, group: Members, drawn: _Draws, trace: Trace | None, *, founder: bool
) -> tuple[Session, ...]:
    if founder:
        return ALWAYS
    first_s = drawn.number("join_after_s", group.join_after_s)
    if group.churn is None:
        return (Session(first_s, math.inf, False),)
    if trace is not None:
        return clipped(trace.sessions[drawn.position], first_s)
    horizon_s = scenario.limit_h * 3600
    return sessions(
        group.churn, seed=drawn.seed, group=drawn.group, member=drawn.position, horizon_s=horizon_s, first_s=first_s
    )


def _attackers(scenario: Scenario, seed: int) -> Mapping[int, Attack]:
    """Who attacks: the named ones, then the drawn ones from the others. With a higher `count` nobody drawn changes.

    Raises ConfigError if there are more than members.
    """
    taken = {member: attack for attack in scenario.attacks for member in attack.members}
    for number, attack in enumerate(scenario.attacks):
        if attack.count:
            order = stream(seed, "attack", number).permutation(scenario.size).tolist()
            free = [member for member in order if member != FOUNDER and member not in taken]
            if len(free) < attack.count:
                raise ConfigError(
                    f"attack {attack.kind!r} draws {attack.count} members, but besides the founder and other attackers "
                    f"there are {len(free)}"
                )
            taken |= dict.fromkeys(free[: attack.count], attack)
    return taken


def _topology(network: Network, members: list[MemberSpec]) -> Topology:
    return Topology(
        nodes=tuple(
            NodeLinks(
                member.up_bytes_per_s,
                member.down_bytes_per_s,
                groups=member.links,
                queue=member.queue,
                queue_bytes=member.queue_bytes if member.queue == "fifo" else None,
            )
            for member in members
        ),
        groups=tuple(link.up_mbit * MBIT_BYTES for link in network.links),
        groups_down=tuple(link.down_mbit * MBIT_BYTES for link in network.links),
        region=tuple(member.region for member in members),
        latency_s=tuple(tuple(delay / 1e3 for delay in row) for row in network.latency_ms),
        last_mile_s=tuple(member.last_mile_s for member in members),
        loss=tuple(member.loss for member in members),
        header_overhead=network.header_overhead,
        window_bytes=network.window_mb * 1e6,
    )
