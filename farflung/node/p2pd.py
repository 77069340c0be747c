"""hivemind's libp2p daemon as a child that cannot outlive us.

hivemind starts `p2pd` itself and stops it in a destructor; after SIGTERM or SIGKILL it goes on for ever. So we start
it, and hand hivemind its socket (`P2P.replicate`). On Linux the child asks the kernel to kill it when its parent
dies (prctl PR_SET_PDEATHSIG, kept over exec), then becomes p2pd; if the parent died before it could ask, it ends. The
kernel's parent is the *thread* that started it: p2pd also ends with the thread that ran the loop. Elsewhere (macOS)
there is no such call, and only an orderly `stop` ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from farflung.protocol.errors import ConfigError

log = logging.getLogger(__name__)

READY_S = 15.0
"""How long the daemon may take to start: 0.3 s here, and some seconds to find bootstrap peers far away."""

STOP_S = 3.0
"""How long it may take to leave before it is killed."""

_MESSAGE_BYTES_MAX = 4 << 20
_PREFIX = "farflung-p2pd-"
_LEASH = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def leashed(command: Sequence[str]) -> list[str]:
    """The same command, killed by the kernel when this process dies (on Linux)."""
    if not sys.platform.startswith("linux") or not sys.executable:
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), *command]


class Daemon:
    """A running p2pd. `control` is the multiaddress of its socket."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self._process, self._folder = process, folder
        self._reader: asyncio.Task[None] | None = None
        self.control = f"/unix{folder}/p2pd.sock"

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.returncode is None

    async def ready(self, ready_s: float = READY_S) -> None:
        """Wait until it listens. Raises ConfigError with its last words if it ends, TimeoutError if it says nothing."""
        assert self._process.stdout is not None
        said = ""
        async with asyncio.timeout(ready_s):
            while line := await self._process.stdout.readline():
                said = line.decode(errors="replace").strip() or said
                if said.startswith("Peer ID:"):
                    self._reader = asyncio.create_task(self._listen())
                    return
        raise ConfigError(f"p2pd did not start: {said[:300]}")

    async def _listen(self) -> None:
        """Keep the pipe empty: a full one would stop the daemon."""
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # a line beyond the reader's limit
            while line := await self._process.stdout.readline():
                log.debug("p2pd: %s", line.decode(errors="replace").rstrip())

    async def stop(self) -> None:
        """End it and wait until it is gone; stopping twice is fine."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await (self._reader or self._listen())  # ends with the pipe: then the loop has let go of the child
        shutil.rmtree(self._folder, ignore_errors=True)


async def start_daemon(
    program: Path,
    *,
    hosts: Sequence[str],
    announce: Sequence[str] = (),
    bootstrap: Sequence[str] = (),
    identity: Path | None = None,
    client: bool = False,
    nat: bool = True,
) -> Daemon:
    """Start p2pd with hivemind's own settings; await `ready` next. Multiaddresses in, ConfigError if it cannot run."""
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))  # short: a socket's path has 108 characters
    options = {
        "listen": f"/unix{folder}/p2pd.sock",
        "hostAddrs": ",".join(hosts),
        "announceAddrs": ",".join(announce),
        "bootstrapPeers": ",".join(bootstrap),
        "b": int(bool(bootstrap)),
        "id": "" if identity is None else str(identity),
        "dhtClient" if client else "dhtServer": 1,
        "autonat": int(nat),
        "natPortMap": int(nat),
        "autoRelay": 0,
        "connManager": 1,
        "idleTimeout": "30s",
        "relay": 1,
        "tls": 1,
        "persistentConnMaxMsgSize": _MESSAGE_BYTES_MAX,
    }
    command = [str(program), *(f"-{name}={value}" for name, value in options.items() if value != "")]
    try:
        return await _spawn(leashed(command), folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"cannot run {program}: {error.strerror}; reinstall hivemind") from error


def _sweep() -> None:
    """Remove the socket folders of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdecimal() and not _runs(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


async def _spawn(command: Sequence[str], folder: Path) -> Daemon:
    """Start the child. Cancelled while it starts, it is started to the end and then stopped: asyncio would leak it."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "GOLOG_LOG_LEVEL": "error"},
            start_new_session=sys.platform.startswith("linux"),  # Ctrl-C is for us: we say goodbye first
        )
    )
    try:
        return Daemon(await asyncio.shield(starting), folder)
    except asyncio.CancelledError:
        await Daemon(await starting, folder).stop()
        raise
