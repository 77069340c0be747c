"""Timing-only fidelity: rounds obey the node's rules, and what is said of them adds up."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from farflung.compression import parse_codec
from farflung.protocol.deadline import closing_time
from farflung.protocol.errors import ConfigError
from farflung.protocol.schema import Schema, TensorSpec
from farflung.sim.draw import Draw
from farflung.sim.results import CAUSES, SEGMENTS, RunResult
from farflung.sim.scenario import Attack, Churn, Fault, Members, Model, Network, Run, Scenario, SharedLink
from farflung.sim.scenario_file import load_scenario
from farflung.sim.timing import run_timing
from farflung.sim.timing.charges import Charges
from farflung.sim.timing.presence import Presence
from farflung.sim.timing.swarm import Swarm
from farflung.sim.timing.votes import Heard, _closing

NEAR = Network(latency_ms=((0.0,),), window_mb=1e6)


def scenario(
    count: int = 4,
    rounds: int = 6,
    *,
    mbit: float = 100,
    params: float = 1e8,
    run: Run | None = None,
    network: Network = NEAR,
    more: tuple[Members, ...] = (),
    faults: tuple[Fault, ...] = (),
    attacks: tuple[Attack, ...] = (),
    **group: object,
) -> Scenario:
    settings = {"up_mbit": Draw.fixed(mbit), "down_mbit": Draw.fixed(10 * mbit), "step_ms": Draw.fixed(1000)} | group
    return Scenario(
        name="test",
        members=(Members(count=count, name="member", **settings), *more),
        model=Model(params=params, tokens_per_step=4096),
        rounds=rounds,
        run=run or Run(inner_steps=50, grace_s=5),
        network=network,
        faults=faults,
        attacks=attacks,
    )


MIXED = scenario(
    6,
    network=Network(latency_ms=((20.0,),)),
    up_mbit=Draw("loguniform", (20, 200)),
    jitter=0.1,
    speed_sigma=0.2,
    busy_every_s=300,
    busy_for_s=60,
    fsync_ms=5,
    disk_mb_s=200,
)


def lost(result: RunResult, cause: str, member: int | None = None) -> float:
    """Seconds of all rounds blamed on a cause (and a member)."""
    blamed = [item for one in result.rounds for item in one.blame if item.cause == cause]
    return sum(item.seconds for item in blamed if member is None or item.member == member)


# -- what is said adds up ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["home-40", "intellect-14", "churn-hourly", "straggler-4x"])
@pytest.mark.parametrize("seed", [0, 1])
def test_blame_adds_up_rounds_follow_each_other_and_segments_do_not_overlap(name, seed):
    result = run_timing(replace(load_scenario(name), rounds=12, loss_goal=0.0), seed)
    assert len(result.rounds) == 12
    ended_s = 0.0
    for item in result.rounds:
        assert item.start_s == ended_s
        ended_s = item.end_s
        assert sum(blame.seconds for blame in item.blame) == pytest.approx(item.end_s - item.start_s, rel=1e-9)
        assert all(blame.cause in CAUSES and blame.seconds > 0 for blame in item.blame)
        assert all(-1 <= blame.member < len(result.members) for blame in item.blame)
        assert 0 < item.payloads <= item.members
    assert result.duration_s == ended_s
    spans = {item.round_index: (item.start_s, item.end_s) for item in result.rounds}
    before: dict[tuple[int, int], float] = {}
    for segment in result.segments:
        assert segment.kind in SEGMENTS
        start_s, end_s = spans[segment.round_index]
        assert start_s <= segment.start_s < segment.end_s <= end_s
        assert segment.start_s >= before.get((segment.round_index, segment.member), 0.0)
        before[segment.round_index, segment.member] = segment.end_s
    for (round_index, _), end_s in before.items():
        assert end_s == spans[round_index][1]  # everybody is accounted for until the round's end
    for member in result.members:
        assert 0 <= member.train_s <= member.online_s
    assert sum(one.bytes_sent for one in result.members) == pytest.approx(
        sum(one.bytes_received for one in result.members), rel=1e-6
    )


def test_equal_seeds_give_equal_runs_and_other_seeds_others():
    first, again, other = run_timing(MIXED, 3), run_timing(MIXED, 3), run_timing(MIXED, 4)
    assert replace(first, wall_s=0) == replace(again, wall_s=0)
    assert first.events_digest != other.events_digest


def test_one_member_alone_trains_nearly_all_the_time():
    result = run_timing(scenario(1, params=1e6), 0)
    assert result.finished
    assert 0.99 < result.utilisation <= 1.0
    assert result.bytes_sent == 0


def test_equal_members_meet_the_closed_form_of_a_round():
    setting = scenario(4, codec_free := 3, run=Run(codec="int8", inner_steps=50, grace_s=5, outer="sgd(lr=1.0)"))
    result, charges = run_timing(setting, 0), Charges.of(setting)
    assert codec_free == len(result.rounds)
    line = 100 * 125_000 / (1514 / 1448 * (1 + 66 / (2 * 1514))) * 0.9
    exchange_s = 3 * charges.payload_bytes / line
    expected_s = 50.0 + charges.encode_s + exchange_s + charges.check_s + charges.apply_s(4)
    for item in result.rounds:
        assert item.end_s - item.start_s == pytest.approx(expected_s, rel=2e-3)
        assert item.payloads == 4
    assert lost(result, "compute") == pytest.approx(3 * 50.0)
    assert lost(result, "upload") == pytest.approx(3 * exchange_s, rel=2e-3)
    assert result.members[0].bytes_received == pytest.approx(3 * 3 * charges.payload_bytes)


@pytest.mark.parametrize("spec", ["fp32", "int8", "ef(1)|q2", "ef(0.95)|topk(64/4096)|q2"])
@pytest.mark.parametrize("d", [4096, 10_001])
def test_charged_bytes_are_those_of_the_real_codec(spec, d):
    codec, schema = parse_codec(spec), Schema((TensorSpec("model", (d,), "float32"),))
    private, shared = codec.init(schema)
    payload, _ = codec.encode(torch.randn(d, generator=torch.Generator().manual_seed(0)), private, shared, 1)
    charged = Charges.of(scenario(params=d, run=Run(codec=spec)))
    assert charged.payload_bytes == pytest.approx(len(payload))


def test_twice_the_local_steps_halve_the_bytes_per_token():
    def per_token(steps):
        result = run_timing(scenario(run=Run(inner_steps=steps)), 0)
        return result.bytes_sent / sum(item.tokens for item in result.members)

    assert per_token(100) == pytest.approx(per_token(50) / 2)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exchange", ["gather", "star", "ring", "butterfly"])
def test_more_bandwidth_never_makes_a_run_slower(exchange, seed):
    # A round that waits for everybody: with a grace window, a faster line may bring in one more payload to wait for.
    waiting = Run(inner_steps=20, exchange=exchange, grace_s=600, quorum_percent=100, deadline_ceiling_s=3600)
    shape = scenario(5, 3, params=3e7, run=waiting, up_mbit=Draw("loguniform", (10, 100)))
    group = shape.members[0]
    before_s = run_timing(shape, seed).duration_s
    for factor in (1.5, 4.0):
        wider = replace(group, up_mbit=Draw("loguniform", (10 * factor, 100 * factor)), down_mbit=Draw.fixed(4000))
        after_s = run_timing(replace(shape, members=(wider,)), seed).duration_s
        assert after_s <= before_s * (1 + 1e-9)
        before_s = after_s


def test_a_narrow_member_rules_the_symmetric_collectives_and_a_star_is_slowest():
    def exchanging_s(exchange):
        run = Run(codec="int8", inner_steps=20, exchange=exchange, deadline_ceiling_s=3600)
        many = scenario(40, 2, params=1e9, run=run, up_mbit=Draw("loguniform", (50, 500)), mbit=100)
        return lost(run_timing(many, 0), "upload") + lost(run_timing(many, 0), "download")

    ring, butterfly, star = exchanging_s("ring"), exchanging_s("butterfly"), exchanging_s("star")
    assert ring == pytest.approx(butterfly, rel=0.02)
    assert 2 * ring < star < 8 * ring  # 4 times where 40 such homes were simulated flow by flow


@pytest.mark.parametrize(("mbit", "low", "high"), [(350, 0.80, 0.90), (2500, 0.94, 0.98)])
def test_intellect_1_is_as_busy_as_published(mbit, low, high):
    """arXiv:2412.01152: 38 min of training, then 1 to 7 min of int8 ring: 83 % worldwide, 96 % within the USA."""
    published = load_scenario("intellect-14")
    members = tuple(replace(group, up_mbit=Draw.fixed(mbit)) for group in published.members)
    result = run_timing(replace(published, members=members, rounds=5), 0)
    assert low < result.utilisation < high


# -- the node's rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_rounds_close_when_the_protocol_says_so(seed):
    """Against `closing_time`, asked again at every event."""
    rng = np.random.default_rng(seed)
    setting = scenario(int(rng.integers(2, 7)), run=Run(grace_s=float(rng.uniform(1, 20)), quorum_percent=60))
    swarm = Swarm(setting, seed, None)
    n = swarm.n
    speaks = rng.random(n) < 0.8
    origins = np.flatnonzero(speaks) if speaks.any() else np.array([0])
    heard_kn = rng.uniform(0, 60, (len(origins), n))
    silent_n = np.where(
        np.isin(np.arange(n), origins), -np.inf, np.where(rng.random(n) < 0.5, rng.uniform(0, 60), np.inf)
    )
    deadline_s = float(rng.uniform(10, 100))
    heard = Heard(origins, heard_kn, silent_n, np.full(n, deadline_s))
    closing_n, _, _ = _closing(swarm, np.zeros(n), heard)
    need = -(-n * 60 // 100)
    for member in range(n):
        arrivals = np.sort(heard_kn[:, member])
        quorum_s = float(arrivals[need - 1]) if len(arrivals) >= need else None
        events = sorted(
            [*arrivals, *silent_n[np.isfinite(silent_n)], deadline_s, (quorum_s or 0) + setting.run.grace_s]
        )
        for now_s in events:
            waiting = [k for k in range(len(origins)) if heard_kn[k, member] > now_s]
            waiting += [j for j in range(n) if silent_n[j] > now_s]
            due_s = closing_time(
                now_s=now_s,
                waiting_for=waiting,
                payloads_held=int((arrivals <= now_s).sum()),
                membership_changes=0,
                quorum_since_s=quorum_s if quorum_s is not None and quorum_s <= now_s else None,
                grace_s=setting.run.grace_s,
                deadline_s=deadline_s,
            )
            if due_s <= now_s:
                assert closing_n[member] == pytest.approx(now_s)
                break
        else:
            raise AssertionError("it never closes")


def slow_member(**run: object) -> Scenario:
    slow = Members(count=1, name="slow", up_mbit=Draw.fixed(100), down_mbit=Draw.fixed(1000), step_ms=Draw.fixed(3000))
    return scenario(5, run=Run(**({"inner_steps": 50, "grace_s": 5} | run)), more=(slow,))


def test_a_straggler_is_hurried_after_a_quorum_and_blamed_for_what_the_others_wait():
    impatient = run_timing(slow_member(grace_s=60), 0)
    patient = run_timing(slow_member(grace_s=60, quorum_percent=100), 0)
    assert impatient.members[5].steps < 0.8 * impatient.members[0].steps
    assert impatient.members[5].rounds_counted == 6  # it sends what it has, in time
    assert patient.members[5].steps == patient.members[0].steps
    assert patient.duration_s > 1.5 * impatient.duration_s
    assert lost(patient, "straggler", 5) == pytest.approx(6 * 100, rel=0.05)  # 50 steps at 3 s instead of 1 s
    assert lost(patient, "straggler", 0) == 0


def test_a_crashed_member_is_waited_for_three_times_and_comes_back_with_the_state():
    crash = (Fault("crash", 55.0, members=(2,), for_s=900.0),)
    run = Run(codec="int8", outer="nesterov(lr=0.7,momentum=0.9)", inner_steps=50, grace_s=20, snapshot_rounds=3)
    result = run_timing(scenario(5, 20, run=run, faults=crash), 0)
    members = [item.members for item in result.rounds]
    gone = members.index(4)
    assert gone == 3  # its first payload was still on the way when it went
    assert members[-1] == 5
    waits = [sum(b.seconds for b in item.blame if b.cause == "deadline" and b.member == 2) for item in result.rounds]
    assert waits[1:gone] == [pytest.approx(20, rel=0.1)] * 2  # the grace window
    assert sum(waits[gone:]) == 0
    assert result.members[2].online_s == pytest.approx(result.duration_s - 900)
    sent = 4 * Charges.of(scenario(run=run)).payload_bytes
    counted = result.members[2].rounds_counted
    assert result.members[2].bytes_received > counted * sent + 4 * 2 * 1e8 * 0.99  # theta and momentum, fetched once


def test_whoever_leaves_politely_is_not_waited_for():
    crash, leave = (
        run_timing(scenario(5, faults=(Fault(kind, 60.0, members=(2,)),), run=Run(inner_steps=50, grace_s=30)), 0)
        for kind in ("crash", "leave")
    )
    assert lost(leave, "deadline") == 0
    assert lost(crash, "deadline", 2) > 25
    assert leave.rounds[-1].members == 4


def test_the_smaller_side_of_a_partition_is_missed_and_then_caught_up():
    cut = (Fault("partition", 120.0, members=(3, 4), for_s=400.0),)
    result = run_timing(scenario(5, 16, faults=cut), 0)
    assert result.finished
    assert min(item.payloads for item in result.rounds) == 3
    assert result.rounds[-1].payloads == 5
    assert result.members[3].online_s == pytest.approx(result.duration_s)  # its machine ran all the time


def test_without_a_quorum_the_run_stops_and_says_so():
    result = run_timing(scenario(4, faults=(Fault("crash", 100.0, members=(1, 2, 3)),)), 0)
    assert not result.finished
    assert 0 < len(result.rounds) < 6
    assert any("too few voters" in note for note in result.notes)


def test_faulty_lines_disks_and_machines_cost_time_while_they_last():
    plain = run_timing(scenario(4, 8, fsync_ms=10, disk_mb_s=100), 0)
    for kind, factor in (("link", 0.2), ("straggle", 3.0), ("slow_disk", 20.0)):
        fault = Fault(kind, 0.0, members=(1, 2, 3), for_s=200.0, factor=factor)
        hit = run_timing(scenario(4, 8, fsync_ms=10, disk_mb_s=100, faults=(fault,)), 0)
        assert hit.rounds[0].end_s > 1.05 * plain.rounds[0].end_s, kind
        lengths = [item.end_s - item.start_s for item in hit.rounds]
        assert lengths[-1] == pytest.approx(plain.rounds[-1].end_s - plain.rounds[-1].start_s, rel=0.02), kind


def test_attackers_on_time_make_the_others_wait_as_long_as_the_rules_allow():
    honest = run_timing(scenario(5, 4), 0)
    late = run_timing(scenario(5, 4, attacks=(Attack("straggle", members=(2,), strength=0.9, from_round=2),)), 0)
    starve = run_timing(scenario(5, 4, attacks=(Attack("starve", members=(2,), from_round=2),)), 0)
    assert late.rounds[0].end_s == honest.rounds[0].end_s == starve.rounds[0].end_s
    for result in (late, starve):
        assert 4 <= result.duration_s - honest.duration_s <= 3 * 20
        assert [item.payloads for item in result.rounds] == [5, 4, 4, 4]
        assert result.members[2].attacker in ("straggle", "starve")
    assert lost(late, "straggler", 2) > 4


def test_a_data_cap_ends_a_members_time():
    setting = scenario(4, 8, data_cap_gb=0.4)
    result = run_timing(setting, 0)
    payload = Charges.of(setting).payload_bytes
    rounds = math.ceil(0.4e9 / (6 * payload))
    assert all(item.rounds_counted == rounds for item in result.members)
    assert not result.finished
    assert any("used up their data" in note for note in result.notes)


def test_members_nobody_can_call_take_no_part():
    hidden = Members(
        count=2,
        name="hidden",
        up_mbit=Draw.fixed(100),
        down_mbit=Draw.fixed(100),
        step_ms=Draw.fixed(1000),
        reachable=False,
    )
    result = run_timing(scenario(5, 8, more=(hidden,)), 0)
    assert [item.rounds_counted for item in result.members[5:]] == [0, 0]
    assert [item.members for item in result.rounds] == [7, 7, 7, 5, 5, 5, 5, 5]
    assert any("cannot be reached" in note for note in result.notes)


def test_late_joiners_are_admitted_at_a_certificate_and_fetch_only_what_is_cheaper():
    late = Members(
        count=1,
        name="late",
        up_mbit=Draw.fixed(100),
        down_mbit=Draw.fixed(1000),
        step_ms=Draw.fixed(1000),
        join_after_s=Draw.fixed(70),
    )
    result = run_timing(scenario(3, 8, more=(late,)), 0)
    sizes = [item.members for item in result.rounds]
    assert sizes[0] == 3
    assert sizes[-1] == 4
    assert result.members[3].rounds_counted == len([size for size in sizes if size == 4])


def test_churn_keeps_members_coming_and_going():
    churn = Churn(kind="exponential", session_s=Draw("exponential", (600.0,)), gap_s=Draw("exponential", (200.0,)))
    result = run_timing(scenario(12, 40, churn=churn, run=Run(inner_steps=50, grace_s=10)), 1)
    assert result.finished
    assert len({item.payloads for item in result.rounds}) > 2
    assert all(member.online_s < 0.99 * result.duration_s for member in result.members[1:4])
    assert result.members[0].online_s == pytest.approx(result.duration_s)
    assert {segment.kind for segment in result.segments} >= {"train", "offline"}


def test_applying_a_large_model_outlasts_the_first_views():
    small = run_timing(scenario(4, 3, params=1e6), 0)
    large = run_timing(scenario(4, 3, mbit=10_000, params=1e10, run=Run(inner_steps=50, deadline_ceiling_s=3600)), 0)
    assert sum(item.views for item in small.rounds) == 0
    assert all(item.views > 0 for item in large.rounds)
    assert not any("longest view" in note for note in large.notes)
    huge = run_timing(scenario(8, 2, mbit=1e5, params=1e11, run=Run(inner_steps=50, deadline_ceiling_s=36_000)), 0)
    assert huge.finished
    assert any("longest view" in note for note in huge.notes)


def test_a_shared_line_slows_those_behind_it():
    link = Network(latency_ms=((0.0,),), links=(SharedLink("house", 50.0, 50.0),), window_mb=1e6)
    behind = scenario(4, 3, network=link, link="house", more=(replace(scenario(2).members[0], name="out", count=2),))
    free = scenario(4, 3, more=(replace(scenario(2).members[0], name="out", count=2),))
    assert run_timing(behind, 0).duration_s > 1.2 * run_timing(free, 0).duration_s


# -- estimates and refusals -------------------------------------------------------------------------------------------


def test_losses_are_estimates_that_fall_and_say_so():
    result = run_timing(scenario(4, 30, params=3.5e7, run=Run(inner_steps=100)), 0)
    losses = [item.loss_estimate for item in result.rounds if item.loss_estimate is not None]
    assert losses == sorted(losses, reverse=True)
    assert all(item.loss is None for item in result.rounds)
    assert result.final_loss == losses[-1]
    assert any("estimates, not measurements" in note for note in result.notes)


def test_the_time_to_a_goal_is_in_the_rounds_or_extrapolated_or_refused():
    plain = scenario(4, 30, params=3.5e7, run=Run(inner_steps=100))
    losses = {item.round_index: item.loss_estimate for item in run_timing(plain, 0).rounds}
    within = run_timing(replace(plain, loss_goal=losses[30] + 1e-6), 0)
    assert within.time_to_goal_s == within.rounds[-1].end_s
    beyond = run_timing(replace(plain, loss_goal=losses[30] - 0.05), 0)
    longer = run_timing(replace(plain, loss_goal=losses[30] - 0.05, rounds=60), 0)
    assert beyond.time_to_goal_s > beyond.duration_s
    assert longer.time_to_goal_s == pytest.approx(beyond.time_to_goal_s, rel=0.05)
    assert run_timing(replace(plain, loss_goal=1.0), 0).time_to_goal_s is None


def test_a_time_limit_leaves_a_run_unfinished():
    result = run_timing(replace(scenario(rounds=50), limit_h=0.1), 0)
    assert not result.finished
    assert result.duration_s == 360
    assert any("limit_h" in note for note in result.notes)


def test_too_many_members_for_a_gather_are_refused():
    with pytest.raises(ConfigError, match=r"4096.*got 5000"):
        run_timing(scenario(5000), 0)


def test_presence_is_cut_by_faults():
    presence = Presence([(0.0, 100.0, True), (200.0, math.inf, False)])
    assert not presence.always
    assert [item.polite for item in presence.departures(0, 300)] == [False]
    presence.cut(50.0, 60.0, polite=True)
    assert [(item.at_s, item.polite) for item in presence.departures(0, 300)] == [(50.0, True), (100.0, False)]
    presence.isolate(250.0, 260.0)
    assert presence.powered(255.0)
    assert not presence.connected(255.0)
    assert presence.next_connected(255.0) == 260.0
    assert presence.next_connected(120.0) == 200.0
    assert presence.powered_s(0.0, 300.0) == 190.0
    assert presence.edges(40.0, 270.0) == [
        (50.0, False),
        (60.0, True),
        (100.0, False),
        (200.0, True),
        (250.0, False),
        (260.0, True),
    ]
