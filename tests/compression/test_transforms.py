"""Transforms: each against closed forms and brute force, its inner loops bit by bit against plain numpy."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from farflung.compression import parse_codec
from farflung.compression.kernels import dct as dct_kernels
from farflung.compression.kernels import (
    dct_reference,
    lowrank_reference,
    rotation_reference,
    sketch_reference,
    tiling_reference,
)
from farflung.compression.kernels import lowrank as lowrank_kernels
from farflung.compression.kernels import rotation as rotation_kernels
from farflung.compression.kernels import sketch as sketch_kernels
from farflung.compression.kernels import tiling as tiling_kernels
from farflung.compression.transforms.dct import dct_table
from farflung.compression.transforms.derived import seed_of
from farflung.compression.transforms.factors import layout_of
from farflung.compression.transforms.tiles import largest_divisor
from farflung.protocol.errors import ConfigError, PeerError
from farflung.protocol.limits import PAYLOAD_ABS_MAX, TENSORS_MAX
from farflung.protocol.rows import WINDOW_ALIGN, DenseRow, SparseRow
from farflung.protocol.schema import Schema, TensorSpec


def schema_with(**shapes):
    return Schema(tuple(TensorSpec(name, shape, "float32") for name, shape in sorted(shapes.items())))


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_rank(rank, m, n, seed=0):
    return (gauss(m, rank, seed=seed) @ gauss(rank, n, seed=seed + 100)) / rank**0.5


def densify(row):
    if isinstance(row, DenseRow):
        return row.value_d
    return torch.zeros(row.size).index_put((row.index_k.long(),), row.value_k)


def round_trip(spec, schema, update, round_index=0):
    """The payload and the decoded row of a fresh member."""
    codec = parse_codec(spec)
    private, shared = codec.init(schema)
    payload, _ = codec.encode(update, private, shared, round_index)
    codec.check(payload, schema, shared, round_index)
    return payload, densify(codec.decode(payload, schema, shared, round_index, 0, schema.numel))


def derived_of(spec, schema, update, round_index=0):
    """What the inner codec was given: the payload of `spec|fp32`."""
    return np.frombuffer(round_trip(f"{spec}|fp32", schema, update, round_index)[0], "<f4")


def same_bits(a, b):
    assert a.dtype == b.dtype
    return a.tobytes() == b.tobytes()


def relative(error, whole):
    return float(error.double().norm() / whole.double().norm())


# --- inner loops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "r"), [(1, 1, 1), (5, 7, 2), (64, 64, 3), (130, 67, 4), (70, 2050, 5), (2050, 3, 3)]
)
def test_lowrank_loops_equal_plain_numpy_bit_by_bit(m, n, r):
    rng = np.random.default_rng(m)
    matrix = (rng.standard_normal((m, n)) * 10.0 ** rng.integers(-20, 5, (m, n))).astype(np.float32)
    left, right = rng.standard_normal((r, m)), rng.standard_normal((r, n))
    out = [(np.full((r, m), np.nan), np.full((r, n), np.nan), np.empty(m * n, np.float32)) for _ in range(2)]
    for loops, (a, b, c) in zip((lowrank_kernels, lowrank_reference), out, strict=True):
        loops.times(matrix, right, a)
        loops.transposed_times(matrix, left, b)
        loops.product(left, right, 0, 2.0, c)
    assert all(same_bits(x, y) for x, y in zip(*out, strict=True))
    np.testing.assert_allclose(out[0][0], right @ matrix.T.astype(np.float64), rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(out[0][1], left @ matrix.astype(np.float64), rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(out[0][2], np.clip(left.T @ right, -2, 2).reshape(-1), rtol=1e-6, atol=1e-6)
    part = np.empty(min(m * n, 1111), np.float32)
    lowrank_kernels.product(left, right, m * n - len(part), 2.0, part)
    assert same_bits(part, out[0][2][m * n - len(part) :])


@pytest.mark.parametrize("n", [4, 8, 61, 1000])
def test_gram_schmidt_is_orthonormal_and_equals_plain_numpy_bit_by_bit(n):
    rng = np.random.default_rng(n)
    basis = rng.standard_normal((4, n)) * 10.0 ** np.array([[-30], [0], [9], [3]])
    basis[1] += 1e-2 * basis[2]  # parallel but for 1e-7 of it: one pass would leave 1e-9
    ours, theirs = basis.copy(), basis.copy()
    assert lowrank_kernels.orthonormalise(ours, 0, 2.0**-36) == 4
    assert lowrank_reference.orthonormalise(theirs, 0, 2.0**-36) == 4
    assert same_bits(ours, theirs)
    np.testing.assert_allclose(ours @ ours.T, np.eye(4), atol=1e-13)


def test_gram_schmidt_stops_at_a_component_without_anything_of_its_own():
    basis = np.random.default_rng(0).standard_normal((4, 50))
    basis[2] = 3 * basis[0] - basis[1]
    assert lowrank_kernels.orthonormalise(basis, 0, 2.0**-36) == 2
    assert not basis[2].any()
    assert lowrank_kernels.orthonormalise(basis, 3, 2.0**-36) == 4
    assert lowrank_kernels.orthonormalise(np.zeros((2, 9)), 0, 2.0**-36) == 0


@pytest.mark.parametrize("sides", [(64, 64), (64, 32), (25, 31), (5, 21), (12, 20), (3, 1), (2, 64), (1, 6)])
def test_the_cosine_loops_equal_plain_numpy_bit_by_bit_and_the_matrix_product_closely(sides):
    rows, columns = sides
    row_table, column_table = dct_table(rows), dct_table(columns)
    matrix = np.random.default_rng(rows).standard_normal((2 * rows, 3 * columns)).astype(np.float32)
    tiles = [np.empty((6, rows * columns), np.float32) for _ in range(2)]
    back = [np.empty_like(matrix) for _ in range(2)]
    turned = [np.ascontiguousarray(table.T) for table in (row_table, column_table)]
    for loops, tile_tp, matrix_mn in zip((dct_kernels, dct_reference), tiles, back, strict=True):
        loops.transform(matrix, row_table, column_table, 1e6, False, tile_tp)
        loops.transform(matrix_mn, *turned, 1e6, True, tile_tp)
    assert same_bits(*tiles)
    assert same_bits(*back)
    second = matrix[:rows, columns : 2 * columns].astype(np.float64)
    np.testing.assert_allclose(tiles[0][1], (row_table @ second @ column_table.T).reshape(-1), rtol=0, atol=2e-6)
    np.testing.assert_allclose(back[0], matrix, rtol=0, atol=3e-6)


@pytest.mark.parametrize("size", [(1, 64), (63, 62), (200, 5), (65, 1)])
def test_the_cosine_loops_over_runs_equal_plain_numpy_bit_by_bit(size):
    table = dct_table(size[1])
    x_bn = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    for inverse, matrix in ((False, table), (True, np.ascontiguousarray(table.T))):
        ours, theirs = np.empty_like(x_bn), np.empty_like(x_bn)
        dct_kernels.transform_runs(x_bn, matrix, 1.5, inverse, ours)
        dct_reference.transform_runs(x_bn, matrix, 1.5, inverse, theirs)
        assert same_bits(ours, theirs)
        assert abs(ours).max() <= 1.5


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 16), (4, 32), (3, 2048), (2, 4096)])
def test_the_rotation_loops_equal_plain_numpy_bit_by_bit_and_hadamards_matrix_closely(size):
    n = size[1]
    x_bn, seed = np.random.default_rng(n).standard_normal(size).astype(np.float32), np.uint64(2**63 + 12345)
    ours, theirs = x_bn.copy(), x_bn.copy()
    scale = np.float32(1 / math.sqrt(n))
    for loops, out in ((rotation_kernels, ours), (rotation_reference, theirs)):
        loops.flip(out.reshape(-1), 77, seed)
        loops.hadamard(out, scale, np.float32(2))
    assert same_bits(ours, theirs)
    flipped = x_bn.reshape(-1).copy()
    rotation_kernels.flip(flipped, 77, seed)
    parity = np.array([[(i & j).bit_count() % 2 for j in range(n)] for i in range(min(n, 64))])
    expected = flipped.reshape(size).astype(np.float64) @ (1 - 2.0 * parity).T / math.sqrt(n)
    np.testing.assert_allclose(ours[:, : min(n, 64)], expected.clip(-2, 2), atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 7), (5, 64), (4, 100)])
def test_the_sketch_loops_equal_plain_numpy(rows, columns):
    x_n, seed = gauss(300).numpy(), np.uint64(2**64 - 7)
    cells, estimates = np.zeros((2, rows, columns)), np.empty((2, 300), np.float32)
    for loops, cell_rc, out_n in zip((sketch_kernels, sketch_reference), cells, estimates, strict=True):
        loops.add_up(x_n, seed, cell_rc)
        loops.estimate(cell_rc.astype(np.float32), seed, out_n)
    assert same_bits(cells[0] + 0.0, cells[1] + 0.0)
    assert same_bits(estimates[0] + np.float32(0), estimates[1] + np.float32(0))


@pytest.mark.parametrize("sides", [(64, 64, 128, 192), (5, 7, 20, 21), (1, 8, 3, 16), (31, 1, 62, 13)])
def test_the_tiling_loop_equals_plain_numpy(sides):
    tile_rows, tile_columns, rows, columns = sides
    index = np.sort(np.random.default_rng(0).permutation(rows * columns)[: rows * columns // 3 + 1])
    found = []
    for loops in (tiling_kernels, tiling_reference):
        index_k, order_k = index.copy(), np.empty_like(index)
        loops.untile(index_k, columns, tile_rows, tile_columns, np.zeros(rows + 1, np.int64), order_k)
        found.append((index_k, order_k))
    assert (np.diff(found[0][0]) > 0).all()
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


# --- tiles ---------------------------------------------------------------------------------------------------------

SPLITS = [(12, 3, 3), (12, 4, 4), (12, 5, 4), (100, 7, 5), (100, 26, 25), (100, 101, 100), (1, 1, 1)]


@pytest.mark.parametrize(("n", "at_most", "expected"), [*SPLITS, (1_000_000_007, 500_000_000, 1), (36, 20, 18)])
def test_a_side_is_the_largest_divisor(n, at_most, expected):
    assert largest_divisor(n, at_most) == expected


def brute_order(schema, side, vector_side=1):
    """Original places in derived order, by the rule's own words, and the tiles' shapes."""
    groups = ([], [], [])
    for tensor, start in zip(schema.tensors, schema.offsets, strict=True):
        if len(tensor.shape) > 1:
            rows, columns = tensor.shape[0], tensor.numel // tensor.shape[0]
            high, wide = (max(k for k in range(1, min(side, x) + 1) if x % k == 0) for x in (rows, columns))
        else:
            rows, columns, high = 1, tensor.numel, 1
            wide = max(k for k in range(1, vector_side + 1) if columns % k == 0)
        group = groups[2 if len(tensor.shape) < 2 else 0 if high == wide == side else 1]
        place = np.arange(start, start + tensor.numel).reshape(rows, columns)
        for top in range(0, rows, high):
            group.extend(place[top : top + high, left : left + wide] for left in range(0, columns, wide))
    return [tile for group in groups for tile in group]


MIXED = {
    "a_bias": (130,),
    "b_conv": (10, 3, 7),
    "c_square": (48, 32),
    "d_odd": (31, 50),
    "e_scalar": (),
    "f_wide": (16, 64),
}


@pytest.mark.parametrize("side", [2, 16, 64])
def test_tiles_lie_one_after_the_other_whole_ones_first_vectors_last(side):
    schema = schema_with(**MIXED)
    update = gauss(schema.numel)
    order = np.concatenate([tile.reshape(-1) for tile in brute_order(schema, side)])
    assert same_bits(derived_of(f"tiles({side})", schema, update), update.numpy()[order])
    assert torch.equal(round_trip(f"tiles({side})|fp32", schema, update)[1], update)


def test_top_k_behind_tiles_keeps_the_largest_of_every_64_by_64_tile():
    schema = schema_with(a_norm=(100,), w=(128, 192))
    update = gauss(schema.numel)
    codec = parse_codec("tiles(64)|topk(64/4096)|fp32")
    private, shared = codec.init(schema)
    payload, _ = codec.encode(update, private, shared, 0)
    row = codec.decode(payload, schema, shared, 0, 0, schema.numel)
    assert isinstance(row, SparseRow)
    assert (row.index_k.diff() > 0).all()
    kept = densify(row)[100:].reshape(128, 192)
    matrix = update[100:].reshape(128, 192)
    for top in (0, 64):
        for left in (0, 64, 128):
            tile, sent = (x[top : top + 64, left : left + 64].reshape(-1) for x in (matrix, kept))
            largest = tile.abs().topk(64).indices
            assert torch.equal(sent.nonzero().reshape(-1), largest.sort().values)
            assert torch.equal(sent[largest], tile[largest])


@pytest.mark.parametrize("spec", ["tiles(64)|fp32", "tiles(64)|topk(64/4096)|fp32", "dct(64)|fp32", "rotate|fp32"])
def test_windows_in_any_order_are_pieces_of_the_whole(spec):
    schema = schema_with(a=(600, 704), b=(5,), c=(128, 4096))  # several units, one of them within a tensor
    update, codec = gauss(schema.numel), parse_codec(spec)
    private, shared = codec.init(schema)
    payload, _ = codec.encode(update, private, shared, 4)
    read = codec.open(payload, schema, shared, 4)
    whole = densify(read(0, schema.numel))
    starts = list(range(0, schema.numel, WINDOW_ALIGN))
    random.Random(1).shuffle(starts)
    for start in starts[:25]:
        stop = min(start + WINDOW_ALIGN, schema.numel)
        assert torch.equal(densify(read(start, stop)), whole[start:stop])
    if "topk" not in spec:
        assert relative(whole - update, update) < 3e-7


def test_what_a_reader_gives_away_is_not_its_own_memory():
    schema = schema_with(w=(64, 64))
    codec = parse_codec("tiles(16)|fp32")
    private, shared = codec.init(schema)
    payload, _ = codec.encode(gauss(4096), private, shared, 0)
    read = codec.open(payload, schema, shared, 0)
    first = read(0, 4096).value_d
    first.zero_()
    assert torch.equal(read(0, 4096).value_d, gauss(4096))


# --- DCT -----------------------------------------------------------------------------------------------------------


def test_the_cosine_transform_has_the_published_values():
    fourth = 0.5 * torch.eye(4).numpy()[:1] * 0 + np.array(
        [
            [0.5, 0.6533, 0.5, 0.2706],
            [0.5, 0.2706, -0.5, -0.6533],
            [0.5, -0.2706, -0.5, 0.6533],
            [0.5, -0.6533, 0.5, -0.2706],
        ]
    )
    np.testing.assert_allclose(dct_table(4).T, fourth, atol=5e-5)
    schema = schema_with(v=(8,))
    eighth = derived_of("dct(8)", schema, torch.arange(8.0))
    np.testing.assert_allclose(eighth, [9.8995, -6.4423, 0, -0.67345, 0, -0.2009, 0, -0.0507], atol=1e-4)
    identity = derived_of("dct(4)", schema_with(w=(4, 4)), torch.eye(4).reshape(-1))
    np.testing.assert_allclose(identity.reshape(4, 4), np.eye(4), atol=1e-7)


@pytest.mark.parametrize("n", [1, 2, 3, 12, 25, 50, 62, 64, 101, 128])
def test_the_cosine_table_is_orthonormal_and_each_entry_is_the_nearest_double(n):
    table = dct_table(n)
    u, i = np.mgrid[0:n, 0:n]
    formula = np.sqrt(np.where(u > 0, 2, 1) / n) * np.cos(np.pi * ((2 * i + 1) * u % (4 * n)) / (2 * n))
    np.testing.assert_allclose(table, formula, rtol=0, atol=1e-15)
    np.testing.assert_allclose(table @ table.T, np.eye(n), atol=2e-15)
    assert (abs(table[:, ::-1]) == abs(table)).all()


@pytest.mark.parametrize("side", [8, 64])
def test_coefficients_are_those_of_each_tile_and_keep_its_energy(side):
    schema = schema_with(**MIXED)
    update = gauss(schema.numel)
    flat, at = derived_of(f"dct({side})", schema, update).astype(np.float64), 0
    for place in brute_order(schema, side, vector_side=side):
        rows, columns = place.shape
        tile = update.numpy()[place].astype(np.float64)
        expected = dct_table(rows) @ tile @ dct_table(columns).T
        found = flat[at : at + tile.size].reshape(rows, columns)
        np.testing.assert_allclose(found, expected, atol=2e-6)
        assert abs((found**2).sum() - (tile**2).sum()) < 1e-5 * (tile**2).sum()
        at += tile.size
    assert relative(round_trip(f"dct({side})|fp32", schema, update)[1] - update, update) < 1e-7


def test_a_cosine_is_one_coefficient():
    wave = torch.cos(math.pi * (2 * torch.arange(64.0) + 1) * 5 / 128)
    schema = schema_with(w=(64, 64))
    payload, row = round_trip("dct(64)|topk(1/4096)|fp32", schema, wave.repeat(64))
    assert len(payload) == 4 + 2
    assert relative(row - wave.repeat(64), row) < 1e-6


# --- low rank ------------------------------------------------------------------------------------------------------

SHAPES = {"a": (60, 100), "b": (100, 40), "c_conv": (12, 4, 9), "d_bias": (33,), "e_small": (3, 4)}


def low_rank_update(schema, rank, seed=0):
    parts = []
    for number, tensor in enumerate(schema.tensors):
        if len(tensor.shape) > 1:
            columns = tensor.numel // tensor.shape[0]
            parts.append(of_rank(rank, tensor.shape[0], columns, seed + number).reshape(-1) * 10.0 ** (number - 2))
        else:
            parts.append(gauss(tensor.numel, seed=seed + number))
    return torch.cat(parts)


def tensor_errors(schema, row, update):
    return [
        relative((row - update)[start : start + tensor.numel], update[start : start + tensor.numel])
        for tensor, start in zip(schema.tensors, schema.offsets, strict=True)
    ]


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_powersgd_is_exact_on_matrices_of_that_rank_one_by_one_and_together(rank):
    schema = schema_with(**SHAPES)
    update = low_rank_update(schema, rank)
    row = round_trip(f"lowrank({rank})|fp32", schema, update)[1]
    assert max(tensor_errors(schema, row, update)) < 1e-6
    for tensor, start in zip(schema.tensors, schema.offsets, strict=True):
        alone = round_trip(f"lowrank({rank})|fp32", Schema((tensor,)), update[start : start + tensor.numel])[1]
        assert torch.equal(alone, row[start : start + tensor.numel])


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1.0, 1e5])
def test_powersgd_is_exact_at_every_scale_behind_coarse_numbers_too(scale):
    schema = schema_with(w=(60, 100))
    update = of_rank(2, 60, 100).reshape(-1) * scale
    tolerance = 1e-6 if scale > 1e-38 else 1e-2  # denormals have few digits themselves
    assert relative(round_trip("lowrank(2)|fp32", schema, update)[1] - update, update) < tolerance
    assert relative(round_trip("lowrank(2)|int8(block=64)", schema, update)[1] - update, update) < 0.02


def test_powersgd_leaves_what_it_sends_nothing_of_orthogonal_and_at_most_rank_r():
    schema, update = schema_with(w=(60, 100)), gauss(6000)
    row = round_trip("lowrank(3)|fp32", schema, update)[1].double()
    assert abs(torch.dot(update.double() - row, row)) < 1e-5 * torch.dot(row, row)
    assert torch.linalg.matrix_rank(row.reshape(60, 100), rtol=1e-6) == 3


@pytest.mark.parametrize("spec", ["lowrank(3)|fp32", "lowrank(3, shared)|fp32"])
def test_warm_starts_approach_the_best_approximation_there_is(spec):
    schema, codec = schema_with(w=(50, 80)), parse_codec(spec)
    update = (of_rank(50, 50, 80) + 2 * of_rank(3, 50, 80, seed=7)).reshape(-1)
    values = torch.linalg.svdvals(update.reshape(50, 80).double())
    best = float(values[3:].norm() / values.norm())
    private, shared = codec.init(schema)
    errors = []
    for step in range(40):
        payload, private = codec.encode(update, private, shared, step)
        row = densify(codec.decode(payload, schema, shared, step, 0, schema.numel))
        shared = codec.advance(shared, row, step)
        errors.append(relative(update - row, update))
    assert errors[0] > 1.05 * best
    assert best * (1 - 1e-6) <= errors[-1] < 1.001 * best
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))


def test_a_component_without_anything_to_say_is_zero_and_comes_back():
    schema, codec = schema_with(w=(40, 50)), parse_codec("lowrank(3)|fp32")
    private, shared = codec.init(schema)
    for step, rank in enumerate((1, 0, 3, 3)):
        whole = torch.randint(-9, 10, (90, max(rank, 1)), generator=torch.Generator().manual_seed(step)).float()
        update = (whole[:40] @ whole[40:].T * min(rank, 1)).reshape(-1)  # integers: of that rank exactly
        payload, private = codec.encode(update, private, shared, step)
        row = densify(codec.decode(payload, schema, shared, step, 0, 2000))
        silent = (np.frombuffer(payload, "<f4").reshape(-1)[:120].reshape(3, 40) == 0).all(1).sum()
        assert silent == 3 - rank
        assert (row - update).norm() <= 1e-6 * update.norm()


def test_factors_of_one_component_have_entries_of_one_size():
    schema = schema_with(w=(60, 100))
    flat = derived_of("lowrank(2)", schema, 1e-4 * gauss(6000)).astype(np.float64)
    left, right = flat[:120].reshape(2, 60), flat[120:].reshape(2, 100)
    ratio = (right**2).mean(1) / (left**2).mean(1)
    assert ((ratio > 1 / 16.001) & (ratio < 16.001)).all()


@pytest.mark.parametrize("spec", ["lowrank(1)|fp32", "lowrank(1, shared)|fp32"])
def test_a_model_of_as_many_matrices_as_there_may_be_has_factors_too(spec):
    schema = Schema(tuple(TensorSpec(f"w{i:04d}", (3, 4), "float32") for i in range(TENSORS_MAX)))
    update = (gauss(TENSORS_MAX, 3, 1, seed=1) * gauss(TENSORS_MAX, 1, 4, seed=2)).reshape(-1)
    payload, row = round_trip(spec, schema, update)
    assert len(payload) == 4 * TENSORS_MAX * (3 if "shared" in spec else 3 + 4)
    assert ("shared" in spec) or relative(row - update, update) < 1e-6


@pytest.mark.parametrize("sends", ["PQ", "P", "Q"])
def test_no_model_has_more_derived_tensors_than_its_own(sends):
    schema = schema_with(**SHAPES)
    layout = layout_of(schema, 2, sends)
    assert len(layout.derived.tensors) == len(schema.tensors)
    at = dict(zip(layout.derived.offsets, layout.derived.tensors, strict=True))
    for part in layout.parts:
        length = {"PQ": part.rows + part.columns, "P": part.rows, "Q": part.columns}[sends]
        assert at[part.at].numel == (2 * length if part.rows else part.size)


def test_products_beyond_the_limit_are_cut_at_it():
    schema = schema_with(w=(60, 100))
    codec = parse_codec("lowrank(2)|fp32")
    _, shared = codec.init(schema)
    payload = np.full(2 * 160, PAYLOAD_ABS_MAX, "<f4").tobytes()
    codec.check(payload, schema, shared, 0)
    assert (codec.decode(payload, schema, shared, 0, 0, 6000).value_d == PAYLOAD_ABS_MAX).all()


# --- a shared basis ------------------------------------------------------------------------------------------------


def bases(codec, shared):
    return {name: known for name, known in codec.shared_tensors(shared).items() if name != "turn"}


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_shared_basis_is_exact_from_the_second_round_on_matrices_of_its_rank(rank):
    schema, codec = schema_with(**SHAPES), parse_codec(f"lowrank({rank}, shared)|fp32")
    update = low_rank_update(schema, rank)
    private, shared = codec.init(schema)
    for step in range(5):
        payload, private = codec.encode(update, private, shared, step)
        row = densify(codec.decode(payload, schema, shared, step, 0, schema.numel))
        shared = codec.advance(shared, row, step)
        assert step == 0 or max(tensor_errors(schema, row, update)) < 1e-6


def test_members_factors_may_be_summed_on_the_way():
    schema, codec = schema_with(**SHAPES), parse_codec("lowrank(4, shared)|fp32")
    private, shared = codec.init(schema)
    for step in range(3):
        updates = [gauss(schema.numel, seed=10 * step + member) for member in range(4)]
        payloads = [codec.encode(update, private, shared, step)[0] for update in updates]
        rows = [densify(codec.decode(one, schema, shared, step, 0, schema.numel)) for one in payloads]
        mean = np.mean([np.frombuffer(one, "<f4") for one in payloads], axis=0, dtype=np.float64).astype("<f4")
        of_mean = densify(codec.decode(mean.tobytes(), schema, shared, step, 0, schema.numel))
        assert relative(of_mean - torch.stack(rows).mean(0), of_mean) < 1e-6
        shared = codec.advance(shared, of_mean, step)


def test_the_basis_stays_orthonormal_whatever_the_aggregate():
    schema, codec = schema_with(w=(40, 70)), parse_codec("lowrank(4, shared)|fp32")
    _, shared = codec.init(schema)
    aggregates = [torch.zeros(2800), of_rank(1, 40, 70).reshape(-1), gauss(2800) * 1e-30, torch.full((2800,), 1e6)]
    for step, aggregate in enumerate(aggregates):
        shared = codec.advance(shared, aggregate, step)
        side = (40, 70)[step % 2]
        (known,) = bases(codec, shared).values()
        assert known.shape == (4, 70)
        assert not known[:, side:].any()
        torch.testing.assert_close(known.double() @ known.double().T, torch.eye(4).double(), atol=3e-7, rtol=0)


def test_an_empty_aggregate_brings_new_directions_in_every_round():
    schema, codec = schema_with(w=(40, 70)), parse_codec("lowrank(2, shared)|fp32")
    _, shared = codec.init(schema)
    seen = []
    for step in range(4):
        shared = codec.advance(shared, torch.zeros(2800), step)
        seen.append(bases(codec, shared)["basis.w"])
    assert not torch.allclose(seen[0], seen[2])
    assert not torch.allclose(seen[1], seen[3])


@pytest.mark.parametrize("spec", ["ef(1)|lowrank(2)|int8", "ef(1)|lowrank(2, shared)|int8"])
def test_behind_feedback_everything_gets_through_in_the_end(spec):
    """Members of different updates, of a rank far beyond the codec's: the mean of all they sent nears the truth."""
    schema, codec = schema_with(a_norm=(20,), w=(24, 36)), parse_codec(spec)
    updates = [gauss(schema.numel, seed=member) for member in range(3)]
    private, shared = [codec.init(schema)[0] for _ in updates], codec.init(schema)[1]
    mean, sent, left = torch.stack(updates).mean(0), torch.zeros(schema.numel), []
    for step in range(160):
        rows = []
        for member, update in enumerate(updates):
            payload, private[member] = codec.encode(update, private[member], shared, step)
            rows.append(densify(codec.decode(payload, schema, shared, step, 0, schema.numel)))
        aggregate = torch.stack(rows).mean(0)
        shared = codec.advance(shared, aggregate, step)
        sent += aggregate
        left.append(relative(sent / (step + 1) - mean, mean))
    assert left[-1] < 0.3
    assert left[-1] < 0.6 * left[79]


# --- rotation ------------------------------------------------------------------------------------------------------


def test_rotation_keeps_lengths_and_comes_back():
    schema, update = schema_with(v=(3 * 256 + 89,)), gauss(3 * 256 + 89)
    flat = derived_of("rotate(block=256)", schema, update, 5).astype(np.float64)
    whole = update.double().numpy()
    ends = [0, 256, 512, 768, 832, 848, 856, 857]  # 89 = 64 + 16 + 8 + 1
    for low, high in pairwise(ends):
        assert abs(np.linalg.norm(flat[low:high]) / np.linalg.norm(whole[low:high]) - 1) < 1e-6
    assert relative(round_trip("rotate(block=256)|fp32", schema, update)[1] - update, update) < 3e-7


def test_rotation_spreads_a_spike_over_its_block_only():
    schema, update = schema_with(v=(1024,)), torch.zeros(1024)
    update[300] = -8.0
    flat = derived_of("rotate(block=256)", schema, update)
    assert (abs(flat[256:512]) == 0.5).all()
    assert not flat[:256].any()
    assert not flat[512:].any()


def test_the_signs_are_fair_and_new_in_every_round_and_alike_for_all_members():
    schema = schema_with(v=(1 << 14,))
    first, again, later = (
        derived_of("rotate(block=16)", schema, torch.ones(1 << 14), step).reshape(-1, 16) for step in (0, 0, 1)
    )
    assert same_bits(first, again)
    assert (first != later).any(1).mean() > 0.99
    signs = first @ np.array([[1 - 2 * ((i & j).bit_count() % 2) for j in range(16)] for i in range(16)]) / 4
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 5 / math.sqrt(signs.size)  # one in a million by chance


def test_rotation_takes_the_damage_out_of_spikes():
    update = gauss(1 << 16)
    update[::300] *= 60
    schema = schema_with(v=(1 << 16,))
    plain, rotated = (relative(round_trip(spec, schema, update)[1] - update, update) for spec in ("q2", "rotate|q2"))
    assert rotated < 0.8 * plain


# --- sketch --------------------------------------------------------------------------------------------------------


def test_sketches_add_up():
    schema, codec = schema_with(v=(5000,)), parse_codec("sketch(rows=3, cols=64, chunk=1024)|fp32")
    private, shared = codec.init(schema)
    a, b = gauss(5000, seed=1), gauss(5000, seed=2)
    cells = [np.frombuffer(codec.encode(x, private, shared, 9)[0], "<f4") for x in (a, b, a + b)]
    assert len(cells[0]) == 3 * (4 * 64 + math.ceil(64 * 904 / 1024))
    np.testing.assert_allclose(cells[0] + cells[1], cells[2], atol=2e-5)


def test_one_row_estimates_without_bias_and_with_the_promised_variance():
    """4000 rounds; each of 64 means within 5 standard errors: fails by chance once in 25,000 runs."""
    x, cols, draws = gauss(64), 16, 4000
    estimates = np.empty((draws, 64), np.float32)
    for draw in range(draws):
        cells = np.zeros((1, cols))
        sketch_kernels.add_up(x.numpy(), seed_of("sketch", draw, 0), cells)
        sketch_kernels.estimate(cells.astype(np.float32), seed_of("sketch", draw, 0), estimates[draw])
    error = estimates.astype(np.float64) - x.numpy()
    variance = (float(x.double().norm() ** 2) - x.double().numpy() ** 2) / cols  # all others, each with chance 1 / cols
    assert (abs(error.mean(0)) < 5 * np.sqrt(variance / draws)).all()
    np.testing.assert_allclose((error**2).mean(0), variance, rtol=0.2)
    assert (variance <= float(x.norm() ** 2) / cols).all()


def test_kept_coordinates_are_the_heavy_ones():
    schema = schema_with(v=(20_000,))
    update = 0.01 * gauss(20_000)
    heavy = torch.randperm(20_000, generator=torch.Generator().manual_seed(3))[:40]
    update[heavy] = torch.where(torch.arange(40) % 2 == 0, 5.0, -5.0)
    codec = parse_codec("sketch(rows=7, cols=256, chunk=4096, keep=32)|fp32")
    private, shared = codec.init(schema)
    payload, _ = codec.encode(update, private, shared, 0)
    row = codec.decode(payload, schema, shared, 0, 0, 20_000)
    assert isinstance(row, SparseRow)
    assert len(row.index_k) == 4 * 32 + math.ceil(32 * 3616 / 4096)
    assert (densify(row)[heavy] - update[heavy]).abs().max() < 0.5
    assert relative(densify(row) - update, update) < 0.2


# --- all of them ---------------------------------------------------------------------------------------------------

EVERY = (
    "tiles(16)|q2",
    "dct(64)|topk(32/4096)|bf16",
    "lowrank(2)|int8",
    "lowrank(2, shared)|int8",
    "rotate|q2",
    "sketch(rows=3, cols=64, chunk=1024, keep=8)|int8",
)


@pytest.mark.parametrize("spec", EVERY)
def test_changed_bytes_raise_peer_error_or_decode_within_the_limit_and_check_agrees(spec):
    schema, codec, rng = schema_with(**MIXED), parse_codec(spec), random.Random(spec)
    private, shared = codec.init(schema)
    payload, _ = codec.encode(gauss(schema.numel), private, shared, 0)
    refused = 0
    for trial in range(60):
        changed = bytearray(payload)
        for _ in range(rng.choice([1, 2, 30])):
            changed[rng.randrange(len(changed))] = rng.choice([0, 127, 128, 255, rng.randrange(256)])
        attempt = bytes(changed[: rng.randrange(len(changed))] if trial % 10 == 0 else changed)
        outcomes = []
        for act in (
            lambda data: codec.check(data, schema, shared, 0),
            lambda data: codec.decode(data, schema, shared, 0, 0, schema.numel),
        ):
            try:
                outcomes.append((True, act(attempt)))
            except PeerError:
                outcomes.append((False, None))
        assert outcomes[0][0] == outcomes[1][0]
        refused += not outcomes[0][0]
        if outcomes[1][0]:
            assert densify(outcomes[1][1]).abs().max() <= PAYLOAD_ABS_MAX
    assert 6 <= refused < 60


@pytest.mark.parametrize("spec", EVERY)
def test_numbers_beyond_every_limit_saturate(spec):
    schema = schema_with(**MIXED)
    row = round_trip(spec, schema, torch.full((schema.numel,), -3e38))[1]
    assert row.abs().max() <= PAYLOAD_ABS_MAX


@pytest.mark.parametrize(
    "spec",
    [
        "tiles(64)",
        "tiles(63)|fp32",
        "dct(256)|fp32",
        "dct(64)|rice",
        "lowrank|fp32",
        "lowrank(0)|fp32",
        "lowrank(2, mine)|fp32",
        "lowrank(2, shared, 3)|fp32",
        "tiles(64)|lowrank(2, shared)|fp32",
        "lowrank(2)|lowrank(2, shared)|fp32",
        "rotate(block=100)|fp32",
        "rotate|ef(1)|q2",
        "lowrank(2)|ef(1)|int8",
        "sketch|ef(1)|fp32",
        "sketch(rows=16)|fp32",
        "sketch(cols=512, chunk=256)|fp32",
        "sketch(chunk=256, cols=64, keep=257)|fp32",
    ],
)
def test_what_makes_no_sense_is_refused(spec):
    with pytest.raises(ConfigError, match=r"codec, column \d+"):
        parse_codec(spec)
