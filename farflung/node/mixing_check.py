"""What a run in push-sum or pairs mode may ask for: defaults by mode, and refusals with their reasons."""

from __future__ import annotations

import re

from farflung.aggregation.graphs import parse_graph, partners_of, plan_round
from farflung.aggregation.outer import OuterOptimizer
from farflung.aggregation.registry import ParsedRule
from farflung.aggregation.weights import WeightPolicy
from farflung.compression.codec import Codec
from farflung.node.mixing_codec import PROBE, MixingCodec, cut, kept_share
from farflung.protocol.errors import ConfigError, LocalError
from farflung.protocol.mixing.settings import Mixing
from farflung.protocol.schema import Schema

MOMENTUM_MAX = 0.9
"""Of outer optimisers where a round is not exact."""

MATCHING_SIZES = (2, 3, 5, 8)
"""Numbers of members with which a graph for pairs is tried."""


def default_codec(mode: str) -> str:
    """Edges have copies instead of error feedback: 8 bits are as good as 32 there, 2 bits are not."""
    return "ef(1)|q2" if mode == "gather" else "int8"


def default_mixing(mode: str) -> Mixing:
    """A whole period of an exact graph for push-sum; one random matching a round for pairs."""
    return Mixing(graph="random-matching", ticks=1) if mode == "pairs" else Mixing()


def default_outer(mixing: Mixing | None) -> str:
    """Momentum amplifies what members differ by: less of it where a round does not bring them together.

    The latter was best of heavy-ball and Nesterov for K = 2, K = 1 and pairs among 16 members (docs/push-sum.md).
    """
    exact = mixing is None or (mixing.ticks == 0 and parse_graph(mixing.graph).exact(MATCHING_SIZES[-1] - 1))
    return "nesterov(lr=0.7,momentum=0.6)" if exact else "nesterov(lr=0.4,momentum=0.5)"


def check_mixing_run(
    mode: str,
    mixing: Mixing,
    codec: Codec,
    rule: ParsedRule,
    outer: OuterOptimizer,
    weights: WeightPolicy,
    liars: int,
    schema: Schema,
) -> None:
    """Raise ConfigError, with what to change, for what cannot work or is known to fail."""
    if liars or rule.f:
        why = (
            "no theory tells how sums that pass through liars could be trusted: take gather, or pairs"
            if mode == "push-sum"
            else "pairs always clip what a partner may move them by; leave liars and the rule out"
        )
        raise ConfigError(f"{mode} does not take liars: {why}")
    if rule.spec != "mean":
        raise ConfigError(f"a rule needs everybody's updates, and {mode} has sums of them; leave {rule.spec!r} out")
    _check_momentum(mixing, outer)
    codecs = MixingCodec(codec, cut(schema.numel, mixing.fragments))
    if mode == "pairs":
        _check_matchings(mixing)
        if weights.scale is not None:
            raise ConfigError(
                f"{weights.spec!r} believes claims, which one liar makes explode; with pairs take uniform"
            )
        if kept_share(codec) < 1 or codec.bits(PROBE) < 4:
            raise ConfigError(
                f"pairs exchange offsets without copies, so what {codec.spec!r} leaves out is pulled towards zero: "
                "take fp32, int8 or int4"
            )
        if mixing.gamma_percent != 100:
            raise ConfigError("gamma_percent is for push-sum: pairs exchange offsets, nothing flows")
        return
    if mixing.radius_percent != 100:
        raise ConfigError("radius_percent is for pairs: push-sum does not clip")
    gamma = mixing.gamma_percent / 100
    if not codecs.exact:
        codecs.flow(0, gamma, 1)
    elif gamma < 1:
        raise ConfigError("gamma_percent is for codecs that round; with fp32 whole shares travel")


def _check_momentum(mixing: Mixing, outer: OuterOptimizer) -> None:
    exact = mixing.ticks == 0 and parse_graph(mixing.graph).exact(MATCHING_SIZES[-1] - 1)
    found = re.search(r"momentum=([0-9.]+)", outer.spec)
    if not exact and found is not None and float(found[1]) >= MOMENTUM_MAX:
        raise ConfigError(
            f"{outer.spec} amplifies what an inexact exchange leaves members apart (measured: loss .800 with 0.9, .762 "
            f"with 0.5, where exact means give .748): take less than {MOMENTUM_MAX}, or ticks = 0"
        )


def _check_matchings(mixing: Mixing) -> None:
    graph = parse_graph(mixing.graph)
    for n in MATCHING_SIZES:
        try:
            for tick in plan_round(graph, n, mixing.ticks or graph.period(n), run_id=bytes(20), round_index=1):
                partners_of(tick)
        except LocalError as error:
            raise ConfigError(f"mixing: {error}, got {mixing.graph!r}") from None
