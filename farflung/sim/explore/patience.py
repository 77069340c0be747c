"""How long a swarm may take to go on after the last fault, derived from what its members wait for.

    bound = reconnect + catch up + ROUNDS x (local steps + deadline + grace + views) + a joiner's search

with, for the first round, every view from the highest that anybody has reached: timeouts double with each view, so
that a partition which lasted long is also left slowly. The deadline is genesis' ceiling, because history is lost in a
restart.
"""

from __future__ import annotations

from farflung.node.peers import LOOK_S, REST_S
from farflung.node.state_sync import FIND_S, SNAPSHOT_S
from farflung.node.transport.links import CONNECT_MS
from farflung.protocol import limits
from farflung.protocol.certificate import Certificate
from farflung.protocol.manifest import is_quorum
from farflung.protocol.round import RoundMachine
from farflung.sim.explore.ground import AGAIN_S, STEP_S, TIMING
from farflung.sim.explore.stage import Stage
from farflung.sim.life import Life

ROUNDS = 2
"""New rounds that every member must apply."""

CALL_S = 10.0
"""One control call, and one fetch that is silent."""


def tip_of(stage: Stage) -> Certificate:
    """The newest certificate that a running node has applied. One that only a dead disk holds helps nobody."""
    machines = [life.node.machine for life in stage.lives if life.node is not None]
    tips = [machine.tip for machine in machines if machine is not None]
    return max(tips, key=lambda tip: tip.manifest.round_index, default=stage.first_certificate)


def bound_s(stage: Stage) -> float:
    """From now on, in the world as it is now."""
    machines = [life.node.machine for life in stage.lives if life.node is not None and life.node.machine is not None]
    n, view = len(stage.lives), max((machine.ballot.view for machine in machines), default=0)
    longest_s = max((_view_s(machine) for machine in machines), default=TIMING.deadline_ceiling_ms / 1e3)
    train_s = 2 * stage.schedule.steps * STEP_S
    if stage.genesis.mode != "gather":
        train_s += mixing_s(stage)
    speak_s = train_s + (TIMING.deadline_ceiling_ms + TIMING.grace_ms) / 1e3
    reach_s = 3 * SNAPSHOT_S + 2 * CALL_S + CONNECT_MS / 1e3 + LOOK_S + REST_S
    search_s = FIND_S + AGAIN_S
    first_s = speak_s + _views_s(longest_s, view, n)
    return reach_s + search_s + first_s + (ROUNDS + 1) * (speak_s + _views_s(longest_s, 0, n))


def mixing_s(stage: Stage) -> float:
    """The longest that a mixing may take: every tick as long as it may be, and the wait for word at the end."""
    ticks = len(stage.lives)  # a period of any graph is no longer
    return (ticks + 1) * TIMING.deadline_ceiling_ms / 1e3 + stage.genesis.mixing.settle_ms / 1e3


def _view_s(machine: RoundMachine) -> float:
    return machine.pace.certify.value_s


def _views_s(base_s: float, view: int, n: int) -> float:
    """The rest of a view, and a proposer after the other until one is there."""
    return sum(base_s * 2.0 ** min(one, limits.VIEW_DOUBLINGS_MAX) for one in range(view, view + n + 1))


def can_go_on(stage: Stage) -> bool:
    """Whether enough members are on: a quorum of the tip's voters, and as many as training waits for."""
    manifest = tip_of(stage).manifest
    on = {life.peer_id for life in stage.lives if life.on and not life.gone}
    if not manifest.started and len(on) < stage.genesis.start_members:
        return False
    return is_quorum(manifest.voters, on)


def has_arrived(stage: Stage, life: Life, goal: int) -> bool:
    """Whether a member that is on has applied `goal` rounds with payloads, or has no part in the run any more."""
    if life.finished or (life.trainee is not None and life.trainee.learner.finished):
        return True
    machine = life.node.machine if life.node is not None else None
    if machine is not None and machine.parent.trained >= goal:
        return True
    # A finished run admits nobody: those who were in it have gone home.
    last, rounds = tip_of(stage).manifest, stage.genesis.rounds
    return 0 < rounds <= last.trained and life.peer_id not in last.member_of


def late_ones(stage: Stage, goal: int) -> list[Life]:
    """Members that are on and have not arrived."""
    return [life for life in stage.lives if life.on and not life.gone and not has_arrived(stage, life, goal)]
