"""How fast codecs encode, decode and check on one core and on all, beside a plain copy and other people's forms.

python benchmarks/codec_speed.py
python benchmarks/codec_speed.py --params 4 --codecs int8 'ef(1)|int4' --threads 2

Every figure is GB of fp32 per second, the best of --repeats; "x copy" is its ratio to copying the same numbers in the
same run. One thread is timed by the CPU time that it takes, so that a busy machine's other work counts less (it still
shares the memory); several by the clock. "decode + add" is what a round does with a payload: windows of 2^16
coordinates, of 2^18 for sparse rows, each added into an fp64 window.

Rivals are written here in plain torch as their authors describe them; none of their code is copied.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from report import arguments, goal, noise, publish
from torch import Tensor

from farflung.aggregation.kernels import native
from farflung.compression import parse_codec
from farflung.protocol.rows import DenseRow, SparseRow
from farflung.protocol.schema import Schema, TensorSpec

WINDOW = 1 << 16
SPARSE_WINDOW = 1 << 18
PATIENCE_S = 0.6

SPECS = (
    *("bf16", "int8", "int4", "q2", "ef(1)|int4"),
    *("topk(64/4096)|q2", "topk(64/4096)|q2|rice", "topk(64/4096)|stat(2, block=1024)|ans"),
    *("ef(0.95)|topk(64/4096)|q2|rice", "tiles(64)|topk(64/4096)|q2|rice", "sparseloco", "demo"),
)

GOALS_GB_S = {
    "int8": {"encode": 6.0, "decode": 6.0},
    "int4": {"encode": 6.0, "decode": 6.0},
    "topk(64/4096)|q2|rice": {"encode": 3.0, "decode + add": 10.0},
    "topk(64/4096)|stat(2, block=1024)|ans": {"encode": 3.0, "decode + add": 10.0},
    "ef(0.95)|topk(64/4096)|q2|rice": {"encode": 3.0},
    "sparseloco": {"encode": 3.0},
}
"""On one core."""

SCALING_GOAL = 1.8
SCALED = ("int8", "int4", "q2", "topk(64/4096)|q2|rice")
"""What encodes that much faster on two threads than on one, by the clock."""
WIDTH = 1024


def best_s(work: Callable[[], Any], repeats: int, threads: int) -> float:
    """The shortest of some runs, after one that does not count; no more of them once PATIENCE_S are spent."""
    clock = time.process_time if threads == 1 else time.perf_counter
    work()
    times, first = [], time.perf_counter()
    while len(times) < repeats and (not times or time.perf_counter() - first < PATIENCE_S):
        began = clock()
        work()
        times.append(clock() - began)
    return min(times)


def windows(d: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, d)) for start in range(0, d, size)]


def codec_row(spec: str, update_d: Tensor, schema: Schema, threads: int, repeats: int) -> dict[str, Any]:
    """GB/s of one codec in each direction."""
    d, gb = len(update_d), 4 * len(update_d) / 1e9
    codec = parse_codec(spec, threads)
    state = list(codec.init(schema))

    def encode() -> bytes:
        payload, state[0] = codec.encode(update_d, state[0], state[1], 0)
        return payload

    payload = encode()

    size = SPARSE_WINDOW if isinstance(codec.decode(payload, schema, state[1], 0, 0, WINDOW), SparseRow) else WINDOW
    sum_w = np.zeros(min(size, d))

    def decode(add: bool = False) -> None:
        read = codec.open(payload, schema, state[1], 0)
        for start, stop in windows(d, size):
            row = read(start, stop)
            if add and isinstance(row, DenseRow):
                native.add_dense(sum_w[: stop - start], row.value_d.numpy(), 0.5)
            elif add:
                native.add_sparse(sum_w[: stop - start], row.index_k.numpy(), row.value_k.numpy(), 0.5)

    def speed(work: Callable[[], Any]) -> float:
        return gb / best_s(work, repeats, threads)

    return {
        "what": spec,
        "threads": threads,
        "bits/param": 8 * len(payload) / d,
        "encode": speed(encode),
        "decode": speed(decode),
        "decode + add": speed(lambda: decode(add=True)),
        "check": speed(lambda: codec.check(payload, schema, state[1], 0)),
    }


def eager_blockwise(bits: int, block: int) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Blockwise absmax in plain torch; 4-bit codes two to a byte."""
    top = (1 << (bits - 1)) - 1

    def encode(x_d: Tensor) -> Any:
        x_bn = x_d.view(-1, block)
        scale_b1 = x_bn.abs().amax(1, keepdim=True) / top
        step_bn = (x_bn / scale_b1.clamp(min=1e-30)).round().clamp(-top, top).to(torch.int8)
        if bits == 4:
            step_bn = (step_bn[:, : block // 2] & 15) | (step_bn[:, block // 2 :] << 4)
        return step_bn, scale_b1

    def decode(sent: Any) -> Tensor:
        step_bn, scale_b1 = sent
        if bits == 4:
            step_bn = torch.cat([(step_bn << 4) >> 4, step_bn >> 4], 1)
        return (step_bn.float() * scale_b1).view(-1)

    return encode, decode


def demo_like(k: int, side: int = 64) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """DCT of 64 x 64 chunks by two matrix products, top-k, and scatter back (arXiv:2411.19870)."""
    n = torch.arange(side)
    basis = torch.cos(torch.pi * (2 * n[None, :] + 1) * n[:, None] / (2 * side)) * (2 / side) ** 0.5
    basis[0] /= 2**0.5

    def encode(x_d: Tensor) -> Any:
        spectrum = (basis @ x_d.view(-1, side, side) @ basis.T).view(-1, side * side)
        index = spectrum.abs().topk(k, sorted=False).indices
        return index, spectrum.gather(1, index)

    def decode(sent: Any) -> Tensor:
        index, value = sent
        spectrum = torch.zeros(len(index), side * side).scatter_(1, index, value).view(-1, side, side)
        return (basis.T @ spectrum @ basis).view(-1)

    return encode, decode


def sparseloco_like(k: int, chunk: int = 4096) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Top-k per chunk with int64 indices, values to two bits around their mean (arXiv:2508.15706)."""

    def encode(x_d: Tensor) -> Any:
        x_bc = x_d.view(-1, chunk)
        index = x_bc.abs().topk(k, sorted=False).indices
        value = x_bc.gather(1, index)
        centre, spread = value.mean(), value.std() * 6 / 4
        code = ((value - centre) / spread + 2).floor().clamp(0, 3).to(torch.uint8)
        table = torch.stack([value[code == level].mean() for level in range(4)]).nan_to_num()
        return index, code, table

    def decode(sent: Any) -> Tensor:
        index, code, table = sent
        return torch.zeros(len(index), chunk).scatter_(1, index, table[code.int()]).view(-1)

    return encode, decode


def powersgd_like(rank: int) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """One power iteration with QR on the vector seen as a matrix (arXiv:1905.13727, Alg. 1)."""
    start = torch.randn(WIDTH, rank, generator=torch.Generator().manual_seed(0))

    def encode(x_d: Tensor) -> Any:
        matrix = x_d.view(-1, WIDTH)
        left = torch.linalg.qr(matrix @ start).Q
        return left, matrix.T @ left

    return encode, lambda sent: (sent[0] @ sent[1].T).view(-1)


def hivemind_like(name: str) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """hivemind's own code path, with its protobuf."""
    from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
    from hivemind.proto.runtime_pb2 import CompressionType

    kind = CompressionType.Value(name)
    return lambda x_d: serialize_torch_tensor(x_d, kind), deserialize_torch_tensor


RIVALS: dict[str, Callable[[], tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]]] = {
    "torch eager int8(1024)": lambda: eager_blockwise(8, 1024),
    "torch eager int4(128)": lambda: eager_blockwise(4, 128),
    "DeMo-like dct + top 64": lambda: demo_like(64),
    "SparseLoCo-like top 64": lambda: sparseloco_like(64),
    "PowerSGD-like rank 4": lambda: powersgd_like(4),
    "hivemind UNIFORM_8BIT": lambda: hivemind_like("UNIFORM_8BIT"),
    "hivemind QUANTILE_8BIT": lambda: hivemind_like("QUANTILE_8BIT"),
    "hivemind BLOCKWISE_8BIT": lambda: hivemind_like("BLOCKWISE_8BIT"),
}


def rival_row(name: str, update_d: Tensor, threads: int, repeats: int) -> dict[str, Any]:
    """GB/s of somebody else's form; only what it can do."""
    gb = 4 * len(update_d) / 1e9
    row: dict[str, Any] = {"what": name, "threads": threads}
    try:
        encode, decode = RIVALS[name]()
        sent = encode(update_d)
        decode(sent)
    except Exception as error:  # whatever is wrong with it here is its result
        return row | {"note": f"fails: {type(error).__name__}: {error}"[:60]}
    return row | {
        "encode": gb / best_s(lambda: encode(update_d), repeats, threads),
        "decode": gb / best_s(lambda: decode(sent), repeats, threads),
    }


def ours(spec: str, update_d: Tensor, schema: Schema, threads: int, repeats: int) -> dict[str, Any]:
    try:
        return codec_row(spec, update_d, schema, threads, repeats)
    except Exception as error:  # a codec that does not work is a row, not the end of the table
        return {"what": spec, "threads": threads, "note": f"fails: {type(error).__name__}: {error}"[:60]}


def goals(table: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each goal of one core."""
    found = {row["what"]: row for row in table if row["threads"] == 1}
    return [
        goal(
            f"{spec}, {way}: at least {least:g} GB/s on one core, got {found[spec][way]:.2f}", found[spec][way] >= least
        )
        for spec, ways in GOALS_GB_S.items()
        for way, least in ways.items()
        if spec in found and found[spec].get(way)
    ]


def scaling(update_d: Tensor, repeats: int) -> list[str]:
    """A line for each codec that should use two cores; only where there are two."""
    if (os.cpu_count() or 1) < 2:
        return ["one core only: nothing to say about two threads"]
    lines = []
    for spec in SCALED:
        one, two = (parse_codec(spec, threads) for threads in (1, 2))
        ratios = []
        for _ in range(repeats):  # in pairs, so that both meet the same neighbours
            spent = []
            for codec in (one, two):
                began = time.perf_counter()
                codec.encode(update_d, None, None, 0)
                spent.append(time.perf_counter() - began)
            ratios.append(spent[0] / spent[1])
        best = sorted(ratios)[len(ratios) // 2]
        lines.append(goal(f"{spec}: {SCALING_GOAL:g} x on two threads, got {best:.2f} (median)", best >= SCALING_GOAL))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--params", type=int, default=16, help="size in units of 2**20")
    parser.add_argument("--codecs", nargs="*", default=None, help="specs; default: the ones with goals")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-rivals", action="store_true")
    args = parser.parse_args(argv)
    rows_of = args.params << 10
    schema = Schema((TensorSpec("w", (rows_of, WIDTH), "float32"),))
    update_d = torch.randn(schema.numel, generator=torch.Generator().manual_seed(0))
    target_d = torch.empty_like(update_d).fill_(0)
    rows: list[dict[str, Any]] = []
    for threads in dict.fromkeys(args.threads):
        torch.set_num_threads(threads)
        copy = 4 * len(update_d) / 1e9 / best_s(lambda: target_d.copy_(update_d), args.repeats, threads)
        fresh = 4 * len(update_d) / 1e9 / best_s(lambda: np.array(update_d.numpy()), args.repeats, threads)
        found = [{"what": "copy", "threads": threads, "bits/param": 32.0, "encode": copy, "decode": copy}]
        found += [{"what": "copy to fresh memory", "threads": threads, "bits/param": 32.0, "encode": fresh}]
        found += [ours(spec, update_d, schema, threads, args.repeats) for spec in args.codecs or SPECS]
        if not args.no_rivals:
            found += [rival_row(name, update_d, threads, args.repeats) for name in RIVALS]
        for row in found:
            for way in ("encode", "decode"):
                row[f"{way} x copy"] = row[way] / copy if way in row else None
        rows += found
    columns = ("what", "threads", "bits/param", "encode", "encode x copy", "decode", "decode x copy")
    columns += ("decode + add", "check", "note")
    table = [{column: row.get(column) for column in columns} for row in rows]
    notes = [noise(), *goals(table), *scaling(update_d, args.repeats)]
    title = f"GB/s of fp32, {len(update_d):,} parameters"
    publish(args.out, "codec_speed", table, title=title, notes=notes)


if __name__ == "__main__":
    main()
