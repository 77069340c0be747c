"""Forms of exchange as a closed loop needs them: everybody's parameters of a round in, everybody's gradients out.

All of them are the algebra that nodes use (`aggregation.push_sum`, `pairs`, `flow`, `mean`), in memory. Vectors are of
the masses' types, fp32 or fp64; gather takes fp32 only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from farflung.aggregation import pairs
from farflung.aggregation.flow import Flow, FlowCodec, InEdge, OutEdge, send_flows
from farflung.aggregation.graphs import Mixing, parse_graph, plan_round
from farflung.aggregation.mass import Mass, add_sums, mass_error
from farflung.aggregation.push_sum import PushSumRound, begin, mix_all
from farflung.aggregation.registry import parse_rule
from farflung.aggregation.rows import MemoryRows
from farflung.aggregation.rule import Context
from farflung.aggregation.weights import Claim, parse_weights
from farflung.compression import parse_codec
from farflung.node.data import generator_of
from farflung.protocol.errors import LocalError
from farflung.protocol.rows import DenseRow
from farflung.protocol.schema import Schema
from farflung.sim.bench.mixing_liars import Round, parse_lying
from farflung.sim.bench.mixing_setting import Accelerated, Gather, MixSetting, Pairs, Persistent, PushSum

RADIUS_NONE = 1e300
"""A radius that clips nothing, in usual distances."""


class Mixed(NamedTuple):
    """What an exchange gave."""

    gradient_nd: Tensor
    """Everybody's pseudo-gradient, for its own outer step from θ_i."""

    mass_error: float = 0.0
    """By how much mass was made or lost (`mass.mass_error`); 0 where there is none."""


Step = Callable[[Round, Sequence[Claim]], Mixed]
"""One round's exchange. What it remembers from round to round is its own."""


def make_exchange(setting: MixSetting, schema: Schema) -> Step:
    """The exchange of a run of models of this schema."""
    match setting.exchange:
        case Gather():
            return _gather(setting.exchange)
        case PushSum():
            return _push_sum(setting, setting.exchange, schema)
        case Accelerated():
            return _push_sum(setting, setting.exchange.mixing, schema)
        case Pairs():
            return _pairs(setting, setting.exchange)
        case Persistent():
            raise LocalError("persistent mass takes its steps itself: it has no gradients")


def scaled_ends(found: Round, scale_n: Sequence[float] | None) -> Tensor:
    """φ'_i = θ_i − c_i (θ_i − φ_i) [n, d]: what members mix under a policy that scales rows (FedNova: c = τ̄ / τ_i).

    Only the member's own progress is scaled, not its distance from the others: with it θ_i − mean(φ') would pull less
    or more towards the swarm. τ̄ is known to all before they mix, from the certified claims. In gather, where all θ_i
    are one, the mean of φ' is θ less the mean of the scaled rows: the same thing. One rounding, to the type of φ.
    """
    if scale_n is None:
        return found.phi_nd
    scale_n1 = torch.tensor(scale_n, dtype=torch.float64)[:, None]
    theta_nd = found.theta_nd.double()
    return (theta_nd - scale_n1 * (theta_nd - found.phi_nd)).to(found.phi_nd.dtype)


def _gather(exchange: Gather) -> Step:
    policy, rule = parse_weights(exchange.weights), parse_rule("mean")

    def step(found: Round, claims: Sequence[Claim]) -> Mixed:
        rows = MemoryRows(tuple(DenseRow(delta_d) for delta_d in found.theta_nd - found.phi_nd))
        scale_n = policy.scale(claims) if policy.scale else None
        context = Context(found.number, scale_n=scale_n)
        update_d = rule.rule(rows, policy.weigh(claims), f=rule.f, context=context).update_d
        return Mixed(update_d.expand(len(found.theta_nd), -1).contiguous())

    return step


def _push_sum(setting: MixSetting, exchange: PushSum, schema: Schema) -> Step:
    graph, policy = parse_graph(exchange.graph), parse_weights(exchange.weights)
    flow = Flow(flow_codec(exchange.flow, schema)) if exchange.flow else None

    def step(found: Round, claims: Sequence[Claim]) -> Mixed:
        plan = plan_round(graph, len(claims), setting.ticks, run_id=setting.run_id, round_index=found.number)
        ends_nd = scaled_ends(found, policy.scale(claims) if policy.scale else None)
        weights = policy.weigh(claims).tolist()
        rounds = [begin(i, plan, ends_nd[i], found.theta_ref_d, [weight]) for i, weight in enumerate(weights)]
        lost = lost_messages(setting, exchange.loss, found.number)
        before = add_sums(member.sums() for member in rounds)
        if flow is None:
            mix_all(rounds, fate=lambda t, i, j: () if lost[t, i, j] else (0,), ledger=exchange.ledger)
        else:
            mix_flows([member.masses[0] for member in rounds], plan, flow, lost)
        error = mass_error(before, add_sums(member.sums() for member in rounds))
        return Mixed(_gradients(rounds, found), error)

    return step


def mix_flows(masses: Sequence[Mass], plan: Sequence[Mixing], flow: Flow, lost: Any) -> None:
    """A round in flow form, in place. Copies start at zero; a lost message's flow is undone at its sender.

    `lost` is a boolean array by tick, sender and receiver.
    """
    weight_max, n = sum(mass.weight for mass in masses), len(masses)
    zero_d = torch.zeros_like(masses[0].numerator_d)
    out_nn = [{j: OutEdge(flow, zero_d) for j in range(n)} for _ in range(n)]
    in_nn = [{i: InEdge(flow, zero_d) for i in range(n)} for _ in range(n)]
    for tick, mixing in enumerate(plan):
        sent = [send_flows(masses[i], mixing[i].sends, out_nn[i]) for i in range(n)]
        for i, messages in enumerate(sent):
            for j, message in messages.items():
                if lost[tick, i, j]:
                    out_nn[i][j].returned(masses[i])
                else:
                    in_nn[j][i].receive(masses[j], message, weight_max=weight_max, peer=str(i))
                    out_nn[i][j].settled()


def flow_codec(spec: str, schema: Schema) -> FlowCodec:
    """A dense codec of `compression` for the edges of push-sum over whole fp32 vectors. Keeps nothing itself."""
    codec = parse_codec(spec)
    shared = codec.init(schema)[1]

    def encode(vector_d: Tensor) -> bytes:
        return codec.encode(vector_d, codec.init(schema)[0], shared, 0)[0]

    def decode(payload: bytes) -> Tensor:
        row = codec.decode(payload, schema, shared, 0, 0, schema.numel)
        assert isinstance(row, DenseRow), codec.spec
        value_d: Tensor = row.value_d
        return value_d

    return FlowCodec(codec.spec, encode, decode, 1.0, codec.bits(schema))


def _pairs(setting: MixSetting, exchange: Pairs) -> Step:
    graph = parse_graph(exchange.graph)
    lying = parse_lying(exchange.attack) if exchange.attack else None
    scale = RADIUS_NONE if exchange.radius is None else exchange.radius
    radius_n = [pairs.Radius(scale) for _ in range(setting.members)]
    memory: dict[str, Any] = {}

    def step(found: Round, claims: Sequence[Claim]) -> Mixed:
        plan = plan_round(graph, len(claims), setting.ticks, run_id=setting.run_id, round_index=found.number)
        rounds = [
            pairs.begin(phi_d, found.theta_ref_d, 1.0, radius)
            for phi_d, radius in zip(found.phi_nd, radius_n, strict=True)
        ]
        lost = lost_messages(setting, exchange.loss, found.number)
        lie = lying.lies(found, rounds, setting.liars, memory) if lying else pairs.honest
        pairs.mix_pairs(rounds, plan, lie=lie, arrives=lambda t, i, j: not lost[t, i, j])
        radius_n[:] = [member.radius for member in rounds]
        return Mixed(_gradients(rounds, found))

    return step


def lost_messages(setting: MixSetting, loss: float, index: int) -> Any:
    """Which messages of a round are lost: booleans by tick, sender and receiver. The same for all forms of exchange."""
    rng = generator_of("mixing loss", setting.seed, index)
    return rng.random((setting.ticks, setting.members, setting.members), dtype=np.float64) < loss


def _gradients(rounds: Sequence[PushSumRound] | Sequence[pairs.PairRound], found: Round) -> Tensor:
    return torch.stack([rounds[i].finish(theta_d, found.theta_ref_d) for i, theta_d in enumerate(found.theta_nd)])
