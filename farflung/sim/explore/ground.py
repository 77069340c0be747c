"""The run and the machines that are explored: what is the same in every world."""

from __future__ import annotations

import torch

from farflung.node.mixing_check import default_mixing
from farflung.node.state_sync import first_state
from farflung.protocol.genesis import Genesis, Timing, secret_digest
from farflung.protocol.identity import Identity
from farflung.protocol.mixing.settings import Mixing
from farflung.protocol.schema import Schema
from farflung.sim.explore.schedule import MODES, Schedule
from farflung.sim.explore.tally import WIDTH, Tally
from farflung.sim.life import SECRET
from farflung.sim.population import MemberSpec

LINE_BYTES_PER_S = 1.25e6
"""10 Mbit/s both ways: a payload of 6 KB takes 5 ms."""

LATENCY_S = 0.02
STEP_S = 0.35
FSYNC_S = 0.004
AGAIN_S = 3.0
"""Somebody who found nobody tries again after this long."""

TIMING = Timing(grace_ms=2_500, deadline_floor_ms=1_500, deadline_ceiling_ms=6_000, view_floor_ms=1_000, resend_ms=700)
SNAPSHOT_ROUNDS = 2
MIXING = {"settle_ms": 1_500, "silence_ms": 3_000, "reference_rounds": 3}
"""Of a run whose members mix, besides what its mode takes by default."""


class SmallCosts:
    """Small and constant."""

    def encode_s(self) -> float:
        """See `sim.workers.Costs`."""
        return 0.005

    def check_s(self) -> float:
        """See `sim.workers.Costs`."""
        return 0.002

    def apply_s(self, rows: int) -> float:
        """See `sim.workers.Costs`."""
        return 0.005


def begin(identity: Identity, schedule: Schedule) -> tuple[Genesis, torch.Tensor, dict[str, torch.Tensor]]:
    """The run that is explored: plain averaging, and fp32 payloads or parcels so that sums stay exact; only where
    mass flows along edges with copies the codec rounds."""
    mode, codec = MODES[schedule.mode]
    mixing = Mixing() if mode == "gather" else Mixing(**(default_mixing(mode).to_json() | MIXING))
    theta_d = torch.zeros(WIDTH)
    genesis = Genesis(
        name="explored",
        founder=identity.public_key,
        state_digest=first_state(theta_d, {})[0].digest,
        schema=_SCHEMA,
        task="farflung.sim.explore.tally:TallyTask",
        codec=codec,
        mode=mode,
        mixing=mixing,
        outer="sgd(lr=1.0)",
        inner_steps=schedule.steps,
        rounds=schedule.rounds,
        secret_digest=secret_digest(SECRET),
        start_members=schedule.members - len(schedule.late),
        quorum_percent=schedule.quorum,
        snapshot_rounds=SNAPSHOT_ROUNDS,
        timing=TIMING,
    )
    return genesis, theta_d, {}


def _schema() -> Schema:
    from farflung.node.flat import schema_of

    return schema_of(Tally())


_SCHEMA = _schema()


def spec_of(schedule: Schedule, index: int) -> MemberSpec:
    """One member's machine: all are alike."""
    return MemberSpec(
        index=index,
        name=f"m{index}",
        group=0,
        up_bytes_per_s=LINE_BYTES_PER_S,
        down_bytes_per_s=LINE_BYTES_PER_S,
        region=0,
        last_mile_s=0.0,
        queue="fq",
        queue_bytes=0.0,
        loss=0.0,
        links=(),
        reachable=True,
        data_cap_bytes=0.0,
        step_s=STEP_S,
        jitter=0.0,
        busy_every_s=0.0,
        busy_for_s=0.0,
        busy_slowdown=1.0,
        fsync_s=FSYNC_S,
        disk_bytes_per_s=0.0,
        clock_skew_s=0.0,
        sessions=(),
        attack=None,
    )
