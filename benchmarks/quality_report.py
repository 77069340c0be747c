"""The tables and plots of `codec_quality.py`: losses at equal tokens, and at equal time on stated lines."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from report import goal, publish

from farflung.compression import parse_codec
from farflung.protocol.schema import Schema, TensorSpec
from farflung.sim.bench.closed_loop import DATA_PARALLEL, Setting
from farflung.sim.bench.codec_rows import add_row
from farflung.sim.bench.quality import QualityRow, World, loss_after, seconds_to, summarise
from farflung.sim.bench.quality_plots import draw_pareto, draw_time
from farflung.sim.bench.runs import Runs
from farflung.sim.report.drawing import house_settings, write_png

LINES = {"10 Mbit/s": 10e6, "100 Mbit/s": 100e6, "1000 Mbit/s": 1e9}
WITHIN = 0.02
CORES = 8
"""Of a member's machine, coding and decoding side by side."""
SPEED_SIDE, SPEED_MATRICES, SPEED_REPEATS = 2048, 2, 4
"""Codec speeds are measured on so many square matrices."""
DRAWN = ("diloco-fp32", "bf16", "int8", "q2 + ef", "sign + ef", "sparseloco", "farflung", DATA_PARALLEL)
LINEAR = ("diloco-fp32", "bf16", "opendiloco-fp16")
"""What an all-reduce adds up without coding it again, but for a rounding."""


def rows_of(finals: Mapping[str, Sequence[Setting]], runs: Runs) -> dict[str, QualityRow]:
    """Every scheme that has finished runs, with gaps to uncompressed DiLoCo."""
    reference = [runs[setting] for setting in finals.get("diloco-fp32", ()) if setting in runs]
    found = {}
    for name, settings in finals.items():
        there = [setting for setting in settings if setting in runs]
        if there and there == list(settings[: len(there)]):
            found[name] = summarise([runs[setting] for setting in there], there[0], reference)
    return found


def measure_speeds(rows: Mapping[str, QualityRow], path: Path, wider: Mapping[str, str]) -> None:
    """Encode and decode GB/s of fp32 per core, to a CSV. `wider` gives specs whose rank grew with the width.

    In CPU seconds, the least of a few, so that other processes disturb them little.
    """
    side = SPEED_SIDE
    schema = Schema(tuple(TensorSpec(f"m{i}", (side, side), "float32") for i in range(SPEED_MATRICES)))
    update_d = 1e-3 * torch.randn(schema.numel, generator=torch.Generator().manual_seed(0))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["scheme", "spec", "encode_gb_s", "decode_gb_s", "bits"])
        for name, row in rows.items():
            if name != DATA_PARALLEL:
                spec = wider.get(name, row.spec)
                writer.writerow([name, spec, *(f"{value:.4g}" for value in _speeds(spec, schema, update_d))])
                file.flush()


def _speeds(spec: str, schema: Schema, update_d: torch.Tensor) -> tuple[float, float, float]:
    codec = parse_codec(spec)
    private, shared = codec.init(schema)
    encode_s, decode_s, total_d, payload = [], [], torch.zeros(schema.numel), b""
    for index in range(1 + SPEED_REPEATS):  # the first compiles
        began_s = time.process_time()
        payload, private = codec.encode(update_d, private, shared, index)
        between_s = time.process_time()
        add_row(codec.open(payload, schema, shared, index), total_d)
        decode_s.append(time.process_time() - between_s)
        encode_s.append(between_s - began_s)
    gigabytes = 4 * schema.numel / 1e9
    return gigabytes / min(encode_s), gigabytes / min(decode_s), 8 * len(payload) / schema.numel


def read_speeds(path: Path) -> dict[str, tuple[float, float]]:
    """(encode, decode) GB/s by scheme; nothing if they were not measured."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["scheme"]: (float(row["encode_gb_s"]), float(row["decode_gb_s"])) for row in csv.DictReader(file)}


def round_s(name: str, row: QualityRow, world: World, speeds: Mapping[str, tuple[float, float]]) -> float:
    """Local phase, exchange and codec, one after the other. Data-parallel all-reduces 16 bits every step."""
    if name == DATA_PARALLEL:
        return world.local_s + world.inner_steps * world.all_reduce_s(16)
    codec_s = world.codec_s(*speeds[name]) if name in speeds else 0.0
    exchange_s = world.all_reduce_s(row.bits) if name in LINEAR else world.gather_s(row.bits)
    return world.local_s + exchange_s + codec_s


def quality_table(rows: Mapping[str, QualityRow], out: Path) -> None:
    """At equal tokens."""
    table: list[dict[str, Any]] = []
    for name, row in sorted(rows.items(), key=lambda item: -item[1].bits):
        table.append({"scheme": name, "bits": row.bits, "loss": row.loss.mean, "ci": row.loss.half})
        gap = row.gap
        table[-1] |= {"gap_percent": 100 * gap.mean if gap else None, "gap_ci": 100 * gap.half if gap else None}
        table[-1] |= {"seeds": row.loss.n, "rounds": row.curves[0][-1][0]}
        table[-1] |= {"up_mb_of_1b": row.bits / 8 * 1e3, "down_mb_r8": 7 * row.bits / 8 * 1e3}
        table[-1] |= {"spec": row.spec, "outer": row.outer}
    notes = []
    if "sign + ef" in rows and rows["sign + ef"].gap is not None:
        gap = rows["sign + ef"].gap
        assert gap is not None
        text = f"sign + error feedback at {rows['sign + ef'].bits:.2f} bit within 2 % of uncompressed: {gap.mean:+.2%}"
        notes.append(goal(text, gap.mean <= WITHIN))
    publish(out, "codec_quality", table, title="Loss at equal tokens", notes=notes)


def time_table(rows: Mapping[str, QualityRow], speeds: Mapping[str, tuple[float, float]], out: Path) -> None:
    """At equal time: when the fastest scheme is through, and the time to a loss that most reach."""
    target = rows["diloco-fp32"].loss.mean * 1.05
    table: list[dict[str, Any]] = []
    for line, bps in LINES.items():
        for members in (4, 8):
            world = World(bps, members=members, cores=CORES)
            took = {name: round_s(name, row, world, speeds) for name, row in rows.items()}
            end_s = min(took[name] * row.curves[0][-1][0] for name, row in rows.items())
            for name, row in rows.items():
                after, until = loss_after(row, end_s, took[name]), seconds_to(row, target, took[name])
                table.append({"line": line, "members": members, "scheme": name, "round_s": took[name]})
                table[-1] |= {"compute_share": world.local_s / took[name], "loss_then": after.mean, "ci": after.half}
                table[-1] |= {"then_h": end_s / 3600, "hours_to_target": until.mean / 3600, "target": target}
    for row in table:
        if math.isinf(row["hours_to_target"]):
            row["hours_to_target"] = None
    publish(
        out,
        "codec_quality_time",
        table,
        title="At equal time: 1B parameters, 1 s a step, H = 15, duplex lines, codecs on 8 cores",
    )


def plots(rows: Mapping[str, QualityRow], speeds: Mapping[str, tuple[float, float]], folder: Path) -> None:
    """quality_pareto.png and quality_time.png."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: rows[name] for name in DRAWN if name in rows}
    seconds = {
        line: {name: round_s(name, row, World(bps, members=4, cores=CORES), speeds) for name, row in shown.items()}
        for line, bps in LINES.items()
    }
    setting = "byte GPT of 0.25 M parameters, 4 members, H = 15, 100 rounds, 3 seeds, 95 % intervals"
    with house_settings():
        caption = f"{setting}; schemes with one seed were not tuned. Low rank is flattered by matrices 96 wide."
        title = "What a scheme sends, and what training makes of it"
        write_png(draw_pareto(rows, title=title, caption=caption, baseline=DATA_PARALLEL), folder)
        caption = f"{setting}, put on the clock of 1B parameters, 1 s a step and the line; exchange does not overlap."
        title = "Loss over time on three lines"
        write_png(draw_time(shown, seconds, title=title, caption=caption), folder)


def publish_all(rows: Mapping[str, QualityRow], out: Path, plots_to: Path, speeds_at: Path) -> None:
    """Everything that can be said with what is there."""
    if "diloco-fp32" not in rows:
        raise SystemExit("the reference, diloco-fp32, has no finished runs yet")
    speeds = read_speeds(speeds_at)
    quality_table(rows, out)
    time_table(rows, speeds, out)
    plots(rows, speeds, plots_to)
