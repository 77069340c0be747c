"""What goes into the round machine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from farflung.protocol.certificate import Certificate
from farflung.protocol.identity import PeerId
from farflung.protocol.manifest import Manifest
from farflung.protocol.statements import Announcement, Slot
from farflung.protocol.wire import Message, Promise, Proposal, Statement

# -- events --


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; due when the machine's `wake_s` is reached."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A peer's message, its signature checked."""

    message: Message


@dataclass(frozen=True, slots=True)
class Own:
    """This member's own signed announcement of the round; its payload is on disk."""

    announcement: Announcement


@dataclass(frozen=True, slots=True)
class Held:
    """A payload is on disk, complete, and would decode."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """A payload is complete and would not decode."""

    digest: bytes
    why: str


@dataclass(frozen=True, slots=True)
class Staged:
    """A manifest was applied on trial and gave this state."""

    manifest_digest: bytes
    state_digest: bytes


@dataclass(frozen=True, slots=True)
class Leave:
    """The user wants this member to leave politely."""


Event: TypeAlias = Tick | Heard | Own | Held | Refused | Staged | Leave

# -- effects --


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Tell all members, and whoever asked to join. `slot` is the round the statement is about."""

    slot: Slot
    statement: Statement


@dataclass(frozen=True, slots=True)
class Send:
    """Tell one peer."""

    peer: PeerId
    slot: Slot
    statement: Statement


@dataclass(frozen=True, slots=True)
class Persist:
    """Make durable before going on: after a restart in the same round it is given to `restore`."""

    kind: str
    value: Announcement | Promise | Proposal | tuple[int, Manifest, bytes]


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get this payload from whoever has it, then say Held or Refused. May be asked for again; once is enough."""

    announcement: Announcement


@dataclass(frozen=True, slots=True)
class Stage:
    """Apply this manifest on trial, then say Staged. Replaces an earlier trial."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Apply:
    """The round is over: the state staged last becomes the anchor. The certificate joins the chain, durably."""

    certificate: Certificate


@dataclass(frozen=True, slots=True)
class Heal:
    """My trial gave another state than the certified one: recompute it from disk or fetch it, then say Staged."""

    certificate: Certificate


@dataclass(frozen=True, slots=True)
class CatchUp:
    """A peer is in a later round: fetch certificates from it."""

    peer: PeerId
    round_index: int


@dataclass(frozen=True, slots=True)
class Note:
    """For the log."""

    text: str


Effect: TypeAlias = Broadcast | Send | Persist | Fetch | Stage | Apply | Heal | CatchUp | Note
