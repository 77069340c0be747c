"""`farflung demo`: a real swarm on this machine. Every member is a process of its own with its own home; they find each
other through the hivemind DHT and exchange over gRPC, as they would on four machines.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from farflung.node.fleet import LISTEN, Child, DemoFailed, Fleet
from farflung.node.founding import Founded, found_run
from farflung.node.run_file import RunFile
from farflung.node.store import open_home
from farflung.protocol.errors import ConfigError
from farflung.protocol.genesis import Timing


@dataclass(frozen=True)
class DemoSettings:
    """A small GPT, few members, and so many rounds that something is learned within minutes on two cores."""

    members: int = 4
    rounds: int = 60
    inner_steps: int = 30
    mode: str = "gather"
    codec: str = ""
    outer: str = ""
    layers: int = 2
    width: int = 64
    context: int = 64
    batch: int = 16
    lr: float = 4e-3
    kill: bool = False
    baseline: bool = False
    plain: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.members < 2:
            raise ConfigError(f"a swarm has at least 2 members, got {self.members}")
        if self.rounds < 1 or self.inner_steps < 1:
            raise ConfigError(f"rounds and inner steps must be at least 1, got {self.rounds} and {self.inner_steps}")

    def run_file(self) -> RunFile:
        """The run. Members wait for each other at the start, so that all train on the same rounds."""
        steps = self.rounds * self.inner_steps
        options = {name: getattr(self, name) for name in ("layers", "width", "context", "batch", "lr")}
        return RunFile(
            name="demo",
            task_options={**options, "warmup": 20, "decay_steps": steps},
            mode=self.mode,
            codec=self.codec,
            outer=self.outer,
            inner_steps=self.inner_steps,
            rounds=self.rounds,
            start_members=self.members,
            timing=Timing(deadline_ceiling_ms=60_000, resend_ms=500),
        )


def run_demo(settings: DemoSettings, *, json_path: Path | None = None) -> int:
    """Found, start, watch, check and report. Returns the exit status; 1 if a member failed or states differ."""
    from farflung.node.demo_report import report

    console = Console(highlight=False)
    folder = _make_folder(settings.out)
    began_s = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(_terminate_as_interrupt())
        founded = found_run(settings.run_file(), open_home(folder / "member-0"), listen=LISTEN)
        fleet = stack.enter_context(Fleet(settings, founded, _children(settings, founded, folder), console))
        size = f"{founded.genesis.schema.numel:,} parameters, {settings.rounds} rounds of {settings.inner_steps} steps"
        console.print(f"run {founded.genesis.run_id.hex()[:8]}: {size}; everything is in {folder}")
        try:
            fleet.start()
            fleet.watch()
        except DemoFailed as failure:
            console.print(f"farflung: {failure}", markup=False)
            return 1
    return report(settings, founded, fleet.children, console, folder, time.monotonic() - began_s, json_path)


def _children(settings: DemoSettings, founded: Founded, folder: Path) -> list[Child]:
    threads = max(1, (os.cpu_count() or 1) // settings.members)
    children = []
    for index in range(settings.members):
        home = folder / f"member-{index}"
        home.mkdir(exist_ok=True)
        children.append(Child(f"node-{index}", home, home / "runs" / founded.genesis.run_id.hex(), threads))
    return children


def _make_folder(out: Path | None) -> Path:
    if out is None:
        return Path(tempfile.mkdtemp(prefix="farflung-demo-"))
    if (out / "member-0").exists():
        raise ConfigError(f"there is a demo in {out} already; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot use {out}: {error.strerror}") from None
    return out.absolute()


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: with all its members."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
