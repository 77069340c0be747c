"""What a training depends on beside its scenario: the code, the data, the first parameters, and the machine's sums.

A trajectory on disk is found again only while all of this is the same.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import farflung
from farflung.node.data import RoundView, Sharder
from farflung.node.flat import read_parameters, schema_of
from farflung.node.tasks.load import load_task
from farflung.node.tasks.task import Task, count_tokens
from farflung.protocol.errors import ConfigError
from farflung.protocol.identity import PeerId


@dataclass(frozen=True)
class Ground:
    """Of one task on one installation. Digests are SHA-256 in hex."""

    package: str
    """Digest of farflung's own sources: any edit of them may change what is learned."""

    task: str
    """Digest of the file that the task is written in; of what that imports, only the versions below are known."""

    data: str
    """What the task says of its data; empty if it says nothing."""

    start: str
    """Digest of the first parameters."""

    versions: str
    """Python, torch, numpy, and the processor's instructions that torch uses."""

    params: int
    """Trainable parameters of the task's model."""

    tokens_per_step: float
    """Of one of the task's batches."""

    def __post_init__(self) -> None:
        if self.params < 1:
            raise ConfigError(f"a task trains at least one parameter, got {self.params}")
        if not self.tokens_per_step >= 0:
            raise ConfigError(f"a step has no fewer than 0 tokens, got {self.tokens_per_step}")


@lru_cache(maxsize=16)
def ground_of(task: str, options: str) -> Ground:
    """For a task and its options (canonical JSON text), as they are now; remembered for as long as the process lives.

    Builds the model once, and one batch. Raises ConfigError as `load_task` does.
    """
    loaded = load_task(task, json.loads(options))
    model = loaded.build_model()
    theta_d = torch.empty(schema_of(model).numel)
    read_parameters(model, theta_d)
    digest = getattr(loaded, "data_digest", None)
    return Ground(
        package=_package(),
        task=_source(loaded),
        data=str(digest()) if callable(digest) else "",
        start=hashlib.sha256(theta_d.numpy().tobytes()).hexdigest(),
        versions=", ".join(
            [
                f"Python {platform.python_version()}",
                f"torch {torch.__version__}",
                f"numpy {np.__version__}",
                f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            ]
        ),
        params=theta_d.numel(),
        tokens_per_step=_tokens_per_step(loaded),
    )


@lru_cache(maxsize=1)
def _package() -> str:
    root, digest = Path(farflung.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _source(task: Task) -> str:
    try:
        path = Path(inspect.getfile(type(task)))
    except TypeError:
        raise ConfigError(
            f"the task's source cannot be found, so a trajectory would not notice an edit: put it into a file, "
            f"got {type(task).__name__}"
        ) from None
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tokens_per_step(task: Task) -> float:
    """The same batch that training fidelity charges members with a GPU for."""
    me = PeerId(bytes(20))
    view = RoundView(bytes(32), 1, bytes(32), me, (me,))
    batch = next(iter(task.batches(Sharder(lambda: view))))
    return float(getattr(task, "tokens", count_tokens)(batch))
