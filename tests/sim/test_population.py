"""Populations: units, independence of every draw from every other, and what only shows when members are drawn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from farflung.protocol.errors import ConfigError
from farflung.sim.churn import ALWAYS, Session
from farflung.sim.compute import GPUS, Slowdown, StepTimes, step_time_s
from farflung.sim.draw import Draw
from farflung.sim.population import populate
from farflung.sim.rng import stream
from farflung.sim.scenario import Attack, Churn, Fault, Members, Model, Network, Scenario, SharedLink
from farflung.sim.traces import generate, write_trace

HOME = Members(
    count=6,
    name="home",
    up_mbit=Draw("loguniform", (50.0, 500.0)),
    down_mbit=Draw("uniform", (100.0, 1000.0)),
    last_mile_ms=Draw("uniform", (5.0, 20.0)),
    queue="fifo",
    queue_ms=200.0,
    gpu="rtx-4090",
    speed_sigma=0.3,
    jitter=0.1,
    join_after_s=Draw("exponential", (100.0,)),
)
LAB = Members(count=5, name="lab", step_ms=Draw("lognormal", (700.0, 0.2)), region="east", link="campus")
NETWORK = Network(
    regions=("west", "east"),
    latency_ms=((5.0, 40.0), (40.0, 5.0)),
    links=(SharedLink("campus", 2500, 2500),),
)
MODEL = Model(params=1e9, tokens_per_step=1e5)


def scenario(*groups: Members, **changes):
    return Scenario(**({"name": "s", "members": groups or (HOME, LAB), "model": MODEL, "network": NETWORK} | changes))


def test_units_are_converted_once():
    plain = Members(
        count=2,
        name="plain",
        up_mbit=Draw.fixed(100),
        down_mbit=Draw.fixed(1000),
        last_mile_ms=Draw.fixed(8),
        queue="fifo",
        queue_ms=50.0,
        data_cap_gb=2.0,
        step_ms=Draw.fixed(250),
        fsync_ms=4.0,
        disk_mb_s=120.0,
        loss=0.01,
        reachable=False,
    )
    member = populate(scenario(LAB, plain), 0).members[6]
    assert (member.index, member.name, member.group, member.region) == (6, "plain-06", 1, 0)
    assert (member.up_bytes_per_s, member.down_bytes_per_s) == (12.5e6, 125e6)  # decimal megabits
    assert (member.queue, member.queue_bytes) == ("fifo", 0.05 * 12.5e6)
    assert (member.last_mile_s, member.step_s, member.fsync_s) == (0.008, 0.25, 0.004)
    assert (member.data_cap_bytes, member.disk_bytes_per_s, member.loss, member.reachable) == (2e9, 120e6, 0.01, False)
    assert member.sessions == (Session(0.0, math.inf, False),)


def test_the_topology_is_the_members():
    population = populate(scenario(), 0)
    topology = population.topology
    assert len(topology.nodes) == 11
    for member, node in zip(population.members, topology.nodes, strict=True):
        assert (node.up_bytes_per_s, node.down_bytes_per_s) == (member.up_bytes_per_s, member.down_bytes_per_s)
        assert node.groups == member.links == ((0,) if member.group else ())
        assert node.buffer_bytes == member.queue_bytes
    assert topology.groups == (2500 * 125_000,)
    assert topology.region == (0,) * 6 + (1,) * 5
    assert topology.one_way_latency_s(0, 10) == pytest.approx(0.040 + population.members[0].last_mile_s)
    assert topology.window_bytes == 4e6


def test_the_same_seed_draws_the_same_and_another_another():
    assert populate(scenario(), 3) == populate(scenario(), 3)
    first, second = populate(scenario(), 3).members[1], populate(scenario(), 4).members[1]
    assert first.up_bytes_per_s != second.up_bytes_per_s
    assert first.step_s != second.step_s


@pytest.mark.parametrize(
    "change",
    [
        {"up_mbit": Draw("uniform", (1.0, 2.0))},
        {"last_mile_ms": Draw.fixed(3)},
        {"gpu": "rtx-3090"},
        {"speed_sigma": 0.0},
        {"join_after_s": Draw("uniform", (0.0, 9.0))},
        {"churn": Churn(kind="diurnal")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_setting_never_changes_what_another_draws(change):
    before, after = populate(scenario(), 1).members, populate(scenario(replace(HOME, **change), LAB), 1).members
    assert before[6:] == after[6:]
    touched = {
        "up_mbit": {"up_bytes_per_s", "queue_bytes"},
        "last_mile_ms": {"last_mile_s"},
        "gpu": {"step_s"},
        "speed_sigma": {"step_s"},
        "join_after_s": {"sessions"},
        "churn": {"sessions"},
    }[next(iter(change))]
    for old, new in zip(before[1:6], after[1:6], strict=True):
        assert {key for key in vars(old) if getattr(old, key) != getattr(new, key)} == touched


def test_a_larger_group_leaves_all_others_as_they_are():
    small, large = populate(scenario(), 1).members, populate(scenario(replace(HOME, count=9), LAB), 1).members
    assert large[:6] == small[:6]
    for old, new in zip(small[6:], large[9:], strict=True):
        assert replace(new, index=old.index, name=old.name) == old


def test_rates_and_speeds_are_spread_as_drawn():
    crowd = replace(HOME, count=1000)
    members = populate(scenario(crowd, LAB), 0).members[:1000]
    up = np.sort([member.up_bytes_per_s / 125_000 for member in members])
    assert np.abs(np.log10(up / 50) - (np.arange(1000) + 0.5) / 1000).max() < 1.95 / math.sqrt(1000)
    logs = np.log([member.step_s for member in members])
    assert np.std(logs) == pytest.approx(0.3, abs=0.025)
    gpu = GPUS["rtx-4090"]
    assert np.mean(logs) == pytest.approx(math.log(step_time_s(1e9, 1e5, gpu.peak, gpu.mfu)), abs=0.035)


def test_a_set_utilisation_replaces_the_presets():
    plain = replace(HOME, speed_sigma=0.0)
    default, halved = (populate(scenario(replace(plain, mfu=mfu), LAB), 0).members[0].step_s for mfu in (0.0, 0.2))
    assert default / halved == pytest.approx(0.2 / GPUS["rtx-4090"].mfu)


def test_the_founder_is_there_from_beginning_to_end():
    churning = replace(
        HOME, churn=Churn(kind="exponential", session_s=Draw("exponential", (60.0,)), gap_s=Draw.fixed(60))
    )
    members = populate(scenario(churning, LAB), 0).members
    assert members[0].sessions == ALWAYS
    assert all(len(member.sessions) > 1000 for member in members[1:6])
    assert all(member.sessions[0].start_s > 0 for member in members[1:6])  # join_after_s


def test_a_trace_says_who_is_there(tmp_path):
    churn = Churn(kind="diurnal", low=0.2, high=0.9)
    trace = generate(churn, 8, 3600.0 * 1000, seed=9)
    write_trace(trace, tmp_path / "hosts.csv")
    traced = replace(LAB, churn=Churn(kind="trace", trace="hosts.csv"))
    members = populate(scenario(HOME, traced), 0, tmp_path).members
    assert tuple(member.sessions for member in members[6:]) == trace.sessions[:5]
    with pytest.raises(ConfigError, match=r"relative to the scenario file.*'hosts\.csv'"):
        populate(scenario(HOME, traced), 0)
    with pytest.raises(ConfigError, match=r"has 8 members.*got a group of 9"):
        populate(scenario(HOME, replace(traced, count=9)), 0, tmp_path)


def test_attackers_are_drawn_without_the_founder_and_once():
    attacks = (Attack("starve", count=3), Attack("straggle", members=(2,)), Attack("straggle", count=2, strength=0.5))
    for seed in range(30):
        members = populate(scenario(attacks=attacks), seed).members
        assert members[0].attack is None
        assert members[2].attack == attacks[1]
        assert sorted(member.attack.kind for member in members if member.attack) == ["starve"] * 3 + ["straggle"] * 3
    seen = {
        member.index
        for seed in range(60)
        for member in populate(scenario(attacks=attacks), seed).members
        if member.attack
    }
    assert seen == set(range(1, 11))
    few, more = (
        {
            member.index
            for member in populate(scenario(attacks=(Attack("starve", count=count),)), 5).members
            if member.attack
        }
        for count in (2, 4)
    )
    assert few < more


def test_straggle_faults_become_slowdowns():
    faults = (
        Fault("straggle", 10.0, members=(1, 3), for_s=5.0, factor=4.0),
        Fault("straggle", 90.0, members=(3,), factor=2.0),
        Fault("crash", 20.0, members=(3,)),
    )
    population = populate(scenario(faults=faults), 0)
    assert population.faults == faults
    assert population.slowdowns(3) == (Slowdown(10.0, 15.0, 4.0), Slowdown(90.0, math.inf, 2.0))
    assert population.slowdowns(2) == ()
    times = StepTimes(population.members[3], stream(0, "steps", 3), population.slowdowns(3))
    assert [times.factor(t) for t in (0.0, 12.0, 20.0, 95.0)] == [1.0, 4.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("groups", "changes", "why"),
    [
        ((HOME, LAB), {"model": Model(params=7e9, tokens_per_step=1e5)}, r"members 'home': 7e\+09 .* GB more .* 24 GB"),
        ((replace(LAB, memory_gb=8.0),), {}, r"members 'lab': 1e\+09 .* got 8 GB"),
        ((replace(LAB, up_mbit=Draw("normal", (0.001, 5.0))),), {}, r"member \d drew no up_mbit.*got 0"),
    ],
    ids=["memory", "own memory", "no line"],
)
def test_what_only_shows_now_is_refused(groups, changes, why):
    with pytest.raises(ConfigError, match=why):
        populate(scenario(*groups, **changes), 0)


def test_layers_count_for_memory():
    tight = replace(LAB, memory_gb=16.4)
    populate(scenario(tight), 0)
    with pytest.raises(ConfigError, match=r"got 16\.4 GB"):
        populate(scenario(tight, model=Model(params=1e9, tokens_per_step=1e5, layers=200)), 0)


def test_training_charges_the_tasks_own_model_unless_told_otherwise():
    train = {"fidelity": "training", "model": Model(task="builtin:stdlib-gpt")}
    gpu = replace(HOME, speed_sigma=0.0)
    with pytest.raises(ConfigError, match=r"model\.params and model\.tokens_per_step.*got 0 and 0"):
        populate(scenario(gpu, LAB, **train), 0)
    own = populate(scenario(gpu, LAB, **train), 0, task_params=1e6, task_tokens=2048).members[0].step_s
    stand_in = Model(task="builtin:stdlib-gpt", params=1e9)
    big = populate(scenario(gpu, LAB, **(train | {"model": stand_in})), 0, task_params=1e6, task_tokens=2048)
    assert big.members[0].step_s == pytest.approx(1000 * own)
    assert big.members[7].step_s == populate(scenario(), 0).members[7].step_s  # step_ms is not scaled


def test_a_shared_line_keeps_its_two_directions_apart():
    found = populate(scenario(LAB, network=replace(NETWORK, links=(SharedLink("campus", 50, 500),))), 0).topology
    assert (found.groups, found.groups_down) == ((6_250_000,), (62_500_000,))
