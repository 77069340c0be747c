"""Codecs where members mix: a payload is one fragment of a numerator, of a change to a copy, or of an offset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from farflung.aggregation.flow import Flow, FlowCodec
from farflung.compression.codec import Codec
from farflung.compression.guards import keeps_state, shares_state
from farflung.protocol.errors import ConfigError
from farflung.protocol.limits import PAYLOAD_OVERHEAD_BYTES
from farflung.protocol.rows import DenseRow
from farflung.protocol.schema import Schema, TensorSpec

EXACT = "fp32"
"""The codec that rounds nothing: whole numerators travel, and edges need no copies."""

ALIGN = 1 << 14
"""Fragments end at multiples of this, so that codecs' blocks and threads' windows are not cut."""


PROBE = Schema((TensorSpec("probe", (1 << 14,), "float32"),))
"""Large enough that headers do not count."""


def cut(d: int, fragments: int) -> tuple[slice, ...]:
    """Equal parts of a vector, in order. Raises ConfigError if it is too short for so many."""
    step = -(-d // (fragments * ALIGN)) * ALIGN
    ends = [min(step * (part + 1), d) for part in range(fragments)]
    parts = tuple(slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False))
    if any(part.start >= part.stop for part in parts):
        raise ConfigError(f"{d} parameters cannot be cut into {fragments} fragments of at least {ALIGN}")
    return parts


@dataclass(frozen=True)
class MixingCodec:
    """A codec of the run applied to fragments. Raises ConfigError for codecs that keep state of their own."""

    codec: Codec
    parts: tuple[slice, ...]

    def __post_init__(self) -> None:
        if keeps_state(self.codec) or shares_state(self.codec):
            raise ConfigError(
                f"{self.codec.spec!r} keeps state from round to round, and what members mix is another sum in every "
                "tick: edges have copies instead of error feedback. Take fp32, int8 or int4"
            )

    @property
    def exact(self) -> bool:
        """Whether whole numerators travel."""
        return self.codec.spec == EXACT

    def schema(self, part: int) -> Schema:
        """Of one fragment."""
        at = self.parts[part]
        return Schema((TensorSpec("fragment", (at.stop - at.start,), "float32"),))

    def bytes_max(self, part: int) -> int:
        """No payload of this fragment is larger."""
        schema = self.schema(part)
        return int(self.codec.bits(schema) * schema.numel / 8) + PAYLOAD_OVERHEAD_BYTES

    def encode(self, part: int, vector_d: Tensor, round_index: int) -> bytes:
        """A payload. Raises LocalError if the vector is not finite."""
        private, shared = self.codec.init(self.schema(part))
        payload, _ = self.codec.encode(vector_d, private, shared, round_index)
        return payload

    def decode(self, part: int, payload: bytes, round_index: int) -> Tensor:
        """The vector [d of the fragment]. Raises PeerError unless it is canonical, finite and within bounds."""
        schema = self.schema(part)
        _, shared = self.codec.init(schema)
        self.codec.check(payload, schema, shared, round_index)
        row = self.codec.open(payload, schema, shared, round_index)(0, schema.numel)
        if isinstance(row, DenseRow):
            whole_d: Tensor = row.value_d.clone()
            return whole_d
        return torch.zeros(schema.numel).index_put_((row.index_k.long(),), row.value_k)

    def flow(self, part: int, gamma: float, round_index: int) -> Flow:
        """How mass flows along edges with this codec. Raises ConfigError for what is known not to settle."""
        return flow_of(
            self.codec,
            gamma,
            lambda vector_d: self.encode(part, vector_d, round_index),
            lambda payload: self.decode(part, payload, round_index),
        )


def flow_of(codec: Codec, gamma: float, encode: Callable[[Tensor], bytes], decode: Callable[[bytes], Tensor]) -> Flow:
    """The flow rule of a codec: what it keeps and how finely is measured on a small ramp."""
    kept = kept_share(codec)
    bits = codec.bits(PROBE) / kept
    signs = "sign" in codec.spec
    return Flow(FlowCodec(codec.spec, encode, decode, kept, 1.0 if signs else max(1.0, float(int(bits)))), gamma)


def kept_share(codec: Codec) -> float:
    """Of the coordinates, how many a payload carries: 1 for dense codecs."""
    private, shared = codec.init(PROBE)
    ramp_d = torch.linspace(-1.0, 1.0, PROBE.numel)
    payload, _ = codec.encode(ramp_d, private, shared, 1)
    row = codec.open(payload, PROBE, shared, 1)(0, PROBE.numel)
    return 1.0 if isinstance(row, DenseRow) else max(1, len(row.index_k)) / PROBE.numel
