"""The training side of a member without its waiting: what a local phase counts, sends and adopts.

`Swarm` waits in a training thread; the simulator waits in virtual time. Both are this, told what to do by notices. One
vector of length d is kept here: φ_start while training, and the pseudo-gradient Δ = φ_start − φ from the end of the
local phase until the next anchor is adopted. φ_start is what the model really held: after rounding to its dtypes, and
ahead of θ by the member's own unsent progress where the codec says so (DESIGN §3).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from farflung.node.anchor import Anchor
from farflung.node.data import RoundView
from farflung.node.flat import adopt, adopt_copy, difference_and_norm, shift_parameters, write_parameters
from farflung.node.mailbox import Adopt, Hurry, LocalResult, Notice, Stop
from farflung.node.replica import Replica
from farflung.protocol.genesis import Genesis


class Learner:
    """A model between anchors. `now_s` is only used to say how long a local phase took."""

    def __init__(
        self,
        genesis: Genesis,
        anchor: Anchor | Replica,
        model: nn.Module,
        on_adopt: Callable[[RoundView], None] | None = None,
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._genesis, self._anchor, self._model, self._on_adopt, self._now_s = genesis, anchor, model, on_adopt, now_s
        self._start_d = torch.empty(genesis.schema.numel)
        self._view: RoundView | None = None
        self._steps = self._tokens = 0
        self._due = genesis.inner_steps
        self._losses: float | torch.Tensor | None = 0.0
        self._began_s = now_s()
        self._sent = False
        self.finished = False
        """The run is over, or this member has left: the anchor of the last round is in the model."""

    def view(self) -> RoundView | None:
        """The round being trained; None when the run is over."""
        return None if self.finished else self._view

    @property
    def round_index(self) -> int:
        """The round being trained."""
        return self._view.round_index if self._view else 0

    @property
    def global_step(self) -> int:
        """The certified step that learning-rate schedules follow: rounds that trained x H, plus local steps."""
        trained = self._view.trained if self._view else 0
        return trained * self._genesis.inner_steps + self._steps

    @property
    def is_due(self) -> bool:
        """Whether the local phase is over and its result has not been taken yet."""
        return self._view is not None and not self._sent and not self.finished and self._steps >= self._due

    @property
    def waits(self) -> bool:
        """Whether there is nothing to train: no anchor yet, or an update that waits for its round."""
        return self._view is None or self._sent

    def count(self, tokens: int, loss: float | torch.Tensor | None) -> None:
        """One optimiser step was taken."""
        self._steps += 1
        self._tokens += tokens
        if loss is not None:
            self._losses = loss

    def result(self) -> LocalResult:
        """End the local phase. The Δ in it is lent until the next adoption."""
        norm = difference_and_norm(self._start_d, self._model)
        loss = float(self._losses) if self._losses is not None else math.nan
        took_s = self._now_s() - self._began_s
        self._sent = True
        return LocalResult(self.round_index, self._start_d, norm, self._steps, self._tokens, loss, took_s)

    def obey(self, notice: Notice) -> None:
        """Do what the node says. Raises the error that ended it, if one did."""
        match notice:
            case Adopt(view, keep, ahead_d):
                if self._view is None or view.round_index > self._view.round_index:
                    self._adopt(view, ahead_d, keep=keep)
            case Hurry(round_index):
                if round_index == self.round_index and not self._sent:
                    self._due = max(1, self._steps)
            case Stop(error):
                self.finished = True
                if error is not None:
                    raise error

    def _adopt(self, view: RoundView, ahead_d: torch.Tensor | None, *, keep: bool) -> None:
        """Take the new anchor into the model: plainly, or keeping what the others have not got."""
        plainly = self._view is None or not keep
        with self._anchor.lock:
            theta_d = self._anchor.theta_d
            if not plainly and self._sent:  # Δ = φ_start − φ was not sent: φ ← new start − Δ
                torch.sub(theta_d, self._start_d, out=self._start_d)
                if ahead_d is not None:
                    self._start_d.sub_(ahead_d)
                write_parameters(self._model, self._start_d)
            elif not plainly:
                shift_parameters(self._model, theta_d, self._start_d, ahead_d)
            if plainly and ahead_d is None:
                adopt_copy(self._model, theta_d, self._start_d)
            elif ahead_d is None:
                self._start_d.copy_(theta_d)
            else:
                torch.sub(theta_d, ahead_d, out=self._start_d)
        if plainly:
            if ahead_d is not None:
                adopt(self._model, self._start_d, self._start_d)
            self._steps = self._tokens = 0
        self._view, self._sent, self._due = view, False, self._genesis.inner_steps
        self._began_s = self._now_s()
        if self._on_adopt is not None:
            self._on_adopt(view)

    @contextmanager
    def at_anchor(self) -> Iterator[bool]:
        """In this block the model holds θ, if it stands at the start of a local phase; yields whether it does.

        With a codec that looks ahead the start is not θ: the model then gets θ, and afterwards what it held.
        """
        moved, there = False, self._view is not None and self._steps == 0 and not self._sent
        if there:
            with self._anchor.lock:
                there = self._anchor.round_index == self.round_index - 1  # or the next one is there already
                moved = there and not torch.equal(self._start_d, self._anchor.theta_d)
                if moved:
                    write_parameters(self._model, self._anchor.theta_d)
        try:
            yield there
        finally:
            if moved:
                write_parameters(self._model, self._start_d)
