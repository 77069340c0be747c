"""Seeds in, violations out: every seed is drawn, drilled and judged on its own, on all cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from farflung.protocol.errors import ConfigError
from farflung.sim.explore.draw import draw_schedule
from farflung.sim.explore.drill import drill
from farflung.sim.explore.schedule import Schedule, parse_line
from farflung.sim.explore.shrink import shrink as shrunk

CHUNK = 4
"""Seeds that a process takes at a time: a second or two."""

COMMAND = "farflung sim explore --replay"


@dataclass(frozen=True)
class Violation:
    """A world in which something was not as it must be. `replay` is the line after `v1`, from `Schedule.line`."""

    seed: int
    invariant: str
    message: str
    replay: str

    @property
    def command(self) -> str:
        """What to type to see it again."""
        return f"{COMMAND} '{self.replay}'"


@dataclass(frozen=True)
class Exploration:
    """What was found. `seeds`: how many were explored."""

    seeds: int
    violations: tuple[Violation, ...]


Progress = Callable[[int, int], object]
"""(seeds done, violations so far)."""


def explore(
    seeds: range, *, jobs: int = 0, progress: Progress | None = None, shrink: bool = True, stop_after: int = 0
) -> Exploration:
    """Explore every seed in order.

    `jobs` processes share them (0: one per core; 1: this process alone); the result does not depend on it. Each
    violation is shrunk by some hundred more runs, unless `shrink` is off. With `stop_after` the search ends after so
    many violations. Costs some 0.4 s of one core per seed. Raises ConfigError for seeds or jobs below zero.
    """
    if jobs < 0 or (len(seeds) and min(seeds[0], seeds[-1]) < 0):
        raise ConfigError(f"seeds and jobs are numbers from 0 on, got {seeds} and {jobs}")
    found: list[Violation] = []
    done = 0
    with _judged(seeds, jobs or os.cpu_count() or 1, shrink=shrink) as verdicts:
        for violation in verdicts:
            done += 1
            if violation is not None:
                found.append(violation)
            if progress is not None:
                progress(done, len(found))
            if stop_after and len(found) >= stop_after:
                break
    return Exploration(done, tuple(found))


def replay(line: str) -> Violation | None:
    """Run exactly what a replay line says. Raises ConfigError if it is not one."""
    return judge(parse_line(line), shrink=False)


def judge(schedule: Schedule, *, shrink: bool) -> Violation | None:
    """Drill one schedule; a violation is made as small as can be found."""
    broken = drill(schedule).broken
    if broken is None:
        return None
    name, message = broken
    if shrink:
        schedule = shrunk(schedule, lambda other: (drill(other).broken or ("", ""))[0] == name)
        name, message = drill(schedule).broken or (name, message)
    return Violation(schedule.seed, name, message, schedule.line)


def explore_seeds(seeds: Sequence[int], shrink: bool) -> list[Violation | None]:
    """What a process does with its share."""
    return [judge(draw_schedule(seed), shrink=shrink) for seed in seeds]


@contextmanager
def _judged(seeds: range, jobs: int, *, shrink: bool) -> Iterator[Iterator[Violation | None]]:
    """The verdicts in the order of the seeds; what is still to come is dropped at the end."""
    shares = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    jobs = min(jobs, len(shares))
    if jobs <= 1:
        yield (verdict for seed in seeds for verdict in explore_seeds((seed,), shrink))
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_one_thread)
    try:
        running = [pool.submit(explore_seeds, share, shrink) for share in shares]
        yield (verdict for future in running for verdict in future.result())
    finally:
        pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    """Worlds are small: cores are shared by seeds, not by threads."""
    import torch

    torch.set_num_threads(1)
