"""SparseLoCo, DeMo, PowerSGD, QSGD and E3M0 against what their papers say, written again in `tests/oracles`."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "oracles"))

import demo
import e3m0
import powersgd
import qsgd
import sparseloco

from farflung.compression import parse_codec
from farflung.protocol.errors import LocalError
from farflung.protocol.rows import DenseRow
from farflung.protocol.schema import Schema, TensorSpec

SIZES = (1, 4095, 4096, 4097, 10_000_000)
BF16 = 2.0**-8
"""Rounding of a level to bf16, and of the sums behind it."""


def schema_of(*shape):
    return Schema((TensorSpec("w", shape, "float32"),))


def sent_by(spec, schema, update_d, round_index=0):
    """What everybody reads of a fresh member's payload, as fp32 numpy."""
    codec = parse_codec(spec)
    private, shared = codec.init(schema)
    payload, _ = codec.encode(update_d, private, shared, round_index)
    row = codec.decode(payload, schema, shared, round_index, 0, schema.numel)
    if isinstance(row, DenseRow):
        return row.value_d.numpy()
    dense = torch.zeros(row.size)
    dense[row.index_k.long()] = row.value_k
    return dense.numpy()


def shapes_of(d):
    """Adversarial vectors, but only a plain one where an oracle takes seconds."""
    return ("gauss",) if d > 100_000 else ("gauss", "zeros", "equal", "spike", "denormal", "ties", "cauchy", "patches")


CASES = [(d, shape) for d in SIZES for shape in shapes_of(d)]


@pytest.mark.parametrize(("d", "kind"), CASES)
def test_e3m0_is_streaming_diloco_s(d, kind, vector):
    update_d = vector(kind, d)
    sent_d = sent_by("e3m0(block=512)", schema_of(d), update_d)
    x_d = update_d.double().numpy()
    for start in range(0, d, 512) if d < 10**6 else range(0, d, 512 * 97):
        part = np.s_[start : min(start + 512, d)]
        expected = e3m0.quantise(x_d[part]) if np.abs(x_d[part]).max() >= 2.0**-120 else 0 * x_d[part]
        np.testing.assert_allclose(sent_d[part], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("d", "kind"), CASES)
def test_qsgd_rounds_to_a_neighbouring_level_with_the_right_probability(d, kind, vector):
    update_d, levels, block = vector(kind, d), 7, 512
    sent_d = sent_by(f"qsgd(levels={levels}, block={block})", schema_of(d), update_d)
    x_d = update_d.double().numpy()
    surprise, draws, variance = 0.0, 0, 0.0
    for start in range(0, d, block) if d < 10**6 else range(0, d, block * 97):
        part = np.s_[start : min(start + block, d)]
        norm = np.linalg.norm(x_d[part])
        if norm < 2.0**-100:
            assert not sent_d[part].any()
            continue
        low, high, chance = qsgd.neighbours(x_d[part], levels)
        near_low = np.isclose(sent_d[part], low, rtol=2.0**-15, atol=1e-6 * norm)
        near_high = np.isclose(sent_d[part], high, rtol=2.0**-15, atol=1e-6 * norm)
        assert (near_low | near_high).all()
        open_to_both = (chance > 1e-4) & (chance < 1 - 1e-4)
        surprise += float((near_high[open_to_both] - chance[open_to_both]).sum())
        variance += float((chance * (1 - chance))[open_to_both].sum())
        draws += int(open_to_both.sum())
    assert abs(surprise) <= 5 * np.sqrt(variance) + 1e-9, f"{draws} draws"  # two-sided error rate 6e-7


@pytest.mark.parametrize("levels", [1, 7, 127])
def test_qsgd_stays_within_its_variance_bound(levels, vector):
    update_d, block = vector("gauss", 512 * 40), 512
    sent_d = sent_by(f"qsgd(levels={levels}, block={block})", schema_of(len(update_d)), update_d)
    error_bn = (sent_d - update_d.numpy()).reshape(-1, block)
    x_bn = update_d.double().numpy().reshape(-1, block)
    bound = sum(qsgd.variance_bound(row, levels) for row in x_bn)
    assert (error_bn.astype(np.float64) ** 2).sum() <= 1.2 * bound


SPARSELOCO = "tiles(64)|topk(64/4096)|stat(bits=2, block=1024)"


@pytest.mark.parametrize(("d", "kind"), CASES)
def test_sparseloco_s_selection_is_the_paper_s(d, kind, vector):
    update_d = vector(kind, d)
    spec = "topk(64/4096)|fp32"
    x_d = update_d.numpy()
    sent_d = sent_by(spec, schema_of(d), update_d)
    kept = np.concatenate(
        [chunk[sparseloco.keep(x_d[chunk], -(-64 * len(chunk) // 4096))] for chunk in sparseloco.chunks_of((d,))]
    )
    expected = np.zeros(d, np.float32)
    expected[kept] = x_d[kept]
    np.testing.assert_array_equal(sent_d, expected)


@pytest.mark.parametrize("sides", [(128, 192), (64, 64), (4096,), (4097,), (50, 30), (7,), (4, 16, 64)])
@pytest.mark.parametrize("kind", ["gauss", "cauchy"])
def test_sparseloco_s_payload_is_the_paper_s(sides, kind, vector):
    schema = schema_of(*sides)
    update_d = vector(kind, schema.numel)
    sent_d = sent_by(SPARSELOCO, schema, update_d)
    chunks = sparseloco.chunks_of(sides)
    whole = 4096 if len(sides) == 1 or all(len(chunk) == 4096 for chunk in chunks) else None
    if whole is None:  # tiles smaller than a chunk stand side by side in one: the paper is silent about them
        order = np.concatenate(chunks)
        chunks = [order[start : start + 4096] for start in range(0, len(order), 4096)]
    expected = sparseloco.compress(update_d.numpy(), chunks, 64, group=1024)
    assert ((sent_d != 0) == (expected != 0)).all()
    np.testing.assert_allclose(sent_d, expected, rtol=2 * BF16)


def test_sparseloco_s_feedback_is_the_paper_s_over_rounds(vector):
    shape = (128, 128)
    schema, codec = schema_of(*shape), parse_codec(f"ef(0.95)|{SPARSELOCO}")
    private, shared = codec.init(schema)
    error_d, chunks = np.zeros(schema.numel), sparseloco.chunks_of(shape)
    for step in range(8):
        update_d = vector("gauss", schema.numel, step)
        payload, private = codec.encode(update_d, private, shared, step)
        sent_d, _ = sparseloco.round_of(error_d, update_d.double().numpy(), 0.95, chunks, 64, group=1024)
        row = codec.decode(payload, schema, shared, step, 0, schema.numel)
        assert row.index_k.tolist() == np.flatnonzero(sent_d).tolist()
        np.testing.assert_allclose(row.value_k.numpy(), sent_d[sent_d != 0], rtol=3 * BF16)
        error_d = codec.private_tensors(private)["error"].double().numpy()  # levels are bf16: go on from ours


@pytest.mark.parametrize(
    ("rows", "columns", "k"),
    [(64, 64, 4), (64, 64, 32), (64, 64, 4096), (128, 192, 4), (128, 192, 32), (128, 192, 4096), (4096, 2432, 32)],
)
def test_demo_s_payload_is_the_paper_s(rows, columns, k, vector):
    schema = schema_of(rows, columns)
    update_d = vector("gauss", schema.numel)
    sent_mn = sent_by(f"dct(64)|topk({k}/4096)|fp32", schema, update_d).reshape(rows, columns)
    expected_mn, gap = demo.compress(update_d.numpy().reshape(rows, columns), k)
    if gap > 1e-5:
        np.testing.assert_allclose(sent_mn, expected_mn, atol=2e-5)
    else:  # two coefficients as good as equal: either choice is right, and costs the same
        x_mn = update_d.double().numpy().reshape(rows, columns)
        error, best = (np.linalg.norm(found - x_mn) for found in (sent_mn, expected_mn))
        assert error == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("kind", ["zeros", "equal", "spike", "ties", "cauchy", "patches"])
def test_demo_s_error_is_the_paper_s_on_difficult_matrices(kind, vector):
    schema = schema_of(128, 64)
    update_d = vector(kind, schema.numel)
    x_mn = update_d.double().numpy().reshape(128, 64)
    sent_mn = sent_by("dct(64)|topk(32/4096)|fp32", schema, update_d).reshape(128, 64)
    expected_mn, _ = demo.compress(x_mn, 32)
    error, best = (np.linalg.norm(found - x_mn) for found in (sent_mn, expected_mn))
    assert error == pytest.approx(best, rel=1e-4, abs=1e-6 * np.linalg.norm(x_mn))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(64, 48, 4), (300, 200, 8), (33, 65, 1), (5000, 2000, 4)])
def test_powersgd_follows_the_paper_s_iteration(rows, columns, rank, vector):
    schema, codec = schema_of(rows, columns), parse_codec(f"lowrank({rank})|fp32")
    private, shared = codec.init(schema)
    (own,) = codec.private_tensors(private).values()
    q = own.double().numpy().reshape(rank, columns).T
    for step in range(2 if rows * columns > 10**6 else 5):
        update_d = vector("gauss", schema.numel, step)
        payload, private = codec.encode(update_d, private, shared, step)
        row = codec.decode(payload, schema, shared, step, 0, schema.numel)
        expected_mn, q = powersgd.compress(update_d.numpy().reshape(rows, columns), q)
        np.testing.assert_allclose(row.value_d.numpy().reshape(rows, columns), expected_mn, atol=1e-5)


def test_powersgd_finds_the_best_approximation_of_a_matrix_that_stays(vector):
    rows, columns, rank = 60, 40, 3
    schema, codec = schema_of(rows, columns), parse_codec(f"lowrank({rank})|fp32")
    steep = 0.5 ** torch.arange(columns)
    x_mn = torch.linalg.qr(vector("gauss", rows * columns).view(rows, columns))[0] * steep
    private, shared = codec.init(schema)
    for step in range(30):
        payload, private = codec.encode(x_mn.reshape(-1).contiguous(), private, shared, step)
    row = codec.decode(payload, schema, shared, 29, 0, schema.numel)
    np.testing.assert_allclose(row.value_d.numpy().reshape(rows, columns), powersgd.best(x_mn, rank), atol=1e-5)


@pytest.mark.parametrize("spec", [SPARSELOCO, "dct(64)|topk(32/4096)|fp32", "lowrank(4)|fp32", "qsgd", "e3m0"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused(spec, bad, vector):
    update_d = vector("gauss", 4096)
    update_d[77] = bad
    with pytest.raises(LocalError):
        sent_by(spec, schema_of(64, 64), update_d)
