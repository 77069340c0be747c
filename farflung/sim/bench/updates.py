"""What codecs are measured on: real pseudo-gradients, made once and kept, and two kinds of made-up numbers.

An offline error says how well a codec draws one update, not how well training goes with it: `closed_loop` does that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from farflung.node.flat import difference_into, read_parameters, schema_of, write_parameters
from farflung.node.tasks.stdlib_gpt import StdlibGpt
from farflung.protocol.errors import ConfigError
from farflung.protocol.schema import Schema, TensorSpec

KINDS = ("trained", "gauss", "heavy")
SIDE = 2048
"""Columns of the made-up matrices."""

HEAVY_FREEDOM = 3
"""Degrees of freedom of Student's t: a finite variance and nothing beyond."""


@dataclass(frozen=True)
class Updates:
    """A few rounds' pseudo-gradients of one member: wrappers with memory are measured on the last, in their stride."""

    kind: str
    schema: Schema
    update_rd: tuple[Tensor, ...]


@dataclass(frozen=True)
class Recipe:
    """How the trained ones are made. Equal recipes give equal updates on one installation, so runs compare."""

    task: StdlibGpt = field(default_factory=StdlibGpt)
    rounds: int = 6
    inner_steps: int = 15
    warm_rounds: int = 4
    """Rounds before the first that is kept: the first updates of a run look like no others."""


def make_updates(kind: str, params: int, *, seed: int = 0, tell: Callable[[str], None] = lambda text: None) -> Updates:
    """Updates of a kind. `params` is the size of made-up ones; the trained ones have the built-in model's.

    Trained ones are made in a minute or two, then kept in the user's cache. Raises ConfigError for other kinds.
    """
    if kind == "trained":
        return trained(Recipe(), cache_folder(), tell=tell)
    if kind not in KINDS:
        raise ConfigError(f"updates are one of {', '.join(KINDS)}, got {kind!r}")
    rows = max(1, params // SIDE)
    schema = Schema((TensorSpec("matrix", (rows, SIDE), "float32"),))
    generator = np.random.default_rng((seed, KINDS.index(kind)))
    draws = [
        generator.standard_normal(schema.numel, np.float32)
        if kind == "gauss"
        else generator.standard_t(HEAVY_FREEDOM, schema.numel).astype(np.float32)
        for _ in range(2)
    ]
    return Updates(kind, schema, tuple(torch.from_numpy(1e-3 * draw.astype(np.float32)) for draw in draws))


def trained(recipe: Recipe, folder: Path, *, tell: Callable[[str], None] = lambda text: None) -> Updates:
    """Pseudo-gradients of one worker on the built-in task: local steps from the anchor, then the anchor moves there."""
    from safetensors.torch import load_file, save_file

    model = recipe.task.build_model()
    schema = schema_of(model)
    key = hashlib.sha256(json.dumps([asdict(recipe), torch.__version__], sort_keys=True).encode()).hexdigest()
    path = folder / f"updates-{key[:16]}.safetensors"
    if not path.exists():
        tell(f"making {recipe.rounds} pseudo-gradients of {schema.numel:,} parameters, kept in {path}")
        made = _train(recipe, schema)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        save_file({str(i): update_d for i, update_d in enumerate(made)}, partial)
        partial.replace(path)
    kept = load_file(path)
    return Updates("trained", schema, tuple(kept[str(i)] for i in range(recipe.rounds)))


def cache_folder() -> Path:
    """Where made updates are kept: $XDG_CACHE_HOME/farflung/bench, or the like."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "farflung" / "bench"


def _train(recipe: Recipe, schema: Schema) -> list[Tensor]:
    from farflung.node.data import solo_view
    from farflung.node.trainer import Trainer

    trainer = Trainer.of_task(recipe.task, solo_view())
    theta_d, kept = torch.empty(schema.numel), []
    read_parameters(trainer.model, theta_d)
    for round_index in range(recipe.warm_rounds + recipe.rounds):
        for _ in range(recipe.inner_steps):
            trainer.train_step()
        delta_d = torch.empty(schema.numel)
        difference_into(delta_d, theta_d, trainer.model)
        theta_d -= delta_d
        write_parameters(trainer.model, theta_d)
        if round_index >= recipe.warm_rounds:
            kept.append(delta_d)
    return kept
