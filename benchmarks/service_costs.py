"""What compressing, checking, combining and hashing cost per core here, beside the table that the simulator charges.

python benchmarks/service_costs.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from report import arguments, noise, publish
from torch import Tensor

from farflung.aggregation.network import median_network
from farflung.aggregation.outer import momentum_gain, norm, parse_outer
from farflung.aggregation.registry import parse_rule
from farflung.aggregation.rule import Context
from farflung.compression.parse import parse_codec
from farflung.protocol.blob import chunk_digest
from farflung.protocol.rows import DenseRow, SparseRow
from farflung.protocol.schema import Schema, TensorSpec
from farflung.sim.service_costs import NANOSECONDS, ServiceCosts

WINDOW = 1 << 16
KEPT = ((16, 4096), (256, 4096), (64, 1024), (16, 256), (64, 256))
STRIDE = 16
"""One coordinate of so many in the sparse rows that the mean adds."""


class Held:
    """Rows that are there already, so that only the rule is timed."""

    def __init__(self, rows: Sequence[Any], d: int) -> None:
        self._rows, self.n, self.d = rows, len(rows), d

    def window(self, start: int, stop: int) -> tuple[Any, ...]:
        return tuple(self._cut(row, start, stop) for row in self._rows)

    def _cut(self, row: Any, start: int, stop: int) -> Any:
        if isinstance(row, DenseRow):
            return DenseRow(row.value_d[start:stop])
        per = len(row.index_k) // (self.d // WINDOW)
        part = slice(start // WINDOW * per, stop // WINDOW * per)
        return SparseRow(stop - start, row.index_k[part] - start, row.value_k[part])


def least_ns(work: Callable[[], object], units: float, repeats: int) -> float:
    """The fastest of several runs, per unit, in this thread's CPU time: other processes only ever add."""
    work()  # compiles, and touches the memory
    best = float("inf")
    for _ in range(repeats):
        began = time.thread_time()
        work()
        best = min(best, time.thread_time() - began)
    return 1e9 * best / units


def codec_ns(spec: str, update_d: Tensor, repeats: int) -> dict[str, float]:
    """Encode, decode all windows, check: nanoseconds per coordinate."""
    codec, d = parse_codec(spec), len(update_d)
    schema = Schema((TensorSpec("weight", (d,), "float32"),))
    private, shared = codec.init(schema)
    payload, _ = codec.encode(update_d, private, shared, 1)

    def decode() -> None:
        for start in range(0, d, WINDOW):
            codec.decode(payload, schema, shared, 1, start, min(start + WINDOW, d))

    return {
        "encode": least_ns(lambda: codec.encode(update_d, private, shared, 1), d, repeats),
        "decode": least_ns(decode, d, repeats),
        "check": least_ns(lambda: codec.check(payload, schema, shared, 1), d, repeats),
    }


def topk_ns(update_d: Tensor, repeats: int) -> dict[str, float]:
    """Fits cost = per coordinate + per chunk + per kept coordinate over several k and chunks, with fp32 values."""
    costs = [codec_ns(f"topk({k}/{chunk})|fp32", update_d, repeats) for k, chunk in KEPT]
    kept = np.array([k / chunk for k, chunk in KEPT])
    ones, chunks = np.ones_like(kept), np.array([1 / chunk for _, chunk in KEPT])

    def fit(step: str, *columns: Any) -> list[float]:
        return np.linalg.lstsq(np.stack(columns, 1), np.array([cost[step] for cost in costs]), rcond=None)[0].tolist()

    scan, per_chunk, write = fit("encode", ones, chunks, kept)
    plain, coded = codec_ns("topk(64/4096)|fp32", update_d, repeats), codec_ns("topk(64/4096)|q2", update_d, repeats)
    (visit, read), (look, check) = fit("decode", ones, kept), fit("check", ones, kept)
    return {
        "topk.scan": scan,
        "topk.chunk": per_chunk,
        "topk.write": write,
        "topk.visit": visit,
        "topk.read": read,
        "topk.look": look,
        "topk.check": check,
        "topk.code": coded["encode"] - plain["encode"],
        "topk.uncode": coded["decode"] - plain["decode"],
    }


def feedback_ns(update_d: Tensor, repeats: int) -> float:
    """Error feedback around fp32, without encoding and decoding."""
    plain = codec_ns("fp32", update_d, repeats)
    return codec_ns("ef(0.95)|fp32", update_d, repeats)["encode"] - plain["encode"] - plain["decode"]


def rule_ns(spec: str, rows: Held, out_d: Tensor, repeats: int) -> float:
    parsed = parse_rule(spec)
    weight_n = torch.ones(rows.n, dtype=torch.float64)
    return least_ns(lambda: parsed.rule(rows, weight_n, f=parsed.f, context=Context(out_d=out_d)), rows.d, repeats)


def aggregation_ns(update_d: Tensor, repeats: int) -> dict[str, float]:
    d, out_d = len(update_d), torch.empty(len(update_d))
    dense = [DenseRow(update_d.roll(i)) for i in range(12)]
    index_k = torch.arange(0, d, STRIDE)
    sparse = SparseRow(d, index_k, update_d[index_k].contiguous())
    mean = {n: rule_ns("mean", Held(dense[:n], d), out_d, repeats) for n in (4, 12)}
    sparse_4, sparse_12 = (rule_ns("mean", Held([sparse] * n, d), out_d, repeats) for n in (4, 12))
    median = {n: rule_ns("median(f=1)", Held(dense[:n], d), out_d, repeats) for n in (5, 9, 12)}
    system = np.array([[n, len(median_network(n))] for n in median])
    load, compare = np.linalg.lstsq(system, np.array(list(median.values())), rcond=None)[0]
    add = (mean[12] - mean[4]) / 8
    return {
        "mean.row": add,
        "mean.kept": (sparse_12 - sparse_4) / 8 / (len(index_k) / d),
        "mean.divide": mean[4] - 4 * add,
        "median.row": float(load),
        "median.compare": float(compare),
    }


def outer_ns(update_d: Tensor, repeats: int) -> dict[str, float]:
    d = len(update_d)
    theta_d, momentum_d, theta_out_d, momentum_out_d = (update_d.clone() for _ in range(4))
    nesterov, sgd = parse_outer("nesterov(lr=0.7,momentum=0.6)"), parse_outer("sgd(lr=1.0)")
    return {
        "sgd": least_ns(
            lambda: sgd.step(theta_d, None, update_d, theta_out_d=theta_out_d, momentum_out_d=None), d, repeats
        ),
        "nesterov": least_ns(
            lambda: nesterov.step(
                theta_d, momentum_d, update_d, theta_out_d=theta_out_d, momentum_out_d=momentum_out_d
            ),
            d,
            repeats,
        ),
        "norm": least_ns(lambda: norm(update_d), d, repeats),
        "gain": least_ns(lambda: momentum_gain(0.6, momentum_d, update_d), d, repeats),
    }


def hash_ns(update_d: Tensor, repeats: int) -> float:
    octets = update_d.numpy().view(np.uint8).data
    chunk = 1 << 20

    def work() -> None:
        for start in range(0, len(octets), chunk):
            chunk_digest(octets[start : start + chunk])

    return least_ns(work, len(octets), repeats)


def measure(d: int, repeats: int) -> dict[str, float]:
    update_d = torch.randn(d, generator=torch.Generator().manual_seed(0)) * 1e-3
    found: dict[str, float] = {}
    for name in ("fp32", "bf16", "int8", "q2"):
        costs = codec_ns(name, update_d, repeats)
        found |= {f"{name}.{step}": cost for step, cost in costs.items()}
    found |= topk_ns(update_d, repeats)
    found["ef"] = feedback_ns(update_d, repeats)
    found |= aggregation_ns(update_d, repeats) | outer_ns(update_d, repeats)
    found["hash"] = hash_ns(update_d, repeats)
    return found


WHOLE = ("fp32", "ef(1)|int8", "ef(1)|q2", "ef(0.95)|topk(64/4096)|q2")


def whole_rows(update_d: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Whole codecs as the simulator adds them up, beside their time here."""
    rows = []
    for spec in WHOLE:
        costs = ServiceCosts(spec)
        charged = {"encode": costs.encode_s(1), "decode": costs.decode_s(1), "check": costs.check_s(1)}
        for step, here in codec_ns(spec, update_d, repeats).items():
            rows.append({"codec": spec, "step": step, "ns here": here, "charged": 1e9 * charged[step]})
    return [row | {"here / charged": row["ns here"] / row["charged"]} for row in rows]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--params", type=int, default=1 << 23, help="length of the vector; a multiple of 65536")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; the fastest counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.params, options.repeats)
    rows = [
        {
            "cost": name,
            "ns here": round(ns, 4),
            "ns in the table": NANOSECONDS[name],
            "here / table": ns / NANOSECONDS[name],
        }
        for name, ns in found.items()
    ]
    whole = whole_rows(torch.randn(options.params, generator=torch.Generator().manual_seed(1)) * 1e-3, options.repeats)
    notes = ("ns per coordinate, per kept coordinate (topk, mean.kept) or per byte (hash), on one core", noise())
    publish(options.out, "service_costs", rows, title=f"{options.params:,} parameters", notes=notes)
    publish(options.out, "service_costs_whole", whole, title="whole codecs, ns per coordinate", notes=(noise(),))


if __name__ == "__main__":
    main()
