"""Reality and its simulation side by side: real processes, gRPC, TLS and TCP on shaped lines. Needs root, gcc.

    python benchmarks/reality.py                        # everything, about 18 minutes
    python benchmarks/reality.py ring-fifo-40ms --repeats 3
    python benchmarks/reality.py --recorded             # the simulator beside tests/data/reality_netns.csv: no root

`pairs` fetches over three lines one way, `ring` over four in both directions at once, `crossing` downloads beside an
upload that fills a thin uplink, and `round` plays rounds of a real swarm of four. Each is measured a few times and
predicted by the simulator (`reality_predict.py`).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from narrow_links import run_of
from netns import Hosts
from reality_scenarios import RECORD, SCENARIOS, Measured, Scenario, read_record, write_record
from report import arguments, cannot_run, console, goal, noise, publish
from swarm_rig import Rig, of_kind, rig
from wan import Wan, unavailable

PEER = str(Path(__file__).with_name("reality_peer.py"))
CONGESTION = "cubic"
HEAD_START_S, SETTLE_S = 1.0, 0.5
Wire = list[tuple[int, int]]


class Played(NamedTuple):
    """What a scenario gave, and how its carrier did."""

    rows: list[Measured]
    carrier: str


def hosts_of(scenario: Scenario) -> Hosts:
    make = Wan if scenario.carrier == "wan" else Hosts
    return make(scenario.lines, queue_ms=scenario.queue_ms, congestion=CONGESTION)


class Peer:
    """A `reality_peer.py` on a host."""

    def __init__(self, hosts: Hosts, host: int, size_bytes: int) -> None:
        options = {"listen": f"{hosts.address(host)}:4400", "seed": host + 1, "bytes": size_bytes}
        self.child = hosts.start(
            host,
            [sys.executable, PEER, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def tell(self, **words: Any) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(words) + "\n")

    def hear(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"a peer ended with {self.child.wait()}")
        return dict(json.loads(line))


def transfer(scenario: Scenario, repeats: int) -> Played:
    """Fetch over connections that are open already, as those of a swarm are after its first round."""
    rows: list[Measured] = []
    given = {source: size for source, _, size in scenario.transfers}
    targets = dict.fromkeys(target for _, target, _ in scenario.transfers)
    with hosts_of(scenario) as hosts:
        peers = [Peer(hosts, host, given.get(host, 1)) for host in range(len(scenario.mbit))]
        named = [peer.hear() for peer in peers]
        for source, target, _ in scenario.transfers:
            peers[target].tell(**named[source])
            peers[target].hear()
        for repeat in range(repeats):
            before, at_s = hosts.wire_bytes(), time.monotonic() + HEAD_START_S
            for target in targets:
                peers[target].tell(at=at_s)
            done = {target: peers[target].hear() for target in targets}
            time.sleep(SETTLE_S)
            wire = used(before, hosts.wire_bytes())
            for host in range(len(peers)):
                took_s = done[host]["ended_s"] - at_s if host in done else 0.0
                up = sum(size for source, _, size in scenario.transfers if source == host)
                down = done[host]["bytes"] if host in done else 0
                rows.append(Measured(scenario.name, repeat, host, took_s, *wire[host], up, down))
        return Played(rows, how_late(hosts))


def used(before: Wire, after: Wire) -> Wire:
    return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)]


def how_late(hosts: Hosts) -> str:
    """How well the forwarder kept up: a late one makes lines longer than they should be."""
    if not isinstance(hosts, Wan):
        return "tbf"
    done = hosts.carried()
    dropped = sum(host[way]["dropped"] for host in done.hosts for way in ("up", "down"))
    return (
        f"{done.packets} packets in {done.cpu_s:.1f} CPU s, {done.late_over_1ms / max(done.packets, 1):.2%} "
        f"over 1 ms late, at most {done.late_ms_max:.0f} ms, {dropped} dropped"
    )


def play_rounds(scenario: Scenario, repeats: int, out: Path) -> Played:
    """A real swarm; the first round with payloads does not count."""
    members = len(scenario.mbit)
    run = run_of(scenario.payload_bytes / 1e6, grace_s=60)
    seconds = 90 + (repeats + 2) * members * scenario.payload_bytes * 8e-6 / min(map(min, scenario.mbit)) * 2
    with hosts_of(scenario) as hosts, rig(run, hosts, keep=out / scenario.name) as world:
        world.start_all(members)
        wire: list[tuple[float, Wire]] = []

        def done() -> bool:
            wire.append((time.monotonic(), hosts.wire_bytes()))
            return min(len(world.trained(member)) for member in range(members)) >= repeats + 1

        world.wait_until("the rounds", done, seconds)
        wire.append((time.monotonic(), hosts.wire_bytes()))
        rows = [row for host in range(members) for row in rounds_of(scenario, world, host, wire, repeats)]
        return Played(rows, how_late(hosts))


def rounds_of(
    scenario: Scenario, world: Rig, host: int, wire: Sequence[tuple[float, Wire]], repeats: int
) -> list[Measured]:
    """A host's rounds 1 to `repeats`, its bytes between one adoption and the next."""
    adopted_s = {event["round"]: event["t"] for event in of_kind(world.events(host), "adopt")}
    rows = []
    for repeat, entry in enumerate(world.trained(host)[1 : repeats + 1]):
        ended_s = adopted_s[entry["round"]]
        began, ended = at(wire, host, ended_s - entry["round_s"]), at(wire, host, ended_s)
        up, down = round(ended[0] - began[0]), round(ended[1] - began[1])
        row = Measured(scenario.name, repeat, host, entry["round_s"], up, down, entry["bytes_up"], entry["bytes_down"])
        rows.append(row)
    return rows


def at(wire: Sequence[tuple[float, Wire]], host: int, now_s: float) -> tuple[float, float]:
    """A host's bytes at an instant, between two looks."""
    later = next((i for i, (seen_s, _) in enumerate(wire) if seen_s >= now_s), len(wire) - 1)
    (a_s, a), (b_s, b) = wire[max(later - 1, 0)], wire[later]
    share = min(1.0, max(0.0, (now_s - a_s) / (b_s - a_s))) if b_s > a_s else 1.0
    return tuple(x + share * (y - x) for x, y in zip(a[host], b[host], strict=True))  # type: ignore[return-value]


def measure(scenario: Scenario, repeats: int, out: Path) -> Played:
    """Play a scenario for real, and say how it went."""
    played = transfer(scenario, repeats) if scenario.transfers else play_rounds(scenario, repeats, out)
    console.print(f"{scenario.name}: measured {repeats} times; {played.carrier}", highlight=False)
    return played


def settings() -> dict[str, str]:
    """What a reader of the file must know."""
    kernel = platform.release().split("-")[0]
    return {
        "what": "measured by benchmarks/reality.py, one row per host and repeat; see benchmarks/reality_scenarios.py",
        "machine": f"{platform.machine()}, Linux {kernel}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, TCP {CONGESTION}, MTU 1500, TLS",
    }


def play_all(names: Sequence[str], repeats: int, out: Path) -> tuple[dict[str, str], list[Measured]]:
    """Measure; what is done so far is kept in OUT/reality_netns.csv."""
    rows: list[Measured] = []
    notes = settings()
    for name in names:
        found = measure(SCENARIOS[name], repeats, out)
        rows += found.rows
        notes[name] = f"{found.carrier}; {noise()}"
        write_record(out / RECORD.name, notes, rows)
    return notes, rows


def show(rows: Sequence[Measured], out: Path) -> None:
    """The table of both worlds."""
    from reality_predict import compare  # measuring needs no simulator

    table = []
    for name in dict.fromkeys(row.scenario for row in rows):
        compared = compare(SCENARIOS[name], [row for row in rows if row.scenario == name])
        table.append(compared._asdict())
    worst = [goal(f"{row['scenario']}: within {row['goal']:.0%}", row["reached"]) for row in table]
    publish(out, "reality", table, title="reality and simulation", notes=[*worst, noise()])


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("names", nargs="*", default=list(SCENARIOS), help=", ".join(SCENARIOS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true", help=f"also write {RECORD}, which the tests read")
    parser.add_argument("--recorded", action="store_true", help="measure nothing: compare with what was recorded")
    args = parser.parse_args()
    if args.recorded:
        show([row for row in read_record() if row.scenario in args.names], args.out)
        return
    if why := unavailable():
        cannot_run(why)
    notes, rows = play_all(args.names, args.repeats, args.out)
    if args.record:
        write_record(RECORD, notes, rows)
    show(rows, args.out)


if __name__ == "__main__":
    main()
