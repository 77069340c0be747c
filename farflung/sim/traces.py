"""Traces: files that say when each member was there, recorded somewhere or generated here.

    # members = 3
    member,start_s,end_s,crash
    0,0,3600,1
    0,4200.5,9000,0
    2,60,inf,0

One session a line, in seconds of virtual time. `member` is the position in its group, from 0; `crash` is 1 for leaving
without a word and 0 for a polite departure; `end_s` may be inf. Sessions of one member come in order and at least a
second apart; members may be mixed. The first line is optional: without it there are as many members as the largest
position says; with it, a member without a line never comes. Empty lines and other lines that begin with # are ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from farflung.protocol.errors import ConfigError
from farflung.sim.churn import GAP_MIN_S, SESSION_MIN_S, Session, sessions
from farflung.sim.scenario import Churn

HEADER = "member,start_s,end_s,crash"

TRACE_MEMBERS_MAX = 1_000_000
"""Four times the largest published study of volunteer computers; a larger position is a host's id, not a position."""

ROUNDING_S = 1e-6
"""Sums of many draws may miss a bound by this much."""

_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?(e[+-]?[0-9]{1,3})?|inf")


@dataclass(frozen=True)
class Trace:
    """Sessions of each member, by position; a member may have none. Raises ConfigError if they are not in order."""

    sessions: tuple[tuple[Session, ...], ...]

    def __post_init__(self) -> None:
        for member, own in enumerate(self.sessions):
            for position, session in enumerate(own):
                why = _why_not(own[position - 1] if position else None, session)
                if why:
                    raise ConfigError(f"member {member}, session {position}: {why}")


def read_trace(path: Path) -> Trace:
    """The trace in a file. Raises ConfigError that names the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"this trace cannot be read ({error}): {str(path)!r}") from None
    return parse_trace(text, name=path.name)


def parse_trace(text: str, *, name: str = "trace") -> Trace:
    """The trace in a text. `name` stands in errors, before the line's number."""
    found: dict[int, list[Session]] = {}
    size, header = 0, False
    for number, raw in enumerate(text.splitlines(), 1):
        where, line = f"{name}, line {number}", raw.strip()
        if declared := re.fullmatch(r"#\s*members\s*=\s*([0-9]{1,9})", line):
            size = int(declared[1])
            if not 1 <= size <= TRACE_MEMBERS_MAX or found:
                _refuse(where, f"the number of members is 1 to {TRACE_MEMBERS_MAX} and stands before them", line)
        elif not line or line.startswith("#"):
            continue
        elif not header:
            if line != HEADER:
                _refuse(where, f"the first line is {HEADER}", line)
            header = True
        else:
            member, session = _row(where, line)
            own = found.setdefault(member, [])
            if why := _why_not(own[-1] if own else None, session):
                raise ConfigError(f"{where}: {why}")
            own.append(session)
    if not header:
        raise ConfigError(f"{name} is no trace: its first line is {HEADER}, got {text[:40]!r}")
    largest = max(found, default=-1)
    if size and largest >= size:
        raise ConfigError(f"{name} says it has {size} members: positions are 0 to {size - 1}, got {largest}")
    if not found and not size:
        raise ConfigError(f"{name} has no sessions: add lines of {HEADER}, got none")
    return Trace(tuple(tuple(found.get(member, ())) for member in range(size or largest + 1)))


def format_trace(trace: Trace) -> str:
    """The canonical text: members in order, shortest numbers that read back as the same. `parse_trace` inverts it."""
    lines = [f"# members = {len(trace.sessions)}", HEADER]
    for member, own in enumerate(trace.sessions):
        lines += [f"{member},{_text(start_s)},{_text(end_s)},{int(crash)}" for start_s, end_s, crash in own]
    return "\n".join(lines) + "\n"


def write_trace(trace: Trace, path: Path) -> None:
    """Write the canonical text, with \\n line ends on every system."""
    path.write_text(format_trace(trace), encoding="utf-8", newline="\n")


def generate(churn: Churn, members: int, horizon_s: float, seed: int, *, group: int = 0) -> Trace:
    """The sessions that `members` members of a scenario's group would have with this seed, as a trace.

    Raises ConfigError for members < 1, a horizon that is not positive and finite, or a churn that is itself a trace.
    """
    if not 1 <= members <= TRACE_MEMBERS_MAX:
        raise ConfigError(f"a trace has 1 to {TRACE_MEMBERS_MAX} members, got {members}")
    if not 0 < horizon_s < math.inf:
        raise ConfigError(f"a trace covers a time above 0, got {horizon_s:g} s")
    return Trace(
        tuple(sessions(churn, seed=seed, group=group, member=member, horizon_s=horizon_s) for member in range(members))
    )


def sessions_of(trace: Trace, members: int, *, name: str) -> Sequence[tuple[Session, ...]]:
    """The first `members` members' sessions. Raises ConfigError if the trace has fewer."""
    if len(trace.sessions) < members:
        raise ConfigError(
            f"trace {name!r} has {len(trace.sessions)} members: make the group smaller or the trace larger, "
            f"got a group of {members}"
        )
    return trace.sessions[:members]


def _row(where: str, line: str) -> tuple[int, Session]:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 4:
        _refuse(where, f"a line has four values, {HEADER}", line)
    member, start, end, crash = parts
    if not re.fullmatch(r"[0-9]{1,7}", member) or int(member) >= TRACE_MEMBERS_MAX:
        _refuse(where, f"member is a position from 0 to {TRACE_MEMBERS_MAX - 1}", member)
    if not _NUMBER.fullmatch(start) or not _NUMBER.fullmatch(end):
        _refuse(where, "start_s and end_s are seconds from 0 on, or inf", f"{start},{end}")
    if crash not in ("0", "1"):
        _refuse(where, "crash is 0 or 1", crash)
    return int(member), Session(float(start), float(end), crash == "1")


def _why_not(before: Session | None, session: Session) -> str:
    """Why this session cannot follow that one; empty if it can."""
    if not 0 <= session.start_s < math.inf:
        return f"a session begins at 0 or later, got {session.start_s:g}"
    if not session.end_s - session.start_s >= SESSION_MIN_S - ROUNDING_S:
        return f"a session lasts at least {SESSION_MIN_S:g} s, got {session.start_s:g} to {session.end_s:g}"
    if before is not None and not session.start_s - before.end_s >= GAP_MIN_S - ROUNDING_S:
        return f"a session begins at least {GAP_MIN_S:g} s after the last, {before.end_s:g}, got {session.start_s:g}"
    return ""


def _text(value: float) -> str:
    return repr(value).removesuffix(".0")


def _refuse(where: str, why: str, got: str) -> NoReturn:
    raise ConfigError(f"{where}: {why}, got {got!r}")
