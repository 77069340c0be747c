"""One contract, every codec of the catalogue and every preset, on a flat vector and on a model of odd shapes."""

import numpy as np
import pytest
import torch

from farflung.compression import codec_presets, parse_codec
from farflung.protocol.errors import LocalError
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import WINDOW_ALIGN, DenseRow, Reason, Verdict
from farflung.protocol.schema import Schema, TensorSpec

SIZES = (1, 4095, 4096, 4097, 16384, 16385, 100_000)
MORE = ("int8(block=16384)", "q2(block=16)", "topk(3/16)|bf16", "topk(128/128)|q2", "ef(0.5)|bf16")
SPECS = tuple({parse_codec(spec).spec: spec for spec in (*codec_presets(), *MORE)}.values())
UNBIASED = ("qsgd", "ternary", "natural", "unbiased", "sketch")
"""Stages that buy unbiasedness with errors that may be larger than the vector."""


TINY = Schema((TensorSpec("w", (8, 8), "float32"),))


def feedback_of(spec):
    """The residual of a fresh state, or None if the codec keeps none outermost."""
    codec = parse_codec(spec)
    return codec.private_tensors(codec.init(TINY)[0]).get("error")


FEEDBACK = [spec for spec in SPECS if feedback_of(spec) is not None]
UNBOUNDED = [spec for spec in FEEDBACK if "bound" not in spec]


def densify(row):
    if isinstance(row, DenseRow):
        return row.value_d
    assert row.index_k.dtype in (torch.int32, torch.int64)
    assert (row.index_k.diff() > 0).all()
    assert ((row.index_k >= 0) & (row.index_k < row.size)).all()
    return torch.zeros(row.size).index_put((row.index_k.long(),), row.value_k)


def windows(d):
    ends = [*range(WINDOW_ALIGN, d, WINDOW_ALIGN), d]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def decode_all(codec, payload, schema, shared, round_index=0):
    return densify(codec.decode(payload, schema, shared, round_index, 0, schema.numel))


def encode_fresh(codec, schema, update, round_index=0):
    private, shared = codec.init(schema)
    payload, private = codec.encode(update, private, shared, round_index)
    return payload, private, shared


def bits_of(vector):
    return vector.view(torch.int32)


@pytest.mark.parametrize("spec", SPECS)
def test_zero_in_gives_zero_out_and_no_residual(spec, schema):
    codec = parse_codec(spec)
    payload, private, shared = encode_fresh(codec, schema, torch.zeros(schema.numel))
    codec.check(payload, schema, shared, 0)
    assert (decode_all(codec, payload, schema, shared) == 0).all()
    assert (codec.private_tensors(private).get("error", torch.zeros(1)) == 0).all()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("d", SIZES)
def test_a_payload_is_no_longer_than_declared_checks_and_decodes_to_finite_fp32(spec, d, schema_of, vector):
    codec, schema = parse_codec(spec), schema_of(d)
    payload, _, shared = encode_fresh(codec, schema, vector("gauss", d))
    assert isinstance(payload, bytes)
    assert len(payload) * 8 <= codec.bits(schema) * d + 1e-6
    codec.check(payload, schema, shared, 0)
    row = decode_all(codec, payload, schema, shared)
    assert row.dtype == torch.float32
    assert row.shape == (d,)
    assert row.isfinite().all()


@pytest.mark.parametrize("spec", SPECS)
def test_difficult_vectors_pass_their_own_check_and_leave_the_input_untouched(spec, shape, model_schema, vector):
    codec, schema = parse_codec(spec), model_schema
    update = vector(shape, schema.numel)
    before = update.clone()
    payload, _, shared = encode_fresh(codec, schema, update)
    assert torch.equal(bits_of(update), bits_of(before))
    assert len(payload) * 8 <= codec.bits(schema) * schema.numel + 1e-6
    codec.check(payload, schema, shared, 0)
    row = decode_all(codec, payload, schema, shared)
    assert row.abs().max() <= PAYLOAD_ABS_MAX
    if not any(name in codec.spec for name in UNBIASED):
        error, norm = (update.double() - row).norm(), update.double().norm()
        assert error <= norm * (1 + 1e-6) + 1e-30


@pytest.mark.parametrize("spec", SPECS)
def test_encoding_is_a_function_of_the_update_the_state_and_the_round(spec, model_schema, vector):
    codec, update = parse_codec(spec), vector("gauss", model_schema.numel)
    for round_index in (0, 7):
        once, again = (encode_fresh(codec, model_schema, update.clone(), round_index)[0] for _ in range(2))
        assert once == again


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("spec", SPECS)
def test_an_update_on_the_gpu_encodes_to_the_same_bytes(spec, model_schema, vector):
    codec, update = parse_codec(spec), vector("gauss", model_schema.numel)
    assert encode_fresh(codec, model_schema, update.cuda())[0] == encode_fresh(codec, model_schema, update)[0]


@pytest.mark.parametrize("spec", SPECS)
def test_windows_joined_are_the_whole(spec, schema, vector):
    codec, d = parse_codec(spec), schema.numel
    payload, _, shared = encode_fresh(codec, schema, vector("gauss", d), 3)
    whole = decode_all(codec, payload, schema, shared, 3)
    read = codec.open(payload, schema, shared, 3)
    assert torch.equal(bits_of(torch.cat([densify(read(*span)) for span in windows(d)])), bits_of(whole))


@pytest.mark.parametrize("spec", SPECS)
def test_every_codec_decodes_to_the_same_bits_everywhere(spec):
    assert parse_codec(spec).exact


@pytest.mark.parametrize("spec", UNBOUNDED)
def test_sent_plus_residual_is_wanted_within_an_ulp_of_the_larger(spec, shape, model_schema, vector):
    codec, schema = parse_codec(spec), model_schema
    beta = float(codec.spec.partition("ef(")[2].partition(")")[0].partition(",")[0])
    private, shared = codec.init(schema)
    for step in range(3):
        update = vector(shape, schema.numel, step)
        wanted = codec.private_tensors(private)["error"].clone() * beta + update
        payload, private = codec.encode(update, private, shared, step)
        sent, residual = decode_all(codec, payload, schema, shared, step), codec.private_tensors(private)["error"]
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
        sent += decode_all(codec, payload, schema, shared, step)
        wanted += update
    left = codec.private_tensors(private)["error"]
    assert (sent + left - wanted).abs().max() < rounds * 1e-5
    assert left.norm() < 20 * wanted.norm()


@pytest.mark.parametrize("spec", FEEDBACK)
def test_only_an_anomaly_resets_the_residual(spec, model_schema, vector):
    codec, schema = parse_codec(spec), model_schema
    _, private, _ = encode_fresh(codec, schema, vector("gauss", schema.numel))
    residual = codec.private_tensors(private)["error"].clone()
    for reason in Reason:
        if reason is not Reason.ANOMALY:
            private = codec.observe(private, Verdict(0.5, reason))
            assert torch.equal(codec.private_tensors(private)["error"], residual)
    private = codec.observe(private, Verdict(0.0, Reason.ANOMALY))
    assert not codec.private_tensors(private)["error"].any()


@pytest.mark.parametrize("spec", FEEDBACK)
def test_the_residual_lives_in_one_buffer(spec, model_schema, vector):
    codec, schema = parse_codec(spec), model_schema
    private, shared = codec.init(schema)
    address = codec.private_tensors(private)["error"].data_ptr()
    _, private = codec.encode(vector("gauss", schema.numel), private, shared, 0)
    private = codec.observe(private, Verdict(0.0, Reason.ANOMALY))
    assert codec.private_tensors(private)["error"].data_ptr() == address


@pytest.mark.parametrize("spec", SPECS)
def test_a_restart_continues_with_the_same_bytes(spec, model_schema, vector):
    codec, schema = parse_codec(spec), model_schema
    update = vector("gauss", schema.numel)
    _, private, shared = encode_fresh(codec, schema, update)
    private = codec.observe(private, Verdict(0.5, Reason.KEPT))
    shared = codec.advance(shared, update, 0)
    saved = {name: tensor.clone() for name, tensor in codec.private_tensors(private).items()}
    certified = {name: tensor.clone() for name, tensor in codec.shared_tensors(shared).items()}
    again, shared_again = codec.restore_private(schema, saved), codec.restore_shared(schema, certified)
    for step in (1, 2):
        update = vector("cauchy", schema.numel, step)
        payload, private = codec.encode(update, private, shared, step)
        payload_again, again = codec.encode(update, again, shared_again, step)
        assert payload_again == payload


@pytest.mark.parametrize("spec", SPECS)
def test_shared_state_moves_with_the_certificate_and_leaves_the_old_one_as_it_was(spec, model_schema, vector):
    codec, schema = parse_codec(spec), model_schema
    _, shared = codec.init(schema)
    before = {name: tensor.clone() for name, tensor in codec.shared_tensors(shared).items()}
    assert list(before) == sorted(before)
    update = vector("gauss", schema.numel)
    moved = [codec.shared_tensors(codec.advance(shared, update.clone(), 1)) for _ in range(2)]
    for name, tensor in before.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(codec.shared_tensors(shared)[name], tensor)
        assert torch.equal(bits_of(moved[0][name].flatten()), bits_of(moved[1][name].flatten()))
        assert moved[0][name].shape == tensor.shape


@pytest.mark.parametrize("saved", [{}, {"error": torch.zeros(4)}, {"error": torch.zeros(5000, dtype=torch.float64)}])
def test_a_wrong_saved_state_is_our_own_error(saved, schema_of):
    with pytest.raises(LocalError):
        parse_codec("ef(1)|q2").restore_private(schema_of(5000), saved)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_update_that_is_not_finite_is_our_own_error_and_spoils_no_state(spec, bad, model_schema, vector):
    codec, schema = parse_codec(spec), model_schema
    _, private, shared = encode_fresh(codec, schema, vector("gauss", schema.numel))
    before = {name: tensor.clone() for name, tensor in codec.private_tensors(private).items()}
    update = vector("gauss", schema.numel)
    update[-1] = bad
    with pytest.raises(LocalError):
        codec.encode(update, private, shared, 1)
    assert all(torch.equal(codec.private_tensors(private)[name], before[name]) for name in before)


FORMATS = ("fp32", "bf16", "int8", "q2", "topk(64/4096)|q2")


@pytest.mark.parametrize("spec", FORMATS)
def test_aligned_parts_together_encode_as_each_alone(spec, vector):
    codec = parse_codec(spec)
    parts = [vector("gauss", 4 * WINDOW_ALIGN, 1), vector("cauchy", 8 * WINDOW_ALIGN, 2), vector("gauss", 777, 3)]
    alone = [codec.encode(part, None, None, 0)[0] for part in parts]
    assert codec.encode(torch.cat(parts), None, None, 0)[0] == b"".join(alone)


@pytest.mark.parametrize("spec", FORMATS)
def test_entries_beyond_the_limit_saturate_at_it(spec, schema_of):
    codec, schema = parse_codec(spec), schema_of(100)
    payload, _ = codec.encode(torch.full((100,), -3e38), None, None, 0)
    codec.check(payload, schema, None, 0)
    row = decode_all(codec, payload, schema, None)
    assert (row[row != 0] >= -PAYLOAD_ABS_MAX).all()
    assert (row[row != 0] <= -0.99 * PAYLOAD_ABS_MAX).all()


def test_feedback_refuses_an_update_beyond_the_limit_before_touching_its_state(schema_of):
    codec = parse_codec("ef(1)|q2")
    private, shared = codec.init(schema_of(4))
    with pytest.raises(LocalError):
        codec.encode(torch.tensor([0.0, 1.0, 2e6, 0.0]), private, shared, 0)
    assert not codec.private_tensors(private)["error"].any()


@pytest.mark.parametrize("update", [torch.zeros(5), torch.zeros(4, dtype=torch.float64), torch.zeros(2, 2)])
def test_an_update_of_another_shape_or_dtype_is_our_own_error(update, schema_of):
    codec = parse_codec("ef(1)|q2")
    private, shared = codec.init(schema_of(4))
    with pytest.raises(LocalError):
        codec.encode(update, private, shared, 0)


@pytest.mark.parametrize("span", [(0, 0), (1, 16384), (0, 5), (16384, 20001), (-16384, 0), (20_000, 20_000)])
@pytest.mark.parametrize("spec", SPECS)
def test_a_window_that_is_not_aligned_is_our_own_error(spec, span, schema_of):
    codec, schema = parse_codec(spec), schema_of(20_000)
    payload, _, shared = encode_fresh(codec, schema, torch.zeros(20_000))
    with pytest.raises(LocalError):
        codec.decode(payload, schema, shared, 0, *span)


def test_bits_are_the_ones_promised(schema_of):
    d = 1 << 20
    bits = {spec: parse_codec(spec).bits(schema_of(d)) for spec in ("q2", "ef(1)|q2", "int8", "topk(64/4096)|q2")}
    assert bits["ef(1)|q2"] == bits["q2"] == 2 + 32 / 512
    assert bits["int8"] == 8 + 32 / 1024
    assert bits["topk(64/4096)|q2"] == np.float64(12 * 64 + 2 * 64 + 32 * 64 / 512) / 4096
