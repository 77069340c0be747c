"""What every part of a codec costs per core here: many codecs are timed, and the parts are fitted to them.

Used by service_costs.py. No preset is among the fitted codecs, so that presets test the sum of their parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farflung.compression import parse_codec
from farflung.protocol.schema import Schema, TensorSpec
from farflung.sim.codec_costs import Units, work_of

WINDOW = 1 << 16
SWEEPS = 4000
FLOOR_NS = 0.03
"""What costs less than this per parameter counts by its absolute error."""
FORMAT_COUNTS = 4
"""Formats by themselves are in everything else, and count as often."""

PLAIN = ("fp32", "bf16", "fp16", "natural")
BLOCKED = {
    "int8(block={})": (1024, 64),
    "int4(block={})": (128, 32),
    "int2(block={})": (128, 32),
    "q2(block={})": (512, 64),
    "e3m0(block={})": (512, 32),
    "nf4(block={})": (64, 512),
    "sign(block={})": (512, 32),
    "ternary(block={})": (512, 64),
    "qsgd(levels=1, block={})": (512, 64),
    "qsgd(levels=7, block={})": (512, 64),
    "qsgd(levels=127, block={})": (512, 64),
    "stat(bits=2, block={})": (1024, 64),
    "stat(bits=4, block={})": (4096, 256),
    "stat(bits=8, block={})": (16384, 4096),
}
VALUES = (*PLAIN, *(text.format(blocks[0]) for text, blocks in BLOCKED.items()))

FORMATS = (
    *PLAIN,
    *(text.format(block) for text, blocks in BLOCKED.items() for block in blocks),
    *(f"topk({64 if 'block=64' in value else 128}/4096)|{value}" for value in VALUES),
)

SPARSE = (
    *(
        f"topk({k}/{chunk})|{value}"
        for k, chunk in ((4, 4096), (1024, 4096), (64, 1024), (8, 64))
        for value in ("fp32", "q2(block=1024)")
    ),
    "topk(32/256)|bf16",
    "topk(256/4096)|ternary(block=512)",
    "randk(64/4096)|fp32",
    "randk(1024/4096)|fp32",
    "randk(64/256)|fp32",
    "randk(8/64)|bf16",
    "randk(256/4096)|q2",
    "global-topk(0.015625)|q2",
    "global-topk(0.1)|bf16",
    "global-topk(0.25)|int8",
    "global-topk(0.002)|fp32",
    "deadzone(1)|int8",
    "deadzone(1)|bf16",
    "cyclic(8)|q2",
    "cyclic(2)|int8",
    "cyclic(2)|topk(64/4096)|q2",
)

CODED = (
    *(
        f"{value}|ans"
        for value in ("int8", "int4(block=256)", "q2(block=64)", "sign(block=256)", "fp32", "bf16", "nf4(block=128)")
    ),
    *(
        f"topk({k}/4096)|{value}|{coder}"
        for k, value in ((64, "q2"), (512, "q2"), (64, "fp32"))
        for coder in ("rice", "elias-fano", "ans")
    ),
    "int8|rice",
    "int8|elias-fano",
)

WRAPPED = (
    *(
        "ef(1)|fp32",
        "ef(1)|int8",
        "ef(1)|topk(64/4096)|q2",
        "ef(1)|int8|ans",
        "ef(0.9)|topk(64/4096)|q2|rice",
        "ef(1)|tiles(64)|fp32",
    ),
    *("ef(1)|bf16", "ef(1)|q2", "ef(1)|nf4"),
    *("ef(1, bound=2)|topk(64/4096)|q2", "ef(1, bound=2)|int8"),
    *("dgc(0.9)|topk(64/4096)|fp32", "dgc(0.9)|topk(1024/4096)|bf16", "dgc(0.5, clip=1)|topk(64/4096)|q2"),
    *("ef21|topk(64/4096)|bf16", "ef21|q2", "lookahead(0.5)|ef(1)|q2"),
    *("rules(1d=fp32, else=int8)", "rules(1d=fp32, else=topk(64/4096)|q2)", "rules(1d=fp32, else=topk(512/4096)|q2)"),
    *("mix(q2, topk(16/4096)|bf16)", "mix(int8, int8)", "mix(topk(32/4096)|q2, topk(16/4096)|q2)"),
    *("mix(topk(512/4096)|q2, topk(16/4096)|q2)", "adapt(int8, int4)", "adapt(int8(block=1024), int8(block=2048))"),
)

TRANSFORMED = (
    *("tiles(64)|fp32", "tiles(16)|int8", "tiles(64)|topk(64/4096)|q2", "tiles(64)|topk(512/4096)|q2"),
    *("dct(64)|fp32", "dct(32)|fp32", "dct(8)|int8", "dct(64)|topk(64/4096)|q2"),
    *("rotate(block=4096)|fp32", "rotate(block=64)|fp32", "rotate(block=1024)|q2", "dct(16)|fp32", "ef(1)|rotate|q2"),
    *("sketch(rows=5, cols=512)|fp32", "sketch(rows=3, cols=512)|fp32", "sketch(rows=1, cols=512)|int8"),
    *("sketch(rows=3, cols=256, chunk=4096, keep=16)|int8",),
    *(f"lowrank({rank}{basis})|fp32" for rank in (1, 2, 8, 32) for basis in ("", ", shared")),
    "lowrank(4)|int8",
)

FITTED = tuple(dict.fromkeys((*FORMATS, *SPARSE, *CODED, *WRAPPED, *TRANSFORMED)))


def least_ns(work: Callable[[], object], units: float, repeats: int) -> float:
    """The fastest of several runs, per unit, in this thread's CPU time: other processes only ever add."""
    work()  # compiles, and touches the memory
    best = float("inf")
    for _ in range(repeats):
        began = time.thread_time()
        work()
        best = min(best, time.thread_time() - began)
    return 1e9 * best / units


def schema_for(d: int) -> Schema:
    """One matrix, about square."""
    columns = 1 << (d.bit_length() // 2)
    return Schema((TensorSpec("weight", (d // columns, columns), "float32"),))


def codec_ns(spec: str, update_d: Tensor, repeats: int) -> dict[str, float]:
    """Encode, decode all windows, check, and move a shared state: nanoseconds per coordinate."""
    codec, d = parse_codec(spec), len(update_d)
    schema = schema_for(d)
    private, shared = codec.init(schema)
    held: list[Any] = [private, b""]

    def encode() -> None:
        held[1], held[0] = codec.encode(update_d, held[0], shared, 1)
        codec.ahead(held[0])

    def decode() -> None:
        read = codec.open(held[1], schema, shared, 1)
        for start in range(0, d, WINDOW):
            read(start, min(start + WINDOW, d))

    steps: dict[str, Callable[[], object]] = {
        "encode": encode,
        "decode": decode,
        "check": lambda: codec.check(held[1], schema, shared, 1),
    }
    if codec.shared_tensors(shared):
        steps["advance"] = lambda: codec.advance(shared, update_d, 1)
    return {name: least_ns(work, d, repeats) for name, work in steps.items()}


def parts_ns(update_d: Tensor, repeats: int, told: Callable[[str], object]) -> dict[str, float]:
    """Every row of the table that codecs need, in nanoseconds."""
    asked: list[Units] = []
    found: list[float] = []
    schema = schema_for(len(update_d))
    for spec in FITTED:
        told(spec)
        work = work_of(spec, schema)
        for name, here in codec_ns(spec, update_d, repeats).items():
            times = FORMAT_COUNTS if spec in FORMATS else 1
            asked += [getattr(work, name)] * times
            found += [here] * times
    return fit(asked, found)


def fit(asked: Sequence[Units], found: Sequence[float]) -> dict[str, float]:
    """Costs, none below 0, whose sums are closest to what was found, each measure by its relative error."""
    rows = sorted({row for units in asked for row in units})
    share_mr = np.array([[units.get(row, 0.0) for row in rows] for units in asked])
    weight_m = 1 / np.maximum(np.array(found), FLOOR_NS)
    share_mr *= weight_m[:, None]
    scale_r = np.linalg.norm(share_mr, axis=0)
    cost_r = _least_squares(share_mr / scale_r, weight_m * np.array(found)) / scale_r
    return dict(zip(rows, cost_r.tolist(), strict=True))


def _least_squares(share_mr: NDArray[np.float64], goal_m: NDArray[np.float64]) -> NDArray[np.float64]:
    """The non-negative x of the least ||share x - goal||, one coordinate after the other; columns have length 1."""
    square_rr, pull_r = share_mr.T @ share_mr, share_mr.T @ goal_m
    x_r = np.zeros(share_mr.shape[1])
    for _ in range(SWEEPS):
        for r in range(len(x_r)):
            x_r[r] = max(0.0, x_r[r] + pull_r[r] - square_rr[r] @ x_r)
    return x_r


def normal_update(d: int, seed: int) -> Tensor:
    """An update to encode: normal numbers of a usual size."""
    return torch.randn(d, generator=torch.Generator().manual_seed(seed)) * 1e-3
