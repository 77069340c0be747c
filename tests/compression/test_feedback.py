"""Error feedback: fused with its format or not, on one thread or several, it sends the same bytes and keeps one e."""

import math

import pytest
import torch

from farflung.compression import codec_presets, parse_codec
from farflung.compression.scheme import PART, STRIDE
from farflung.compression.source import Vector, numbers_of
from farflung.compression.wrappers.feedback import error_feedback
from farflung.protocol.errors import ConfigError, LocalError
from farflung.protocol.schema import Schema, TensorSpec

FUSED = (
    *("fp32", "bf16", "int8", "int4", "int2", "q2", "topk(64/4096)|q2", "qsgd", "topk(64/4096)|ternary"),
    *("tiles(64)|int4", "tiles(64)|topk(64/4096)|q2", "tiles(16)|topk(64/4096)|stat|ans", "tiles(64)|int8|ans"),
    *("topk(64/4096)|q2|rice", "topk(64/4096)|stat|ans", "int8|ans", "randk(64/4096)|q2|rice"),
)
LONG = 20 * STRIDE + 4099
"""Two whole parts for a thread, half of one, and a short last block."""


@pytest.fixture
def model():
    """Whole tiles, tiles that end within a stretch, sides that nothing divides, a vector; more than one run."""
    shapes = {"a": (320, 512), "b": (100,), "c": (448, 768), "d": (3, 50, 31), "e": (64, 64 * PART * 2)}
    return Schema(tuple(TensorSpec(name, shape, "float32") for name, shape in shapes.items()))


def drive(codec, schema, vector, d, rounds=3, shape_="gauss"):
    """The payloads and the residuals of some rounds."""
    private, shared = codec.init(schema)
    payloads, residuals = [], []
    for step in range(rounds):
        payload, private = codec.encode(vector(shape_, d, step), private, shared, step)
        payloads.append(payload)
        residuals.append(codec.private_tensors(private)["error"].clone())
    return payloads, residuals


def same_bits(ones, twos):
    return all(torch.equal(one.view(torch.int32), two.view(torch.int32)) for one, two in zip(ones, twos, strict=True))


@pytest.mark.parametrize("spec", FUSED)
@pytest.mark.parametrize(("beta", "bound"), [(1, None), (0.95, None), (1, 0.3), (0.95, 0.3)])
def test_fused_or_not_the_bytes_and_the_residual_are_the_same(spec, beta, bound, model, vector):
    inner = parse_codec(spec)
    assert inner.stream is not None
    whole, fused = (error_feedback(beta, inner, bound=bound, fused=fused) for fused in (False, True))
    for shape_ in ("gauss", "huge"):  # huge: what is left and what comes next add up to more than the limit
        (one, left), (two, right) = (drive(codec, model, vector, model.numel, 2, shape_) for codec in (whole, fused))
        assert one == two
        assert same_bits(left, right)


@pytest.mark.parametrize("spec", codec_presets())
def test_a_codec_that_writes_run_after_run_writes_what_it_encodes(spec, model, vector):
    codec, update = parse_codec(spec), vector("cauchy", model.numel)
    if codec.stream is not None:
        private, shared = codec.init(model)
        assert not codec.private_tensors(private)
        for round_index in (0, 5):
            payload = codec.encode(update, private, shared, round_index)[0]
            assert codec.stream(Vector(numbers_of(update)), model, round_index) == payload


@pytest.mark.parametrize(
    "spec",
    [
        *("int4", "ef(0.9)|int8", "ef(1, bound=0.1)|topk(64/4096)|q2", "ef(0.5)|rotate|int2"),
        *("ef(0.9)|topk(64/4096)|q2|ans", "ef(0.9)|tiles(64)|topk(64/4096)|q2|rice"),
    ],
)
def test_threads_change_no_byte(spec, schema_of, vector):
    if spec == "int4":
        update = vector("gauss", LONG)
        payloads = [parse_codec(spec, threads).encode(update, None, None, 0)[0] for threads in (1, 3)]
        assert payloads[0] == payloads[1]
        parse_codec(spec, 3).check(payloads[0], schema_of(LONG), None, 0)
        return
    (one, left), (two, right) = (drive(parse_codec(spec, n), schema_of(LONG), vector, LONG, 2) for n in (1, 3))
    assert one == two
    assert same_bits(left, right)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_one_thread_refuses_is_refused_before_anything_is_touched(threads, schema_of, vector):
    codec, schema = parse_codec("ef(1)|int4", threads), schema_of(LONG)
    private, shared = codec.init(schema)
    _, private = codec.encode(vector("gauss", LONG), private, shared, 0)
    before = codec.private_tensors(private)["error"].clone()
    update = vector("gauss", LONG)
    for bad in (math.nan, -math.inf, 1.1e6):
        update[LONG - 2] = bad
        with pytest.raises(LocalError):
            codec.encode(update, private, shared, 1)
        assert torch.equal(codec.private_tensors(private)["error"], before)


def test_a_bound_keeps_the_direction_of_the_residual_and_limits_its_length(schema_of, vector):
    d, bound = 30_000, 0.25
    free, bounded = parse_codec("ef(1)|int2"), parse_codec(f"ef(1, bound={bound})|int2")
    update = vector("gauss", d)
    _, (loose, *_) = drive(free, schema_of(d), vector, d, 1)
    _, (tight, *_) = drive(bounded, schema_of(d), vector, d, 1)
    limit = bound * update.double().norm()
    assert loose.double().norm() > limit
    assert math.isclose(tight.double().norm(), limit, rel_tol=1e-6)
    assert torch.allclose(tight * (loose.norm() / tight.norm()), loose, rtol=1e-5, atol=0)


def test_a_bound_that_is_not_reached_changes_nothing_and_an_update_of_zero_clears_the_residual(schema_of, vector):
    d = 30_000
    (one, left), (two, right) = (
        drive(parse_codec(spec), schema_of(d), vector, d) for spec in ("ef(1)|int8", "ef(1, bound=1)|int8")
    )
    assert one == two
    assert same_bits(left, right)
    codec = parse_codec("ef(1, bound=1)|int2")
    private, shared = codec.init(schema_of(d))
    _, private = codec.encode(vector("gauss", d), private, shared, 0)
    assert codec.private_tensors(private)["error"].any()
    _, private = codec.encode(torch.zeros(d), private, shared, 1)
    assert not codec.private_tensors(private)["error"].any()


def test_the_bound_is_part_of_the_text():
    assert parse_codec("ef(1, bound=2)|q2").spec == "ef(1, bound=2)|q2(block=512)"
    assert parse_codec("ef(1,0.50)|q2").spec == "ef(1, bound=0.5)|q2(block=512)"
    for text in ("ef(1, bound=0)|q2", "ef(1, limit=2)|q2", "ef(1, bound=nan)|q2"):
        with pytest.raises(ConfigError, match="column"):
            parse_codec(text)


def test_a_codec_needs_a_thread():
    with pytest.raises(ConfigError, match="got 0"):
        parse_codec("q2", 0)
