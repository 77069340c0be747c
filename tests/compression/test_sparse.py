"""Sparsifiers: what they keep, against brute force; what they promise, against closed forms."""

import math
import struct

import numpy as np
import pytest
import torch

from farflung.compression import parse_codec
from farflung.compression.formats.dense import bf16, int8, q2
from farflung.compression.formats.sparse import topk
from farflung.compression.kernels import select_reference
from farflung.compression.kernels.selection import fastest_selection
from farflung.compression.scheme import Piece
from farflung.protocol.errors import ConfigError, LocalError, PeerError
from farflung.protocol.rows import WINDOW_ALIGN

ADVERSARIES = ("ascending", "descending", "periodic", "close", "two levels", "hot row", "one nonzero", "equal huge")


def adversary(shape, d):
    gauss = torch.randn(d, generator=torch.Generator().manual_seed(d))
    match shape:
        case "ascending":
            return torch.arange(d).float()
        case "descending":
            return -torch.arange(d, 0, -1).float()
        case "periodic":
            return gauss * torch.where(torch.arange(d) % 256 < 3, 1000, 1)
        case "close":
            return 1 + gauss * 1e-7
        case "two levels":
            return torch.where(gauss > 2.5, 1.5, 1.25) * gauss.sign()
        case "hot row":
            return gauss * torch.where(torch.arange(d) < 300, 1e5, 1)
        case "one nonzero":
            return torch.zeros(d).index_fill(0, torch.tensor([d - 1]), -1e-44)
        case _:
            return torch.full((d,), -3e38)


def brute_topk(x_d, k, chunk):
    """What is kept, by sorting (magnitude, index) of every chunk in Python."""
    out = torch.zeros(len(x_d))
    for start in range(0, len(x_d), chunk):
        part = x_d[start : start + chunk].tolist()
        order = sorted(range(len(part)), key=lambda j: (-abs(part[j]), j))[: math.ceil(k * len(part) / chunk)]
        for j in order:
            out[start + j] = part[j]
    return out


def roundtrip(spec, x_d, schema_of, round_index=0):
    codec, schema = parse_codec(spec), schema_of(len(x_d))
    private, shared = codec.init(schema)
    payload, _ = codec.encode(x_d, private, shared, round_index)
    codec.check(payload, schema, shared, round_index)
    return codec.decode(payload, schema, shared, round_index, 0, len(x_d))


def densify(row):
    return torch.zeros(row.size).index_put((row.index_k.long(),), row.value_k)


def check_topk_oracle(x_d, k, chunk, schema_of):
    wanted = brute_topk(x_d, k, chunk).clamp(-1e6, 1e6)
    row = roundtrip(f"topk({k}/{chunk})|fp32", x_d, schema_of)
    assert torch.equal(densify(row), wanted)
    full, short = divmod(len(x_d), chunk)
    assert len(row.index_k) == full * k + math.ceil(k * short / chunk)


@pytest.mark.parametrize(("k", "chunk"), [(64, 4096), (1, 16), (3, 16), (410, 4096), (16, 16), (48, 1024)])
def test_topk_keeps_what_a_sort_keeps(k, chunk, shape, schema_of, vector):
    for d in (1, 17, 4097, 6000):
        check_topk_oracle(vector(shape, d), k, chunk, schema_of)


@pytest.mark.parametrize("shape_", ADVERSARIES)
@pytest.mark.parametrize(("k", "chunk"), [(64, 4096), (2, 64), (1000, 4096), (4096, 4096)])
def test_topk_is_exact_on_adversaries(shape_, k, chunk, schema_of):
    check_topk_oracle(adversary(shape_, 9000), k, chunk, schema_of)


@pytest.mark.parametrize("shape_", ADVERSARIES)
@pytest.mark.parametrize(("total", "k", "chunk"), [(1, 3, 16), (40, 5, 16), (32_768, 64, 4096), (5000, 410, 4096)])
def test_every_loop_equals_its_reference(shape_, total, k, chunk):
    x_bn = adversary(shape_, 2 * total).reshape(2, total).numpy()
    count = sum(math.ceil(k * min(chunk, total - start) / chunk) for start in range(0, total, chunk))
    width, found = chunk.bit_length() - 1, []
    size = sum(-(-math.ceil(k * min(chunk, total - s) / chunk) * width // 8) for s in range(0, total, chunk))
    for loops in (fastest_selection(), select_reference.SELECTION):
        index_bk, value_bk = np.zeros((2, count), np.int32), np.zeros((2, count), np.float32)
        records_br = np.zeros((2, 5 + size), np.uint8)
        largest = loops.topk_take(x_bn, k, chunk, width, index_bk, value_bk, records_br, 5)
        again_bk = np.zeros((2, count), np.int64)
        wrong = loops.topk_open(records_br, 5, total, k, chunk, width, again_bk, value_bk)
        assert wrong == 0
        zoned_bn = np.zeros_like(x_bn)
        finite = loops.dead_zone(x_bn, 0.7, zoned_bn)
        found.append([largest, *(a.tobytes() for a in (index_bk, value_bk, records_br, again_bk, zoned_bn)), finite])
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", range(30))
def test_zeros_settle_at_the_lowest_free_places_and_values_keep_their_indices(seed):
    rng = np.random.default_rng(seed)
    counts = np.array([7, 5, 1, 9])
    index_bk = np.concatenate([np.sort(rng.choice(12, c, replace=False)) for c in counts])[None].astype(np.int32)
    value_bk = (rng.integers(-1, 2, index_bk.shape) * rng.random(index_bk.shape)).astype(np.float32)
    results = []
    for loops in (fastest_selection(), select_reference.SELECTION):
        new_bk, order_bk = index_bk.copy(), np.zeros_like(index_bk)
        moved = loops.settle_zeros(new_bk, value_bk, counts, order_bk)
        results.append((moved, new_bk.tobytes(), order_bk.tobytes()))
    assert results[0] == results[1]
    begin = 0
    for count in counts:
        part = slice(begin, begin + count)
        before = {(i, v) for i, v in zip(index_bk[0, part], value_bk[0, part], strict=True) if v}
        ordered = value_bk[0, order_bk[0, part]]
        assert {(i, v) for i, v in zip(new_bk[0, part], ordered, strict=True) if v} == before
        assert (np.diff(new_bk[0, part]) > 0).all()
        assert all(i == p for p, (i, v) in enumerate(zip(new_bk[0, part], ordered, strict=True)) if v == 0)
        begin += count


@pytest.mark.parametrize("value", ["q2", "int8", "bf16", "ternary", "natural", "qsgd", "e3m0", "nf4", "fp16"])
def test_values_are_those_of_their_format_wherever_zeros_move(value, schema_of, vector):
    """Chunks of very different scale share a block, so that many kept values become 0."""
    for seed in range(3):
        x_d = vector("gauss", 32_768, seed) * torch.logspace(0, -9, 8).repeat_interleave(4096)
        row = roundtrip(f"topk(64/4096)|{value}", x_d, schema_of)
        kept = brute_topk(x_d, 64, 4096)
        sent = densify(row)
        assert (kept[sent != 0] != 0).all()
        nonzero = sent[sent != 0]
        assert (nonzero * kept[sent != 0] > 0).all()
        assert len(row.index_k) == 512
        for chunk in range(8):
            part = slice(64 * chunk, 64 * chunk + 64)
            index_k, value_k = row.index_k[part] - 4096 * chunk, row.value_k[part]
            assert (index_k[value_k == 0] == torch.arange(64)[value_k == 0]).all()


def test_random_rounding_behind_topk_stays_unbiased_though_zeros_move(schema_of, vector):
    """1000 rounds: each kept entry's mean is within 6 standard errors of it (chance of a false alarm below 1e-6)."""
    x_d, total = vector("gauss", 256), torch.zeros(256, dtype=torch.float64)
    square = torch.zeros(256, dtype=torch.float64)
    for step in range(1000):
        sent = densify(roundtrip("topk(16/256)|ternary", x_d, schema_of, step)).double()
        total, square = total + sent, square + sent**2
    mean = total / 1000
    error = ((square / 1000 - mean**2).clamp(min=0) / 1000).sqrt()
    kept = brute_topk(x_d, 16, 256).double()
    assert ((mean - kept).abs() <= 6 * error + 1e-6).all()


@pytest.mark.parametrize("k", [1, 64, 500])
def test_topk_contracts_by_its_share_keeps_the_largest_and_changes_nothing_twice(k, shape, schema_of, vector):
    x_d = vector(shape, 20_000)
    sent = densify(roundtrip(f"topk({k}/4096)|fp32", x_d, schema_of))
    loss, energy = ((x_d - sent).double() ** 2).sum(), (x_d.double() ** 2).sum()
    assert loss <= (1 - k / 4096) * energy * (1 + 1e-12)
    assert x_d.abs().max() == sent.abs().max()
    assert torch.equal(densify(roundtrip(f"topk({k}/4096)|fp32", sent, schema_of)), sent)


def test_topk_of_a_gaussian_keeps_the_known_energy(schema_of, vector):
    x_d = vector("gauss", 1 << 20)
    sent = densify(roundtrip("topk(64/4096)|fp32", x_d, schema_of))
    share = float((sent.double() ** 2).sum() / (x_d.double() ** 2).sum())
    cut = 2.4176  # Phi(-cut) = 1/128; the energy beyond it is 2 (cut phi(cut) + Phi(-cut))
    wanted = 2 * (cut * math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi) + math.erfc(cut / math.sqrt(2)) / 2)
    assert abs(wanted - 0.1194) < 1e-3
    assert abs(share - wanted) < 2e-3


@pytest.mark.parametrize(
    ("value", "k", "chunk", "span"),
    [
        (q2(512), 64, 4096, 8),
        (q2(512), 48, 4096, 8),
        (bf16(), 64, 4096, 16),
        (int8(64), 64, 4096, 1),
        (q2(512), 1, 16, 512),
    ],
)
def test_a_record_covers_as_many_chunks_as_fill_a_block_of_values(value, k, chunk, span):
    scheme = topk(k, chunk, value)
    fields = scheme.fields(scheme.block)
    assert scheme.block == span * chunk
    assert [field.limit for field in fields if field.kind == "index"] == [chunk] * span
    assert fields[:-span] == value.fields(span * k)


def test_a_record_of_three_chunks_has_these_bytes(schema_of):
    x_d = torch.zeros(40)
    x_d[[3, 9, 17, 20, 33]] = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    payload, _ = parse_codec("topk(2/16)|bf16").encode(x_d, None, None, 0)
    value = struct.pack("<5f", 1, -2, 3, -4, 5)
    assert payload == b"".join(value[4 * j + 2 : 4 * j + 4] for j in range(5)) + bytes([0x93, 0x41, 0x01])


def test_the_short_chunk_alone_may_be_refused_for_its_own_limit(schema_of):
    codec, schema = parse_codec("topk(2/16)|fp32"), schema_of(20)
    payload, _ = codec.encode(torch.ones(20), None, None, 0)
    assert payload[12:] == bytes([0x10, 0x00])
    codec.check(payload[:13] + bytes([3]), schema, None, 0)
    for last in (4, 0x13):
        with pytest.raises(PeerError):
            codec.check(payload[:13] + bytes([last]), schema, None, 0)


@pytest.mark.parametrize(
    "spec",
    [
        "topk(1024/4096)|q2",
        "topk(64/4096)|topk(4/16)|q2",
        "deadzone(1)|topk(4/16)|q2",
        "randk(32/64)|q2(block=16)",
        "topk(4/16)|randk(4/16)|q2",
        "deadzone(9)|q2",
        "randk(4/16, form=odd)|q2",
    ],
)
def test_what_cannot_be_carried_is_refused_by_the_parser(spec):
    with pytest.raises(ConfigError):
        parse_codec(spec)


def test_a_factory_refuses_what_the_parser_would():
    with pytest.raises(LocalError):
        topk(32, 64, q2(16))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", ["topk(64/4096)|q2", "randk(64/4096)|q2", "deadzone(1)|q2"])
def test_what_is_not_finite_is_our_own_error_wherever_it_stands(spec, bad, vector):
    for place in (0, 4095, 4096, 69_999):
        x_d = vector("gauss", 70_000)
        x_d[place] = bad
        with pytest.raises(LocalError):
            parse_codec(spec).encode(x_d, None, None, 0)


def places_of(seed, total, k, chunk, loops=None, start=0):
    count = sum(math.ceil(k * min(chunk, total - first) / chunk) for first in range(0, total, chunk))
    place_k = np.zeros(count, np.int32)
    (loops or fastest_selection()).random_places(seed, start, total, k, chunk, place_k)
    return place_k


@pytest.mark.parametrize(
    ("total", "k", "chunk"), [(64, 5, 16), (4096, 64, 4096), (40, 16, 16), (10_000, 400, 1024), (3, 1, 16)]
)
def test_random_places_are_ascending_without_repeats_and_equal_the_reference(total, k, chunk):
    for seed in (0, 1, (1 << 64) - 1):
        place_k = places_of(seed, total, k, chunk)
        assert (np.diff(place_k) > 0).all()
        assert (
            np.bincount(place_k // chunk)
            == [math.ceil(k * min(chunk, total - s) / chunk) for s in range(0, total, chunk)]
        ).all()
        assert (place_k == places_of(seed, total, k, chunk, select_reference.SELECTION)).all()


def test_random_places_do_not_depend_on_where_a_stretch_begins():
    whole = places_of(7, 32_768, 64, 1024)
    tail = places_of(7, 16_384, 64, 1024, start=16_384)
    assert (whole[len(whole) // 2 :] - 16_384 == tail).all()


def test_random_places_are_uniform_alone_and_in_pairs():
    """Chi-squared over places and over pairs of places; each statistic is below its mean + 6 standard deviations."""
    draws, k, n = 20_000, 3, 16
    sets = places_of(11, draws * n, k, n).reshape(draws, k) - n * np.arange(draws)[:, None]
    single = np.bincount(sets.reshape(-1), minlength=n)
    expected = draws * k / n
    chi = ((single - expected) ** 2 / expected).sum() / (1 - k / n)
    assert abs(chi - 15) < 6 * math.sqrt(30)
    pair = np.zeros((n, n))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        np.add.at(pair, (sets[:, a], sets[:, b]), 1)
    expected = draws * 3 / 120
    chi = ((pair[np.triu_indices(n, 1)] - expected) ** 2 / expected).sum()
    assert chi < 119 + 6 * math.sqrt(2 * 119) * 1.5
    triples = np.unique(sets, axis=0)
    assert len(triples) == 560  # every subset of three appears


def test_all_members_send_the_same_random_places_and_other_rounds_others(schema_of, vector):
    rows = [roundtrip("randk(64/4096)|bf16", vector("gauss", 50_000, seed), schema_of, 5) for seed in (1, 2)]
    assert torch.equal(rows[0].index_k, rows[1].index_k)
    other = roundtrip("randk(64/4096)|bf16", vector("gauss", 50_000, 1), schema_of, 6)
    assert 0 < len(set(other.index_k.tolist()) & set(rows[0].index_k.tolist())) < 50


def test_randk_loses_its_share_on_average_and_the_scaled_form_is_unbiased(schema_of, vector):
    """d = 4096, k = d / 4, 400 rounds; closed forms of loss, mean and variance, each within 6 standard errors."""
    x_d, rounds = vector("cauchy", 4096).clamp(-50, 50), 400
    energy = float((x_d.double() ** 2).sum())
    losses, variances, mean = [], [], torch.zeros(4096, dtype=torch.float64)
    for step in range(rounds):
        plain = densify(roundtrip("randk(1024/4096)|fp32", x_d, schema_of, step)).double()
        scaled = densify(roundtrip("randk(1024/4096, form=unbiased)|fp32", x_d, schema_of, step)).double()
        assert torch.equal(scaled, 4 * plain)
        assert torch.equal(plain[plain != 0], x_d.double()[plain != 0])
        losses.append(float(((x_d - plain) ** 2).sum()) / energy)
        variances.append(float(((x_d - scaled) ** 2).sum()) / energy)
        mean += scaled / rounds
    for found, wanted in ((losses, 1 - 1 / 4), (variances, 4 - 1)):
        assert abs(np.mean(found) - wanted) < 6 * np.std(found) / math.sqrt(rounds)
    spread = x_d.double().abs() * math.sqrt(3 / rounds)  # 4 x Bernoulli(1/4): variance 3 x^2
    assert ((mean - x_d).abs() <= 6 * spread + 1e-12).all()


def test_a_short_chunk_is_scaled_by_its_own_share(schema_of):
    row = roundtrip("randk(4/16, form=unbiased)|fp32", torch.ones(19), schema_of)
    assert row.value_k.tolist() == [4, 4, 4, 4, 3]


@pytest.mark.parametrize("value", ["fp32", "bf16", "int8"])
def test_scaled_numbers_near_the_end_of_fp32_saturate(value, schema_of):
    x_d = torch.tensor([3e38, -3e38, 1e6, -2e5] * 16)  # 4 x 3e38 is infinite, 4 x 2e5 is not too large
    row = roundtrip(f"randk(4/16, form=unbiased)|{value}", x_d, schema_of)
    wanted = (4 * x_d.double()[row.index_k]).clamp(-1e6, 1e6).float()
    torch.testing.assert_close(row.value_k, wanted, rtol=0.01, atol=0)


@pytest.mark.parametrize("t", ["1.2345678", "0.0123456", "8", "0.5"])
def test_the_text_of_a_dead_zone_keeps_its_digits(t):
    codec = parse_codec(f"deadzone({t})|fp32")
    assert codec.spec == f"deadzone({t})|fp32"


def test_a_dead_zone_is_what_it_says(shape, schema_of, vector):
    x_d = vector(shape, 5000)
    row = roundtrip("deadzone(1.5)|bf16", x_d, schema_of).value_d
    inner = roundtrip("bf16", x_d, schema_of).value_d
    square = x_d.double() ** 2
    limit = 2.25 * math.fsum(square.tolist()) / 5000
    clear = (square - limit).abs() > 1e-9 * limit
    assert torch.equal(row[clear], torch.where(square >= limit, inner, 0)[clear])
    assert ((x_d.double() - row) ** 2)[square < limit].sum() <= 2.25 * square.sum()


def test_windows_of_long_records_join(schema_of, vector):
    d = 5 * WINDOW_ALIGN + 777
    for spec in ("topk(64/4096)|q2", "topk(16/16384)|bf16", "randk(64/4096)|bf16"):
        codec, schema = parse_codec(spec), schema_of(d)
        payload, _ = codec.encode(vector("gauss", d), None, None, 3)
        read = codec.open(payload, schema, None, 3)
        whole = densify(read(0, d))
        parts = [densify(read(start, min(start + WINDOW_ALIGN, d))) for start in range(0, d, WINDOW_ALIGN)]
        assert torch.equal(torch.cat(parts), whole)


def test_random_bytes_are_refused_alike_by_the_reference():
    verdicts = [fastest_selection().topk_open(*case) for case in _cases()]
    assert set(verdicts) >= {0, 3}
    assert verdicts == [select_reference.topk_open(*case) for case in _cases()]


def _cases():
    rng = np.random.default_rng(5)
    value = bf16()
    scheme = topk(2, 16, value)
    for _ in range(300):
        records_br = rng.integers(0, 256, (1, scheme.record_bytes(40)), np.uint8)
        records_br[:, :10] &= rng.integers(0, 2, dtype=np.uint8) * np.uint8(0x3F)
        value_bk = value.read([Piece(records_br[:, :10].copy(), 5, 0)], 5).value_d.numpy()[None].copy()
        yield records_br, 10, 40, 2, 16, 4, np.zeros((1, 5), np.int64), value_bk


@pytest.mark.parametrize("ratio", ["0.0156", "0.3", "1", "0.0000001"])
def test_global_topk_keeps_what_a_sort_of_everything_keeps(ratio, shape, schema_of, vector):
    for d in (1, 100, 40_000):
        x_d, k = vector(shape, d), math.ceil(round(float(ratio) * 10**7) * d / 10**7)
        row = roundtrip(f"global-topk({ratio})|fp32", x_d, schema_of)
        wanted = brute_topk(x_d, k, d)
        assert torch.equal(densify(row), wanted.clamp(-1e6, 1e6))
        assert len(row.index_k) == min(k, int((wanted != 0).sum()))


@pytest.mark.parametrize("shape_", ADVERSARIES)
def test_global_topk_is_exact_on_adversaries(shape_, schema_of):
    x_d = adversary(shape_, 150_000)
    row = roundtrip("global-topk(0.01)|fp32", x_d, schema_of)
    assert torch.equal(densify(row), brute_topk(x_d, 1500, 150_000).clamp(-1e6, 1e6))


@pytest.mark.parametrize("value", ["q2", "int8", "ternary", "natural", "bf16", "q2(block=16)"])
def test_global_topk_leaves_out_what_its_format_cannot_carry(value, schema_of, vector):
    x_d = vector("gauss", 100_000) * torch.logspace(0, -12, 100_000)
    row = roundtrip(f"global-topk(0.5)|{value}", x_d, schema_of)
    assert row.value_k.all()
    assert len(row.index_k) <= 50_000
    assert (row.value_k * brute_topk(x_d, 50_000, 100_000)[row.index_k] > 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_elias_fano_has_the_bits_of_its_definition_and_only_those_are_read(seed):
    from farflung.compression.formats.global_topk import _elias_bytes, _low_bits
    from farflung.compression.kernels.global_select import elias_read, elias_write

    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 3000))
    count = int(rng.integers(1, n + 1)) if seed % 2 else min(n, 1 + seed // 2)
    place_k = np.sort(rng.choice(n, count, replace=False)).astype(np.int32)
    low = _low_bits(n, count)
    out_r, back_k = np.empty(_elias_bytes(n, count), np.uint8), np.empty(count, np.int64)
    elias_write(place_k, low, out_r)
    lows = "".join(format(place % (1 << low), f"0{low}b")[::-1] if low else "" for place in place_k.tolist())
    lows += "0" * (-len(lows) % 8)
    uppers = ["0"] * (8 * len(out_r) - len(lows))
    for p, place in enumerate(place_k.tolist()):
        uppers[p + (place >> low)] = "1"
    assert "".join(format(byte, "08b")[::-1] for byte in out_r) == lows + "".join(uppers)
    assert elias_read(out_r, low, n, back_k)
    assert (back_k == place_k).all()
    for bit in range(8 * len(out_r)):  # another byte string is refused, or is another list
        out_r[bit // 8] ^= 1 << bit % 8
        if elias_read(out_r, low, n, back_k):
            again_r = np.empty_like(out_r)
            elias_write(back_k.astype(np.int32), low, again_r)
            assert (again_r == out_r).all()
        out_r[bit // 8] ^= 1 << bit % 8


def test_global_topk_refuses_counts_that_lie_and_zeros(schema_of):
    codec, schema = parse_codec("global-topk(0.0001)|fp32"), schema_of(50_000)
    x_d = torch.zeros(50_000)
    x_d[[5, 6, 40_000, 49_999]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    payload, _ = codec.encode(x_d, None, None, 0)
    assert payload[:4] == bytes([2, 0, 2, 0])
    codec.check(payload, schema, None, 0)
    zero = payload[:4] + bytes(4) + payload[8:]
    wrongs = [bytes([1, 0, 2, 0]), bytes([3, 0, 1, 0]), bytes([2, 0, 255, 255]), bytes([2, 0, 4, 0])]
    for wrong in (b"", payload[:3], payload[:-1], payload + b"\0", zero, *(head + payload[4:] for head in wrongs)):
        with pytest.raises(PeerError):
            codec.check(wrong, schema, None, 0)


def test_windows_of_global_topk_join(schema_of, vector):
    d = 5 * WINDOW_ALIGN + 777
    for spec in ("global-topk(0.015625)|q2", "global-topk(0.2)|bf16", "global-topk(0.0001)|int8"):
        codec, schema = parse_codec(spec), schema_of(d)
        payload, _ = codec.encode(vector("cauchy", d), None, None, 3)
        assert 8 * len(payload) <= codec.bits(schema) * d
        read = codec.open(payload, schema, None, 3)
        whole = densify(read(0, d))
        parts = [densify(read(start, min(start + WINDOW_ALIGN, d))) for start in range(0, d, WINDOW_ALIGN)]
        assert torch.equal(torch.cat(parts), whole)
