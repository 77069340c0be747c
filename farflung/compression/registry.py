"""The catalogue: every stage that a codec's text may name. Each module of formats and wrappers brings its own entries.

To add a stage: write it in its room (`formats/`, `entropy/`, `transforms/`, `wrappers/`), give it a `Stage` in that
module's STAGES, and name the module here. Contract tests, fuzzers, `--list` and benchmarks find it by themselves.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from farflung.compression.stage import Stage
from farflung.protocol.errors import LocalError

MODULES = (
    "farflung.compression.formats.dense",
    "farflung.compression.formats.half",
    "farflung.compression.formats.small_floats",
    "farflung.compression.formats.signs",
    "farflung.compression.formats.stochastic",
    "farflung.compression.formats.natural",
    "farflung.compression.formats.statistical",
    "farflung.compression.formats.sparse",
    "farflung.compression.formats.random_k",
    "farflung.compression.formats.global_topk",
    "farflung.compression.formats.deadzone",
    "farflung.compression.entropy.coders",
    "farflung.compression.transforms.tiles",
    "farflung.compression.transforms.dct",
    "farflung.compression.transforms.lowrank",
    "farflung.compression.transforms.rotation",
    "farflung.compression.transforms.sketch",
    "farflung.compression.wrappers.feedback",
    "farflung.compression.wrappers.lookahead",
    "farflung.compression.wrappers.rules",
    "farflung.compression.wrappers.mix",
    "farflung.compression.wrappers.warmup",
    "farflung.compression.wrappers.cyclic",
    "farflung.compression.wrappers.adapt",
    "farflung.compression.wrappers.dgc",
    "farflung.compression.wrappers.ef21",
)
"""In the order in which `--list` shows them."""


@cache
def stages() -> dict[str, Stage]:
    """Every stage by its name. Imports all modules of the room, not numba."""
    found: dict[str, Stage] = {}
    for module in MODULES:
        for stage in import_module(module).STAGES:
            if stage.name in found:
                raise LocalError(f"two stages have one name: {stage.name}")
            found[stage.name] = stage
    return found


def examples() -> tuple[str, ...]:
    """Specs that together use every stage, each once."""
    return tuple(dict.fromkeys(spec for stage in stages().values() for spec in stage.examples))
