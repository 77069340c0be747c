"""The scenarios of `reality_scenarios.py` in the simulator, and how far from reality it is.

Transfers are the same calls on `SimTransport`; rounds are `simulate` with training in the loop. Nothing is fitted to
what is measured here except what `farflung/sim/network/topology.py` says of its own constants.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from reality_peer import RUN, Giver, fetch
from reality_scenarios import Measured, Scenario

from farflung.node.blobs import MemoryBlob
from farflung.node.runtime import SystemClock
from farflung.protocol.identity import Identity
from farflung.protocol.record import PeerRecord
from farflung.sim.channel import Channels
from farflung.sim.draw import Draw
from farflung.sim.eventlog import EventLog
from farflung.sim.fabric import Fabric
from farflung.sim.loop import VirtualLoop, run_virtual
from farflung.sim.network.topology import NodeLinks, Topology
from farflung.sim.results import RunResult
from farflung.sim.scenario import Members, Model, Network, Run
from farflung.sim.scenario import Scenario as Question
from farflung.sim.simulate import simulate
from farflung.sim.transport import SimTransport

QUIET_S = 1.0
"""Between connecting and fetching, as in the real peers: congestion windows are cold again."""


STUB_STEP_MS = 5.0
"""What `builtin:stub` takes to add noise to 2.5 million numbers."""

FSYNC_MS, DISK_MB_S = 10.0, 400.0
"""Of the machine on which the rounds were measured: a small write and fsync, and 10 MB with theirs (25 ms)."""

ROUNDS_SKIPPED, ROUNDS = 1, 3
"""Rounds before the steady state, and of it."""


class Predicted(NamedTuple):
    """One host, as `Measured` has it."""

    seconds: float
    wire_up_bytes: int
    wire_down_bytes: int


def _queue_of(scenario: Scenario) -> str:
    """On `tbf` the queue is the host's own: TCP sees it and keeps it short (TCP small queues), which is like fq."""
    return scenario.queue if scenario.carrier == "wan" else "fq"


def topology_of(scenario: Scenario) -> Topology:
    """The lines, as the simulator describes them."""
    waits = _queue_of(scenario) == "fifo"
    nodes = []
    for line in scenario.lines:
        up, down = line.up * 1e6 / 8, line.down * 1e6 / 8
        queue_bytes = up * scenario.queue_ms / 1e3 if waits else None
        nodes.append(NodeLinks(up, down, queue="fifo" if waits else "fq", queue_bytes=queue_bytes))
    return Topology(tuple(nodes), last_mile_s=tuple(line.delay_ms / 1e3 for line in scenario.lines))


def predict(scenario: Scenario) -> list[Predicted]:
    """What every host will see. Transfers cost a second, rounds some more."""
    if not scenario.transfers:
        return _rounds(scenario)
    loop = VirtualLoop()
    return run_virtual(_transfers(scenario, loop), loop)


def _rounds(scenario: Scenario) -> list[Predicted]:
    """One round of the steady state: what a longer run has more than a shorter one, which has the same beginning."""
    few, many = (_simulated(scenario, rounds) for rounds in (ROUNDS_SKIPPED, ROUNDS_SKIPPED + ROUNDS))
    took_s = statistics.median(item.end_s - item.start_s for item in many.rounds[-ROUNDS:])
    return [
        Predicted(took_s, (b.wire_sent - a.wire_sent) // ROUNDS, (b.wire_received - a.wire_received) // ROUNDS)
        for a, b in zip(few.members, many.members, strict=True)
    ]


def _simulated(scenario: Scenario, rounds: int) -> RunResult:
    up, down = scenario.mbit[0]
    assert set(scenario.mbit) == {(up, down)}, "rounds are between equals"
    line = scenario.lines[0]
    waits = _queue_of(scenario) == "fifo"
    members = Members(
        count=len(scenario.mbit),
        up_mbit=Draw.fixed(up),
        down_mbit=Draw.fixed(down),
        last_mile_ms=Draw.fixed(line.delay_ms),
        queue="fifo" if waits else "fq",
        **({"queue_ms": scenario.queue_ms} if waits else {}),
        step_ms=Draw.fixed(STUB_STEP_MS),
        fsync_ms=FSYNC_MS,
        disk_mb_s=DISK_MB_S,
    )
    return simulate(
        Question(
            name=scenario.name,
            members=(members,),
            model=Model(task="builtin:stub", options={"params": scenario.payload_bytes // 4}),
            fidelity="training",
            rounds=rounds,
            run=Run(codec="fp32", outer="sgd(lr=1.0)", inner_steps=1, grace_s=60.0, snapshot_rounds=1000),
            network=Network(latency_ms=((0.0,),)),
        )
    )


async def _transfers(scenario: Scenario, loop: VirtualLoop) -> list[Predicted]:
    hosts = range(len(scenario.mbit))
    fabric = Fabric(loop, topology_of(scenario), EventLog())
    channels = Channels(fabric)
    given = {source: size for source, _, size in scenario.transfers}
    blobs = [MemoryBlob.of(bytes(given.get(host, 1))) for host in hosts]
    transports = [SimTransport(RUN, channels, host, SystemClock()) for host in hosts]
    records: list[PeerRecord] = []
    for host, transport, blob in zip(hosts, transports, blobs, strict=True):
        addresses = await transport.start(Giver(blob))  # type: ignore[arg-type]
        records.append(PeerRecord(RUN, Identity(bytes([host]) * 32).public_key, addresses, b"", 0, 1 << 40))
    for source, target, _ in scenario.transfers:
        await fetch(transports[target], records[source], blobs[source].ref, ())
    await asyncio.sleep(QUIET_S)
    began_s, before = loop.time(), [fabric.wire_bytes(host) for host in hosts]
    took_s = [0.0] * len(hosts)

    async def one(source: int, target: int) -> None:
        ref = blobs[source].ref
        await fetch(transports[target], records[source], ref, range(ref.chunks))
        took_s[target] = max(took_s[target], loop.time() - began_s)

    async with asyncio.TaskGroup() as group:
        for source, target, _ in scenario.transfers:
            group.create_task(one(source, target))
    after = [fabric.wire_bytes(host) for host in hosts]
    for transport in transports:
        await transport.stop()
    return [Predicted(took_s[host], *_less(after[host], before[host])) for host in hosts]


def _less(after: Sequence[int], before: Sequence[int]) -> tuple[int, int]:
    return after[0] - before[0], after[1] - before[1]


class Compared(NamedTuple):
    """A scenario beside its prediction; times and bytes are medians over repeats, errors are relative."""

    scenario: str
    real_s: float
    """Until the last transfer is done; or a round, at the median member."""
    spread: float
    """(slowest - fastest repeat) / median."""
    predicted_s: float
    error: float
    host_error: float
    """Of the host that is predicted worst, its median."""
    real_wire_mb: float
    predicted_wire_mb: float
    wire_error: float
    goal: float
    reached: bool
    """Within the goal, each host's time included where the scenario says so."""


def compare(scenario: Scenario, rows: Sequence[Measured]) -> Compared:
    """Hold a prediction to what was measured."""
    predicted = predict(scenario)
    repeats = [[row for row in rows if row.repeat == repeat] for repeat in sorted({row.repeat for row in rows})]
    whole = max if scenario.transfers else statistics.median
    times_s = [whole([row.seconds for row in some if row.seconds]) for some in repeats]
    real_s, predicted_s = statistics.median(times_s), whole([item.seconds for item in predicted if item.seconds])
    wire = statistics.median(sum(row.wire_down_bytes for row in some) for some in repeats)
    predicted_wire = sum(item.wire_down_bytes for item in predicted)
    hosts = [
        item.seconds / statistics.median(row.seconds for row in rows if row.host == host) - 1
        for host, item in enumerate(predicted)
        if item.seconds
    ]
    error, host_error = predicted_s / real_s - 1, max(hosts, key=abs)
    return Compared(
        scenario.name,
        real_s,
        (max(times_s) - min(times_s)) / real_s,
        predicted_s,
        error,
        host_error,
        wire / 1e6,
        predicted_wire / 1e6,
        predicted_wire / wire - 1,
        scenario.goal,
        max(abs(error), abs(host_error) if scenario.every_host else 0.0) <= scenario.goal,
    )
