"""gRPC between nodes on loopback: pinned, bounded, back after a restart, and bulk never starves control."""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import time

import pytest
from loopback import QUICK, RUN, Echo, Node

from farflung.node.blobs import MemoryBlob, read_all
from farflung.node.runtime import DIGEST_LIST, Holding, SystemClock
from farflung.node.transport.addresses import announced, join_address, split_address, split_named
from farflung.node.transport.flow import UploadCap
from farflung.node.transport.grpc import GrpcTransport
from farflung.node.transport.server import encode_chunk
from farflung.node.transport.tls import fetch_certificate, make_tls
from farflung.protocol import limits
from farflung.protocol import messages_pb2 as pb
from farflung.protocol.blob import BlobRef
from farflung.protocol.errors import ConfigError, PeerError
from farflung.protocol.identity import PeerId
from farflung.protocol.record import PeerRecord


@pytest.mark.parametrize("tls", ["new", None])
def test_every_call_arrives_and_is_answered(tls):
    async def main():
        async with Node(1, tls=tls) as a, Node(2, tls=tls) as b:
            call, to = a.transport, b.record
            await call.deliver(to, b"hello", deadline_s=QUICK)
            assert b.service.envelopes == [b"hello"]
            assert await call.records(to, [b"mine"], deadline_s=QUICK) == [b.record.encode(), b"mine"]
            assert await call.genesis(to, deadline_s=QUICK) == b"genesis"
            assert await call.chain(to, 3, deadline_s=QUICK) == ([b"certificate"] * limits.CHAIN_ANSWER_MAX, 43)
            assert await call.snapshot(to, deadline_s=QUICK) == (7, BlobRef(b"d" * 32, 100, 1 << 14))
            watch = call.watch(to)
            assert await anext(watch) == [Holding(b"d" * 32, False, (1, 2, 300)), Holding(b"e" * 32, True, ())]
            await watch.aclose()
            await asyncio.wait_for(b.service.closed.wait(), QUICK)
            assert call.bytes_sent == b.transport.bytes_received > 0
            assert call.bytes_received == b.transport.bytes_sent == call.traffic.control_received
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_another_certificate_than_the_records_is_refused():
    async def main():
        async with Node(1) as a, Node(2) as b:
            forged = b.make_record(certificate_der=make_tls().certificate_der)
            with pytest.raises(ConnectionError):
                await a.transport.deliver(forged, b"secret", deadline_s=QUICK)
            with pytest.raises(PeerError, match="without TLS"):
                await a.transport.deliver(b.make_record(issued_ms=2, certificate_der=b""), b"secret", deadline_s=QUICK)
            assert b.service.envelopes == []

    asyncio.run(main())


def test_a_refusal_carries_its_reason_and_a_bug_only_says_so(caplog):
    async def refuse():
        raise PeerError("?", "stale round 7")

    async def bug():
        raise KeyError("our secret")

    async def main():
        async with Node(1) as a, Node(2) as b:
            b.service.answer = refuse
            with pytest.raises(PeerError, match=f"peer {b.record.peer_id.short}: stale round 7"):
                await a.transport.deliver(b.record, b"x", deadline_s=QUICK)
            b.service.answer = bug
            for _ in range(3):
                with pytest.raises(PeerError, match="bug"):
                    await a.transport.deliver(b.record, b"x", deadline_s=QUICK)

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert len(caplog.records) == 1
    assert "our secret" in caplog.text


def test_a_slow_answer_a_dead_peer_and_no_address_are_told_apart():
    async def sleep():
        await asyncio.Event().wait()

    async def main():
        async with Node(1) as a:
            async with Node(2) as b:
                b.service.answer = sleep
                with pytest.raises(TimeoutError):
                    await a.transport.deliver(b.record, b"x", deadline_s=0.3)
            with pytest.raises((ConnectionError, TimeoutError)):
                await a.transport.deliver(b.record, b"x", deadline_s=1.0)
            with pytest.raises(ConnectionError, match="no address"):
                await a.transport.deliver(PeerRecord(RUN, b"3" * 32, (), b"", 1, 1), b"x", deadline_s=1.0)

    asyncio.run(main())


@pytest.mark.parametrize("same_certificate", [True, False])
def test_a_peer_that_restarts_on_its_port_is_found_again_soon(same_certificate):
    tls = make_tls()

    async def main():
        async with Node(1) as a:
            async with Node(2, tls=tls) as b:
                await a.transport.deliver(b.record, b"x", deadline_s=QUICK)
                watch = a.transport.watch(b.record)
                await anext(watch)
                listen = b.addresses[0]
            with pytest.raises(ConnectionError):
                await anext(watch)
            async with Node(2, listen=listen, tls=tls if same_certificate else "new") as b:
                record = b.make_record(issued_ms=2)
                started_s = time.monotonic()
                while True:
                    try:
                        await a.transport.deliver(record, b"again", deadline_s=1.0)
                        break
                    except (ConnectionError, TimeoutError):
                        assert time.monotonic() < started_s + 10
                        await asyncio.sleep(0.05)
                assert b"again" in b.service.envelopes

    asyncio.run(main())


def test_of_several_addresses_the_one_that_works_is_found():
    async def main():
        async with Node(1) as a, Node(2) as b:
            with socket.socket() as closed:
                closed.bind(("127.0.0.1", 0))
                dead = f"127.0.0.1:{closed.getsockname()[1]}"
                record = b.make_record(addresses=(dead, b.addresses[0]))
                await a.transport.deliver(record, b"x", deadline_s=4.0)
                await a.transport.deliver(record, b"y", deadline_s=1.0)
                nowhere = b.make_record(issued_ms=2, addresses=(dead, dead))
                with pytest.raises(ConnectionError, match="none of"):
                    await a.transport.deliver(nowhere, b"z", deadline_s=1.0)
            assert b.service.envelopes == [b"x", b"y"]

    asyncio.run(main())


def test_too_big_messages_are_refused_on_both_sides(monkeypatch):
    async def main():
        async with Node(1) as a, Node(2) as b:
            big = bytes(limits.CONTROL_BYTES_MAX + 1)
            with pytest.raises(PeerError, match="more than any peer accepts"):
                await a.transport.deliver(b.record, big, deadline_s=QUICK)
            monkeypatch.setattr(limits, "CONTROL_BYTES_MAX", 1 << 30)
            with pytest.raises(PeerError, match="larger than max"):
                await a.transport.deliver(b.record, big, deadline_s=QUICK)
            assert b.service.envelopes == []
            await a.transport.deliver(b.record, b"small", deadline_s=QUICK)

    asyncio.run(main())


def test_another_run_and_nonsense_are_refused():
    async def main():
        async with Node(1) as a, Node(2) as b:
            a.transport._run_id = b"another" * 4
            with pytest.raises(PeerError, match="another run"):
                await a.transport.genesis(b.record, deadline_s=QUICK)
            with pytest.raises(PeerError, match="no RecordsRequest"):
                await a.transport._call(b.record, "Records", b"\xff\xff\xff", pb.RecordsReply, QUICK)

    asyncio.run(main())


def test_garbage_and_half_open_connections_disturb_nobody():
    async def main():
        async with contextlib.AsyncExitStack() as stack:
            a, b = [await stack.enter_async_context(Node(seed)) for seed in (1, 2)]
            for index in range(60):
                stranger = stack.enter_context(socket.create_connection(("127.0.0.1", b.port)))
                if index % 2:
                    stranger.sendall(os.urandom(5000) if index % 3 else b"GET / HTTP/1.1\r\n\r\n")
            started_s = time.monotonic()
            for index in range(20):
                await a.transport.deliver(b.record, bytes([index]), deadline_s=QUICK)
            assert len(b.service.envelopes) == 20
            assert time.monotonic() < started_s + QUICK

    asyncio.run(main())


def test_a_taken_port_and_a_bad_address_say_what_to_change():
    async def main():
        async with Node(1) as a:
            with pytest.raises(ConfigError, match="--listen"):
                await GrpcTransport(RUN, listen=a.addresses[0]).start(Echo())
        with pytest.raises(ConfigError, match="host:port"):
            GrpcTransport(RUN, listen="4400")

    asyncio.run(main())


def test_introductions_are_believed_only_from_the_certificates_owner():
    async def main():
        async with Node(1) as a, Node(2) as b, Node(3) as c:
            plain = b.addresses[0]
            for address in (plain, f"{b.record.peer_id}@{plain}"):
                records = await a.transport.introduce(address, RUN, deadline_s=QUICK)
                assert records == [b.record.encode()]
            with pytest.raises(PeerError, match="instead of"):
                await a.transport.introduce(f"{c.record.peer_id}@{plain}", RUN, deadline_s=QUICK)
            b.service.known = [c.record.encode()]  # somebody else's record, rightly signed
            with pytest.raises(PeerError, match="vouch"):
                await a.transport.introduce(plain, RUN, deadline_s=QUICK)
            b.service.known = []
            with pytest.raises(PeerError, match="without a record"):
                await a.transport.introduce(plain, RUN, deadline_s=QUICK)
            with pytest.raises(PeerError):
                await a.transport.introduce(plain, b"other" * 6, deadline_s=QUICK)

    asyncio.run(main())


def test_an_address_that_is_silent_or_speaks_no_tls_is_given_up():
    async def main():
        async with Node(1) as a, Node(2, tls=None) as plain:
            with pytest.raises((PeerError, ConnectionError, TimeoutError)):
                await a.transport.introduce(plain.addresses[0], RUN, deadline_s=2.0)
            silent = socket.create_server(("127.0.0.1", 0))
            port = silent.getsockname()[1]
            with silent, pytest.raises(TimeoutError):
                await a.transport.introduce(f"127.0.0.1:{port}", RUN, deadline_s=0.3)
            with pytest.raises(ConnectionError):
                await fetch_certificate("127.0.0.1", port, deadline_s=1.0)

    asyncio.run(main())


def test_a_blob_crosses_and_a_wrong_chunk_is_noticed_by_size_and_order():
    async def main():
        async with Node(1) as a, Node(2) as b:
            blob = MemoryBlob.of(os.urandom(3_000_000))
            b.exchange.offer(blob)
            got = await a.exchange.fetch(blob.ref, b.record.peer_id, lambda: [b.record], deadline_s=20)
            assert read_all(got) == read_all(blob)
            listed = [item async for item in a.transport.fetch(b.record, blob.ref, (), idle_s=QUICK)]
            assert listed == [(DIGEST_LIST, b"".join(blob.digests))]
            longer = BlobRef(blob.ref.digest, blob.ref.size + 1, blob.ref.chunk_bytes)
            with pytest.raises(PeerError, match="instead of"):
                async for _ in a.transport.fetch(b.record, longer, (blob.ref.chunks - 1,), idle_s=QUICK):
                    pass
            with pytest.raises(PeerError, match="not here"):
                await anext(a.transport.fetch(b.record, BlobRef(b"n" * 32, 10, 1 << 14), (0,), idle_s=QUICK))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_stream_that_brings_nothing_times_out():
    async def main():
        async with Node(1) as a, Node(2) as b:

            async def stuck(run_id, digest, chunks):
                await asyncio.Event().wait()
                yield 0, b""

            b.service.on_fetch = stuck
            with pytest.raises(TimeoutError):
                await anext(a.transport.fetch(b.record, BlobRef(b"n" * 32, 10, 1 << 14), (0,), idle_s=0.2))

    asyncio.run(main())


def test_the_upload_cap_is_kept_and_shared_fairly():
    cap, chunk = 4e6, 1 << 16

    async def main():
        async with Node(1, upload_bytes_per_s=cap) as origin, Node(2) as a, Node(3) as b:
            blob = MemoryBlob.of(os.urandom(48 * chunk), chunk)
            origin.exchange.offer(blob)
            got, arrivals = {2: 0, 3: 0}, []

            async def pull(node, seed):
                async for _, data in node.transport.fetch(origin.record, blob.ref, range(48), idle_s=QUICK):
                    got[seed] += len(data)
                    arrivals.append((time.monotonic(), len(data)))

            await asyncio.gather(pull(a, 2), pull(b, 3))
            rate = sum(size for _, size in arrivals[1:]) / (arrivals[-1][0] - arrivals[0][0])
            assert 0.9 * cap < rate < 1.1 * cap
            assert got[2] == got[3] == 48 * chunk

    asyncio.run(main())


def test_a_reader_that_gives_up_waiting_pays_nothing():
    async def main():
        cap = UploadCap(1e6, SystemClock())
        first = asyncio.create_task(cap.pay(1_000_000))
        await asyncio.sleep(0)
        second = asyncio.create_task(cap.pay(50_000))
        first.cancel()
        started_s = time.monotonic()
        await second
        assert time.monotonic() < started_s + 0.5

    asyncio.run(main())


def test_heartbeats_pass_while_bulk_fills_the_link():
    async def main():
        async with Node(1) as a, Node(2) as b:
            blob = MemoryBlob.of(os.urandom(32 << 20))
            b.exchange.offer(blob)
            running = True

            async def pull():
                while running:
                    async for _ in a.transport.fetch(b.record, blob.ref, range(blob.ref.chunks), idle_s=20.0):
                        pass

            pulls = [asyncio.create_task(pull()) for _ in range(2)]
            while a.transport.traffic.bulk_received < blob.ref.size:
                await asyncio.sleep(0.01)
            waits_s = []
            for _ in range(20):
                started_s = time.monotonic()
                await a.transport.deliver(b.record, b"alive", deadline_s=QUICK)
                waits_s.append(time.monotonic() - started_s)
            running = False
            await asyncio.gather(*pulls)
            assert sorted(waits_s)[10] < 0.25  # both ends share this process and its loop with the bulk

    asyncio.run(main())


@pytest.mark.parametrize("index", [0, 1, 127, 128, 300, DIGEST_LIST])
def test_chunks_are_encoded_as_protobuf_would(index):
    for data in (b"", b"x", bytes(127), bytes(128), os.urandom(70_000)):
        assert encode_chunk(index, data) == pb.BlobChunk(index=index, data=data).SerializeToString()


def test_a_certificate_is_small_and_wide():
    tls = make_tls()
    assert len(tls.certificate_der) < 600
    assert ssl.PEM_cert_to_DER_cert(tls.certificate_pem.decode()) == tls.certificate_der


def test_addresses_are_split_joined_and_refused():
    assert split_address("example.org:4400") == ("example.org", 4400)
    assert split_address("[::1]:80") == ("::1", 80)
    assert join_address("::1", 80) == "[::1]:80"
    peer = PeerId.of(b"x")
    assert split_named(f"{peer}@[::1]:80") == (peer, "[::1]:80")
    assert split_named("host:1") == (None, "host:1")
    for wrong in ("host", "host:", "host:x", "host:99999", "::1:80", "", "a@b"):
        with pytest.raises(PeerError):
            split_named(wrong)
    assert announced("0.0.0.0", 7, ("my.org", "other:9", "2001:db8::1")) == ("my.org:7", "other:9", "[2001:db8::1]:7")
    assert all(item.endswith(":7") for item in announced("0.0.0.0", 7, ()))
    assert announced("10.0.0.1", 7, ()) == ("10.0.0.1:7",)
