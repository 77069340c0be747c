"""Finding each other: the book's laws, the rendezvous over a pretended network, and the real DHT on loopback."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.node.dht import HivemindDirectory, _Validator, host_maddrs
from farflung.node.directory import Combined, Rendezvous, first_answers, parse_door
from farflung.node.recordbook import AHEAD_MS_MAX, LEASE_MS_MAX, RECORDS_MAX, RecordBook, expires_ms
from farflung.protocol import limits
from farflung.protocol.errors import ConfigError, LocalError, PeerError, TooFewPeers
from farflung.protocol.identity import Identity, PeerId
from farflung.protocol.record import PeerRecord

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

RUN = bytes(range(32))
NOW = 1_800_000_000_000


class StoppedClock:
    def __init__(self, unix_ms: int = NOW) -> None:
        self.ms = unix_ms

    def now_s(self) -> float:
        return self.ms / 1000

    def unix_ms(self) -> int:
        return self.ms


def identity(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


def record(number: int, issued_ms: int = NOW, lease_ms: int = 60_000, run_id: bytes = RUN, **more) -> PeerRecord:
    who = identity(number)
    fields = {"addresses": (f"host{number}:1",), **more}
    return PeerRecord(
        run_id, who.public_key, certificate_der=b"", issued_ms=issued_ms, lease_ms=lease_ms, **fields
    ).signed(who)


# -- the book --------------------------------------------------------------------------------------------------------

RECORDS = [
    record(number, NOW + late, name=name).encode() for number in range(5) for late in (-9, 0) for name in ("a", "b")
]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(RECORDS), max_size=12), st.randoms())
def test_merging_is_idempotent_and_its_order_does_not_matter(records, chance):
    books = []
    for _ in range(2):
        book = RecordBook(RUN)
        book.merge(records, NOW)
        books.append(book.encoded(NOW))
        chance.shuffle(records)
        records = records + records[:3]
    assert books[0] == books[1]


def test_a_full_book_keeps_the_members_whatever_the_order(monkeypatch):
    monkeypatch.setattr("farflung.node.recordbook.RECORDS_MAX", 4)
    crowd = [record(number, NOW + number).encode() for number in range(9)]
    seen = set()
    for seed in range(10):
        random.Random(seed).shuffle(crowd)
        book = RecordBook(RUN)
        book.kept = {identity(0).peer_id}
        for data in crowd:
            book.add(data, NOW)
        seen.add(tuple(book.live(NOW)))
    assert len(seen) == 1
    assert {one.peer_id for one in seen.pop()} == {identity(number).peer_id for number in (0, 6, 7, 8)}


def test_the_later_record_wins_and_ends_with_its_lease():
    book = RecordBook(RUN)
    for issued_ms in (NOW, NOW + 5, NOW - 5):
        book.add(record(1, issued_ms).encode(), NOW)
    assert [one.issued_ms for one in book.live(NOW)] == [NOW + 5]
    assert book.live(NOW + 60_004) != []
    assert book.live(NOW + 60_005) == []


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"{}",
        b"x" * (limits.RECORD_BYTES_MAX + 1),
        record(1, NOW - 60_000).encode(),
        record(1, NOW + AHEAD_MS_MAX + 1).encode(),
        record(1, NOW - LEASE_MS_MAX, lease_ms=1 << 60).encode(),
        record(1, run_id=bytes(32)).encode(),
        replace(record(1), name="forged").encode(),
        replace(record(1), public_key=identity(2).public_key).encode(),
    ],
)
def test_what_is_forged_expired_foreign_or_too_large_is_dropped(bad):
    book = RecordBook(RUN)
    with pytest.raises(PeerError):
        book.add(bad, NOW)
    assert book.merge([bad, RECORDS[0]], NOW) == book.live(NOW) != []


def test_answers_are_bounded_and_begin_with_our_own(monkeypatch):
    book = RecordBook(RUN)
    long = "x" * 250
    for number in range(40):
        book.add(record(number, addresses=(long,) * 8).encode(), NOW)
    own = identity(7).peer_id
    answer = book.encoded(NOW, first=own)
    assert book.add(answer[0], NOW).peer_id == own
    assert len(answer) == 40
    monkeypatch.setattr("farflung.node.recordbook.ANSWER_BYTES_MAX", 10_000)
    assert sum(map(len, book.encoded(NOW))) <= 10_000
    assert len(list(book.merge(iter([RECORDS[0]] * (RECORDS_MAX + 9)), NOW))) == RECORDS_MAX


# -- rendezvous over a pretended network -----------------------------------------------------------------------------


class Net:
    """Hosts by address; a dead one refuses, a silent one never answers."""

    def __init__(self) -> None:
        self.nodes: dict[str, Rendezvous] = {}
        self.silent: set[str] = set()
        self.calls = 0

    async def introduce(self, address, run_id, *, deadline_s):
        return await self.answer(address, run_id, [], deadline_s)

    async def records(self, to, records, *, deadline_s):
        return await self.answer(to.addresses[0], to.run_id, records, deadline_s)

    async def answer(self, address, run_id, records, deadline_s):
        self.calls += 1
        await asyncio.sleep(0)
        if address in self.silent:
            await asyncio.sleep(1000)
        if address not in self.nodes:
            raise ConnectionRefusedError("connection refused")
        return list(await self.nodes[address].on_records(run_id, records))


def member(net: Net, number: int, clock: StoppedClock | None = None, **more) -> Rendezvous:
    address = f"host{number}:1"
    clock = clock or StoppedClock()
    node = Rendezvous(
        net, RecordBook(RUN), identity(number).peer_id,
        clock=clock, rng=random.Random(number), addresses=[address], **more,
    )  # fmt: skip
    node.book.add(record(number, clock.ms).encode(), clock.ms)
    net.nodes[address] = node
    return node


def ids(records: list[PeerRecord]) -> set[PeerId]:
    return {one.peer_id for one in records}


def test_everybody_finds_everybody_through_one_door():
    async def main():
        net = Net()
        nodes = [member(net, 0)]
        assert await nodes[0].start() == (f"{identity(0).peer_id}@host0:1",)
        await nodes[0].publish(record(0), deadline_s=1)  # nobody there yet, and that is fine
        for number in range(1, 20):
            nodes.append(member(net, number, bootstrap=["host0:1"]))
            invite = await nodes[-1].start()
            assert invite == (f"{identity(number).peer_id}@host{number}:1", f"{identity(0).peer_id}@host0:1")
            await nodes[-1].publish(record(number), deadline_s=1)
        del net.nodes["host0:1"]  # the door may close once they know each other
        everybody = {identity(number).peer_id for number in range(20)}
        for _ in range(2):
            for node in nodes[1:]:
                await node.lookup(deadline_s=1)
        for node in nodes[1:]:
            assert ids(await node.lookup(deadline_s=1)) == everybody

    asyncio.run(main())


def test_dead_doors_are_named_and_what_to_do_is_said():
    async def main():
        net = Net()
        net.silent = {"host9:1"}
        node = member(net, 1, bootstrap=["host8:1", "host9:1"], start_s=0.2)
        with pytest.raises(ConfigError, match="new invite") as caught:
            await node.start()
        assert "host8:1: connection refused" in str(caught.value)
        assert "host9:1: no answer in time" in str(caught.value)
        with pytest.raises(TooFewPeers):
            await node.publish(record(1), deadline_s=0.2)
        assert ids(await node.lookup(deadline_s=0.2)) == {identity(1).peer_id}

    asyncio.run(main())


def test_one_silent_door_among_good_ones_delays_little():
    async def main():
        net = Net()
        net.silent = {"host9:1"}
        member(net, 2)
        start = time.monotonic()
        await member(net, 1, bootstrap=["host9:1", "host2:1"]).start()
        assert time.monotonic() - start < 2

    asyncio.run(main())


def test_another_peer_behind_the_address_is_not_accepted():
    async def main():
        net = Net()
        member(net, 2)
        with pytest.raises(ConfigError, match="another peer"):
            await member(net, 1, bootstrap=[f"{identity(3).peer_id}@host2:1"], start_s=0.5).start()
        await member(net, 1, bootstrap=[f"{identity(2).peer_id}@host2:1"]).start()

    asyncio.run(main())


def test_after_a_restart_of_everybody_saved_addresses_are_enough():
    async def main():
        net = Net()
        later = StoppedClock(NOW + 3 * LEASE_MS_MAX)  # every lease is long over
        saved = [record(number).encode() for number in range(5)] + [b"damaged"]
        first = member(net, 1, later, bootstrap=["gone:1"], saved=saved, alone_ok=True, start_s=0.2)
        await first.start()  # the first to come back finds nobody, and waits
        second = member(net, 2, later, bootstrap=["gone:1"], saved=saved)
        await second.start()
        await second.publish(record(2, later.ms), deadline_s=1)
        both = {identity(1).peer_id, identity(2).peer_id}
        assert ids(await first.lookup(deadline_s=1)) == ids(await second.lookup(deadline_s=1)) == both

    asyncio.run(main())


def test_an_invite_that_names_only_ourselves_makes_the_first_member():
    async def main():
        own = identity(1).peer_id
        await member(Net(), 1, bootstrap=["host1:1", f"{own}@host1:1", f"{own}@old:1"]).start()

    asyncio.run(main())


def test_a_liar_cannot_plant_records_and_other_runs_are_refused():
    async def main():
        node = member(Net(), 1)
        forged = replace(record(2), addresses=("evil:1",)).encode()
        answer = await node.on_records(RUN, [forged, b"\xff", record(3).encode()])
        assert ids([node.book.add(data, NOW) for data in answer]) == {identity(1).peer_id, identity(3).peer_id}
        with pytest.raises(PeerError):
            await node.on_records(bytes(32), [])
        with pytest.raises(LocalError):
            await node.publish(record(1, addresses=("x" * 2000,) * 8), deadline_s=1)

    asyncio.run(main())


def test_calls_end_by_their_deadline_and_bugs_are_not_hidden():
    async def main():
        async def bug():
            raise ZeroDivisionError

        answers, failures = await first_answers({"slow": asyncio.sleep(9)}, deadline_s=0.05, grace_s=1)
        assert (answers, failures) == ({}, {"slow": "no answer in time"})
        with pytest.raises(ZeroDivisionError):
            await first_answers({"bug": bug()}, deadline_s=1, grace_s=1)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


@pytest.mark.parametrize("text", ["", "host", "host:", "host:0", "host:70000", "x@host:1", ":1", "host:http"])
def test_an_odd_address_is_refused(text):
    with pytest.raises(ConfigError):
        parse_door(text)


def test_two_directories_find_more_than_one_and_one_is_enough():
    async def main():
        net, other = Net(), Net()
        member(net, 2)
        member(other, 3)
        parts = [member(net, 1, bootstrap=["host2:1"]), member(other, 1, bootstrap=["host3:1"])]
        broken = member(Net(), 1, bootstrap=["gone:1"], start_s=0.1)
        both = Combined([broken, *parts], RecordBook(RUN), StoppedClock())
        assert len(await both.start()) == 4
        await both.publish(record(1), deadline_s=1)
        assert ids(await both.lookup(deadline_s=1)) == {identity(number).peer_id for number in (1, 2, 3)}
        await both.stop()
        with pytest.raises(ConfigError, match="gone:1"):
            await Combined([broken], RecordBook(RUN), StoppedClock()).start()

    asyncio.run(main())


# -- the DHT ---------------------------------------------------------------------------------------------------------


class Wall(StoppedClock):
    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000


def daemons(parent: int | None = None) -> list[psutil.Process]:
    return [one for one in psutil.Process(parent).children(recursive=True) if "p2pd" in " ".join(one.cmdline())]


def dht(**more) -> HivemindDirectory:
    return HivemindDirectory(RecordBook(RUN), Wall(), listen=host_maddrs("127.0.0.1"), **more)


def test_dht_nodes_find_each_other_survive_a_daemon_and_leave_no_child(tmp_path):
    async def main():
        first = dht(identity=tmp_path / "p2p.key")
        addresses = await first.start()
        second = dht(bootstrap=addresses)
        await second.start()
        now_ms = Wall().unix_ms()
        await first.publish(record(1, now_ms), deadline_s=10)
        for _ in range(2):
            await second.publish(record(2, now_ms), deadline_s=10)
        both = {identity(1).peer_id, identity(2).peer_id}
        assert ids(await first.lookup(deadline_s=10)) == ids(await second.lookup(deadline_s=10)) == both
        third = dht(bootstrap=addresses)
        assert ids(await third.lookup(deadline_s=20)) == both  # starts by itself when it is needed
        second._daemon._process.kill()
        await second._daemon._process.wait()
        assert ids(await second.lookup(deadline_s=20)) == both
        assert len(daemons()) == 3
        for node in (first, second, third, third):
            await node.stop()
        assert daemons() == []
        with pytest.raises(ConfigError, match=r"Bootstrap addresses tried: /ip4/127.0.0.1"):
            await dht(bootstrap=addresses, start_s=10).start()
        assert daemons() == []

    asyncio.run(main())


def test_a_dht_start_cancelled_at_any_moment_leaves_no_child():
    async def main():
        for delay_s in (0, 0.001, 0.003, 0.01, 0.05, 0.1, 0.15, 0.2):
            node = dht()
            task = asyncio.create_task(node.start())
            await asyncio.sleep(delay_s)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if not task.cancelled():  # it was faster
                await node.stop()
            assert daemons() == []

    asyncio.run(main())


def test_a_dht_node_refuses_entries_their_owner_did_not_sign():
    from hivemind.dht.validation import DHTRecord
    from hivemind.utils.serializer import MSGPackSerializer

    pack = MSGPackSerializer.dumps
    good = record(1)
    entry = DHTRecord(b"key", pack(str(good.peer_id)), pack(good.encode()), expires_ms(good) / 1000)
    judge = _Validator(b"key")
    assert judge.validate(entry)
    for change in (
        {"key": b"other"},
        {"subkey": pack(str(identity(2).peer_id))},
        {"subkey": b"\xc1"},
        {"value": pack(replace(good, name="forged").encode())},
        {"value": pack(7)},
        {"expiration_time": entry.expiration_time + 10},
    ):
        assert not judge.validate(replace(entry, **change))


CHILD = """
    import asyncio, sys, threading
    sys.path.insert(0, {here!r})
    from farflung.node.dht import HivemindDirectory, host_maddrs
    from farflung.node.recordbook import RecordBook
    from farflung.node.runtime import SystemClock

    async def main():
        directory = HivemindDirectory(RecordBook(bytes(32)), SystemClock(), listen=host_maddrs("127.0.0.1"))
        await directory.start()
        print("started", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await directory.stop()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    thread.join()
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, None])
def test_however_a_process_ends_no_daemon_is_left(how):
    code = textwrap.dedent(CHILD).format(here=os.getcwd())
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "started\n", child.stderr.read()
    running = daemons(child.pid)
    assert len(running) == 1
    if how is not None:
        child.send_signal(how)
    _, said = child.communicate("leave\n" if how is None else None, timeout=20)
    gone, left = psutil.wait_procs(running, timeout=5)
    assert (len(gone), left) == (1, [])
    assert "Traceback" not in said
    assert "Task was destroyed" not in said


@pytest.mark.parametrize("host", ["example.org", "1.2.3", "*"])
def test_only_an_ip_address_can_be_listened_on(host):
    assert host_maddrs("::1", 5) == ("/ip6/::1/tcp/5",)
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0"):
        host_maddrs(host)
