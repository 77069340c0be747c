"""The gather as a fluid, against closed forms, against lower bounds, and against chunks on the fluid network."""

from __future__ import annotations

import numpy as np
import pytest

from farflung.node.stripes import relay_weights, stripe_owners
from farflung.protocol.identity import PeerId
from farflung.sim.network.fluid import FluidNetwork
from farflung.sim.network.topology import NodeLinks, Topology
from farflung.sim.timing.collectives import collective_s
from farflung.sim.timing.exchange import DOWNLOAD, UPLOAD, Change, Lines, gather
from farflung.sim.timing.lines import distances, usable_lines

S = 1e7


def lines(up, down, shared=(), crossing=()) -> Lines:
    both = np.array(shared, float)
    return Lines(np.array(up, float), np.array(down, float), both, both, tuple(np.array(c, int) for c in crossing))


def everybody(given: Lines, announced=None, changes=()):
    n = len(given.up_m)
    announced = np.zeros(n) if announced is None else np.array(announced, float)
    return gather(given, announced, np.arange(n), S, changes)


def some_lines(seed: int) -> tuple[Lines, np.ndarray]:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 9))
    up = np.exp(rng.uniform(np.log(1e6), np.log(1e7), n))
    return lines(up, up * rng.uniform(0.5, 3, n)), rng.uniform(0, [0, 5, 60][seed % 3], n)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_equal_uplinks_that_are_narrow_end_together_after_n_minus_1_payloads(n):
    held = everybody(lines([1e6] * n, [1e9] * n)).held_km
    np.testing.assert_allclose(held[~np.eye(n, dtype=bool)].max(), (n - 1) * S / 1e6, rtol=1e-9)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_narrow_downlinks_take_everybody_elses_payload(n):
    result = everybody(lines([1e9] * n, [1e6] * n))
    np.testing.assert_allclose(result.held_km.max(0), (n - 1) * S / 1e6, rtol=1e-9)
    assert result.limited(0, 0.0, (n - 1) * S / 1e6)[DOWNLOAD] == pytest.approx((n - 1) * S / 1e6)


def test_one_narrow_uplink_sends_its_payload_once():
    held = everybody(lines([1e5, 1e9, 1e9, 1e9], [1e9] * 4)).held_km
    np.testing.assert_allclose(held[0, 1:], S / 1e5, rtol=1e-9)
    assert held[1:, 1:].max() < 0.01 * S / 1e5


def test_uplinks_are_a_pool():
    result = everybody(lines([1e6, 1e6, 4e6], [1e9] * 3))
    assert result.held_km.max() == pytest.approx(max(S / 1e6, 6 * S / 6e6))
    assert result.limited(0, 0.0, 5.0)[UPLOAD] == pytest.approx(5.0)


def test_payloads_that_come_one_by_one_are_there_one_by_one():
    held = everybody(lines([1e6] * 3, [1e9] * 3), announced=[0, 100, 200]).held_km
    np.testing.assert_allclose(held, [[0, 10, 10], [110, 100, 110], [210, 210, 200]], rtol=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_no_receiver_beats_the_bounds_and_bytes_are_conserved(seed):
    given, announced = some_lines(seed)
    result = everybody(given, announced)
    n, held = len(given.up_m), result.held_km
    assert (held >= announced[:, None] - 1e-9).all()
    others = ~np.eye(n, dtype=bool)
    assert (held[others] >= np.broadcast_to((announced + S / given.up_m)[:, None], (n, n))[others] * (1 - 1e-9)).all()
    for j in range(n):
        rate = min(given.down_m[j], given.up_m.sum() - given.up_m[j])
        assert held[:, j].max() >= announced.min() + (n - 1) * S / rate * (1 - 1e-9)
    assert held.max() >= announced.min() + n * (n - 1) * S / given.up_m.sum() * (1 - 1e-9)
    assert held.max() <= announced.max() + n * (n - 1) * S / min(given.up_m.min(), given.down_m.min())
    np.testing.assert_allclose(result.received_m, (n - 1) * S, rtol=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_a_faster_line_delays_nobodys_last_payload(seed):
    given, announced = some_lines(seed)
    rng = np.random.default_rng(1000 + seed)
    who = int(rng.integers(len(given.up_m)))
    up, down = given.up_m.copy(), given.down_m.copy()
    up[who] *= 3
    down[who] *= 3
    before, after = everybody(given, announced).held_km.max(), everybody(lines(up, down), announced).held_km.max()
    assert after <= before * (1 + 1e-6)


def test_a_shared_line_carries_what_crosses_it():
    narrow = lines([1e7] * 4, [1e7] * 4, shared=[1e6], crossing=[[0, 1]])
    free = everybody(lines([1e7] * 4, [1e7] * 4)).held_km.max()
    held = everybody(narrow).held_km
    assert held[:, :2].max() >= 2 * S / 1e6 * (1 - 1e-9)  # two payloads from outside must come in, each once at least
    assert held.max() > 3 * free
    wide = everybody(lines([1e7] * 4, [1e7] * 4, shared=[1e9], crossing=[[0, 1]])).held_km
    assert wide.max() == pytest.approx(free)


def test_a_line_that_pauses_delays_and_one_that_dies_leaves_its_payload_incomplete():
    given = lines([1e6] * 2, [1e9] * 2)
    pause = [Change(5.0, 0, 0.0, 0.0), Change(25.0, 0, 1e6, 1e9)]
    held = everybody(given, changes=pause).held_km
    assert held[0, 1] == pytest.approx(30.0)
    held = everybody(given, changes=pause[:1]).held_km
    assert np.isinf(held[0, 1])
    assert np.isinf(held[1, 0])


def chunked(given: Lines, announced, chunks: int = 32, calls: int = 2):
    """Chunks as flows on the fluid network: rarest first, from origins only one's own stripe, the rest from relays."""
    n = len(given.up_m)
    nodes = tuple(NodeLinks(up, down) for up, down in zip(given.up_m, given.down_m, strict=True))
    net = FluidNetwork(Topology(nodes, header_overhead=1.0, ack_share=0.0, window_bytes=1e12))
    ids = [PeerId(bytes([index]) * 20) for index in range(n)]
    weights = relay_weights({ids[index]: int(given.up_m[index]) for index in range(n)})
    owners = [
        [ids.index(one) for one in stripe_owners([one for one in ids if one != ids[k]], weights, chunks, k)]
        for k in range(n)
    ]
    held = [[set() for _ in range(n)] for _ in range(n)]
    flying = [[set() for _ in range(n)] for _ in range(n)]
    relays, load, flows = np.zeros((n, chunks)), np.zeros((n, n), int), {}
    last = np.array(announced, float)
    waiting = sorted(range(n), key=lambda k: announced[k])

    def choose(giver: int, taker: int):
        ranked = [
            (relays[k, c], (7919 * c + 31 * k + 17 * taker) % 1009, k, c)
            for k in range(n)
            for c in sorted(held[giver][k] - held[taker][k] - flying[taker][k])
            if k != taker and (giver != k or owners[k][c] == taker)
        ]
        return min(ranked, default=None)

    now = 0
    while True:
        times = [round(announced[waiting[0]] * 1e9)] if waiting else []
        times += [net.next_ns()] if net.next_ns() is not None else []
        if not times:
            break
        now = max(now, min(times))
        while waiting and round(announced[waiting[0]] * 1e9) <= now:
            k = waiting.pop(0)
            held[k][k] = set(range(chunks))
        for flow in net.advance(now):
            giver, taker, k, c = flows.pop(flow)
            load[giver, taker] -= 1
            flying[taker][k].discard(c)
            held[taker][k].add(c)
            relays[k, c] += 1
            last[taker] = now / 1e9
        for taker in range(n):
            for giver in range(n):
                while giver != taker and load[giver, taker] < calls and (best := choose(giver, taker)) is not None:
                    *_, k, c = best
                    flows[net.start(giver, taker, S / chunks, now)] = (giver, taker, k, c)
                    flying[taker][k].add(c)
                    load[giver, taker] += 1
    assert all(len(held[j][k]) == chunks for j in range(n) for k in range(n))
    return last


@pytest.mark.parametrize("seed", [0, 1, 2, 4, 5, 9])
def test_the_end_of_an_exchange_is_that_of_a_chunk_by_chunk_schedule(seed):
    given, announced = some_lines(seed)
    fluid, chunks = everybody(given, announced).held_km.max(), chunked(given, announced).max()
    assert 0.98 * chunks <= fluid * 1.12
    assert fluid <= chunks * 1.02  # a fluid is a lower bound of any schedule


# -- collectives ------------------------------------------------------------------------------------------------------

FLAT = np.zeros((64, 64))


@pytest.mark.parametrize("n", [2, 5, 16])
def test_collectives_of_equal_members_meet_their_closed_forms(n):
    given, members = lines([2e6] * n, [2e6] * n), np.arange(n)
    assert collective_s("ring", given, members, S, FLAT) == pytest.approx(2 * (n - 1) / n * S / 2e6)
    assert collective_s("butterfly", given, members, S, FLAT) == pytest.approx(2 * (n - 1) / n * S / 2e6)
    assert collective_s("star", given, members, S, FLAT) == pytest.approx(2 * (n - 1) * S / 2e6)


def test_a_collective_is_as_fast_as_its_slowest_line_and_pays_for_distance():
    given, members = lines([1e6, 9e6, 9e6], [9e6] * 3), np.arange(3)
    far = np.full((3, 3), 0.1)
    for kind in ("ring", "butterfly"):
        near_s = collective_s(kind, given, members, S, FLAT)
        assert near_s == pytest.approx(4 / 3 * S / 1e6)
        assert collective_s(kind, given, members, S, far) == pytest.approx(near_s + (0.4 if kind == "ring" else 0.2))
    assert collective_s("ring", given, np.array([1]), S, FLAT) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_a_star_takes_as_long_as_its_flows_on_the_fluid_network(seed):
    rng = np.random.default_rng(seed)
    up, down = rng.uniform(1e6, 1e7, 6), rng.uniform(1e6, 1e7, 6)
    hub = int(np.argmin(1 / up + 1 / down))
    took_s = 0.0
    for there in (True, False):
        nodes = tuple(NodeLinks(float(a), float(b)) for a, b in zip(up, down, strict=True))
        net = FluidNetwork(Topology(nodes, header_overhead=1.0, ack_share=0.0, window_bytes=1e12))
        for leaf in range(6):
            if leaf != hub:
                net.start(*((leaf, hub) if there else (hub, leaf)), S, 0)
        while (now := net.next_ns()) is not None:
            net.advance(now)
            last = now
        took_s += last / 1e9
    assert collective_s("star", lines(up, down), np.arange(6), S, FLAT) == pytest.approx(took_s, rel=1e-6)


# -- lines ------------------------------------------------------------------------------------------------------------


def test_usable_lines_take_off_headers_acknowledgements_and_connection_limits():
    def usable(**settings):
        topology = Topology(tuple(NodeLinks(1e6, 4e6) for _ in range(4)), **settings)
        return usable_lines(topology, distances(topology), np.full(4, np.inf), efficiency=1.0)

    plain = usable(header_overhead=1.0, ack_share=0.0, window_bytes=1e12)
    np.testing.assert_allclose(plain.up_m, 1e6)
    np.testing.assert_allclose(plain.down_m, 4e6)
    np.testing.assert_allclose(usable(header_overhead=1.25, ack_share=0.0, window_bytes=1e12).up_m, 0.8e6)
    acked = usable(header_overhead=1.0, ack_share=0.02, window_bytes=1e12)
    np.testing.assert_allclose(acked.up_m + 0.02 * acked.up_m, 1e6, rtol=1e-4)  # all take what all give
    far = usable(header_overhead=1.0, ack_share=0.0, window_bytes=20_000, latency_s=((0.1,),))
    np.testing.assert_allclose(far.up_m, 3 * 20_000 / 0.2)
    lossy = usable(header_overhead=1.0, ack_share=0.0, window_bytes=1e12, latency_s=((0.1,),), loss=(0.01,) * 4)
    np.testing.assert_allclose(lossy.up_m, 3 * 1.22 * 1448 / 0.2 / np.sqrt(1 - 0.99**2), rtol=1e-9)
