"""Training fidelity: one run of a scenario with real nodes, real training and real payloads, in virtual time."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from farflung.compression import parse_codec
from farflung.node.anchor import Trial, genesis_buffers
from farflung.node.data import RoundView, Sharder
from farflung.node.flat import schema_of, write_parameters
from farflung.node.replica import Replica
from farflung.node.run_file import RunFile, make_genesis
from farflung.node.shell import Node
from farflung.node.tasks.load import load_task
from farflung.node.tasks.task import count_tokens
from farflung.protocol.certificate import Certificate
from farflung.protocol.genesis import Timing
from farflung.protocol.identity import Identity, PeerId
from farflung.sim.attackers import equip, listen
from farflung.sim.colluders import Ring
from farflung.sim.compute import StepTimes
from farflung.sim.eventlog import EventLog
from farflung.sim.happenings import schedule
from farflung.sim.life import SECRET, Life, memory_disk
from farflung.sim.measure import Measure
from farflung.sim.mixing_checks import mixing_of
from farflung.sim.population import populate
from farflung.sim.results import RoundResult, RunResult
from farflung.sim.rng import seeded, stream
from farflung.sim.scenario import Attack, Scenario
from farflung.sim.service_costs import THREADS, ServiceCosts
from farflung.sim.world import Genesis0, World

Tell = Callable[[int, int], None]
"""Progress: (rounds that trained so far, rounds in all)."""

STALLED_CEILINGS = 5
"""A swarm that certifies nothing for so many times its longest deadline and local phase has stopped for good."""

EVALUATIONS = 40
"""At most about so many validations are measured per run, evenly spread, and the last."""

EVALUATIONS_MIXING = 160
"""The same where members mix: each of them has parameters of its own, and is measured."""


@dataclass(frozen=True)
class Charged:
    """`sim.workers.Costs` for a model of `d` parameters."""

    costs: ServiceCosts
    d: float
    payload_bytes: float

    def encode_s(self) -> float:
        """Encode and hash one update."""
        return self.costs.encode_s(self.d) + self.costs.hash_s(self.payload_bytes)

    def check_s(self) -> float:
        """Hash and check one payload."""
        return self.costs.check_s(self.d) + self.costs.hash_s(self.payload_bytes)

    def apply_s(self, rows: int) -> float:
        """From `rows` payloads to a vote."""
        return self.costs.apply_s(self.d, rows)


def run_training(
    scenario: Scenario, seed: int, *, folder: Path | None = None, log: Path | None = None, tell: Tell | None = None
) -> RunResult:
    """Simulate with training in the loop. Equal arguments give equal event logs on one type of machine.

    `folder` is where trace files are; `log` a file for the event log. Takes what the training takes, and about 25 ms
    for every member and round. Needs memory for the members that are on, disk for what they keep (removed at the end).
    Raises ConfigError for what the user can fix, LocalError if a node fails.
    """
    began_s = time.perf_counter()
    home = Path(tempfile.mkdtemp(prefix="farflung-sim-", dir=memory_disk()))
    try:
        with seeded(seed):
            return Training(scenario, seed, home, folder, log, tell).run(began_s)
    finally:
        shutil.rmtree(home, ignore_errors=True)


class Training:
    """One run being made."""

    def __init__(
        self, scenario: Scenario, seed: int, home: Path, folder: Path | None, log: Path | None, tell: Tell | None
    ) -> None:
        self.scenario, self.seed, self._tell = scenario, seed, tell
        self.task = load_task(scenario.model.task, scenario.model.options)
        self._scratch = self.task.build_model()
        self.params = sum(part.numel() for part in self._scratch.parameters() if part.requires_grad)
        self.population = populate(scenario, seed, folder, task_params=self.params, task_tokens=self._tokens_per_step())
        self.charged = scenario.model.params or float(self.params)
        self.world = World(
            self._begin,
            self.task,
            self.population.topology,
            seed=seed,
            folder=home,
            log=EventLog(log),
            message_loss=scenario.network.message_loss,
            scale=self.charged / self.params,
            limit_s=scenario.limit_h * 3600,
        )
        self.validation: dict[int, float] = {}
        self._own: dict[int, list[float]] = {}
        """Where members mix: validation losses of their own parameters after a round's mixing."""
        self.stalled = False
        self._costs = self._charge()
        self._add_members()

    def _tokens_per_step(self) -> float:
        """Of the task's own batches."""
        me = PeerId(bytes(20))
        view = RoundView(bytes(32), 1, bytes(32), me, (me,))
        batch = next(iter(self.task.batches(Sharder(lambda: view))))
        return float(getattr(self.task, "tokens", count_tokens)(batch))

    def _charge(self) -> Charged:
        run = self.scenario.run
        costs = ServiceCosts(run.codec, run.rule, run.outer, threads=THREADS, schema=schema_of(self._scratch))
        bits = parse_codec(run.codec).bits(schema_of(self._scratch))
        return Charged(costs, self.charged, self.charged * bits / 8)

    def _begin(self, founder: Identity) -> Genesis0:
        genesis, theta_d = make_genesis(self._run_file(), founder.public_key, SECRET)
        return genesis, theta_d, genesis_buffers(genesis)

    def _run_file(self) -> RunFile:
        scenario, run = self.scenario, self.scenario.run
        there = sum(1 for spec in self.population.members if spec.sessions and spec.sessions[0].start_s <= 0)
        return RunFile(
            name=scenario.name,
            task=scenario.model.task,
            task_options=scenario.model.options,
            codec=run.codec,
            rule=run.rule,
            outer=run.outer,
            weights=run.weights,
            mode=run.mode,
            mixing=mixing_of(run),
            inner_steps=run.inner_steps,
            rounds=scenario.rounds,
            start_members=max(1, there),
            quorum_percent=run.quorum_percent,
            snapshot_rounds=run.snapshot_rounds,
            timing=Timing(
                grace_ms=round(run.grace_s * 1e3),
                deadline_floor_ms=round(run.deadline_floor_s * 1e3),
                deadline_ceiling_ms=round(run.deadline_ceiling_s * 1e3),
            ),
        )

    def _add_members(self) -> None:
        world, population = self.world, self.population
        rings: dict[Attack, Ring] = {}
        for spec in population.members:
            generator = stream(self.seed, "steps", spec.index)
            steps = StepTimes(spec, generator, population.slowdowns(spec.index))
            life = Life(world, spec, self._costs, steps.step_s)
            if spec.attack is not None:
                equip(life, spec.attack, stream(self.seed, "attack", spec.index), len(population.members), rings)
            world.lives.append(life)
        listen(world.lives, rings)
        world.found(world.lives[0])
        world.watchers.append(self._certified)
        if self._mixes:
            world.adopters.append(self._adopted)
        schedule(world, population)

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, began_s: float) -> RunResult:
        """Until everybody who is there has the last round, or the limit."""
        world = self.world
        world.run(self._is_over)
        world.log.close()
        return self._result(self._trained >= self.scenario.rounds, time.perf_counter() - began_s)

    def _is_over(self) -> bool:
        """All rounds were trained and those who should know it do; or nothing will ever happen again."""
        world, ceiling_s = self.world, self.scenario.run.deadline_ceiling_s
        last = world.certificates.get(world.certified)
        since_s = world.loop.time() - max(world.applied_s.get(world.certified, [0.0]))
        if last is None or last.manifest.trained < self.scenario.rounds:
            phase_s = max(life.spec.step_s for life in world.lives) * self.scenario.run.inner_steps
            self.stalled = world.is_quiet and since_s > STALLED_CEILINGS * (ceiling_s + phase_s)
            return self.stalled
        waited = [life for life in world.lives if life.on and life.peer_id in last.manifest.member_of]
        # An attacker may never finish, and whom nobody can call never begins.
        waited = [life for life in waited if life.spec.attack is None and life.spec.reachable]
        done = all(life.trainee is not None and life.trainee.learner.finished for life in waited)
        return done or since_s > 2 * ceiling_s

    @property
    def _mixes(self) -> bool:
        return self.scenario.run.mode != "gather"

    @property
    def _trained(self) -> int:
        return max((item.manifest.trained for item in self.world.certificates.values()), default=0)

    def _certified(self, life: Life, certificate: Certificate, trial: Trial) -> None:
        manifest = certificate.manifest
        index, rounds = manifest.round_index, self.scenario.rounds
        if not manifest.payloads or index in self.validation or life.node is None:
            return
        if self._tell is not None and life.index == 0:
            self._tell(manifest.trained, rounds)
        if not self._mixes and self._is_evaluated(manifest.trained, EVALUATIONS):
            self.validation[index] = self._evaluate(life.node)

    def _adopted(self, life: Life, view: RoundView) -> None:
        """A mixing has ended for a member: its own parameters are judged, and the round by the mean of its members."""
        index, node = view.round_index - 1, life.node
        certificate = self.world.certificates.get(index)
        if node is None or certificate is None or not certificate.manifest.payloads:
            return
        trained = certificate.manifest.trained
        mixed = isinstance(node.held, Replica) and node.held.trained == trained
        if mixed and self._is_evaluated(trained, EVALUATIONS_MIXING // self.scenario.size):
            losses = self._own.setdefault(index, [])
            losses.append(self._evaluate(node))
            self.validation[index] = math.fsum(losses) / len(losses)

    def _is_evaluated(self, trained: int, most: int) -> bool:
        """Whether a round is measured, if about `most` of all are."""
        rounds = self.scenario.rounds
        every = max(1, rounds // max(1, most))
        return callable(getattr(self.task, "evaluate", None)) and (trained % every == 0 or trained == rounds)

    def _evaluate(self, node: Node) -> float:
        write_parameters(self._scratch, node.held.theta_d)
        return float(self.task.evaluate(self._scratch))  # type: ignore[attr-defined]

    # -- what came of it ----------------------------------------------------------------------------------------------

    def _result(self, finished: bool, wall_s: float) -> RunResult:
        scenario, world = self.scenario, self.world
        apply_s, parcel_bytes = self._costs.apply_s, None
        if self._mixes:  # accounts take no work
            apply_s, parcel_bytes = lambda rows: 0.0, round(self._costs.payload_bytes)
        measure = Measure(world, self.validation, apply_s, parcel_bytes)
        rounds = measure.rounds()
        why = "nothing was certified for long, and nothing was still to come" if self.stalled else "the limit"
        notes = (
            [] if finished else [f"stopped after {world.loop.time() / 3600:.3g} h of virtual time, not finished: {why}"]
        )
        if self.charged != self.params:
            notes.append(
                f"a model of {self.params:,} parameters was trained in place of one of {self.charged:,.0f}: bytes and "
                "compute are the big one's, losses the small one's"
            )
        return RunResult(
            scenario=scenario.name,
            seed=self.seed,
            fidelity="training",
            changes={},
            members=measure.members(),
            rounds=rounds,
            duration_s=rounds[-1].end_s if rounds else world.loop.time(),
            finished=finished,
            segments=measure.segments(rounds),
            events_digest=world.log.digest,
            wall_s=wall_s,
            notes=tuple(notes),
            final_loss=final_loss_of(rounds),
            time_to_goal_s=time_to(rounds, scenario.loss_goal),
            extra={
                "events": float(world.log.events),
                "transfers": float(world.fabric.transfers),
                "refusals": float(world.refusals),
                "void_rounds": float(world.certified - len(rounds)),
            },
        )


def final_loss_of(rounds: tuple[RoundResult, ...]) -> float | None:
    """The last validation loss; without any, the last training loss."""
    for item in reversed(rounds):
        if item.validation is not None:
            return item.validation
    return next((item.loss for item in reversed(rounds) if item.loss is not None), None)


def time_to(rounds: tuple[RoundResult, ...], goal: float) -> float | None:
    """When the goal was met: by validation where it was measured, else by the training loss."""
    if goal <= 0:
        return None
    measured = any(item.validation is not None for item in rounds)
    for item in rounds:
        loss = item.validation if measured else item.loss
        if loss is not None and math.isfinite(loss) and loss <= goal:
            return item.end_s
    return None
