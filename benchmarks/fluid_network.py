"""How many transfers per second does the fluid network simulate?

Every node keeps some transfers to random others under way; when one completes, the next begins. All of it counts: the
driver's Python, the calls, slow start (some doublings per transfer on cold connections), acknowledgements, the solver.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from report import arguments, console, goal, noise, publish

from farflung.sim.network.fluid import FluidNetwork
from farflung.sim.network.topology import ACK_SHARE, NodeLinks, Topology

MBIT = 125_000.0
WARM_UP_S = 10.0
"""Wall time after which counting begins even if half of the first transfers are still under way."""


@dataclass(frozen=True)
class Case:
    name: str
    nodes: int
    outstanding: int
    """Transfers under way per node to random others; with nodes - 1 of them, rounds of one to every other node."""
    goal_per_s: float

    @property
    def all_to_all(self) -> bool:
        return self.outstanding == self.nodes - 1


CASES = (
    Case("sparse: 1,000 nodes, 2 each", 1000, 2, 20_000),
    Case("dense: 1,000 nodes, 8 each", 1000, 8, 5_000),
    Case("all-to-all: 40 nodes, 39 each", 40, 39, 5_000),
)


def homes(nodes: int, rng: np.random.Generator, ack_share: float) -> Topology:
    """Lines of 50-500 Mbit/s up and 0.3 to 1.5 times that down, in three regions 10 to 80 ms apart."""
    up = rng.uniform(50, 500, nodes) * MBIT
    down = up * rng.uniform(0.3, 1.5, nodes)
    return Topology(
        nodes=tuple(NodeLinks(float(u), float(d)) for u, d in zip(up, down, strict=True)),
        region=tuple(int(r) for r in rng.integers(0, 3, nodes)),
        latency_s=((0.005, 0.04, 0.08), (0.04, 0.005, 0.05), (0.08, 0.05, 0.005)),
        last_mile_s=tuple(float(d) for d in rng.uniform(0.002, 0.01, nodes)),
        ack_share=ack_share,
    )


class Load:
    """Keeps its transfers under way. Dice are rolled in blocks: they are not what is measured."""

    def __init__(self, case: Case, solver: str, ack_share: float, warm: bool) -> None:
        self.case, self.warm, self.rng = case, warm, np.random.default_rng(1)
        self.network = FluidNetwork(homes(case.nodes, self.rng, ack_share), solver=solver)
        self.source_of: dict[int, int] = {}
        self.offsets: list[int] = []
        self.sizes: list[float] = []
        self.completed = self.events = 0
        for source in range(case.nodes):
            for offset in range(1, case.outstanding + 1):
                self.start(source, 0, offset if case.all_to_all else None)

    def start(self, source: int, now_ns: int, offset: int | None = None) -> None:
        if not self.sizes:
            self.offsets = self.rng.integers(1, self.case.nodes, 4096).tolist()
            self.sizes = self.rng.uniform(0.5e6, 4e6, 4096).tolist()
        target = (source + (offset or self.offsets.pop())) % self.case.nodes
        flow = self.network.start(source, target, self.sizes.pop(), now_ns, warm_key=source if self.warm else None)
        self.source_of[flow] = source

    def step(self) -> None:
        """Go to the next event, and begin what follows it."""
        now_ns = self.network.next_ns()
        assert now_ns is not None
        for flow in self.network.advance(now_ns):
            self.completed += 1
            source = self.source_of.pop(flow)
            if not self.case.all_to_all:
                self.start(source, now_ns)
        self.events += 1
        if not self.source_of:  # the next round begins
            for source in range(self.case.nodes):
                for offset in range(1, self.case.nodes):
                    self.start(source, now_ns, offset)


def run(case: Case, solver: str, ack_share: float, warm: bool, seconds: float) -> dict[str, object]:
    """Transfers per second, after half of the first ones have completed (or `WARM_UP_S`)."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    load = Load(case, solver, ack_share, warm)
    while load.completed <= case.nodes * case.outstanding // 2 and time.perf_counter() - wall_s < WARM_UP_S:
        load.step()
    main = load.network._state.main[0]
    warm_up_s, wall_s, cpu_s = time.perf_counter() - wall_s, time.perf_counter(), time.process_time()
    before = [load.completed, load.events, *(int(main[name]) for name in ("visits", "solves", "refills"))]
    while time.perf_counter() - wall_s < seconds:
        for _ in range(32):
            load.step()
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    after = [load.completed, load.events, *(int(main[name]) for name in ("visits", "solves", "refills"))]
    completed, events, visits, solves, refills = (b - a for a, b in zip(before, after, strict=True))
    return {
        "case": case.name,
        "solver": solver,
        "acks": "yes" if ack_share else "no",
        "windows": "warm" if warm else "cold",
        "warm-up s": warm_up_s,
        "transfers/s": completed / wall_s,
        "transfers/CPU s": completed / cpu_s,
        "events per transfer": events / max(completed, 1),
        "us CPU per event": cpu_s / events * 1e6,
        "crossings per solve": visits / solves,
        "filled anew %": 100 * refills / solves,
        "goal": case.goal_per_s,
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--solvers", nargs="+", default=["auto"], help="auto, incremental, dense")
    parser.add_argument("--cases", nargs="+", default=["sparse", "dense", "all-to-all"], help="which")
    parser.add_argument("--seconds", type=float, default=4.0, help="per row")
    parser.add_argument("--all", action="store_true", help="also without acknowledgements, and with warm connections")
    options = parser.parse_args()
    before_s = time.perf_counter()
    for solver in ("incremental", "dense"):
        network = FluidNetwork(homes(4, np.random.default_rng(0), ACK_SHARE), solver=solver)
        network.start(0, 1, 1e6, 0)
        network.advance(10**12)
    console.print(f"compiling, or reading compiled code: {time.perf_counter() - before_s:.1f} s (20 s the first time)")
    settings = [(ACK_SHARE, False), (0.0, False), (ACK_SHARE, True)] if options.all else [(ACK_SHARE, False)]
    rows = [
        run(case, solver, ack_share, warm, options.seconds)
        for case in CASES
        if case.name.split(":")[0] in options.cases
        for solver in options.solvers
        for ack_share, warm in settings
    ]
    publish(options.out, "fluid_network", rows, title="The fluid network", notes=[noise()])
    for row in rows:
        if row["solver"] == "auto":
            # on a machine that others use, the CPU's seconds are the ones that say what this costs
            setting = f"{row['windows']} windows, {'with' if row['acks'] == 'yes' else 'without'} acknowledgements"
            reached = f"{row['transfers/CPU s']:,.0f} of {row['goal']:,.0f} transfers per CPU second"
            text = f"{row['case']}, {setting}: {reached}"
            console.print(goal(text, row["transfers/CPU s"] >= row["goal"]))


if __name__ == "__main__":
    main()
