"""How long simulating takes with training in the loop: 40 home machines, a 0.36 M-parameter GPT, 20 rounds of H = 10.

    python benchmarks/in_the_loop.py [--members 40] [--rounds 20]

Every member is a real node with a real model: 40 x 20 x 10 training steps, 40 x 39 payloads a round, all protocol
messages, signatures and digests. Prints minutes on this machine, what share of them was training, and peak memory.
"""

from __future__ import annotations

import resource
import time

import torch
from report import arguments, noise, publish

from farflung.node.trainer import Trainer
from farflung.sim.draw import Draw
from farflung.sim.scenario import Members, Model, Network, Run, Scenario
from farflung.sim.training import run_training


def make_scenario(members: int, rounds: int) -> Scenario:
    options: dict[str, object] = {"layers": 3, "width": 96, "context": 64, "batch": 8, "validation_windows": 64}
    return Scenario(
        name=f"in-the-loop-{members}",
        fidelity="training",
        rounds=rounds,
        model=Model(task="builtin:stdlib-gpt", options=options),
        run=Run(inner_steps=10, grace_s=10.0),
        members=(
            Members(
                count=members,
                up_mbit=Draw("loguniform", (50, 500)),
                down_mbit=Draw.fixed(500),
                step_ms=Draw.fixed(100),
                jitter=0.1,
            ),
        ),
        network=Network(latency_ms=((20.0,),)),
    )


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--members", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    trained_s = 0.0
    step = Trainer.train_step

    def timed(self: Trainer) -> object:
        nonlocal trained_s
        began_s = time.perf_counter()
        try:
            return step(self)
        finally:
            trained_s += time.perf_counter() - began_s

    Trainer.train_step = timed  # type: ignore[assignment, method-assign]
    torch.set_num_threads(1)
    cpu_s = time.process_time()
    result = run_training(make_scenario(given.members, given.rounds), 0)
    cpu_s = time.process_time() - cpu_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    loss = result.final_loss if result.final_loss is not None else float("nan")
    figures = [
        ("wall clock", result.wall_s / 60, "min", "on whatever this machine had free"),
        ("processor", cpu_s / 60, "min", "of one core"),
        ("of it training", trained_s / 60, "min", "forward, backward, AdamW (wall clock)"),
        ("virtual time", result.duration_s, "s", f"finished: {result.finished}, validation {loss:.3f}"),
        ("events", result.extra["events"], "", f"{result.extra['transfers']:.0f} bulk transfers"),
        ("peak memory", peak_mb, "MB", f"{peak_mb / given.members:.1f} MB a member, torch included"),
    ]
    rows = [dict(zip(("what", "value", "unit", "note"), figure, strict=True)) for figure in figures]
    title = f"{given.members} members x {given.rounds} rounds, H=10, training in the loop"
    publish(given.out, "in_the_loop", rows, title=title, notes=[noise()])


if __name__ == "__main__":
    main()
