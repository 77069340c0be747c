"""Hosts on one machine with real, narrow lines: network namespaces joined by a bridge, `tc tbf` in both directions.

    with Hosts([Line(up=20, down=20)] * 4) as hosts:
        child = hosts.start(0, ["python", "member.py"])

Every packet really queues: a line is a token bucket of `rate` with a short burst and a queue of `queue_ms`, like a home
router without active queue management. The bridge lives in a namespace of its own, so removing the namespaces removes
everything, and nothing is changed for the rest of the machine. There is no added propagation delay (`netem` is not in
every kernel): what is measured is bandwidth and queueing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

HOSTS_MAX = 16
"""More hosts than this measure the scheduler of one machine."""

TAG = f"ff{os.getpid()}"


class Line(NamedTuple):
    """A host's access line, in Mbit/s. What follows them needs `wan.Wan`; `Hosts` refuses it."""

    up: float
    down: float
    delay_ms: float = 0.0
    """From the host to the middle of the network, one way: a round trip between two hosts takes twice both delays."""
    queue: str = "fifo"
    """"fifo": a router without queue management. "fq": small packets (acknowledgements) overtake bulk."""
    loss: float = 0.0
    """Probability with which a packet of this host never reaches its uplink."""


def available() -> str | None:
    """Why namespaces cannot be used here, or None if they can."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's, this is {sys.platform}"
    missing = [tool for tool in ("ip", "tc") if _tool(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"{TAG}probe"
    try:
        _sh("ip", "netns", "add", probe)
        _sh("ip", "-n", probe, "link", "add", "name", "eth0", "type", "veth", "peer", "name", "eth1")
        _sh(
            "tc",
            "-n",
            probe,
            "qdisc",
            "add",
            "dev",
            "eth0",
            "root",
            "tbf",
            "rate",
            "1mbit",
            "burst",
            "10kb",
            "latency",
            "50ms",
        )
    except RuntimeError as error:
        return str(error)
    finally:
        with contextlib.suppress(RuntimeError):
            _sh("ip", "netns", "del", probe)
    return None


class Hosts:
    """Hosts 0..n-1 at 10.77.0.1, .2, ...; `with` creates and always removes them, Ctrl-C and SIGTERM included."""

    def __init__(self, lines: Sequence[Line], *, queue_ms: int = 100, congestion: str | None = None) -> None:
        """`congestion`: TCP's algorithm on every host, "cubic" for example; None: what the kernel prefers."""
        if not 0 < len(lines) <= HOSTS_MAX:
            raise ValueError(f"1 to {HOSTS_MAX} hosts, got {len(lines)}")
        self.lines, self.queue_ms, self.congestion = list(lines), queue_ms, congestion
        self._check()
        self._children: list[subprocess.Popen[Any]] = []
        self._before: Any = None

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def namespace(self, host: int) -> str:
        return f"{TAG}n{host}"

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """`command` as the host would run it."""
        return ["ip", "netns", "exec", self.namespace(host), *command]

    def start(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process on a host; it is killed with the hosts at the latest."""
        child = subprocess.Popen(self.command(host, command), **options)
        self._children.append(child)
        return child

    def run(self, host: int, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a command on a host and wait for it."""
        return subprocess.run(self.command(host, command), check=True, **options)

    def wire_bytes(self) -> list[tuple[int, int]]:
        """Bytes on the wire up and down so far, by host; headers, acknowledgements and retransmissions included."""
        ports = json.loads(_sh("ip", "-n", f"{TAG}sw", "-s", "-j", "link"))
        found = {port["ifname"]: port["stats64"] for port in ports}
        stats = [found[f"port{host}"] for host in range(len(self.lines))]
        return [(one["rx"]["bytes"], one["tx"]["bytes"]) for one in stats]

    def __enter__(self) -> Self:
        if threading_main():
            self._before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
        for child in self._children:
            child.wait()
        self._remove()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _check(self) -> None:
        for line in self.lines:
            if line.delay_ms or line.queue != "fifo" or line.loss:
                raise ValueError(f"tbf has no delay, fq or loss: use wan.Wan for {line}")

    def _build(self) -> None:
        switch = f"{TAG}sw"
        _sh("ip", "netns", "add", switch)
        _sh("ip", "-n", switch, "link", "add", "name", "bridge", "type", "bridge")
        _sh("ip", "-n", switch, "link", "set", "bridge", "up")
        for host, line in enumerate(self.lines):
            name, port = self.namespace(host), f"port{host}"
            _sh("ip", "netns", "add", name)
            _sh("ip", "-n", name, "link", "add", "name", "eth0", "type", "veth", "peer", "name", port, "netns", switch)
            self._settle(host)
            # whole segments would be counted with one header each, and queue behind each other in lumps
            _sh("ip", "-n", name, "link", "set", "eth0", "gso_max_segs", "1")
            _sh("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            self._shape(name, "eth0", line.up)
            self._shape(switch, port, line.down)

    def _settle(self, host: int) -> None:
        """A host that has its eth0: address, loopback, TCP's algorithm."""
        name = self.namespace(host)
        _sh("ip", "-n", name, "addr", "add", f"{self.address(host)}/16", "dev", "eth0")
        for device in ("lo", "eth0"):
            _sh("ip", "-n", name, "link", "set", device, "up")
        if self.congestion is not None:
            with _allowed(self.congestion):
                setting = f"echo {self.congestion} > /proc/sys/net/ipv4/tcp_congestion_control"
                _sh("ip", "netns", "exec", name, "sh", "-c", setting)

    def _shape(self, namespace: str, device: str, mbit: float) -> None:
        """A burst of 10 ms of the line, at least three packets."""
        burst = max(4600, int(mbit * 1e6 / 8 * 0.01))
        shape = ["tbf", "rate", f"{int(mbit * 1000)}kbit", "burst", str(burst), "latency", f"{self.queue_ms}ms"]
        _sh("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *shape)

    def _remove(self) -> None:
        for name in [f"{TAG}sw", *(self.namespace(host) for host in range(len(self.lines)))]:
            with contextlib.suppress(RuntimeError):
                _sh("ip", "netns", "del", name)


SPEED_TEST = """
import socket, sys, time
listen, target, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
if listen == "sink":
    server = socket.create_server((target, 5001))
    print("ready", flush=True)
    peer, _ = server.accept()
    total, first = 0, None
    while data := peer.recv(1 << 20):
        first = first or time.monotonic()
        total += len(data)
    print(total * 8 / (time.monotonic() - first) / 1e6)
else:
    peer, end = socket.create_connection((target, 5001)), time.monotonic() + seconds
    while time.monotonic() < end:
        peer.sendall(bytes(1 << 16))
"""


def plain_tcp_mbit(hosts: Hosts, source: int, target: int, seconds: float = 4.0) -> float:
    """What one plain TCP connection carries from host to host, in Mbit/s: the most that anything can."""
    address = hosts.address(target)
    sink = hosts.start(
        target, [sys.executable, "-c", SPEED_TEST, "sink", address, "0"], stdout=subprocess.PIPE, text=True
    )
    assert sink.stdout is not None
    sink.stdout.readline()
    hosts.run(source, [sys.executable, "-c", SPEED_TEST, "source", address, str(seconds)])
    return float(sink.stdout.readline())


@contextlib.contextmanager
def _allowed(congestion: str) -> Iterator[None]:
    """Namespaces may only choose what the machine allows everybody. Put back at once: what was chosen stays chosen."""
    known = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    if congestion not in known:
        raise RuntimeError(f"this kernel has {', '.join(known)}, not {congestion}")
    path = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
    before = path.read_text()
    try:
        if congestion not in before.split():
            path.write_text(f"{before.strip()} {congestion}")
        yield
    finally:
        if path.read_text() != before:
            path.write_text(before)


def threading_main() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _tool(name: str) -> str | None:
    return shutil.which(name) or next(
        (path for path in (f"/usr/sbin/{name}", f"/sbin/{name}") if Path(path).exists()), None
    )


def _sh(*command: str) -> str:
    path = _tool(command[0])
    if path is None:
        raise RuntimeError(f"{command[0]} not found")
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


if __name__ == "__main__":
    why = available()
    if why:
        sys.exit(f"cannot run here: {why}")
    for mbit in (2, 20, 200):
        with Hosts([Line(mbit, mbit)] * 2) as hosts:
            got = plain_tcp_mbit(hosts, 0, 1)
            print(f"{mbit:4} Mbit/s: one TCP connection carries {got:.1f} Mbit/s ({got / mbit:.1%})", flush=True)
