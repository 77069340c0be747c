"""Where a member is in its round, what may happen there, and who it is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from farflung.protocol.effects import Heard, Held, Leave, Own, Refused, Staged, Tick
from farflung.protocol.identity import PeerId
from farflung.protocol.statements import Sign


class Phase(StrEnum):
    """Where a member is in its round."""

    FOLLOWING = "following"
    TRAINING = "training"
    WAITING = "waiting"
    APPLYING = "applying"
    DONE = "done"


_ALWAYS = (Tick, Heard, Held, Refused, Staged, Leave)
ALLOWED: dict[Phase, tuple[type, ...]] = {
    Phase.FOLLOWING: _ALWAYS,
    Phase.TRAINING: (*_ALWAYS, Own),
    Phase.WAITING: _ALWAYS,
    Phase.APPLYING: _ALWAYS,
    Phase.DONE: _ALWAYS,
}
"""The whole law: what may happen in which phase. Anything else is a bug of ours."""


@dataclass(frozen=True)
class Self:
    """Who this member is. `secret` is the join secret (empty: unknown); `payload_bytes_max` follows from the codec."""

    peer_id: PeerId
    public_key: bytes
    sign: Sign
    payload_bytes_max: int
    secret: bytes = b""
    wants_in: bool = True
