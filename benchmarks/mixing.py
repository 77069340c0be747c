"""Training by members that mix: push-sum, pairs and gather beside each other, to the end of a run.

    python benchmarks/mixing.py                        # what is missing of three seeds; then the report
    python benchmarks/mixing.py --seeds 0 --only K=2   # runs of one seed whose group or label has this in it
    python benchmarks/mixing.py --tune                 # what is missing of the trials that choose outer steps
    python benchmarks/mixing.py --report               # tables and picture of what is there

16 members, H = 15, 60 rounds, a byte GPT of 68 thousand parameters. Finished runs are lines of `results/mixing.jsonl`:
what is there is not run again. A run takes 25 s on a quiet core. Outer steps are chosen for each form of exchange by
the mean of the members' losses, in trials of half the length on a seed of their own (`results/mixing_trials.jsonl`).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from report import arguments, console, goal, noise, publish

from farflung.sim.bench.arena import arena_task
from farflung.sim.bench.mixing_loop import MixOutcome, mix
from farflung.sim.bench.mixing_plots import draw_gaps
from farflung.sim.bench.mixing_setting import (
    Accelerated,
    Exchange,
    Gather,
    MixSetting,
    Pace,
    Pairs,
    Persistent,
    PushSum,
)
from farflung.sim.bench.mixing_table import Entry, Line, cells_of, lines_of, rows_of
from farflung.sim.bench.runs import FinishedRuns
from farflung.sim.report.drawing import house_settings, write_png

RESULTS = Path(__file__).parent / "results" / "mixing.jsonl"
TRIALS = RESULTS.with_name("mixing_trials.jsonl")
PICTURES = Path(__file__).parent.parent / "docs"
SEEDS, TRIAL_SEED = (0, 1, 2), 100
ROUNDS, TRIAL_ROUNDS, INNER_STEPS = 60, 30, 15

GRID = (
    *(f"sgd(lr={lr})" for lr in (0.5, 0.7, 1.0)),
    *(f"nesterov(lr=0.4,momentum={momentum})" for momentum in (0.3, 0.5, 0.6)),
    *(f"nesterov(lr=0.2,momentum={momentum})" for momentum in (0.6, 0.8)),
    *(f"nesterov(lr=0.7,momentum={momentum})" for momentum in (0.3, 0.5)),
    *(f"heavy-ball(lr=0.4,momentum={momentum})" for momentum in (0.3, 0.5)),
    "heavy-ball(lr=0.7,momentum=0.5)",
)
"""Outer steps that are tried."""

TUNED: dict[str, Exchange] = {
    "gather": Gather(),
    "K=2": PushSum(2),
    "K=1": PushSum(1),
    "pairs": Pairs(),
    "pairs, clipped": Pairs(radius=1.0),
    "persistent, K=2": Persistent(2),
    "persistent, K=1": Persistent(1),
}
"""What outer steps are chosen for. Push-sum with K = period is gather, and takes its step."""

OUTER = "nesterov(lr=0.4,momentum=0.5)"
"""The best of the trials for every form of exchange, so that all rows have it."""
GASLOC = "gasloc(lr=0.4,alpha=1.0,gamma=0.5)"
"""The same step for the mean of members; members take it before they mix."""
NOLOCO = "heavy-ball(lr=0.7,momentum=0.5)"
"""arXiv:2506.10911's own, not tuned."""

PACES = (Pace(15, 2), Pace(9, 4), Pace(6, 2), Pace(4, 4))
"""Four times as fast as each other, evenly in between; batches differ so that tokens are not steps."""

LOSS, LOSS_TWICE = 0.2, 0.04
"""Of messages, and of those of them that are said once more."""

WORST_CLAIM = 100_000
"""A cap on claims that nobody reaches here."""
POLICIES = ("uniform", f"steps(cap={WORST_CLAIM})", f"tokens(cap={WORST_CLAIM})", f"fednova(cap={WORST_CLAIM})")

LIES = ("sign-flip(scale=10)", "gaussian(scale=100)", "scale-poisoning", "dissensus(scale=10)")
LIARS = 2


def entries() -> list[Entry]:
    """Every row of the table."""
    return [*exchanges(), *lossy(), *lied_to(), *coded(), *cooled(), *weighted()]


FORMS: dict[str, Exchange] = {
    "gather": Gather(),
    "push-sum, K=4 (period)": PushSum(),
    "push-sum, K=2": PushSum(2),
    "push-sum, K=1": PushSum(1),
    "pairs": Pairs(),
    "pairs, clipped": Pairs(radius=1.0),
    "persistent, K=2": Persistent(2),
    "persistent, K=1": Persistent(1),
}


def exchanges() -> list[Entry]:
    """What an exchange that is not exact costs."""
    rows = [entry("exchange", label, exchange, "gather") for label, exchange in FORMS.items()]
    other = [entry("exchange", f"GASLoC, K={k}", Accelerated(k), "gather", outer=GASLOC) for k in (2, 1)]
    return [*rows, *other, entry("exchange", "NoLoCo", Pairs(), "gather", outer=NOLOCO)]


def cooled() -> list[Entry]:
    """The same, where the learning rate falls to a tenth by the end: members come to agree."""
    return [
        entry("falling learning rate", f"{label}, falling", FORMS[label], "gather, falling", falling=True)
        for label in ("gather", "push-sum, K=2", "push-sum, K=1", "pairs", "persistent, K=2")
    ]


def lossy() -> list[Entry]:
    """What 20 % message loss costs, each against the same exchange without."""
    forms: dict[str, Exchange] = {
        "push-sum, K=4 (period)": PushSum(loss=LOSS),
        "push-sum, K=2": PushSum(2, loss=LOSS),
        "push-sum, K=1": PushSum(1, loss=LOSS),
        "pairs": Pairs(loss=LOSS),
        "persistent, K=1": Persistent(1, loss=LOSS),
    }
    twice: dict[str, Exchange] = {
        "push-sum, K=4 (period)": PushSum(loss=LOSS_TWICE),
        "push-sum, K=2": PushSum(2, loss=LOSS_TWICE),
        "pairs": Pairs(loss=LOSS_TWICE),
    }
    rows = [entry("20 % loss", f"{label}, 20 % loss", exchange, label) for label, exchange in forms.items()]
    whole = "push-sum, K=4 (period)"
    return [
        *rows,
        entry("20 % loss", "push-sum, K=6, 20 % loss", PushSum(6, loss=LOSS), whole),
        *(entry("20 % loss", f"{label}, 20 % loss, sent twice", exchange, label) for label, exchange in twice.items()),
        entry("20 % loss", "push-sum, K=4, 20 % loss, no ledger", PushSum(loss=LOSS, ledger=False), whole),
        entry(
            "20 % loss",
            "persistent, K=1, 20 % loss, no ledger",
            Persistent(1, loss=LOSS, ledger=False),
            "persistent, K=1",
        ),
    ]


def coded() -> list[Entry]:
    """What rounding costs, in flow form."""
    return [
        entry("codec", f"push-sum, K=4, {codec}", PushSum(flow=codec), "push-sum, K=4 (period)")
        for codec in ("int8", "int4")
    ]


def weighted() -> list[Entry]:
    """Policies of weights when members are unequally fast: gather against uniform, push-sum against gather."""
    rows = []
    for policy in POLICIES:
        name = policy.partition("(")[0]
        gather, push_sum = f"gather, {name}", f"push-sum, K=4, {name}"
        rows.append(entry("4x speeds", gather, Gather(policy), "gather, uniform", paces=PACES))
        rows.append(entry("4x speeds", push_sum, PushSum(weights=policy), gather, paces=PACES))
    return rows


def lied_to() -> list[Entry]:
    """Two liars among sixteen, in pairs that are clipped and in pairs that are not."""
    return [
        entry("2 liars", f"{label}, {lie.partition('(')[0]}", Pairs(radius=radius, attack=lie, liars=LIARS), "pairs")
        for lie in LIES
        for label, radius in (("clipped", 1.0), ("plain mean", None))
    ]


def entry(
    group: str,
    label: str,
    exchange: Exchange,
    reference: str,
    *,
    outer: str = OUTER,
    paces: tuple[Pace, ...] = (),
    falling: bool = False,
) -> Entry:
    """A row of the full length. With `falling`, the learning rate falls by a cosine to a tenth at the end."""
    task = replace(arena_task(0), decay_steps=ROUNDS * INNER_STEPS if falling else 0)
    setting = MixSetting(exchange, outer, rounds=ROUNDS, inner_steps=INNER_STEPS, paces=paces, task=task)
    return Entry(group, label, setting, reference)


def seeded(row: Entry, seed: int) -> MixSetting:
    """The row's run of one seed."""
    return replace(row.setting, seed=seed, task=replace(row.setting.task, seed=seed))


def trials_of() -> list[MixSetting]:
    """Half the length, another seed."""
    return [
        MixSetting(exchange, outer, seed=TRIAL_SEED, rounds=TRIAL_ROUNDS, task=arena_task(TRIAL_SEED))
        for exchange in TUNED.values()
        for outer in GRID
    ]


class Progress:
    """A line for each finished run."""

    def __init__(self, missing: int) -> None:
        self.missing, self.done = missing, 0

    def __call__(self, setting: MixSetting, outcome: MixOutcome) -> None:
        self.done += 1
        console.print(
            f"{self.done}/{self.missing}  {outcome.loss:.4f}, mean model {outcome.mean_loss:.4f}  "
            f"{outcome.wall_s:4.0f} s  {setting.exchange}, {setting.outer}, seed {setting.seed}",
            highlight=False,
        )


def complete(runs: FinishedRuns[MixSetting, MixOutcome], settings: Sequence[MixSetting], jobs: int) -> None:
    runs.complete(settings, processes=jobs, tell=Progress(sum(setting not in runs for setting in settings)))


def publish_trials(trials: FinishedRuns[MixSetting, MixOutcome], out: Path) -> None:
    """One row per outer step, a column per exchange: the mean of the members' losses."""
    rows: list[dict[str, Any]] = []
    for outer in GRID:
        row: dict[str, Any] = {"outer": outer}
        for label, exchange in TUNED.items():
            setting = next(
                s for s in trials_of() if s.exchange == exchange and s.outer == MixSetting(exchange, outer).outer
            )
            row[label] = trials[setting].loss if setting in trials and math.isfinite(trials[setting].loss) else None
        rows.append(row)
    best = [min((row for row in rows if row[label]), key=lambda row: row[label], default=None) for label in TUNED]
    notes = [f"best for {label}: {row['outer']}" for label, row in zip(TUNED, best, strict=True) if row]
    title = f"Mean of the members' losses after {TRIAL_ROUNDS} rounds, seed {TRIAL_SEED}"
    publish(out, "mixing_trials", rows, title=title, notes=notes)


def publish_all(runs: FinishedRuns[MixSetting, MixOutcome], out: Path, pictures: Path) -> None:
    """The table to `out`, the picture to `pictures`."""
    lines = lines_of(runs, entries(), SEEDS, seeded)
    title = "Loss at the end, in nats per byte, and what it is over that of the row it is compared with"
    publish(out, "mixing", rows_of(lines), title=title, notes=verdicts(lines))
    write_cells(out / "mixing_cells.csv", lines)
    if lines:
        pictures.mkdir(parents=True, exist_ok=True)
        seeds = max(line.seeds for line in lines)
        caption = (
            "Validation loss over that of the row named in the table, in percent, with the standard deviation over "
            f"up to {seeds} paired seeds. 16 members, H = 15, {ROUNDS} rounds, byte GPT of 68 thousand parameters."
        )
        with house_settings():
            title = "What an exchange costs that is inexact, lossy, rounded, weighted or lied to"
            write_png(draw_gaps(lines, name="mixing_gaps", title=title, caption=caption), pictures)


def write_cells(path: Path, lines: Sequence[Line]) -> None:
    """Everything about every row."""
    cells = cells_of(lines)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(cells[0]) if cells else [])
        writer.writeheader()
        writer.writerows(cells)


def verdicts(lines: Iterable[Line]) -> list[str]:
    """The goals that have been met, and those that have not."""
    by_label = {line.entry.label: line for line in lines}
    notes = []
    for label, line in by_label.items():
        both = f"members {_percent(line.members.mean)}, mean model {_percent(line.mean_model.mean)}"
        worse = max(line.members.mean, line.mean_model.mean)
        if label in ("push-sum, K=2", "push-sum, K=2, falling"):
            notes.append(goal(f"K=2 is within 1 % of gather: {label}: {both}", worse <= 0.01))
        elif line.entry.group == "20 % loss" and "no ledger" not in label:
            notes.append(goal(f"20 % loss costs at most 0.5 %: {label}: {both}", worse <= 0.005))
        elif line.entry.group == "2 liars" and label.startswith("clipped"):
            plain = by_label.get(label.replace("clipped", "plain mean"))
            other = f"; plain mean {_percent(plain.members.mean)}" if plain else ""
            notes.append(goal(f"2 liars of 16 cost at most 6 %: {label}: {both}{other}", worse <= 0.06))
    return notes


def _percent(gap: float) -> str:
    return f"{100 * gap:+.2f} %" if math.isfinite(gap) else "lost"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(out=RESULTS.parent)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--only", nargs="*", default=[], help="run rows with these texts in group or label")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, choices=SEEDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--trials", type=Path, default=TRIALS)
    parser.add_argument("--tune", action="store_true", help="the trials instead of the runs")
    parser.add_argument("--report", action="store_true", help="only tables and picture of what is there")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="where mixing_gaps.png goes")
    args = parser.parse_args()
    runs: FinishedRuns[MixSetting, MixOutcome] = FinishedRuns(
        args.trials if args.tune else args.results, MixOutcome, mix
    )
    if not args.report:
        rows = [row for row in entries() if all(text in f"{row.group} {row.label}" for text in args.only)]
        settings = trials_of() if args.tune else [seeded(row, seed) for seed in args.seeds for row in rows]
        complete(runs, settings, args.jobs)
    if args.tune:
        publish_trials(runs, args.out)
    else:
        publish_all(runs, args.out, args.pictures)
    console.print(f"{len(runs)} runs in {runs.path}; {noise()}", highlight=False)


if __name__ == "__main__":
    main()
