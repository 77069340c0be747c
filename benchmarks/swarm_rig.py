"""Real members in processes of their own, on hosts of `netns.py` or on loopback, and what they reported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from netns import Hosts
from report import console

from farflung.node.founding import Founded, found_run
from farflung.node.run_file import RunFile
from farflung.node.store import open_home

MEMBER = str(Path(__file__).with_name("member.py"))
Event = dict[str, Any]


class Rig:
    """A run among members 0 (the founder) to n-1. Use it in a `with` block."""

    def __init__(self, run: RunFile, hosts: Hosts | None, root: Path) -> None:
        self.hosts, self.root = hosts, root
        self.children: dict[int, subprocess.Popen[Any]] = {}
        home = open_home(root / "0")
        address = hosts.address(0) if hosts else "127.0.0.1"
        # In another namespace every port is free: 0 would probe the wrong one.
        listen = "127.0.0.1:0" if hosts is None else "0.0.0.0:4400"
        self.founded: Founded = found_run(run, home, listen=listen, announce=(f"{address}:4400",) if hosts else ())

    @property
    def invite(self) -> str:
        return str(self.founded.invite)

    def start(self, member: int, *, prefix: Sequence[str] = (), **options: Any) -> None:
        """Start a member; `options` as member.py reads them, `prefix` for taskset and the like."""
        if self.hosts is not None:
            listen = f"{self.hosts.address(member)}:4400"
        else:
            listen = self.founded.listen if member == 0 else "127.0.0.1:0"
        settings = {
            "home": str(self.root / str(member)),
            "invite": self.invite,
            "listen": listen,
            "name": f"m{member}",
            "events": str(self.events_path(member)),
            **options,
        }
        command = [*prefix, sys.executable, MEMBER, json.dumps(settings)]
        log = (self.root / f"{member}.log").open("w")
        start = self.hosts.start if self.hosts else lambda _, command, **how: subprocess.Popen(command, **how)
        self.children[member] = start(member, command, stdout=log, stderr=subprocess.STDOUT)

    def start_all(self, members: int, **options: Any) -> None:
        """Start members 0 to `members` - 1; the others knock when the founder listens."""
        self.start(0, **options)
        self.wait_until("the founder's start", lambda: of_kind(self.events(0), "opened"), 60)
        for member in range(1, members):
            self.start(member, **options)

    def events_path(self, member: int) -> Path:
        return self.root / f"{member}.jsonl"

    def events(self, member: int) -> list[Event]:
        """What a member reported so far."""
        path = self.events_path(member)
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def rounds(self, member: int) -> list[Event]:
        """A member's round log."""
        paths = list((self.root / str(member) / "runs").glob("*/rounds.jsonl"))
        return [json.loads(line) for line in paths[0].read_text().splitlines()] if paths else []

    def trained(self, member: int) -> list[Event]:
        """Rounds with payloads in a member's log."""
        return [entry for entry in self.rounds(member) if any(part["bytes"] for part in entry["payloads"].values())]

    def wait_until(self, what: str, holds: Any, seconds: float) -> None:
        """Poll until `holds()`; raises TimeoutError, with the ends of the logs, if it does not in time."""
        end_s = time.monotonic() + seconds
        while not holds():
            dead = {member: child.returncode for member, child in self.children.items() if child.poll()}
            if dead or time.monotonic() > end_s:
                raise TimeoutError(
                    f"{what}: {f'members ended: {dead}' if dead else f'not within {seconds:.0f} s'}\n{self.tails()}"
                )
            time.sleep(0.1)

    def wait_done(self, seconds: float) -> None:
        """Until every member has left by itself."""
        self.wait_until(
            "the run's end", lambda: all(child.poll() is not None for child in self.children.values()), seconds
        )

    def tails(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.root.glob("*.log")))

    def stop(self) -> None:
        for child in self.children.values():
            if child.poll() is None:
                child.terminate()
        for child in self.children.values():
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@contextmanager
def rig(run: RunFile, hosts: Hosts | None = None, *, keep: Path | None = None) -> Iterator[Rig]:
    """A rig in a temporary folder; `keep` receives the events and logs."""
    root = Path(tempfile.mkdtemp(prefix="farflung-bench-"))
    made = Rig(run, hosts, root)
    try:
        yield made
    finally:
        made.stop()
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            for path in [*root.glob("*.log"), *root.glob("*.jsonl")]:
                shutil.copy(path, keep / path.name)
        shutil.rmtree(root, ignore_errors=True)


def of_kind(events: Sequence[Event], *kinds: str) -> list[Event]:
    return [event for event in events if event["kind"] in kinds]


def longest_gaps(events: Sequence[Event], since_s: float, until_s: float) -> dict[str, float]:
    """Per peer, the longest time in which nothing was heard from it between two instants."""
    heard: dict[str, list[float]] = {}
    for event in of_kind(events, "heard"):
        if since_s <= event["t"] <= until_s:
            heard.setdefault(event["peer"], [since_s]).append(event["t"])
    return {peer: max(b - a for a, b in zip(at, [*at[1:], until_s], strict=True)) for peer, at in heard.items()}


def timeline(parts: Sequence[tuple[float, float, str]], *, width: int = 100) -> None:
    """Print (start, end, label) as bars under each other."""
    first, last = min(part[0] for part in parts), max(part[1] for part in parts)
    scale = width / max(last - first, 1e-9)
    for start, end, label in parts:
        left, length = int((start - first) * scale), max(1, round((end - start) * scale))
        console.print(f"{label:>14} |{' ' * left}{'█' * length}", highlight=False, soft_wrap=True)
    console.print(f"{'':>14}  0 s{'':{width - 12}}{last - first:.1f} s", highlight=False, soft_wrap=True)
