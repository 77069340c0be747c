"""What a live swarm left on disk, read back: who trained and who waited for how long in which round.

Reads round logs, genesis and status files. Needs no lock and changes nothing, so the swarm may still be running.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farflung.node.store import read_status
from farflung.protocol.errors import ConfigError, FarflungError
from farflung.protocol.genesis import Genesis, decode_genesis
from farflung.protocol.identity import PeerId
from farflung.protocol.invite import parse_invite

LOG = "rounds.jsonl"

DEPTHS = ("", "runs/*/", "*/runs/*/")
"""Where a round log may lie: in the folder of a run itself, in a member's home, in a folder of homes."""

ROUNDS_MIN = 5
"""Fewer rounds say nothing of how much they differ."""

NUMBERS = ("round", "trained", "view", "round_s", "wait_s", "bytes_up")
TABLES = ("members", "payloads", "counted")
"""What is read of a line."""

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class MemberLog:
    """One member's round log."""

    name: str
    """Of its home's folder."""
    peer: str
    directory: Path
    entries: Mapping[int, Entry]
    """By round, in order."""


@dataclass(frozen=True)
class Seen:
    """One run of one swarm, as its members saw it. Arrays are [rounds, members], members as in `names`.

    Only whole rounds are in them: every member counted, with all its steps, in the proposer's first view, and after a
    round that was logged, too. The run's first training round is never one: it warms caches and compiles.
    """

    genesis: Genesis
    names: tuple[str, ...]
    """The founder's first."""
    train_rm: NDArray[np.float64]
    """Seconds from a member's anchor until its update was on its way: steps, evaluation, encoding, its disk."""
    wait_rm: NDArray[np.float64]
    """Seconds from then until it had the next anchor."""
    payload_bytes: float
    """Of one update, mean."""
    bytes_up: float
    """Sent by one member in one round, mean."""
    trained: int
    """Rounds of the whole run that trained."""
    left_out: int
    """Rounds that trained and are not in the arrays."""
    loopback: bool
    """All addresses in the members' invites are this machine's own."""

    @property
    def settle_r(self) -> NDArray[np.float64]:
        """How long each round took after its last member had spoken [r]: that member waited least of all."""
        return np.asarray(self.wait_rm.min(axis=1), dtype=np.float64)

    @property
    def round_r(self) -> NDArray[np.float64]:
        """How long each round was [r], mean over members."""
        return np.asarray((self.train_rm + self.wait_rm).mean(axis=1), dtype=np.float64)


def read_swarms(folders: Sequence[Path]) -> list[Seen]:
    """All runs whose members' logs are in these folders, in the order in which they are found.

    A folder is a run's own (`HOME/runs/ID`), a member's home, or one that holds homes, as `farflung demo --out` makes
    it. Raises ConfigError if a log is missing, malformed, or has too few whole rounds.
    """
    found: dict[str, list[MemberLog]] = {}
    for folder in folders:
        for directory in _run_directories(folder):
            found.setdefault(directory.name, []).append(_read_member(directory))
    return [_read_swarm(run, logs) for run, logs in found.items()]


def _run_directories(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"there is no such folder: {folder}")
    for depth in DEPTHS:
        if logs := sorted(folder.glob(depth + LOG)):
            return [log.parent.absolute() for log in logs]
    raise ConfigError(
        f"no round logs ({LOG}) there: name a member's home, the folder of a run in it, or the folder that "
        f"`farflung demo --out` made, got {folder}"
    )


def _read_member(directory: Path) -> MemberLog:
    status = read_status(directory) or {}
    if not status.get("peer"):
        raise ConfigError(f"no status.json that says whose log this is: copy the whole folder, got {directory}")
    return MemberLog(directory.parent.parent.name, str(status["peer"]), directory, _read_log(directory / LOG))


def _read_log(path: Path) -> dict[int, Entry]:
    """Its lines. One that was not finished is left out: that may be the last one of a process that was killed."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    entries = (_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1))
    return {int(entry["round"]): entry for entry in entries}


def _parse(line: str, where: str) -> Entry:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not all(key in entry for key in TABLES):
        raise ConfigError(f"{where}: not a line of a round log, got {line[:60]!r}")
    for key in NUMBERS:
        if type(entry.get(key)) not in (int, float):
            raise ConfigError(f"{where}: {key} must be a number, got {entry.get(key)!r}")
    return entry


def _read_swarm(run: str, logs: list[MemberLog]) -> Seen:
    genesis = _read_genesis(logs[0].directory)
    logs = _ordered(run, logs, genesis)
    trained = sorted({index for log in logs for index, entry in log.entries.items() if _payloads(entry)})
    rounds = [index for index in trained if _is_whole(index, logs, genesis)]
    if len(rounds) < ROUNDS_MIN:
        raise ConfigError(
            f"run {run[:8]}: a calibration needs {ROUNDS_MIN} rounds in which all {len(logs)} members took part from "
            f"beginning to end: let it run longer; of {len(trained)} that trained such are {len(rounds)}"
        )
    rows = [[log.entries[index] for log in logs] for index in rounds]
    wait_rm = _array(rows, "wait_s")
    sizes = [item["bytes"] for row in rows for item in _payloads(row[0])]
    return Seen(
        genesis=genesis,
        names=_names(logs),
        train_rm=_array(rows, "round_s") - wait_rm,
        wait_rm=wait_rm,
        payload_bytes=sum(sizes) / len(sizes),
        bytes_up=float(_array(rows, "bytes_up").mean()),
        trained=len(trained),
        left_out=len(trained) - len(rounds),
        loopback=_on_loopback([log.directory / "invite" for log in logs]),
    )


def _read_genesis(directory: Path) -> Genesis:
    try:
        return decode_genesis((directory / "genesis").read_bytes(), bytes.fromhex(directory.name))
    except FileNotFoundError:
        raise ConfigError(f"there is no genesis beside the round log: copy the whole folder, got {directory}") from None
    except (FarflungError, ValueError) as error:
        raise ConfigError(f"{directory}: {error}") from None


def _ordered(run: str, logs: list[MemberLog], genesis: Genesis) -> list[MemberLog]:
    """The founder first, then by home. Raises ConfigError unless there is one log of each member."""
    peers = [log.peer for log in logs]
    if len(set(peers)) < len(peers):
        twice = next(log for log in logs if peers.count(log.peer) > 1)
        raise ConfigError(f"run {run[:8]}: there are two logs of one member: remove a copy, got {twice.directory}")
    lasts = [list(log.entries.values())[-1] for log in logs if log.entries]
    members: list[str] = max(lasts, key=lambda entry: int(entry["round"]))["members"] if lasts else []
    if missing := [peer for peer in members if peer not in peers]:
        raise ConfigError(
            f"run {run[:8]}: a calibration needs the logs of all {len(members)} members, here are {len(logs)}: name "
            f"the others' folders, too; missing are {', '.join(peer[:8] for peer in missing)}"
        )
    if len(logs) < 2:
        raise ConfigError(f"run {run[:8]}: a swarm has at least 2 members, got {len(logs)}")
    founder = str(PeerId.of(genesis.founder))
    return sorted(logs, key=lambda log: (log.peer != founder, log.name, log.peer))


def _names(logs: Sequence[MemberLog]) -> tuple[str, ...]:
    """Homes' folders; with a number where two are called the same."""
    names = [log.name for log in logs]
    return tuple(
        name if names.count(name) == 1 else f"{name}-{names[:position].count(name)}"
        for position, name in enumerate(names)
    )


def _payloads(entry: Entry) -> list[Mapping[str, Any]]:
    return [item for item in entry["payloads"].values() if item["bytes"]]


def _is_whole(index: int, logs: Sequence[MemberLog], genesis: Genesis) -> bool:
    """Whether all members took part in a round from beginning to end, and nothing had to be tried twice."""
    for log in logs:
        entry = log.entries.get(index)
        if entry is None or index - 1 not in log.entries or not entry["round_s"] > 0 or entry["trained"] == 1:
            return False
        if entry["view"] or not entry["counted"] or len(entry["members"]) != len(logs):
            return False
        if [item["steps"] for item in _payloads(entry)] != [genesis.inner_steps] * len(logs):
            return False
    return True


def _array(rows: Sequence[Sequence[Entry]], key: str) -> NDArray[np.float64]:
    return np.array([[entry[key] for entry in row] for row in rows], dtype=np.float64)


def _on_loopback(invites: Sequence[Path]) -> bool:
    """Whether members know each other by addresses of this machine only."""
    addresses: list[str] = []
    for invite in invites:
        try:
            addresses += parse_invite(invite.read_text()).addresses
        except FileNotFoundError:
            continue
        except FarflungError as error:
            raise ConfigError(f"{invite}: {error}") from None
    return bool(addresses) and all("@127." in address or "@localhost:" in address for address in addresses)
