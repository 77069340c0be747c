"""Claims, caps, specs, windows: what the rules stand on."""

import subprocess
import sys
import threading

import pytest
import torch

from farflung.aggregation.registry import parse_rule
from farflung.aggregation.rows import MemoryRows, dense_rows, sparse_row
from farflung.aggregation.weights import Claim, parse_weights, steps, sum_in_order, tokens, uniform
from farflung.aggregation.windows import map_windows, require_denormals
from farflung.protocol.errors import ConfigError, LocalError, TooFewPeers
from farflung.protocol.rows import WINDOW_ALIGN, DenseRow

CLAIMS = [Claim(0, 5), Claim(10, 0), Claim(1 << 62, 1 << 62)]


def test_no_claim_weighs_more_than_the_cap():
    assert uniform().weigh(CLAIMS).tolist() == [1, 1, 1]
    assert steps(500).weigh(CLAIMS).tolist() == [0, 10, 500]
    assert tokens(1 << 53).weigh(CLAIMS).tolist() == [5, 0, 1 << 53]
    assert tokens(3).weigh(CLAIMS).dtype == torch.float64


def test_no_weight_at_all_is_nobodys_fault():
    for policy in (uniform(), steps(5), tokens(5)):
        with pytest.raises(TooFewPeers):
            policy.weigh([])
    with pytest.raises(TooFewPeers):
        steps(5).weigh([Claim(0, 7), Claim(0, 8)])


def test_a_negative_claim_should_not_have_come_this_far():
    with pytest.raises(LocalError):
        steps(5).weigh([Claim(-1, 0), Claim(3, 0)])


@pytest.mark.parametrize("spec", ["uniform", "steps(cap=500)", "tokens(cap=9007199254740992)"])
def test_weight_specs_are_canonical(spec):
    assert parse_weights(spec).spec == spec


@pytest.mark.parametrize(
    "spec", ["uniform(cap=3)", "steps", "steps(cap=0)", "steps(cap=1.5)", "tokens(cap=9007199254740993)", "loss"]
)
def test_weight_specs_that_are_wrong_are_refused(spec):
    with pytest.raises(ConfigError):
        parse_weights(spec)


def test_sums_are_plain_and_in_order():
    assert sum_in_order([1e16, 1.0, 1.0]) == 1e16
    assert sum_in_order([1.0, 1.0, 1e16]) == 1e16 + 2


def test_rule_specs_are_canonical():
    assert [parse_rule(spec).spec for spec in ("mean", "mean()", " median( f = 1 )")] == ["mean", "mean", "median(f=1)"]
    assert [parse_rule(spec).f for spec in ("mean", "median(f=3)")] == [0, 3]
    assert [parse_rule(spec).rows_min for spec in ("mean", "median(f=3)")] == [1, 7]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("average", "expected one of mean, median(f=...) at character 1, got 'average'"),
        ("median", "expected median(f=...), 'f' is missing in 'median'"),
        ("median(g=1)", "expected median(f=...), got 'g=1' at character 8"),
        ("median(f=1,f=2)", "expected median(f=...), got 'f=2' at character 12"),
        ("mean(f=1)", "expected mean, got 'f=1' at character 6"),
        ("median(f=128)", "'f' in 'median(f=128)' is an integer from 0 to 127, got '128'"),
        ("median(f=-1)", "'f' in 'median(f=-1)' is an integer from 0 to 127, got '-1'"),
        ("median(f=1)|x", "expected median(f=...) to end at character 12, got 'median(f=1)|x'"),
    ],
)
def test_a_wrong_rule_spec_says_where_and_what_is_allowed(spec, words):
    with pytest.raises(ConfigError) as refused:
        parse_rule(spec)
    assert str(refused.value) == words


@pytest.mark.parametrize("start", range(0, 3 * WINDOW_ALIGN, WINDOW_ALIGN))
def test_windows_of_rows_in_memory_are_the_rows(start, random_rows):
    row_d = random_rows(1, 1, 2 * WINDOW_ALIGN + 9, zeros=0.8)[0]
    dense, sparse = MemoryRows((DenseRow(row_d), sparse_row(row_d))).window(start, start + WINDOW_ALIGN)
    assert torch.equal(
        torch.zeros(sparse.size).index_put((sparse.index_k,), sparse.value_k)[: len(row_d) - start], (dense.value_d)
    )


def test_rows_of_unlike_length_are_refused():
    with pytest.raises(LocalError):
        dense_rows([torch.ones(3), torch.ones(4)])


@pytest.mark.parametrize("threads", [1, 2, 9])
def test_every_window_is_visited_once_and_reported_in_order(threads):
    visits = map_windows(70_000, lambda: lambda start, stop: (start, stop), threads=threads, window=WINDOW_ALIGN)
    assert visits == [(start, min(start + WINDOW_ALIGN, 70_000)) for start in range(0, 70_000, WINDOW_ALIGN)]


def test_an_error_in_one_thread_stops_the_others():
    visited, lock = [], threading.Lock()

    def visit(start, stop):
        with lock:
            visited.append(start)
        raise LocalError("as planned")

    with pytest.raises(LocalError, match="as planned"):
        map_windows(1000 * WINDOW_ALIGN, lambda: visit, threads=4, window=WINDOW_ALIGN)
    assert len(visited) <= 4


def test_a_thread_that_flushes_denormals_is_refused():
    assert torch.set_flush_denormal(True)
    try:
        with pytest.raises(ConfigError, match="set_flush_denormal"):
            require_denormals()
    finally:
        torch.set_flush_denormal(False)
    require_denormals()


def test_parsing_a_run_does_not_import_numba():
    code = (
        "import sys; from farflung.aggregation import registry, outer, weights; registry.parse_rule('median(f=1)');"
        "outer.parse_outer('nesterov(lr=0.7,momentum=0.9)'); sys.exit('numba' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
