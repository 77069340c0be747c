"""The command line of `farflung demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Switch = Parameter(negative=())
"""A flag that is only switched on."""


def demo(
    *,
    members: int = 4,
    rounds: int = 60,
    inner_steps: int = 30,
    mode: str = "gather",
    codec: str = "",
    outer: str = "",
    layers: int = 2,
    width: int = 64,
    context: int = 64,
    batch: int = 16,
    lr: float = 4e-3,
    kill: Annotated[bool, Switch] = False,
    baseline: Annotated[bool, Switch] = False,
    plain: Annotated[bool, Switch] = False,
    out: Path | None = None,
    json: Path | None = None,
) -> int:
    """Train a real swarm on this machine: one process per member, hivemind DHT, gRPC, real text.

    Parameters
    ----------
    members
        Processes.
    rounds
        Exchanges.
    inner_steps
        Local steps between two exchanges (H).
    mode
        How updates meet: gather, push-sum or pairs.
    codec
        How updates travel; by default what suits the mode.
    outer
        How the shared model moves; likewise.
    layers
        Of the built-in GPT, like `width` and `context`.
    batch
        Windows per step and member.
    lr
        AdamW's peak learning rate.
    kill
        Kill a random member half-way, and start it again.
    baseline
        Train one process on the same tokens, too, and compare.
    plain
        Lines of text instead of a live table.
    out
        Keep everything here: homes, logs, plot.
    json
        Write the results here.
    """
    from farflung.node.logs import hush_libraries

    hush_libraries()
    from farflung.node.demo import DemoSettings, run_demo

    settings = DemoSettings(
        members=members,
        rounds=rounds,
        inner_steps=inner_steps,
        mode=mode,
        codec=codec,
        outer=outer,
        layers=layers,
        width=width,
        context=context,
        batch=batch,
        lr=lr,
        kill=kill,
        baseline=baseline,
        plain=plain,
        out=out,
    )
    return run_demo(settings, json_path=json)
