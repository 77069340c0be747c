"""Bytes of a round: sizes against encoded objects, counts against brute force and against real nodes in a world."""

import csv
import json
from fractions import Fraction

import pytest

from farflung.aggregation.graphs import parse_graph, plan_round, senders_to
from farflung.cli import main
from farflung.compression import parse_codec
from farflung.node.mixing_codec import MixingCodec, cut
from farflung.node.runtime import DIGEST_LIST
from farflung.node.transport.server import encode_chunk
from farflung.protocol import limits
from farflung.protocol import messages_pb2 as pb
from farflung.protocol.certificate import Certificate
from farflung.protocol.errors import ConfigError
from farflung.protocol.ledger.amounts import Amount
from farflung.protocol.ledger.books import Ledger, Terms
from farflung.protocol.ledger.effects import Send
from farflung.protocol.mixing.account import Account, Book, Totals
from farflung.protocol.wire import Certified, Proposal
from farflung.sim.bench import wire_sizes as sizes
from farflung.sim.bench.wire_bench import Ask, payload_length, plain_row, run_bench
from farflung.sim.bench.wire_count import Crossing, Ground, Way, count, crossing, plan_of
from farflung.sim.bench.wire_measure import Rehearsal, measure
from farflung.sim.bench.wire_report import bytes_text, crossing_text

INT8 = 70_000
GATHER, PUSH, PAIRS = Way("gather", "int8"), Way("push-sum", "int8", "base(k=1)"), Way("pairs", "int8", "ring", 1)
PAIRED = Way("pairs", "int8", "random-matching", 1)


def ground(**changes):
    parts = {"payload_bytes": {"int8": INT8, "fp32": 4 * INT8}, "state_bytes": 8 * INT8, "reference_rounds": 20}
    return Ground(**{**parts, "round_s": 10.0, **changes})


def total(item):
    return item.total


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [2, 17, 64, 256])
def test_manifests_and_certificates_grow_by_the_same_for_every_member(members):
    """Whole ones of so many members, and a quorum's signatures, against a line through the smallest."""
    manifest = sizes.manifest_of(members, INT8)
    assert sizes.proposal_bytes(members, INT8) == pytest.approx(sizes.told_bytes(Proposal(0, manifest)), rel=1e-3)
    votes = tuple((sizes.identity_of(number).peer_id, sizes.SIGNATURE) for number in range(sizes.quorum(members)))
    whole = sizes.told_bytes(Certified(Certificate(manifest, 0, sizes.DIGEST, votes)))
    assert sizes.certified_bytes(members, INT8) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("size", [1, 1 << 14, 70_000, 1 << 20, 3 << 20, 200 << 20])
def test_fetching_costs_what_its_messages_are_long(size):
    ref = sizes.ref_of(size)
    spans = [ref.span(index) for index in range(ref.chunks)]
    chunks = [(index, stop - start) for index, (start, stop) in enumerate(spans)]
    frames = sum(len(encode_chunk(index, b"\1" * length)) - length for index, length in chunks)

    def asked(*indices):
        return len(pb.BlobRequest(run_id=sizes.RUN_ID, digest=sizes.DIGEST, chunks=indices).SerializeToString())

    listed = len(encode_chunk(DIGEST_LIST, bytes([7]) * (32 * ref.chunks)))
    assert sizes.fetch_bytes(size) == asked() + listed + frames + sum(asked(index) for index, _ in chunks)
    assert sizes.direct_bytes(size) == asked(*(index for index, _ in chunks)) + frames


@pytest.mark.parametrize("partners", [1, 3, 8])
@pytest.mark.parametrize("fragments", [1, 4])
def test_an_account_is_as_long_as_that_of_ledgers_that_really_exchanged(partners, fragments):
    """Ledgers that sent and counted a parcel with every partner, and had its receipt."""
    me, *others = [sizes.identity_of(number).peer_id for number in range(partners + 1)]
    ledger = Ledger(me, Terms(), sizes.ROUND - 1, Fraction(0))
    ledger.open_round(sizes.ROUND, Fraction(partners + 1), admit=dict.fromkeys(others, sizes.ROUND))
    for peer in others:
        theirs = Ledger(peer, Terms(), sizes.ROUND - 1, Fraction(0))
        theirs.open_round(sizes.ROUND, Fraction(1), admit={me: sizes.ROUND})
        for giver, taker in ((ledger, theirs), (theirs, ledger)):
            sent = giver.send(taker.me, Amount(sizes.MASS, sizes.DIGEST))
            said = [item.message for item in sent if isinstance(item, Send)]
            answers = [item.message for item in taker.hear(giver.me, said[0]) if isinstance(item, Send)]
            giver.hear(taker.me, answers[0])
    totals = Totals(started=sizes.TOTAL, held=sizes.TOTAL, magnitude=sizes.TOTAL)
    account = Account(me, 0, sizes.ROUND, (Book(ledger, sizes.MASS, totals),) * fragments)
    real = len(account.canonical_bytes)
    assert sizes.account_bytes(partners, fragments, ledgers=True) == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("spec", ["int8", "ef(1)|q2", "fp32", "topk(64/4096)|q2"])
def test_payloads_have_the_length_that_codecs_give_them(spec):
    codec, params = parse_codec(spec), 1 << 17
    assert (
        payload_length(spec, params)
        <= codec.bits(MixingCodec(parse_codec("int8"), cut(params, 1)).schema(0)) * params / 8
    )
    assert payload_length("int8", params) == len(_encoded(params))
    assert payload_length("fp32", 1 << 30) == pytest.approx(4 << 30, rel=1e-6)  # too long to be made: a promise


def _encoded(params):
    import torch

    return MixingCodec(parse_codec("int8"), cut(params, 1)).encode(0, torch.randn(params), 1)


# -- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [2, 3, 5, 8, 12, 17, 33])
@pytest.mark.parametrize("spec", ["base(k=1)", "base(k=2)", "exponential", "ring"])
def test_parcels_are_those_of_the_graph(members, spec):
    """Counted by receivers here, by senders there."""
    graph = parse_graph(spec)
    mixings = plan_round(graph, members, graph.period(members), run_id=bytes(20), round_index=3)
    heard = [senders_to(mixing, me) for mixing in mixings for me in range(members)]
    plan = plan_of(spec, members, 0, pairs=False)
    assert plan.mean * members == pytest.approx(sum(map(len, heard)))
    assert plan.ticks == graph.period(members)
    assert plan.mean <= plan.tallest <= plan.ticks * graph.degree(members)


def test_short_rounds_count_the_mean_of_the_rounds_that_make_a_period():
    """Nine members idle in turn: two ticks are not the same share of a period in every round."""
    whole, short = plan_of("base(k=1)", 9, 0, pairs=False), plan_of("base(k=1)", 9, 2, pairs=False)
    assert short.mean == pytest.approx(whole.mean * 2 / whole.ticks)
    assert short.ticks == 2


def test_gather_grows_with_members_and_mixing_with_ticks():
    gathered = {n: count(GATHER, n, ground()) for n in (4, 8, 16, 64, 256)}
    mixed = {n: count(PUSH, n, ground()) for n in (4, 8, 16, 64, 256)}
    assert [item.payloads for item in gathered.values()] == [3, 7, 15, 63, 255]
    assert [item.payloads for item in mixed.values()] == [2, 3, 4, 6, 8]  # log2 n, exact on powers of two
    assert all(count(Way("push-sum", "int8", "base(k=1)", 2), n, ground()).payloads == 2 for n in (4, 64, 256))
    assert all(count(PAIRED, n, ground()).payloads == 1 for n in (4, 64, 256))
    for item in (*gathered.values(), *mixed.values()):
        assert item.total == pytest.approx(item.bulk + item.carried + item.said + item.beats)


def test_seconds_are_bytes_of_the_busiest_on_the_slower_direction_and_delays():
    item = count(PUSH, 5, ground())
    assert item.payloads < item.payloads_most == 5  # somebody idles in every tick, but nobody is quicker for it
    bulk = 5 * INT8 + item.reference + item.carried + item.said
    assert item.wire_s(1e6, 8e6, 0.0) == pytest.approx(8 * bulk / 1e6)
    assert item.wire_s(8e6, 1e6, 0.05) - item.wire_s(1e6, 8e6, 0.0) == pytest.approx(0.05 * item.flights)
    assert item.flights - count(GATHER, 5, ground()).flights == 3 * item.ticks


@pytest.mark.parametrize(
    "way", [PUSH, Way("push-sum", "int8", "base(k=1)", 2), PAIRED, Way("push-sum", "fp32", "ring", 9)]
)
def test_a_crossing_is_where_comparing_everything_finds_it(way, monkeypatch):
    monkeypatch.setattr(limits, "MEMBERS_MAX", 40)
    gather, on = Way("gather", "int8"), ground()
    less = [n for n in range(2, 41) if count(way, n, on).total < count(gather, n, on).total]
    tail = next((n for n in range(2, 41) if all(m in less for m in range(n, 41))), None)
    assert crossing(way, gather, on, total) == Crossing(min(less, default=None), tail)


def test_fewer_bits_in_gather_move_the_crossing_up(monkeypatch):
    monkeypatch.setattr(limits, "MEMBERS_MAX", 72)
    fine, coarse = ground(), ground(payload_bytes={"int8": INT8, "q2": INT8 // 4})
    early = crossing(PUSH, GATHER, fine, total)
    late = crossing(PUSH, Way("gather", "q2"), coarse, total)
    assert early.first is not None
    assert late.first is not None
    assert early.first < late.first <= late.always


# -- against real nodes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [Way("gather", "ef(1)|q2"), PUSH, PAIRED], ids=lambda way: way.mode)
def test_real_nodes_send_what_is_counted(way):
    """Seven members in a world, references included. Timers decide how often small things are said again, and how much
    news goes into one message: control is near, bulk is right."""
    what = Rehearsal(way, 7, params=1 << 15, rounds=4, reference_rounds=2, local_s=2.0)
    found = measure(what)
    lengths = {way.codec: payload_length(way.codec, what.params)}
    item = count(way, 7, Ground(lengths, 4 * what.params, 2, found.round_s))
    assert found.bulk == pytest.approx(item.bulk + item.carried, rel=0.015)
    assert found.control == pytest.approx(item.said + item.beats, rel=0.2)
    assert found.total == pytest.approx(item.total, rel=0.05)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_crossovers_and_writes_a_report(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(limits, "MEMBERS_MAX", 24)
    common = ["bench", "wire", "--members", "4", "--members", "16", "--params", "2e5", "--plain"]
    assert main(common) == 0
    out = capsys.readouterr().out
    assert "push-sum, K = period, int8 sends less than gather, int8: from 4 members on" in out
    folder = tmp_path / "farflung-bench" / "wire"
    assert {path.name for path in folder.iterdir()} == {"wire.csv", "wire.json", "wire.png", "report.html"}
    with (folder / "wire.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert {row["members"] for row in rows} == {"4", "16"}
    assert main([*common, "--gather", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["way"] for row in found["rows"][:2]] == ["gather, int8", "push-sum, K = period, int8"]
    assert found["crossovers"][0]["bytes"]["always"] == 4
    assert float(rows[1]["total"]) == pytest.approx(found["rows"][0]["total"])


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (["--members", "1"], "members are 2 to"),
        (["--members", "300"], "members are 2 to"),
        (["--codec", "ef(1)|q2"], "keeps state"),
        (["--codec", "sign"], "bare signs"),
        (["--codec", "q3"], "no such stage"),
        (["--graph", "star"], "expected one of base"),
        (["--ticks", "65"], "ticks"),
        (["--fragments", "9"], "fragments"),
        (["--params", "0"], "--params"),
        (["--link", "fast"], "a rate is"),
        (["--latency-ms", "-1"], "latency"),
        (["--round-s", "0"], "round_s"),
        (["--reference-rounds", "0"], "reference_rounds"),
    ],
)
def test_what_no_run_could_do_is_refused(bad, why, capsys):
    assert main(["bench", "wire", *bad]) == 2
    err = capsys.readouterr().err
    assert err.startswith("farflung: ")
    assert why in err


def test_pairs_need_matchings():
    with pytest.raises(ConfigError, match="matchings"):
        count(PAIRS, 8, ground())


def test_words_and_figures():
    assert crossing_text(Crossing(24, 36)) == "from 36 members on, for some numbers already from 24"
    assert crossing_text(Crossing(4, 4)) == "from 4 members on"
    assert crossing_text(Crossing(6, None)) == "for some numbers of members from 6 on, not for all"
    assert crossing_text(Crossing(None, None)) == "never"
    assert [bytes_text(size) for size in (870.0, 31_400, 4.56e6, 1.2e9)] == ["870 B", "31.4 kB", "4.56 MB", "1.2 GB"]


def test_rows_say_everything_that_was_asked(monkeypatch):
    monkeypatch.setattr(limits, "MEMBERS_MAX", 8)
    ask = Ask(members=(4,), params=1 << 16, gather=("int8",), ticks=(0,), fragments=2)
    result = run_bench(ask)
    rows = [plain_row(item, ask) for item in result.counts]
    assert [row["way"] for row in rows] == ["gather, int8", "push-sum, K = period, int8", "pairs, K = 1, int8"]
    assert rows[1]["said"] > plain_row(count(PUSH, 4, result.ground), ask)["said"]  # notes of two fragments
    assert all(row["exchange_s"] > 0 for row in rows)
