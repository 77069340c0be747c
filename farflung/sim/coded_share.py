"""How far payloads stay below a codec's worst case where the schema does not tell: tried on a sample."""

from __future__ import annotations

from functools import cache

import torch

from farflung.compression import parse_codec
from farflung.compression.guards import has_stage
from farflung.protocol.schema import Schema, TensorSpec

VARYING = ("rice", "elias-fano", "ans", "warmup")
"""Stages whose payloads are shorter than their worst case."""

ROUND = 10**6
"""Warm-up is over by then."""

SAMPLE = Schema((TensorSpec("sample", (1024, 1024), "float32"),))
"""One matrix of 16 sections of a coded payload."""


@cache
def coded_share(spec: str) -> float:
    """Length of a payload of normal numbers over the codec's worst case; 1 where the worst case is the only one.

    The first update of a fresh member, after any warm-up; the same numbers every time. Encoding 4 MiB takes some
    milliseconds, and importing the compiled kernels a second, once for every process and codec.
    """
    codec = parse_codec(spec)
    if not any(has_stage(codec, name) for name in VARYING):
        return 1.0
    update_d = torch.randn(SAMPLE.numel, generator=torch.Generator().manual_seed(0)) * 1e-3
    private, shared = codec.init(SAMPLE)
    payload, _ = codec.encode(update_d, private, shared, ROUND)
    return 8 * len(payload) / (codec.bits(SAMPLE) * SAMPLE.numel)
