"""`farflung bench codec --list`: every stage and every preset, as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from farflung.compression import registry
from farflung.compression.presets import PRESETS
from farflung.sim.bench.codec_report import escape_markup


def print_catalogue(console: Console) -> None:
    """Stages by kind, with parameters, bits, state and paper; then the presets."""
    known = list(registry.stages().values())
    for kind in dict.fromkeys(stage.kind for stage in known):
        table = Table(title=f"{kind}s", title_justify="left")
        for name in ("stage", "what it does", "bits per parameter", "state", "paper"):
            table.add_column(name, overflow="fold")
        for stage in known:
            if stage.kind == kind:
                texts = (stage.usage, stage.says, stage.bits, stage.state, stage.paper)
                table.add_row(*map(escape_markup, texts))
        console.print(table)
    table = Table(title="presets", title_justify="left")
    for name in ("preset", "codec", "outer optimiser", "what it is", "paper"):
        table.add_column(name, overflow="fold")
    for name, preset in PRESETS.items():
        table.add_row(*map(escape_markup, (name, preset.spec, preset.outer, preset.says, preset.paper)))
    console.print(table)
    console.print(
        'A codec is stages with bars between them, for instance "ef(0.95)|topk(64/4096)|q2|ans".', style="dim"
    )
