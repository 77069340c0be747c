"""A blob arrives exactly, from whoever holds it, and its origin uploads it about once."""

import asyncio
import random

import pytest
from slow_network import NEVER, SlowNetwork, run_virtual

from farflung.node.blob_sources import MemoryBlob, MemoryPartial, read_all
from farflung.node.blob_state import bits, mask_of
from farflung.node.stripes import relay_weights, stripe_owners
from farflung.protocol.blob import choose_chunk_bytes
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.identity import PeerId

SIZE = 1_000_000


def a_blob(seed: int = 0, size: int = SIZE) -> MemoryBlob:
    return MemoryBlob.of(random.Random(seed).randbytes(size))


def peers(count: int) -> list[PeerId]:
    return sorted(PeerId.of(bytes([index])) for index in range(count))


async def settle() -> None:
    await asyncio.sleep(5.0)


def only_this_task_runs() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("size", [1, 1 << 14, (1 << 14) + 1, SIZE])
def test_bytes_arrive_exactly_from_several_holders(size):
    async def main():
        net, blob = SlowNetwork([1e6] * 4), a_blob(size=size)
        for node in net.all[:3]:
            node.exchange.offer(blob)
        got = await net.fetch(net.all[3], blob.ref, None)
        assert read_all(got) == read_all(blob)
        if blob.ref.chunks > 10:
            assert all(node.sent[blob.ref.digest] > size / 6 for node in net.all[:3])
        await net.stop()
        assert only_this_task_runs()

    run_virtual(main())


@pytest.mark.parametrize("members", [4, 8])
def test_a_slow_origin_uploads_its_payload_about_once(members):
    async def main():
        net, blob = SlowNetwork([1e5] + [2e6] * (members - 1)), a_blob()
        origin, others = net.all[0], net.all[1:]
        origin.exchange.offer(blob)
        got = await asyncio.gather(*(net.fetch(node, blob.ref, origin) for node in others))
        took_s = asyncio.get_running_loop().time()
        assert all(read_all(item) == read_all(blob) for item in got)
        assert origin.sent[blob.ref.digest] <= 1.15 * SIZE
        assert took_s <= 1.15 * SIZE / 1e5
        await net.stop()

    run_virtual(main())


@pytest.mark.parametrize("slow", [False, True])
def test_an_all_gather_fills_the_links_that_limit_it(slow):
    n, size = 4, 2_000_000
    rates = [1e6] * n if not slow else [1e5] + [1e6] * (n - 1)

    async def main():
        net = SlowNetwork(rates)
        blobs = [a_blob(seed, size) for seed in range(n)]
        for node, blob in zip(net.all, blobs, strict=True):
            node.exchange.offer(blob)
        pairs = [(node, origin, blob) for node in net.all for origin, blob in zip(net.all, blobs, strict=True)]
        await asyncio.gather(*(net.fetch(node, blob.ref, origin) for node, origin, blob in pairs))
        ideal_s = max(size / min(rates), n * (n - 1) * size / sum(rates))
        assert asyncio.get_running_loop().time() <= ideal_s / 0.95
        sent = sum(sum(node.sent.values()) for node in net.all)
        assert sent <= 1.02 * n * (n - 1) * size
        await net.stop()

    run_virtual(main())


def test_chunks_are_relayed_while_the_blob_still_arrives():
    async def main():
        net, blob = SlowNetwork([1e5, 1e6, 1e6]), a_blob()
        origin, relay, last = net.all
        origin.exchange.offer(blob)
        first = asyncio.create_task(net.fetch(relay, blob.ref, None))
        await asyncio.sleep(3.0)
        origin.crash()
        await asyncio.sleep(0.5)
        second = asyncio.create_task(net.fetch(last, blob.ref, origin))
        await asyncio.sleep(2.0)
        assert relay.sent[blob.ref.digest] > 0
        assert not first.done()
        origin.up = True
        for got in await asyncio.gather(first, second):
            assert read_all(got) == read_all(blob)
        await net.stop()

    run_virtual(main())


def test_after_a_lost_connection_nothing_is_downloaded_twice():
    async def main():
        net, blob = SlowNetwork([1e5, 1e6]), a_blob()
        origin, node = net.all
        origin.exchange.offer(blob)
        fetch = asyncio.create_task(net.fetch(node, blob.ref, origin))
        for _ in range(3):
            await asyncio.sleep(2.0)
            origin.crash()
            await asyncio.sleep(1.0)
            origin.up = True
        assert read_all(await fetch) == read_all(blob)
        assert origin.sent[blob.ref.digest] <= SIZE + 3 * 3 * blob.ref.chunk_bytes
        await net.stop()

    run_virtual(main())


def test_a_cancelled_fetch_leaves_no_task_and_the_next_one_resumes():
    async def main():
        net, blob = SlowNetwork([1e5, 1e6]), a_blob()
        origin, node = net.all
        origin.exchange.offer(blob)
        with pytest.raises(TimeoutError):
            await net.fetch(node, blob.ref, origin, deadline_s=5.0)
        sent = origin.sent[blob.ref.digest]
        assert sent > SIZE / 3
        await node.exchange.stop()
        assert only_this_task_runs()

        net = SlowNetwork([1e5, 1e6])
        net.all[0].exchange.offer(blob)
        again = net.all[1]
        again.exchange._sink = node.sink.partial  # what the first attempt left behind
        await net.fetch(again, blob.ref, net.all[0])
        assert net.all[0].sent[blob.ref.digest] <= SIZE - sent + 4 * blob.ref.chunk_bytes
        await net.stop()
        assert only_this_task_runs()

    run_virtual(main())


def test_a_liar_is_named_and_not_asked_again(caplog):
    async def main():
        net, blob = SlowNetwork([1e6] * 4), a_blob()
        liar, node = net.all[0], net.all[3]
        liar.lies = True
        for holder in net.all[:3]:
            holder.exchange.offer(blob)
        got = await net.fetch(node, blob.ref, liar)
        assert read_all(got) == read_all(blob)
        assert sum(bool(chunks) for _, _, chunks in liar.asked) <= 2  # those in flight when it was found out
        assert f"peer {liar.id.short}: sent wrong bytes" in caplog.text
        await net.stop()

    run_virtual(main())


def test_a_silent_peer_costs_patience_but_not_the_download():
    async def main():
        net, blob = SlowNetwork([1e6] * 4), a_blob()
        for holder in net.all[:3]:
            holder.exchange.offer(blob)
        net.all[1].silent = True
        got = await net.fetch(net.all[3], blob.ref, net.all[0])
        assert read_all(got) == read_all(blob)
        assert asyncio.get_running_loop().time() < 15
        await net.stop()

    run_virtual(main())


def test_the_stripe_of_a_dead_member_is_fetched_by_others():
    async def main():
        net, blob = SlowNetwork([1e5] + [1e6] * 3), a_blob()
        origin, dead = net.all[0], net.all[2]
        origin.exchange.offer(blob)
        dead.crash()
        living = [net.all[1], net.all[3]]
        got = await asyncio.gather(*(net.fetch(node, blob.ref, origin) for node in living))
        assert all(read_all(item) == read_all(blob) for item in got)
        assert origin.sent[blob.ref.digest] <= 1.15 * SIZE
        await net.stop()

    run_virtual(main())


def test_a_member_that_stops_fetching_is_stepped_in_for():
    async def main():
        net, blob = SlowNetwork([1e5] + [1e6] * 3), a_blob()
        origin, idle = net.all[0], net.all[2]  # idle is up and watched, and never fetches
        origin.exchange.offer(blob)
        got = await asyncio.gather(*(net.fetch(node, blob.ref, origin) for node in net.all[1:] if node is not idle))
        assert all(read_all(item) == read_all(blob) for item in got)
        assert origin.sent[blob.ref.digest] <= 1.5 * SIZE
        await net.stop()

    run_virtual(main())


def test_a_fetch_waits_for_a_blob_that_nobody_has_yet():
    async def main():
        net, blob = SlowNetwork([1e6] * 2), a_blob()
        fetch = asyncio.create_task(net.fetch(net.all[1], blob.ref, net.all[0]))
        await asyncio.sleep(10.0)
        net.all[0].exchange.offer(blob)
        assert read_all(await fetch) == read_all(blob)
        assert asyncio.get_running_loop().time() < 13
        await net.stop()

    run_virtual(main())


def test_two_callers_share_one_download_and_one_may_give_up():
    async def main():
        net, blob = SlowNetwork([1e6] * 2), a_blob()
        net.all[0].exchange.offer(blob)
        one, two = (asyncio.create_task(net.fetch(net.all[1], blob.ref, net.all[0])) for _ in range(2))
        await asyncio.sleep(0.5)
        one.cancel()
        assert read_all(await two) == read_all(blob)
        assert net.all[0].sent[blob.ref.digest] <= SIZE + 100 * blob.ref.chunks
        await net.stop()

    run_virtual(main())


def test_a_full_disk_ends_the_fetch_with_its_own_error():
    class FullDisk(MemoryPartial):
        def write_chunk(self, index, data):
            raise OSError(28, "disk full")

    async def main():
        net, blob = SlowNetwork([1e6] * 2), a_blob()
        net.all[0].exchange.offer(blob)
        net.all[1].exchange._sink = FullDisk
        with pytest.raises(OSError, match="disk full"):
            await net.fetch(net.all[1], blob.ref, net.all[0])
        await net.stop()
        assert only_this_task_runs()

    run_virtual(main())


def test_strangers_get_only_what_is_here_and_in_order():
    async def main():
        net, blob = SlowNetwork([1e6]), a_blob()
        exchange = net.all[0].exchange
        exchange.offer(blob)
        for digest, chunks in [
            (b"x" * 32, []),
            (blob.ref.digest, [1, 1]),
            (blob.ref.digest, [2, 1]),
            (blob.ref.digest, [10**6]),
        ]:
            with pytest.raises(PeerError):
                async for _ in exchange.on_fetch(b"", digest, chunks):
                    pass
        exchange.forget(blob.ref.digest)
        with pytest.raises(PeerError):
            await anext(exchange.on_fetch(b"", blob.ref.digest, []))

    run_virtual(main())


def test_watchers_hear_everything_at_first_and_each_later_thing_once():
    async def main():
        net, blob, later = SlowNetwork([1e6]), a_blob(1), a_blob(2)
        exchange = net.all[0].exchange
        exchange.offer(blob)
        watch = exchange.on_watch(b"")
        assert [(item.digest, item.all) for item in await anext(watch)] == [(blob.ref.digest, True)]
        exchange.offer(later)
        exchange.offer(later)
        assert [(item.digest, item.all) for item in await anext(watch)] == [(later.ref.digest, True)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(NEVER / 2):
                await anext(watch)

    run_virtual(main())


def test_an_unfinished_blob_in_memory_takes_no_room_for_what_it_announces():
    blob = a_blob()
    partial = MemoryPartial(blob.ref, blob.digests)
    with pytest.raises(PeerError):
        partial.write_chunk(0, bytes(len(blob.read_chunk(0))))
    with pytest.raises(LocalError):
        partial.finish()
    assert partial.have() == set()


@pytest.mark.parametrize("seed", range(5))
def test_masks_are_sets(seed):
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(200), rng.randrange(50)))
    assert list(bits(mask_of(chosen, 200))) == chosen
    assert list(bits(mask_of([*chosen, 500], 200))) == chosen


def test_equal_members_own_every_nth_chunk():
    members = peers(5)
    owners = stripe_owners(members, dict.fromkeys(members, 1.0), 17, 0)
    assert owners == [members[index % 5] for index in range(17)]


def test_stripes_follow_spare_upload_and_spread_evenly():
    members = peers(4)
    weights = dict(zip(members, [0.0, 1.0, 2.0, 1.0], strict=True))
    owners = stripe_owners(members, weights, 64, 3)
    assert [owners.count(member) for member in members] == [0, 16, 32, 16]
    assert all(owners[start : start + 4].count(members[2]) == 2 for start in range(0, 64, 4))


def test_the_slowest_uplink_relays_nothing_and_equal_ones_the_same():
    slow, *fast = peers(4)
    weights = relay_weights({slow: 100, **dict.fromkeys(fast, 1000)})
    assert weights[slow] == pytest.approx(0)
    assert len({weights[peer] for peer in fast}) == 1
    assert len(set(relay_weights(dict.fromkeys(peers(4), 100)).values())) == 1
    assert len(set(relay_weights(dict.fromkeys(peers(4), 0)).values())) == 1


def test_a_blob_of_usual_size_has_enough_chunks_to_relay():
    assert 32 <= -(-10_000_000 // choose_chunk_bytes(10_000_000)) <= 64
