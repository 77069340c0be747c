"""Many runs: every combination of swept settings with every seed, on all cores; what is done is never lost.

Each run is a pure function of its scenario and seed, so order, cores and engine change nothing but the time it takes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from farflung.protocol.errors import ConfigError, FarflungError, LocalError, TooFewPeers
from farflung.sim.changes import changed, full_key
from farflung.sim.results import RunResult
from farflung.sim.scenario import Scenario
from farflung.sim.simulate import Tell, run_scenario

if TYPE_CHECKING:
    from farflung.sim.trajectory_shelf import Shelf

JOBS_MAX = 100_000
"""Runs of one sweep: at a second each this is a day of a core; more is a slip in a product of lists."""

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
"""One core per run is faster than one run on all cores, and never depends on how many there are."""

ENGINES = ("processes", "ray")


@dataclass(frozen=True)
class Job:
    """One run to do."""

    scenario: Scenario
    """With the changes made."""

    seed: int
    changes: Mapping[str, str]
    """Full path of a setting -> text."""

    folder: Path | None = None
    """Where the scenario's files are."""

    shelf: Path | None = None
    """Answer it from a trajectory that is kept here, trained if need be; None: simulate it."""

    @property
    def title(self) -> str:
        """Seed and changes, for people."""
        return ", ".join([f"seed {self.seed}", *(f"{key}={text}" for key, text in self.changes.items())])


class Failure(NamedTuple):
    """A run that raised."""

    job: Job
    error: FarflungError

    def __str__(self) -> str:
        return f"{self.job.title}: {self.error}"


class Group(NamedTuple):
    """Runs that one worker does one after the other, by their places in the list of jobs."""

    places: tuple[int, ...]


class Outcome(NamedTuple):
    """What became of a sweep: results in the order of the jobs, whatever the order in which they were done."""

    results: tuple[RunResult, ...]
    failures: tuple[Failure, ...]
    interrupted: bool
    """Somebody pressed Ctrl-C: some runs are neither among the results nor among the failures."""


Done = Callable[[Job, RunResult | FarflungError], None]
"""Called after each run, in the caller's process, in order of completion."""

Work = Callable[[Sequence[Job]], list[RunResult | FarflungError]]
"""Does the runs of a group: one result or error for each, in order."""

Stream = Generator[tuple[Group, list[RunResult | FarflungError]], None, None]
"""Groups as they are done. Closing it ends what still runs."""


def parse_sweep(text: str) -> tuple[str, tuple[str, ...]]:
    """The setting's full path and its values: "codec=int8,q2". Commas within brackets belong to a value.

    Raises ConfigError if there is no `=`, no value, twice the same value, or no such setting.
    """
    key, equals, rest = text.partition("=")
    values = _split(rest)
    if not equals or not all(values):
        raise ConfigError(f"a sweep is key=value,value, codec=int8,q2 for instance, got {text!r}")
    if len(set(values)) < len(values):
        raise ConfigError(f"a sweep's values must be different, got {text!r}")
    return full_key(key.strip()), values


def make_jobs(
    scenario: Scenario,
    *,
    seeds: Sequence[int] = (0,),
    sweeps: Sequence[tuple[str, tuple[str, ...]]] = (),
    folder: Path | None = None,
) -> list[Job]:
    """The product of the sweeps with every seed; the last setting varies fastest, seeds fastest of all.

    Every combination is checked here, before anything runs. Settings are changed in the order given.
    Raises ConfigError if one cannot work, a setting is swept twice, or there are too many.
    """
    keys = [key for key, _ in sweeps]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"each setting can be swept once, got {', '.join(keys)}")
    count = len(seeds)
    for _, values in sweeps:
        count *= len(values)
    if not 0 < count <= JOBS_MAX:
        raise ConfigError(f"a sweep has 1 to {JOBS_MAX} runs, got {count}")
    if any(seed < 0 for seed in seeds):
        raise ConfigError(f"a seed is a number from 0 on, got {min(seeds)}")
    jobs = []
    for texts in itertools.product(*(values for _, values in sweeps)):
        changes, variant = dict(zip(keys, texts, strict=True)), scenario
        for key, text in changes.items():
            variant = changed(variant, key, text)
        jobs += [Job(variant, seed, changes, folder) for seed in seeds]
    return jobs


def plan(jobs: Sequence[Job]) -> list[Group]:
    """Which runs belong together: those that share a trajectory share a worker, so it is trained once. Others do not.

    Costs 0.2 ms a member of every run that is to be answered from a trajectory.
    """
    groups: dict[object, list[int]] = {}
    for place, job in enumerate(jobs):
        groups.setdefault(place if job.shelf is None else _family(job, place), []).append(place)
    return [Group(tuple(places)) for places in groups.values()]


def _family(job: Job, place: int) -> object:
    """What runs with one trajectory have in common; a run that will be refused stands alone."""
    from farflung.sim.trajectory import family_of

    try:
        return str(job.shelf), family_of(job.scenario, job.seed)
    except ConfigError:
        return place


def run_sweep(
    jobs: Sequence[Job],
    *,
    workers: int = 0,
    engine: str = "processes",
    done: Done | None = None,
    work: Work | None = None,
) -> Outcome:
    """Do all jobs, `workers` at a time (0: one per core). A run that raises loses nothing but itself.

    One job, or one worker, runs in this process. Ctrl-C ends the workers and returns what is done. `engine` "ray" uses
    the cluster that Ray finds, and raises ConfigError if it is not installed; Ray is never used unasked, because it
    starts servers. `work` does a group, by default `run_group`; workers import it by its name.
    Raises ConfigError for a wrong engine or a negative number of workers.
    """
    if engine not in ENGINES:
        raise ConfigError(f"runs are spread by one of {', '.join(ENGINES)}, got {engine!r}")
    if workers < 0:
        raise ConfigError(f"the number of workers must not be negative, got {workers}")
    groups = plan(jobs)
    workers = min(workers or cores(), len(groups))
    if engine == "ray":
        from farflung.sim.sweep_ray import stream_ray

        stream = stream_ray(jobs, groups, work or run_group)
    elif workers <= 1:
        stream = _stream_here(jobs, groups, work or run_group)
    else:
        stream = _stream_processes(jobs, groups, workers, work or run_group)
    ended: dict[int, RunResult | FarflungError] = {}
    interrupted = False
    try:
        for group, parts in stream:
            for place, part in zip(group.places, parts, strict=True):
                ended[place] = part
                if done is not None:
                    done(jobs[place], part)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        stream.close()
    pairs = [(jobs[place], ended[place]) for place in sorted(ended)]
    return Outcome(
        tuple(end for _, end in pairs if isinstance(end, RunResult)),
        tuple(Failure(job, end) for job, end in pairs if not isinstance(end, RunResult)),
        interrupted,
    )


def run_group(
    jobs: Sequence[Job], *, log: Path | None = None, tell: Tell | None = None
) -> list[RunResult | FarflungError]:
    """The runs of one group, here and now; an error takes the place of its run's result. Others as for `simulate`."""
    shelves: dict[Path, Shelf] = {}
    return [_run_one(job, shelves, log, tell) for job in jobs]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_one(job: Job, shelves: dict[Path, Shelf], log: Path | None, tell: Tell | None) -> RunResult | FarflungError:
    try:
        if job.shelf is not None:
            return _answer(job, job.shelf, shelves, log, tell)
        return run_scenario(job.scenario, job.seed, changes=job.changes, folder=job.folder, log=log, tell=tell)
    except (ConfigError, TooFewPeers, LocalError) as error:
        return error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return LocalError(f"{type(error).__name__} in {where}: {error}")  # one that survives the way between processes


def _answer(job: Job, place: Path, shelves: dict[Path, Shelf], log: Path | None, tell: Tell | None) -> RunResult:
    from farflung.sim.trajectory_shelf import Shelf

    if log is not None:
        raise ConfigError(f"a trajectory's answer has no event log: leave the log out, got {str(log)!r}")
    shelf = shelves.setdefault(place, Shelf(place))
    return replace(shelf.answer(job.scenario, job.seed, folder=job.folder, tell=tell), changes=dict(job.changes))


def _stream_here(jobs: Sequence[Job], groups: Sequence[Group], work: Work) -> Stream:
    for group in groups:
        yield group, work([jobs[place] for place in group.places])


def _stream_processes(jobs: Sequence[Job], groups: Sequence[Group], workers: int, work: Work) -> Stream:
    """Groups as they are done. A worker that dies takes its pool along: what ran meanwhile is run again, alone."""
    suspects: list[Group] = []
    waiting = deque(groups)
    while waiting:
        yield from _until_broken(jobs, waiting, workers, suspects, work)
    for group in suspects:
        again: list[Group] = []
        yield from _until_broken(jobs, deque([group]), 1, again, work)
        if again:
            died = LocalError("the process that ran it was killed, perhaps for want of memory")
            yield group, [died for _ in group.places]


def _until_broken(
    jobs: Sequence[Job], waiting: deque[Group], workers: int, suspects: list[Group], work: Work
) -> Stream:
    """Takes groups from `waiting` until there are none; returns early, naming suspects, if a worker dies."""
    running: dict[Future[list[RunResult | FarflungError]], Group] = {}
    with _pool(workers) as pool:
        while waiting or running:
            try:
                while waiting and len(running) < workers:
                    with _birth():
                        future = pool.submit(work, [jobs[place] for place in waiting[0].places])
                    running[future] = waiting.popleft()
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                parts = [(future, future.result()) for future in finished]
            except BrokenProcessPool:
                suspects += running.values()
                return
            for future, ends in parts:
                yield running.pop(future), ends


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes; ended at once if the caller is not done with them."""
    others = {child.pid for child in multiprocessing.active_children()}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    try:
        yield pool
    except BaseException:
        for child in multiprocessing.active_children():
            if child.pid not in others:
                child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """A worker whose parent was killed is of no use to anybody: it ends as well, even in the middle of a run."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise LocalError("a worker of a sweep needs a parent process, got none")

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()


@contextmanager
def _birth() -> Iterator[None]:
    """Processes that are started meanwhile use one thread each, and leave Ctrl-C to their parent.

    A terminal sends it to all of them; a blocked signal stays blocked in a child, and reaches the parent afterwards.
    """
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _split(text: str) -> tuple[str, ...]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.strip() for part in parts)
