"""Is our own codec worth having? Bits and loss beside entropy-coded SparseLoCo's, and what each part does.

    python benchmarks/own_codec.py frontier --processes 2     # E1: 3 or 4 rates x 3 seeds of every family
    python benchmarks/own_codec.py parts --processes 2        # E2: one part taken away at a time
    python benchmarks/own_codec.py report                     # what is there

The setting is that of `codec_quality.py`: trials of half the length at the middle rate, on a seed of their own; five or
six for ours, ten for SparseLoCo, whose best kept lying at the edge of what was tried. The goal: at equal loss, 1.5
times fewer bits than SparseLoCo with its payload coded to the entropy, at the best of its outer rates for each density.

Two designs of ours: low rank with lookahead, which misses the goal, and sparse signs with a little lookahead and an
over-relaxed outer step (the preset `farflung`), which reaches it. Low rank is even flattered here: with a width of 96,
rank 1 is already 1 % of full rank; what rank 4 is here, rank 170 is at a width of 4096 for the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from codec_quality import (
    AHEAD,
    EDGE,
    RELAXED,
    RESULTS,
    ROUNDS,
    SEEDS,
    SPARSE,
    TUNING_SEED,
    Trial,
    outer,
    parses,
    setting_of,
    tell,
)
from report import arguments, console, goal, publish

from farflung.sim.bench.closed_loop import Setting
from farflung.sim.bench.quality import Estimate, bits_at, estimate, paired_gap
from farflung.sim.bench.quality_plots import draw_frontiers
from farflung.sim.bench.runs import Runs
from farflung.sim.report.drawing import house_settings, write_png

SAVING = 1.5
PART_SEEDS = (TUNING_SEED, 0, 1)


class Family(NamedTuple):
    """A scheme with a dial for its rate."""

    name: str
    spec: str
    """{rate} is the dial, {coder} the entropy coder or nothing, and {0} what a trial tunes."""
    rates: tuple[int, ...]
    trials: tuple[tuple[str, str], ...]
    """(what goes into {0}, and {1} if it is two words, outer optimiser)."""

    def text(self, rate: int, tuned: str, *, coder: str = "|ans") -> str:
        """The spec at a rate."""
        return self.spec.format(*tuned.split(), rate=rate, coder=coder)


BETAS = tuple((str(beta), text) for beta, text in (*SPARSE, *EDGE))

SPARSE_SPEC = "ef({0})|tiles(64)|topk({rate}/4096)|stat(2,block=1024){coder}"
AHEAD_SPARSE_SPEC = "lookahead({0})|ef(0.95)|tiles(64)|topk({rate}/4096)|{1}{coder}"
AHEAD_LOWRANK_SPEC = "lookahead({0})|ef(1)|rules(1d=q2, else=lowrank({rate})|q2{coder})"
AHEAD_SHARED_SPEC = "lookahead({0})|ef(1)|rules(1d=q2, else=lowrank({rate}, shared)|q2{coder})"
FAMILIES = (
    Family("sparseloco", SPARSE_SPEC, (32, 64, 128), BETAS),
    Family("sparseloco, lr 2", SPARSE_SPEC, (32, 64, 128), (("0.95", outer(2.0)),)),
    Family("sparseloco, lr 1 as published", SPARSE_SPEC, (32, 64, 128), (("0.95", outer(1.0)),)),
    Family("ahead, sparse", AHEAD_SPARSE_SPEC, (16, 32, 64, 128), RELAXED),
    Family("ahead, low rank", AHEAD_LOWRANK_SPEC, (2, 4, 8), AHEAD),
    Family("ahead, low rank, shared basis", AHEAD_SHARED_SPEC, (4, 8, 16), AHEAD),
)


def trials_of(family: Family, rounds: int) -> list[Setting]:
    middle = family.rates[len(family.rates) // 2]
    return [
        setting_of(Trial(family.text(middle, tuned, coder=""), text), TUNING_SEED, rounds // 2)
        for tuned, text in family.trials
    ]


def chosen(family: Family, runs: Runs, rounds: int) -> tuple[str, str] | None:
    """The best trial's (tuned, outer), once all have run."""
    settings = trials_of(family, rounds)
    if not all(setting in runs for setting in settings):
        return None
    return min(zip(family.trials, settings, strict=True), key=lambda pair: runs[pair[1]].loss)[0]


def points_of(family: Family, runs: Runs, tuning_rounds: int, rounds: int) -> list[list[Setting]]:
    """Per rate, the runs on all seeds."""
    best = chosen(family, runs, tuning_rounds)
    if best is None:
        return []
    tuned, text = best
    return [
        [setting_of(Trial(family.text(rate, tuned), text), seed, rounds) for seed in SEEDS] for rate in family.rates
    ]


def frontier_of(points: Sequence[Sequence[Setting]], runs: Runs, seed: int) -> list[tuple[float, float]]:
    """One seed's (bits, loss) at every rate that has run."""
    picked = [point[seed] for point in points]
    return [(runs[setting].bits, runs[setting].loss) for setting in picked if setting in runs]


def savings(
    ours: Sequence[Sequence[Setting]], theirs: Sequence[Sequence[Setting]], runs: Runs
) -> list[tuple[str, Estimate]]:
    """Their bits over ours at the loss of each of their rates, seed by seed; a loss beyond our points is left out."""
    found = []
    for point in theirs:
        ratios = []
        for seed, setting in enumerate(point):
            if setting in runs:
                bits = bits_at(frontier_of(ours, runs, seed), runs[setting].loss)
                ratios.append(runs[setting].bits / bits)
        known = [ratio for ratio in ratios if math.isfinite(ratio)]
        if known:
            bits = sum(runs[setting].bits for setting in point if setting in runs) / len(ratios)
            found.append((f"at the loss of {bits:.3f} bits ({len(known)} of {len(ratios)} seeds)", estimate(known)))
    return found


def best_of(points: Sequence[Sequence[Sequence[Setting]]], runs: Runs) -> list[Sequence[Setting]]:
    """Per rate, the family with the lowest mean loss: SparseLoCo's best outer rate falls with its density."""

    def mean(point: Sequence[Setting]) -> float:
        there = [runs[setting].loss for setting in point if setting in runs]
        return sum(there) / len(there) if there else math.inf

    return [min(choice, key=mean) for choice in zip(*points, strict=True)]


WHOLE = "lookahead(0.5)|ef(1)|rules(1d=q2, else=lowrank(4)|q2)"
PARTS = (
    ("whole", WHOLE, outer(1.0)),
    ("no lookahead", "ef(1)|rules(1d=q2, else=lowrank(4)|q2)", outer(1.0)),
    ("lambda 0.25", WHOLE.replace("0.5", "0.25"), outer(1.0)),
    ("lambda 0.75", WHOLE.replace("0.5", "0.75"), outer(1.0)),
    ("lambda 1", WHOLE.replace("0.5", "1"), outer(1.0)),
    ("outer nesterov 0.3", WHOLE, outer(0.7, 0.3)),
    ("outer nesterov 0.6", WHOLE, outer(0.5, 0.6)),
    ("shared basis, same bits", "lookahead(0.5)|ef(1)|rules(1d=q2, else=lowrank(8, shared)|q2)", outer(1.0)),
    ("factors fp16, same rank", "lookahead(0.5)|ef(1)|rules(1d=q2, else=lowrank(4)|fp16)", outer(1.0)),
    ("factors int4, same rank", "lookahead(0.5)|ef(1)|rules(1d=q2, else=lowrank(4)|int4)", outer(1.0)),
    ("factors int4, same bits", "lookahead(0.5)|ef(1)|rules(1d=q2, else=lowrank(2)|int4)", outer(1.0)),
    ("factors e3m0, same bits", "lookahead(0.5)|ef(1)|rules(1d=q2, else=lowrank(2)|e3m0)", outer(1.0)),
    ("factors sign, same bits", "lookahead(0.5)|ef(1)|rules(1d=q2, else=lowrank(8)|sign)", outer(1.0)),
    ("norms fp16", "lookahead(0.5)|ef(1)|rules(1d=fp16, else=lowrank(4)|q2)", outer(1.0)),
    (
        "embedding sparse, without lookahead",
        "rules(1d=ef(1)|q2, bytes*=ef(0.95)|topk(64/4096)|q2, else=lookahead(0.5)|ef(1)|lowrank(4)|q2)",
        outer(1.0),
    ),
    (
        "embedding with sparse residual",
        "lookahead(0.5)|ef(1)|rules(1d=q2, bytes*=mix(lowrank(4)|q2, topk(64/4096)|q2), else=lowrank(4)|q2)",
        outer(1.0),
    ),
    (
        "embedding with sign residual",
        "lookahead(0.5)|ef(1)|rules(1d=q2, bytes*=mix(lowrank(4)|q2, sign), else=lowrank(4)|q2)",
        outer(1.0),
    ),
    ("embedding at twice the rank", WHOLE.replace("1d=q2,", "1d=q2, bytes*=lowrank(8)|q2,"), outer(1.0)),
)
TILES, RELAX = "tiles(64)|topk(64/4096)|stat(2,block=1024)", outer(2.8)
SPARSE_PARTS = (
    ("whole", "lookahead(0.25)|ef(0.95)|tiles(64)|topk(64/4096)|sign", RELAX),
    ("values of 2 bits", f"lookahead(0.25)|ef(0.95)|{TILES}", RELAX),
    ("2 bits, no lookahead", f"ef(0.95)|{TILES}", RELAX),
    ("2 bits, lambda 0.1", f"lookahead(0.1)|ef(0.95)|{TILES}", RELAX),
    ("2 bits, lambda 0.4", f"lookahead(0.4)|ef(0.95)|{TILES}", RELAX),
    ("2 bits, lr 2", f"lookahead(0.25)|ef(0.95)|{TILES}", outer(2.0)),
    ("2 bits, lr 2, beta 1", f"lookahead(0.25)|ef(1)|{TILES}", outer(2.0)),
    ("2 bits, lr 2, no lookahead", f"ef(0.95)|{TILES}", outer(2.0)),
    ("the same by DCT", "ef(0.95)|dct(64)|topk(64/4096)|stat(2,block=1024)", outer(2.0)),
    ("the same with sign values", "ef(0.95)|tiles(64)|topk(64/4096)|sign", outer(2.0)),
    (
        "half of it low rank, lr 1.4",
        "ef(0.95)|mix(lowrank(2, shared)|q2, topk(32/4096)|stat(2,block=1024))",
        outer(1.4),
    ),
    ("2 bits, lr 1, no lookahead", f"ef(0.95)|{TILES}", outer(1.0)),
    ("2 bits, lr 1, lambda 0.5", f"lookahead(0.5)|ef(1)|{TILES}", outer(1.0)),
    ("2 bits, lr 1, lambda 1", f"lookahead(1)|ef(1)|{TILES}", outer(1.0)),
)
"""E2: what differs, and the codec with that difference. Half the length, without entropy coder."""


def parts_of(
    parts: Sequence[tuple[str, str, str]], rounds: int, seeds: Sequence[int]
) -> list[tuple[str, list[Setting]]]:
    """Every part's runs, the whole codec's first; without those whose stages do not exist."""
    trials = [(name, Trial(spec, text)) for name, spec, text in parts]
    return [(name, [setting_of(trial, seed, rounds // 2) for seed in seeds]) for name, trial in trials if parses(trial)]


def report_frontier(out: Path, plots: Path, runs: Runs, tuning_rounds: int, rounds: int) -> None:
    """The E1 table, and the verdict."""
    rows, points = [], {}
    drawn: dict[str, list[tuple[float, Estimate]]] = {}
    for family in FAMILIES:
        points[family.name] = points_of(family, runs, tuning_rounds, rounds)
        for rate, point in zip(family.rates, points[family.name], strict=False):
            there = [runs[setting] for setting in point if setting in runs]
            if there:
                loss = estimate([outcome.loss for outcome in there])
                bits = sum(outcome.bits for outcome in there) / len(there)
                drawn.setdefault(family.name, []).append((bits, loss))
                rows.append({"scheme": family.name, "rate": rate, "bits": bits, "loss": loss.mean, "ci": loss.half})
                rows[-1] |= {"seeds": loss.n, "rounds": rounds, "spec": point[0].spec, "outer": point[0].outer}
    notes = []
    published = [points[name] for name in points if name.startswith("sparseloco") and points[name]]
    if published:
        for name in [family.name for family in FAMILIES if family.name.startswith("ahead")]:
            for text, ratio in savings(points[name], best_of(published, runs), runs):
                notes.append(goal(f"{name}: {ratio} x fewer bits {text}", ratio.mean >= SAVING))
    publish(out, f"own_codec_frontier_{rounds}", rows, title=f"E1, {rounds} rounds", notes=notes)
    if drawn:
        title = "Our codec and entropy-coded SparseLoCo: loss over bits"
        caption = (
            f"Byte GPT of 0.25 M parameters, 4 members, H = 15, {rounds} rounds, 3 paired seeds, 95 % intervals; 5 to "
            "10 tuning trials per scheme at its middle rate. Low rank is flattered by matrices 96 wide."
        )
        with house_settings():
            name = f"own_codec_frontier_{rounds}"
            plots.mkdir(parents=True, exist_ok=True)
            write_png(draw_frontiers(drawn, name=name, title=title, caption=caption), plots)


def report_parts(name: str, parts: Sequence[tuple[str, str, str]], out: Path, runs: Runs, rounds: int) -> None:
    """The E2 table: gaps are to the whole codec, on the same seeds."""
    rows = []
    table = parts_of(parts, rounds, PART_SEEDS)
    for part, settings in table:
        there = [seed for seed, setting in enumerate(settings) if setting in runs and table[0][1][seed] in runs]
        if there:
            losses = [runs[settings[seed]].loss for seed in there]
            gap = paired_gap(losses, [runs[table[0][1][seed]].loss for seed in there])
            bits = sum(runs[settings[seed]].bits for seed in there) / len(there)
            rows.append({"part": part, "bits": bits, "loss": estimate(losses).mean, "gap_percent": 100 * gap.mean})
            rows[-1] |= {"ci_percent": 100 * gap.half, "seeds": len(there), "spec": settings[0].spec}
            rows[-1] |= {"outer": settings[0].outer}
    publish(out, name, rows, title=f"E2, {rounds // 2} rounds: {name}")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("what", choices=["tune", "frontier", "parts", "report"])
    parser.add_argument("--families", nargs="*", default=[family.name for family in FAMILIES])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tuning-rounds", type=int, default=ROUNDS, help="the length whose half a trial has")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--rates", type=int, nargs="*", default=range(9), help="positions of the rates to run")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--plots", type=Path, default=RESULTS.parent, help="where plots go")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = Runs(args.results)
    families = [family for family in FAMILIES if family.name in args.families]
    if args.what in ("tune", "frontier"):
        settings = [setting for family in families for setting in trials_of(family, args.tuning_rounds)]
        runs.complete(settings, processes=args.processes, tell=tell)
    if args.what == "frontier":
        points = [points_of(family, runs, args.tuning_rounds, args.rounds) for family in families]
        settings = [
            point[i][seed] for seed in range(args.seeds) for point in points for i in args.rates if i < len(point)
        ]
        runs.complete(settings, processes=args.processes, tell=tell)
    if args.what == "parts":
        settings = [
            setting
            for part in (SPARSE_PARTS, PARTS)
            for _, row in parts_of(part, args.rounds, PART_SEEDS[: args.seeds])
            for setting in row
        ]
        runs.complete(settings, processes=args.processes, tell=tell)
    report_frontier(args.out, args.plots, runs, args.tuning_rounds, args.rounds)
    report_parts("own_codec_sparse_parts", SPARSE_PARTS, args.out, runs, args.tuning_rounds)
    report_parts("own_codec_lowrank_parts", PARTS, args.out, runs, args.tuning_rounds)
    console.print(f"{len(runs)} runs in {args.results}", highlight=False)


if __name__ == "__main__":
    main()
