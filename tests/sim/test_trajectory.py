"""Cached trajectories: a run trained once answers every network where everybody takes part, and refuses the others."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from farflung import cli
from farflung.protocol.errors import ConfigError
from farflung.sim import trajectory_shelf
from farflung.sim.draw import Draw
from farflung.sim.scenario import Attack, Churn, Fault, Members, Model, Network, Run, Scenario, SharedLink
from farflung.sim.scenario_file import to_toml
from farflung.sim.sweep import make_jobs, parse_sweep, plan, run_sweep
from farflung.sim.timing import run_timing
from farflung.sim.training import run_training
from farflung.sim.trajectory import Trajectory, apply, family_of, train
from farflung.sim.trajectory_ground import ground_of
from farflung.sim.trajectory_shelf import Shelf, read_trajectory, write_trajectory

SMALL = Scenario(
    "small",
    (
        Members(
            2, name="home", up_mbit=Draw("loguniform", (5, 50)), step_ms=Draw.fixed(200), last_mile_ms=Draw.fixed(5)
        ),
        Members(2, name="lab", up_mbit=Draw.fixed(200), step_ms=Draw.fixed(150)),
    ),
    Model(task="builtin:linear", options={"features": 2000, "samples": 256}),
    fidelity="training",
    rounds=4,
    loss_goal=0.53,
    run=Run(inner_steps=10, grace_s=60, deadline_floor_s=100),
)


@pytest.fixture(scope="module")
def trained() -> Trajectory:
    return train(SMALL, 0)


def lines(scenario: Scenario, mbit: float) -> Scenario:
    return replace(scenario, members=tuple(replace(group, up_mbit=Draw.fixed(mbit)) for group in scenario.members))


def losses(result: Any) -> list[tuple[float | None, float | None]]:
    return [(item.loss, item.validation) for item in result.rounds]


def test_losses_are_those_of_training_on_that_very_network_bit_for_bit(trained):
    real, answer = run_training(SMALL, 0), apply(trained, SMALL, 0)
    assert real.finished
    assert answer.finished
    assert losses(answer) == losses(real)
    assert (answer.fidelity, answer.final_loss) == ("trajectory", real.final_loss)
    assert [item.payload_bytes for item in trained.rounds] == [item.payload_bytes for item in real.rounds]
    for told, true in zip(answer.members, real.members, strict=True):
        assert (told.name, told.steps, told.tokens) == (true.name, true.steps, true.tokens)
        assert (told.up_mbit, told.down_mbit) == (true.up_mbit, true.down_mbit)
    met = [item.validation <= SMALL.loss_goal for item in real.rounds].index(True)
    assert met > 0
    assert answer.time_to_goal_s == answer.rounds[met].end_s
    assert real.time_to_goal_s == real.rounds[met].end_s
    assert all(item.loss_estimate is None for item in answer.rounds)
    assert not any("estimate" in text for text in (*answer.notes, *answer.extra))
    ratios = [
        (told.end_s - told.start_s) / (true.end_s - true.start_s)
        for told, true in zip(answer.rounds[1:], real.rounds[1:], strict=True)
    ]
    print(f"rounds of the clock / rounds of real nodes: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    assert all(0.85 < ratio < 1.15 for ratio in ratios)


@pytest.mark.parametrize(
    ("run", "attacks"),
    [
        (
            Run(codec="int8", outer="sgd(lr=1.0)", weights="tokens(cap=100)"),
            (Attack("sign_flip", count=1, strength=0.5),),
        ),
        (
            Run(codec="ef(0.95)|topk(64/4096)|q2", rule="median(f=1)", weights="steps(cap=5)"),
            (Attack("noise", members=(2,)),),
        ),
    ],
    ids=["sign flip", "noise"],
)
def test_liars_and_every_kind_of_weight_are_answered_as_they_train(run, attacks):
    scenario = replace(
        SMALL,
        members=(Members(4, up_mbit=Draw.fixed(20), step_ms=Draw.fixed(300)),),
        model=replace(SMALL.model, params=1e5, options={"features": 500, "samples": 64}),
        run=replace(run, inner_steps=4, grace_s=60, deadline_floor_s=100),
        rounds=2,
        attacks=attacks,
    )
    honest = replace(scenario, attacks=())
    real, answer = run_training(scenario, 3), apply(train(scenario, 3), scenario, 3)
    assert losses(answer) == losses(real)
    assert [member.attacker for member in answer.members] == [member.attacker for member in real.members]
    assert losses(apply(train(honest, 3), honest, 3)) != losses(real)


def test_fifty_networks_are_answered_in_seconds_by_one_training(tmp_path, monkeypatch):
    count = counting(monkeypatch)
    speeds = [f"{5 + 4 * number}" for number in range(50)]
    big = replace(SMALL, model=replace(SMALL.model, params=2e6))
    jobs = make_jobs(big, sweeps=[parse_sweep(f"uplink={','.join(speeds)}")])
    jobs = [replace(job, shelf=tmp_path) for job in jobs]
    assert [len(group.places) for group in plan(jobs)] == [50]
    began_s = time.monotonic()
    outcome = run_sweep(jobs, workers=1)
    print(f"50 networks and the training: {time.monotonic() - began_s:.1f} s")
    assert time.monotonic() - began_s < 60
    assert not outcome.failures
    assert count == [0]
    assert len({tuple(losses(result)) for result in outcome.results}) == 1
    assert [result.changes["members.up_mbit"] for result in outcome.results] == speeds
    ends = [result.duration_s for result in outcome.results]
    assert ends[0] == max(ends) > 1.05 * ends[-1]
    again = run_sweep(jobs[:3], workers=1)
    assert count == [0]
    assert [replace(item, wall_s=0) for item in again.results] == [
        replace(item, wall_s=0) for item in outcome.results[:3]
    ]


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that are trained from now on."""
    seeds: list[int] = []

    def counted(scenario: Scenario, seed: int, **settings: Any) -> Trajectory:
        seeds.append(seed)
        return train(scenario, seed, **settings)

    monkeypatch.setattr(trajectory_shelf, "train", counted)
    return seeds


def test_runs_share_a_worker_exactly_if_they_share_a_trajectory(tmp_path):
    sweeps = [parse_sweep("codec=int8,q2"), parse_sweep("uplink=20,50")]
    jobs = [replace(job, shelf=tmp_path) for job in make_jobs(SMALL, seeds=(0, 1), sweeps=sweeps)]
    groups = [[(jobs[place].seed, jobs[place].changes["run.codec"]) for place in group.places] for group in plan(jobs)]
    assert sorted(map(tuple, groups)) == sorted(((seed, codec),) * 2 for seed in (0, 1) for codec in ("int8", "q2"))
    plain = [replace(job, shelf=None) for job in jobs]
    assert [len(group.places) for group in plan(plain)] == [1] * len(jobs)


# -- what is refused --------------------------------------------------------------------------------------------------

SLOW = replace(SMALL.members[0], count=1, name="slow", step_ms=Draw.fixed(1500))
HURRIED = replace(
    SMALL, members=(*SMALL.members, SLOW), run=replace(SMALL.run, grace_s=4, quorum_percent=60, deadline_floor_s=30)
)
ALWAYS_HERE = Members(1, name="founder", step_ms=Draw.fixed(100))


def with_groups(**settings: Any) -> Scenario:
    return replace(SMALL, members=(ALWAYS_HERE, *(replace(group, **settings) for group in SMALL.members)))


PARTIAL: dict[str, tuple[Scenario, str]] = {
    "hurry": (HURRIED, r"in round 1 slow-04 took \d of 10 steps"),
    "late": (replace(HURRIED, run=replace(HURRIED.run, grace_s=0.01, deadline_floor_s=0.1)), "in round 1 slow-04"),
    "crash": (replace(SMALL, faults=(Fault("crash", 4.0, (3,), for_s=60.0),)), r"in round \d lab-03 did not take part"),
    "short crash": (
        replace(SMALL, faults=(Fault("crash", 4.0, (3,), for_s=0.5),)),
        r"round 2 lab-03 did not take part",
    ),
    "leave": (replace(SMALL, faults=(Fault("leave", 3.0, (1,)),)), r"in round 2 home-01 did not take part"),
    "churn": (
        with_groups(churn=Churn(session_s=Draw("weibull", (1.0, 20.0)), gap_s=Draw("exponential", (20.0,)))),
        r"in round \d (home|lab)-0\d did not take part",
    ),
    "late joiner": (with_groups(join_after_s=Draw.fixed(5)), "in round 1 home-01 did not take part"),
    "no way in": (replace(SMALL, members=(SMALL.members[0], replace(SMALL.members[1], reachable=False))), "in round 1"),
    "data cap": (
        replace(SMALL, members=(ALWAYS_HERE, replace(SLOW, step_ms=Draw.fixed(100), data_cap_gb=1e-6))),
        "slow-01",
    ),
}


@pytest.mark.parametrize(("scenario", "says"), PARTIAL.values(), ids=PARTIAL)
def test_a_network_where_somebody_sits_out_is_refused_before_training(scenario, says, tmp_path, monkeypatch):
    count = counting(monkeypatch)
    with pytest.raises(ConfigError, match=f"without --trajectory.*{says}"):
        Shelf(tmp_path).answer(scenario, 0)
    assert count == []
    assert not list(tmp_path.iterdir())


def test_what_is_refused_for_hurry_really_learns_something_else():
    real, whole = run_training(HURRIED, 0), train(HURRIED, 0)
    assert real.members[4].steps < HURRIED.rounds * HURRIED.run.inner_steps
    assert losses(real) != [(item.loss, item.validation) for item in whole.rounds]


@pytest.mark.parametrize("seed", range(12))
def test_the_clock_says_exactly_when_not_everybody_took_part(seed):
    churn = Churn(session_s=Draw("weibull", (0.7, 400.0)), gap_s=Draw("exponential", (30.0,)), crash=0.5)
    scenario = Scenario(
        "random",
        (
            Members(3, name="here", up_mbit=Draw("loguniform", (5, 50)), step_ms=Draw.fixed(100), jitter=0.1),
            Members(3, name="there", step_ms=Draw.fixed(100 + 40 * (seed % 4)), churn=churn if seed % 3 else None),
        ),
        Model(params=1e6),
        rounds=5,
        run=Run(inner_steps=20, grace_s=2, quorum_percent=50),
    )
    result = run_timing(scenario, seed)
    counted = [(member.rounds_counted, member.steps) == (5, 100) for member in result.members]
    there = [member.online_s >= result.duration_s * (1 - 1e-9) for member in result.members]
    full = [item.payloads == item.members == 6 for item in result.rounds]
    whole = result.finished and all(counted) and all(there) and all(full)
    assert whole == ("partial_round" not in result.extra)
    if not all(full):
        assert result.extra["partial_round"] <= full.index(False) + 1


WRONG: dict[str, tuple[Callable[[Scenario], Scenario], str]] = {
    "timing": (lambda it: replace(it, fidelity="timing", model=Model(params=1e6), loss_goal=0.0), "'timing'"),
    "straggle": (
        lambda it: replace(it, attacks=(Attack("straggle", members=(1,)),)),
        "who is heard, or when.*'straggle'",
    ),
    "starve": (lambda it: replace(it, attacks=(Attack("starve", members=(1,)),)), "'starve'"),
    "equivocate": (lambda it: replace(it, attacks=(Attack("equivocate", members=(1,)),)), "'equivocate'"),
    "garbage": (lambda it: replace(it, attacks=(Attack("garbage", members=(1,)),)), "'garbage'"),
    "lost calls": (lambda it: replace(it, network=Network(message_loss=0.1)), "message_loss.*got 0.1"),
    "clock fault": (lambda it: replace(it, faults=(Fault("clock_skew", 1.0, (1,), factor=5.0),)), "clock_skew.*5"),
    "clock skew": (
        lambda it: replace(it, members=tuple(replace(group, clock_skew_s=Draw.fixed(3)) for group in it.members)),
        "clock_skew_s.*got 3",
    ),
}


@pytest.mark.parametrize(("change", "says"), WRONG.values(), ids=WRONG)
def test_schemes_in_which_time_decides_what_is_learned_are_refused(trained, change, says):
    scenario = change(SMALL)
    with pytest.raises(ConfigError, match=says):
        apply(trained, scenario, 0)
    with pytest.raises(ConfigError, match=says):
        train(scenario, 0)
    with pytest.raises(ConfigError, match=says):
        family_of(scenario, 0)


@pytest.mark.parametrize("exchange", ["star", "ring", "butterfly"])
def test_only_a_gather_is_answered(trained, exchange):
    scenario = replace(SMALL)
    object.__setattr__(scenario, "run", replace(SMALL.run, exchange=exchange))  # a scenario itself refuses it
    with pytest.raises(ConfigError, match=f"synchronous gather.*{exchange}"):
        apply(trained, scenario, 0)


OTHER: dict[str, Callable[[Scenario], Scenario]] = {
    "task": lambda it: replace(it, model=Model(task="builtin:stub")),
    "options": lambda it: replace(it, model=replace(it.model, options={"features": 2000, "samples": 255})),
    "codec": lambda it: replace(it, run=replace(it.run, codec="int8")),
    "rule": lambda it: replace(it, run=replace(it.run, rule="median(f=1)")),
    "outer": lambda it: replace(it, run=replace(it.run, outer="sgd(lr=1.0)")),
    "weights": lambda it: replace(it, run=replace(it.run, weights="steps(cap=500)")),
    "inner_steps": lambda it: replace(it, run=replace(it.run, inner_steps=11)),
    "members": lambda it: replace(it, members=it.members[:1]),
    "attacks": lambda it: replace(it, attacks=(Attack("sign_flip", members=(1,)),)),
    "rounds": lambda it: replace(it, rounds=5),
}


@pytest.mark.parametrize(("name", "change"), OTHER.items(), ids=OTHER)
def test_another_runs_trajectory_is_refused_by_name(trained, name, change):
    with pytest.raises(ConfigError, match=name):
        apply(trained, change(SMALL), 0)
    assert family_of(change(SMALL), 0) != family_of(SMALL, 0)


def test_another_seed_is_another_training_and_another_network_is_not(trained):
    with pytest.raises(ConfigError, match=r"seed decides.*got 1"):
        apply(trained, SMALL, 1)
    groups = tuple(replace(group, link="cable", queue="fifo", loss=0.001) for group in lines(SMALL, 2).members)
    network = Network(latency_ms=((150.0,),), links=(SharedLink("cable", 30, 30),))
    far = replace(SMALL, members=groups, network=network)
    assert family_of(far, 0) == family_of(SMALL, 0)
    assert losses(apply(trained, far, 0)) == losses(apply(trained, SMALL, 0))
    fewer = apply(trained, replace(SMALL, rounds=2), 0)
    assert losses(fewer) == losses(apply(trained, SMALL, 0))[:2]


def test_a_model_that_stands_in_for_a_big_one_is_charged_as_the_big_one(trained):
    big = replace(SMALL, model=replace(SMALL.model, params=2e8))
    answer, small = apply(trained, big, 0), apply(trained, SMALL, 0)
    assert family_of(big, 0) == family_of(SMALL, 0)
    assert losses(answer) == losses(small)
    assert answer.duration_s > 10 * small.duration_s
    assert any("in place of one of 200,000,000" in note for note in answer.notes)


def test_values_that_decide_who_takes_part_are_refused_once(tmp_path, monkeypatch):
    options = {"features": 64, "samples": 64, "lr": 1e30}
    wild = replace(SMALL, members=SMALL.members[:1], model=replace(SMALL.model, options=options), rounds=1)
    count = counting(monkeypatch)
    shelf = Shelf(tmp_path)
    for mbit in (20, 50):
        with pytest.raises(ConfigError, match="without --trajectory"):
            shelf.answer(lines(wild, mbit), 0)
    assert count == [0]
    assert not list(tmp_path.iterdir())


# -- on disk ----------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_what_was_trained_bit_for_bit(trained, tmp_path):
    odd = (0.1 + 0.2, math.inf, -math.inf, None)
    rounds = tuple(replace(item, validation=value) for item, value in zip(trained.rounds, odd, strict=True))
    for trajectory in (trained, replace(trained, rounds=rounds)):
        write_trajectory(trajectory, tmp_path / "new" / "one.json")
        assert read_trajectory(tmp_path / "new" / "one.json") == trajectory
    write_trajectory(replace(trained, rounds=(replace(trained.rounds[0], validation=math.nan),)), tmp_path / "nan.json")
    assert math.isnan(read_trajectory(tmp_path / "nan.json").rounds[0].validation)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.json"]


def test_a_file_that_is_not_what_was_written_is_refused(trained, tmp_path):
    path = tmp_path / "one.json"
    write_trajectory(trained, path)
    text = path.read_text()
    whole = json.loads(text)
    broken = [text[:-20], "[]", "", text.replace('"version": 1', '"version": 2'), json.dumps({**whole, "more": 1})]
    broken += [text.replace(":2000", ":2001", 1), text.replace(str(trained.rounds[0].loss), "0.5", 1), "[" * 100_000]
    assert len({text, *broken}) == 1 + len(broken)
    for wrong in broken:
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=r"not a trajectory, remove it.*one\.json"):
            read_trajectory(path)


def test_a_shelf_does_not_believe_a_files_name(trained, tmp_path):
    shelf = Shelf(tmp_path)
    other = replace(trained, rounds=trained.rounds[:2])
    write_trajectory(other, tmp_path / f"{trained.key}.json")
    with pytest.raises(ConfigError, match="holds another trajectory"):
        shelf.answer(SMALL, 0)
    write_trajectory(trained, tmp_path / f"{trained.key}.json")
    assert replace(Shelf(tmp_path).answer(SMALL, 0), wall_s=0) == replace(apply(trained, SMALL, 0), wall_s=0)


def test_an_edited_task_is_trained_anew(tmp_path, monkeypatch):
    source = "from farflung.node.tasks.linear import Linear as Base\nclass Mine(Base):\n    pass\n"
    (tmp_path / "my_edited_task.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    before = ground_of("my_edited_task:Mine", "{}")
    assert before.params == 64
    (tmp_path / "my_edited_task.py").write_text(source + "# an edit\n")
    ground_of.cache_clear()  # another process
    after = ground_of("my_edited_task:Mine", "{}")
    assert replace(after, task="") == replace(before, task="")
    assert after != before


# -- on the command line ----------------------------------------------------------------------------------------------


def test_the_command_trains_once_and_names_the_run_that_it_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    count = counting(monkeypatch)
    (tmp_path / "small.toml").write_text(to_toml(SMALL))
    arguments = ["sim", "small.toml", "--trajectory", "--jobs", "1", "--plain"]
    assert cli.main([*arguments, "--sweep", "uplink=10,100", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [item["fidelity"] for item in shown] == ["trajectory"] * 2
    assert shown[0]["final_loss"] == shown[1]["final_loss"]
    assert shown[0]["duration_s"] > shown[1]["duration_s"]
    assert cli.main([*arguments, "--sweep", "members.lab.step_ms=150,60000", "--sweep", "grace=1", "--json"]) == 1
    shown_text = capsys.readouterr()
    assert [item["changes"]["members.lab.step_ms"] for item in json.loads(shown_text.out)] == ["150"]
    assert "farflung: seed 0, members.lab.step_ms=60000, run.grace_s=1: a trajectory is of everybody" in shown_text.err
    assert count == [0]
    assert len(list((tmp_path / "cache" / "farflung" / "trajectories").iterdir())) == 1
    assert cli.main([*arguments, "--log", "x.log"]) == 2
    assert "no event log" in capsys.readouterr().err
    assert cli.main([*arguments]) == 0
    assert (tmp_path / "farflung-sim" / "small" / "report.html").exists()
