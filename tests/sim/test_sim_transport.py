"""The real client and the real handlers over simulated lines: every call takes what arithmetic by hand says."""

import asyncio
import math
from dataclasses import replace

import grpc
import pytest
from worlds import FAR_S, UP, wires

from farflung.node.runtime import Holding
from farflung.node.transport.grpc import GrpcTransport
from farflung.node.transport.links import CONNECT_MS
from farflung.protocol import messages_pb2 as pb
from farflung.protocol.blob import choose_chunk_bytes, describe, split
from farflung.protocol.errors import PeerError
from farflung.protocol.identity import Identity
from farflung.protocol.record import PeerRecord
from farflung.sim.clock import SimClock
from farflung.sim.connection import HANDSHAKE_BYTES, HEAD_BYTES
from farflung.sim.eventlog import EventLog
from farflung.sim.fabric import KEEPALIVE_S, PACKET_BYTES, Fabric
from farflung.sim.loop import VirtualLoop, run_virtual
from farflung.sim.machine import Channels
from farflung.sim.network.topology import HEADER_OVERHEAD
from farflung.sim.transport import SimTransport, address_of

RUN = b"r" * 32
BLOB = bytes(range(256)) * 400
REF, DIGESTS = describe(BLOB)
PIECES = list(split(BLOB, choose_chunk_bytes(len(BLOB))))


class Service:
    """Answers everything; `answer` may be replaced."""

    def __init__(self):
        self.envelopes, self.running = [], 0

    async def answer(self):
        pass

    async def on_envelope(self, envelope):
        self.envelopes.append(envelope)
        self.running += 1
        try:
            await self.answer()
        finally:
            self.running -= 1

    async def on_records(self, run_id, records):
        return [*records, b"mine"]

    async def on_genesis(self, run_id):
        return b"g" * 3000

    async def on_chain(self, run_id, from_round):
        return [b"c" * 900] * 10, from_round + 9

    async def on_snapshot(self, run_id):
        return 7, REF

    async def on_watch(self, run_id):
        yield [Holding(b"d" * 32, False, (1, 2, 300))]
        await asyncio.Event().wait()

    async def on_fetch(self, run_id, digest, chunks):
        if not chunks:
            yield 0xFFFFFFFF, b"".join(DIGESTS)
        for index in chunks:
            yield index, bytes(PIECES[index])


class End:
    """One machine: a transport, its service and its record."""

    def __init__(self, index, transport):
        self.identity, self.service = Identity(bytes([index + 1]) * 32), Service()
        self.transport = transport

    async def start(self):
        addresses = await self.transport.start(self.service)
        key, certificate = self.identity.public_key, self.transport.certificate_der
        record = PeerRecord(RUN, key, tuple(addresses), certificate, issued_ms=1, lease_ms=1 << 50)
        self.record = record.signed(self.identity)
        return self


class Room:
    """n machines in virtual time."""

    def __init__(self, n=2, *, reachable=True, **channels):
        self.loop = VirtualLoop()
        self.fabric = Fabric(self.loop, wires(n), EventLog())
        self.channels = Channels(self.fabric, **channels)
        clock = SimClock(self.loop)
        self.ends = [
            End(index, SimTransport(RUN, self.channels, index, clock, reachable=reachable or index == 0))
            for index in range(n)
        ]

    def play(self, main):
        """Run `main(room, *ends)` once everybody has started."""

        async def begin():
            for end in self.ends:
                await end.start()
            try:
                return await main(self, *self.ends)
            finally:
                for end in self.ends:
                    await end.transport.stop()

        return run_virtual(begin(), self.loop)


def small_s(size, *, latency_s=FAR_S):
    """One small message."""
    return (size + PACKET_BYTES) / UP + latency_s


def unary_s(request, reply):
    """A call on an open connection ends when its last byte, data or status, is there."""
    return small_s(len(request) + HEAD_BYTES) + max(small_s(len(reply) + 14), small_s(HEAD_BYTES))


HANDSHAKE_S = 2 * (2 * FAR_S) + 2 * small_s(HANDSHAKE_BYTES)
"""TCP and TLS: two round trips, then a certificate each way."""


@pytest.mark.parametrize("size", [1, 300, 3000])
def test_the_first_call_shakes_hands_and_the_next_do_not(size):
    async def main(room, a, b):
        took_s = []
        for _ in range(3):
            began_s = room.loop.time()
            await a.transport.deliver(b.record, b"x" * size, deadline_s=5)
            took_s.append(room.loop.time() - began_s)
        return took_s

    call_s = unary_s(b"x" * size, pb.Reply(accepted=True).SerializeToString())
    assert Room().play(main) == pytest.approx([HANDSHAKE_S + call_s, call_s, call_s], abs=1e-7)


def test_an_answer_of_any_length_takes_what_its_bytes_take():
    async def main(room, a, b):
        await a.transport.deliver(b.record, b"", deadline_s=5)
        began_s = room.loop.time()
        await a.transport.genesis(b.record, deadline_s=5)
        return room.loop.time() - began_s

    request = pb.GenesisRequest(run_id=RUN).SerializeToString()
    reply = pb.GenesisReply(genesis=b"g" * 3000).SerializeToString()
    assert Room().play(main) == pytest.approx(unary_s(request, reply), abs=1e-7)


def test_bulk_has_a_connection_of_its_own_and_takes_its_bytes_over_the_rate():
    """Chunks follow each other without gaps; the last one's status is not waited for."""

    async def main(room, a, b):
        await a.transport.deliver(b.record, b"", deadline_s=5)
        began_s = room.loop.time()
        got = [piece async for piece in a.transport.fetch(b.record, REF, range(REF.chunks), idle_s=30)]
        first_s = room.loop.time() - began_s
        assert got == list(enumerate(map(bytes, PIECES)))
        began_s = room.loop.time()
        async for _ in a.transport.fetch(b.record, REF, range(REF.chunks), idle_s=30):
            pass
        return first_s, room.loop.time() - began_s

    first_s, second_s = Room().play(main)
    request = pb.BlobRequest(run_id=RUN, digest=REF.digest, chunks=range(REF.chunks)).SerializeToString()
    sizes = [len(pb.BlobChunk(index=i, data=bytes(piece)).SerializeToString()) + 14 for i, piece in enumerate(PIECES)]
    least_s = small_s(len(request) + HEAD_BYTES) + sum(sizes) * HEADER_OVERHEAD / UP + FAR_S
    assert least_s <= second_s < first_s - HANDSHAKE_S
    # a cold window of ten segments doubles every 40 ms until it is above the line's 40 kB per round trip
    assert second_s == pytest.approx(least_s, rel=0.35)


def traffic_of(end):
    flow = end.transport.traffic
    return flow.control_sent, flow.control_received, flow.bulk_sent, flow.bulk_received


async def every_call(a, b):
    """Each kind of call once, with what it answers."""
    call, to = a.transport, b.record
    await call.deliver(to, b"hello", deadline_s=5)
    answers = [
        await call.records(to, [b"one", b"two"], deadline_s=5),
        await call.genesis(to, deadline_s=5),
        await call.chain(to, 3, deadline_s=5),
        await call.snapshot(to, deadline_s=5),
        [item async for item in call.fetch(to, REF, (), idle_s=5)],
        [item async for item in call.fetch(to, REF, (2, 0), idle_s=5)],
    ]
    watch = call.watch(to)
    answers.append(await anext(watch))
    await watch.aclose()
    return answers, traffic_of(a), traffic_of(b), b.service.envelopes


def test_bytes_and_answers_are_those_of_the_real_transport():
    async def real():
        a = await End(0, GrpcTransport(RUN, listen="127.0.0.1:0")).start()
        b = await End(1, GrpcTransport(RUN, listen="127.0.0.1:0")).start()
        try:
            return await every_call(a, b)
        finally:
            await a.transport.stop()
            await b.transport.stop()

    assert Room().play(lambda room, a, b: every_call(a, b)) == asyncio.run(real())


def failure(error, **more):
    """What a call raises, and when."""

    async def main(room, a, b, prepare, deadline_s=5.0):
        prepare(room, a, b)
        began_s = room.loop.time()
        with pytest.raises(error) as caught:
            await a.transport.deliver(b.record, b"x", deadline_s=deadline_s)
        return room.loop.time() - began_s, str(caught.value)

    return lambda room, a, b: main(room, a, b, **more)


def test_nobody_listening_refuses_after_a_round_trip():
    took_s, why = Room().play(failure(ConnectionError, prepare=lambda room, a, b: room.channels.machines[1].silence()))
    assert took_s == pytest.approx(2 * FAR_S, abs=1e-7)
    assert "connection refused" in why


def test_an_address_without_a_machine_cannot_be_reached():
    async def main(room, a, b):
        nowhere = replace(b.record, addresses=(address_of(99),))
        with pytest.raises(ConnectionError, match="no such address"):
            await a.transport.deliver(nowhere, b"x", deadline_s=5)

    Room().play(main)


def test_a_partition_lets_no_connection_begin():
    took_s, why = Room().play(
        failure(ConnectionError, prepare=lambda room, a, b: room.fabric.cut(0, [0]), deadline_s=60.0)
    )
    assert took_s == pytest.approx(CONNECT_MS / 1e3)
    assert "no answer" in why


def test_a_deadline_is_a_timeout_at_exactly_that_time_and_stops_the_answer():
    async def main(room, a, b):
        b.service.answer = asyncio.Event().wait
        began_s = room.loop.time()
        with pytest.raises(TimeoutError):
            await a.transport.deliver(b.record, b"x", deadline_s=3.0)
        took_s = room.loop.time() - began_s
        assert b.service.running == 1
        await asyncio.sleep(small_s(HEAD_BYTES) + 1e-6)
        assert b.service.running == 0
        return took_s

    assert Room().play(main) == pytest.approx(3.0, abs=1e-8)


def test_a_short_partition_delays_a_call_and_a_long_one_breaks_it():
    async def main(room, a, b, cut_s):
        await a.transport.deliver(b.record, b"", deadline_s=5)
        room.fabric.cut(0, [0])
        room.loop.call_later(cut_s, room.fabric.heal, 0)
        began_s = room.loop.time()
        try:
            await a.transport.deliver(b.record, b"x", deadline_s=600)
        finally:
            main.took_s = room.loop.time() - began_s
        return b.service.envelopes

    assert Room().play(lambda *ends: main(*ends, 15.0)) == [b"", b"x"]
    answer = pb.Reply(accepted=True).SerializeToString()
    again_s = FAR_S + max(small_s(len(answer) + 14), small_s(HEAD_BYTES))
    assert main.took_s == pytest.approx(15.0 + again_s, abs=1e-6)
    with pytest.raises(ConnectionError, match="keepalive"):
        Room().play(lambda *ends: main(*ends, 300.0))
    assert KEEPALIVE_S / 2 <= main.took_s <= KEEPALIVE_S


def test_a_crash_of_the_callee_breaks_its_calls_and_a_restart_is_found_again():
    async def main(room, a, b):
        b.service.answer = asyncio.Event().wait
        call = asyncio.ensure_future(a.transport.deliver(b.record, b"x", deadline_s=60))
        await asyncio.sleep(5)
        room.channels.machines[1].die()
        with pytest.raises(ConnectionError, match="gone"):
            await call
        away_s = room.channels.fabric.topology.one_way_latency_s(1, 0)
        assert room.loop.time() == pytest.approx(5 + away_s), "a reset connection is heard of a latency later"
        with pytest.raises(ConnectionError):
            await a.transport.deliver(b.record, b"x", deadline_s=60)
        await b.transport.start(b.service)
        b.service.answer = Service().answer
        await a.transport.deliver(b.record, b"again", deadline_s=60)
        return b.service.envelopes, b.service.running

    assert Room().play(main) == ([b"x", b"again"], 0)


@pytest.mark.parametrize("reachable", [True, False])
def test_a_machine_without_power_calls_nobody_until_it_starts_again(reachable):
    """Behind NAT too: what nobody can call must itself be able to call after a restart."""

    async def main(room, a, b):
        await b.transport.deliver(a.record, b"before", deadline_s=5)
        room.channels.machines[1].die()
        with pytest.raises(ConnectionError):
            await b.transport.deliver(a.record, b"dead", deadline_s=5)
        await b.transport.start(b.service)
        await b.transport.deliver(a.record, b"after", deadline_s=5)
        return a.service.envelopes

    assert Room(reachable=reachable).play(main) == [b"before", b"after"]


def test_nobody_can_call_a_machine_behind_nat():
    async def main(room, a, b):
        assert b.record.addresses == ()
        with pytest.raises(ConnectionError, match="announces no address"):
            await a.transport.deliver(b.record, b"x", deadline_s=5)
        with pytest.raises(ConnectionError, match="refused"):
            await a.transport.deliver(replace(b.record, addresses=(address_of(1),)), b"x", deadline_s=5)
        return b.service.envelopes

    assert Room(reachable=False).play(main) == []


def test_a_refusal_carries_its_reason():
    async def refuse():
        raise PeerError("?", "stale round 7")

    async def main(room, a, b):
        b.service.answer = refuse
        with pytest.raises(PeerError, match="stale round 7"):
            await a.transport.deliver(b.record, b"x", deadline_s=5)

    Room().play(main)


class Dice:
    """A generator that says what it is told."""

    def __init__(self, *numbers):
        self._numbers = iter(numbers)

    def random(self):
        return next(self._numbers)


def test_a_lost_message_costs_its_caller_the_deadline_and_reaches_nobody():
    async def main(room, a, b):
        with pytest.raises(TimeoutError):
            await a.transport.deliver(b.record, b"lost", deadline_s=2)
        assert room.loop.time() == pytest.approx(2)
        await a.transport.deliver(b.record, b"kept", deadline_s=2)
        return b.service.envelopes

    assert Room(message_loss=0.3, rng=Dice(0.29, 0.31)).play(main) == [b"kept"]


@pytest.mark.parametrize("scale", [1.0, 2.5, 1000.0])
def test_a_chunk_counts_for_what_it_stands_for_and_nothing_else_does(scale):
    channels = Room(scale=scale).channels
    for data in (b"", b"x" * 999, bytes(PIECES[0])):
        chunk = pb.BlobChunk(index=3, data=data).SerializeToString()
        assert channels.charged_message("Fetch", chunk, 0, 1) == len(chunk) - len(data) + math.ceil(scale * len(data))
        assert channels.charged_message("Chain", chunk, 0, 1) == len(chunk)
        listed = pb.BlobChunk(index=0xFFFFFFFF, data=data).SerializeToString()
        assert channels.charged_message("Fetch", listed, 0, 1) == len(listed)
    more = sum(math.ceil(scale * size) - size for size in (999, len(PIECES[0])))
    assert (channels.machines[0].charged_sent, channels.machines[1].charged_received) == (more, more)


def test_a_reader_that_stops_stops_the_sender():
    async def main(room, a, b):
        async for _ in a.transport.fetch(b.record, REF, range(REF.chunks), idle_s=30):
            break
        await asyncio.sleep(5)
        assert not room.channels.machines[1].handled
        return b.transport.traffic.bulk_sent

    assert len(PIECES[0]) < Room().play(main) <= 6 * len(PIECES[0]) < len(BLOB)


def test_a_call_error_is_grpcs_own():
    """So that `Calls` tells it apart as it does in the real world."""

    async def main(room, a, b):
        link = await a.transport._links.to(b.record)
        channel = await link.channel("control", deadline_s=5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/farflung.Control/Nonsense", None, None)(b"", timeout=5)
        return caught.value.code()

    assert Room().play(main) is grpc.StatusCode.UNIMPLEMENTED
