"""What people see: pure functions from `status.json` and `train.json` to rich renderables and lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
Facts = Mapping[str, Any]


class Row(NamedTuple):
    """One node in a table of several."""

    name: str
    status: Facts
    train: Facts
    life: str
    """"running", or what became of it."""


def sparkline(values: Iterable[float], width: int = 16) -> str:
    """The last `width` values as bars, scaled to their own range."""
    shown = [value for value in values if math.isfinite(value)][-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)


def human_bytes(count: float) -> str:
    """Decimal units, three figures: 1.53 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def human_count(count: float) -> str:
    """23.1k"""
    for unit in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


def human_loss(loss: Any) -> str:
    """Three decimals; a dash where there is none."""
    return f"{loss:.3f}" if isinstance(loss, (int, float)) and math.isfinite(loss) else "-"


def round_text(status: Facts, train: Facts) -> str:
    """7/14"""
    rounds, index = int(train.get("rounds", 0)), int(status.get("trained", 0)) + 1
    return f"{min(index, rounds)}/{rounds}" if rounds else str(index)


def step_text(train: Facts) -> str:
    """12/30"""
    return f"{train.get('step', 0)}/{train['inner_steps']}" if train.get("inner_steps") else "-"


def doing_text(status: Facts, train: Facts) -> str:
    """Why this node waits and for whom, or that it trains: the two files are not of the same instant."""
    phase, why = str(status.get("phase", "starting")), str(status.get("why", ""))
    ahead = int(train.get("round", 0)) - int(status.get("round", 0))
    trains = not train.get("ended") and (ahead > 0 or (ahead == 0 and phase == "training"))
    return "training" if trains else why or phase


def member_panel(status: Facts, train: Facts, *, hint: str = "Ctrl-C leaves politely, twice at once") -> Panel:
    """The footer of `farflung join`."""
    facts = Table.grid(padding=(0, 2))
    losses = [loss for _, loss in train.get("losses", [])]
    facts.add_row(
        Text(f"round {round_text(status, train)}", style="bold"),  # no markup: a log line above switches it off
        f"step {step_text(train)}",
        f"loss {human_loss(train.get('loss'))} {sparkline(losses)}",
        f"validation {human_loss(train.get('validation_loss'))}",
        f"{human_count(train.get('tokens_per_s', 0.0))} tok/s",
    )
    members = status.get("members")
    facts.add_row(
        f"peers {max(0, len(members) - 1) if members is not None else len(status.get('known', []))}",
        f"↑ {human_bytes(status.get('bytes_up', 0))}",
        f"↓ {human_bytes(status.get('bytes_down', 0))}",
        f"waited {status.get('wait_s', 0.0):.0f} s",
        f"refused {status['refusals']}" if status.get("refusals") else "",
    )
    title = f"{status.get('run', 'farflung')} · {str(status.get('peer', ''))[:8]}"
    doing = Text(doing_text(status, train), style="cyan")
    return Panel(Group(facts, doing), title=title, subtitle=hint, title_align="left", subtitle_align="right")


COLUMNS = ("node", "round", "step", "tok/s", "loss", "", "validation", "sent", "received", "peers", "doing")
WIDE = 132
"""Columns of a terminal from which on everything fits side by side."""

LEFT_OUT = ("", "peers", "doing")
"""On a narrower one; what nodes do is then said below the table."""


def members_table(rows: Sequence[Row], *, width: int = WIDE, title: str = "", caption: str = "") -> RenderableType:
    """One row per node, for a terminal `width` columns wide: for `farflung demo`."""
    table = Table(title=title, title_justify="left")
    shown = [index for index, name in enumerate(COLUMNS) if width >= WIDE or name not in LEFT_OUT]
    for name in (COLUMNS[index] for index in shown):
        left = name in ("node", "", "doing")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "doing")
    cells = [member_cells(row) for row in rows]
    for row, texts in zip(rows, cells, strict=True):
        table.add_row(*(texts[index] for index in shown), style=None if row.life == "running" else "dim")
    doing = [Text(f"{texts[0]}: {texts[-1]}", style="cyan") for texts in cells if width < WIDE]
    return Group(table, *doing, Text(caption, style="dim"))


def member_cells(row: Row) -> tuple[str, ...]:
    """The texts of a table row."""
    status, train = row.status, row.train
    return (
        row.name,
        round_text(status, train),
        step_text(train),
        human_count(train.get("tokens_per_s", 0.0)),
        human_loss(train.get("loss")),
        sparkline((loss for _, loss in train.get("losses", [])), 12),
        human_loss(train.get("validation_loss")),
        human_bytes(status.get("bytes_up", 0)),
        human_bytes(status.get("bytes_down", 0)),
        str(max(0, len(status.get("members", [])) - 1)),
        doing_text(status, train) if row.life == "running" else row.life,
    )


def member_line(row: Row) -> str:
    """The same as one line of text, where there is no terminal."""
    name, round_, step, rate, loss, _, validation, up, down, peers, doing = member_cells(row)
    return (
        f"{name}: round {round_} step {step} loss {loss} validation {validation} {rate} tok/s "
        f"↑{up} ↓{down} peers {peers} · {doing}"
    )


def status_lines(row: Row) -> list[str]:
    """`farflung status`: what one node and its swarm are doing, and always why a round waits, and for whom."""
    status, train = row.status, row.train
    unreachable = ", ".join(f"{peer} ({why})" for peer, why in status.get("unreachable", {}).items())
    lines = [
        f"{status.get('run', '?')}  run {str(status.get('run_id', ''))[:8]}  "
        f"node {str(status.get('peer', ''))[:8]}  {row.life}",
        f"  round {round_text(status, train)}  step {step_text(train)}  loss {human_loss(train.get('loss'))}  "
        f"validation {human_loss(train.get('validation_loss'))}  {human_count(train.get('tokens_per_s', 0.0))} tok/s",
        f"  {'why' if row.life == 'running' else 'last said'}: {doing_text(status, train)}",
        f"  members: {', '.join(status.get('members', [])) or 'not known yet'}",
        f"  sent {human_bytes(status.get('bytes_up', 0))}, received {human_bytes(status.get('bytes_down', 0))}, "
        f"trained {status.get('train_s', 0.0):.0f} s, waited {status.get('wait_s', 0.0):.0f} s, "
        f"refused {status.get('refusals', 0)} messages",
    ]
    lines += verdict_lines(status.get("last_round", {}))
    lines += mass_lines(status.get("mixing", {}))
    return [*lines, f"  unreachable: {unreachable}"] if unreachable else lines


def mass_lines(mixing: Facts) -> list[str]:
    """Where members mix: whether all mass was there after the last mixing whose accounts are certified."""
    mass = mixing.get("mass", {})
    if not mass.get("members"):
        return []
    unseen = f", without the accounts of {', '.join(mass['unseen'])}" if mass.get("unseen") else ""
    limbo = f", {mass['limbo']:.1%} in limbo" if mass.get("limbo") else ""
    line = f"  mass, round {mass['round']}: {mass['members']} accounts, error {mass['error']:.1e}{limbo}{unseen}"
    return [line, *(f"  NOT CONSERVED: {why}" for why in mass.get("discrepancies", []))]


def verdict_lines(entry: Facts) -> list[str]:
    """What the last round's rule found, where it looked: rows that did not count in full, what a few could move."""
    payloads = entry.get("payloads", {})
    cut = [
        f"{peer[:8]} {item['reason']}" + (f" ({item['why']})" if item.get("why") else "")
        for peer, item in sorted(payloads.items())
        if item.get("why") or item.get("reason") in ("cut", "anomaly")
    ]
    lines = []
    if "kappa" in entry:
        numbers = ("kappa", "influence_max", "influence_f")
        known = {name: entry[name] for name in numbers if isinstance(entry.get(name), float) and entry[name] >= 0}
        lines.append(
            f"  rule, round {entry.get('round')}: " + ", ".join(f"{name} {value:.3g}" for name, value in known.items())
        )
    if cut:
        lines.append(f"  not in full: {'; '.join(cut)}")
    return lines
