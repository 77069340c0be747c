"""What the outer step costs in quality: four members against one process, equal tokens, equal total batch.

    python benchmarks/warm_start.py --scratch     # a grid over outer lr and momentum for the demo's setting
    python benchmarks/warm_start.py --warm        # at least 60 rounds from a common warm start: goal within 5 %

Only the algorithm runs, no network (see local_rounds.py): the figures are the same on every machine, up to the last
bits of the inner training, so this one benchmark is not disturbed by what else the machine does.
"""

from __future__ import annotations

import itertools
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from local_rounds import Setting, train_alone, train_together
from report import arguments, console, goal, publish

from farflung.node.flat import read_parameters, schema_of
from farflung.node.tasks.stdlib_gpt import StdlibGpt

PRETRAIN_STEPS = 500
WITHIN_SCRATCH, WITHIN_WARM = 1.15, 1.05


def model_of(args: Any) -> StdlibGpt:
    return StdlibGpt(layers=args.layers, width=args.width, context=args.context, batch=args.batch, lr=args.lr)


def outer_of(lr: float, momentum: float) -> str:
    return f"nesterov(lr={lr},momentum={momentum})" if momentum else f"sgd(lr={lr})"


def together(setting: Setting, start: Path | None) -> dict[str, Any]:
    """One cell of the grid, in a process of its own."""
    torch.set_num_threads(1)
    began_s = time.perf_counter()
    curve = []

    def note(index: int, anchor: Any, model: Any) -> None:
        if setting.rounds - index in (0, setting.rounds // 2):
            curve.append(setting.task.evaluate(model))

    result = train_together(setting, None if start is None else torch.load(start), note)
    return {
        "loss": result["loss"],
        "half": curve[0],
        "payload_bytes": result["payload_bytes"],
        "parameters": result["anchor"].schema.numel,
        "wall_s": time.perf_counter() - began_s,
    }


def alone(task: StdlibGpt, steps: int, start: Path | None) -> float:
    """The baseline's validation loss."""
    torch.set_num_threads(1)
    return task.evaluate(train_alone(task, steps, None if start is None else torch.load(start)).model)


def warm_parameters(task: StdlibGpt, out: Path, steps: int) -> Path:
    """A model pre-trained once, by one process on other data order, and kept under OUT."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"warm-{task.layers}x{task.width}x{task.context}-{task.batch}-{steps}.pt"
    if not path.exists():
        trained = train_alone(task, steps, seed=1).model
        theta_d = torch.empty(schema_of(trained).numel)
        read_parameters(trained, theta_d)
        torch.save(theta_d, path)
    return path


def compare(args: Any, name: str, base: Setting, start: Path | None, within: float) -> None:
    """Every outer lr, momentum and codec against the baseline; the lr schedule ends with the run."""
    scheduled = replace(base.task, decay_steps=base.steps if args.decay else 0, warmup=20)
    base = replace(base, task=scheduled)
    cells = [
        replace(base, codec=codec, outer=outer_of(lr, momentum))
        for codec, lr, momentum in itertools.product(args.codecs, args.outer_lr, args.momentum)
    ]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        baselines = {
            rate: pool.submit(alone, replace(base.alone, lr=base.task.lr * rate), base.steps, start)
            for rate in args.baseline_rates
        }
        pending = [pool.submit(together, cell, start) for cell in cells]
        losses = {rate: item.result() for rate, item in baselines.items()}
        best_alone = min(losses.values(), default=math.nan)
        rows = []
        for cell, item in zip(cells, pending, strict=True):
            result = item.result()
            ring = (
                2 * (cell.members - 1) / cell.members * 4 * result["parameters"]
            )  # sent per step by data-parallel fp32
            rows.append(
                {
                    "codec": cell.codec,
                    "outer": cell.outer,
                    "half-way": result["half"],
                    "loss": result["loss"],
                    "vs one process": result["loss"] / best_alone,
                    "fewer bytes": ring * cell.inner_steps / ((cell.members - 1) * result["payload_bytes"]),
                    "s": result["wall_s"],
                }
            )
            console.print(f"{cell.codec} {cell.outer}: {result['loss']:.4f}", highlight=False)
    rows.sort(key=lambda row: row["loss"])
    table = ", ".join(f"lr {base.task.lr * rate:g}: {loss:.4f}" for rate, loss in losses.items())
    task = base.task
    publish(
        args.out,
        f"warm_start_{name}",
        rows,
        title=f"{name}: {base.members} members, {base.rounds} rounds of H={base.inner_steps}, "
        f"{task.layers}x{task.width}, context {task.context}, batch {task.batch}, lr {task.lr:g}"
        f"{', cosine to 0.1' if args.decay else ''}",
        notes=[
            f"one process, batch {base.alone.batch}, {base.steps} steps: {table} (the best one counts)",
            "fewer bytes: sent per member, against an fp32 ring all-reduce of every step; a payload goes to 3 others",
            goal(
                f"best within {within - 1:.0%}: {rows[0]['vs one process'] - 1:+.1%}",
                rows[0]["loss"] <= within * best_alone,
            ),
        ],
    )


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--scratch", action="store_true", help="from scratch")
    parser.add_argument("--warm", action="store_true", help="from a common warm start")
    parser.add_argument("--rounds", type=int, default=0, help="0: 14 from scratch, 60 warm")
    parser.add_argument("--inner-steps", type=int, default=0, help="H; 0: 30 from scratch, 15 warm")
    parser.add_argument("--outer-lr", type=float, nargs="+", default=[0.5, 0.7, 1.0])
    parser.add_argument("--momentum", type=float, nargs="+", default=[0.0, 0.3, 0.6, 0.8])
    parser.add_argument("--codecs", nargs="+", default=["ef(1)|q2"])
    parser.add_argument("--baseline-rates", type=float, nargs="*", default=[1.0], help="factors on lr tried alone")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--no-decay", dest="decay", action="store_false")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one core each")
    parser.add_argument("--name", default="", help="suffix of the CSV file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task, suffix = model_of(args), args.name and f"_{args.name}"
    if args.scratch or not args.warm:
        setting = Setting(task, members=args.members, inner_steps=args.inner_steps or 30, rounds=args.rounds or 14)
        compare(args, f"scratch{suffix}", setting, None, WITHIN_SCRATCH)
    if args.warm:
        setting = Setting(task, members=args.members, inner_steps=args.inner_steps or 15, rounds=args.rounds or 60)
        start = warm_parameters(setting.alone, args.out, PRETRAIN_STEPS)
        console.print(f"warm start: {PRETRAIN_STEPS} steps, loss {alone(setting.alone, 0, start):.4f}", highlight=False)
        compare(args, f"warm{suffix}", setting, start, WITHIN_WARM)


if __name__ == "__main__":
    main()
