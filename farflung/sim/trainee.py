"""Local training in virtual time: real steps of a real model, each taking as long as this member's machine would."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from torch import nn

from farflung.node.data import RoundView, Sharder
from farflung.node.flat import refuse_master_copies
from farflung.node.learner import Learner
from farflung.node.mailbox import LocalResult, Mailbox, Notice, Stop
from farflung.node.shell import Node
from farflung.node.tasks.task import Task, count_tokens
from farflung.node.trainer import REWARM_STEPS, Trainer, TrainerSettings
from farflung.sim.clock import SimClock


class NoticeBox(Mailbox):
    """A mailbox that a task can wait at."""

    def __init__(self) -> None:
        super().__init__()
        self.news = asyncio.Event()

    def post(self, notice: Notice) -> None:
        """From the node."""
        super().post(notice)
        self.news.set()

    def post_stop(self) -> None:
        """The node has ended."""
        self.post(Stop())


class Trainee:
    """Trains one member's model until the run is over. `step_s(now_s)` draws how long the next step takes.

    `change` may alter what is sent and `before` delay it: that is where attackers live. `adopted` is told of every
    anchor, `over` of every local phase. `data` stands for the run in the choice of samples, and the number of rounds
    trained for the certificate: what is learned then depends on who took part, and on nothing else of the network.
    """

    def __init__(
        self,
        node: Node,
        box: NoticeBox,
        task: Task,
        model: nn.Module,
        clock: SimClock,
        *,
        seed: int,
        step_s: Callable[[float], float],
        data: bytes,
        change: Callable[[LocalResult], LocalResult] | None = None,
        before: Callable[[LocalResult], Awaitable[None]] | None = None,
        adopted: Callable[[RoundView], None] | None = None,
        over: Callable[[LocalResult], None] | None = None,
    ) -> None:
        self._node, self._box, self._task, self._model, self._clock = node, box, task, model, clock
        self._seed, self._step_s, self._change, self._over = seed, step_s, change, over
        self._adopted, self._before, self._data = adopted, before, data
        self._shown: tuple[RoundView | None, RoundView | None] = (None, None)
        self.learner = Learner(node.genesis, node.held, model, self._on_adopt, now_s=clock.now_s)
        self.trainer: Trainer | None = None
        self.train_s = 0.0
        """Spent in steps so far."""

    def _on_adopt(self, view: RoundView) -> None:
        if self.trainer is not None:
            self.trainer.global_step = self.learner.global_step
        if self._adopted is not None:
            self._adopted(view)

    async def run(self) -> None:
        """Train. Returns when the run is over; raises what ended the node."""
        learner, box = self.learner, self._box
        while True:
            box.news.clear()
            while not learner.finished and (notice := box.take(0.0)) is not None:
                learner.obey(notice)
            if learner.finished:
                return
            if learner.is_due:
                await self._send()
            elif learner.waits:
                await box.news.wait()
            else:
                await self._step()

    async def _step(self) -> None:
        if self.trainer is None:
            self.trainer = self._make_trainer()
        began_s = self._clock.now_s()
        try:
            result = self.trainer.train_step()
        except StopIteration:  # no more batches: the real loop leaves as well
            self.learner.finished = True
            self._node.leave()
            return
        await asyncio.sleep(self._step_s(began_s))
        self.train_s += self._clock.now_s() - began_s
        if result.counted:
            self.learner.count(result.tokens, result.loss)

    async def _send(self) -> None:
        result = self.learner.result()
        if self._over is not None:
            self._over(result)
        if self._before is not None:
            await self._before(result)
        self._node.local_result(self._change(result) if self._change is not None else result)

    def _view(self) -> RoundView | None:
        """The round as the choice of samples sees it; the same object while it lasts."""
        real, shown = self.learner.view(), self._shown
        if shown[0] is not real:
            trained = real.trained if real is not None else 0
            mine = real._replace(run_id=self._data, certificate=b"round %d" % trained) if real is not None else None
            self._shown = shown = (real, mine)
        return shown[1]

    def _make_trainer(self) -> Trainer:
        task: Any = self._task
        optimizer = task.build_optimizer(self._model)
        trainer = Trainer(
            self._model,
            optimizer,
            task.loss,
            iter(task.batches(Sharder(self._view))),
            settings=TrainerSettings(device="cpu", seed=self._seed),
            lr_at=getattr(task, "lr_at", None),
            tokens=getattr(task, "tokens", count_tokens),
        )
        trainer.global_step = self.learner.global_step
        if trainer.global_step > 0:
            trainer.rewarm(REWARM_STEPS)
        refuse_master_copies(optimizer, self._model)
        return trainer
