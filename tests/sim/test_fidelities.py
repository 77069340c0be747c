"""The two fidelities are two programs, real nodes that exchange real chunks, and arithmetic on times: they agree."""

from __future__ import annotations

from dataclasses import replace

import pytest

from farflung.sim.draw import Draw
from farflung.sim.scenario import Members, Model, Network, Run, Scenario
from farflung.sim.simulate import simulate

PARAMS = 1_000_000


def one_scenario(up: Draw, latency_ms: float) -> Scenario:
    return Scenario(
        name="both",
        fidelity="training",
        rounds=3,
        model=Model(task="builtin:stub", options={"params": PARAMS}),
        run=Run(codec="int8", inner_steps=4, grace_s=20.0),
        members=(Members(count=5, up_mbit=up, down_mbit=Draw.fixed(100), step_ms=Draw.fixed(500), jitter=0.05),),
        network=Network(latency_ms=((latency_ms,),)),
    )


@pytest.mark.parametrize(
    ("up", "latency_ms"),
    [(Draw("loguniform", (10, 50)), 20.0), (Draw.fixed(8), 40.0)],
    ids=["mixed lines", "narrow and far"],
)
def test_real_nodes_and_arithmetic_agree_on_time_and_bytes(up, latency_ms):
    training = one_scenario(up, latency_ms)
    timing = replace(training, fidelity="timing", model=Model(params=PARAMS))
    real, counted = simulate(training, seed=1), simulate(timing, seed=1)
    assert real.finished
    assert counted.finished
    lengths = [[item.end_s - item.start_s for item in result.rounds] for result in (real, counted)]
    assert sum(lengths[1]) == pytest.approx(sum(lengths[0]), rel=0.12)
    assert counted.bytes_sent == pytest.approx(real.bytes_sent, rel=0.08)
    for ours, theirs in zip(real.members, counted.members, strict=True):
        assert ours.up_mbit == theirs.up_mbit, "both draw the same members"
        assert ours.train_s == pytest.approx(theirs.train_s, rel=0.05), "and train for the same time"
