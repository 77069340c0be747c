"""The demo's processes: one per member, watched until they end, and none of them left behind."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.live import Live

from farflung.node.display import Row, member_line, members_table
from farflung.node.founding import Founded
from farflung.node.p2pd import leashed
from farflung.node.progress import read_progress
from farflung.node.store import read_status
from farflung.protocol.errors import FarflungError
from farflung.protocol.invite import Invite, parse_invite

if TYPE_CHECKING:
    from farflung.node.demo import DemoSettings

LISTEN = "127.0.0.1:0"
LOOK_S = 0.5
SAY_S = 5.0
"""Between two blocks of lines where there is no terminal."""

FOUNDER_S = 90.0
"""How long the first member may take to be up: torch and hivemind are slow to import on a cold disk."""

STALL_S = 150.0
"""Without a round in this long something is wrong, and the demo says so."""

DOWN_S = 2.0
"""How long a killed member stays down."""

EVAL_ROUNDS = 2
STOP_S = 10.0
TAIL_LINES = 12


class DemoFailed(FarflungError):
    """A member ended badly; the message has its last words."""


@dataclass
class Child:
    """One member's process."""

    name: str
    home: Path
    run_directory: Path
    threads: int
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0

    @property
    def log(self) -> Path:
        """Everything it said."""
        return self.home / "log.txt"

    def start(self, *arguments: str) -> None:
        """Start `farflung join`; its output goes to a file. It dies with this process, however that ends."""
        count = str(self.threads)
        threads = {f"{library}_NUM_THREADS": count for library in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
        command = [sys.executable, "-m", "farflung", "join", *arguments, "--home", str(self.home)]
        command += ["--name", self.name, "--listen", LISTEN, "--plain", "--device", "cpu", "--threads", count]
        command += ["--eval-rounds", str(EVAL_ROUNDS)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                leashed(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C is for us: we say goodbye to each
            )

    @property
    def code(self) -> int | None:
        """Its exit status; None while it runs, and before it was started."""
        return None if self.process is None else self.process.poll()

    def row(self) -> Row:
        """What it is doing."""
        status, train = read_status(self.run_directory) or {}, read_progress(self.run_directory) or {}
        if self.process is None or status.get("pid") != self.process.pid:
            status, train = {"why": "starting" if self.process else "not started yet"}, {}
        life = "running" if self.code is None else "done" if self.code == 0 else f"ended with status {self.code}"
        return Row(self.name, status, train, life)

    def last_words(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])

    def kill(self) -> None:
        """As a power cut would."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@dataclass
class Fleet:
    """The members' processes. None outlives the `with` block."""

    settings: DemoSettings
    founded: Founded
    children: list[Child]
    console: Console
    notes: list[str] = field(default_factory=list)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        """Ask all to leave, then kill who has not."""
        running = [child.process for child in self.children if child.process and child.process.poll() is None]
        for process in running:
            process.terminate()
        end_s = time.monotonic() + STOP_S
        for process in running:
            try:
                process.wait(max(0.1, end_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self) -> None:
        """The founder with its invite, and the others with nothing but the addresses of its DHT node."""
        founder, *others = self.children
        founder.start(str(self.founded.invite))
        invite = parse_invite(self._founders_invite(founder))
        if not invite.dht:
            raise DemoFailed(f"{founder.name} has no DHT node:\n{founder.last_words()}")
        bare = Invite(invite.run_id, (), invite.dht, invite.secret)
        for child in others:
            child.start(str(bare), "--discovery", "dht")

    def _founders_invite(self, founder: Child) -> str:
        end_s = time.monotonic() + FOUNDER_S
        while time.monotonic() < end_s:
            self.check()
            if text := founder.row().status.get("invite"):
                return str(text)
            time.sleep(0.1)
        raise DemoFailed(f"{founder.name} did not start within {FOUNDER_S:.0f} s:\n{founder.last_words()}")

    def watch(self) -> None:
        """Until all have finished."""
        seen, seen_s = -1, time.monotonic()
        murder = _Murder(self) if self.settings.kill else None
        with self._shown() as show:
            while any(child.code is None for child in self.children):
                rows = [child.row() for child in self.children]
                show(rows)
                if murder is not None:
                    murder.look(rows)
                self.check()
                done = sum(int(row.status.get("trained", 0)) for row in rows)
                if done != seen:
                    seen, seen_s = done, time.monotonic()
                if time.monotonic() - seen_s > STALL_S:
                    raise DemoFailed(self._stalled(rows))
                time.sleep(LOOK_S)
            show([child.row() for child in self.children])
        self.check()

    def check(self) -> None:
        """Raises DemoFailed with a member's last words if it has ended badly."""
        for child in self.children:
            if child.code:
                raise DemoFailed(f"{child.name} ended with status {child.code}; its last words:\n{child.last_words()}")

    def _stalled(self, rows: list[Row]) -> str:
        return f"no round in {STALL_S:.0f} s:\n" + "\n".join(f"  {member_line(row)}" for row in rows)

    @contextmanager
    def _shown(self) -> Iterator[Callable[[list[Row]], None]]:
        title = f"{len(self.children)} members, each a process, found through the DHT"
        if not self.settings.plain and self.console.is_terminal:
            with Live(console=self.console, auto_refresh=False) as live:
                yield lambda rows: live.update(self._table(rows, title), refresh=True)
            return
        said_s = 0.0

        def say(rows: list[Row]) -> None:
            nonlocal said_s
            if time.monotonic() - said_s >= SAY_S:
                said_s = time.monotonic()
                for row in rows:
                    self.console.print(member_line(row), markup=False, highlight=False, soft_wrap=True)

        yield say

    def _table(self, rows: list[Row], title: str) -> RenderableType:
        caption = "\n".join([*self.notes, "Ctrl-C ends the demo"])
        return members_table(rows, width=self.console.width, title=title, caption=caption)

    def note(self, text: str) -> None:
        """Say something once."""
        self.notes.append(text)
        if self.settings.plain or not self.console.is_terminal:
            self.console.print(text, markup=False, highlight=False)


class _Murder:
    """Kills one member in the middle of the run, and starts it again from what is on its disk."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._at_round = max(2, fleet.settings.rounds // 2)
        self._victim: Child | None = None
        self._killed_s = 0.0

    def look(self, rows: list[Row]) -> None:
        """Do what is due."""
        if self._victim is None and min(int(row.status.get("trained", 0)) for row in rows) >= self._at_round:
            self._victim = random.choice(self._fleet.children)
            self._victim.kill()
            self._victim.process, self._killed_s = None, time.monotonic()
            self._fleet.note(f"kill -9 {self._victim.name}")
        elif self._victim and self._victim.process is None and time.monotonic() - self._killed_s > DOWN_S:
            self._victim.restarts += 1
            self._victim.start()
            self._fleet.note(f"{self._victim.name} starts again, from its disk")
