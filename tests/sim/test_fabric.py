"""Bytes between machines take what arithmetic by hand says, in order, around partitions too."""

import asyncio
import math
import random

import pytest
from worlds import FAR_S, UP, Wire, wires

from farflung.sim.eventlog import EventLog
from farflung.sim.fabric import PACKET_BYTES, SMALL_BYTES, Parcel, Pipe
from farflung.sim.network.topology import HEADER_OVERHEAD, NodeLinks, Topology

NEAR_S = 0.005
"""A cold connection's ten segments per round trip are 1.4 MB/s here: the line is the limit from the first byte."""

SIZE = 500_000
ALONE_S = SIZE * HEADER_OVERHEAD / UP
"""On the line of one sender."""


def play(wire, *moves):
    """Make each (when_s, move) and return {name: when it arrived} and the order of arrivals."""

    async def main():
        for when_s, move in moves:
            wire.loop.call_at(when_s, move)
        await asyncio.sleep(3600)

    wire.loop.run_until_complete(main())
    wire.loop.close()
    return dict(wire.came), [name for name, _ in wire.came]


def send(wire, pipe, name, size):
    return lambda: wire.fabric.put(pipe, Parcel(size, name, wire.arrived(name)))


def near(n=2, **more):
    return Wire(wires(n, latency_s=NEAR_S, ack_share=0.0, **more))


@pytest.mark.parametrize("size", [0, 1, 1000, SMALL_BYTES])
def test_a_small_message_takes_its_own_bytes_and_the_latency(size):
    wire = near()
    came, _ = play(wire, (1.0, send(wire, Pipe(0, 1), "a", size)))
    assert came["a"] == pytest.approx(1.0 + (size + PACKET_BYTES) / UP + NEAR_S, abs=5e-9)


@pytest.mark.parametrize("size", [SMALL_BYTES + 1, SIZE, 10 * SIZE])
def test_bulk_takes_its_bytes_with_headers_over_the_rate_and_the_latency(size):
    wire = near()
    came, _ = play(wire, (0.0, send(wire, Pipe(0, 1), "a", size)))
    assert came["a"] == pytest.approx(size * HEADER_OVERHEAD / UP + NEAR_S, abs=5e-9)


def test_bulk_of_one_pipe_goes_one_after_the_other():
    wire, pipe = near(), Pipe(0, 1)
    came, order = play(wire, *((0.0, send(wire, pipe, name, SIZE)) for name in "abc"))
    assert order == ["a", "b", "c"]
    for position, name in enumerate("abc", start=1):
        assert came[name] == pytest.approx(position * ALONE_S + NEAR_S, abs=1e-8)


def test_two_pipes_share_a_line_evenly_and_the_longer_gets_what_is_freed():
    wire = near(3)
    came, _ = play(wire, (0.0, send(wire, Pipe(0, 1), "short", SIZE)), (0.0, send(wire, Pipe(0, 2), "long", 3 * SIZE)))
    assert came["short"] == pytest.approx(2 * ALONE_S + NEAR_S, abs=1e-8)
    assert came["long"] == pytest.approx(4 * ALONE_S + NEAR_S, abs=1e-8)


def test_a_line_that_changes_counts_from_then_on():
    wire = near()
    came, _ = play(
        wire,
        (0.0, send(wire, Pipe(0, 1), "a", SIZE)),
        (0.5 * ALONE_S, lambda: wire.fabric.set_node(0, up_bytes_per_s=UP / 4)),
    )
    assert came["a"] == pytest.approx((0.5 + 4 * 0.5) * ALONE_S + NEAR_S, abs=1e-8)


def test_small_messages_wait_behind_bulk_on_a_fifo_uplink_only():
    for queue, waits_s in (("fq", 0.0), ("fifo", 0.2)):
        room = UP * 0.2 if queue == "fifo" else None
        nodes = (NodeLinks(UP, 1e9, queue=queue, queue_bytes=room), NodeLinks(UP, 1e9), NodeLinks(UP, 1e9))
        wire = Wire(Topology(nodes, latency_s=((NEAR_S,),)))
        small_s = (100 + PACKET_BYTES) / UP + NEAR_S
        came, _ = play(
            wire,
            (0.1, send(wire, Pipe(0, 2), "before", 100)),
            (1.0, send(wire, Pipe(0, 1), "bulk", SIZE)),
            (1.1, send(wire, Pipe(0, 2), "beside", 100)),
            (9.0, send(wire, Pipe(0, 2), "after", 100)),
        )
        assert came["before"] - 0.1 == pytest.approx(small_s, abs=1e-8)
        assert came["beside"] - 1.1 == pytest.approx(small_s + waits_s, abs=1e-8)
        assert came["after"] - 9.0 == pytest.approx(small_s, abs=1e-8)


def test_what_is_sent_into_a_partition_arrives_a_latency_after_it_heals():
    wire = near()
    came, _order = play(
        wire,
        (0.0, lambda: wire.fabric.cut(7, [0])),
        (1.0, send(wire, Pipe(0, 1), "small", 10)),
        (1.0, send(wire, Pipe(1, 0), "bulk", SIZE)),
        (30.0, lambda: wire.fabric.heal(7)),
    )
    assert came["small"] == pytest.approx(30.0 + NEAR_S, abs=1e-8)
    assert came["bulk"] == pytest.approx(30.0 + ALONE_S + NEAR_S, abs=1e-8)


def test_a_partition_stops_bulk_and_loses_none_of_what_was_carried():
    wire = near(3)
    came, _ = play(
        wire,
        (0.0, send(wire, Pipe(0, 1), "cut", SIZE)),
        (0.25 * ALONE_S, lambda: wire.fabric.cut(0, [1])),
        (10.0, send(wire, Pipe(0, 2), "not cut", SIZE)),
        (20.0, lambda: wire.fabric.heal(0)),
    )
    assert came["cut"] == pytest.approx(20.0 + 0.75 * ALONE_S + NEAR_S, abs=1e-6)
    assert came["not cut"] == pytest.approx(10.0 + ALONE_S + NEAR_S, abs=1e-8)


def test_two_partitions_must_both_heal_and_members_of_one_side_hear_each_other():
    wire = near(4)
    came, _ = play(
        wire,
        (0.0, lambda: wire.fabric.cut(1, [0, 1])),
        (0.0, lambda: wire.fabric.cut(2, [0, 1, 2])),
        (1.0, send(wire, Pipe(0, 1), "one side", 10)),
        (1.0, send(wire, Pipe(0, 2), "one cut", 10)),
        (1.0, send(wire, Pipe(0, 3), "two cuts", 10)),
        (5.0, lambda: wire.fabric.heal(1)),
        (9.0, lambda: wire.fabric.heal(2)),
    )
    assert [math.floor(came[name]) for name in ("one side", "one cut", "two cuts")] == [1, 5, 9]


def test_what_flies_while_a_partition_heals_does_not_overtake_what_it_held():
    wire, pipe = Wire(wires(latency_s=0.1)), Pipe(0, 1)
    came, order = play(
        wire,
        (0.00, send(wire, pipe, "held", 10)),
        (0.04, send(wire, pipe, "flying", 10)),
        (0.05, lambda: wire.fabric.cut(0, [0])),
        (0.12, lambda: wire.fabric.heal(0)),
        (0.13, send(wire, pipe, "later", 10)),
    )
    assert order == ["held", "flying", "later"]
    assert came["held"] == pytest.approx(0.22, abs=1e-8)
    assert came["flying"] >= came["held"]


@pytest.mark.parametrize("seed", range(25))
def test_nothing_overtakes_on_a_pipe_and_nothing_is_lost_whatever_is_cut(seed):
    dice = random.Random(seed)
    wire = Wire(wires(3, latency_s=dice.choice([0.0, 0.02, 0.3])))
    pipes = {f"{a}{b}": Pipe(a, b) for a in range(3) for b in range(3) if a != b}
    moves, put = [], {name: [] for name in pipes}
    for number in range(60):
        name, when_s = dice.choice([*pipes]), dice.uniform(0, 3)
        size = dice.choice([0, 50, 4000, 5000, 60_000])
        moves.append((when_s, send(wire, pipes[name], (name, number), size)))
        put[name].append((when_s, number))
    for key in range(6):
        at_s, side = dice.uniform(0, 3), dice.sample(range(3), dice.randint(1, 2))
        moves.append((at_s, lambda key=key, side=side: wire.fabric.cut(key, side)))
        moves.append((at_s + dice.expovariate(2), lambda key=key: wire.fabric.heal(key)))
    _, order = play(wire, *moves)
    for name in pipes:
        sent = [number for _, number in sorted(put[name])]
        assert [number for pipe, number in order if pipe == name] == sent


def test_a_closed_pipe_delivers_nothing_and_gives_its_share_back():
    wire, closed = near(3), Pipe(0, 1)
    came, _ = play(
        wire,
        (0.0, send(wire, closed, "lost", SIZE)),
        (0.0, send(wire, closed, "lost too", 10)),
        (0.0, send(wire, Pipe(0, 2), "kept", SIZE)),
        (0.5 * ALONE_S, lambda: wire.fabric.close(closed)),
        (0.6 * ALONE_S, send(wire, closed, "too late", 10)),
    )
    assert [*came] == ["kept"]
    assert came["kept"] == pytest.approx(1.25 * ALONE_S + NEAR_S, abs=1e-6)


def test_bytes_on_the_line_are_those_sent_with_their_headers():
    wire = near()
    play(wire, (0.0, send(wire, Pipe(0, 1), "bulk", SIZE)), (0.0, send(wire, Pipe(1, 0), "small", 100)))
    small = 100 + PACKET_BYTES
    assert wire.fabric.wire_bytes(0) == (pytest.approx(SIZE * HEADER_OVERHEAD, abs=2), small)
    assert wire.fabric.wire_bytes(1) == (small, pytest.approx(SIZE * HEADER_OVERHEAD, abs=2))


def test_every_arrival_is_in_the_log_when_and_where_it_arrived(tmp_path):
    log = EventLog(tmp_path / "log")
    wire = Wire(wires(latency_s=FAR_S), log)
    came, _ = play(wire, (0.0, send(wire, Pipe(0, 1), "a", 10)), (0.5, send(wire, Pipe(1, 0), "b", 20)))
    log.close()
    times = [round(came[name] * 1e9) for name in "ab"]
    assert (tmp_path / "log").read_text() == f"{times[0]} 0>1 a 10\n{times[1]} 1>0 b 20\n"
