"""The fluid network against its definition: rates, times, bytes, and what a max-min fair share is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from fluid_reference import ReferenceNetwork, random_topology

from farflung.protocol.errors import ConfigError, LocalError
from farflung.sim.network import compiling
from farflung.sim.network.filling import Flow, balance, fill
from farflung.sim.network.fluid import FluidNetwork
from farflung.sim.network.topology import (
    ACK_SHARE,
    FIFO_DUPLEX_LOSS,
    HEADER_OVERHEAD,
    INITIAL_WINDOW_BYTES,
    SEGMENT_BYTES,
    NodeLinks,
    Topology,
)

SOLVERS = ("incremental", "dense", "auto")
S = 10**9
ROOT = Path(__file__).parent.parent.parent


def difference(a: float, b: float) -> float:
    """Relative to the larger one."""
    return abs(a - b) / max(abs(a), abs(b), 1e-300)


@dataclass(frozen=True)
class Script:
    """Transfers that begin and are cancelled at given times, without regard to what happens."""

    starts: tuple[tuple[int, int, int, float], ...]
    """(now_ns, source, target, size_bytes): the n-th is flow n."""
    cancels: tuple[tuple[int, int], ...]
    """(now_ns, flow)"""

    def at(self, now_ns: int) -> tuple[list[tuple[int, int, float]], list[int]]:
        starts = [rest for at_ns, *rest in self.starts if at_ns == now_ns]
        return starts, [flow for at_ns, flow in self.cancels if at_ns == now_ns]

    @property
    def times_ns(self) -> list[int]:
        return sorted({at_ns for at_ns, *_ in (*self.starts, *self.cancels)})


def random_script(rng: np.random.Generator, nodes: int, transfers: int) -> Script:
    """Transfers of 0.1 to 30 MB that begin one to three at a time; some are cancelled within 20 s."""
    starts, cancels, now_ns = [], [], 10**9
    while len(starts) < transfers:
        for _ in range(int(rng.integers(1, 4))):
            if rng.random() < 0.15:
                cancels.append((now_ns + int(rng.integers(0, 20 * 10**9)), len(starts)))
            source, target = (int(n) for n in rng.choice(nodes, 2, replace=False))
            starts.append((now_ns, source, target, float(rng.uniform(1e5, 3e7))))
        now_ns += int(rng.exponential(4e9))
    return Script(tuple(starts), tuple(cancels))


def play(network: FluidNetwork, script: Script, check: Callable[[FluidNetwork], None]) -> dict[int, int]:
    """When each flow completed, in ns. `check` sees the network after every event."""
    ends_ns: dict[int, int] = {}
    times_ns = script.times_ns
    while times_ns or network.next_ns() is not None:
        due_ns = network.next_ns()
        now_ns = min(t for t in (due_ns, times_ns[0] if times_ns else None) if t is not None)
        ends_ns |= dict.fromkeys(network.advance(now_ns), now_ns)
        if times_ns and times_ns[0] == now_ns:
            starts, cancels = script.at(times_ns.pop(0))
            for source, target, size_bytes in starts:
                network.start(source, target, size_bytes, now_ns, warm_key=network._last + 1)
            for flow in cancels:
                if flow in network._flows:
                    network.cancel(flow, now_ns)
        network.next_ns()  # shares the links anew
        check(network)
    return ends_ns


def play_reference(network: ReferenceNetwork, script: Script) -> dict[int, int]:
    ends_ns: dict[int, int] = {}
    times_ns = script.times_ns
    while times_ns or network.next_ns() is not None:
        due_ns = network.next_ns()
        now_ns = min(t for t in (due_ns, times_ns[0] if times_ns else None) if t is not None)
        ends_ns |= dict.fromkeys(network.move_to(now_ns), now_ns)
        if times_ns and times_ns[0] == now_ns:
            starts, cancels = script.at(times_ns.pop(0))
            for source, target, size_bytes in starts:
                network.start(source, target, size_bytes)
            for flow in cancels:
                network.transfers.pop(flow, None)
        network.solve()
    return ends_ns


def flows_of(network: FluidNetwork) -> tuple[list[float], list[Flow], list[float]]:
    """What the solvers see now: capacities, flows with shares and caps, and the rates they found."""
    state = network._state
    records = [state.flow[item.slot] for item in network._flows.values()]
    width = int(state.main["width"][0])
    flows = []
    for item, record in zip(network._flows.values(), records, strict=True):
        crossings = state.crossing[item.slot * width : item.slot * width + record["crossings"]]
        ways = [(int(c["link"]), float(c["share"])) for c in crossings]
        there, back = ways[: record["forward"]], ways[record["forward"] :]
        flows.append(Flow(tuple(there), float(record["cap"]), tuple(back), float(record["booked"])))
    return state.link["capacity"].tolist(), flows, [float(record["rate"]) for record in records]


def check_rates(network: FluidNetwork) -> None:
    """The rates are those of the definition, and have the property that defines max-min fairness."""
    capacity_l, flows, rate_f = flows_of(network)
    for rate, wanted in zip(rate_f, balance(capacity_l, flows), strict=True):
        assert difference(rate, wanted) <= 1e-9
    use_l, booked_l, most_l = ([0.0] * len(capacity_l) for _ in range(3))
    for flow, rate in zip(flows, rate_f, strict=True):
        assert rate <= flow.booked or not flow.back
        for link, share in (*flow.path, *flow.back):
            use_l[link] += share * rate
            booked_l[link] += share * (flow.booked if (link, share) in flow.back else rate)
            most_l[link] = max(most_l[link], share * rate)
    assert all(used <= capacity * (1 + 1e-9) for used, capacity in zip(use_l, capacity_l, strict=True))
    full_l = [used >= capacity * (1 - 1e-9) for used, capacity in zip(booked_l, capacity_l, strict=True)]
    for flow, rate in zip(flows, rate_f, strict=True):
        ways = (*flow.path, *flow.back)
        bottleneck = any(full_l[link] and share * rate >= most_l[link] * (1 - 1e-9) for link, share in ways)
        assert bottleneck or rate == flow.cap


@pytest.mark.parametrize("seed", range(40))
def test_with_whole_shares_balance_is_progressive_filling(seed):
    rng = np.random.default_rng(seed)
    links, flows = int(rng.integers(1, 12)), int(rng.integers(1, 40))
    capacity_l = rng.uniform(1, 10, links).tolist()
    made = [
        Flow(
            tuple((int(link), 1.0) for link in rng.choice(links, int(rng.integers(1, links + 1)), replace=False)),
            float(rng.choice([0.3, 1.0, 1e9])),
        )
        for _ in range(flows)
    ]
    assert balance(capacity_l, made) == pytest.approx(fill(capacity_l, made), rel=1e-12)


def worst_time(seed: int, solver: str, transfers: int) -> float:
    """The largest relative difference of a completion time, after rates were checked at every event."""
    rng = np.random.default_rng(seed)
    topology = random_topology(rng)
    script = random_script(rng, len(topology.nodes), transfers)
    ends_ns = play(FluidNetwork(topology, solver=solver), script, check_rates)
    wanted_ns = play_reference(ReferenceNetwork(topology), script)
    assert ends_ns.keys() == wanted_ns.keys()
    return max(abs(ends_ns[flow] - end_ns) / end_ns for flow, end_ns in wanted_ns.items())


@pytest.mark.parametrize(("seed", "solver"), [(seed, SOLVERS[seed % 3]) for seed in range(12)])
def test_rates_and_times_are_those_of_progressive_filling(seed, solver):
    assert worst_time(seed, solver, 25) <= 1e-9


@pytest.mark.soak
@pytest.mark.parametrize("solver", ["incremental", "dense"])
def test_ten_thousand_transfers_are_those_of_progressive_filling(solver):
    worst = max(worst_time(seed, solver, 40) for seed in range(1000, 1250))
    print(f"10,000 transfers, {solver}: completion times differ by up to {worst:.1e}, relatively")
    assert worst <= 1e-9


@pytest.mark.parametrize("seed", [1, 3, 4, 5])
def test_rates_are_max_min_fair_with_full_fifo_queues_and_links_that_change(seed):
    rng = np.random.default_rng(100 + seed)
    topology = random_topology(rng, fifo=True)
    network = FluidNetwork(topology)
    turned = []

    def check(seen: FluidNetwork) -> None:
        check_rates(seen)
        turned.append(int(seen._state.node["full"].sum()))
        if rng.random() < 0.1:
            node = int(rng.integers(len(topology.nodes)))
            seen.set_node(node, seen._now_ns, up_bytes_per_s=float(rng.uniform(0.2e6, 5e6)))
            if topology.groups:
                seen.set_group(0, seen._now_ns, float(rng.uniform(0.5e6, 8e6)))
            check_rates_after(seen)

    assert play(network, random_script(rng, len(topology.nodes), 25), check)
    assert max(turned) > 0
    assert network._state.node["full"].sum() == 0  # queues drain when nothing is sent


def check_rates_after(network: FluidNetwork) -> None:
    network.next_ns()
    check_rates(network)


@pytest.mark.parametrize("seed", range(3))
def test_giving_up_repairs_and_filling_anew_leads_to_the_same_times(seed):
    rng = np.random.default_rng(seed)
    topology = random_topology(rng)
    script = random_script(rng, len(topology.nodes), 30)
    mixed = FluidNetwork(topology)
    mixed._state.main["looks_max"] = 0
    ends_ns = play(mixed, script, check_rates)
    assert 0 < mixed._state.main["refills"][0] < mixed._state.main["solves"][0]
    wanted_ns = play(FluidNetwork(topology, solver="incremental"), script, check_rates)
    assert max(abs(ends_ns[flow] - end_ns) / end_ns for flow, end_ns in wanted_ns.items()) <= 1e-9


def two(up: float = 1e6, down: float = 1e6, **more: object) -> Topology:
    return Topology((NodeLinks(up, down), NodeLinks(up, down)), **more)  # type: ignore[arg-type]


def finish(network: FluidNetwork) -> list[tuple[int, int]]:
    """Run until nothing happens any more: (when, flow)."""
    ended = []
    while (due_ns := network.next_ns()) is not None:
        ended += [(due_ns, flow) for flow in network.advance(due_ns)]
    return ended


def test_one_transfer_takes_its_bytes_on_the_line_over_the_capacity():
    network = FluidNetwork(two(ack_share=0.0))
    assert network.start(0, 1, 5e6, 7) == 0
    assert finish(network) == [(7 + round(5e6 * HEADER_OVERHEAD * 1000 + 0.5), 0)]
    assert network.sent_bytes.tolist() == [5e6 * HEADER_OVERHEAD, 0]


def test_round_figures_end_at_round_times():
    network = FluidNetwork(two(ack_share=0.0, header_overhead=1.0))
    network.start(0, 1, 3e6, 0)
    network.start(0, 1, 1e6, 0)
    assert finish(network) == [(2 * S, 1), (4 * S, 0)]


def test_a_window_doubles_every_round_trip_until_the_line_is_full():
    line, round_trip_s = 12.5e6, 0.064
    network = FluidNetwork(two(line, line, latency_s=((round_trip_s / 2,),), ack_share=0.0))
    network.start(0, 1, 25e6, 0)
    ((end_ns, _),) = finish(network)
    left, window, wanted_s = 25e6 * HEADER_OVERHEAD, INITIAL_WINDOW_BYTES * HEADER_OVERHEAD, 0.0
    while window / round_trip_s < line:
        left, window, wanted_s = left - window, 2 * window, wanted_s + round_trip_s
    wanted_s += left / line
    assert end_ns * 1e-9 == pytest.approx(wanted_s, abs=0.1 * round_trip_s)
    assert wanted_s > 1.05 * 25e6 * HEADER_OVERHEAD / line


def test_no_event_happens_while_a_window_does_not_bind():
    network = FluidNetwork(two(1e5, 1e5, latency_s=((0.005,),)))  # ten segments per 10 ms are more than the line
    network.start(0, 1, 1e6, 0)
    network.next_ns()
    assert network.advance(network.next_ns()) == [0]
    assert network.next_ns() is None


def test_a_window_and_losses_limit_the_rate():
    far = two(1e9, 1e9, latency_s=((0.05,),), ack_share=0.0, window_bytes=4e6)
    lossy = replace(far, loss=(0.001, 0.0))
    for topology, window in ((far, 4e6), (lossy, 1.22 * SEGMENT_BYTES / 0.001**0.5)):
        network = FluidNetwork(topology)
        network.start(0, 1, 1e9, 0)
        network.advance(5 * S)
        assert network.rate(0) == pytest.approx(window / 0.1)


def test_a_connection_keeps_its_window_and_loses_half_of_it_per_idle_timeout():
    topology = two(1e9, 1e9, latency_s=((0.05,),), ack_share=0.0)
    idle_timeouts = {0: 4e6, 1: 2e6, 3: 0.5e6, 50: INITIAL_WINDOW_BYTES}
    for timeouts, window in idle_timeouts.items():
        network = FluidNetwork(topology)
        network.start(0, 1, 1e9, 0, warm_key=5)
        ((end_ns, _),) = finish(network)
        again_ns = end_ns + int((timeouts + 0.5) * 0.3 * S)
        flow = network.start(0, 1, 1e9, again_ns, warm_key=5)
        assert network.rate(flow) == pytest.approx(window / 0.1)
        other = network.start(0, 1, 1e9, again_ns, warm_key=6)
        assert network.rate(other) == pytest.approx(INITIAL_WINDOW_BYTES / 0.1)


def ring(queue: str) -> FluidNetwork:
    nodes = (NodeLinks(1e6, 1e6, queue=queue),) * 6
    network = FluidNetwork(Topology(nodes, latency_s=((0.02,),), ack_share=ACK_SHARE))
    for node in range(6):
        network.start(node, (node + 1) % 6, 30e6, 0)
    return network


def test_a_full_duplex_ring_is_slower_by_the_duplex_loss_on_fifo_uplinks():
    fq_s, fifo_s = finish(ring("fq"))[-1][0] * 1e-9, finish(ring("fifo"))[-1][0] * 1e-9
    assert fq_s == pytest.approx(30 * HEADER_OVERHEAD * (1 + ACK_SHARE), rel=0.01)
    assert fifo_s == pytest.approx(30 * HEADER_OVERHEAD * (1 / (1 - FIFO_DUPLEX_LOSS) + ACK_SHARE), rel=0.01)


def test_a_full_fifo_lengthens_the_round_trip_of_what_its_node_receives():
    fast, slow = NodeLinks(1e9, 1e9), NodeLinks(1e6, 1e9, queue="fifo", queue_bytes=300_000)
    network = FluidNetwork(Topology((fast, slow), latency_s=((0.01,),), window_bytes=1e6, ack_share=0.001))
    network.start(0, 1, 1e9, 0)
    network.advance(2 * S)
    assert network.rate(0) == pytest.approx(1e6 / 0.02)
    network.start(1, 0, 30e6, 2 * S)
    network.advance(4 * S)
    assert network.rate(0) == pytest.approx(1e6 / (0.02 + 0.3))
    assert (
        network.carried(1, 4 * S) > 1.7e6
    )  # it has its uplink, but for the acknowledgements, since its window is open
    network.cancel(1, 4 * S)
    network.advance(5 * S)
    assert network.rate(0) == pytest.approx(1e6 / 0.02)


def test_an_upload_does_not_hold_a_download_to_its_own_speed():
    network = FluidNetwork(Topology((NodeLinks(1e6, 1e7), NodeLinks(1e8, 1e8)), header_overhead=1.0))
    network.start(0, 1, 1e8, 0)
    network.start(1, 0, 1e8, 0)
    assert network.rate(1) == pytest.approx(1e7 - ACK_SHARE * network.rate(0), rel=3e-3)
    assert network.rate(0) == pytest.approx(1e6 - ACK_SHARE * network.rate(1), rel=0.03)  # 22 % are acknowledgements


def test_acknowledgements_that_do_not_fit_hold_their_transfer_back():
    network = FluidNetwork(Topology((NodeLinks(1e3, 1e8), NodeLinks(1e8, 1e8)), header_overhead=1.0))
    network.start(1, 0, 1e8, 0)
    assert network.rate(0) == pytest.approx(1e3 / ACK_SHARE)


def test_acknowledgements_take_their_share_of_the_way_back():
    network = FluidNetwork(two(1e6, 4e6))
    network.start(0, 1, 1e6, 0)
    network.start(1, 0, 1e6, 0)
    assert network.rate(0) * HEADER_OVERHEAD == pytest.approx(1e6 / (1 + ACK_SHARE), rel=2.2e-3)
    finish(network)
    wire = 1e6 * HEADER_OVERHEAD * (1 + ACK_SHARE)
    assert network.sent_bytes.tolist() == pytest.approx([wire, wire])
    assert network.received_bytes.tolist() == pytest.approx([wire, wire])


def test_a_shared_link_is_crossed_by_what_leaves_it_only():
    home = NodeLinks(1e6, 1e6, groups=(0,))
    network = FluidNetwork(
        Topology((home, home, NodeLinks(9e6, 9e6)), groups=(0.5e6,), header_overhead=1.0, ack_share=0.0)
    )
    inside, out, other, back = (network.start(*pair, 1e6, 0) for pair in ((0, 1), (0, 2), (1, 2), (2, 1)))
    assert [network.rate(flow) for flow in (inside, out, other, back)] == [5e5, 2.5e5, 2.5e5, 5e5]
    use = network.utilisation()
    assert use.group_up_g.tolist() == [1.0]
    assert use.group_down_g.tolist() == [1.0]
    assert use.up_n.tolist() == [0.75, 0.25, 5e5 / 9e6]


def test_time_may_jump_over_events_and_nothing_is_lost():
    steps, jump, touched = (FluidNetwork(two(latency_s=((0.02,),))) for _ in range(3))
    for network in (steps, jump, touched):
        for size in (3e5, 1e5, 2e5):
            network.start(0, 1, size, 0)
    ended = finish(steps)
    assert jump.advance(100 * S) == [flow for _, flow in ended]
    assert touched.carried(0, ended[1][0] + 1) < 3e5  # by now flows 1 and 2 have completed, unasked for
    assert touched.next_ns() == ended[1][0] + 1
    assert touched.cancel(1, ended[1][0] + 1) == 1e5
    assert touched.advance(ended[1][0] + 1) == [2]
    assert finish(touched) == [ended[2]]


def test_a_cancelled_flow_has_carried_its_share_and_leaves_the_rest_to_others():
    network = FluidNetwork(two(ack_share=0.0, header_overhead=1.0))
    network.start(0, 1, 3e6, 0)
    network.start(0, 1, 3e6, 0)
    network.next_ns()
    assert network.carried(0, S) == pytest.approx(5e5)
    assert network.cancel(0, 2 * S) == pytest.approx(1e6)
    assert finish(network) == [(4 * S, 1)]
    assert network.sent_bytes[0] == pytest.approx(4e6)
    with pytest.raises(LocalError, match="0"):
        network.cancel(0, 4 * S)


def test_a_dead_line_stops_everything_and_a_live_one_resumes_it():
    network = FluidNetwork(two(header_overhead=1.0, ack_share=0.0))
    network.start(0, 1, 2e6, 0)
    network.set_node(1, S, down_bytes_per_s=0.0)
    assert network.next_ns() is None
    assert network.advance(50 * S) == []
    assert network.rate(0) == 0
    network.set_node(1, 50 * S, down_bytes_per_s=0.5e6)
    assert finish(network) == [(52 * S, 0)]


def test_nothing_to_send_is_complete_at_once():
    network = FluidNetwork(two())
    network.start(0, 1, 0.0, 5)
    assert finish(network) == [(5, 0)]


def test_memory_is_bounded_by_active_flows():
    network = FluidNetwork(random_topology(np.random.default_rng(3)))
    now_ns = 0
    for _ in range(300):
        for flow in range(20):
            network.start(flow % 2, 1 - flow % 2, 1e5, now_ns, warm_key=network._last + 1)
        now_ns = finish(network)[-1][0] + 60 * S  # every window is cold again
    state = network._state
    assert network._last + 1 == 6000
    assert network.active == len(network._flows) == len(network._idle) - 20 == len(network._connections) - 20 == 0
    assert len(state.flow) == 64
    assert state.main["heap_size"][0] == state.main["crossings"][0] == 0
    assert state.main["free_size"][0] == 64
    assert (state.link["head"] == -1).all()


def test_more_flows_than_slots_get_more_slots():
    network = FluidNetwork(two(header_overhead=1.0, ack_share=0.0))
    for flow in range(1000):
        assert network.start(0, 1, 1e6, flow) == flow
    network.next_ns()
    assert network.rate(0) == network.rate(999) == pytest.approx(1e3)
    assert len(finish(network)) == 1000


DIGEST = """
import hashlib, sys
sys.path[:0] = [{tests!r}, {root!r}]
import numpy as np
from test_network import FluidNetwork, play, random_script, random_topology
digest = hashlib.sha256()
for seed in range(3):
    rng = np.random.default_rng(seed)
    topology = random_topology(rng, fifo=True)
    network = FluidNetwork(topology)
    script = random_script(rng, len(topology.nodes), 40)
    digest.update(repr(play(network, script, lambda seen: digest.update(seen.sent_bytes.tobytes()))).encode())
print(digest.hexdigest())
"""


def test_the_same_calls_lead_to_the_same_floats_whatever_the_hash_seed():
    code = DIGEST.format(tests=str(Path(__file__).parent), root=str(ROOT))
    digests = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "77")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0].strip()) == 64


def test_what_users_get_wrong_is_named():
    with pytest.raises(ConfigError, match="magic"):
        FluidNetwork(two(), solver="magic")
    for wrong in ({"queue": "red"}, {"queue_bytes": 5.0}, {"groups": (0, 0)}, {"up_bytes_per_s": -1.0}):
        with pytest.raises(ConfigError):
            NodeLinks(**{"up_bytes_per_s": 1.0, "down_bytes_per_s": 1.0, **wrong})
    for wrong in (
        *({"loss": (1.0, 0.0)}, {"loss": (0.1,)}, {"latency_s": ((0.0, 1.0),)}, {"region": (0, 1)}),
        *({"ack_share": 1.0}, {"header_overhead": 0.5}, {"window_bytes": 1.0}, {"groups": (float("inf"),)}),
    ):
        with pytest.raises(ConfigError):
            two(**wrong)
    network = FluidNetwork(two())
    for call in (
        lambda: network.start(0, 0, 1.0, 0),
        lambda: network.start(0, 2, 1.0, 0),
        lambda: network.start(0, 1, -1.0, 0),
        lambda: network.set_node(2, 0, up_bytes_per_s=1.0),
        lambda: network.set_group(0, 0, 1.0),
    ):
        with pytest.raises(ConfigError):
            call()
    network.advance(5)
    with pytest.raises(LocalError):
        network.advance(4)


def test_machine_code_is_keyed_by_every_file_it_is_made_from():
    folder = Path(compiling.__file__).parent
    made_of = {
        path.name for path in folder.glob("*.py") if "compiled" in path.read_text() or "dtype" in path.read_text()
    }
    assert made_of - {"__init__.py", "fluid.py"} <= set(compiling.KERNEL_FILES)


def test_a_shared_link_may_be_faster_in_one_direction():
    """Two nodes behind a line of 1 MB/s out and 4 MB/s in, one outside: each direction has its own limit."""
    behind = NodeLinks(1e9, 1e9, groups=(0,))
    topology = Topology((behind, behind, NodeLinks(1e9, 1e9)), (1e6,), groups_down=(4e6,), ack_share=0.0)
    network = FluidNetwork(topology)
    flows = [network.start(source, target, 1e9, 0) for source, target in ((0, 2), (1, 2), (2, 0), (2, 1))]
    network.advance(0)
    rates = [network.rate(flow) * topology.header_overhead for flow in flows]
    assert rates == pytest.approx([0.5e6, 0.5e6, 2e6, 2e6], rel=1e-9)
