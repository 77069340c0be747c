"""The numbers of a report: one summary per variant, the answer in one sentence, and what a reader must doubt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from farflung.sim.report.attribution import (
    MEANING,
    TOLERANCE,
    UNATTRIBUTED,
    CauseShare,
    attribute,
    critical_path,
    culprit_text,
    most_lost,
    seconds_by_cause,
)
from farflung.sim.report.bands import (
    NEVER,
    Band,
    band_of,
    band_text,
    count_text,
    duration_band_text,
    duration_text,
    figures,
    percent_text,
)
from farflung.sim.report.variants import Changes, Variant, changed_value, variants
from farflung.sim.results import RunResult
from farflung.sim.scenario import Scenario

__all__ = ["VariantSummary", "critical_path", "doubts", "headline", "leader", "loss_kind", "summarise", "summary_of"]

ESTIMATE = "estimate"
WORTH_NAMING = 0.1
"""Part of the biggest cause from which on the headline names the member behind it."""

KINDS = {"validation": "validation", "training": "training", ESTIMATE: "est.", "mixed": "mixed kinds"}
"""How a loss came about, and how tables say it."""


@dataclass(frozen=True)
class VariantSummary:
    """What the seeds of one variant say together. Bands hold `inf` for seeds that never got there."""

    label: str
    scenario: str
    changes: Changes
    seeds: tuple[int, ...]
    members: int
    """Of the median seed."""

    finished: int
    """Seeds whose rounds were all trained within the limit."""

    duration_s: Band
    stopped_s: float
    """When the seeds that did not finish were stopped (the latest); 0 if all finished."""

    goal: float
    """The loss asked for; 0 if it is not known."""

    goal_s: Band | None
    """Time to the goal. None if none was asked."""

    reached: int
    """Seeds that reached it."""

    utilisation: Band | None
    bytes_per_member_round: Band | None
    """Sent, headers not counted, by a member of the round. None if there were no rounds."""

    rounds: Band
    final_loss: Band | None
    loss_kind: str
    """A key of `KINDS`; empty without a loss."""

    diverged: int
    """Seeds whose final loss is not finite."""

    path: tuple[CauseShare, ...]
    """Whose fault the time is, largest first."""


def summarise(results: Iterable[RunResult], scenario: Scenario | None = None) -> list[VariantSummary]:
    """One summary per variant, in their order. Raises ConfigError if there are no results.

    With the scenario a goal that no seed reached is known to have been asked for.
    """
    return [summary_of(variant, scenario) for variant in variants(results)]


def summary_of(variant: Variant, scenario: Scenario | None = None) -> VariantSummary:
    """All numbers of one variant."""
    runs = variant.runs
    goal = float(changed_value(variant.changes, "loss_goal") or (scenario.loss_goal if scenario else 0.0))
    asked = goal > 0 or any(run.time_to_goal_s is not None for run in runs)
    losses = [_final_loss(run) for run in runs if run.final_loss is not None]
    duration_s = band_of(run.duration_s if run.finished else NEVER for run in runs)
    rounds = band_of(len(run.rounds) for run in runs)
    assert duration_s is not None  # a variant has at least one run
    assert rounds is not None
    return VariantSummary(
        label=variant.label,
        scenario=variant.scenario,
        changes=variant.changes,
        seeds=tuple(run.seed for run in runs),
        members=round(median(len(run.members) for run in runs)),
        finished=sum(1 for run in runs if run.finished),
        duration_s=duration_s,
        stopped_s=max((run.duration_s for run in runs if not run.finished), default=0.0),
        goal=goal,
        goal_s=band_of(NEVER if run.time_to_goal_s is None else run.time_to_goal_s for run in runs) if asked else None,
        reached=sum(1 for run in runs if run.time_to_goal_s is not None),
        utilisation=band_of(run.utilisation for run in runs),
        bytes_per_member_round=band_of(bytes_per_member_round(run) for run in runs if member_rounds(run)),
        rounds=rounds,
        final_loss=band_of(losses),
        loss_kind=_kind_of_all(runs),
        diverged=losses.count(NEVER),
        path=attribute(variant),
    )


def member_rounds(run: RunResult) -> int:
    """Rounds times members, with the members that each round had."""
    return sum(item.members for item in run.rounds)


def bytes_per_member_round(run: RunResult) -> float:
    """Bytes that a member sends in a round, on average, headers not counted. The run must have rounds."""
    return run.bytes_sent / member_rounds(run)


def loss_kind(run: RunResult) -> str:
    """What `final_loss` is: validation or training if any round measured one, else an estimate; "" without one."""
    if run.final_loss is None:
        return ""
    if any(item.validation is not None for item in run.rounds):
        return "validation"
    return "training" if any(item.loss is not None for item in run.rounds) else ESTIMATE


def _kind_of_all(runs: Sequence[RunResult]) -> str:
    kinds = sorted({loss_kind(run) for run in runs} - {""})
    return "mixed" if len(kinds) > 1 else "".join(kinds)


def _final_loss(run: RunResult) -> float:
    """A loss that is not finite counts as infinite: the worst there is, and not left out of the median."""
    assert run.final_loss is not None
    return run.final_loss if math.isfinite(run.final_loss) else NEVER


def goal_text(summary: VariantSummary) -> str:
    """Time to the goal, or how many seeds reached it; "" if none was asked."""
    if summary.goal_s is None:
        return ""
    if not summary.reached:
        return "not reached"
    text = duration_band_text(summary.goal_s, never="not reached")
    text += " est." * (summary.loss_kind == ESTIMATE)
    return text if summary.reached == len(summary.seeds) else f"{text}; {summary.reached} of {len(summary.seeds)} seeds"


def total_text(summary: VariantSummary) -> str:
    """Time of all rounds, or what became of them."""
    if not summary.finished:
        return f"not finished in {duration_text(summary.stopped_s)}"
    text = duration_band_text(summary.duration_s, never="not finished")
    if summary.finished == len(summary.seeds):
        return text
    return f"{text}; {summary.finished} of {len(summary.seeds)} seeds finished"


def loss_text(summary: VariantSummary) -> str:
    """The final loss with its kind; seeds that diverged are counted."""
    if summary.final_loss is None:
        return "-"
    text = f"{band_text(summary.final_loss, '{:.3f}'.format, never='diverged')} {KINDS[summary.loss_kind]}"
    return f"{text}; {summary.diverged} of {len(summary.seeds)} diverged" if summary.diverged else text


def run_loss_text(run: RunResult) -> str:
    """The final loss of one run with its kind."""
    if run.final_loss is None:
        return "-"
    return f"{run.final_loss:.4f} {KINDS[loss_kind(run)]}" if math.isfinite(run.final_loss) else "diverged"


def lost_text(summary: VariantSummary) -> str:
    """The biggest cause of lost time, its share of that, and the member most to blame."""
    worst = most_lost(summary.path)
    if worst is None:
        return "nothing"
    return f"{worst.cause}, {percent_text(worst.lost_share)}"


def leader(summaries: Sequence[VariantSummary]) -> tuple[VariantSummary, str]:
    """The variant that the answer is about, and why: the fastest to the goal, else the best used."""
    if len(summaries) == 1:
        return summaries[0], ""
    fast = [item for item in summaries if item.goal_s is not None and item.reached]
    if fast:
        best = min(fast, key=lambda item: (item.goal_s.median if item.goal_s else NEVER, -item.reached))
        return best, "fastest to the goal"
    return max(summaries, key=lambda item: item.utilisation.median if item.utilisation else 0.0), "best utilisation"


def headline(results: Iterable[RunResult], scenario: Scenario | None = None) -> str:
    """The answer in words: what does not hold first, then time, utilisation and the bottleneck.

    Of several variants it is about the one that reaches the goal first, else about the best used. Raises ConfigError
    if there are no results.
    """
    summaries = summarise(results, scenario)
    best, why = leader(summaries)
    runs = sum(len(item.seeds) for item in summaries)
    unfinished = runs - sum(item.finished for item in summaries)
    said = [f"{unfinished} of {runs} runs did not finish."] if unfinished else []
    what = ", ".join(_subject(best, scenario))
    chosen = f" ({best.label}: {why} of {len(summaries)} variants)" if why else ""
    return " ".join([*said, f"{what}{chosen}: {'; '.join(_answer(best))}."])


def _subject(summary: VariantSummary, scenario: Scenario | None) -> list[str]:
    seeds = len(summary.seeds)
    subject = [f"{summary.members} member{'s' * (summary.members != 1)}"]
    if scenario is None:
        subject.append(summary.scenario)
    else:
        params = float(changed_value(summary.changes, "params") or scenario.model.params)
        subject += [f"{count_text(params)} parameters"] if params else []
        codec = changed_value(summary.changes, "codec") or scenario.run.codec
        subject.append(f"{codec} at H={changed_value(summary.changes, 'inner_steps') or scenario.run.inner_steps}")
    return [*subject, f"{seeds} seed{'s' * (seeds != 1)}"]


def _answer(summary: VariantSummary) -> list[str]:
    answer = []
    if summary.goal_s is not None:
        goal = f"loss {figures(summary.goal)}" if summary.goal else "the goal"
        took = f"{goal_text(summary)} to {goal}" if summary.reached else f"{goal} not reached by any seed"
        answer.append(took)
    rounds = f"{figures(summary.rounds.median)} rounds"
    answer.append(f"{rounds} in {total_text(summary)}" if summary.finished else f"{rounds}, {total_text(summary)}")
    if summary.utilisation is not None:
        answer.append(f"utilisation {percent_text(summary.utilisation.median)}")
    worst = most_lost(summary.path)
    if worst is None:
        return [*answer, "no time lost"]
    words = f" ({MEANING[worst.cause]})" if worst.cause in MEANING else ""
    bottleneck = f"bottleneck: {worst.cause}{words}, {percent_text(worst.lost_share)} of lost time"
    who = culprit_text(worst.cause, worst.culprit)
    if worst.culprit and worst.culprit.share >= WORTH_NAMING:
        bottleneck += f", {percent_text(worst.culprit.share)} of that by {who}"
    return [*answer, bottleneck]


def doubts(results: Iterable[RunResult], scenario: Scenario | None = None) -> list[str]:
    """What a reader must know before believing the numbers; a report says it first. Empty if all is well."""
    found: list[str] = []
    for variant in variants(results):
        summary, runs = summary_of(variant, scenario), variant.runs
        seeds = len(runs)
        if summary.finished < seeds:
            found.append(
                f"{variant.label}: {seeds - summary.finished} of {seeds} runs did not finish; "
                f"the last was stopped after {duration_text(summary.stopped_s)}"
            )
        if summary.goal_s is not None and summary.reached < seeds:
            found.append(f"{variant.label}: {seeds - summary.reached} of {seeds} runs did not reach the goal")
        beyond = sum(1 for run in runs if (run.time_to_goal_s or 0.0) > run.duration_s)
        if beyond:
            found.append(f"{variant.label}: in {beyond} of {seeds} runs the goal lies beyond the simulated rounds")
        if summary.diverged:
            found.append(f"{variant.label}: {summary.diverged} of {seeds} runs diverged (final loss is not finite)")
        if summary.loss_kind == "mixed":
            found.append(f"{variant.label}: final losses are of different kinds and should not be compared")
        found += _odd_seeds(variant) + _odd_numbers(variant)
    return found


def _odd_seeds(variant: Variant) -> list[str]:
    found = []
    digests: dict[int, set[str]] = {}
    for run in variant.runs:
        digests.setdefault(run.seed, set()).add(run.events_digest)
    for seed, count in sorted(Counter(run.seed for run in variant.runs).items()):
        if count > 1:
            same = "equal" if len(digests[seed]) == 1 else "DIFFERENT"
            found.append(f"{variant.label}: seed {seed} is there {count} times, with {same} event logs")
    fidelities = sorted({run.fidelity for run in variant.runs})
    return [*found, f"{variant.label}: fidelities {fidelities} are mixed"] if len(fidelities) > 1 else found


def _odd_numbers(variant: Variant) -> list[str]:
    found = []
    unexplained = [run.seed for run in variant.runs if abs(seconds_by_cause(run)[UNATTRIBUTED]) > 0]
    if unexplained:
        found.append(
            f"{variant.label}: blame does not add up to the time of the rounds (to {TOLERANCE:g}) "
            f"in {len(unexplained)} of {len(variant.runs)} runs; the difference is shown as {UNATTRIBUTED}"
        )
    for run in variant.runs:
        numbers = {"utilisation": run.utilisation, "duration": run.duration_s, "goal": run.time_to_goal_s}
        odd = [name for name, number in numbers.items() if number is not None and not math.isfinite(number)]
        if odd:
            found.append(f"{variant.label}: seed {run.seed} has no finite {', '.join(odd)}; left out")
    return found
