"""Sweeps: every combination once, the same results whatever the order of completion, and nothing lost with one run."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import sweep_work

from farflung.protocol.errors import ConfigError, LocalError
from farflung.sim import sweep
from farflung.sim.draw import Draw
from farflung.sim.scenario import Members, Model, Scenario
from farflung.sim.sweep import Job, make_jobs, parse_sweep, plan, run_sweep

TINY = Scenario("tiny", (Members(3, step_ms=Draw.fixed(100)),), Model(params=1e6))


def jobs_of(count: int, folder: Path | None = None) -> list[Job]:
    return make_jobs(TINY, seeds=range(count), folder=folder)


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("codec=int8,q2", "run.codec", ("int8", "q2")),
        ("H=10, 20", "run.inner_steps", ("10", "20")),
        (
            "outer=nesterov(lr=0.7,momentum=0.6),sgd(lr=1.0)",
            "run.outer",
            ("nesterov(lr=0.7,momentum=0.6)", "sgd(lr=1.0)"),
        ),
        (
            "uplink=uniform(5, 9),{ choice = [1, 2] },3",
            "members.up_mbit",
            ("uniform(5, 9)", "{ choice = [1, 2] }", "3"),
        ),
        ("latency=[[1]],[[2]]", "network.latency_ms", ("[[1]]", "[[2]]")),
    ],
)
def test_commas_within_brackets_belong_to_a_value(text, key, values):
    assert parse_sweep(text) == (key, values)


@pytest.mark.parametrize("text", ["codec", "codec=", "codec=int8,", "=int8", "codec=int8,int8", "nothing=1"])
def test_a_sweep_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="got "):
        parse_sweep(text)


def test_jobs_are_the_product_in_a_fixed_order():
    sweeps = [parse_sweep("codec=int8,q2"), parse_sweep("uplink=20,50,100")]
    jobs = make_jobs(TINY, seeds=(3, 4), sweeps=sweeps)
    wanted = list(itertools.product(("int8", "q2"), ("20", "50", "100"), (3, 4)))
    assert [(job.changes["run.codec"], job.changes["members.up_mbit"], job.seed) for job in jobs] == wanted
    for job in jobs:
        assert job.scenario.run.codec == job.changes["run.codec"]
        assert job.scenario.members[0].up_mbit == Draw.fixed(float(job.changes["members.up_mbit"]))
        assert job.scenario.members[0].down_mbit == TINY.members[0].down_mbit
    assert sorted(place for group in plan(jobs) for place in group.places) == list(range(len(jobs)))


@pytest.mark.parametrize(
    ("seeds", "sweeps", "says"),
    [
        ((0,), ["codec=int8,zip"], "zip"),
        ((0,), ["codec=int8", "run.codec=q2"], "swept once"),
        ((), [], "1 to"),
        ((-1,), [], "-1"),
        (range(sweep.JOBS_MAX), ["H=1,2"], "1 to"),
        ((0,), ["message_loss=0,0.5"], "changes nothing"),
        ((0,), ["exchange=gather,tree"], "tree"),
    ],
)
def test_a_combination_that_cannot_work_is_found_before_anything_runs(seeds, sweeps, says):
    with pytest.raises(ConfigError, match=says):
        make_jobs(TINY, seeds=seeds, sweeps=[parse_sweep(text) for text in sweeps])


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(workers):
    ended: list[int] = []
    outcome = run_sweep(
        jobs_of(4), workers=workers, done=lambda job, _: ended.append(job.seed), work=sweep_work.early_seeds_last
    )
    assert [result.seed for result in outcome.results] == [0, 1, 2, 3]
    assert sorted(ended) == [0, 1, 2, 3]
    assert ended[0] == (0 if workers == 1 else 1)
    assert outcome.results == run_sweep(jobs_of(4), workers=1, work=sweep_work.instantly).results
    assert not outcome.failures
    assert not outcome.interrupted


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_names_its_run_and_loses_no_other(workers):
    outcome = run_sweep(jobs_of(4), workers=workers, work=sweep_work.seed_one_is_refused)
    assert [result.seed for result in outcome.results] == [0, 2, 3]
    (failure,) = outcome.failures
    assert str(failure) == "seed 1: no"
    assert isinstance(failure.error, ConfigError)


def test_a_worker_that_dies_costs_its_own_run_only():
    outcome = run_sweep(jobs_of(5), workers=2, work=sweep_work.seed_one_dies)
    assert [result.seed for result in outcome.results] == [0, 2, 3, 4]
    (failure,) = outcome.failures
    assert failure.job.seed == 1
    assert "killed" in str(failure)


def test_a_bug_in_a_run_is_an_error_of_that_run_with_its_place(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(sweep, "run_scenario", broken)
    (failure,) = run_sweep(jobs_of(1)).failures
    assert isinstance(failure.error, LocalError)
    assert "ZeroDivisionError in test_sweep.py" in str(failure)


@pytest.fixture
def _interruptible():
    """A suite started in the background of a shell ignores Ctrl-C; here it must not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_keeps_what_is_done_and_leaves_no_process(tmp_path):
    before = set(multiprocessing.active_children())

    def done(job: Job, _: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    outcome = run_sweep(jobs_of(4, tmp_path), workers=2, done=done, work=sweep_work.later_seeds_hang)
    assert outcome.interrupted
    assert [result.seed for result in outcome.results] == [0]
    assert set(multiprocessing.active_children()) <= before
    assert not sweep_work.alive(tmp_path)


def test_a_worker_has_one_thread_and_the_parent_keeps_its_own(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    outcome = run_sweep(jobs_of(2), workers=2, work=sweep_work.threads)
    assert [result.changes["threads"] for result in outcome.results] == ["1", "1"]
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_what_is_asked_of_a_sweep_is_checked():
    with pytest.raises(ConfigError, match="cluster"):
        run_sweep(jobs_of(1), engine="cluster")
    with pytest.raises(ConfigError, match="-1"):
        run_sweep(jobs_of(1), workers=-1)


def test_ray_is_asked_for_by_name_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install ray"):
        run_sweep(jobs_of(1), engine="ray")


@pytest.mark.soak
def test_ray_gives_the_same_results():
    pytest.importorskip("ray")
    there = run_sweep(jobs_of(4), engine="ray", work=sweep_work.seed_one_is_refused)
    here = run_sweep(jobs_of(4), workers=1, work=sweep_work.seed_one_is_refused)
    assert there.results == here.results
    assert [str(failure) for failure in there.failures] == [str(failure) for failure in here.failures]
