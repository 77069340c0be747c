"""Where members mix: what they agree on, what each keeps for itself, and what a run file may ask for."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from farflung.aggregation import push_sum
from farflung.aggregation.graphs import parse_graph, plan_round
from farflung.aggregation.outer import parse_outer
from farflung.aggregation.registry import parse_rule
from farflung.aggregation.weights import parse_weights
from farflung.compression import parse_codec
from farflung.node.assembly import make_anchor
from farflung.node.blob_sources import MemoryBlob
from farflung.node.carriers import WholeCarrier
from farflung.node.mixing_codec import EXACT, MixingCodec, cut
from farflung.node.mixing_round import MixingRound, terms_of
from farflung.node.reference import ReferenceAnchor
from farflung.node.replica import Replica
from farflung.node.run_file import RunFile, make_genesis, parse_run
from farflung.node.tasks.load import load_task
from farflung.protocol.blob import describe
from farflung.protocol.errors import ConfigError, LocalError, PeerError
from farflung.protocol.genesis import decode_genesis
from farflung.protocol.identity import Identity
from farflung.protocol.ledger.books import Ledger
from farflung.protocol.manifest import Manifest
from farflung.protocol.mixing.account import Account, Book, Totals
from farflung.protocol.mixing.clockwork import Patience, TickPlan
from farflung.protocol.mixing.push_sum import PushSumMachine
from farflung.protocol.mixing.settings import Mixing
from farflung.protocol.schema import Schema, TensorSpec
from farflung.protocol.statements import Announcement

D = 40
SCHEMA = Schema((TensorSpec("w", (D,), "float32"),))
IDENTITIES = sorted((Identity(hashlib.sha256(bytes([i])).digest()) for i in range(4)), key=lambda one: one.peer_id)
MEMBERS = [one.peer_id for one in IDENTITIES]
OUTER = "nesterov(lr=0.7,momentum=0.6)"


class Shelf(dict):
    def keep(self, data: bytes):
        blob = MemoryBlob.of(data)
        self[blob.ref.digest] = blob
        return blob.ref


def anchor_of(shelf: Shelf, *, weights="steps(cap=100)", mode="push-sum", outer=OUTER, **mixing) -> ReferenceAnchor:
    codec = parse_codec("fp32")
    return ReferenceAnchor(
        schema=SCHEMA,
        codec=codec,
        rule=parse_rule("mean"),
        outer=parse_outer(outer),
        weights=parse_weights(weights),
        theta_d=torch.linspace(-1, 1, D),
        shared=codec.init(SCHEMA)[1],
        founder=MEMBERS[0],
        mode=mode,
        mixing=Mixing(**mixing),
        terms=terms_of(True),
        open_blob=shelf.get,
    )


def manifest_of(accounts: list[Account], steps: list[int], *, round_index=1, trained=1) -> tuple[Manifest, list[bytes]]:
    payloads = [account.canonical_bytes for account in accounts]
    key_of = {one.peer_id: one.public_key for one in IDENTITIES}
    items = tuple(
        Announcement(key_of[account.member], describe(payload)[0], count, 10 * count)
        for account, payload, count in zip(accounts, payloads, steps, strict=True)
    )
    manifest = Manifest(bytes(20), round_index, bytes(32), MEMBERS[0], items, (), (), (), True, trained)
    return manifest, payloads


def apply(anchor: ReferenceAnchor, accounts: list[Account], steps: list[int], **more):
    manifest, payloads = manifest_of(accounts, steps, round_index=anchor.round_index + 1, **more)
    trial = anchor.try_out(manifest, payloads)
    anchor.commit(manifest.digest)
    return trial


# -- the reference ----------------------------------------------------------------------------------------------------


def test_the_roll_is_weights_shrunk_by_lateness_over_the_largest():
    anchor = anchor_of(Shelf(), late_percent=50)
    accounts = [Account(MEMBERS[0], 0), Account(MEMBERS[1], 2), Account(MEMBERS[2], 0)]
    apply(anchor, accounts, [10, 40, 0])
    assert anchor.roll is not None
    assert anchor.roll.members == tuple(MEMBERS[:3])
    assert anchor.roll.mass == (0.5, 1.0, 0.0)  # 10, 40 / (1 + 0.5 x 2), nothing


def test_who_did_no_step_has_no_mass_whatever_the_policy():
    anchor = anchor_of(Shelf(), weights="uniform")
    apply(anchor, [Account(member, 0) for member in MEMBERS[:2]], [3, 0])
    assert anchor.roll is not None
    assert anchor.roll.mass == (1.0, 0.0)


def test_members_who_all_did_nothing_have_no_mass():
    anchor = anchor_of(Shelf())
    apply(anchor, [Account(member, 0) for member in MEMBERS[:2]], [0, 0])
    assert anchor.roll is not None
    assert anchor.roll.mass == (0.0, 0.0)


def test_without_a_new_reference_the_state_stays_and_so_does_its_digest():
    anchor = anchor_of(Shelf())
    before, theta_d = anchor.theta_d.clone(), anchor.theta_d
    first = apply(anchor, [Account(MEMBERS[0], 0)], [5])
    second = apply(anchor, [Account(MEMBERS[1], 0)], [5], trained=2)
    assert first.ref == second.ref
    assert anchor.theta_d is theta_d
    assert torch.equal(theta_d, before)


def state_bytes(seed: int, parts: int = 2) -> bytes:
    return torch.randn(parts * D, generator=torch.Generator().manual_seed(seed)).numpy().tobytes()


def test_a_reference_becomes_the_state_with_its_own_digest():
    shelf = Shelf()
    anchor = anchor_of(shelf)
    ref = shelf.keep(state_bytes(1))
    offer, other = Account(MEMBERS[1], 0, reference=ref, holds=ref.digest), Account(MEMBERS[2], 0)
    assert apply(anchor, [offer, other], [5, 5]).ref != ref  # half of them have it: it stands
    assert anchor.standing == (ref,)
    trial = apply(anchor, [offer, replace(other, holds=ref.digest)], [5, 5], trained=2)
    assert trial.ref == ref
    assert anchor.standing == ()
    whole = torch.cat([anchor.theta_d, *anchor.state])
    assert whole.numpy().tobytes() == state_bytes(1)
    assert apply(anchor, [Account(MEMBERS[1], 0)], [5], trained=3).ref == ref
    assert (anchor.trained, anchor.reference_trained) == (3, 0)


def test_of_several_references_all_take_the_same_one():
    shelf = Shelf()
    refs = [shelf.keep(state_bytes(seed)) for seed in range(3)]
    accounts = [Account(MEMBERS[i], 0, reference=refs[i], holds=refs[1].digest) for i in range(3)]
    taken = set()
    for threads in (1, 2):
        anchor = anchor_of(shelf)
        anchor.threads = threads
        taken.add(apply(anchor, accounts, [1, 1, 1]).ref.digest)
    assert taken == {refs[1].digest}


def test_a_reference_that_is_not_finite_is_left_alone():
    shelf = Shelf()
    anchor = anchor_of(shelf)
    bad = torch.zeros(2 * D)
    bad[7] = torch.inf
    before = anchor.theta_d.clone()
    ref = shelf.keep(bad.numpy().tobytes())
    trial = apply(anchor, [Account(MEMBERS[1], 0, reference=ref, holds=ref.digest)], [5])
    assert trial.numbers["new_reference"] == 0.0
    assert torch.equal(anchor.theta_d, before)


def test_with_pairs_only_the_founder_may_move_the_reference():
    shelf = Shelf()
    anchor = anchor_of(shelf, mode="pairs")
    mine, theirs = shelf.keep(state_bytes(1)), shelf.keep(state_bytes(2))
    account = Account(MEMBERS[1], 0, reference=theirs, holds=theirs.digest)
    assert anchor.offered(account.canonical_bytes) is None
    apply(anchor, [account], [5])
    assert anchor.trained == 1
    assert torch.equal(anchor.theta_d, torch.linspace(-1, 1, D))
    founders = Account(MEMBERS[0], 0, reference=mine, holds=mine.digest)
    assert apply(anchor, [founders, replace(account, holds=mine.digest)], [5, 5], trained=2).ref == mine


def test_accounts_in_others_names_and_references_of_another_size_are_refused_at_the_door():
    shelf = Shelf()
    anchor = anchor_of(shelf)
    with pytest.raises(PeerError, match="name"):
        anchor.check(Account(MEMBERS[1], 0).canonical_bytes, 1, MEMBERS[2])
    small = shelf.keep(bytes(64))
    with pytest.raises(PeerError, match="reference"):
        anchor.check(Account(MEMBERS[1], 0, reference=small).canonical_bytes, 1, MEMBERS[1])
    anchor.check(Account(MEMBERS[1], 0).canonical_bytes, 1, MEMBERS[1])


@pytest.mark.parametrize("mode", ["push-sum", "pairs"])
def test_accounts_of_another_kind_or_of_a_round_to_come_are_refused_at_the_door(mode):
    anchor = anchor_of(Shelf(), mode=mode)
    whole = account_with(MEMBERS[1], 1.0, 1.0)
    bare = replace(whole, books=tuple(replace(book, ledger=None) for book in whole.books))
    right, wrong = (whole, bare) if mode == "push-sum" else (bare, whole)
    anchor.check(right.canonical_bytes, 2, MEMBERS[1])
    for data, round_index in ((wrong, 2), (replace(right, books=right.books * 2), 2), (right, 1)):
        with pytest.raises(PeerError, match="account"):
            anchor.check(data.canonical_bytes, round_index, MEMBERS[1])


def test_with_pairs_no_claim_makes_others_count_nothing():
    anchor = anchor_of(Shelf(), mode="pairs", weights=f"tokens(cap={2**53})")
    payloads = [Account(member, 0) for member in MEMBERS[:3]]
    manifest, data = manifest_of(payloads, [5, 5, 0])
    greedy = replace(manifest.announcements[0], tokens=2**53)
    manifest = replace(manifest, announcements=(greedy, *manifest.announcements[1:]))
    anchor.try_out(manifest, data)
    anchor.commit(manifest.digest)
    assert anchor.roll is not None
    assert anchor.roll.mass == (1.0, 1 / 1024, 0.0)


def account_with(member, opened: float, weight: float, *, round_index=1) -> Account:
    ledger = Ledger(member, terms_of(True), round_index - 1, Fraction(0))
    ledger.open_round(round_index, Fraction(opened))
    return Account(member, 0, round_index, (Book(ledger, Fraction(weight), Totals(1.0, 1.0, 1.0)),))


def test_who_opened_more_than_was_certified_is_found():
    anchor = anchor_of(Shelf())
    apply(anchor, [Account(MEMBERS[0], 0), Account(MEMBERS[1], 0)], [10, 5])
    apply(anchor, [account_with(MEMBERS[0], 1.0, 1.0), account_with(MEMBERS[1], 1.0, 1.0)], [10, 5], trained=2)
    assert anchor.audited is not None
    assert [item.members for item in anchor.audited.discrepancies] == [(MEMBERS[1],)]
    anchor.audited.require(MEMBERS[0])
    with pytest.raises(LocalError, match=r"certified was 0\.5"):
        anchor.audited.require(MEMBERS[1])


def test_who_holds_other_mass_than_its_books_say_is_found_with_its_ledger():
    anchor = anchor_of(Shelf())
    apply(anchor, [Account(MEMBERS[0], 0)], [10])
    apply(anchor, [account_with(MEMBERS[0], 1.0, 0.75)], [10], trained=2)
    assert anchor.audited is not None
    with pytest.raises(LocalError, match='"opened":"1/1"'):
        anchor.audited.require(MEMBERS[0])


# -- the replica ------------------------------------------------------------------------------------------------------


def replica_of(seed: int = 0) -> Replica:
    replica = Replica(parse_outer(OUTER), D)
    made = torch.Generator().manual_seed(seed)
    state = tuple(torch.randn(D, generator=made) for _ in replica.state)
    replica.start_from(torch.randn(D, generator=made), state, round_index=3, trained=2)
    return replica


def test_a_step_is_the_outer_optimisers_in_place():
    replica, outer, gradient_d = replica_of(), parse_outer(OUTER), torch.linspace(0, 1, D)
    theta_d, state = torch.empty(D), tuple(torch.empty(D) for _ in replica.state)
    outer.step(replica.theta_d, replica.state, gradient_d, theta_out_d=theta_d, state_out=state, trained=3)
    replica.step(gradient_d, round_index=4, trained=3)
    assert torch.equal(replica.theta_d, theta_d)
    assert torch.equal(replica.state[0], state[0])
    assert (replica.round_index, replica.trained) == (4, 3)


def test_catching_up_lands_on_the_mean_and_leaves_the_momentum():
    replica, goal_d = replica_of(), torch.linspace(2, 3, D)
    momentum_d = replica.state[0].clone()
    replica.catch_up(replica.theta_d - goal_d, round_index=9, trained=7)
    assert torch.allclose(replica.theta_d, goal_d, atol=1e-6)
    assert torch.equal(replica.state[0], momentum_d)


def test_a_replica_comes_back_and_refuses_what_is_not_its_own():
    replica, other = replica_of(), replica_of(1)
    other.restore(replica.tensors(), replica.meta())
    assert all(torch.equal(a, b) for a, b in zip(replica.tensors().values(), other.tensors().values(), strict=True))
    with pytest.raises(LocalError, match="outer"):
        other.restore(replica.tensors(), replica.meta() | {"outer": "sgd(lr=1)"})
    with pytest.raises(LocalError, match="outer"):
        other.restore({"theta": replica.theta_d}, replica.meta())


@pytest.mark.parametrize(("alone", "level"), [(True, 7), (False, 5)])
def test_a_late_member_is_level_when_it_heard_of_others_or_when_there_are_none(alone, level):
    """It was 2 behind: heard by nobody it is 2 behind still, though it trained in this round."""
    replica, reference_d = replica_of(), torch.zeros(D)
    replica.trained = 4
    replica.note_end(torch.ones(D))
    codec, patience = MixingCodec(parse_codec("fp32"), cut(D, 1)), Patience.of(genesis_of(mode="push-sum"))
    plan = plan_round(parse_graph("base(k=1)"), 1, 1, run_id=bytes(20), round_index=7)
    holding = push_sum.begin(0, plan, replica.phi_d, reference_d, [1.0])
    opened, ticks = (Fraction(1),), (TickPlan((), ()),)
    machine = PushSumMachine(MEMBERS[0], 7, ticks, opened, terms_of(True), patience, lambda peer: None, 0.0)
    carrier = WholeCarrier(holding, (MEMBERS[0],), codec, 7, terms_of(True), 1.0)
    began = tuple(mass.sums() for mass in holding.masses)
    current = MixingRound(MEMBERS[0], 7, machine, codec, carrier, began, 2, replica, reference_d, 1, alone)
    current.finish(7)
    assert replica.trained == level
    assert torch.allclose(replica.theta_d, replica.phi_d)


# -- codecs and fragments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "fragments"), [(40, 1), (1 << 14, 1), (40_000, 2), (100_000, 3), (1 << 20, 8)])
def test_fragments_are_the_whole_vector_in_order(d, fragments):
    parts = cut(d, fragments)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == d
    assert len(parts) == fragments


def test_a_vector_too_short_for_its_fragments_is_refused():
    with pytest.raises(ConfigError, match="fragments"):
        cut(100, 2)


@pytest.mark.parametrize("spec", ["fp32", "int8", "int4", "bf16"])
def test_a_fragment_travels_like_a_model(spec):
    codec = MixingCodec(parse_codec(spec), cut(40_000, 2))
    for part, at in enumerate(codec.parts):
        vector_d = torch.randn(at.stop - at.start, generator=torch.Generator().manual_seed(part))
        payload = codec.encode(part, vector_d, 1)
        assert len(payload) <= codec.bytes_max(part)
        found_d = codec.decode(part, payload, 1)
        assert found_d.shape == vector_d.shape
        assert (found_d - vector_d).norm() <= (0 if spec == EXACT else 0.2) * vector_d.norm()
        with pytest.raises(PeerError):
            codec.decode(part, payload[:-1], 1)


# -- run files --------------------------------------------------------------------------------------------------------


def genesis_of(**settings):
    options = {"features": 16, "samples": 64, "batch": 4, "noise": 0.0}
    run = parse_run({"task": "builtin:linear", "task_options": options, **settings}, where="run.toml")
    return make_genesis(run, IDENTITIES[0].public_key, b"sixteen bytes or more")[0]


@pytest.mark.parametrize("mode", ["push-sum", "pairs"])
def test_a_mode_brings_its_defaults_and_comes_back(mode):
    genesis = genesis_of(mode=mode)
    assert genesis.codec.startswith("int8")
    assert genesis.rule == "mean"
    assert genesis.mixing.graph == ("base(k=1)" if mode == "push-sum" else "random-matching")
    assert decode_genesis(genesis.canonical_bytes, genesis.run_id) == genesis
    assert genesis_of(mode=mode, mixing={"reference_rounds": 7}).mixing == replace(genesis.mixing, reference_rounds=7)


def test_momentum_is_less_where_a_round_does_not_bring_members_together():
    assert "momentum=0.6" in genesis_of(mode="push-sum").outer
    for inexact in ({"mode": "pairs"}, {"mode": "push-sum", "mixing": {"ticks": 1}}):
        assert "momentum=0.5" in genesis_of(**inexact).outer
    assert genesis_of(mode="pairs", outer="sgd(lr=1.0)").outer == "sgd(lr=1.0)"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "gossip"}, "mode is one of"),
        ({"mixing": {"ticks": 2}}, "push-sum"),
        ({"mode": "push-sum", "liars": 1}, "no theory"),
        ({"mode": "push-sum", "rule": "geometric-median(f=0)"}, "sums"),
        ({"mode": "pairs", "liars": 1}, "clip"),
        ({"mode": "push-sum", "codec": "ef(1)|q2"}, "copies instead of error feedback"),
        ({"mode": "push-sum", "codec": "sign"}, "overshoot"),
        ({"mode": "push-sum", "codec": "topk(64/4096)|q2"}, "gamma"),
        ({"mode": "push-sum", "codec": "int2"}, "gamma"),
        ({"mode": "push-sum", "codec": "fp32", "mixing": {"gamma_percent": 50}}, "gamma_percent"),
        ({"mode": "push-sum", "mixing": {"radius_percent": 50}}, "radius_percent"),
        ({"mode": "pairs", "mixing": {"gamma_percent": 50}}, "gamma_percent"),
        ({"mode": "pairs", "mixing": {"graph": "complete"}}, "matchings"),
        ({"mode": "push-sum", "mixing": {"graph": "mobius"}}, "mobius"),
        ({"mode": "push-sum", "mixing": {"fragments": 2}}, "fragments"),
        ({"mode": "push-sum", "mixing": {"tick": 1}}, "did you mean 'ticks'"),
        ({"mode": "push-sum", "mixing": {"ticks": 1000}}, "ticks"),
        ({"mode": "push-sum", "mixing": {"ticks": "two"}}, "ticks"),
        ({"mode": "push-sum", "mixing": 3}, "table"),
        ({"mode": "pairs", "weights": "fednova(cap=10)"}, "explode"),
        ({"mode": "pairs", "codec": "q2"}, "pulled towards zero"),
        ({"mode": "pairs", "codec": "topk(64/4096)|int8"}, "pulled towards zero"),
        ({"mode": "pairs", "outer": "nesterov(lr=0.7,momentum=0.9)"}, "momentum=0.9"),
        ({"mode": "push-sum", "mixing": {"ticks": 1}, "outer": "heavy-ball(lr=0.7,momentum=0.95)"}, "inexact"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(settings, words):
    with pytest.raises(ConfigError, match=words):
        genesis_of(**settings)


@pytest.mark.parametrize(
    "changes", [{"mixing": Mixing(graph="mobius")}, {"codec": "ef(1)|q2"}, {"mixing": Mixing(fragments=2)}]
)
def test_who_joins_a_run_it_cannot_mix_in_is_told_at_once(changes):
    genesis = replace(genesis_of(mode="push-sum"), **changes)
    task = load_task(genesis.task, {"features": 16, "samples": 64, "batch": 4, "noise": 0.0})
    with pytest.raises(ConfigError):
        make_anchor(genesis, task.build_model())


def test_sparse_codecs_travel_with_a_small_gamma():
    genesis = genesis_of(mode="push-sum", codec="topk(64/4096)|q2", mixing={"gamma_percent": 10})
    assert genesis.mixing.gamma_percent == 10
    assert RunFile(mode="push-sum").codec == "int8"
