"""What workers do in tests of sweeps, in a module of its own: other processes import it by its name."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from farflung.protocol.errors import ConfigError, FarflungError
from farflung.sim.results import RunResult
from farflung.sim.sweep import Job


def result_of(job: Job, **changes: str) -> RunResult:
    return RunResult("tiny", job.seed, "timing", dict(job.changes) | changes, (), (), 1.0 + job.seed, True)


def instantly(jobs: Sequence[Job]) -> list[RunResult | FarflungError]:
    return [result_of(job) for job in jobs]


def early_seeds_last(jobs: Sequence[Job]) -> list[RunResult | FarflungError]:
    time.sleep(0.3 if jobs[0].seed == 0 else 0.0)
    return instantly(jobs)


def seed_one_is_refused(jobs: Sequence[Job]) -> list[RunResult | FarflungError]:
    return [ConfigError("no") if job.seed == 1 else instantly([job])[0] for job in jobs]


def seed_one_dies(jobs: Sequence[Job]) -> list[RunResult | FarflungError]:
    if jobs[0].seed == 1:
        os._exit(9)
    return instantly(jobs)


def later_seeds_hang(jobs: Sequence[Job]) -> list[RunResult | FarflungError]:
    folder = jobs[0].folder
    assert folder is not None
    (folder / f"{os.getpid()}").touch()
    if jobs[0].seed > 0:
        time.sleep(3600)
    return instantly(jobs)


def threads(jobs: Sequence[Job]) -> list[RunResult | FarflungError]:
    return [result_of(job, threads=os.environ["OMP_NUM_THREADS"]) for job in jobs]


def alive(folder: Path) -> list[int]:
    """Of the processes that left their number here, those that still run."""
    return [int(path.name) for path in folder.iterdir() if _runs(int(path.name))]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
