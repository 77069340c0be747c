"""Cached trajectories: a synchronous run is trained once, and a thousand networks are answered from it.

What a synchronous run learns depends on who takes part, and on nothing else of the network. So its losses are measured
once, on a network where everybody takes part in every round with all steps (`train`), and another network only changes
when they are reached: its clock is timing-only fidelity's (`apply`). Where that is not so, `apply` refuses: somebody
was away, late, hurried or restarted; an attack changes who is heard, or when; two scenarios would learn something else.

That everybody took part is what the timing model says of a network; its errors are timing fidelity's errors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

from farflung.aggregation.outer import parse_outer
from farflung.aggregation.registry import parse_rule
from farflung.aggregation.weights import parse_weights
from farflung.compression import parse_codec
from farflung.node.tasks.load import describe_task
from farflung.protocol.errors import ConfigError
from farflung.sim.bounds import default_of
from farflung.sim.draw import Draw
from farflung.sim.population import populate
from farflung.sim.results import MemberResult, RoundResult, RunResult
from farflung.sim.scenario import Members, Model, Network, Scenario
from farflung.sim.simulate import Tell
from farflung.sim.timing import run_timing
from farflung.sim.training import final_loss_of, run_training, time_to
from farflung.sim.trajectory_ground import Ground, ground_of

VALUE_ATTACKS = ("sign_flip", "noise")
"""Attacks that change what is learned and nothing else: their bytes are well-formed, and as fast as anybody's."""

WITHOUT = "run it without --trajectory"

ESTIMATES = ("timing only:", "losses are estimates", "no loss estimate")
"""How the notes of timing-only fidelity begin that are not true where losses were measured."""

PATIENCE_S = 86_400.0
"""Of the network that a trajectory is trained on: nobody is ever late there."""

STEP_S = 0.01
"""Of everybody on that network. Virtual: it only decides how patient one has to be."""

ROUND_S_MAX, PARAM_S_MAX, START_ROUNDS_MAX = 2.0, 1e-7, 10
"""Generous bounds for that network: an exchange without bytes takes 0.1 s, a parameter of a member 4 bytes at 10 Gbit/s
and some ns of arithmetic, and members are admitted in a few rounds."""

PAYLOAD_ERROR_MAX = 0.01
"""Measured payloads that differ by more from what the clock charges are worth a note."""


@dataclass(frozen=True)
class TrainedRound:
    """What one round was worth."""

    round_index: int
    """From 1."""

    loss: float | None
    """Mean training loss of the members."""

    validation: float | None
    """Of the anchor after the round, where it was measured."""

    participants: int
    payload_bytes: int
    """Of one member's update; of the task's own model, not of one that it stands in for."""


@dataclass(frozen=True)
class Trajectory:
    """The losses of one training in which everybody took part, and what they depend on. Raises ConfigError."""

    values: Mapping[str, object]
    """From the scenario and its seed: see `values_of`."""

    ground: Ground
    """From this installation and machine."""

    rounds: tuple[TrainedRound, ...]

    def __post_init__(self) -> None:
        if not self.rounds or [item.round_index for item in self.rounds] != list(range(1, len(self.rounds) + 1)):
            raise ConfigError(f"a trajectory has rounds 1, 2, ..., got {[item.round_index for item in self.rounds]}")
        for item in self.rounds:
            if item.participants != self.values["members"]:
                raise ConfigError(
                    f"a trajectory needs all {self.values['members']} members in every round, got "
                    f"{item.participants} in round {item.round_index}"
                )

    @property
    def key(self) -> str:
        """See `key_of`."""
        return key_of(self.values, self.ground, len(self.rounds))


def key_of(values: Mapping[str, object], ground: Ground, rounds: int) -> str:
    """The name of a trajectory: 64 hex digits of everything that its losses depend on."""
    text = json.dumps({"values": dict(values), "ground": asdict(ground), "rounds": rounds}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def values_of(scenario: Scenario, seed: int) -> dict[str, object]:
    """Everything in a scenario that decides what a run with full participation learns, as plain data.

    Two scenarios with equal values differ only in time. Costs 0.2 ms a member: who attacks is drawn. Raises ConfigError
    for schemes in which time decides what is learned.
    """
    _check(scenario)
    run, model = scenario.run, scenario.model
    attackers = [spec for spec in populate(_steady(scenario), seed).members if spec.attack is not None]
    return {
        "task": model.task,
        "options": describe_task(model.task, model.options)["options"],
        "codec": parse_codec(run.codec).spec,
        "rule": parse_rule(run.rule).spec,
        "outer": parse_outer(run.outer).spec,
        "weights": parse_weights(run.weights).spec,
        "inner_steps": run.inner_steps,
        "members": scenario.size,
        "seed": seed,
        "attacks": [[spec.index, spec.attack.kind, spec.attack.strength] for spec in attackers if spec.attack],
    }


def family_of(scenario: Scenario, seed: int) -> str:
    """Runs with equal families are answered from one trajectory. Loads no task. Raises ConfigError like `values_of`."""
    return json.dumps([values_of(scenario, seed), scenario.rounds], sort_keys=True)


def train(scenario: Scenario, seed: int, *, tell: Tell | None = None) -> Trajectory:
    """Train a scenario's run once, on a network so fast and steady that everybody takes part in everything.

    Takes what the training takes. Raises ConfigError for schemes in which time decides what is learned, and if members
    sat out all the same: then what they learned decided who took part.
    """
    values = values_of(scenario, seed)
    ground = ground_of(scenario.model.task, str(values["options"]))
    result = run_training(replace(_steady(scenario), limit_h=_limit_h(scenario, ground)), seed, tell=tell)
    _check_trained(scenario, result)
    rounds = tuple(
        TrainedRound(item.round_index, item.loss, item.validation, item.payloads, item.payload_bytes)
        for item in result.rounds
    )
    return Trajectory(values, ground, rounds)


def apply(trajectory: Trajectory, scenario: Scenario, seed: int, *, folder: Path | None = None) -> RunResult:
    """A scenario's run: the clock of its network, with the losses of the trajectory.

    Losses are bit for bit those of training on that very network; times have the error of timing-only fidelity.
    `folder` is where trace files are. Takes what timing-only fidelity takes: 40 members x 100 rounds 0.25 s. Raises
    ConfigError if the losses are not this scenario's, or if not everybody takes part in every round with all steps.
    """
    values = values_of(scenario, seed)
    for name, value in values.items():
        if trajectory.values[name] != value:
            raise ConfigError(
                f"{name} decides what is learned, and the trajectory has {trajectory.values[name]!r}: train another, "
                f"got {value!r}"
            )
    if scenario.rounds > len(trajectory.rounds):
        raise ConfigError(
            f"the trajectory has {len(trajectory.rounds)} rounds: train another, got rounds {scenario.rounds}"
        )
    return combine(trajectory, scenario, clock(scenario, seed, trajectory.ground, folder=folder))


def clock(scenario: Scenario, seed: int, ground: Ground, *, folder: Path | None = None) -> RunResult:
    """The timing-only run of a training scenario. Raises ConfigError, naming the first round and member, unless
    everybody takes part in every round with all steps.
    """
    _check(scenario)
    timed = run_timing(_timing(scenario, ground), seed, folder=folder)
    extra, steps = timed.extra, scenario.run.inner_steps
    if "partial_round" in extra:
        index, member, taken = (int(extra[f"partial_{name}"]) for name in ("round", "member", "steps"))
        what = f"took {taken} of {steps} steps" if taken else "did not take part, or was away"
        raise ConfigError(
            f"a trajectory is of everybody in every round, {WITHOUT}: in round {index} "
            f"{timed.members[member].name} {what}, got {taken} steps"
        )
    if not timed.finished and timed.duration_s < scenario.limit_h * 3600:
        raise ConfigError(
            f"a trajectory is of everybody in every round, {WITHOUT}: the clock {timed.notes[0]}, "
            f"got {len(timed.rounds)} of {scenario.rounds} rounds"
        )
    return timed


def combine(trajectory: Trajectory, scenario: Scenario, timed: RunResult) -> RunResult:
    """The losses of a trajectory at the times of a clock. Both must be the scenario's: `apply` sees to that."""
    rounds = tuple(_with_losses(*pair) for pair in zip(timed.rounds, trajectory.rounds, strict=False))
    attacks = cast(list[tuple[int, str, float]], trajectory.values["attacks"])
    attackers = {member: kind for member, kind, _ in attacks}
    params, charged = trajectory.ground.params, scenario.model.params
    notes = [
        f"trained once: losses are measured, in a training where all {scenario.size} took part in every round with all "
        "steps; times are timing-only fidelity's, which begins when all are members, and they do so there too"
    ]
    if charged and charged != params:
        notes.append(
            f"a model of {params:,} parameters was trained in place of one of {charged:,.0f}: bytes and compute are "
            "the big one's, losses the small one's"
        )
    scale = (charged or params) / params
    measured, assumed = trajectory.rounds[0].payload_bytes * scale, timed.extra["payload_bytes"]
    if abs(measured - assumed) > PAYLOAD_ERROR_MAX * measured:
        notes.append(f"payloads had {measured:,.0f} bytes in training, the clock charges {assumed:,.0f}")
    return replace(
        timed,
        fidelity="trajectory",
        members=tuple(
            _member(item, trajectory.ground, attackers.get(index, "")) for index, item in enumerate(timed.members)
        ),
        rounds=rounds,
        events_digest=hashlib.sha256(f"{timed.events_digest} {trajectory.key}".encode()).hexdigest(),
        notes=(*notes, *(note for note in timed.notes if not note.startswith(ESTIMATES))),
        final_loss=final_loss_of(rounds),
        time_to_goal_s=time_to(rounds, scenario.loss_goal),
        extra={name: value for name, value in timed.extra.items() if not name.endswith("_estimate")},
    )


def _with_losses(timed: RoundResult, trained: TrainedRound) -> RoundResult:
    return replace(timed, loss=trained.loss, validation=trained.validation, loss_estimate=None)


def _member(timed: MemberResult, ground: Ground, attacker: str) -> MemberResult:
    return replace(timed, tokens=round(timed.steps * ground.tokens_per_step), attacker=attacker)


# -- two other scenarios ----------------------------------------------------------------------------------------------


def _steady(scenario: Scenario) -> Scenario:
    """The same training where nobody is ever late. Members keep their positions: who attacks is drawn as before."""
    return replace(
        scenario,
        members=(
            Members(
                scenario.size,
                up_mbit=Draw.fixed(10_000),
                down_mbit=Draw.fixed(10_000),
                step_ms=Draw.fixed(1e3 * STEP_S),
            ),
        ),
        model=replace(scenario.model, params=0.0, layers=0, tokens_per_step=0.0),
        run=replace(
            scenario.run,
            grace_s=PATIENCE_S,
            quorum_percent=100,
            deadline_floor_s=PATIENCE_S,
            deadline_ceiling_s=PATIENCE_S,
            snapshot_rounds=10_000,
        ),
        network=Network(latency_ms=((1.0,),)),
        faults=(),
    )


def _limit_h(scenario: Scenario, ground: Ground) -> float:
    """After so much time a steady training will not end any more: rounds without updates follow each other."""
    exchange_s = ROUND_S_MAX + PARAM_S_MAX * ground.params * scenario.size
    return (scenario.rounds + START_ROUNDS_MAX) * (scenario.run.inner_steps * STEP_S + exchange_s) / 3600


def _timing(scenario: Scenario, ground: Ground) -> Scenario:
    """The same network in timing-only fidelity. Attacks on values take no time."""
    model = scenario.model
    return replace(
        scenario,
        fidelity="timing",
        model=Model(
            params=model.params or float(ground.params),
            layers=model.layers,
            tokens_per_step=model.tokens_per_step or ground.tokens_per_step,
        ),
        run=replace(scenario.run, weights=default_of(scenario.run, "weights")),
        attacks=(),
        loss_goal=0.0,
    )


# -- refusals ---------------------------------------------------------------------------------------------------------


def _check(scenario: Scenario) -> None:
    """Refuse what a trajectory cannot answer, whatever the network is like."""
    if scenario.fidelity != "training":
        raise ConfigError(f'a trajectory is trained: set fidelity = "training", got {scenario.fidelity!r}')
    if scenario.run.exchange != "gather":
        raise ConfigError(
            f"only in a synchronous gather does everybody learn the same at any speed, {WITHOUT}: "
            f"got {scenario.run.exchange!r}"
        )
    if scenario.run.mode != "gather":
        raise ConfigError(f"when parcels arrive decides how members mix, {WITHOUT}: got {scenario.run.mode!r}")
    for attack in scenario.attacks:
        if attack.kind not in VALUE_ATTACKS:
            raise ConfigError(f"this attack decides who is heard, or when, {WITHOUT}: got {attack.kind!r}")
    for what, value in (
        ("network.message_loss", scenario.network.message_loss),
        *((f"members {group.name!r}: clock_skew_s", _skew(group)) for group in scenario.members),
        *((f"fault {fault.kind!r}: factor", fault.factor) for fault in scenario.faults if fault.kind == "clock_skew"),
    ):
        if value:
            raise ConfigError(f"{what} is not in a trajectory's clock, {WITHOUT}: got {value}")


def _skew(group: Members) -> str:
    return "" if group.clock_skew_s == default_of(group, "clock_skew_s") else str(group.clock_skew_s)


def _check_trained(scenario: Scenario, result: RunResult) -> None:
    """Refuse a training in which somebody sat out, or whose payloads have sizes that follow the data."""
    size, rounds, steps = scenario.size, scenario.rounds, scenario.rounds * scenario.run.inner_steps
    for item in result.rounds:
        if item.payloads != size or item.members != size:
            names = [member.name for member in result.members if member.rounds_counted < rounds]
            raise ConfigError(
                f"values decided who took part, even on a perfect network, {WITHOUT}: in round {item.round_index} "
                f"{item.payloads} of {size} updates counted, missing were some of {', '.join(names)}"
            )
        if item.payload_bytes != result.rounds[0].payload_bytes:
            raise ConfigError(
                f"the size of payloads of {scenario.run.codec!r} follows the data, and so would the time, {WITHOUT}: "
                f"got {item.payload_bytes} bytes in round {item.round_index}, {result.rounds[0].payload_bytes} in 1"
            )
    for member in result.members:
        if (member.rounds_counted, member.steps) != (rounds, steps):
            raise ConfigError(
                f"{member.name} sat out even on a perfect network, {WITHOUT}: it counted in {member.rounds_counted} of "
                f"{rounds} rounds, with {member.steps} steps"
            )
    if not result.finished or len(result.rounds) != rounds:
        raise ConfigError(f"the training did not come to its end, {WITHOUT}: got {len(result.rounds)} rounds")
