"""A task in which every step that was ever taken can be found again: it counts, and learns nothing.

Each member owns a stretch of `SERIALS` parameters. Its step number s adds 1 to parameter s of its stretch, so an update
holds -1 exactly where one of its steps is, and every sum of updates can be read like a tally.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from farflung.node.data import Sharder
from farflung.sim.explore.schedule import MEMBERS_MAX

SERIALS = 256
"""Steps of one member that can be told apart; later ones leave no trace. Explored worlds end long before."""

WIDTH = MEMBERS_MAX * SERIALS
"""Parameters: 6 KB a payload, so that payloads are transfers and not small messages."""

Floats = NDArray[np.float32]


class Tally(nn.Module):
    """Parameters and nothing else, zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))


class TallyTask:
    """One member's. `next_serial()` says which step this is, and remembers that it was taken."""

    def __init__(self, member: int, next_serial: Callable[[], int]) -> None:
        self._start, self._next_serial = member * SERIALS, next_serial

    def build_model(self) -> nn.Module:
        """Nothing counted yet."""
        return Tally()

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """One whose step counts."""
        return _Counting(model, self._count)

    def batches(self, shard: Sharder) -> Iterator[int]:
        """There is no data."""
        while True:
            yield 0

    def loss(self, model: nn.Module, batch: int) -> Tensor:
        """Zero."""
        return torch.zeros((), requires_grad=True)

    def tokens(self, batch: int) -> int:
        """One."""
        return 1

    def _count(self, parameter: Tensor) -> None:
        serial = self._next_serial()
        if serial < SERIALS:
            parameter[self._start + serial] += 1.0


class _Counting(torch.optim.Optimizer):
    def __init__(self, model: nn.Module, count: Callable[[Tensor], None]) -> None:
        super().__init__(model.parameters(), {"lr": 1.0})
        self._count = count

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        (parameter,) = self.param_groups[0]["params"]
        self._count(parameter)


def read_payload(payload: bytes) -> Floats:
    """The update in an fp32 payload, read without the codec: WIDTH little-endian numbers and nothing else."""
    return np.frombuffer(payload, "<f4")


def serials_in(update_d: Floats, member: int) -> list[int]:
    """The steps of one member that an update, or what a model is ahead of its anchor, holds."""
    own = update_d[member * SERIALS : (member + 1) * SERIALS]
    return [int(serial) for serial in np.flatnonzero(np.abs(own) > 0.5)]


def strange_in(update_d: Floats, member: int) -> bool:
    """Whether an update holds anything but whole single steps of one member."""
    rest = np.abs(update_d)
    own = rest[member * SERIALS : (member + 1) * SERIALS].copy()
    rest = np.concatenate([rest[: member * SERIALS], rest[(member + 1) * SERIALS :]])
    near = np.minimum(np.abs(own), np.abs(own - 1.0))
    return bool((near > 0.01).any() or (rest > 0.01).any())
