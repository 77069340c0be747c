"""What compressing, checking, combining and hashing cost per core here, beside the table that the simulator charges.

python benchmarks/service_costs.py

Codecs are timed as wholes and their parts fitted to them (see codec_costs.py); presets, which are not among them, say
how good the sum of the parts is. Ends with the table as source, to be pasted into farflung/sim/measured_costs.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from codec_costs import WINDOW, codec_ns, least_ns, normal_update, parts_ns, schema_for
from report import arguments, console, noise, publish
from torch import Tensor

from farflung.aggregation.network import median_network
from farflung.aggregation.outer import momentum_gain, norm, parse_outer
from farflung.aggregation.registry import parse_rule
from farflung.aggregation.rule import Context
from farflung.compression.presets import PRESETS
from farflung.protocol.blob import chunk_digest
from farflung.protocol.rows import DenseRow, SparseRow
from farflung.sim.codec_costs import STEPS
from farflung.sim.measured_costs import NANOSECONDS
from farflung.sim.service_costs import ServiceCosts

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
    """Every row of the table."""
    update_d = normal_update(d, 0)
    found = parts_ns(update_d, repeats, lambda spec: console.print(f"  {spec}", style="dim", highlight=False))
    found |= aggregation_ns(update_d, repeats) | outer_ns(update_d, repeats)
    return found | {"hash": hash_ns(update_d, repeats)}


def whole_rows(update_d: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Every preset as the simulator adds it up, beside its time here. None of them is among the fitted codecs."""
    rows = []
    for name, preset in PRESETS.items():
        costs = ServiceCosts(preset.spec, schema=schema_for(len(update_d)))
        charged = {"encode": costs.encode_s(1), "decode": costs.decode_s(1), "check": costs.check_s(1)}
        for step, here in codec_ns(preset.spec, update_d, repeats).items():
            rows.append({"codec": name, "step": step, "ns here": here, "charged": 1e9 * charged[step]})
    return [row | {"here / charged": row["ns here"] / row["charged"]} for row in rows]


def source(found: Mapping[str, float]) -> Iterator[str]:
    """The table as farflung/sim/measured_costs.py has it, three digits each."""
    parts = sorted({row.rpartition(".")[0] for row in found if row.rpartition(".")[2] in STEPS})
    for part in parts:
        told = [f"{name}={found[f'{part}.{name}']:.3g}" for name in STEPS if f"{part}.{name}" in found]
        yield f"    **_part({part!r}, {', '.join(told)}),".replace("'", '"')
    for row, ns in found.items():
        if row.rpartition(".")[2] not in STEPS:
            yield f'    "{row}": {ns:.3g},'


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--params", type=int, default=1 << 22, help="length of the vector; a multiple of 65536")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; the fastest counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.params, options.repeats)
    rows = [
        {
            "cost": name,
            "ns here": ns,
            "ns in the table": NANOSECONDS.get(name),
            "here / table": ns / NANOSECONDS[name] if NANOSECONDS.get(name) else None,
        }
        for name, ns in found.items()
    ]
    whole = whole_rows(normal_update(options.params, 1), options.repeats)
    notes = ("units as in farflung/sim/measured_costs.py, on one core", noise())
    publish(options.out, "service_costs", rows, title=f"{options.params:,} parameters", notes=notes)
    publish(options.out, "service_costs_whole", whole, title="whole codecs, ns per coordinate", notes=(noise(),))
    for line in source(found):
        print(line)


if __name__ == "__main__":
    main()
