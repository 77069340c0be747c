"""The fluid network against SimGrid, the best validated flow simulator there is. Not in `make test`: few have SimGrid.

Debian: `apt install python3-simgrid`. Without root: `apt-get download` it and its libraries, `dpkg -x` all of them into
a folder, and name that folder in FARFLUNG_SIMGRID.

Transfers take hours, so that our nanoseconds are 1e-13 of them, and lanes are short: whoever waits for whom multiplies
every rounding, by 10^5 over 40 transfers in a row. In the first of a lane the two differ by their rounding only.
"""

from __future__ import annotations

import heapq
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from farflung.sim.network.fluid import FluidNetwork
from farflung.sim.network.topology import NodeLinks, Topology

PYTHON = "/usr/bin/python3"
LATENCY_S = 0.01
LANE_TRANSFERS = 8
ORACLE = Path(__file__).parent / "simgrid_oracle.py"


def environment() -> dict[str, str]:
    root = os.environ.get("FARFLUNG_SIMGRID")
    if not root:
        return dict(os.environ)
    library = [str(path) for path in sorted(Path(root).glob("usr/lib/*-linux-gnu"))]
    packages = str(Path(root) / "usr/lib/python3/dist-packages")
    return {**os.environ, "PYTHONPATH": packages, "LD_LIBRARY_PATH": ":".join(library)}


def why_not() -> str:
    """Empty if SimGrid can be imported."""
    if not Path(PYTHON).exists():
        return f"no {PYTHON}"
    command = [PYTHON, "-c", "import simgrid"]
    tried = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    return tried.stderr.strip().splitlines()[-1] if tried.returncode else ""


Lanes = list[tuple[int, list[tuple[int, int]]]]


def simgrid(topology: Topology, lanes: Lanes) -> list[list[float]]:
    count = len(topology.nodes)
    given = {
        "links": [
            *(node.up_bytes_per_s for node in topology.nodes),
            *(node.down_bytes_per_s for node in topology.nodes),
            *topology.groups * 2,
        ],
        "routes": [(a, b, topology.one_way(a, b)) for a in range(count) for b in range(count) if a != b],
        "latency_s": LATENCY_S,
        "lanes": lanes,
    }
    done = subprocess.run(
        [PYTHON, str(ORACLE)], env=environment(), input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ends: list[list[float]] = json.loads(done.stdout)
    return ends


def fluid(topology: Topology, lanes: Lanes) -> list[list[float]]:
    """Every lane sends its next transfer, after the latency, when the one before is complete."""
    network = FluidNetwork(topology)
    ends_s: list[list[float]] = [[] for _ in lanes]
    latency_ns = round(LATENCY_S * 1e9)
    ready, lane_of = [(latency_ns, lane) for lane in range(len(lanes))], {}
    while ready or lane_of:
        due_ns = network.next_ns()
        now_ns = min(t for t in (due_ns, ready[0][0] if ready else None) if t is not None)
        for flow in network.advance(now_ns):
            lane = lane_of.pop(flow)
            ends_s[lane].append(now_ns * 1e-9)
            if len(ends_s[lane]) < len(lanes[lane][1]):
                heapq.heappush(ready, (now_ns + latency_ns, lane))
        while ready and ready[0][0] == now_ns:
            lane = heapq.heappop(ready)[1]
            target, size = lanes[lane][1][len(ends_s[lane])]
            lane_of[network.start(lanes[lane][0], target, size, now_ns)] = lane
    return ends_s


def random_case(rng: np.random.Generator, nodes: int, lanes_each: int, groups: int) -> tuple[Topology, Lanes]:
    lines = rng.uniform(0.5e6, 5e6, (nodes, 2)).tolist()
    behind = rng.integers(groups, size=nodes).tolist() if groups else []
    topology = Topology(
        nodes=tuple(NodeLinks(up, down, (behind[node],) if groups else ()) for node, (up, down) in enumerate(lines)),
        groups=tuple(rng.uniform(3e6, 12e6, groups).tolist()),
        header_overhead=1.0,
        ack_share=0.0,
    )
    lanes: Lanes = []
    for lane in range(nodes * lanes_each):
        offsets = rng.integers(1, nodes, LANE_TRANSFERS).tolist()
        sizes = rng.integers(5_000_000_000, 40_000_000_000, LANE_TRANSFERS).tolist()
        source = lane // lanes_each
        lanes.append((source, [((source + o) % nodes, size) for o, size in zip(offsets, sizes, strict=True)]))
    return topology, lanes


@pytest.mark.soak
@pytest.mark.parametrize(("nodes", "lanes_each", "groups"), [(50, 2, 0), (25, 8, 0), (20, 4, 4)])
def test_completion_times_are_simgrids(nodes, lanes_each, groups):
    if why := why_not():
        pytest.skip(f"SimGrid cannot be imported: {why}")
    rng, transfers, worst = np.random.default_rng(nodes), 0, 0.0
    while transfers < 3400:
        topology, lanes = random_case(rng, nodes, lanes_each, groups)
        for ours, theirs in zip(fluid(topology, lanes), simgrid(topology, lanes), strict=True):
            assert len(ours) == len(theirs) == LANE_TRANSFERS
            transfers += len(ours)
            worst = max(worst, *(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)))
    print(f"{transfers} transfers among {nodes} nodes: completion times differ by up to {worst:.1e}, relatively")
    assert worst <= 1e-9
