"""Ctrl-C and SIGTERM: the first asks to leave politely, the second stops at once.

The first interrupts only where the training thread waits for others: a step in progress is finished, so what is saved
is whole.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

HANDLED = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
"""Exit status after a second Ctrl-C, as shells expect it."""


class Leave(BaseException):
    """The first signal came while waiting."""


class StopNow(BaseException):
    """The second signal came."""


class Signals:
    """In force inside its `with` block, in the main thread. `leaving` is true from the first signal on."""

    def __init__(self) -> None:
        self.leaving = False
        self._waiting = False
        self.stopping = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._on_signal) for number in HANDLED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Here the first signal raises Leave."""
        self._waiting = True
        try:
            if self.leaving:
                raise Leave
            yield
        finally:
            self._waiting = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            os._exit(INTERRUPTED)  # the third: not even cleaning up may take any longer
        if self.leaving:
            self.stopping = True
            raise StopNow
        self.leaving = True
        if self._waiting:
            self._waiting = False
            raise Leave
