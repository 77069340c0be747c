"""What wrappers promise: each against an oracle that is written another way, and every payload of theirs attacked."""

import math
import random

import numpy as np
import pytest
import torch

from farflung.compression import parse_codec, registry
from farflung.compression.codec import Link
from farflung.compression.parts import LENGTH_BYTES, add_rows, frame, norm, read_span, require_finite, unframe
from farflung.compression.wrappers.groups import groups_of, matching
from farflung.protocol.errors import ConfigError, LocalError, PeerError
from farflung.protocol.limits import PAYLOAD_ABS_MAX
from farflung.protocol.rows import WINDOW_ALIGN, DenseRow, Reason, SparseRow, Verdict
from farflung.protocol.schema import Schema, TensorSpec

MINE = ("lookahead", "rules", "mix", "warmup", "cyclic", "adapt", "dgc", "ef21")
SPECS = [spec for name in MINE for spec in registry.stages()[name].examples]
KEPT = Verdict(1.0, Reason.KEPT)


def densify(row):
    if isinstance(row, DenseRow):
        return row.value_d
    return torch.zeros(row.size).index_put((row.index_k.long(),), row.value_k)


def decode(codec, payload, schema, shared, round_index=0):
    return densify(codec.decode(payload, schema, shared, round_index, 0, schema.numel))


def integers(d, seed, most=50):
    """Whole numbers in fp32, so that sums are exact in any order."""
    return torch.randint(-most, most + 1, (d,), generator=torch.Generator().manual_seed(seed)).float()


# -- lookahead -----------------------------------------------------------------------------------------------------


def test_with_lookahead_the_residual_is_the_anchor_minus_the_members_own_weights(schema_of):
    d, members = 4096, 4
    codec, schema = parse_codec("lookahead(1)|ef(1)|topk(64/4096)|fp32"), schema_of(d)
    theta, states = integers(d, 99), []
    own = [theta.clone() for _ in range(members)]  # weights that never drop their own progress
    states = [codec.init(schema)[0] for _ in range(members)]
    for round_index in range(6):
        sent = []
        for member in range(members):
            start = theta - codec.ahead(states[member])
            assert torch.equal(start, own[member])
            delta = 4 * integers(d, 10 * round_index + member)
            own[member] -= delta
            payload, states[member] = codec.encode(delta, states[member], None, round_index)
            sent.append(decode(codec, payload, schema, None, round_index))
        moved = theta - sum(sent) / members  # multiples of 4 of whole numbers: exact
        for member in range(members):
            own[member] += (moved - theta) + sent[member]  # what the others did instead of the own sent part
        theta = moved
        for member in range(members):
            assert torch.equal(codec.ahead(states[member]), theta - own[member])
    assert codec.ahead(states[0]).norm() > 0


def test_taking_delta_from_the_anchor_instead_counts_the_residual_twice(schema_of):
    d = 4096
    codec, schema = parse_codec("lookahead(1)|ef(1)|topk(64/4096)|bf16"), schema_of(d)
    norms = {}
    for right in (True, False):
        private, _ = codec.init(schema)
        for round_index in range(10):
            ahead, steps = codec.ahead(private).clone(), integers(d, round_index)
            _, private = codec.encode(steps if right else steps + ahead, private, None, round_index)
        norms[right] = codec.ahead(private).norm()
    assert norms[False] > 50 * norms[True]


def test_lookahead_scales_the_residual_and_sends_what_it_would_send_anyway(schema_of, vector):
    schema, update = schema_of(5000), vector("gauss", 5000)
    plain, half = parse_codec("ef(1)|q2"), parse_codec("lookahead(0.5)|ef(1)|q2")
    payload, private = plain.encode(update, plain.init(schema)[0], None, 0)
    again, looking = half.encode(update, half.init(schema)[0], None, 0)
    assert payload == again
    assert plain.ahead(private) is None
    assert torch.equal(half.ahead(looking), private.error_d / 2)


# -- rules ---------------------------------------------------------------------------------------------------------

RULES = "rules(e*=int8, 1d=fp32, *=topk(64/4096)|q2, else=bf16)"


def test_each_group_decodes_as_its_tensors_alone(model_schema, vector):
    codec, update = parse_codec(RULES), vector("gauss", model_schema.numel)
    private, shared = codec.init(model_schema)
    payload, _ = codec.encode(update, private, shared, 0)
    row = decode(codec, payload, model_schema, shared)
    split = dict(zip((tensor.name for tensor in model_schema.tensors), _by_tensor(model_schema, update), strict=True))
    got = dict(zip(split, _by_tensor(model_schema, row), strict=True))
    for names, spec in ((["embed"], "int8"), (["bias", "norm"], "fp32"), (["conv", "head", "odd"], "topk(64/4096)|q2")):
        alone, whole = parse_codec(spec), torch.cat([split[name] for name in names])
        schema = Schema((TensorSpec("w", (len(whole),), "float32"),))
        expected = decode(alone, alone.encode(whole, None, None, 0)[0], schema, None)
        assert torch.equal(torch.cat([got[name] for name in names]), expected)
    assert len(payload) == 3 * LENGTH_BYTES + sum(
        len(parse_codec(spec).encode(torch.zeros(d), None, None, 0)[0])
        for spec, d in (("int8", 256 * 64), ("fp32", 71), ("topk(64/4096)|q2", 105 + 64 * 192 + 50 * 31))
    )


def _by_tensor(schema, whole_d):
    return torch.split(whole_d, [tensor.numel for tensor in schema.tensors])


@pytest.mark.parametrize("seed", range(20))
def test_groups_map_coordinates_as_a_mask_does(seed):
    rng = random.Random(seed)
    tensors = tuple(TensorSpec(f"{i:02}{rng.choice('abc')}", (rng.randint(1, 9),), "float32") for i in range(12))
    schema = Schema(tensors)
    rule_of = matching(("*a", "*b", "else"))
    of_d = torch.tensor([rule_of(tensor) for tensor in tensors for _ in range(tensor.numel)])
    whole_d = torch.randn(schema.numel, generator=torch.Generator().manual_seed(seed))
    back_d = torch.full((schema.numel,), torch.nan)
    for group in groups_of(schema, rule_of):
        place_k = (of_d == group.rule).nonzero().flatten()
        assert group.d == len(place_k)
        assert torch.equal(group.outside(torch.arange(group.d)), place_k)
        assert torch.equal(group.gather(whole_d), whole_d[place_k])
        group.scatter(group.gather(whole_d), back_d)
        for position in range(schema.numel + 1):
            assert group.before(position) == (place_k < position).sum()
    assert torch.equal(back_d, whole_d)


def test_the_first_rule_that_matches_wins_and_case_counts():
    rule_of = matching(("*.norm*", "1d", "EMBED*", "*", "else"))
    names = {"a.norm.w": (4, 4), "b": (7,), "embed": (3, 3), "EMBED": (3, 3), "scalar": ()}
    assert [rule_of(TensorSpec(name, shape, "float32")) for name, shape in names.items()] == [0, 1, 3, 2, 1]


def test_rows_are_sparse_if_all_parts_are(model_schema, vector):
    for spec, kind in (("topk(4/16)|fp32", SparseRow), ("bf16", DenseRow)):
        codec = parse_codec(f"rules(1d={spec}, else=topk(64/4096)|q2)")
        private, shared = codec.init(model_schema)
        payload, _ = codec.encode(vector("gauss", model_schema.numel), private, shared, 0)
        assert isinstance(codec.decode(payload, model_schema, shared, 0, 0, model_schema.numel), kind)


def test_rules_look_ahead_only_where_a_rule_says_so(model_schema, vector):
    codec = parse_codec("rules(head=lookahead(1)|ef(1)|q2, else=ef(0.9)|topk(64/4096)|q2)")
    private, shared = codec.init(model_schema)
    _, private = codec.encode(vector("gauss", model_schema.numel), private, shared, 0)
    parts = dict(
        zip((t.name for t in model_schema.tensors), _by_tensor(model_schema, codec.ahead(private)), strict=True)
    )
    assert torch.equal(parts.pop("head"), codec.private_tensors(private)["0.error"])
    assert not torch.cat(list(parts.values())).any()
    assert codec.private_tensors(private)["1.error"].norm() > 0


# -- mix -----------------------------------------------------------------------------------------------------------


def test_a_mixed_row_is_the_first_plus_what_the_second_makes_of_the_rest(model_schema, vector):
    d, update = model_schema.numel, vector("cauchy", model_schema.numel)
    for first, second in (("q2", "topk(16/4096)|bf16"), ("topk(32/4096)|q2", "topk(16/4096)|q2"), ("int8", "int8")):
        codec, a, b = parse_codec(f"mix({first}, {second})"), parse_codec(first), parse_codec(second)
        private, shared = codec.init(model_schema)
        payload, _ = codec.encode(update, private, shared, 0)
        sent_a, _ = a.encode(update, None, None, 0)
        row_a = decode(a, sent_a, model_schema, None)
        sent_b, _ = b.encode(update - row_a, None, None, 0)
        assert payload == frame([sent_a, sent_b])
        row = codec.decode(payload, model_schema, shared, 0, 0, d)
        assert isinstance(row, SparseRow) == (first[:4] == "topk")
        assert torch.equal(densify(row), row_a + decode(b, sent_b, model_schema, None))
        assert (update - densify(row)).norm() < (update - row_a).norm()


def test_a_sum_saturates_at_the_limit():
    one = DenseRow(torch.tensor([9e5, -9e5, 1.0]))
    some = SparseRow(3, torch.tensor([0, 1]), torch.tensor([9e5, -9e5]))
    expected = [PAYLOAD_ABS_MAX, -PAYLOAD_ABS_MAX, 1.0]
    assert densify(add_rows(one, one)).tolist() == [*expected[:2], 2.0]
    assert densify(add_rows(one, some)).tolist() == densify(add_rows(some, one)).tolist() == expected
    assert densify(add_rows(some, some)).tolist() == [*expected[:2], 0.0]


# -- warm-up -------------------------------------------------------------------------------------------------------


def test_warm_up_sends_what_the_rounds_codec_would(schema_of, vector):
    schema = schema_of(5000)
    codec, first, later = (parse_codec(spec) for spec in ("warmup(2, ef(1)|int8)|ef(1)|q2", "ef(1)|int8", "ef(1)|q2"))
    private, shared = codec.init(schema)
    states = {True: first.init(schema)[0], False: later.init(schema)[0]}
    for round_index in range(4):
        update, warm = vector("gauss", 5000, round_index), round_index < 2
        payload, private = codec.encode(update, private, shared, round_index)
        expected, states[warm] = (first if warm else later).encode(update, states[warm], None, round_index)
        assert payload == expected
        names = set(codec.private_tensors(private))
        assert names == ({"first.error", "later.error"} if warm else {"later.error"})
        saved = {name: tensor.clone() for name, tensor in codec.private_tensors(private).items()}
        private = codec.restore_private(schema, saved)
    with pytest.raises(LocalError):
        codec.encode(update, private, shared, 1)


def test_feedback_before_warm_up_lives_through_the_switch(schema_of):
    codec, schema = parse_codec("ef(1)|warmup(3, int8)|topk(64/4096)|fp32"), schema_of(9000)
    private, shared = codec.init(schema)
    sent, wanted = torch.zeros(9000, dtype=torch.float64), torch.zeros(9000, dtype=torch.float64)
    for round_index in range(6):
        update = integers(9000, round_index)
        payload, private = codec.encode(update, private, shared, round_index)
        sent += decode(codec, payload, schema, shared, round_index)
        wanted += update
    assert (sent + codec.private_tensors(private)["error"] - wanted).abs().max() < 1e-3


# -- cyclic --------------------------------------------------------------------------------------------------------


def turn_mask(d, parts, turn):
    """Coordinates that a round sends, one by one; the last short cycle has stripes of ceil(n / parts)."""
    mask_d, n = torch.zeros(d, dtype=torch.bool), d % (parts * 1024)
    mask_d[: d - n] = torch.arange(d - n) // 1024 % parts == turn
    if n:
        stripe = math.ceil(n / parts)
        first = d - n + min(turn * stripe, n - stripe)
        mask_d[first : first + stripe] = True
    return mask_d


@pytest.mark.parametrize("d", [1, 9, 1025, 8192, 8193, 2 * 8192 + 2500, 70_001])
@pytest.mark.parametrize("parts", [2, 8, 64])
def test_rounds_send_the_stripes_of_their_turn_as_one_vector_and_together_all(d, parts, schema_of, vector):
    codec, inner, schema = parse_codec(f"cyclic({parts})|int8"), parse_codec("int8"), schema_of(d)
    update, covered_d = vector("gauss", d), torch.zeros(d, dtype=torch.bool)
    for turn in range(parts) if parts < 64 else (0, 1, 33, 63):
        round_index, mask_d = 3 * parts + turn, turn_mask(d, parts, turn)
        payload, _ = codec.encode(update, None, None, round_index)
        expected, _ = inner.encode(update[mask_d], None, None, round_index)
        assert payload == expected
        codec.check(payload, schema, None, round_index)
        row = decode(codec, payload, schema, None, round_index)
        assert torch.equal(row[mask_d], decode(inner, expected, schema_of(int(mask_d.sum())), None))
        assert not row[~mask_d].any()
        assert len(payload) * 8 == pytest.approx(codec.bits(schema) * d)
        covered_d |= mask_d
    assert parts == 64 or covered_d.all()


def test_a_cyclic_payload_has_no_index_bits(schema_of):
    d = 1 << 20
    assert parse_codec("cyclic(8)|q2").bits(schema_of(d)) == parse_codec("q2").bits(schema_of(d)) / 8


# -- adaptive rate -------------------------------------------------------------------------------------------------

ADAPT = "adapt(int8, q2, topk(64/4096)|q2, share=0.5, guard=1)"
LINKS = [
    (None, 1),
    (Link(0.0, 0.0, 10.0, 4), 1),
    (Link(1e9, 1e9, 0.0, 4), 1),
    (Link(1e9, 1e9, 10.0, 4), 0),
    (Link(1e5, 1e9, 10.0, 4), 1),  # 500 kbit in half of 10 s: int8 takes 803 kbit, q2 206 kbit
    (Link(1e9, 1e5, 10.0, 4), 2),  # three members' q2 take 619 kbit, top-k 3 x 21
    (Link(1e9, 1e5, 10.0, 2), 1),
    (Link(1e9, 0.0, 10.0, 200), 0),
    (Link(1.0, 1.0, 1.0, 9), 2),
]


@pytest.mark.parametrize("prefix", ["", "ef(1)|", "ef(1)|rules(else=", "ef(1)|warmup(1, int8)|"])
@pytest.mark.parametrize(("link", "choice"), LINKS)
def test_the_finest_rate_that_fits_is_taken(link, choice, prefix, schema_of, vector):
    codec, schema = parse_codec(prefix + ADAPT + ")" * prefix.count("rules(")), schema_of(100_000)
    private, shared = codec.init(schema)
    if link is not None:
        private = codec.tune(private, link)
    payload, _ = codec.encode(vector("gauss", 100_000), private, shared, 1)
    inside = unframe(payload, 1)[0] if "rules" in prefix else payload
    assert inside[0] == choice


def test_the_guard_buys_bits_where_too_much_would_be_left_out(schema_of):
    schema, slow = schema_of(4096), Link(1.0, 1.0, 1.0, 9)
    codec = parse_codec("adapt(int8, q2, topk(16/4096)|q2, guard=0.9)")
    private, shared = codec.init(schema)
    private = codec.tune(private, slow)
    spike = torch.zeros(4096).index_fill(0, torch.arange(10), 1.0)
    flat = torch.ones(4096) * torch.tensor([1.0, -1.0]).repeat(2048)
    chosen = []
    for update in (spike, flat, torch.randn(4096, generator=torch.Generator().manual_seed(1)), torch.zeros(4096)):
        payload, private = codec.encode(update, private, shared, 0)
        chosen.append(payload[0])
        left = (update - decode(codec, payload, schema, shared)).norm()
        assert left <= 0.9 * update.norm() * (1 + 1e-6)
    assert chosen == [2, 1, 1, 2]


# -- momentum and estimates ----------------------------------------------------------------------------------------


def test_dgc_is_the_papers_algorithm(schema_of):
    d, k = 4096, 64
    codec, schema = parse_codec(f"dgc(0.5)|topk({k}/4096)|fp32"), schema_of(d)
    private, _ = codec.init(schema)
    u, v = np.zeros(d), np.zeros(d)
    for round_index in range(12):
        update = 2.0**10 * integers(d, round_index, 8)  # halving stays exact, v below the limit
        u = 0.5 * u + update.double().numpy()
        v = v + u
        top = np.sort(np.argsort(-np.abs(v), kind="stable")[:k])
        expected = np.zeros(d)
        expected[top] = v[top]
        v[top] = u[top] = 0
        payload, private = codec.encode(update, private, None, round_index)
        assert np.array_equal(decode(codec, payload, schema, None).double().numpy(), expected)
        private = codec.observe(private, Verdict(0.0, Reason.LATE))
        assert np.array_equal(private.momentum_d.double().numpy(), u)
        assert np.array_equal(private.velocity_d.double().numpy(), v)
    private = codec.observe(private, Verdict(0.0, Reason.ANOMALY))
    assert not private.momentum_d.any()
    assert not private.velocity_d.any()


def test_dgc_without_momentum_is_error_feedback_and_clipping_bounds_what_comes_in(schema_of, vector):
    schema = schema_of(9000)
    codecs = [parse_codec(f"{head}|topk(64/4096)|q2") for head in ("dgc(0)", "ef(1)", "dgc(0, clip=3)")]
    states = [codec.init(schema)[0] for codec in codecs]
    for round_index in range(4):
        update = vector("gauss", 9000, round_index)
        clipped = update * float(np.float32(3 / norm(update)))
        inputs = (update, update, clipped)
        sent = []
        for i, codec in enumerate(codecs):
            payload, states[i] = codec.encode(inputs[i], states[i], None, round_index)
            sent.append(payload)
        assert sent[0] == sent[1] != sent[2]
    long, (codec, private) = 1e4 * vector("gauss", 9000), (codecs[2], codecs[2].init(schema)[0])
    payload, private = codec.encode(long, private, None, 0)
    assert norm(private.velocity_d + decode(codec, payload, schema, None)) == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("inner", ["topk(256/4096)|fp32", "q2"])
def test_ef21_closes_in_on_a_fixed_vector_at_the_codecs_contraction(inner, schema_of, vector):
    d, members = 4096, 3
    codec, schema = parse_codec(f"ef21|{inner}"), schema_of(d)
    alpha = 256 / 4096 if "topk" in inner else 0.3
    targets = [vector("gauss", d, seed) for seed in range(members)]
    states, shared = [codec.init(schema)[0] for _ in targets], codec.init(schema)[1]
    for step in range(1, 30):
        rows = []
        for i, target in enumerate(targets):
            payload, states[i] = codec.encode(target, states[i], shared, step)
            rows.append(decode(codec, payload, schema, shared, step))
        shared = codec.advance(shared, torch.stack(rows).double().mean(0).float(), step)
        for i, target in enumerate(targets):
            states[i] = codec.observe(states[i], KEPT)
            g = states[i].estimate_d + states[i].sent_d
            assert norm(g - target) ** 2 <= (1 - alpha) ** step * norm(target) ** 2 + 1e-6
        mean = sum(state.estimate_d + state.sent_d for state in states) / members
        assert (shared.mean_d - mean).abs().max() < 1e-5
    assert norm(shared.mean_d - sum(targets) / members) < 0.5 * norm(targets[0])


def test_ef21_adds_only_rows_that_counted_and_a_joiner_begins_where_the_swarm_is(schema_of):
    codec, schema = parse_codec("ef21|topk(64/4096)|fp32"), schema_of(4096)
    private, shared = codec.init(schema)
    shared = codec.advance(shared, integers(4096, 5), 0)
    for reason in (Reason.LATE, Reason.CUT, Reason.ANOMALY):
        _, private = codec.encode(integers(4096, 1), private, shared, 1)
        private = codec.observe(private, Verdict(0.0, reason))
        saved = {name: tensor.clone() for name, tensor in codec.private_tensors(private).items()}
        private = codec.restore_private(schema, saved)
        assert torch.equal(private.estimate_d + private.sent_d, integers(4096, 5))
    payload, private = codec.encode(integers(4096, 1), private, shared, 2)
    private = codec.observe(private, KEPT)
    assert torch.equal(private.estimate_d + private.sent_d, decode(codec, payload, schema, shared, 2))


@pytest.mark.parametrize("first", [Reason.KEPT, Reason.LATE])
@pytest.mark.parametrize("then", [Reason.KEPT, Reason.LATE, Reason.CUT, Reason.ANOMALY, Reason.ABSTAINED])
def test_only_the_first_verdict_on_what_ef21_sent_counts(first, then, schema_of):
    codec, schema = parse_codec("ef21|topk(64/4096)|fp32"), schema_of(4096)
    private, shared = codec.init(schema)
    shared = codec.advance(shared, integers(4096, 5), 0)
    payload, private = codec.encode(integers(4096, 1), private, shared, 1)
    wanted = decode(codec, payload, schema, shared, 1) if first is Reason.KEPT else integers(4096, 5)
    for reason in (first, then, then):
        private = codec.observe(private, Verdict(0.0, reason))
        assert torch.equal(private.estimate_d + private.sent_d, wanted)


# -- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "lookahead(1)|q2",
        "lookahead(0)|ef(1)|q2",
        "lookahead(1.5)|ef(1)|q2",
        "lookahead(1)|lookahead(1)|ef(1)|q2",
        "rules(q2)",
        "rules(else=q2, 1d=fp32)",
        "rules(1d=fp32)",
        "rules(else=q2)|int8",
        "mix(q2)",
        "mix(q2, int8, fp32)",
        "mix(a=q2, int8)",
        "mix(q2, int8)|q2",
        "mix(lookahead(1)|ef(1)|q2, q2)",
        "mix(q2, ef21|q2)",
        "warmup(0, int8)|q2",
        "warmup(5)|q2",
        "warmup(5, int8)",
        "cyclic(3)|q2",
        "cyclic(128)|q2",
        "cyclic(8)|ef(1)|q2",
        "cyclic(8)",
        "adapt(int8)",
        "adapt(q2, int8)",
        "adapt(int8, int8)",
        "adapt(int8, ef(1)|q2)",
        "adapt(int8, rules(embed=ef(1)|q2, else=q2))",
        "adapt(int8, q2, speed=1)",
        "adapt(int8, q2, share=0)",
        "adapt(int8, q2)|q2",
        "dgc(1)|topk(64/4096)|q2",
        "dgc(0.9)|ef(1)|q2",
        "dgc(0.9, 0)|q2",
        "dgc|q2",
        "ef21(1)|q2",
        "ef21",
        "ef21|ef(1)|q2",
    ],
)
def test_what_makes_no_sense_is_refused_with_its_column(spec):
    with pytest.raises(ConfigError, match="column"):
        parse_codec(spec)


@pytest.mark.parametrize("spec", SPECS)
def test_the_canonical_text_is_its_own_canonical_text(spec):
    codec = parse_codec(spec)
    assert parse_codec(codec.spec).spec == codec.spec


def test_a_nested_mistake_is_found_where_it_stands():
    with pytest.raises(ConfigError, match="column 20:"):
        parse_codec("rules(1d=fp32,else=quark)")


# -- hostile bytes -------------------------------------------------------------------------------------------------


def outcome(codec, payload, schema, shared, round_index):
    """The row, or None if refused; `check` and reading every window must agree, and raise PeerError only."""
    try:
        codec.check(payload, schema, shared, round_index)
        passed = True
    except PeerError:
        passed = False
    rows = []
    try:
        read = codec.open(payload, schema, shared, round_index)
        ends = [*range(WINDOW_ALIGN, schema.numel, WINDOW_ALIGN), schema.numel]
        rows = [densify(read(*span)) for span in zip([0, *ends[:-1]], ends, strict=True)]
    except PeerError:
        assert not passed
        return None
    assert passed
    row = torch.cat(rows)
    assert row.abs().max() <= PAYLOAD_ABS_MAX
    return row


@pytest.mark.parametrize("spec", SPECS)
def test_spoiled_payloads_raise_peer_error_only_and_check_agrees_with_reading(spec, model_schema, vector):
    codec, rng = parse_codec(spec), random.Random(spec)
    _, shared = codec.init(model_schema)
    refused = 0
    for trial in range(24):
        round_index = trial % 3
        payload, _ = codec.encode(vector("gauss", model_schema.numel), codec.init(model_schema)[0], shared, round_index)
        assert outcome(codec, payload, model_schema, shared, round_index) is not None
        spoiled = bytearray(payload)
        match trial % 4:
            case 0:
                spoiled[rng.randrange(min(30, len(spoiled)))] = rng.choice([0, 1, 255, 128])
            case 1:
                for _ in range(20):
                    spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
            case 2:
                spoiled = spoiled[: rng.randrange(len(spoiled))]
            case 3:
                spoiled += rng.randbytes(rng.randrange(1, 20))
        refused += outcome(codec, bytes(spoiled), model_schema, shared, round_index) is None
    assert refused >= 12


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_frame_has_one_spelling(count):
    rng = random.Random(count)
    parts = [rng.randbytes(rng.randrange(20)) for _ in range(count)]
    payload = frame(parts)
    assert unframe(payload, count) == parts
    bad = [b"", payload[:-1], payload + b"\0", b"\xff" * LENGTH_BYTES * count]
    bad += [b"\xff" * 8 + payload[8:], (len(parts[0]) + 1).to_bytes(8, "little") + payload[8:]]
    for wrong in bad:
        with pytest.raises(PeerError, match=f"got {len(wrong)}$"):
            unframe(wrong, count)


# -- shared helpers ------------------------------------------------------------------------------------------------


def test_the_norm_is_the_exact_one_but_for_rounding(shape, vector):
    for d in (1, 66_001):
        update = vector(shape, d)
        exact = math.sqrt(math.fsum(float(x) ** 2 for x in update.tolist()))
        assert norm(update) == pytest.approx(exact, rel=1e-14)


def test_any_span_reads_as_the_cut_of_the_whole(schema_of, vector):
    d, rng = 50_000, random.Random(1)
    schema, update = schema_of(d), vector("gauss", d)
    for spec in ("int8", "topk(64/4096)|q2"):
        codec = parse_codec(spec)
        payload, _ = codec.encode(update, None, None, 0)
        read, whole = codec.open(payload, schema, None, 0), decode(codec, payload, schema, None)
        for start, stop in [(0, d), (0, 1), (d - 1, d)] + [sorted(rng.sample(range(d + 1), 2)) for _ in range(20)]:
            assert torch.equal(densify(read_span(read, start, stop, d)), whole[start:stop])


@pytest.mark.parametrize(
    "bad", [torch.zeros(3), torch.zeros(4).double(), torch.tensor([0, 0, 0, 2.0]), torch.zeros(2, 2)]
)
def test_an_update_of_another_shape_or_size_is_our_own_error(bad):
    with pytest.raises(LocalError):
        require_finite(bad, 4, at_most=1.0)
