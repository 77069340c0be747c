"""The numbers as files: CSV always, Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from farflung.protocol.errors import ConfigError
from farflung.sim.report.attribution import member_name
from farflung.sim.report.summary import loss_kind
from farflung.sim.report.variants import variants
from farflung.sim.results import MemberResult, RoundResult, RunResult

Row = dict[str, Any]
"""A row of a table; all rows of a table have the same keys. None is an empty cell, NaN is written as `nan`."""

ROUND_FIELDS = (
    "round_index",
    "start_s",
    "end_s",
    "members",
    "payloads",
    "payload_bytes",
    "views",
    "loss",
    "validation",
    "loss_estimate",
)
MEMBER_FIELDS = (
    "name",
    "up_mbit",
    "down_mbit",
    "step_s",
    "online_s",
    "train_s",
    "utilisation",
    "steps",
    "tokens",
    "bytes_sent",
    "bytes_received",
    "wire_sent",
    "wire_received",
    "rounds_counted",
    "attacker",
)
"""Properties of `RoundResult` and `MemberResult` that become columns, under the same names."""


def write_csv(results: Iterable[RunResult], folder: Path, *, parquet: bool | None = None) -> list[Path]:
    """Write runs.csv, rounds.csv, members.csv and blame.csv, UTF-8, floats with all their digits; returns the paths.

    Every row says scenario, seed, and a column `change.KEY` for each key that any variant changed. With parquet=None
    the same tables are written as Parquet too if pyarrow is installed; False never does. Raises ConfigError if there
    are no results, or if parquet=True and pyarrow is missing.
    """
    if parquet and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError('Parquet needs pyarrow: run `pip install pyarrow`, or ask for CSV only; got "parquet"')
    runs = [run for variant in variants(results) for run in variant.runs]
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "runs": run_rows(runs),
        "rounds": round_rows(runs),
        "members": member_rows(runs),
        "blame": blame_rows(runs),
    }
    paths = []
    for name, rows in tables.items():
        paths.append(folder / f"{name}.csv")
        _write_csv(paths[-1], rows)
        if parquet or (parquet is None and importlib.util.find_spec("pyarrow") is not None):
            paths.append(folder / f"{name}.parquet")
            _write_parquet(paths[-1], rows)
    return paths


def run_rows(runs: Sequence[RunResult]) -> list[Row]:
    """A row per run."""
    extras = sorted({name for run in runs for name in run.extra})
    return [
        {
            **key,
            "fidelity": run.fidelity,
            "finished": run.finished,
            "duration_s": run.duration_s,
            "time_to_goal_s": run.time_to_goal_s,
            "final_loss": run.final_loss,
            "final_loss_kind": loss_kind(run),
            "utilisation": run.utilisation,
            "members": len(run.members),
            "rounds": len(run.rounds),
            "bytes_sent": run.bytes_sent,
            "bytes_received": sum(member.bytes_received for member in run.members),
            "wire_sent": sum(member.wire_sent for member in run.members),
            "wire_received": sum(member.wire_received for member in run.members),
            **{f"extra.{name}": run.extra.get(name) for name in extras},
            "events_digest": run.events_digest,
            "wall_s": run.wall_s,
            "notes": "; ".join(run.notes),
        }
        for key, run in _keyed(runs)
    ]


def round_rows(runs: Sequence[RunResult]) -> list[Row]:
    """A row per run and round."""
    return [{**key, **_fields(item, ROUND_FIELDS)} for key, run in _keyed(runs) for item in run.rounds]


def member_rows(runs: Sequence[RunResult]) -> list[Row]:
    """A row per run and member."""
    return [
        {**key, "member": index, **_fields(member, MEMBER_FIELDS)}
        for key, run in _keyed(runs)
        for index, member in enumerate(run.members)
    ]


def blame_rows(runs: Sequence[RunResult]) -> list[Row]:
    """A row per run, round, cause and member; member -1 is nobody in particular."""
    return [
        {
            **key,
            "round_index": item.round_index,
            "cause": blame.cause,
            "member": blame.member,
            "name": member_name(run, blame.member) if blame.member >= 0 else "",
            "seconds": blame.seconds,
        }
        for key, run in _keyed(runs)
        for item in run.rounds
        for blame in item.blame
    ]


def _keyed(runs: Sequence[RunResult]) -> Iterator[tuple[Row, RunResult]]:
    names = sorted({name for run in runs for name in run.changes})
    for run in runs:
        changes = {f"change.{name}": run.changes.get(name) for name in names}
        yield {"scenario": run.scenario, "seed": run.seed, **changes}, run


def _fields(value: RoundResult | MemberResult, names: Sequence[str]) -> Row:
    return {name: getattr(value, name) for name in names}


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["scenario", "seed"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path)
