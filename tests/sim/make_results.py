"""Made-up results of runs, consistent in themselves (blame adds up), for tests of reports. Not a model of anything."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from farflung.sim.draw import Draw
from farflung.sim.results import CAUSES, Blame, MemberResult, RoundResult, RunResult, Segment
from farflung.sim.scenario import Members, Model, Scenario

SCENARIO = Scenario(
    "home-40",
    (Members(count=40, step_ms=Draw.fixed(1200)),),
    Model(params=1e9, tokens_per_step=4096),
    summary="forty <homes> & one model",
    loss_goal=2.9,
)
BANDWIDTHS = {"20": 20.0, "50": 50.0, "100": 100.0, "200": 200.0}


def make_run(
    seed: int,
    changes: dict[str, str] | None = None,
    *,
    members: int = 40,
    rounds: int = 30,
    fidelity: str = "timing",
    goal: float | None = 2.9,
    uplink: float = 50.0,
    straggler: int = -1,
    scenario: str = "home-40",
) -> RunResult:
    """One run; `uplink` is the lowest Mbit/s, `straggler` a member that is twice as slow."""
    rng = np.random.default_rng([seed, members, rounds, int(uplink)])
    up_mbit = uplink * np.exp(rng.uniform(0, np.log(10), members))
    step_s = 1.2 * np.exp(rng.normal(0, 0.1, members))
    if straggler >= 0:
        step_s[straggler] *= 2
    worst_up, worst_step = int(np.argmin(up_mbit)), int(np.argmax(step_s))
    payload = 250_000_000 / 40
    times, made, segments, now_s = [], [], [], 0.0
    gantt = sorted({rounds // 3, rounds // 2})
    for index in range(rounds):
        seconds = _blame_seconds(rng, members, step_s, up_mbit, payload)
        blame = [Blame("compute", -1, seconds["compute"]), Blame("straggler", worst_step, seconds["straggler"])]
        blame += [Blame("upload", worst_up, 0.8 * seconds["upload"]), Blame("upload", -1, 0.2 * seconds["upload"])]
        blame += [
            Blame(cause, int(rng.integers(-1, members)), seconds[cause]) for cause in CAUSES[3:] if cause in seconds
        ]
        end_s = float(now_s + sum(item.seconds for item in blame))
        loss = 2.5 + 3.0 * (index + 1) ** -0.6 + float(rng.normal(0, 0.01))
        value = {"loss_estimate": loss} if fidelity == "timing" else {"loss": loss, "validation": loss + 0.05}
        made.append(
            RoundResult(index, now_s, end_s, members, members - index % 2, int(payload), blame=tuple(blame), **value)
        )
        if index in gantt:
            segments += _segments(rng, index, now_s, end_s, step_s)
        times.append(end_s)
        now_s = end_s
    losses = [item.loss_estimate or item.validation for item in made]
    reached = [end_s for end_s, loss in zip(times, losses, strict=True) if goal is not None and loss <= goal]
    people = [_member(rng, index, rounds, now_s, payload, up_mbit[index], step_s[index]) for index in range(members)]
    return RunResult(
        scenario=scenario,
        seed=seed,
        fidelity=fidelity,
        changes=dict(changes or {}),
        members=tuple(people),
        rounds=tuple(made),
        duration_s=now_s,
        finished=True,
        segments=tuple(segments),
        events_digest=hashlib.sha256(repr((seed, changes, uplink)).encode()).hexdigest(),
        wall_s=float(rng.uniform(0.2, 0.5)),
        notes=("losses are estimates from published scaling laws",) if fidelity == "timing" else (),
        final_loss=losses[-1] if losses else None,
        time_to_goal_s=reached[0] if reached else None,
        extra={"state fetches": float(rng.integers(0, 9))},
    )


def make_sweep(seeds: int = 20, *, members: int = 40, rounds: int = 30, fidelity: str = "timing") -> list[RunResult]:
    """Two codecs times two uplinks."""
    return [
        make_run(
            seed,
            {"run.codec": codec, "members.up_mbit": name},
            members=members,
            rounds=rounds,
            fidelity=fidelity,
            uplink=BANDWIDTHS[name] * (1 if codec == "q2" else 0.4),
        )
        for codec in ("int8", "q2")
        for name in ("50", "200")
        for seed in range(seeds)
    ]


def unfinished(run: RunResult) -> RunResult:
    """The same, stopped half-way."""
    kept = run.rounds[: len(run.rounds) // 2]
    end_s = kept[-1].end_s if kept else 0.0
    return replace(run, rounds=kept, finished=False, duration_s=end_s, time_to_goal_s=None)


def _blame_seconds(rng, members, step_s, up_mbit, payload):
    upload = 8 * payload * members / 4 / (up_mbit.min() * 1e6)
    return {
        "compute": 100 * float(np.median(step_s)),
        "straggler": 20 * float(step_s.max() - np.median(step_s)),
        "upload": float(upload * rng.uniform(0.9, 1.1)),
        "download": float(rng.exponential(5)),
        "latency": 0.3,
        "codec": 3.0,
        "disk": float(rng.exponential(1)),
        "deadline": float(rng.exponential(20)) * float(rng.random() < 0.2),
        "protocol": float(rng.exponential(2)),
    }


def _member(rng, index, rounds, duration_s, payload, up_mbit, step_s):
    steps = 100 * rounds
    sent = int(rounds * payload * rng.uniform(0.5, 3))
    return MemberResult(
        name=f"member-{index:02d}",
        up_mbit=float(up_mbit),
        down_mbit=float(4 * up_mbit),
        step_s=float(step_s),
        online_s=duration_s,
        train_s=min(duration_s, steps * float(np.minimum(step_s, 1.3))),
        steps=steps,
        tokens=steps * 4096,
        bytes_sent=sent,
        bytes_received=int(rounds * payload * 39),
        wire_sent=int(sent * 1.05),
        wire_received=int(rounds * payload * 39 * 1.05),
        rounds_counted=rounds,
    )


def _segments(rng, index, start_s, end_s, step_s):
    segments = []
    for member, step in enumerate(step_s):
        if rng.random() < 0.04:
            segments.append(Segment(member, index, "offline", start_s, end_s))
            continue
        trained_s = min(start_s + 100 * float(step), end_s - 12)
        cuts = [start_s, trained_s, trained_s + 2, end_s - 9, end_s - 4, end_s]
        kinds = ("train", "encode", "exchange", "wait", "aggregate")
        segments += [
            Segment(member, index, kind, cuts[place], cuts[place + 1])
            for place, kind in enumerate(kinds)
            if cuts[place + 1] > cuts[place]
        ]
    return segments


def make_odd(seed: int) -> list[RunResult]:
    """A few runs of two variants in which anything may be missing, broken or named like a script."""
    rng = np.random.default_rng([7, seed])
    fidelity = ("timing", "training")[int(rng.integers(2))]
    runs = []
    for index in range(int(rng.integers(2, 7))):
        members, rounds = int(rng.choice([1, 2, 3, 7])), int(rng.choice([0, 1, 2, 5]))
        changes = {"run.codec": str(rng.choice(["q2", "<script>alert('x')</script>"]))}
        run = make_run(index, changes, members=members, rounds=rounds, fidelity=fidelity, scenario="a<b>&\"c'")
        if rng.random() < 0.3:
            run = unfinished(run)
        if rng.random() < 0.3:
            run = replace(run, final_loss=float(rng.choice([np.nan, np.inf])))
        if rng.random() < 0.3:
            run = replace(run, segments=(), rounds=tuple(replace(item, blame=()) for item in run.rounds))
        if rng.random() < 0.3:
            worse = tuple(replace(item, loss=None, validation=None, loss_estimate=np.nan) for item in run.rounds)
            run = replace(run, rounds=worse, notes=("</pre><img src=x>",))
        if rng.random() < 0.3:
            run = replace(run, members=tuple(replace(one, name=f"<i>{one.name}", bytes_sent=0) for one in run.members))
        runs.append(run)
    return runs
