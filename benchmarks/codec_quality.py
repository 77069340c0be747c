"""What each scheme does to learning: closed loop, equal tuning budget, paired seeds, at equal tokens and equal time.

    python benchmarks/codec_quality.py --processes 2              # everything that is missing, hours; then the report
    python benchmarks/codec_quality.py --schemes sign int8        # some schemes
    python benchmarks/codec_quality.py --report                   # tables and plots of what is there

Four members train a byte GPT of 0.25 million parameters with H = 15. Each scheme gets up to six trials of half the
length on a seed of its own to choose its outer optimiser, momentum and beta (SparseLoCo ten: its best kept lying at the
edge); the best trial's setting then runs on three seeds. Schemes with one seed were not tuned: they run with what was
best for their kind.
Finished runs are lines of `results/codec_quality.jsonl`: what is there is not run again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from quality_report import measure_speeds, publish_all, rows_of
from report import arguments, console, noise

from farflung.protocol.errors import ConfigError
from farflung.sim.bench.closed_loop import DATA_PARALLEL, Outcome, Setting, small_task
from farflung.sim.bench.runs import Runs

RESULTS = Path(__file__).parent / "results" / "codec_quality.jsonl"
SPEEDS = RESULTS.with_name("codec_speeds.csv")
TUNING_SEED, SEEDS = 100, (0, 1, 2)
ROUNDS = 100


class Trial(NamedTuple):
    """One choice of what is tuned."""

    spec: str
    """{coder} in it stands for "|ans" in what is shown and for nothing in trials: it recodes without loss."""
    outer: str
    lr: float = 2e-3
    """Of the inner optimiser."""


class Scheme(NamedTuple):
    """A published scheme, or ours, and the six trials of its budget."""

    name: str
    trials: tuple[Trial, ...]
    seeds: int = 3
    """How many of SEEDS the chosen trial runs on."""
    dense: bool = False
    """Whether payloads add up on the way, so that an all-reduce can carry them."""


def outer(lr: float, momentum: float = 0.0) -> str:
    return f"nesterov(lr={lr},momentum={momentum})" if momentum else f"sgd(lr={lr})"


DENSE = (outer(0.9, 0.6), outer(0.7, 0.3), outer(0.4, 0.8), outer(1.0), outer(0.7, 0.6), outer(0.5, 0.6))
"""For what is unbiased or nearly so; what was best without a codec comes last, for those with fewer trials."""
SPARSE = ((0.95, outer(1.0)), (1, outer(1.0)), (0.9, outer(1.0)), (0.95, outer(0.7)), (0.95, outer(0.7, 0.3)))
SPARSE = (*SPARSE, (1, outer(0.7, 0.3)))
"""(beta, outer) for what leaves most of an update out."""
EDGE = ((0.95, outer(1.4)), (0.95, outer(2.0)), (0.95, outer(2.8)), (0.95, outer(4.0)))
"""More trials for SparseLoCo, whose best of the six lay at the edge of what they try, until one was worse again."""
AHEAD = (("1", outer(1.0)), ("0.75", outer(1.0)), ("0.5", outer(1.0)), ("0.25", outer(1.0)))
AHEAD = (*AHEAD, ("0.5", outer(0.7, 0.3)), ("0.5", outer(0.5, 0.6)))
"""(lambda, outer) for low rank with lookahead."""
LOWRANK = "lookahead({0})|ef(1)|rules(1d=q2, else=lowrank(8, shared)|q2{coder})"
STAT = "stat(2,block=1024)"
RELAXED = ((f"0.25 {STAT}", outer(2.0)), (f"0.25 {STAT}", outer(2.8)), (f"0.1 {STAT}", outer(2.8)))
RELAXED = (*RELAXED, (f"0.4 {STAT}", outer(2.8)), ("0.25 sign", outer(2.8)))
"""(lambda and the format of values, outer) for sparse with lookahead."""
OWN = "lookahead({0})|ef(0.95)|tiles(64)|topk(64/4096)|{1}{coder}"


def ahead(name: str, spec: str, pairs: tuple[tuple[str, str], ...]) -> Scheme:
    """`spec` has {0} in it, and {1} where the pairs' first texts are two words."""
    return Scheme(name, tuple(Trial(spec.format(*words.split(), coder="{coder}"), text) for words, text in pairs))


def dense(name: str, spec: str, *, adds: bool = False, seeds: int = 3, trials: int = 6) -> Scheme:
    return Scheme(name, tuple(Trial(spec, text) for text in DENSE[-trials:]), seeds, adds)


def sparse(name: str, spec: str, *, seeds: int = 3, trials: int = 6) -> Scheme:
    """`spec` has {beta} in it."""
    pairs = (*SPARSE, *EDGE)[:trials]
    return Scheme(name, tuple(Trial(spec.replace("{beta}", str(beta)), text) for beta, text in pairs), seeds)


SCHEMES = (
    Scheme(DATA_PARALLEL, tuple(Trial(DATA_PARALLEL, "", lr) for lr in (1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3)), 3, True),
    dense("diloco-fp32", "fp32", adds=True),
    dense("bf16", "bf16", adds=True),
    dense("int8", "int8"),
    dense("q2 + ef", "ef(1)|q2", trials=3),
    dense("sign + ef", "ef(1)|sign"),
    sparse("sparseloco", "ef({beta})|tiles(64)|topk(64/4096)|stat(2,block=1024){coder}", trials=10),
    ahead("lookahead + low rank", LOWRANK, AHEAD),
    ahead("farflung", OWN, RELAXED),
    dense("opendiloco-fp16", "fp16", adds=True, trials=1),
    dense("int4", "int4", trials=1),
    dense("streaming-e3m0", "e3m0", trials=1),
    dense("qsgd", "qsgd", seeds=1, trials=1),
    dense("loco-4bit", "ef(1)|int4", trials=1),
    dense("muloco-2bit", "ef(0.9)|stat(2)", trials=1),
    sparse("powersgd-r4", "ef({beta})|lowrank(4)|fp16", trials=1),
    sparse("dilocox", "ef({beta})|lowrank(4)|int4", trials=1),
    Scheme("demo-like", (Trial("ef(0.95)|dct(64)|topk(32/4096)|stat(2,block=1024){coder}", outer(2.8)),)),
)
"""Those with one trial were not tuned: they run with what was best for their kind."""


WIDER = {
    "lookahead + low rank": "lookahead(0.5)|ef(1)|rules(1d=q2, else=lowrank(171, shared)|q2|ans)",
    "powersgd-r4": "ef(1)|lowrank(85)|fp16",
    "dilocox": "ef(1)|lowrank(85)|int4",
}
"""For codec speeds: what sends as many bits per parameter on matrices 2048 wide as on ours, 96 wide."""


def parses(trial: Trial) -> bool:
    try:
        setting_of(trial, TUNING_SEED, 1)
    except ConfigError as error:
        console.print(f"left out: {error}".splitlines()[0], highlight=False)
        return False
    return True


def setting_of(trial: Trial, seed: int, rounds: int, *, coder: str = "") -> Setting:
    task = replace(small_task(seed), lr=trial.lr)
    return Setting(trial.spec.replace("{coder}", coder), trial.outer or outer(1.0), seed=seed, rounds=rounds, task=task)


def trials_of(scheme: Scheme, rounds: int) -> list[Setting]:
    """Nothing to run where there is no choice."""
    if len(scheme.trials) == 1:
        return []
    return [setting_of(trial, TUNING_SEED, rounds // 2) for trial in scheme.trials]


def chosen(scheme: Scheme, runs: Runs, rounds: int) -> Trial | None:
    """The best trial, once all have run."""
    settings = trials_of(scheme, rounds)
    if not settings:
        return scheme.trials[0]
    if not all(setting in runs for setting in settings):
        return None
    return min(zip(scheme.trials, settings, strict=True), key=lambda pair: runs[pair[1]].loss)[0]


def finals_of(scheme: Scheme, runs: Runs, rounds: int) -> list[Setting]:
    trial = chosen(scheme, runs, rounds)
    if trial is None:
        return []
    return [setting_of(trial, seed, rounds, coder="|ans") for seed in SEEDS[: scheme.seeds]]


def tell(setting: Setting, outcome: Outcome) -> None:
    console.print(
        f"{outcome.loss:.4f}  {outcome.bits:8.4f} b/p  {outcome.wall_s:5.0f} s  {setting.rounds} rounds, seed "
        f"{setting.seed}: {setting.spec}  {setting.outer}",
        highlight=False,
    )


def run_schemes(schemes: Sequence[Scheme], runs: Runs, processes: int, rounds: int) -> None:
    """Trials of all schemes, then what was chosen: the processes are never idle for long."""
    runs.complete([item for scheme in schemes for item in trials_of(scheme, rounds)], processes=processes, tell=tell)
    runs.complete(
        [item for scheme in schemes for item in finals_of(scheme, runs, rounds)], processes=processes, tell=tell
    )


def pick(names: Iterable[str]) -> list[Scheme]:
    """The schemes of these names, or all, whose codecs exist."""
    wanted = list(names)
    known = [scheme.name for scheme in SCHEMES]
    for name in wanted:
        if name not in known:
            raise SystemExit(f"no such scheme: {name!r}; there are {', '.join(known)}")
    picked = [scheme for scheme in SCHEMES if not wanted or scheme.name in wanted]
    return [scheme for scheme in picked if parses(scheme.trials[0])]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--schemes", nargs="*", default=[])
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only tables and plots of what is there")
    parser.add_argument("--speeds", action="store_true", help="measure codec speeds again, for the time tables")
    parser.add_argument("--plots", type=Path, default=RESULTS.parent, help="where plots go")
    args = parser.parse_args()
    runs = Runs(args.results)
    if not args.report:
        run_schemes(pick(args.schemes), runs, args.processes, args.rounds)
    finals = {scheme.name: finals_of(scheme, runs, args.rounds) for scheme in pick([])}
    rows = rows_of(finals, runs)
    if args.speeds:
        measure_speeds(rows, SPEEDS, WIDER)
    if args.schemes:
        return
    publish_all(rows, args.out, args.plots, SPEEDS)
    console.print(f"{len(runs)} runs in {args.results}; {noise()}", highlight=False)


if __name__ == "__main__":
    main()
