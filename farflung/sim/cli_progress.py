"""Progress of long commands, on stderr, so that stdout is the answer alone: a bar with the time left, or lines."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from farflung.sim.sweep import Job, Outcome, run_group, run_sweep

if TYPE_CHECKING:
    from farflung.sim.explore import Exploration


def run_all(work: list[Job], name: str, *, workers: int, engine: str, log: Path | None, plain: bool) -> Outcome:
    """A sweep; a single run, or one at a time, is also heard of round by round. `log` is for a single run."""
    console = Console(stderr=True)
    here = engine == "processes" and (len(work) == 1 or workers == 1)  # elsewhere nothing can be heard of
    if plain or not console.is_terminal:
        lines = _Lines(len(work))
        todo = partial(run_group, log=log) if here else run_group
        return run_sweep(work, workers=workers, engine=engine, done=lines.done, work=todo)
    with _bar(console) as bar:
        moving = _Moving(bar, bar.add_task(name, total=len(work)))
        todo = partial(run_group, log=log, tell=moving.tell) if here else run_group
        return run_sweep(work, workers=workers, engine=engine, done=moving.done, work=todo)


class _Lines:
    """A line for each run that is done."""

    def __init__(self, total: int) -> None:
        self.count, self.total = 0, total

    def done(self, job: Job, end: object) -> None:
        """A run is over."""
        self.count += 1
        note = f" failed: {end}" if isinstance(end, Exception) else ""
        print(f"{self.count}/{self.total} {job.title}{note}", file=sys.stderr, flush=True)


class _Moving:
    """A bar that moves with runs, and with rounds where one can hear of them."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self.bar, self.task, self.count = bar, task, 0

    def tell(self, rounds: int, total: int) -> None:
        """A round is over."""
        self.bar.update(self.task, completed=self.count + rounds / total)

    def done(self, job: Job, end: object) -> None:
        """A run is over."""
        self.count += 1
        self.bar.update(self.task, completed=self.count)
        if isinstance(end, Exception):
            self.bar.console.print(f"{job.title} failed: {end}", markup=False, highlight=False)


def explore_all(seeds: range, *, jobs: int, plain: bool) -> Exploration:
    """Explore, with the same bar."""
    from farflung.sim.explore import explore

    console = Console(stderr=True)
    if plain or not console.is_terminal:
        return explore(seeds, jobs=jobs)
    with _bar(console) as bar:
        task = bar.add_task("exploring", total=len(seeds))
        return explore(seeds, jobs=jobs, progress=lambda done, _: bar.update(task, completed=done))


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True)
