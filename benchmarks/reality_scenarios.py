"""The scenarios that are both measured and simulated, and the file of what was measured.

A scenario is data; `reality.py` plays it with real processes, real gRPC and real TCP, and `reality_predict.py` in the
simulator. The file keeps what was measured, so that a test without root can hold the simulator to it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from netns import Line

MBIT = 20.0
"""Slow enough that neither two cores nor TLS are ever the limit."""

BULK_BYTES = 25_000_000
"""Ten seconds of such a line."""

RECORD = Path(__file__).parent.parent / "tests" / "data" / "reality_netns.csv"


@dataclass(frozen=True)
class Scenario:
    """Hosts on lines of their own, and what they send each other."""

    name: str
    carrier: Literal["tbf", "wan"]
    """"tbf": the kernel's token buckets and no delay. "wan": the forwarder's lines, with delay."""
    mbit: tuple[tuple[float, float], ...]
    """(up, down) of each host."""
    transfers: tuple[tuple[int, int, int], ...] = ()
    """(source, target, bytes), all at once; a source gives the same to everybody."""
    payload_bytes: int = 0
    """Without transfers: of each member, in whole rounds of a real swarm of all hosts."""
    delay_ms: float = 0.0
    """One way between any two hosts."""
    queue: Literal["fifo", "fq"] = "fifo"
    queue_ms: int = 100
    goal: float = 0.05
    """The largest relative error the simulator may have on the time until the last is done, or on a round's."""
    every_host: bool = True
    """Whether each host's own time must keep it too. Among flows that share a drop-tail queue TCP picks winners."""

    @property
    def lines(self) -> list[Line]:
        """As `netns` and `wan` build them."""
        return [Line(up, down, delay_ms=self.delay_ms / 2, queue=self.queue) for up, down in self.mbit]


def pairs(name: str, carrier: Literal["tbf", "wan"], **how: Any) -> Scenario:
    """Three one-way transfers, one per line."""
    moves = tuple((host, host + 1, BULK_BYTES) for host in (0, 2, 4))
    return Scenario(name, carrier, ((MBIT, MBIT),) * 6, moves, **how)


def ring(name: str, carrier: Literal["tbf", "wan"], hosts: int = 4, **how: Any) -> Scenario:
    """Everybody fetches from the left neighbour: every line is full in both directions."""
    moves = tuple((host, (host + 1) % hosts, BULK_BYTES) for host in range(hosts))
    return Scenario(name, carrier, ((MBIT, MBIT),) * hosts, moves, **how)


def mesh(name: str, hosts: int = 4, **how: Any) -> Scenario:
    """Everybody fetches from everybody: several flows share each uplink and each downlink, as in a round."""
    size = BULK_BYTES // (hosts - 1)
    moves = tuple((a, b, size) for a in range(hosts) for b in range(hosts) if a != b)
    return Scenario(name, "wan", ((MBIT, MBIT),) * hosts, moves, **how)


def crossing(name: str, **how: Any) -> Scenario:
    """Host 0, with a home's thin uplink, downloads while its uplink is full of something else."""
    thin, wide = (MBIT / 5, MBIT), (MBIT, MBIT)
    moves = ((1, 0, BULK_BYTES), (0, 2, BULK_BYTES * 3 // 10))  # the upload outlasts the download
    return Scenario(name, "wan", (thin, wide, wide), moves, **how)


def rounds(name: str, carrier: Literal["tbf", "wan"], **how: Any) -> Scenario:
    """Rounds of four members, uncompressed payloads, no training to speak of."""
    return Scenario(name, carrier, ((MBIT, MBIT),) * 4, payload_bytes=10_000_000, **how)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        pairs("pairs-tbf", "tbf"),
        pairs("pairs-40ms", "wan", delay_ms=20.0),
        ring("ring-tbf", "tbf", goal=0.10),
        ring("ring-fq-40ms", "wan", delay_ms=20.0, queue="fq"),
        ring("ring-fifo-40ms", "wan", delay_ms=20.0, goal=0.10, every_host=False),
        ring("ring-fifo-40ms-short", "wan", delay_ms=20.0, queue_ms=25, goal=0.10, every_host=False),
        ring("ring-fifo-40ms-long", "wan", delay_ms=20.0, queue_ms=400, goal=0.10, every_host=False),
        ring("ring6-fifo-40ms", "wan", hosts=6, delay_ms=20.0, goal=0.10, every_host=False),
        crossing("crossing-fq-40ms", delay_ms=20.0, queue="fq", goal=0.05),
        crossing("crossing-fifo-40ms", delay_ms=20.0, goal=0.10),
        mesh("mesh-fq-40ms", delay_ms=20.0, queue="fq"),
        mesh("mesh-fifo-40ms", delay_ms=20.0, goal=0.10, every_host=False),
        mesh("mesh6-fifo-40ms", hosts=6, delay_ms=20.0, goal=0.10, every_host=False),
        rounds("round-tbf", "tbf", goal=0.10),
        rounds("round-fq-40ms", "wan", delay_ms=20.0, queue="fq"),
        rounds("round-fifo-40ms", "wan", delay_ms=20.0, goal=0.10),
    )
}
"""Names end in the round trip; short and long are queues."""


class Measured(NamedTuple):
    """One host in one repeat. Bytes are totals of the host's line, both directions' acknowledgements included."""

    scenario: str
    repeat: int
    host: int
    seconds: float
    """Its transfer, or its round; 0 for a host that only gave."""
    wire_up_bytes: int
    wire_down_bytes: int
    message_bytes_up: int
    """What its transport counted: the bytes of messages, before any framing."""
    message_bytes_down: int


def write_record(path: Path, notes: Mapping[str, str], rows: Sequence[Measured]) -> None:
    """`notes`, the settings of the scenarios met, and the rows, as a CSV file with a commented head."""
    met = dict.fromkeys(row.scenario for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        for name, note in notes.items():
            file.write(f"# {name}: {note}\n")
        for name in met:
            file.write(f"# scenario: {json.dumps(asdict(SCENARIOS[name]))}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Measured._fields)
        writer.writerows(row._replace(seconds=round(row.seconds, 4)) for row in rows)


def read_record(path: Path = RECORD) -> list[Measured]:
    """The rows. Raises ValueError if a scenario is no longer what was measured."""
    with path.open(encoding="utf-8") as file:
        lines = file.read().splitlines()
    for line in lines:
        if line.startswith("# scenario: "):
            was = json.loads(line.removeprefix("# scenario: "))
            now = json.loads(json.dumps(asdict(SCENARIOS[was["name"]])))
            if was != now:
                raise ValueError(f"measure again: recorded {was}, but it is now {now}")
    table = csv.DictReader(line for line in lines if not line.startswith("#"))
    kinds = [str, int, int, float, int, int, int, int]
    return [Measured(*(kind(row[name]) for kind, name in zip(kinds, Measured._fields, strict=True))) for row in table]
