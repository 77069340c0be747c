"""What lasts from round to round: who is a member, who is there, how far each one's training is, what it has moved."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from farflung.protocol.deadline import Pace
from farflung.protocol.genesis import Timing
from farflung.sim.compute import StepTimes
from farflung.sim.population import Population, populate
from farflung.sim.rng import stream
from farflung.sim.scenario import Attack, Fault, Scenario
from farflung.sim.timing.charges import RESTART_S, Charges
from farflung.sim.timing.exchange import Change
from farflung.sim.timing.lines import distances, usable_lines
from farflung.sim.timing.presence import Presence

Floats = NDArray[np.float64]

RETRIES_MAX = 8
"""How often in one round a member that crashes again and again begins anew; then the round goes on without it."""


class Swarm:
    """The state of one run. Arrays are indexed by the member's position in the scenario; times are virtual seconds."""

    def __init__(self, scenario: Scenario, seed: int, folder: Path | None) -> None:
        self.scenario, self.seed, self.run = scenario, seed, scenario.run
        self.population: Population = populate(scenario, seed, folder)
        specs = self.population.members
        n = self.n = len(specs)
        self.charges = Charges.of(scenario)
        self.paces = [
            StepTimes(spec, stream(seed, "steps", spec.group, position), self.population.slowdowns(spec.index))
            for spec, position in zip(specs, _positions(scenario), strict=True)
        ]
        self.presence = [_presence(spec.sessions, spec.index, self.population.faults, n) for spec in specs]
        self.fsync_n = np.array([spec.fsync_s for spec in specs])
        self.disk_n = np.array([spec.disk_bytes_per_s or math.inf for spec in specs])
        self.reachable_n = np.array([spec.reachable for spec in specs])
        self.cap_n = np.array([spec.data_cap_bytes or math.inf for spec in specs])
        self.attacks: list[Attack | None] = [spec.attack for spec in specs]
        self.between = distances(self.population.topology)
        stored_n = np.minimum(self.disk_n, self.charges.checked_bytes_per_s)
        self.lines = usable_lines(self.population.topology, self.between, stored_n)
        self.slow_links = [_windows(self.population.faults, "link", index) for index in range(n)]
        self.slow_disks = [_windows(self.population.faults, "slow_disk", index) for index in range(n)]
        timing = Timing(
            grace_ms=round(1e3 * self.run.grace_s),
            deadline_floor_ms=round(1e3 * self.run.deadline_floor_s),
            deadline_ceiling_ms=round(1e3 * self.run.deadline_ceiling_s),
        )
        self.pace = [Pace.of(timing) for _ in specs]
        self.resend_s = timing.resend_ms / 1e3
        # who is where
        self.member_n = np.array([item.connected(0.0) for item in self.presence])
        self.absent_n = np.zeros(n, np.int64)
        self.applied_n = np.zeros(n, np.int64)  # the last round whose state it has; 0: what everybody began with
        self.ready_n = np.where(self.member_n & self.reachable_n, 0.0, np.inf)  # in this round since; inf: not yet
        self.lost_n = np.zeros(n)  # if not ready: since when it looks for the others
        self.late_why = ["protocol"] * n  # why it was late to be ready
        # local training: from start to finish, or to be planned (nan)
        self.start_n, self.finish_n = np.full(n, np.nan), np.full(n, np.nan)
        self.steps_n = np.full(n, self.run.inner_steps, np.int64)
        self.kept_s_n, self.kept_steps_n = np.zeros(n), np.zeros(n, np.int64)  # of late payloads, without feedback
        self.snapshot_n = np.zeros(n)  # when its latest snapshot is on disk
        # accounts
        self.sent_n, self.received_n = np.zeros(n), np.zeros(n)
        self.counted_s_n, self.counted_steps_n = np.zeros(n), np.zeros(n, np.int64)
        self.counted_rounds_n = np.zeros(n, np.int64)
        self.round_bytes = 0.0  # of all payloads of the latest round
        self.capped: list[int] = []

    def flights_s(self, source: int, target: int) -> float:
        """One way, from member to member."""
        return float(self.between.one_way_mm[source, target])

    def attack_of(self, member: int, index: int) -> Attack | None:
        """What a member does to the others in a round."""
        attack = self.attacks[member]
        return attack if attack is not None and index >= attack.from_round else None

    def disk_factor(self, member: int, at_s: float) -> float:
        """How many times slower its disk is now."""
        return _factor(self.slow_disks[member], at_s)

    def write_s(self, member: int, size_bytes: float, at_s: float) -> float:
        """Seconds of a durable write."""
        seconds = float(self.fsync_n[member]) + size_bytes / float(self.disk_n[member])
        return seconds * self.disk_factor(member, at_s) if self.slow_disks[member] else seconds

    def fsync_s(self, at_n: Floats) -> Floats:
        """Seconds of one small durable write of everybody, each at its own time."""
        seconds: Floats = self.fsync_n.copy()
        for member, windows in enumerate(self.slow_disks):
            if windows and math.isfinite(at_n[member]):
                seconds[member] *= _factor(windows, float(at_n[member]))
        return seconds

    # -- coming back --------------------------------------------------------------------------------------------------

    def return_s(self, member: int, index: int) -> float:
        """When a member that is not in round `index` will be, if it finds the others from `lost_n` on. inf: never."""
        if not self.reachable_n[member]:
            return math.inf
        presence, at_s = self.presence[member], float(self.lost_n[member])
        for _ in range(RETRIES_MAX):
            back_s = presence.next_connected(at_s)
            if math.isinf(back_s):
                return math.inf
            restarts = back_s > 0 and not presence.powered(np.nextafter(back_s, 0))
            entered_s = back_s + self._catch_up_s(member, index) + (RESTART_S if restarts else 0.0)
            until_s = presence.connected_until(back_s)
            if entered_s < until_s:
                return entered_s
            at_s = until_s
        return math.inf

    def catch_up_bytes(self, member: int, index: int) -> tuple[float, int]:
        """What it fetches to enter round `index`, and how many rounds it replays."""
        missed = index - 1 - int(self.applied_n[member])
        return self.charges.catch_up_bytes(missed, index, self.round_bytes, self.run.snapshot_rounds)

    def _catch_up_s(self, member: int, index: int) -> float:
        size, replayed = self.catch_up_bytes(member, index)
        others = float(self.lines.up_m.sum() - self.lines.up_m[member])
        rate = min(float(self.lines.down_m[member]), others)
        rows = max(1, round(self.round_bytes / self.charges.payload_bytes))
        seconds = replayed * self.charges.apply_s(rows)
        return seconds + (size / rate if rate > 0 else math.inf) if size else seconds

    # -- capacities ---------------------------------------------------------------------------------------------------

    def changes(self, entered_n: Floats, start_s: float, end_s: float) -> list[Change]:
        """How lines change within [start, end): who comes and goes, enters the round, or has a faulty line or disk.

        Members that are not always there, or not from the start, get their capacity at `start_s` as a change too.
        """
        found: list[Change] = []
        for member in range(self.n):
            windows = self.slow_links[member] + self.slow_disks[member]
            if self.presence[member].always and not windows and entered_n[member] <= start_s:
                continue
            edges = [start_s, float(entered_n[member]), *(edge for span in windows for edge in span[:2])]
            edges += [at_s for at_s, _ in self.presence[member].edges(start_s, end_s)]
            for at_s in sorted(dict.fromkeys(edge for edge in edges if start_s <= edge < end_s)):
                found.append(Change(at_s, member, *self._capacity(member, at_s, float(entered_n[member]))))
        return found

    def _capacity(self, member: int, at_s: float, entered_s: float) -> tuple[float, float]:
        if at_s < entered_s or not self.presence[member].connected(at_s):
            return 0.0, 0.0
        link = _factor(self.slow_links[member], at_s)
        disk = float(self.disk_n[member]) / _factor(self.slow_disks[member], at_s)
        return float(self.lines.up_m[member]) * link, min(float(self.lines.down_m[member]) * link, disk)


def _positions(scenario: Scenario) -> list[int]:
    """Everybody's place in its group: streams are named by it, so that other groups do not change what it draws."""
    return [position for group in scenario.members for position in range(group.count)]


def _presence(
    sessions: tuple[tuple[float, float, bool], ...], member: int, faults: tuple[Fault, ...], size: int
) -> Presence:
    presence = Presence(sessions)
    for fault in faults:
        end_s = fault.at_s + fault.for_s if fault.for_s else math.inf
        hit = member in fault.members
        if fault.kind in ("crash", "leave") and hit:
            presence.cut(fault.at_s, end_s, polite=fault.kind == "leave")
        elif fault.kind == "partition" and hit == (2 * len(fault.members) <= size):
            presence.isolate(fault.at_s, end_s)  # the smaller side: it has no quorum
    return presence


def _windows(faults: tuple[Fault, ...], kind: str, member: int) -> list[tuple[float, float, float]]:
    return [
        (fault.at_s, fault.at_s + fault.for_s if fault.for_s else math.inf, fault.factor)
        for fault in faults
        if fault.kind == kind and member in fault.members
    ]


def _factor(windows: list[tuple[float, float, float]], at_s: float) -> float:
    return math.prod(factor for start, end, factor in windows if start <= at_s < end)
