"""The outer step right behind the rule: the same bytes as one after the other, however the rule's windows lie."""

import numpy as np
import pytest
import torch

from farflung.aggregation.landing import Landing
from farflung.aggregation.mean import SPARSE_WINDOW
from farflung.aggregation.outer import momentum_gain, norm, parse_outer
from farflung.aggregation.registry import parse_rule
from farflung.aggregation.rows import MemoryRows, dense_rows, sparse_row
from farflung.aggregation.rule import Context
from farflung.aggregation.windows import WINDOW
from farflung.protocol.rows import DenseRow, Reason

D = 3 * WINDOW + 777


def bits(vector):
    return np.asarray(vector).tobytes()


def combine(spec, rows, **settings):
    parsed = parse_rule(spec)
    return parsed.rule(rows, torch.arange(1.0, rows.n + 1).double(), f=parsed.f, context=Context(**settings))


def landing_of(outer, theta_d, momentum_d, out_d, momentum_out_d):
    return Landing(outer, theta_d, momentum_d, out_d, theta_out_d=out_d, momentum_out_d=momentum_out_d)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("calls", [True, False])
@pytest.mark.parametrize("spec", ["mean", "median(f=1)"])
@pytest.mark.parametrize("outer", ["sgd(lr=0.7)", "nesterov(lr=0.7,momentum=0.9)"])
def test_a_landing_is_the_rule_the_norm_and_the_step_one_after_the_other(outer, spec, calls, threads, random_rows):
    outer, rows = parse_outer(outer), dense_rows(random_rows(1, 5, D))
    theta_d, momentum_d = random_rows(2, 2, D)
    momentum_d = momentum_d if outer.state_buffers else None
    update_d = combine(spec, rows).update_d
    wanted_d, room_d = torch.empty(D), torch.empty(D) if outer.state_buffers else None
    outer.step(theta_d, momentum_d, update_d, theta_out_d=wanted_d, momentum_out_d=room_d)
    out_d, momentum_out_d = torch.empty(D), None if room_d is None else torch.empty(D)
    landing = landing_of(outer, theta_d, momentum_d, out_d, momentum_out_d)
    combine(spec, rows, out_d=out_d, threads=threads, finish=landing if calls else None)
    numbers = landing.end(threads)
    assert bits(out_d) == bits(wanted_d)
    assert numbers["update_norm"] == pytest.approx(norm(update_d), rel=1e-12)
    if room_d is not None:
        assert bits(momentum_out_d) == bits(room_d)
        gain = momentum_gain(outer.momentum, momentum_d, update_d)
        assert numbers["momentum_gain"] == pytest.approx(gain, rel=1e-9)


@pytest.mark.parametrize("d", [777, D, SPARSE_WINDOW + WINDOW + 5])
def test_sparse_rows_have_the_mean_of_the_same_rows_written_out(d, random_rows):
    row_nd = random_rows(3, 4, d, zeros=0.97)
    row_nd[1, row_nd[0] != 0] = -2 * row_nd[0][row_nd[0] != 0]
    row_nd[2:, row_nd[0] != 0] = 0  # 1 a - 2 a / 2: sums that cancel to zero
    row_nd[1] /= 4
    sparse = MemoryRows(tuple(sparse_row(row_d) for row_d in row_nd))
    written_out = combine("mean", dense_rows(row_nd))
    out_d = torch.full((d,), float("nan"))
    found = combine("mean", sparse, out_d=out_d, threads=2)
    assert bits(out_d) == bits(written_out.update_d)
    assert found.verdicts == written_out.verdicts
    assert (out_d == 0).any()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("d", [777, D, 2 * SPARSE_WINDOW + WINDOW + 5])
def test_landing_entries_is_landing_the_same_update_written_out(d, in_place, threads, random_rows):
    row_nd = random_rows(3, 4, d, zeros=0.97)
    row_nd[1, row_nd[0] != 0] = row_nd[0][row_nd[0] != 0]  # two rows with the same entries
    sparse = MemoryRows(tuple(sparse_row(row_d) for row_d in row_nd))
    outer, theta_d = parse_outer("sgd(lr=0.7)"), random_rows(2, 1, d)[0]
    update_d, wanted_d = combine("mean", dense_rows(row_nd)).update_d, torch.empty(d)
    outer.step(theta_d, None, update_d, theta_out_d=wanted_d, momentum_out_d=None)
    theta_out_d = theta_d if in_place else torch.full((d,), float("nan"))
    landing = Landing(outer, theta_d, None, torch.empty(d), theta_out_d=theta_out_d, momentum_out_d=None)
    combine("mean", sparse, out_d=torch.empty(d), threads=threads, finish=landing, entries=landing.entries)
    assert bits(theta_out_d) == bits(wanted_d)
    assert landing.end(threads)["update_norm"] == pytest.approx(norm(update_d), rel=1e-12)


def test_windows_landed_again_as_entries_count_once(random_rows):
    theta_d, out_d = random_rows(2, 1, D)[0], torch.empty(D)
    outer, update_d = parse_outer("sgd(lr=1.0)"), random_rows(4, 1, D, zeros=0.9)[0]
    out_d.copy_(update_d)
    landing = landing_of(outer, theta_d, None, out_d, None)
    landing(0, D)
    index = update_d.nonzero().flatten().numpy()
    landing.entries(0, D, [(index, update_d.numpy()[index])])
    assert landing.end(1)["update_norm"] == pytest.approx(norm(update_d), rel=1e-12)


def test_an_optimiser_with_momentum_takes_no_entries():
    vectors = torch.zeros(4, 5)
    landing = landing_of(parse_outer("nesterov(lr=0.7,momentum=0.9)"), *vectors)
    assert landing.entries is None


@pytest.mark.parametrize("place", [0, SPARSE_WINDOW + 1])
@pytest.mark.parametrize("entries", [True, False])
def test_a_wild_sparse_row_is_left_out_and_its_windows_are_landed_again(place, entries, random_rows):
    d = SPARSE_WINDOW + WINDOW
    row_nd = random_rows(4, 3, d, zeros=0.97)
    row_nd[1, place] = float("inf")
    kept_nd = row_nd.clone()
    kept_nd[1] = 0
    outer, theta_d, out_d = parse_outer("sgd(lr=1.0)"), random_rows(5, 1, d)[0], torch.empty(d)
    landing = landing_of(outer, theta_d, None, out_d, None)
    rows = MemoryRows(tuple(map(sparse_row, row_nd)))
    found = combine("mean", rows, out_d=out_d, finish=landing, entries=landing.entries if entries else None)
    update_d = combine("mean", dense_rows(kept_nd)).update_d
    wanted_d = torch.empty(d)
    outer.step(theta_d, None, update_d, theta_out_d=wanted_d, momentum_out_d=None)
    assert [verdict.reason for verdict in found.verdicts] == [Reason.KEPT, Reason.ANOMALY, Reason.KEPT]
    assert bits(out_d) == bits(wanted_d)
    assert landing.end(1)["update_norm"] == pytest.approx(norm(update_d), rel=1e-12)


def test_one_dense_row_among_sparse_ones_changes_nothing(random_rows):
    row_nd = random_rows(6, 3, D, zeros=0.9)
    mixed = MemoryRows((sparse_row(row_nd[0]), DenseRow(row_nd[1]), sparse_row(row_nd[2])))
    assert bits(combine("mean", mixed).update_d) == bits(combine("mean", dense_rows(row_nd)).update_d)
