"""Which home, and which runs are in it: for commands that only look. Light: nothing here loads torch."""

from __future__ import annotations

import os
from pathlib import Path

from farflung.node.transport.addresses import announced
from farflung.protocol import limits
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


def refreshed(invite: Invite, me: str, directory: Path, announce: tuple[str, ...] = ()) -> Invite:
    """The same invite with this machine's present addresses in place of its old ones. `me` is its peer id."""
    mine = tuple(address for address in invite.addresses if address.startswith(f"{me}@"))
    others = tuple(address for address in invite.addresses if address not in mine)
    port = directory / "port"
    if announce or port.exists():
        local = bool(mine) and all(address.startswith(f"{me}@127.") for address in mine)
        number = int(port.read_text(encoding="ascii")) if port.exists() else 0
        mine = tuple(f"{me}@{at}" for at in announced("127.0.0.1" if local else "", number, announce))
    return Invite(invite.run_id, (*mine, *others)[: limits.ADDRESSES_MAX], invite.dht, invite.secret)
