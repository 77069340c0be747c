"""Nothing is lost over many rounds: what is left is what was not sent, discounted; and codecs contract (I-14).

`test_contract.py` has the identity of one round for every codec, `test_sparse.py` the contraction of top-k,
`test_number_formats.py` that of signs, `test_formats.py` that of q2.
"""

import math

import pytest
import torch

from farflung.compression import codec_presets, parse_codec
from farflung.protocol.rows import DenseRow

ROUNDS = 12
INNERS = ("int8", "int4", "int2", "q2", "sign", "ternary", "topk(64/4096)|q2", "topk(64/4096)|int8|rice", "rotate|int2")
EF_SPECS = tuple(
    {
        parse_codec(spec).spec: spec
        for spec in (*codec_presets(), *(f"ef({beta})|{inner}" for beta in ("1", "0.95", "0.5") for inner in INNERS))
        if parse_codec(spec).spec.startswith("ef(") and "bound" not in spec
    }
)


def densify(row):
    if isinstance(row, DenseRow):
        return row.value_d
    return torch.zeros(row.size).index_put((row.index_k.long(),), row.value_k)


def sent_and_left(codec, schema, updates):
    """What each round sent, in fp64, and what is left after the last, in the order of rounds."""
    private, shared = codec.init(schema)
    sent = []
    for step, update in enumerate(updates):
        payload, private = codec.encode(update, private, shared, step)
        sent.append(densify(codec.decode(payload, schema, shared, step, 0, schema.numel)).double())
    return torch.stack(sent), codec.private_tensors(private)["error"].double()


@pytest.mark.parametrize("spec", EF_SPECS)
@pytest.mark.parametrize("kind", ["gauss", "cauchy", "ties"])
def test_what_is_left_is_what_was_not_sent_discounted_by_beta(spec, kind, model_schema, vector):
    """e_T = Σ β^(T−t) (Δ_t − sent_t); with β = 1, everything sent and what is left is everything wanted."""
    codec, d = parse_codec(spec), model_schema.numel
    beta = float(codec.spec.removeprefix("ef(").partition(")")[0])
    update_td = torch.stack([vector(kind, d, step) for step in range(ROUNDS)])
    sent_td, left_d = sent_and_left(codec, model_schema, update_td)
    power_t = beta ** torch.arange(ROUNDS - 1, -1, -1, dtype=torch.float64)
    wanted_d = (power_t[:, None] * (update_td.double() - sent_td)).sum(0)
    rounding_d = 2.0**-23 * (power_t[:, None] * (update_td.double().abs() + 2 * sent_td.abs())).sum(0)
    slack_d = 2 * rounding_d + 2.0**-23 * ROUNDS * left_d.abs() + 1e-37
    assert ((left_d - wanted_d).abs() <= slack_d).all()
    if beta == 1:
        assert ((sent_td.sum(0) + left_d - update_td.double().sum(0)).abs() <= slack_d).all()
    assert left_d.any() or kind == "ties"  # small whole numbers are exact in bf16


# Even steps of the largest magnitude: int8, int4, int2


STEPS = {"int8": 127, "int4": 7, "int2": 1}
ROUNDED_SCALE = {"int8": 1.0, "int4": 1 + 2.0**-8, "int2": 1 + 2.0**-8}
"""A bf16 scale may be that much larger than the step it stands for."""


def share_lost(levels, block, slack=1.0):
    """At most this share of the energy: the largest is kept, the others lose half a step: 1 − δ, per block.

    ‖e‖² <= (n − 1) s² / 4 and ‖v‖² >= (levels s)² + ‖e‖², as no entry loses more than itself.
    """
    worst = (block - 1) * slack**2 / (4 * levels**2)
    return worst / (1 + worst)


def encoded(spec, vector_d, schema_of):
    codec, schema = parse_codec(spec), schema_of(len(vector_d))
    private, shared = codec.init(schema)
    payload, _ = codec.encode(vector_d, private, shared, 0)
    return densify(codec.decode(payload, schema, shared, 0, 0, len(vector_d)))


def lost(spec, vector_d, schema_of):
    apart_d = vector_d.double() - encoded(spec, vector_d, schema_of)
    return (apart_d.square().sum() / vector_d.double().square().sum()).item()


@pytest.mark.parametrize("block", [16, 64, 1024])
@pytest.mark.parametrize("name", STEPS)
def test_even_steps_contract_on_any_vector(name, block, shape, schema_of, vector):
    """Energy per block, so the bound of a block is the bound of the whole; below the smallest scale all is lost."""
    vector_d = vector(shape, 20 * block)
    if shape in ("zeros", "minus zeros", "denormal"):
        assert not encoded(f"{name}(block={block})", vector_d, schema_of).any()
        return
    levels, slack = STEPS[name], ROUNDED_SCALE[name]
    rounding = (levels * (slack - 1)) ** 2 / levels**2  # the largest itself, times the rounding of the scale
    assert lost(f"{name}(block={block})", vector_d, schema_of) <= share_lost(levels, block, slack) + rounding + 1e-6


@pytest.mark.parametrize("block", [16, 64, 1024])
@pytest.mark.parametrize("name", STEPS)
def test_the_worst_vector_of_even_steps_loses_what_the_bound_says(name, block, schema_of):
    """One entry at the top and the others a little below half a step: the bound is tight."""
    levels = STEPS[name]
    vector_d = torch.full((block,), 0.4999)
    vector_d[block // 3] = levels
    found, most = lost(f"{name}(block={block})", vector_d, schema_of), share_lost(levels, block)
    assert 0.998 * most <= found <= most


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", STEPS)
def test_a_search_for_worse_vectors_finds_none(name, seed, schema_of):
    """Hill climbing on one block of 16, from a random start."""
    generator = torch.Generator().manual_seed(seed)
    best_d = torch.rand(16, generator=generator)
    spec, most = f"{name}(block=16)", share_lost(STEPS[name], 16, ROUNDED_SCALE[name])
    worst = first = lost(spec, best_d, schema_of)
    for _ in range(300):
        tried_d = best_d + 0.1 * torch.randn(16, generator=generator) * (torch.rand(16, generator=generator) < 0.3)
        found = lost(spec, tried_d, schema_of)
        if found > worst:
            worst, best_d = found, tried_d
    assert first < worst <= most + 2.0**-14


# What a contraction is for: the residual stays bounded


@pytest.mark.parametrize(
    ("inner", "kept"),
    [
        ("topk(64/4096)|fp32", 64 / 4096),
        ("int8(block=64)", 1 - share_lost(127, 64, 1.001)),
        ("int4(block=16)", 1 - share_lost(7, 16, 1.01)),
        ("int2(block=16)", 1 - share_lost(1, 16, 1.01)),
        ("sign(block=16)", 1 / 16 - 0.001),
    ],
)
@pytest.mark.parametrize("beta", [1, 0.9])
def test_the_residual_is_bounded_as_the_contraction_says(inner, kept, beta, schema_of, vector):
    """‖e‖ <= r max ‖Δ‖ / (1 − β r) with r² = 1 − δ: arXiv:1901.09847, Lemma 3, without squares."""
    d, root = 4096, math.sqrt(1 - kept)
    codec, schema = parse_codec(f"ef({beta})|{inner}"), schema_of(d)
    for same in (True, False):
        private, shared = codec.init(schema)
        longest = 0.0
        for step in range(60):
            update = vector("gauss", d, 0 if same else step)
            longest = max(longest, update.double().norm().item())
            _, private = codec.encode(update, private, shared, step)
            left = codec.private_tensors(private)["error"].double().norm().item()
            assert left <= root * longest / (1 - beta * root)
        assert left > 0
