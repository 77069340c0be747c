"""One contract, every codec."""

import numpy as np
import pytest
import torch

from farflung.compression import codec_presets, parse_codec
from farflung.protocol.errors import LocalError
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import WINDOW_ALIGN, DenseRow, Reason, Verdict

SIZES = (1, 4095, 4096, 4097, 16383, 16384, 16385, 100_000)
SPECS = (*codec_presets(), "int8(block=16384)", "q2(block=16)", "topk(3/16)|bf16", "topk(128/128)|q2", "ef(0.5)|bf16")
FEEDBACK = [spec for spec in SPECS if spec.startswith("ef")]
STATELESS = [spec for spec in SPECS if not spec.startswith("ef")]


def densify(row):
    if isinstance(row, DenseRow):
        return row.value_d
    assert row.index_k.dtype == torch.int64
    assert (row.index_k.diff() > 0).all()
    assert ((row.index_k >= 0) & (row.index_k < row.size)).all()
    return torch.zeros(row.size).index_put((row.index_k,), row.value_k)


def decode_all(codec, payload, schema, shared=None):
    return densify(codec.decode(payload, schema, shared, 0, 0, schema.numel))


def encode_fresh(codec, schema, update):
    private, shared = codec.init(schema)
    return codec.encode(update, private, shared, 0)


def bits_of(vector):
    return vector.view(torch.int32)


@pytest.mark.parametrize("spec", SPECS)
def test_zero_in_gives_zero_out_and_no_residual(spec, schema_of):
    codec, schema = parse_codec(spec), schema_of(5000)
    payload, private = encode_fresh(codec, schema, torch.zeros(5000))
    assert (decode_all(codec, payload, schema) == 0).all()
    assert all((tensor == 0).all() for tensor in codec.private_tensors(private).values())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("d", SIZES)
def test_a_payload_is_as_long_as_declared_checks_and_decodes_to_finite_fp32(spec, d, schema_of, vector):
    codec, schema = parse_codec(spec), schema_of(d)
    update = vector("gauss", d)
    payload, _ = encode_fresh(codec, schema, update)
    assert isinstance(payload, bytes)
    assert len(payload) * 8 <= codec.bits(schema) * d + 1e-6
    codec.check(payload, schema, None, 0)
    row = decode_all(codec, payload, schema)
    assert row.dtype == torch.float32
    assert row.shape == (d,)
    assert row.isfinite().all()


@pytest.mark.parametrize("spec", SPECS)
def test_difficult_vectors_pass_their_own_check_and_leave_the_input_untouched(spec, shape, schema_of, vector):
    for d in (1, 5, 4097, 20_000):
        codec, schema = parse_codec(spec), schema_of(d)
        update = vector(shape, d)
        before = update.clone()
        payload, _ = encode_fresh(codec, schema, update)
        assert torch.equal(bits_of(update), bits_of(before))
        codec.check(payload, schema, None, 0)
        row = decode_all(codec, payload, schema)
        assert row.abs().max() <= PAYLOAD_ABS_MAX
        error, norm = (update.double() - row).norm(), update.double().norm()
        assert error <= norm * (1 + 1e-6) + 1e-44


@pytest.mark.parametrize("spec", SPECS)
def test_encoding_is_a_function_of_the_update(spec, schema_of, vector):
    codec, schema, update = parse_codec(spec), schema_of(70_000), vector("gauss", 70_000)
    assert encode_fresh(codec, schema, update)[0] == encode_fresh(codec, schema, update.clone())[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("spec", SPECS)
def test_an_update_on_the_gpu_encodes_to_the_same_bytes(spec, schema_of, vector):
    codec, schema, update = parse_codec(spec), schema_of(70_000), vector("gauss", 70_000)
    assert encode_fresh(codec, schema, update.cuda())[0] == encode_fresh(codec, schema, update)[0]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("d", [1, 16384, 16385, 100_000])
def test_windows_joined_are_the_whole(spec, d, schema_of, vector):
    codec, schema = parse_codec(spec), schema_of(d)
    payload, _ = encode_fresh(codec, schema, vector("gauss", d))
    whole = decode_all(codec, payload, schema)
    ends = [*range(WINDOW_ALIGN, d, WINDOW_ALIGN), d]
    starts = [0, *ends[:-1]]
    windows = [densify(codec.decode(payload, schema, None, 0, *span)) for span in zip(starts, ends, strict=True)]
    assert torch.equal(bits_of(torch.cat(windows)), bits_of(whole))


@pytest.mark.parametrize("spec", STATELESS)
def test_aligned_parts_together_encode_as_each_alone(spec, schema_of, vector):
    codec = parse_codec(spec)
    parts = [vector("gauss", WINDOW_ALIGN, 1), vector("cauchy", 5 * WINDOW_ALIGN, 2), vector("gauss", 777, 3)]
    alone = [codec.encode(part, None, None, 0)[0] for part in parts]
    assert codec.encode(torch.cat(parts), None, None, 0)[0] == b"".join(alone)


@pytest.mark.parametrize("spec", FEEDBACK)
def test_sent_plus_residual_is_wanted_within_an_ulp_of_the_larger(spec, shape, schema_of, vector):
    codec, d = parse_codec(spec), 20_000
    schema, beta = schema_of(d), float(spec.partition("(")[2].partition(")")[0])
    private, shared = codec.init(schema)
    for step in range(4):
        update = vector(shape, d, step)
        wanted = codec.private_tensors(private)["error"].clone() * beta + update
        payload, private = codec.encode(update, private, shared, step)
        sent, residual = decode_all(codec, payload, schema), codec.private_tensors(private)["error"]
        larger = torch.maximum(torch.maximum(sent.abs(), wanted.abs()), residual.abs())
        ulp = torch.nextafter(larger, torch.tensor(torch.inf)) - larger
        assert ((sent + residual - wanted).abs() <= ulp).all()


@pytest.mark.parametrize("spec", ["ef(1)|q2", "ef(1)|int8", "ef(1)|bf16", "ef(1)|topk(64/4096)|q2"])
def test_with_beta_1_everything_sent_plus_what_is_left_is_everything_wanted(spec, schema_of, vector):
    codec, d, rounds = parse_codec(spec), 9000, 25
    schema = schema_of(d)
    private, shared = codec.init(schema)
    sent, wanted = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    for step in range(rounds):
        update = vector("gauss", d, step)
        payload, private = codec.encode(update, private, shared, step)
        private = codec.observe(private, Verdict(0.1, (Reason.KEPT, Reason.CUT, Reason.LATE)[step % 3]))
        sent += decode_all(codec, payload, schema)
        wanted += update
    left = codec.private_tensors(private)["error"]
    assert (sent + left - wanted).abs().max() < rounds * 1e-5
    assert left.norm() < 20 * wanted.norm()


@pytest.mark.parametrize("spec", FEEDBACK)
def test_only_an_anomaly_resets_the_residual(spec, schema_of, vector):
    codec, schema = parse_codec(spec), schema_of(5000)
    _, private = encode_fresh(codec, schema, vector("gauss", 5000))
    residual = codec.private_tensors(private)["error"].clone()
    assert residual.any()
    for reason in Reason:
        if reason is not Reason.ANOMALY:
            private = codec.observe(private, Verdict(0.5, reason))
            assert torch.equal(codec.private_tensors(private)["error"], residual)
    private = codec.observe(private, Verdict(0.0, Reason.ANOMALY))
    assert not codec.private_tensors(private)["error"].any()


@pytest.mark.parametrize("spec", FEEDBACK)
def test_the_residual_lives_in_one_buffer(spec, schema_of, vector):
    codec, schema = parse_codec(spec), schema_of(5000)
    private, shared = codec.init(schema)
    address = codec.private_tensors(private)["error"].data_ptr()
    _, private = codec.encode(vector("gauss", 5000), private, shared, 0)
    private = codec.observe(private, Verdict(0.0, Reason.ANOMALY))
    assert [tensor.data_ptr() for tensor in codec.private_tensors(private).values()] == [address]


@pytest.mark.parametrize("spec", SPECS)
def test_a_restart_continues_with_the_same_bytes(spec, schema_of, vector):
    codec, schema = parse_codec(spec), schema_of(5000)
    _, private = encode_fresh(codec, schema, vector("gauss", 5000))
    saved = {name: tensor.clone() for name, tensor in codec.private_tensors(private).items()}
    again = codec.restore_private(schema, saved)
    update = vector("cauchy", 5000)
    assert codec.encode(update, again, None, 1)[0] == codec.encode(update, private, None, 1)[0]


@pytest.mark.parametrize("saved", [{}, {"error": torch.zeros(4)}, {"error": torch.zeros(5000, dtype=torch.float64)}])
def test_a_wrong_saved_state_is_our_own_error(saved, schema_of):
    with pytest.raises(LocalError):
        parse_codec("ef(1)|q2").restore_private(schema_of(5000), saved)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_update_that_is_not_finite_is_our_own_error_and_spoils_no_state(spec, bad, schema_of, vector):
    codec, schema = parse_codec(spec), schema_of(5000)
    _, private = encode_fresh(codec, schema, vector("gauss", 5000))
    before = {name: tensor.clone() for name, tensor in codec.private_tensors(private).items()}
    update = vector("gauss", 5000)
    update[4999] = bad
    with pytest.raises(LocalError):
        codec.encode(update, private, None, 0)
    assert all(torch.equal(codec.private_tensors(private)[name], before[name]) for name in before)


@pytest.mark.parametrize("spec", STATELESS)
def test_entries_beyond_the_limit_saturate_at_it(spec, schema_of):
    codec, schema = parse_codec(spec), schema_of(100)
    payload, _ = codec.encode(torch.full((100,), -3e38), None, None, 0)
    codec.check(payload, schema, None, 0)
    row = decode_all(codec, payload, schema)
    assert (row[row != 0] >= -PAYLOAD_ABS_MAX).all()
    assert (row[row != 0] <= -0.99 * PAYLOAD_ABS_MAX).all()


def test_feedback_refuses_an_update_beyond_the_limit_before_touching_its_state(schema_of):
    codec = parse_codec("ef(1)|q2")
    private, shared = codec.init(schema_of(4))
    with pytest.raises(LocalError):
        codec.encode(torch.tensor([0.0, 1.0, 2e6, 0.0]), private, shared, 0)
    assert not codec.private_tensors(private)["error"].any()


@pytest.mark.parametrize("spec", ["int8", "ef(1)|q2"])
@pytest.mark.parametrize("update", [torch.zeros(5), torch.zeros(4, dtype=torch.float64), torch.zeros(2, 2)])
def test_an_update_of_another_shape_or_dtype_is_our_own_error(spec, update, schema_of):
    codec = parse_codec(spec)
    if spec == "int8" and update.dtype == torch.float32 and update.dim() == 1:
        return  # a stateless codec learns d from the update
    private, shared = codec.init(schema_of(4))
    with pytest.raises(LocalError):
        codec.encode(update, private, shared, 0)


@pytest.mark.parametrize("span", [(0, 0), (1, 16384), (0, 5), (16384, 20001), (-16384, 0), (20_000, 20_000)])
def test_a_window_that_is_not_aligned_is_our_own_error(span, schema_of):
    codec = parse_codec("bf16")
    payload, _ = codec.encode(torch.zeros(20_000), None, None, 0)
    with pytest.raises(LocalError):
        codec.decode(payload, schema_of(20_000), None, 0, *span)


def test_bits_are_the_ones_promised(schema_of):
    d = 1 << 20
    bits = {spec: parse_codec(spec).bits(schema_of(d)) for spec in SPECS}
    assert bits["ef(1)|q2"] == bits["q2"] == 2 + 32 / 512
    assert bits["int8"] == 8 + 32 / 1024
    assert bits["topk(64/4096)|q2"] == np.float64(12 * 64 + 2 * 64 + 32) / 4096
