"""The whole run in timing-only fidelity: rounds one after the other, and what is to be said of them."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from farflung.protocol.errors import ConfigError
from farflung.protocol.limits import MEMBERS_MAX
from farflung.sim.population import MBIT_BYTES
from farflung.sim.results import MemberResult, RoundResult, RunResult, Segment
from farflung.sim.scaling_laws import TOKENS_PER_PARAM, loss_after, tokens_to_loss
from farflung.sim.scenario import Scenario
from farflung.sim.scenario_checks import TIMING_ATTACKS, TIMING_FAULTS
from farflung.sim.timing.blame import attribute
from farflung.sim.timing.gantt import segments
from farflung.sim.timing.rounds import play
from farflung.sim.timing.settle import settle
from farflung.sim.timing.swarm import Swarm
from farflung.sim.timing.trace import Trace
from farflung.sim.timing.votes import Stuck

GATHER_MAX = 4096
"""Members of a simulated gather: it keeps a number for every pair. Real nodes admit `limits.MEMBERS_MAX`."""

STEADY_SHARE = 0.5
"""The pace beyond the simulated rounds is that of this last share of them."""


def run_timing(scenario: Scenario, seed: int, *, folder: Path | None = None) -> RunResult:
    """Time, bytes and utilisation of a scenario without training anything; losses are estimates.

    `folder` is where the scenario's traces are. Equal arguments give equal results but for `wall_s`. On one core 40
    members x 100 rounds take 0.25 s for any model size, 1,000 members 0.1 s a round; the first run of a process takes
    0.4 s more to load machine code, and some seconds once per machine to make it. Raises ConfigError for what only
    training fidelity can show, and for a scenario that cannot be populated.
    """
    began = time.perf_counter()
    _check(scenario)
    swarm = Swarm(scenario, seed, folder)
    tape = _Tape(swarm)
    now_s, why = 0.0, ""
    for index in range(1, scenario.rounds + 1):
        try:
            trace = play(swarm, index, now_s)
        except Stuck as error:
            why = f"stopped in round {index} at {now_s / 3600:.2f} h: {error}"
            break
        if trace.ended_s > scenario.limit_h * 3600:
            why = f"stopped at limit_h {scenario.limit_h:g} in round {index}"
            now_s = scenario.limit_h * 3600
            break
        tape.add(trace)
        settle(swarm, trace)
        now_s = trace.ended_s
    return tape.result(now_s, why, time.perf_counter() - began)


def _check(scenario: Scenario) -> None:
    if scenario.run.exchange == "gather" and scenario.size > GATHER_MAX:
        raise ConfigError(f"a gather is simulated for up to {GATHER_MAX} members: choose fewer, got {scenario.size}")
    for kind, known, what in (
        *((fault.kind, TIMING_FAULTS, "fault") for fault in scenario.faults),
        *((attack.kind, TIMING_ATTACKS, "attack") for attack in scenario.attacks),
    ):
        if kind not in known:
            raise ConfigError(f'{what} changes nothing in timing fidelity, use fidelity = "training": got {kind!r}')


class _Tape:
    """What is kept of the rounds."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm, self.scenario = swarm, swarm.scenario
        self.rounds: list[RoundResult] = []
        self.traces: list[Trace] = []
        self.tokens = 0.0
        self.members_seen = 0
        self.caveats: dict[str, None] = {}
        self.silence = ""
        self.hopeless = 0
        self.closed = {"all": 0, "grace": 0, "deadline": 0}
        self.partial: tuple[int, int, int] | None = None
        self._digest = hashlib.sha256(f"{swarm.scenario!r} {swarm.seed}".encode())

    def add(self, trace: Trace) -> None:
        """Keep a round. Called before the swarm settles, while it still is as the round found it."""
        swarm, listed = self.swarm, np.flatnonzero(trace.spoke_n)
        steps = int((trace.steps_n[listed] + swarm.kept_steps_n[listed]).sum())
        self.tokens += steps * self.scenario.model.tokens_per_step
        self.members_seen = max(self.members_seen, len(listed))
        self.closed[trace.voting.why] += 1
        self.hopeless += trace.voting.hopeless
        self.partial = self.partial or self._partial(trace)
        for part in (trace.adopted_n, trace.announced_n, trace.voting.certified_n):
            self._digest.update(np.ascontiguousarray(part).tobytes())
        self.rounds.append(
            RoundResult(
                round_index=trace.index,
                start_s=trace.began_s,
                end_s=trace.ended_s,
                members=int(swarm.member_n.sum()),
                payloads=len(listed),
                payload_bytes=round(swarm.charges.payload_bytes),
                views=trace.voting.views,
                loss_estimate=self._loss(),
                blame=attribute(swarm, trace),
            )
        )
        self.traces.append(replace(trace, heard_kn=trace.heard_kn[:0], gathered=None))

    def _partial(self, trace: Trace) -> tuple[int, int, int] | None:
        """The round, the first member who was away, left out or had to hurry, and the steps of it that counted."""
        swarm, began_s, ended_s = self.swarm, trace.began_s, trace.ended_s
        whole_n = trace.spoke_n & (trace.steps_n == swarm.run.inner_steps)
        for member in range(swarm.n):
            presence = swarm.presence[member]
            away = not presence.always and presence.powered_s(began_s, ended_s) < (ended_s - began_s) * (1 - 1e-9)
            if away or not whole_n[member]:
                counted = trace.spoke_n[member] and not away
                return trace.index, member, int(trace.steps_n[member]) if counted else 0
        return None

    def _loss(self) -> float | None:
        """The estimate for the tokens so far, as if the schedule ended here. None where no law reaches."""
        if not self.tokens or not self.members_seen:
            return None
        try:
            estimate = loss_after(params=self.scenario.model.params, tokens=self.tokens, members=self.members_seen)
        except ConfigError as error:
            self.silence = f"no loss estimate: {error}"
            return None
        self.caveats = dict.fromkeys([*self.caveats, estimate.source, *estimate.caveats[:1]])
        return estimate.value

    def result(self, now_s: float, why: str, wall_s: float) -> RunResult:
        """Everything together."""
        swarm, scenario = self.swarm, self.scenario
        finished = len(self.rounds) == scenario.rounds
        goal_s, goal_note = self._goal()
        return RunResult(
            scenario=scenario.name,
            seed=swarm.seed,
            fidelity="timing",
            changes={},
            members=tuple(self._member(member, now_s) for member in range(swarm.n)),
            rounds=tuple(self.rounds),
            duration_s=now_s,
            finished=finished,
            segments=self._segments(),
            events_digest=self._digest.hexdigest(),
            wall_s=wall_s,
            notes=(*([why] if why else []), *goal_note, *self._notes()),
            final_loss=self.rounds[-1].loss_estimate if self.rounds else None,
            time_to_goal_s=goal_s,
            extra=self._extra(),
        )

    def _goal(self) -> tuple[float | None, list[str]]:
        """When the estimate meets the loss goal: in the simulated rounds, or beyond them at their pace."""
        scenario = self.scenario
        if not scenario.loss_goal:
            return None, []
        for item in self.rounds:
            if item.loss_estimate is not None and item.loss_estimate <= scenario.loss_goal:
                return item.end_s, ["time to the loss goal: an estimate by scaling laws"]
        pace = self._pace()
        if not pace:
            return None, ["no time to the loss goal: tokens per step are not known"]
        try:
            wanted = tokens_to_loss(
                params=scenario.model.params, loss=scenario.loss_goal, members=max(1, self.members_seen)
            ).value
        except ConfigError as error:
            return None, [f"no time to the loss goal: {error}"]
        if wanted > self._budget:
            return None, [f"the loss goal takes {wanted:.3g} tokens, more than the budget of {self._budget:.3g}"]
        goal_s = self.rounds[-1].end_s + (wanted - self.tokens) / pace
        share = f"the last {STEADY_SHARE:.0%} of {len(self.rounds)} rounds"
        return goal_s, [f"time to the loss goal: an estimate by scaling laws, continued at the pace of {share}"]

    @property
    def _budget(self) -> float:
        model = self.scenario.model
        return model.tokens or TOKENS_PER_PARAM * model.params

    def _pace(self) -> float:
        """Tokens per second of the steady part; 0 if not known."""
        late = self.rounds[int(len(self.rounds) * (1 - STEADY_SHARE)) :]
        if not late or not self.tokens:
            return 0.0
        began_s = late[0].start_s
        tokens = math.fsum(
            float((trace.steps_n[trace.spoke_n]).sum()) * self.scenario.model.tokens_per_step
            for trace in self.traces[len(self.rounds) - len(late) :]
        )
        return tokens / (late[-1].end_s - began_s)

    def _member(self, member: int, now_s: float) -> MemberResult:
        swarm, spec = self.swarm, self.swarm.population.members[member]
        wire = swarm.population.topology.header_overhead
        share = swarm.population.topology.ack_share
        sent, received = float(swarm.sent_n[member]), float(swarm.received_n[member])
        steps = int(swarm.counted_steps_n[member])
        train_s = float(swarm.counted_s_n[member])
        return MemberResult(
            name=spec.name,
            up_mbit=spec.up_bytes_per_s / MBIT_BYTES,
            down_mbit=spec.down_bytes_per_s / MBIT_BYTES,
            step_s=train_s / steps if steps else spec.step_s * (1 + spec.jitter),
            online_s=swarm.presence[member].powered_s(0.0, now_s),
            train_s=train_s,
            steps=steps,
            tokens=round(steps * self.scenario.model.tokens_per_step),
            bytes_sent=round(sent),
            bytes_received=round(received),
            wire_sent=round(wire * (sent + share * received)),
            wire_received=round(wire * (received + share * sent)),
            rounds_counted=int(swarm.counted_rounds_n[member]),
            attacker=spec.attack.kind if spec.attack else "",
        )

    def _segments(self) -> tuple[Segment, ...]:
        """Of the round of median length and of the longest."""
        if not self.traces:
            return ()
        order = sorted(self.traces, key=lambda trace: (trace.length_s, trace.index))
        kept = {trace.index: trace for trace in (order[(len(order) - 1) // 2], order[-1])}
        return tuple(item for index in sorted(kept) for item in segments(self.swarm, kept[index]))

    def _notes(self) -> list[str]:
        swarm, run = self.swarm, self.scenario.run
        notes = ["timing only: nothing was trained"]
        if self.rounds and self.rounds[-1].loss_estimate is not None:
            notes.append(f"losses are estimates, not measurements: {'; '.join(self.caveats)}")
        elif self.silence:
            notes.append(self.silence)
        if run.exchange != "gather":
            notes.append(f"exchange {run.exchange}: to compare with; real nodes gather")
        if swarm.n > MEMBERS_MAX:
            notes.append(f"real nodes admit {MEMBERS_MAX} members to a run, here are {swarm.n}")
        if mute := int((~swarm.reachable_n).sum()):
            notes.append(
                f"{mute} members cannot be reached: nodes call each other and do not dial out yet, so these hear "
                "nothing, take no part, and are dropped after three rounds"
            )
        if swarm.capped:
            names = ", ".join(swarm.population.members[member].name for member in swarm.capped[:5])
            notes.append(f"{len(swarm.capped)} members used up their data and left: {names}")
        if self.closed["deadline"] and run.exchange == "gather":
            notes.append(
                f"{self.closed['deadline']} of {len(self.rounds)} rounds closed at the deadline without a quorum and "
                f"grace: deadline_ceiling_s {run.deadline_ceiling_s:g} must exceed local phase and exchange"
            )
        if self.hopeless:
            notes.append(
                f"in {self.hopeless} rounds applying took longer than the longest view: this version's nodes would "
                "change proposers for ever; they were played as if genesis' view_floor_ms left time to apply twice"
            )
        return notes

    def _extra(self) -> dict[str, float]:
        extra = {
            "payload_bytes": self.swarm.charges.payload_bytes,
            "state_bytes": self.swarm.charges.state_bytes,
            "tokens": self.tokens,
            "closed_all": float(self.closed["all"]),
            "closed_grace": float(self.closed["grace"]),
            "closed_deadline": float(self.closed["deadline"]),
        }
        if self.partial is not None:
            names = ("partial_round", "partial_member", "partial_steps")
            extra |= {name: float(value) for name, value in zip(names, self.partial, strict=True)}
        pace = self._pace()
        if pace:
            extra["tokens_per_s"] = pace
            left = max(0.0, self._budget - self.tokens)
            extra["hours_to_budget_estimate"] = (self.rounds[-1].end_s + left / pace) / 3600
        return {name: value for name, value in extra.items() if math.isfinite(value)}
