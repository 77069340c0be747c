"""What a training loop holds: `step()` after every optimiser step, and the swarm does the rest.

    swarm = farflung.join(invite, model, optimizer)
    for batch in swarm.shard(dataset):
        model(batch).loss.backward(); optimizer.step(); optimizer.zero_grad()
        swarm.step(tokens=batch.numel())
    swarm.leave()

Training owns the calling thread; the node's loop owns another. One vector of length d is kept here: φ_start while
training, and the pseudo-gradient Δ = φ_start − φ from the end of the local phase until the next anchor is adopted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from farflung.node.data import MapDataset, RoundView, Shard
from farflung.node.flat import adopt, difference_into, shift_parameters, write_parameters
from farflung.node.mailbox import Adopt, Hurry, LocalResult, Mailbox, Notice, Stop
from farflung.node.member import Member

WAIT_S = 0.5
"""How long one wait for a notice lasts, so that Ctrl-C is noticed between two."""


class Swarm:
    """A member as its training loop sees it. Made by `farflung.join`; use it in a `with` block, or call `leave`."""

    def __init__(self, member: Member, model: nn.Module, on_adopt: Callable[[RoundView], None] | None = None) -> None:
        self._member, self._model, self._on_adopt = member, model, on_adopt
        self._mailbox: Mailbox = member.mailbox
        self._no_notice = member.mailbox.empty
        self._start_d = torch.empty(member.genesis.schema.numel)
        self._view: RoundView | None = None
        self._steps = self._tokens = 0
        self._due = member.genesis.inner_steps
        self._losses = 0.0
        self._began_s = time.monotonic()
        self._sent = False
        self.finished = False
        """The run is over, or this member has left: the anchor of the last round is in the model."""
        self._await_first_anchor()

    # -- what the loop calls ------------------------------------------------------------------------------------------

    def step(self, tokens: int = 0, loss: float | torch.Tensor | None = None) -> None:
        """Count one optimiser step of `tokens` tokens; `loss` is only shown.

        Returns at once except at the end of a local phase, when it sends the update and waits for the round's result;
        then the model holds the new anchor. Raises what ended the node, if it ended badly.
        """
        self._steps += 1
        self._tokens += tokens
        if loss is not None:
            self._losses = loss  # type: ignore[assignment]
        if self._steps >= self._due or not self._no_notice():
            self._turn()

    def shard(
        self, dataset: MapDataset, *, batch: int | None = None, collate: Callable[[Any], Any] | None = None
    ) -> Shard:
        """This member's share of a map-style dataset: disjoint from the other members' in every round."""
        return Shard(dataset, self.view, batch=batch, collate=collate)

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
        return trained * self._member.genesis.inner_steps + self._steps

    @property
    def status(self) -> dict[str, Any]:
        """What the node is doing, and why it waits."""
        return self._member.status()

    def leave(self, deadline_s: float = 8.0) -> None:
        """Be released by the others, at most `deadline_s`, then close everything. Calling it again does nothing."""
        self.finished = True
        self._member.close(polite_s=deadline_s)

    def __enter__(self) -> Swarm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave(8.0 if kind in {None, KeyboardInterrupt} else 1.0)

    # -- the end of a local phase -------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Something is due: notices to take, or an update to send and its round to wait for."""
        while not self.finished:
            while (notice := self._mailbox.take(0.0)) is not None:
                self._obey(notice)
            if self.finished or self._steps < self._due:
                return
            self._send()
            while self._sent and not self.finished:
                if (notice := self._mailbox.take(WAIT_S)) is not None:
                    self._obey(notice)
                else:
                    self._member.check()

    def _send(self) -> None:
        difference_into(self._start_d, self._start_d, self._model)
        loss = float(self._losses) if self._losses is not None else math.nan
        now_s = time.monotonic()
        result = LocalResult(self.round_index, self._start_d, self._steps, self._tokens, loss, now_s - self._began_s)
        self._sent = True
        self._member.local_result(result)

    def _obey(self, notice: Notice) -> None:
        match notice:
            case Adopt(view, keep):
                if self._view is None or view.round_index > self._view.round_index:
                    self._adopt(view, keep=keep)
            case Hurry(round_index):
                if round_index == self.round_index and not self._sent and self._steps > 0:
                    self._due = self._steps
            case Stop(error):
                self.finished = True
                if error is not None:
                    self._member.close(polite_s=0.0)
                    raise error

    def _adopt(self, view: RoundView, *, keep: bool) -> None:
        """Take the new anchor into the model: plainly, or keeping what the others have not got."""
        first = self._view is None
        with self._member.anchor.lock:
            theta_d = self._member.anchor.theta_d
            if first or not keep:
                if adopt(self._model, theta_d, self._start_d) is theta_d:
                    self._start_d.copy_(theta_d)
            elif self._sent:
                # Δ = θ_old − φ was not sent: φ ← θ_new − Δ.
                torch.sub(theta_d, self._start_d, out=self._start_d)
                write_parameters(self._model, self._start_d)
                self._start_d.copy_(theta_d)
            else:
                shift_parameters(self._model, theta_d, self._start_d)
                self._start_d.copy_(theta_d)
        if first or not keep:
            self._steps = self._tokens = 0
        self._view, self._sent, self._due = view, False, self._member.genesis.inner_steps
        self._began_s = time.monotonic()
        if self._on_adopt is not None:
            self._on_adopt(view)

    def _await_first_anchor(self) -> None:
        while self._view is None and not self.finished:
            if (notice := self._mailbox.take(WAIT_S)) is not None:
                self._obey(notice)
            else:
                self._member.check()
