"""`farflung bench wire`: which ways of exchanging, for how many members, on which line; where one overtakes another."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from farflung.aggregation.flow import GAMMA_SPARSE_MAX
from farflung.aggregation.outer import parse_outer
from farflung.compression import parse_codec
from farflung.node.mixing_codec import MixingCodec, cut
from farflung.protocol import limits
from farflung.protocol.errors import ConfigError
from farflung.protocol.rows import Reason, Verdict
from farflung.protocol.schema import Schema, TensorSpec
from farflung.sim.bench import wire_sizes as sizes
from farflung.sim.bench.updates import SIDE, make_updates
from farflung.sim.bench.wire_count import Count, Crossing, Ground, Way, count_all, crossing

FORMAT = 1
"""Of the JSON file."""

ENCODED_MAX = 1 << 22
"""Up to so many parameters payloads are made and measured; beyond, the codec's promise is taken."""

MEMBERS = (4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Ask:
    """What to count. Raises ConfigError for what no run could do, before anything is counted."""

    members: tuple[int, ...] = MEMBERS
    params: int = 1 << 20
    gather: tuple[str, ...] = ("ef(1)|q2", "int8")
    """Codecs of gather."""
    mixing: str = "int8"
    """The codec of push-sum and pairs."""
    graph: str = "base(k=1)"
    """Of push-sum."""
    ticks: tuple[int, ...] = (0, 2)
    """Of push-sum; 0: a period."""
    outer: str = "nesterov(lr=0.7,momentum=0.6)"
    """What it keeps is part of a reference."""
    reference_rounds: int = 20
    """How often it is published."""
    fragments: int = 1
    up_bps: float = 10e6
    down_bps: float = 100e6
    latency_s: float = 0.02
    """One way."""
    round_s: float = 30.0
    """How long a round lasts, training included."""

    def __post_init__(self) -> None:
        bad = [n for n in self.members if not 2 <= n <= limits.MEMBERS_MAX]
        if bad or not self.members:
            raise ConfigError(f"members are 2 to {limits.MEMBERS_MAX}, got {bad or 'none'}")
        for name in ("up_bps", "down_bps", "params", "reference_rounds", "round_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.latency_s < math.inf:
            raise ConfigError(f"a latency is not negative, got {self.latency_s}")
        for spec in self.gather:
            parse_codec(spec)
        parse_outer(self.outer)
        check_mixing(self)
        self.ways()

    def ways(self) -> list[Way]:
        """What is compared, gather first."""
        pushed = [Way("push-sum", self.mixing, self.graph, ticks, self.fragments) for ticks in self.ticks]
        paired = Way("pairs", self.mixing, "random-matching", 1, self.fragments)
        return [*(Way("gather", spec) for spec in self.gather), *pushed, paired]


class Overtaking(NamedTuple):
    """Where one way overtakes another, in bytes and in seconds on the line."""

    mixing: Way
    gather: Way
    bytes: Crossing
    seconds: Crossing


class Result(NamedTuple):
    """Everything that was counted."""

    ground: Ground
    counts: list[Count]
    overtakings: list[Overtaking]


def check_mixing(ask: Ask) -> None:
    """Raise ConfigError for a codec that members who mix cannot use, whatever γ, or a model too small for fragments."""
    codec = MixingCodec(parse_codec(ask.mixing), cut(ask.params, ask.fragments))
    if not codec.exact:
        codec.flow(0, GAMMA_SPARSE_MAX, sizes.ROUND)


def run_bench(ask: Ask) -> Result:
    """Count all of it. Costs an encoding per codec, and plans of graphs."""
    lengths = {spec: payload_length(spec, ask.params) for spec in dict.fromkeys((*ask.gather, ask.mixing))}
    state_bytes = 4 * ask.params * (1 + len(parse_outer(ask.outer).state_names))
    ground, ways = Ground(lengths, state_bytes, ask.reference_rounds, ask.round_s), ask.ways()
    gathers, mixings = [way for way in ways if not way.mixes], [way for way in ways if way.mixes]
    line = (ask.up_bps, ask.down_bps, ask.latency_s)
    overtakings = [
        Overtaking(
            mixing,
            gather,
            crossing(mixing, gather, ground, lambda item: item.total),
            crossing(mixing, gather, ground, lambda item: item.wire_s(*line)),
        )
        for mixing in mixings
        for gather in gathers
    ]
    return Result(ground, count_all(ways, ask.members, ground), overtakings)


def payload_length(spec: str, params: int) -> int:
    """Bytes of the payload of so many parameters: of the second of two normal updates, or, beyond ENCODED_MAX, what
    the codec promises not to exceed."""
    codec = parse_codec(spec)
    if params > ENCODED_MAX:
        schema = Schema((TensorSpec("matrix", (-(-params // SIDE), SIDE), "float32"),))
        return math.ceil(codec.bits(schema) * params / 8)
    updates = make_updates("gauss", params + SIDE)  # whole rows of them, to be cut
    shape = (params,) if params % SIDE else (params // SIDE, SIDE)
    schema = Schema((TensorSpec("matrix", shape, "float32"),))
    private, shared = codec.init(schema)
    payload = b""
    for round_index, update_d in enumerate(updates.update_rd):
        payload, private = codec.encode(update_d[:params].contiguous(), private, shared, round_index)
        private = codec.observe(private, Verdict(1.0, Reason.KEPT))
    return len(payload)


def plain_row(item: Count, ask: Ask) -> dict[str, Any]:
    """A count as plain data."""
    plain = asdict(item) | {"way": item.way.label, "control": item.control, "bulk": item.bulk, "total": item.total}
    return plain | {"exchange_s": item.wire_s(ask.up_bps, ask.down_bps, ask.latency_s)}


def to_json(result: Result, ask: Ask) -> dict[str, Any]:
    """The whole result as plain data."""
    return {
        "format": FORMAT,
        "ask": asdict(ask),
        "payload_bytes": dict(result.ground.payload_bytes),
        "rows": [plain_row(item, ask) for item in result.counts],
        "crossovers": [
            {
                "mixing": item.mixing.label,
                "gather": item.gather.label,
                "bytes": item.bytes._asdict(),
                "seconds": item.seconds._asdict(),
            }
            for item in result.overtakings
        ],
    }
