"""A node in its thread: what `farflung.join` starts and the training thread talks to."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack
from typing import Any

from farflung.node.anchor import Anchor
from farflung.node.mailbox import LocalResult, Mailbox, Stop
from farflung.node.replica import Replica
from farflung.node.report import describe
from farflung.node.shell import Node
from farflung.protocol.errors import LocalError
from farflung.protocol.genesis import Genesis

log = logging.getLogger(__name__)

HARD_STOP_S = 5.0
"""How long closing connections and files may take once nobody needs to be told any more."""

Open = Callable[[AsyncExitStack, Mailbox], Awaitable[Node]]
"""Builds a started node; what it opens it leaves to the exit stack, in the order in which it must be closed."""


class Member:
    """Owns one daemon thread with one event loop, in which one node lives until it has left.

    `open_node` runs in that thread. Raises what it raises.
    """

    def __init__(self, open_node: Open) -> None:
        self.mailbox = Mailbox()
        self._open_node = open_node
        self._ready: Future[Node] = Future()
        self._main_task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="farflung node", daemon=True)
        self._thread.start()
        try:
            self.node = self._ready.result()
        except BaseException:
            self._cancel()
            self._thread.join(HARD_STOP_S)
            raise

    @property
    def genesis(self) -> Genesis:
        """The run."""
        return self.node.genesis

    @property
    def anchor(self) -> Anchor | Replica:
        """What training stands on: the agreed state, or where members mix this member's own; read θ under its lock."""
        return self.node.held

    def local_result(self, result: LocalResult) -> None:
        """Hand over the end of a local phase."""
        self._call(lambda: self.node.local_result(result))

    def status(self) -> dict[str, Any]:
        """What the node is doing, and why it waits."""
        return describe(self.node)

    def check(self) -> None:
        """Raise LocalError if the node's thread is gone without a word."""
        if not self._thread.is_alive() and self.mailbox.empty():
            raise LocalError("the node's thread has ended")

    def close(self, *, polite_s: float) -> None:
        """Ask to be released, wait at most `polite_s`, then close everything. Calling it again does nothing."""
        if polite_s > 0 and self._thread.is_alive():
            self._call(self.node.leave)
            self._thread.join(polite_s)
        if self._thread.is_alive():
            self._cancel()
            self._thread.join(HARD_STOP_S)
        if self._thread.is_alive():
            log.warning("the node did not close within %.0f s", HARD_STOP_S)

    def _call(self, function: Callable[[], object]) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            try:
                loop.call_soon_threadsafe(function)
            except RuntimeError:
                log.debug("the node's loop has just closed")

    def _cancel(self) -> None:
        if self._main_task is not None:
            self._call(self._main_task.cancel)

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except asyncio.CancelledError:
            self._finish(None)
        except BaseException as error:
            self._finish(error)
        else:
            self._finish(None)

    def _finish(self, error: BaseException | None) -> None:
        if not self._ready.done():
            self._ready.set_exception(error or LocalError("the node ended while it was being opened"))
        self.mailbox.post(Stop(error))

    async def _live(self) -> None:
        self._loop, self._main_task = asyncio.get_running_loop(), asyncio.current_task()
        async with AsyncExitStack() as stack:
            node = await self._open_node(stack, self.mailbox)
            self._ready.set_result(node)
            await node.run()
