"""How benchmarks report: a table for people, a CSV for machines, and one clear line when they cannot run."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]

console = Console(width=None if sys.stdout.isatty() else 150)


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where CSV files go")
    return parser


def publish(out: Path, name: str, rows: Sequence[Row], *, title: str = "", notes: Sequence[str] = ()) -> None:
    """Print rows (dictionaries with the same keys) as a table and write them to OUT/NAME.csv."""
    if not rows:
        console.print(f"{title or name}: no rows")
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title or name, title_justify="left")
    for column in columns:
        numeric = all(isinstance(row.get(column), (int, float)) for row in rows if row.get(column) is not None)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    console.print(table)
    for note in notes:
        console.print(f"  {note}", highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    console.print(f"  written: {path}", highlight=False)


def goal(text: str, reached: bool) -> str:
    """A line that says whether a goal was reached."""
    return f"[green]reached[/green]  {text}" if reached else f"[red]MISSED[/red]   {text}"


def noise() -> str:
    """What else the machine is doing: figures of a loaded machine are comparable only within one run."""
    one, five, _ = os.getloadavg()
    return f"load average {one:.1f} (1 min), {five:.1f} (5 min) on {os.cpu_count()} cores"


def cannot_run(why: str) -> NoReturn:
    """End with one line and exit code 2: not a failure, not a result either."""
    console.print(f"cannot run here: {why}", style="yellow", highlight=False)
    raise SystemExit(2)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
