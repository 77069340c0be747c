"""Whose fault a run's time is: the critical path of all rounds, by cause, and the member most to blame for each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from farflung.sim.report.bands import band_of, figures
from farflung.sim.report.variants import Variant, variants
from farflung.sim.results import CAUSES, RunResult

USEFUL = "compute"
"""The one cause that is not lost time: training at the median member's pace."""

UNATTRIBUTED = "not attributed"
"""Seconds of rounds that no record of blame explains (negative: the records claim more than the rounds took)."""

TOLERANCE = 1e-6
"""Share of a run's time by which sums of floats may differ before anybody is told."""

MEANING = {
    "compute": "training at the median member's pace",
    "straggler": "waiting for a slower member's training",
    "mixing": "members mixing what they have learned",
    "upload": "bulk bytes at a sender's line",
    "download": "bulk bytes at a receiver's line",
    "latency": "propagation",
    "codec": "encoding, decoding and aggregating",
    "disk": "reading and writing",
    "deadline": "waiting for somebody who never spoke",
    "protocol": "votes, views, catching up and the rest",
    UNATTRIBUTED: "seconds that no record explains",
}
"""The causes in words."""

HALVED = ("upload", "download", "disk")
"""Causes of which half remains when what is to blame becomes twice as fast."""

REMOVED = ("straggler", "deadline")
"""Causes that vanish when the member to blame keeps the others' pace."""


VARIES = "the worst member, which "
"""Begins the text about a culprit that is another member in most seeds; tables leave it out."""

MOSTLY = 0.5
"""Share of a cause's seconds from which on it is one member's affair."""


@dataclass(frozen=True)
class Culprit:
    """The member behind most of a cause, run by run."""

    name: str
    """Empty if it is another member in most runs."""

    worst_in: int
    """Runs in which it was the worst (or `runs`, where the name is empty)."""

    runs: int
    share: float
    """Of the cause's seconds, over all runs: those of each run's worst member, or of the one that is named."""

    seconds: float
    """The same as a mean per run."""

    number: float
    """Median over those runs of what matters: its Mbit/s up or down, or its step time over the median member's."""


@dataclass(frozen=True)
class CauseShare:
    """One cause's part in the time of a variant's rounds."""

    cause: str
    seconds: float
    """Mean per run."""

    share: float
    """Of the time of all rounds. The shares of a variant add up to 1."""

    lost_share: float
    """Of what was not training at the median member's pace; 0 for that itself."""

    culprit: Culprit | None
    """None: nobody in particular."""


@dataclass(frozen=True)
class Advice:
    """The single change that promises most."""

    cause: str
    culprit: Culprit | None
    saved_s: float
    """At most, per run: the path loses that much, but another may then be the longest."""

    saved_share: float


def rounds_s(run: RunResult) -> float:
    """Time of all rounds together; what the records of blame must add up to."""
    return math.fsum(item.end_s - item.start_s for item in run.rounds)


def seconds_by_cause(run: RunResult) -> dict[str, float]:
    """Seconds per cause, in the order of `CAUSES`, and what no record explains. They add up to `rounds_s`."""
    seconds = dict.fromkeys((*CAUSES, UNATTRIBUTED), 0.0)
    for item in run.rounds:
        for blame in item.blame:
            seconds[blame.cause] = seconds.get(blame.cause, 0.0) + blame.seconds
    total = rounds_s(run)
    rest = total - math.fsum(seconds.values())
    seconds[UNATTRIBUTED] = rest if abs(rest) > TOLERANCE * max(total, TOLERANCE) else 0.0
    return seconds


def attribute(variant: Variant) -> tuple[CauseShare, ...]:
    """All causes that took time, largest first; useful training among them."""
    parts = [seconds_by_cause(run) for run in variant.runs]
    causes = list(dict.fromkeys(cause for part in parts for cause in part))
    seconds = {cause: math.fsum(part.get(cause, 0.0) for part in parts) for cause in causes}
    total = math.fsum(rounds_s(run) for run in variant.runs)
    lost = total - seconds[USEFUL]
    shares = [
        CauseShare(
            cause=cause,
            seconds=amount / len(variant.runs),
            share=amount / total if total else 0.0,
            lost_share=amount / lost if lost > 0 and cause != USEFUL else 0.0,
            culprit=_culprit(variant.runs, cause, amount),
        )
        for cause, amount in seconds.items()
        if amount
    ]
    return tuple(sorted(shares, key=lambda item: -item.seconds))


def critical_path(results: Iterable[RunResult]) -> dict[str, tuple[CauseShare, ...]]:
    """By the label of each variant, in their order. Raises ConfigError if there are no results."""
    return {variant.label: attribute(variant) for variant in variants(results)}


def most_lost(path: Sequence[CauseShare]) -> CauseShare | None:
    """The biggest cause of lost time; None if nothing was lost."""
    return next((item for item in path if item.cause != USEFUL and item.seconds > 0), None)


def advise(path: Sequence[CauseShare]) -> Advice | None:
    """What to change first, if a single change can be named: the largest saving that the records of blame bound.

    A line or disk twice as fast halves its seconds on the critical path; a straggler or an absentee that keeps the
    others' pace removes them. It is about one member if that has half of the cause, else about all of them. None where
    no record supports any.
    """
    total = math.fsum(item.seconds for item in path)
    found = []
    for item in path:
        if item.cause not in HALVED + REMOVED or item.seconds <= 0:
            continue
        culprit = item.culprit if item.culprit and item.culprit.share >= MOSTLY else None
        blamed_s = culprit.seconds if culprit else item.seconds
        saved_s = blamed_s / 2 if item.cause in HALVED else blamed_s
        found.append(Advice(item.cause, culprit, saved_s, saved_s / total))
    return max(found, key=lambda advice: advice.saved_s, default=None)


def _culprit(runs: Sequence[RunResult], cause: str, total: float) -> Culprit | None:
    """Each run draws its members anew: a member is named if it is the worst in at least half of the runs."""
    if cause in (USEFUL, UNATTRIBUTED) or total <= 0:
        return None
    parts = [_seconds_by_member(run, cause) for run in runs]
    worst = [max(part, key=lambda member: (part[member], -member)) if part else None for part in parts]
    blamed = [member for member in worst if member is not None]
    if not blamed:
        return None
    commonest = max(sorted(set(blamed)), key=blamed.count)
    if 2 * blamed.count(commonest) >= len(blamed):
        seconds = math.fsum(part.get(commonest, 0.0) for part in parts)
        chosen = [(run, commonest) for run, member in zip(runs, worst, strict=True) if member == commonest]
        name = member_name(chosen[0][0], commonest)
    else:
        chosen = [(run, member) for run, member in zip(runs, worst, strict=True) if member is not None]
        seconds = math.fsum(part[member] for part, member in zip(parts, worst, strict=True) if member is not None)
        name = ""
    number = band_of(_telling(run, member, cause) for run, member in chosen)
    assert number is not None  # `chosen` is not empty and `_telling` is never NaN
    return Culprit(name, len(chosen), len(runs), seconds / total, seconds / len(runs), number.median)


def _seconds_by_member(run: RunResult, cause: str) -> dict[int, float]:
    seconds: dict[int, float] = {}
    for item in run.rounds:
        for blame in item.blame:
            if blame.cause == cause and blame.member >= 0 and blame.seconds > 0:
                seconds[blame.member] = seconds.get(blame.member, 0.0) + blame.seconds
    return seconds


def member_name(run: RunResult, member: int) -> str:
    """By position; a position that nobody holds is shown as such."""
    return run.members[member].name if 0 <= member < len(run.members) else f"#{member}"


def _telling(run: RunResult, member: int, cause: str) -> float:
    if not 0 <= member < len(run.members):
        return 0.0
    found = run.members[member]
    if cause in ("upload", "download"):
        return found.up_mbit if cause == "upload" else found.down_mbit
    steps = band_of(item.step_s for item in run.members)
    return found.step_s / steps.median if steps is not None and steps.median > 0 else 0.0


def culprit_text(cause: str, culprit: Culprit | None) -> str:
    """`member-07 (52 Mbit/s up)`, or what is known about changing ones; "" for nobody in particular."""
    if culprit is None:
        return ""
    detail = ""
    if culprit.number > 0 and cause in ("upload", "download"):
        detail = f"{figures(culprit.number)} Mbit/s {'up' if cause == 'upload' else 'down'}"
    elif culprit.number > 0 and cause == "straggler":
        detail = f"{figures(culprit.number)}× the median step time"
    if not culprit.name:
        return VARIES + "varies by seed" + f" (median {detail})" * bool(detail)
    if culprit.worst_in < culprit.runs:
        detail = f"{detail}, " * bool(detail) + f"the worst in {culprit.worst_in} of {culprit.runs} seeds"
    return f"{culprit.name} ({detail})" if detail else culprit.name


def advice_text(advice: Advice) -> str:
    """What to change, without what it saves."""
    who = culprit_text(advice.cause, advice.culprit)
    if advice.culprit is not None and not advice.culprit.name:
        who += ","
    if advice.cause in HALVED:
        what = {"upload": "uplink", "download": "downlink", "disk": "disk"}[advice.cause]
        return f"make the {what} of {who or 'everybody'} twice as fast"
    if advice.cause == "straggler":
        return f"bring {who or 'everybody slower'} to the median step time"
    return f"do not wait for {who or 'members that never speak'}" + " who never speaks" * bool(who)
