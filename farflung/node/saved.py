"""Which home, and which runs are in it: for commands that only look. Light: nothing here loads torch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from farflung.protocol.errors import ConfigError
from farflung.protocol.invite import Invite, parse_invite


def default_home() -> Path:
    """$FARFLUNG_HOME, or farflung's folder among the user's data (XDG)."""
    if home := os.environ.get("FARFLUNG_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "farflung"


def saved_runs(root: Path, run: str = "") -> list[Path]:
    """Directories of the runs in a home that this machine has taken part in. Raises ConfigError if there is none."""
    found = [path.parent for path in sorted((root / "runs").glob("*/invite")) if path.parent.name.startswith(run)]
    if not found:
        which = f"run {run!r}" if run else "run"
        raise ConfigError(f"there is no {which} in {root}; join with an invite, or create one with `farflung new`")
    return found


def saved_invite(root: Path, run: str = "") -> Invite:
    """The invite of a home's one run, or of the one whose id starts with `run`. Raises ConfigError."""
    directories = saved_runs(root, run)
    if len(directories) > 1:
        names = ", ".join(path.name[:8] for path in directories)
        raise ConfigError(f"there are several runs in {root}; choose one with --run: {names}")
    return parse_invite((directories[0] / "invite").read_text())


def outbound_host() -> str:
    """The address this machine uses towards the internet, from its routing table; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1: nobody lives there
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def refreshed(invite: Invite, me: str, directory: Path, announce: tuple[str, ...] = ()) -> Invite:
    """The same invite with this machine's present address in place of its old ones. `me` is its peer id."""
    mine = [address for address in invite.addresses if address.startswith(f"{me}@")]
    port = directory / "port"
    if announce:
        mine = [f"{me}@{address}" for address in announce]
    elif port.exists():
        local = {address.partition("@")[2].rpartition(":")[0] for address in mine} == {"127.0.0.1"}
        host = "127.0.0.1" if local else outbound_host()
        mine = [f"{me}@{host}:{port.read_text(encoding='ascii').strip()}"]
    others = [address for address in invite.addresses if not address.startswith(f"{me}@")]
    return Invite(invite.run_id, (*mine, *others), invite.dht, invite.secret)
