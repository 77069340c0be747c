"""How a running `farflung join` is shown: a live footer on a terminal, otherwise lines that say why it waits."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live

from farflung.node.display import doing_text, member_panel
from farflung.node.joining import Joining
from farflung.node.logs import logging_to

log = logging.getLogger(__name__)

FRAMES_PER_S = 4.0
LOOK_S = 1.0
SAY_AFTER_S = 5.0
"""A wait is worth a line when it is this long ..."""
SAY_AGAIN_S = 30.0
"""... and again after this."""


@contextmanager
def show(joining: Joining, *, plain: bool, as_json: bool) -> Iterator[None]:
    """Show a joining while the block lasts."""
    if as_json or plain or not sys.stdout.isatty():
        with logging_to(None, as_json=as_json), _saying_why(joining):
            yield
        return
    console = Console()
    with (
        logging_to(console),
        Live(
            console=console,
            refresh_per_second=FRAMES_PER_S,
            get_renderable=lambda: member_panel(joining.status(), joining.progress.view()),
            transient=True,
        ),
    ):
        yield


@contextmanager
def _saying_why(joining: Joining) -> Iterator[None]:
    stop = threading.Event()
    watch = threading.Thread(target=_watch, args=(joining, stop), name="farflung why", daemon=True)
    watch.start()
    try:
        yield
    finally:
        stop.set()
        watch.join()


def _watch(joining: Joining, stop: threading.Event) -> None:
    """Say why nothing happens, once it has lasted."""
    last, waited_s, said_s = (0, ""), 0.0, 0.0
    while not stop.wait(LOOK_S):
        status, train = joining.status(), joining.progress.view()
        now = (int(status.get("round", 0)), str(status.get("phase", "")))
        waited_s = waited_s + LOOK_S if now == last else 0.0
        said_s = said_s if now == last else 0.0
        last = now
        why = doing_text(status, train)
        if why != "training" and waited_s >= (said_s + SAY_AGAIN_S if said_s else SAY_AFTER_S):
            said_s = waited_s
            log.info(why, extra={"round": now[0], "reason": why, "peer": str(status.get("peer", ""))[:8]})
