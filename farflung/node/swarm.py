"""What a training loop holds: `step()` after every optimiser step, and the swarm does the rest.

    swarm = farflung.join(invite, model, optimizer)
    for batch in swarm.shard(dataset):
        model(batch).loss.backward(); optimizer.step(); optimizer.zero_grad()
        swarm.step(tokens=batch.numel())
    swarm.leave()

Training owns the calling thread; the node's loop owns another.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from farflung.node.data import MapDataset, RoundView, Shard
from farflung.node.learner import Learner
from farflung.node.mailbox import Mailbox, Notice
from farflung.node.member import Member

WAIT_S = 0.5
"""How long one wait for a notice lasts, so that Ctrl-C is noticed between two."""


class Swarm(Learner):
    """A member as its training loop sees it. Made by `farflung.join`; use it in a `with` block, or call `leave`."""

    def __init__(self, member: Member, model: nn.Module, on_adopt: Callable[[RoundView], None] | None = None) -> None:
        super().__init__(member.genesis, member.anchor, model, on_adopt)
        self._member = member
        self._mailbox: Mailbox = member.mailbox
        self._no_notice = member.mailbox.empty
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
            self._losses = loss
        if self._steps >= self._due or not self._no_notice():
            self._turn()

    def shard(
        self, dataset: MapDataset, *, batch: int | None = None, collate: Callable[[Any], Any] | None = None
    ) -> Shard:
        """This member's share of a map-style dataset: disjoint from the other members' in every round."""
        return Shard(dataset, self.view, batch=batch, collate=collate)

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
                self._take(notice)
            if not self.is_due:
                return
            self._member.local_result(self.result())
            self._wait_while(lambda: self._sent)

    def _await_first_anchor(self) -> None:
        self._wait_while(lambda: self._view is None)

    def _wait_while(self, waiting: Callable[[], bool]) -> None:
        while waiting() and not self.finished:
            if (notice := self._mailbox.take(WAIT_S)) is not None:
                self._take(notice)
            else:
                self._member.check()

    def _take(self, notice: Notice) -> None:
        try:
            self.obey(notice)
        except BaseException:
            if self.finished:
                self._member.close(polite_s=0.0)
            raise
