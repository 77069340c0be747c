"""A late joiner fetches the state from several members while they go on training. Needs root and namespaces.

    python benchmarks/late_joiner.py line        # a 25 M-parameter state at 200 Mbit/s: how full is the joiner's line?
    python benchmarks/late_joiner.py training    # 10 M parameters that really train: how much slower are the others?

In `training` the members share one core and the joiner has another: its work is another machine's. The members' uploads
are capped, as a user would cap them; what is left is what serving costs their training. The CPU time of a member's
whole process per training step tells that apart from what else this machine does: on a core of its own, a member is
slower by what it spends on other things than training.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from netns import Hosts, Line, available, plain_tcp_mbit
from report import arguments, cannot_run, goal, noise, publish
from swarm_rig import Event, Rig, of_kind, rig

from farflung.node.run_file import RunFile
from farflung.protocol.genesis import Timing

MBIT = 200.0


def state_fetch(events: list[Event], state_bytes: int) -> tuple[float, float, dict[str, int]] | None:
    """Begin and end of the joiner's download of the state, and bytes by source. None while it is not over."""
    ends = [event for event in of_kind(events, "fetched") if event["bytes"] == state_bytes]
    if not ends:
        return None
    end = ends[0]
    begin = next(event for event in of_kind(events, "fetch") if event["blob"] == end["blob"])
    sources: dict[str, int] = {}
    for event in of_kind(events, "chunk"):
        if event["blob"] == end["blob"] and not event["list"]:
            sources[event["peer"]] = sources.get(event["peer"], 0) + event["bytes"]
    return begin["t"], end["t"], sources


def join_and_wait(
    world: Rig, joiner: int, state_bytes: int, seconds: float, **options: object
) -> tuple[float, float, dict[str, int]]:
    """Start the joiner; returns its download."""
    world.start(joiner, **options)  # type: ignore[arg-type]
    world.wait_until("the joiner's state", lambda: state_fetch(world.events(joiner), state_bytes) is not None, seconds)
    found = state_fetch(world.events(joiner), state_bytes)
    assert found is not None
    return found


def line(out: Path, params: int, outer: str, members: int) -> None:
    """Rounds of a stub; at round 5 somebody comes."""
    run = RunFile(
        name="late",
        task="builtin:stub",
        task_options={"params": params},
        codec="int8",  # with smaller payloads, replaying five rounds is cheaper than the state
        outer=outer,
        inner_steps=1,
        start_members=members,
        snapshot_rounds=5,
        timing=Timing(grace_ms=60_000, deadline_floor_ms=60_000),
    )
    state_bytes = params * 4 * (2 if outer.startswith("nesterov") else 1)
    with Hosts([Line(MBIT, MBIT)] * (members + 1)) as hosts:
        tcp = plain_tcp_mbit(hosts, 0, members, 2.0)
        with rig(run, hosts, keep=out / "late_line") as world:
            world.start_all(members, step_s=6.0)
            world.wait_until(
                "round 5",
                lambda: any(entry["round"] >= 5 for entry in world.rounds(0)) and _snapshot(world, members),
                300,
            )
            begin, end, sources = join_and_wait(world, members, state_bytes, 120)
            rounds = world.rounds(0)
    total = sum(sources.values())
    share = state_bytes * 8 / 1e6 / (MBIT * (end - begin))
    rows = [
        {
            "parameters": params,
            "outer": outer,
            "state MB": state_bytes / 1e6,
            "s": end - begin,
            "share of line": share,
            "received x": total / state_bytes,
            **{f"from {peer}": f"{size / total:.0%}" for peer, size in sources.items()},
        }
    ]
    publish(
        out,
        f"late_joiner_line_{outer.split('(', maxsplit=1)[0]}",
        rows,
        title=f"a late joiner at {MBIT:g} Mbit/s, {members} members, after round {rounds[-1]['round']}",
        notes=[
            f"one plain TCP connection: {tcp / MBIT:.1%} of the line",
            "s: from the wish to the last byte checked and on disk (fsync included)",
            noise(),
            goal(
                f"{share:.1%} of the line (goal 80 %) from {len(sources)} members (goal 2)",
                share >= 0.8 and len(sources) >= 2,
            ),
        ],
    )


def _snapshot(world: Rig, members: int) -> bool:
    """Whether every member has a snapshot of round 5 or later on disk."""
    homes = [world.root / str(member) / "runs" for member in range(members)]
    return all(
        any(not path.suffix and path.name >= "round-000005" for path in home.glob("*/snapshots/round-*"))
        for home in homes
    )


def training(out: Path, members: int, upload_mbit: float) -> None:
    """A real 10 M-parameter GPT; steps per second before and while the joiner downloads."""
    options = {"layers": 8, "width": 320, "context": 64, "batch": 2}
    params = 12 * 8 * 320 * 320 + (256 + 64) * 320 + (2 * 8 + 1) * 320
    run = RunFile(
        name="late",
        task="builtin:stdlib-gpt",
        task_options=options,
        codec="fp32",  # or two rounds of payloads would be smaller than the state, and be fetched in its place
        inner_steps=60,
        start_members=members,
        snapshot_rounds=1,
        timing=Timing(grace_ms=60_000, deadline_floor_ms=60_000),
    )
    state_bytes = params * 8
    cores = sorted(os.sched_getaffinity(0))
    pin = [["taskset", "-c", str(core)] for core in (cores[0], cores[-1])]
    with Hosts([Line(MBIT, MBIT)] * (members + 1)) as hosts, rig(run, hosts, keep=out / "late_training") as world:
        world.start_all(members, prefix=pin[0], upload_mbit=upload_mbit)
        world.wait_until("two rounds", lambda: min(len(world.trained(m)) for m in range(members)) >= 2, 300)
        begin, end, sources = join_and_wait(world, members, state_bytes, 300, prefix=pin[1], upload_mbit=upload_mbit)
        world.wait_until("the round after", lambda: len(world.trained(0)) >= 3, 300)
        events = [world.events(member) for member in range(members)]
    rows = []
    for member in range(members):
        steps = of_kind(events[member], "step")
        skip = steps[0]["round"]  # the first round compiles and warms up
        before = [step for step in steps if step["t"] < begin - 8.0 and step["round"] > skip]
        during = [step for step in steps if begin < step["t"] - step["took"] and step["t"] < end]
        rows.append(
            {
                "member": member,
                "steps before": len(before),
                "ms per step before": mean_ms(before, "took"),
                "CPU ms before": mean_ms(before, "cpu"),
                "steps while it downloads": len(during),
                "ms per step then": mean_ms(during, "took"),
                "CPU ms then": mean_ms(during, "cpu"),
                "slower by": mean_ms(during, "cpu") / mean_ms(before, "cpu") - 1,
            }
        )
    slower = statistics.mean(row["slower by"] for row in rows)
    publish(
        out,
        "late_joiner_training",
        rows,
        title=f"{params / 1e6:.1f} M parameters training, uploads capped at {upload_mbit:g} Mbit/s",
        notes=[
            f"state of {state_bytes / 1e6:.0f} MB in {end - begin:.1f} s from {len(sources)} members: "
            f"{state_bytes * 8 / 1e6 / (end - begin):.0f} Mbit/s of {members * upload_mbit:g}",
            "8 s before the download are left out: the joiner is importing torch then",
            noise(),
            goal(f"members slower by {slower:.1%} of CPU time per step (goal < 10 %)", slower < 0.10),
        ],
    )


def mean_ms(steps: list[Event], what: str) -> float:
    return statistics.mean(step[what] for step in steps) * 1e3 if steps else float("nan")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("parts", nargs="*", default=["line", "training"])
    parser.add_argument("--params", type=float, default=25.0, help="millions of parameters of the stub")
    parser.add_argument("--outer", default="sgd(lr=1.0)")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--upload-mbit", type=float, default=50.0)
    args = parser.parse_args()
    if why := available():
        cannot_run(why)
    if "line" in args.parts:
        line(args.out, int(args.params * 1e6), args.outer, args.members)
    if "training" in args.parts:
        training(args.out, 2, args.upload_mbit)


if __name__ == "__main__":
    main()
