"""An executor without threads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

T = TypeVar("T")


class InlineExecutor(Executor):
    """Runs work at once; what it would have cost in time is charged to whoever waits for the result."""

    def work(self, function: Callable[..., T], *arguments: Any) -> T:
        """Do a piece of work now."""
        return function(*arguments)

    def charge(self) -> float:
        """Asked after each piece of work: the seconds it took in the world that is simulated."""
        return 0.0

    def submit(self, function: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        """Run now. The time is not charged: a concurrent.futures.Future cannot wait in virtual time."""
        future: Future[T] = Future()
        try:
            future.set_result(self.work(functools.partial(function, **named), *arguments))
        except Exception as error:
            future.set_exception(error)
        return future
