"""A run's id changes with every setting, and what this version cannot run is said in words."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from protocol_world import make_genesis, make_identity

from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import ConfigError, PeerError
from farflung.protocol.genesis import Genesis, Timing, decode_genesis, run_id_of, secret_digest
from farflung.protocol.mixing.settings import Mixing
from farflung.protocol.schema import Schema, TensorSpec

GENESIS = make_genesis(make_identity(0))
OTHER = {
    "name": "another",
    "founder": bytes(32),
    "state_digest": bytes(32),
    "schema": Schema((TensorSpec("w", (9,), "float32"),)),
    "task": "builtin:linear",
    "task_options": '{"a":1}',
    "codec": "fp32",
    "rule": "median",
    "outer": "sgd(lr=1.0)",
    "inner_steps": 31,
    "rounds": 1,
    "weights": "steps(cap=5)",
    "closed": False,
    "secret_digest": bytes(32),
    "start_members": 2,
    "payloads_min": 2,
    "quorum_percent": 68,
    "snapshot_rounds": 6,
    "timing": Timing(grace_ms=1),
    "validation_digest": "00",
}


MIXED = replace(GENESIS, mode="push-sum")


def test_every_field_is_in_the_run_id():
    fixed = {"mode", "mixing", "trust", "version"}  # one value each so far, but for those that follow
    assert OTHER.keys() == {item.name for item in fields(Genesis)} - fixed
    ids = {replace(GENESIS, **{name: value}).run_id for name, value in OTHER.items()}
    assert len(ids | {GENESIS.run_id}) == len(OTHER) + 1


def test_every_mode_and_what_it_mixes_by_is_in_the_run_id():
    others = [
        replace(MIXED.mixing, **{item.name: "ring" if item.name == "graph" else getattr(MIXED.mixing, item.name) - 1})
        if getattr(MIXED.mixing, item.name) not in (0, 1)
        else replace(MIXED.mixing, **{item.name: getattr(MIXED.mixing, item.name) + 1})
        for item in fields(Mixing)
    ]
    runs = [GENESIS, MIXED, replace(GENESIS, mode="pairs"), *(replace(MIXED, mixing=mixing) for mixing in others)]
    assert len({run.run_id for run in runs}) == len(runs)
    for run in runs:
        assert decode_genesis(run.canonical_bytes, run.run_id) == run


def test_gather_knows_no_mixing():
    with pytest.raises(ConfigError, match="mixing"):
        replace(GENESIS, mixing=replace(MIXED.mixing, ticks=3))
    for data in (bent(mixing=MIXED.mixing.to_json()), bent(mode="pairs"), bent(mode="pairs", mixing={"ticks": 1})):
        with pytest.raises(PeerError, match="genesis"):
            decode_genesis(data, run_id_of(data))


def test_every_timing_is_in_the_run_id():
    timings = [
        replace(GENESIS.timing, **{item.name: getattr(GENESIS.timing, item.name) + 1}) for item in fields(Timing)
    ]
    assert len({replace(GENESIS, timing=timing).run_id for timing in timings}) == len(timings)


@pytest.mark.parametrize("changes", [{}, *({name: value} for name, value in OTHER.items())])
def test_a_genesis_comes_back(changes):
    genesis = replace(GENESIS, **changes)
    assert decode_genesis(genesis.canonical_bytes, genesis.run_id) == genesis


def bent(**changes) -> bytes:
    value = decode_canonical(GENESIS.canonical_bytes, bytes_max=1 << 20)
    return encode_canonical({**value, **changes})


def test_a_genesis_of_a_newer_version_is_explained_to_the_user():
    for data, words in ((bent(version=2), "version 2"), (bent(fancy=True), "fancy")):
        with pytest.raises(ConfigError, match=words):
            decode_genesis(data, run_id_of(data))


def test_a_value_that_cannot_work_is_named():
    for changes, name in (
        ({"inner_steps": 0}, "inner_steps"),
        ({"mode": "sharded"}, "mode"),
        ({"trust": "byzantine"}, "trust"),
        ({"secret_digest": ""}, "secret_digest"),
        ({"quorum_percent": 101}, "quorum_percent"),
        ({"start_members": 100_000}, "start_members"),
        ({"name": ""}, "name"),
        ({"name": "a\x1b[2J"}, "name"),
    ):
        data = bent(**changes)
        with pytest.raises(ConfigError, match=name):
            decode_genesis(data, run_id_of(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"founder": 5},
        {"founder": "zz"},
        {"schema": []},
        {"timing": {"unknown": 1}},
        {"timing": 3},
        {"inner_steps": "many"},
        {"name": 4},
        {"closed": "yes"},
        {"codec": 7},
        {"rounds": True},
    ],
)
def test_nonsense_under_the_right_hash_is_an_error_of_the_tree(changes):
    data = bent(**changes)
    with pytest.raises((PeerError, ConfigError)):
        decode_genesis(data, run_id_of(data))


def test_bytes_of_another_run_are_refused():
    with pytest.raises(PeerError, match="another run"):
        decode_genesis(bent(name="other"), GENESIS.run_id)
    with pytest.raises(PeerError):
        decode_genesis(b"[]", run_id_of(b"[]"))


def test_a_secret_is_recognised_and_another_is_not():
    genesis = replace(GENESIS, secret_digest=secret_digest(b"right"))
    assert genesis.admits(b"right")
    assert not genesis.admits(b"wrong")
    assert not replace(GENESIS, closed=False, secret_digest=b"").admits(b"")


def schema(*tensors: tuple[str, tuple[int, ...], str], ends: tuple[int, ...] = ()) -> Schema:
    return Schema(tuple(TensorSpec(*tensor) for tensor in tensors), ends)


BASE = schema(("a", (2, 3), "float32"), ("b", (4,), "float32"))


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (schema(("a", (2, 3), "float32")), "'b'"),
        (schema(("a", (2, 3), "float32"), ("b", (4,), "float32"), ("c", (1,), "float32")), "'c'"),
        (schema(("a", (3, 2), "float32"), ("b", (4,), "float32")), "'a'"),
        (schema(("a", (2, 3), "float32"), ("b", (4,), "bfloat16")), "'b'"),
        (schema(("a", (2, 3), "float32"), ("b", (4,), "float32"), ends=(5, 10)), "fragments"),
    ],
)
def test_a_different_model_is_named_by_its_first_different_tensor(ours, words):
    assert words in str(ours.explain_difference(BASE))
    assert ours.digest != BASE.digest
    assert BASE.explain_difference(BASE) is None
    assert Schema.from_json(ours.to_json()) == ours


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (("b", (1,), "float32"), ("a", (1,), "float32")),
        (("a", (1,), "float32"),) * 2,
        (("a", (1 << 41,), "float32"),),
    ],
)
def test_a_schema_that_cannot_be_is_refused(tensors):
    with pytest.raises(ConfigError):
        schema(*tensors)
    with pytest.raises(ConfigError):
        Schema.from_json({"tensors": [["a", [0], "float32"]], "fragment_ends": []})
