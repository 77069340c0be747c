"""The report in a terminal: what does not hold, the answer, a row per variant, and whose fault the time is."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from farflung.node.display import human_bytes
from farflung.sim.report.attribution import VARIES, Advice, CauseShare, advice_text, advise, culprit_text
from farflung.sim.report.bands import band_text, duration_text, figures, percent_text
from farflung.sim.report.summary import (
    VariantSummary,
    doubts,
    goal_text,
    headline,
    leader,
    loss_text,
    lost_text,
    summarise,
    total_text,
)
from farflung.sim.results import RunResult
from farflung.sim.scenario import Scenario

PATH_HEADERS = ("cause", "time per run", "of all time", "of lost time", "most to blame", "its part")
VARIANTS_MAX = 4
"""Variants that stand side by side in the terminal's table of causes; the HTML page has them all."""


def variant_headers(summaries: Sequence[VariantSummary]) -> tuple[str, ...]:
    """Of the table with a row per variant; the goal has a column if any variant has one."""
    goal = ("time to goal",) if any(item.goal_s is not None for item in summaries) else ()
    tail = ("total time", "utilisation", "sent/member/round", "rounds", "final loss", "most lost to")
    return ("variant", "seeds", *goal, *tail)


def variant_rows(summaries: Sequence[VariantSummary]) -> list[tuple[str, ...]]:
    """The cells under `variant_headers`: median (10 % to 90 %) over seeds."""
    goal = any(item.goal_s is not None for item in summaries)
    return [
        (
            item.label,
            str(len(item.seeds)),
            *((goal_text(item) or "none asked",) if goal else ()),
            total_text(item),
            band_text(item.utilisation, percent_text),
            band_text(item.bytes_per_member_round, human_bytes),
            band_text(item.rounds, figures),
            loss_text(item),
            lost_text(item),
        )
        for item in summaries
    ]


def path_rows(path: Sequence[CauseShare]) -> list[tuple[str, ...]]:
    """The cells under `PATH_HEADERS`, largest cause first."""
    return [
        (
            item.cause,
            duration_text(item.seconds),
            percent_text(item.share),
            percent_text(item.lost_share) if item.lost_share else "",
            culprit_text(item.cause, item.culprit).removeprefix(VARIES),
            percent_text(item.culprit.share) if item.culprit else "",
        )
        for item in path
    ]


def advice_line(advice: Advice | None) -> str:
    """What to change first and what it saves at most; "" if the records of blame support no single change."""
    if advice is None:
        return ""
    return (
        f"{advice_text(advice)}: saves at most {duration_text(advice.saved_s)} of a run "
        f"({percent_text(advice.saved_share)}), less where another path is nearly as long"
    )


def print_table(results: Sequence[RunResult], console: Console, scenario: Scenario | None = None) -> None:
    """Print the whole report. With the scenario the answer names model and codec, and goals nobody reached are known.

    Raises ConfigError if there are no results.
    """
    summaries = summarise(results, scenario)
    best, _ = leader(summaries)
    for doubt in doubts(results, scenario):
        console.print(Text(f"! {doubt}", style="bold red"))
    console.print(Text(headline(results, scenario), style="bold"))
    table = Table(title="median (10 % to 90 %) over seeds", title_justify="left")
    for name in variant_headers(summaries):
        table.add_column(name, justify="left" if name == "variant" else "right", overflow="fold")
    for row in variant_rows(summaries):
        table.add_row(*map(Text, row), style="bold" if row[0] == best.label and len(summaries) > 1 else None)
    console.print(table)
    console.print(_path_table(best, [item for item in summaries if item is not best]))
    advice = advice_line(advise(best.path))
    if advice:
        console.print(Text(f"what to change first: {advice}"))


def _path_table(best: VariantSummary, others: Sequence[VariantSummary]) -> Table:
    """Causes of one variant in full, and beside them the shares of some others."""
    beside = others[: VARIANTS_MAX - 1]
    caption = f"{len(others) - len(beside)} more variants are in the files" if len(others) > len(beside) else None
    table = Table(title=f"whose fault the time is: {best.label}", title_justify="left", caption=caption)
    for name in (*PATH_HEADERS, *(item.label for item in beside)):
        table.add_column(name, justify="left" if name in ("cause", "most to blame") else "right", overflow="fold")
    rows = {row[0]: row for row in path_rows(best.path)}
    shares = [{part.cause: percent_text(part.share) for part in item.path} for item in beside]
    for cause in dict.fromkeys([*rows, *(cause for found in shares for cause in found)]):
        row = rows.get(cause, (cause, *[""] * (len(PATH_HEADERS) - 1)))
        table.add_row(*map(Text, row), *(Text(found.get(cause, "")) for found in shares))
    return table
