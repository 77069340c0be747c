"""Real narrow lines: four hosts in network namespaces, shaped in both directions by `tc tbf`. Needs root.

    python benchmarks/narrow_links.py            # all three parts, about 4 minutes

1. `bulk`: 20 Mbit/s lines and payloads of 10 MB. How much of the line do payload bytes fill while payloads move?
2. `thin`: 2 Mbit/s lines and payloads of 0.5 MB. Do messages still get through while bulk fills the line?
3. `slow origin`: one member's uplink is ten times slower. Does it upload its payload about once, the others relaying?

Nothing is trained: `builtin:stub` makes payloads of any size. Framing on the wire (Ethernet, IP, TCP, TLS, HTTP/2) is
not payload: one plain TCP connection is measured first, as the most that anything can reach.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Any

from netns import Hosts, Line, available, plain_tcp_mbit
from report import arguments, cannot_run, console, goal, noise, publish
from swarm_rig import Event, Rig, longest_gaps, of_kind, rig, timeline

from farflung.node.run_file import RunFile
from farflung.protocol.genesis import Timing

MEMBERS = 4


def run_of(payload_mb: float, grace_s: float) -> RunFile:
    """Uncompressed payloads: 4 bytes per parameter cost the least CPU per byte on the line."""
    return RunFile(
        name="narrow",
        task="builtin:stub",
        task_options={"params": int(payload_mb * 1e6 / 4)},
        codec="fp32",
        outer="sgd(lr=1.0)",
        inner_steps=1,
        start_members=MEMBERS,
        snapshot_rounds=1000,
        timing=Timing(grace_ms=int(grace_s * 1000)),
    )


def bulk_spans(events: list[Event]) -> list[dict[str, Any]]:
    """Per round of this member: when it fetched, and how many payload bytes came. Rounds end where it adopts."""
    spans, current, pending = [], None, set()
    for event in events:
        if event["kind"] == "fetch":
            current = current or {"begin": event["t"], "end": event["t"], "bytes": 0}
            pending.add(event["blob"])
        elif event["kind"] == "fetched" and current:
            current["end"], current["bytes"] = event["t"], current["bytes"] + event["bytes"]
        elif event["kind"] == "adopt" and current:
            spans.append(current)
            current = None
    return spans


def play(name: str, lines: list[Line], run: RunFile, rounds: int, seconds: float, out: Path) -> dict[str, Any]:
    """`rounds` rounds with payloads; returns events and round logs by member."""
    with Hosts(lines) as hosts:
        tcp = plain_tcp_mbit(hosts, 1, 2, 3.0)
        with rig(run, hosts, keep=out / f"narrow_{name}") as world:
            world.start_all(MEMBERS)
            wire: list[tuple[float, list[tuple[int, int]]]] = []

            def done() -> bool:
                if not wire or time.monotonic() > wire[-1][0] + 0.5:
                    wire.append((time.monotonic(), hosts.wire_bytes()))
                return min(map(len, map(world.trained, range(MEMBERS)))) >= rounds

            world.wait_until("the rounds", done, seconds)
            return {
                "tcp": tcp,
                "wire": wire,
                "events": [world.events(member) for member in range(MEMBERS)],
                "rounds": [world.rounds(member) for member in range(MEMBERS)],
            }


def health(played: dict[str, Any], run: RunFile) -> dict[str, Any]:
    """Did every round happen, with everybody, at once?"""
    rounds = [entry for entry in played["rounds"][0] if any(part["bytes"] for part in entry["payloads"].values())]
    gaps = []
    for events in played["events"]:
        adopts = [event["t"] for event in of_kind(events, "adopt")]
        gaps += longest_gaps(events, adopts[0], adopts[-1]).values()
    return {
        "rounds": f"{len(rounds)}",
        "payloads per round (min)": min(sum(p["bytes"] > 0 for p in entry["payloads"].values()) for entry in rounds),
        "members (min)": min(len(entry["members"]) for entry in rounds),
        "view changes": sum(entry["view"] for entry in rounds),
        "same state": len({tuple(e["state"] for e in log) for log in played["rounds"]}) == 1
        or _agree(played["rounds"]),
        "longest silence s": max(gaps),
        "round s (median)": statistics.median(entry["round_s"] for entry in rounds[1:]),
    }


def _agree(logs: list[list[dict[str, Any]]]) -> bool:
    """Logs may begin at different rounds: compare those that everybody has."""
    states = [{entry["round"]: entry["state"] for entry in log} for log in logs]
    common = set.intersection(*(set(one) for one in states))
    return all(len({one[index] for one in states}) == 1 for index in common)


def bulk(out: Path, mbit: float, payload_mb: float, rounds: int) -> None:
    run = run_of(payload_mb, grace_s=60)
    played = play("bulk", [Line(mbit, mbit)] * MEMBERS, run, rounds, 60 + rounds * payload_mb * 3 * 8 / mbit * 2, out)
    rows, bars = [], []
    for member, events in enumerate(played["events"]):
        for index, span in enumerate(bulk_spans(events)):
            took_s = span["end"] - span["begin"]
            rows.append(
                {
                    "member": member,
                    "round": index + 1,
                    "payload MB": span["bytes"] / 1e6,
                    "bulk s": took_s,
                    "share of line": span["bytes"] * 8 / 1e6 / (mbit * took_s),
                }
            )
            bars.append((span["begin"], span["end"], f"m{member} round {index + 1}"))
    show_lines(played["wire"], mbit, bars)
    timeline(sorted(bars, key=lambda bar: bar[2][-2:]))
    share = statistics.median(row["share of line"] for row in rows)
    chunks = [event for events in played["events"] for event in of_kind(events, "chunk") if not event["list"]]
    received, wanted = sum(event["bytes"] for event in chunks), sum(row["payload MB"] for row in rows) * 1e6
    publish(
        out,
        "narrow_links_bulk",
        rows,
        title=f"bulk: {MEMBERS} members at {mbit:g} Mbit/s, payloads of {payload_mb:g} MB",
        notes=[
            f"one plain TCP connection: {played['tcp'] / mbit:.1%} of the line",
            f"chunks received: {received / wanted:.3f} x what was wanted (1: nothing twice)",
            f"{health(played, run)}",
            noise(),
            goal(f"median share of the line {share:.1%} (goal 90 %)", share >= 0.9),
        ],
    )


def show_lines(
    wire: list[tuple[float, list[tuple[int, int]]]], mbit: float, bars: list[tuple[float, float, str]]
) -> None:
    """How full each line was, half second by half second, while payloads moved: wire bytes, all headers included."""
    first, last = min(bar[0] for bar in bars), max(bar[1] for bar in bars)
    pairs = [(a, b) for a, b in itertools.pairwise(wire) if a[0] >= first - 0.5 and b[0] <= last + 0.5]
    for host in range(MEMBERS):
        for way, name in enumerate(("up", "down")):
            full = [(b[1][host][way] - a[1][host][way]) * 8e-6 / (b[0] - a[0]) / mbit for a, b in pairs]
            blocks = "".join(" ▁▂▃▄▅▆▇█"[min(8, max(0, round(part * 8)))] for part in full)
            console.print(f"{f'm{host} {name}':>14} |{blocks}| {statistics.mean(full):.0%}", highlight=False)


def thin(out: Path, mbit: float, payload_mb: float, rounds: int) -> None:
    run = run_of(payload_mb, grace_s=60)
    played = play("thin", [Line(mbit, mbit)] * MEMBERS, run, rounds, 60 + rounds * payload_mb * 3 * 8 / mbit * 2.5, out)
    found = health(played, run)
    alive = found["view changes"] == 0 and found["payloads per round (min)"] == MEMBERS and found["same state"]
    shares = [
        span["bytes"] * 8 / 1e6 / (mbit * (span["end"] - span["begin"]))
        for events in played["events"]
        for span in bulk_spans(events)
    ]
    publish(
        out,
        "narrow_links_thin",
        [{"Mbit/s": mbit, "payload MB": payload_mb, **found, "share of line": statistics.median(shares)}],
        title="thin: control messages while bulk fills 2 Mbit/s lines",
        notes=[noise(), goal("every round complete, no view change, nobody dropped, same state", alive)],
    )


def slow_origin(out: Path, mbit: float, payload_mb: float, rounds: int) -> None:
    """The last member uploads ten times slower: it must send its payload about once."""
    slow = MEMBERS - 1
    lines = [Line(mbit, mbit)] * slow + [Line(mbit / 10, mbit)]
    run = run_of(payload_mb, grace_s=120)
    played = play("slow_origin", lines, run, rounds, 60 + rounds * payload_mb * 8 / mbit * 10 * 3, out)
    rows = []
    for member, events in enumerate(played["events"]):
        mine = own_payloads(played["rounds"][0], events)
        own = sum(event["bytes"] for event in of_kind(events, "served") if event["blob"] in mine and not event["list"])
        every = sum(event["bytes"] for event in of_kind(events, "served") if not event["list"])
        size = run.task_options["params"] * 4
        rows.append(
            {
                "member": member,
                "up Mbit/s": lines[member].up,
                "own payload sent x": own / size / len(mine),
                "all bulk sent x": every / size / len(mine),
                "round s (median)": statistics.median(entry["round_s"] for entry in played["rounds"][member][1:]),
            }
        )
    once_s = payload_mb * 8 / lines[slow].up
    publish(
        out,
        "narrow_links_slow_origin",
        rows,
        title=f"slow origin: member {slow} uploads at {lines[slow].up:g} Mbit/s, others {mbit:g}; {payload_mb:g} MB",
        notes=[
            f"sending its payload once takes {once_s:.1f} s on that line, three times {3 * once_s:.1f} s",
            f"{health(played, run)}",
            goal(
                f"the slow origin sends its payload {rows[slow]['own payload sent x']:.2f} times (about once)",
                rows[slow]["own payload sent x"] <= 1.25,
            ),
        ],
    )


def own_payloads(rounds: list[dict[str, Any]], events: list[Event]) -> set[str]:
    """Digests (short) of this member's payloads."""
    me = of_kind(events, "opened")[0]["peer"]
    return {
        payload["digest"][:8]
        for entry in rounds
        for peer, payload in entry["payloads"].items()
        if peer.startswith(me) and payload["bytes"]
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("parts", nargs="*", default=["bulk", "thin", "slow"], help="bulk, thin, slow")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if why := available():
        cannot_run(why)
    if "bulk" in args.parts:
        bulk(args.out, 20, 10.0, args.rounds)
    if "thin" in args.parts:
        thin(args.out, 2, 0.5, 2 * args.rounds)
    if "slow" in args.parts:
        slow_origin(args.out, 20, 2.5, args.rounds)
    console.print("events and logs of every member are beside the CSV files", highlight=False)


__all__ = ["Rig", "main"]

if __name__ == "__main__":
    main()
