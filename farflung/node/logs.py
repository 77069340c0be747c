"""What a command says while it runs: lines for people, or one JSON object per line for machines."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

QUIET_LIBRARIES = {"GRPC_VERBOSITY": "ERROR", "GLOG_minloglevel": "2", "HIVEMIND_LOGLEVEL": "ERROR"}
"""Libraries that write to stderr by themselves; whoever set these variables keeps what was set."""


class PlainFormatter(logging.Formatter):
    """`21:36:02 round 7: 4 payloads of 4 members, 4 votes`; the level only where it is not INFO."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{clock} {level}{_message(record)}"


class JsonFormatter(logging.Formatter):
    """One object per line with exactly these keys: time, level, peer, round, reason, message."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps(
            {
                "time": time.replace("+00:00", "Z"),
                "level": record.levelname.lower(),
                "peer": getattr(record, "peer", None),
                "round": getattr(record, "round", None),
                "reason": getattr(record, "reason", None),
                "message": _message(record),
            }
        )


class ConsoleHandler(logging.Handler):
    """Prints above a live display instead of through it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        try:
            self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


def hush_libraries() -> None:
    """Call before grpc or hivemind is imported."""
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)


@contextmanager
def logging_to(console: Console | None, *, as_json: bool = False, level: int = logging.INFO) -> Iterator[None]:
    """Send farflung's log to `console`, or to stdout without one, while the block lasts."""
    handler = ConsoleHandler(console) if console is not None else logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter())
    log = logging.getLogger("farflung")
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


def _message(record: logging.LogRecord) -> str:
    """The text in one line; an exception's last line is enough for a log."""
    text = record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        text = f"{text}: {type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
    return " ".join(text.split())
