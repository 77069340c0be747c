"""How training goes, for people: `train.json` beside the node's `status.json`, and whether its process still runs.

Losses are means over a round's local steps; validation losses are of θ, the state after a round. Both histories keep
their shape at any length: beyond HISTORY_MAX every second old entry is dropped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farflung.node.durable import room

if TYPE_CHECKING:
    from torch import Tensor

FILE = "train.json"
HISTORY_MAX = 512
WRITE_S = 0.5
"""How often the file is replaced while steps are taken."""

SILENT_S = 15.0
"""A node whose status is older than this has a problem: it writes one every second."""


@dataclass
class Progress:
    """What one member's training loop counts. `note_*` are called by the training thread; any thread may read."""

    directory: Path
    inner_steps: int = 0
    rounds: int = 0
    """Of the run; 0: no end."""
    device: str = ""
    parameters: int = 0
    round: int = 0
    step: int = 0
    """Within the round."""
    global_step: int = 0
    tokens: int = 0
    tokens_per_s: float = 0.0
    loss: float | None = None
    """Mean over this round so far."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation_loss: float | None = None
    validation: list[tuple[int, float]] = field(default_factory=list)
    """(round, loss of θ after it)"""
    ended: str = ""
    """Why training is over; empty while it goes on."""
    unix_ms: int = 0

    def __post_init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self._round_tokens, self._round_s = 0, 0.0
        self._seen_s = self._written_s = time.monotonic()

    @classmethod
    def resume(cls, directory: Path) -> Progress:
        """With the histories of an earlier process, if there was one."""
        before = read_progress(directory) or {}
        pairs = {name: [(int(at), float(loss)) for at, loss in before.get(name, [])] for name in _HISTORIES}
        last = pairs["validation"][-1][1] if pairs["validation"] else None
        return cls(directory, losses=pairs["losses"], validation=pairs["validation"], validation_loss=last)

    def note_step(self, loss: Tensor, tokens: int) -> None:
        """One counted optimiser step. Waits for the device only when the file is due."""
        now_s = time.monotonic()
        self._round_s, self._seen_s = self._round_s + now_s - self._seen_s, now_s
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1
        self.step += 1
        self.global_step += 1
        self.tokens += tokens
        self._round_tokens += tokens
        if now_s - self._written_s >= WRITE_S:
            self.write()

    def note_adoption(self, round_index: int, global_step: int) -> None:
        """A round begins: close the books of the one before."""
        self._settle()
        if self._count and self.loss is not None:
            _append(self.losses, (self.round, self.loss))
        self.round, self.global_step = round_index, global_step
        self.step = self._count = self._round_tokens = 0
        self._round_s, self._sum = 0.0, None
        self.write()

    def note_return(self) -> None:
        """Back to training: the time since the last step, of waiting and evaluating, is not training's."""
        self._seen_s = time.monotonic()

    def note_validation(self, round_index: int, loss: float) -> None:
        """θ after a round was evaluated."""
        self.validation_loss = loss
        if not self.validation or self.validation[-1][0] != round_index:
            _append(self.validation, (round_index, loss))
        self.write()

    def write(self) -> None:
        """Replace train.json. Not synced: it is of now."""
        self._settle()
        self._written_s = time.monotonic()
        self.unix_ms = time.time_ns() // 1_000_000
        path = self.directory / FILE
        temporary = path.with_name(f"{FILE}.tmp")
        with room(path):
            temporary.write_text(json.dumps(self.view()))
            os.replace(temporary, path)

    def view(self) -> dict[str, Any]:
        """What is in the file."""
        return {key: value for key, value in asdict(self).items() if key != "directory"}

    def _settle(self) -> None:
        if self._count and self._sum is not None:
            self.loss = float(self._sum) / self._count
            self.tokens_per_s = self._round_tokens / max(self._round_s, 1e-9)


_HISTORIES = ("losses", "validation")


def _append(history: list[tuple[int, float]], entry: tuple[int, float]) -> None:
    if len(history) >= HISTORY_MAX:
        del history[1 : HISTORY_MAX // 2 : 2]
    history.append(entry)


def read_progress(directory: Path) -> dict[str, Any] | None:
    """What a training loop last wrote; None if there is nothing to read."""
    try:
        value = json.loads((directory / FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def describe_life(status: Mapping[str, Any], train: Mapping[str, Any], now_ms: int) -> str:
    """ "running", or how it ended: a clean end says so itself, a killed process cannot."""
    if train.get("ended"):
        return str(train["ended"])
    pid = int(status.get("pid", 0))
    if not pid:
        return "not joined from here yet"
    if not pid_runs(pid):
        return f"gone: process {pid} was killed or crashed; `farflung join` resumes it"
    silent_s = (now_ms - int(status.get("unix_ms", 0))) / 1e3
    return "running" if silent_s < SILENT_S else f"silent for {silent_s:.0f} s (process {pid} is there)"


def pid_runs(pid: int) -> bool:
    """Whether there is such a process, and it is not a zombie."""
    import psutil

    try:
        return pid > 0 and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
