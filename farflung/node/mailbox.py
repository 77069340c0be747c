"""Between the two threads of a member: training owns the main thread, the node's loop owns another."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from farflung.node.data import RoundView


@dataclass(frozen=True, slots=True)
class LocalResult:
    """From training: this member's local phase of a round is over. `delta_d` is lent until the answer comes."""

    round_index: int
    delta_d: Tensor
    norm: float
    """The Euclidean norm of `delta_d` (`aggregation.outer.norm`); NaN or infinite if that is not finite."""
    steps: int
    tokens: int
    loss: float
    train_s: float


@dataclass(frozen=True, slots=True)
class Adopt:
    """To training: there is a new anchor. `keep`: what was not sent stays in the parameters (DESIGN §3).

    `ahead_d`: start from θ − ahead instead of θ (`Codec.ahead`). It is a view of the codec's private state, lent until
    training hands over the result of this very round: nothing is encoded, and so nothing changes it, before that.
    """

    view: RoundView
    keep: bool
    ahead_d: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Hurry:
    """To training: a quorum waits; send what you have of this round."""

    round_index: int


@dataclass(frozen=True, slots=True)
class Stop:
    """To training: the node has ended. `error` is what to raise, if it did not end well."""

    error: BaseException | None = None


Notice: TypeAlias = Adopt | Hurry | Stop


class Mailbox:
    """Notices for the training thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Notice] = queue.SimpleQueue()
        self.empty = self._queue.empty
        """Whether there is nothing to take; this is what the training thread's hot path asks."""

    def post(self, notice: Notice) -> None:
        """Called by the node's loop."""
        self._queue.put(notice)

    def take(self, timeout_s: float) -> Notice | None:
        """Called by the training thread: the next notice, or None when there is none in time."""
        try:
            return self._queue.get(timeout=timeout_s) if timeout_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
