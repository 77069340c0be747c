"""No buffer is read before its event, or after it was handed over (I-19): NaN is put where nobody may look.

Memory that is allocated and not yet written is NaN from the start; what was lent is NaN as soon as it is given back.
Every story is told once plainly and once poisoned, and ends with the same bytes; a planted early read does not.
"""

import numpy as np
import pytest
import torch

from farflung.aggregation import pairs, persistent, push_sum
from farflung.aggregation.flow import Flow, FlowCodec, InEdge, OutEdge, send_flows
from farflung.aggregation.graphs import parse_graph, plan_round
from farflung.aggregation.kernels import mass as kernels
from farflung.aggregation.mass import Mass
from farflung.aggregation.outer import parse_outer
from farflung.aggregation.registry import parse_rule
from farflung.aggregation.rows import dense_rows
from farflung.aggregation.rule import Context
from farflung.aggregation.windows import WINDOW
from farflung.protocol.errors import PeerError

N, D = 5, WINDOW + 3
TYPES = [torch.float32, torch.float64]


@pytest.fixture
def dirty_memory(monkeypatch):
    """Whatever is allocated without being filled holds NaN."""

    def dirty(make):
        def made(*args, **settings):
            out = make(*args, **settings)
            if isinstance(out, np.ndarray):
                return np.full_like(out, np.nan) if out.dtype.kind == "f" else out
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return made

    for module, names in ((torch, ("empty", "empty_like")), (np, ("empty", "empty_like"))):
        for name in names:
            monkeypatch.setattr(module, name, dirty(getattr(module, name)))
    assert torch.empty(3).isnan().all()
    assert np.isnan(np.empty(3)).all()


class Spoiler:
    """Fills what it is given with NaN, if it is told to."""

    def __init__(self, poisons, early=False):
        self.poisons, self.early = poisons, early

    def __call__(self, *vectors):
        """These were handed over or given back: nobody may read them any more."""
        for vector_d in vectors if self.poisons else ():
            vector_d.fill_(torch.nan)

    def too_early(self, *vectors):
        """The planted bug: these are still to be read."""
        for vector_d in vectors if self.early else ():
            vector_d[-1] = torch.nan


def vectors(seed, dtype, n=N):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plan_of(spec, ticks=None):
    graph = parse_graph(spec)
    return plan_round(graph, N, ticks or graph.period(N), run_id=b"run", round_index=0)


def tell_push_sum(spoil, dtype):
    """A round on base(k=2), parts a tick late and some come home; φ, parts and θ are spoilt when they were taken."""
    phi_nd, theta_nd, ref_d, plan = vectors(1, dtype), vectors(2, dtype), vectors(3, dtype, 1)[0], plan_of("base(k=2)")
    rounds = []
    for i in range(N):
        rounds.append(push_sum.begin(i, plan, phi_nd[i], ref_d, [1.0 + i], threads=2))
        spoil(phi_nd[i])
    late = []
    for _ in plan:
        posted = [(i, to, parts) for i, member in enumerate(rounds) for to, parts in member.send().items()]
        on_time, now_late = posted[::2], posted[1::2]
        for i, to, parts in [*late, *on_time]:
            lent = [part.numerator_d for part in parts]
            spoil.too_early(*lent)
            rounds[i if to == 0 else to].receive(parts)  # what is for member 0 comes home
            spoil(*lent)
        late = now_late
    for i, to, parts in late:
        rounds[i if to == 0 else to].receive(parts)
    out = []
    for i, member in enumerate(rounds):
        out.append(member.finish(theta_nd[i], ref_d))
        handed = member.leave()
        spoil(theta_nd[i], *(mass.numerator_d for mass in handed))
    return out


def tell_pairs(spoil, dtype):
    """Three meetings each; what the partner said is spoilt after the meeting."""
    phi_nd, zero_d = vectors(4, dtype), torch.zeros(D, dtype=dtype)
    rounds = []
    for i in range(N):
        rounds.append(pairs.begin(phi_nd[i], zero_d, 1.0, pairs.Radius(0.5), threads=2))
        spoil(phi_nd[i])
    for mixing in plan_of("random-matching", 3):
        said = [(member.offer(), member.z_d.clone()) for member in rounds]
        for i, column in enumerate(mixing):
            for share in column.sends:
                offer, z_d = said[share.to]
                spoil.too_early(z_d)
                rounds[i].meet(offer, z_d, peer=str(share.to), mine=said[i][0])
                spoil(z_d)
    return [member.finish(vectors(5, dtype)[i], zero_d) for i, member in enumerate(rounds)]


def tell_flows(spoil, dtype):
    """Four ticks of an int8-like codec on a ring, some messages come home; what a codec lent or got is spoilt."""
    lent = []

    def encode(vector_d):
        payload = (vector_d.double() * 16).round().numpy().tobytes()
        lent.append(vector_d)
        return payload

    def decode(payload):
        spoil(*lent)
        lent.clear()
        decoded_d = torch.from_numpy(np.frombuffer(payload).copy()).div(16).to(dtype)
        spoil.too_early(decoded_d)
        lent.append(decoded_d)
        return decoded_d

    flow, plan, zero_d = Flow(FlowCodec("sixteenths", encode, decode, 1.0, 8)), plan_of("ring", 4), torch.zeros(D)
    masses = [Mass.started(phi_d, torch.zeros_like(phi_d), 1.0, threads=2) for phi_d in vectors(6, dtype)]
    edges = {
        (i, share.to): (OutEdge(flow, zero_d.to(dtype)), InEdge(flow, zero_d.to(dtype)))
        for i, column in enumerate(plan[0])
        for share in column.sends
    }
    for tick, mixing in enumerate(plan):
        for i, column in enumerate(mixing):
            mine = {share.to: edges[i, share.to][0] for share in column.sends}
            for to, message in send_flows(masses[i], column.sends, mine).items():
                out, into = edges[i, to]
                if (i + to + tick) % 3 == 0:
                    out.returned(masses[i])
                    continue
                into.receive(masses[to], message, weight_max=10.0, peer=str(i))
                out.settled()
    return [mass.ratio() for mass in masses]


def tell_gather(spoil, dtype):
    """Three rounds of the mean and Nesterov into fresh memory; rows, updates and old states are spoilt when used."""
    rule, outer = parse_rule("mean").rule, parse_outer("nesterov(lr=0.7,momentum=0.9)")
    theta_d, state = vectors(7, dtype, 1)[0], (torch.zeros(D),)
    for round_index in range(1, 4):
        row_nd = vectors(10 + round_index, dtype)
        spoil.too_early(row_nd[2])
        context = Context(round_index, out_d=torch.empty(D), threads=2)
        update_d = rule(dense_rows(row_nd), torch.arange(1.0, N + 1).double(), f=0, context=context).update_d
        spoil(row_nd)
        next_d, kept = torch.empty(D), (torch.empty(D),)
        outer.step(theta_d, state, update_d, theta_out_d=next_d, state_out=kept, trained=round_index, threads=2)
        spoil(theta_d, *state, update_d)
        theta_d, state = next_d, kept
    return [theta_d, *state]


def tell_persistent(spoil, dtype):
    """Four ticks with a step before each; Δ, models and shares are spoilt when they were taken."""
    rule, theta_nd, members = persistent.parse_persistent("nesterov(lr=0.7,momentum=0.5)"), vectors(8, dtype), []
    for i, theta_d in enumerate(theta_nd):
        members.append(persistent.begin(theta_d, rule, weight=1.0 + i % 2, threads=2))
        spoil(theta_d)
    for tick, mixing in enumerate(plan_of("ring", 4)):
        for member, delta_d in zip(members, vectors(20 + tick, dtype), strict=True):
            z_d = member.model()
            member.update(delta_d)
            spoil(delta_d, z_d)
        posted = [member.send(mixing[i].sends) for i, member in enumerate(members)]
        for i, shares in enumerate(posted):
            for to, mass in shares.items():
                lent_d = mass.numerator_d
                spoil.too_early(lent_d)
                members[i if (i + to + tick) % 4 == 0 else to].receive(mass)
                spoil(lent_d)
    return [member.model() for member in members]


STORIES = [
    *((tell, dtype) for tell in (tell_push_sum, tell_pairs, tell_flows, tell_persistent) for dtype in TYPES),
    (tell_gather, torch.float32),
]


def ids(value):
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("tell", "dtype"), STORIES, ids=ids)
def test_what_is_not_there_yet_or_any_more_is_never_read(tell, dtype, dirty_memory):
    plain, poisoned = tell(Spoiler(False), dtype), tell(Spoiler(True), dtype)
    assert all(vector_d.isfinite().all() for vector_d in plain)
    assert [vector_d.numpy().tobytes() for vector_d in poisoned] == [vector_d.numpy().tobytes() for vector_d in plain]


def test_memory_that_nobody_wrote_shows(dirty_memory, monkeypatch):
    monkeypatch.setattr(kernels, "divide", lambda out_w, s_w, weight: None)
    assert Mass(torch.ones(3), 1.0).ratio().isnan().all()


def outcome(tell, dtype, early):
    """The bytes at the end; None if somebody refused a message."""
    try:
        return [vector_d.numpy().tobytes() for vector_d in tell(Spoiler(False, early), dtype)]
    except PeerError:
        return None


@pytest.mark.parametrize(("tell", "dtype"), STORIES, ids=ids)
def test_a_number_that_is_spoilt_while_it_is_still_needed_is_noticed(tell, dtype):
    """Push-sum ends elsewhere, the mean leaves the row out; pairs and flows refuse what is no number."""
    spoilt = outcome(tell, dtype, True)
    assert spoilt != outcome(tell, dtype, False)
    assert (spoilt is None) == (tell in (tell_pairs, tell_flows))
