"""Where codecs that write run after run take their numbers, and whom they tell what became of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from farflung.compression.codec import Row
from farflung.compression.kernels import Floats, fastest
from farflung.protocol.rows import DenseRow


class Source(Protocol):
    """A vector to be written. Every coordinate is asked for once, in any order, on several threads."""

    @property
    def listens(self) -> bool:
        """Whether `give` wants to be called."""

    def take(self, start: int, stop: int) -> Floats:
        """The numbers to write."""

    def give(self, start: int, stop: int, row: Row) -> None:
        """What they decode to, while they are in the cache."""


class Vector(NamedTuple):
    """An update as it is; or, with an error e, beta e + update, made in e's memory, less what is then sent."""

    numbers: Callable[[int, int], Floats]
    error_d: Floats | None = None
    beta: np.float32 = np.float32(1)

    @property
    def listens(self) -> bool:
        """See `Source`."""
        return self.error_d is not None

    def take(self, start: int, stop: int) -> Floats:
        """See `Source`."""
        if self.error_d is None:
            return self.numbers(start, stop)
        window_d = self.error_d[start:stop]
        fastest().carry(window_d, self.numbers(start, stop), self.beta)
        return window_d

    def give(self, start: int, stop: int, row: Row) -> None:
        """See `Source`."""
        if self.error_d is not None:
            take_away(self.error_d[start:stop], row)


def numbers_of(update_d: Tensor) -> Callable[[int, int], Floats]:
    """(start, stop) -> that part of a vector as numpy: a view on the CPU, a copy of just that part from a GPU."""
    if update_d.device.type == "cpu":
        whole_d: Floats = update_d.detach().contiguous().numpy()
        return lambda start, stop: whole_d[start:stop]
    return lambda start, stop: update_d[start:stop].detach().cpu().contiguous().numpy()


def take_away(window_d: Floats, row: Row) -> None:
    """window -= row, in place."""
    if isinstance(row, DenseRow):
        window_d -= row.value_d.numpy()
    else:
        fastest().take_away(window_d, row.index_k.numpy(), row.value_k.numpy())
