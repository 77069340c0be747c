"""Hosts on one machine whose lines are narrow *and long*: rate, queue, delay and loss, packet by packet.

    with Wan([Line(20, 20, delay_ms=10, queue="fq")] * 4, congestion="cubic") as hosts:
        child = hosts.start(0, ["python", "member.py"])

Like `netns.Hosts`, but every host's eth0 is a TUN device, and `wan.c` carries the packets between them: out through
the sender's uplink, over both hosts' delays, in through the receiver's downlink. It is C so that it is never late (see
`Carried`): compiled with gcc when it is needed. No kernel module, no `netem`. A host is the computer *behind* a home
router: the queue is beyond TCP's sight, unlike `tbf` on the host itself, where TCP stops filling after a few packets.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from netns import TAG, Hosts, _sh, available, plain_tcp_mbit

SOURCE = Path(__file__).with_name("wan.c")
TUN = "/dev/net/tun"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
QUEUES = ("fifo", "fq")
QUEUE_BYTES_MIN = 15_000
"""Ten packets: routers of slow lines have at least this, or TCP never gets going."""


class Carried(NamedTuple):
    """What the forwarder did, and whether it kept up: believe a measurement only if `late_over_1ms` is rare."""

    cpu_s: float
    packets: int
    late_ms_max: float
    late_over_1ms: int
    realtime: bool
    hosts: list[dict[str, Any]]
    """Per host: `lost`, and for `up` and `down`: `bytes`, `packets`, `dropped`, `queued_bytes_max`."""


def unavailable() -> str | None:
    """Why such hosts cannot be had here, or None if they can."""
    if why := available():
        return why
    if shutil.which("gcc") is None:
        return "gcc not found: the forwarder is compiled when it is needed"
    return None if os.access(TUN, os.R_OK | os.W_OK) else f"no access to {TUN}"


class Wan(Hosts):
    """Hosts 0..n-1 with the same addresses and the same manners as `netns.Hosts`. `seed` draws the losses."""

    seed = 1

    def carried(self) -> Carried:
        """Counters since the start."""
        pipe = self._forwarder
        assert pipe.stdin is not None
        assert pipe.stdout is not None
        pipe.stdin.write("?")
        pipe.stdin.flush()
        line = pipe.stdout.readline()
        if not line:
            raise RuntimeError(f"the forwarder ended with {pipe.wait()}")
        return Carried(**json.loads(line))

    def wire_bytes(self) -> list[tuple[int, int]]:
        """Bytes on the wire up and down so far, by host, counted as on Ethernet, like those of `netns.Hosts`."""
        return [(host["up"]["bytes"], host["down"]["bytes"]) for host in self.carried().hosts]

    def _check(self) -> None:
        for line in self.lines:
            if line.queue not in QUEUES or not 0 <= line.loss < 1 or line.delay_ms < 0:
                raise ValueError(f"a queue of {' or '.join(QUEUES)}, a loss in [0, 1) and a delay >= 0, got {line}")

    def _build(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="farflung-wan-")
        self._tuns: list[int] = []
        program = str(Path(self._folder.name) / "wan")
        subprocess.run(["gcc", "-O2", "-std=c11", "-o", program, str(SOURCE)], check=True)
        for host in range(len(self.lines)):
            self._tuns.append(self._plug(host))
        words = [self._words(host) for host in range(len(self.lines))]
        self._forwarder = subprocess.Popen(
            [program, str(self.seed), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=self._tuns,
            start_new_session=True,  # Ctrl-C is for us: we end it after the hosts' processes
        )

    def _plug(self, host: int) -> int:
        """A TUN device as the host's eth0; it is made here and moved, and vanishes with its file descriptor."""
        made, name = f"{TAG}t{host}"[:15], self.namespace(host)
        tun = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", made.encode(), IFF_TUN | IFF_NO_PI))
        _sh("ip", "netns", "add", name)
        _sh("ip", "link", "set", made, "netns", name, "name", "eth0")
        _sh("ip", "-n", name, "link", "set", "eth0", "mtu", "1500", "txqueuelen", "1000")
        self._settle(host)
        return tun

    def _words(self, host: int) -> str:
        """A host as wan.c reads it."""
        line = self.lines[host]
        rates = [int(mbit * 1e6 / 8) for mbit in (line.up, line.down)]
        queues = [max(QUEUE_BYTES_MIN, rate * self.queue_ms // 1000) for rate in rates]
        rest = [round(line.delay_ms * 1e6), round(line.loss * 1e6), int(line.queue == "fq")]
        return ",".join(map(str, [self._tuns[host], *rates, *queues, *rest]))

    def _remove(self) -> None:
        forwarder = getattr(self, "_forwarder", None)
        if forwarder is not None:
            forwarder.stdin.close()  # which it takes for its end
            try:
                forwarder.wait(5)
            except subprocess.TimeoutExpired:
                forwarder.kill()
                forwarder.wait()
            forwarder.stdout.close()
        for tun in getattr(self, "_tuns", []):
            os.close(tun)
        for host in range(len(self.lines)):
            with contextlib.suppress(RuntimeError):
                _sh("ip", "netns", "del", self.namespace(host))
        if hasattr(self, "_folder"):
            self._folder.cleanup()


if __name__ == "__main__":
    from netns import Line

    if problem := unavailable():
        sys.exit(f"cannot run here: {problem}")
    for mbit, delay_ms in ((20, 0.0), (20, 20.0), (100, 20.0)):
        with Wan([Line(mbit, mbit, delay_ms=delay_ms)] * 2, congestion="cubic") as two:
            got = plain_tcp_mbit(two, 0, 1, 6.0)
            done = two.carried()
            print(f"{mbit:4} Mbit/s, {2 * delay_ms:g} ms one way: one TCP connection gets {got / mbit:.1%} of it")
            print(f"     forwarder: {done._replace(hosts=[])}", flush=True)
