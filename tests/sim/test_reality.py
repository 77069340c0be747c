"""The simulator against what was measured: real gRPC, TLS and TCP between network namespaces (tests/data).

Recorded, so that it needs no root; `make soak` also measures a little anew.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from reality_predict import compare  # noqa: E402
from reality_scenarios import SCENARIOS, read_record  # noqa: E402
from wan import unavailable  # noqa: E402

RECORDED = read_record()
NAMES = list(dict.fromkeys(row.scenario for row in RECORDED))
TRANSFERS = [name for name in NAMES if SCENARIOS[name].transfers]
ROUNDS = [
    pytest.param(name, marks=[] if name == "round-fq-40ms" else pytest.mark.soak)
    for name in NAMES
    if not SCENARIOS[name].transfers
]


def rows_of(name):
    return [row for row in RECORDED if row.scenario == name]


def test_every_scenario_was_measured_at_least_three_times_and_lost_no_bytes():
    assert set(NAMES) == set(SCENARIOS)
    for name in NAMES:
        rows = rows_of(name)
        assert len({row.repeat for row in rows}) >= 3
        assert len(rows) == len({(row.repeat, row.host) for row in rows})
        sent, received = sum(row.wire_up_bytes for row in rows), sum(row.wire_down_bytes for row in rows)
        assert 0.99 < received / sent <= 1.02, name  # what the downlinks' queues drop never arrives
        if SCENARIOS[name].transfers:
            wanted = sum(size for _, _, size in SCENARIOS[name].transfers)
            for repeat in {row.repeat for row in rows}:
                assert sum(row.message_bytes_down for row in rows if row.repeat == repeat) == wanted


@pytest.mark.parametrize("name", TRANSFERS)
def test_transfers_take_as_long_as_in_reality_and_move_the_same_bytes(name):
    compared = compare(SCENARIOS[name], rows_of(name))
    assert compared.reached, compared
    assert abs(compared.wire_error) <= 0.01, compared


@pytest.mark.parametrize("name", ROUNDS)
def test_rounds_of_a_swarm_take_as_long_as_in_reality_and_move_the_same_bytes(name):
    compared = compare(SCENARIOS[name], rows_of(name))
    assert compared.reached, compared
    assert abs(compared.wire_error) <= 0.02, compared


@pytest.mark.netns
@pytest.mark.soak
@pytest.mark.parametrize("name", ["pairs-tbf", "pairs-40ms", "ring-fifo-40ms", "round-fq-40ms"])
def test_reality_is_still_what_was_recorded(name, tmp_path):
    if why := unavailable():
        pytest.skip(why)
    command = [sys.executable, str(ROOT / "benchmarks" / "reality.py"), name, "--repeats", "2", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=600)
    compared = compare(SCENARIOS[name], read_record(tmp_path / "reality_netns.csv"))
    assert abs(compared.error) <= compared.goal, compared  # single hosts suffer from whatever else the machine does
