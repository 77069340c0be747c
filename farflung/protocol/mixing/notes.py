"""What members tell each other while they mix: one note is about one fragment in one tick of one round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

from farflung.protocol.blob import DIGEST_BYTES, BlobRef
from farflung.protocol.errors import PeerError
from farflung.protocol.ledger.messages import Fence, LedgerMessage, Parcel, Receipt, message_from_json
from farflung.protocol.mixing.settings import FRAGMENTS_MAX, TICKS_MAX
from farflung.protocol.statements import from_hex, natural

COPY_HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class Offer:
    """Pairs: how far this member lets itself be moved, and the weight it claims. Any floats: the receiver judges."""

    radius: float
    weight: float


@dataclass(frozen=True, slots=True)
class Absent:
    """ "I take no part in this round, or not any more: expect nothing of me, and give me nothing." True for ever."""


Content: TypeAlias = LedgerMessage | Offer | Absent | None
"""None: "I have nothing for you in this tick, do not wait"."""


@dataclass(frozen=True, slots=True)
class Note:
    """`payload` names the vector of a parcel or an offer, to be fetched from the sender.

    `copy_hash`: of the edge's copy that a parcel's rounded change is to be added to (`aggregation.flow`); empty where
    whole numerators travel. `again`: pairs: said once more because the partner repeated itself, so needs no answer.
    """

    fragment: int
    tick: int
    content: Content
    payload: BlobRef | None = None
    copy_hash: bytes = b""
    again: bool = False

    def to_json(self) -> list[Any]:
        """Plain values for canonical bytes."""
        ref = self.payload
        return [
            self.fragment,
            self.tick,
            _content_json(self.content),
            None if ref is None else ref_to_json(ref),
            self.copy_hash.hex(),
            self.again,
        ]

    @staticmethod
    def from_json(value: Any) -> Note:
        """The inverse of `to_json`. Raises PeerError for whatever no honest member would say."""
        if not isinstance(value, list) or len(value) != 6 or not isinstance(value[5], bool):
            raise PeerError("?", "a malformed note")
        fragment = natural(value[0], "a fragment", FRAGMENTS_MAX - 1)
        tick = natural(value[1], "a tick", TICKS_MAX - 1)
        content = _content(value[2])
        payload = None if value[3] is None else ref_from_json(value[3])
        copy_hash = b"" if value[4] == "" else from_hex(value[4], "a copy's hash", COPY_HASH_BYTES)
        note = Note(fragment, tick, content, payload, copy_hash, value[5])
        if (payload is not None) != isinstance(content, (Parcel, Offer)):
            raise PeerError("?", "a note whose vector does not belong to what it says")
        if (copy_hash and not isinstance(content, Parcel)) or (note.again and not isinstance(content, Offer | None)):
            raise PeerError("?", "a note whose parts do not belong together")
        if isinstance(content, Parcel) and payload is not None and content.amount.payload != payload.digest:
            raise PeerError("?", "a parcel that names two vectors")
        return note


def _content_json(content: Content) -> list[Any] | None:
    match content:
        case None:
            return None
        case Absent():
            return ["absent"]
        case Offer(radius, weight):
            return ["offer", radius.hex(), weight.hex()]
    return content.to_json()


def _content(value: Any) -> Content:
    if value is None:
        return None
    if value == ["absent"]:
        return Absent()
    if isinstance(value, list) and len(value) == 3 and value[0] == "offer":
        return Offer(real(value[1]), real(value[2]))
    return message_from_json(value)


def real(value: Any) -> float:
    """A float from the text that `float.hex` writes. Raises PeerError unless it is that, and finite."""
    try:
        number = float.fromhex(value) if isinstance(value, str) and len(value) <= 32 else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number.hex() != value:
        raise PeerError("?", f"not a finite number in canonical form: {str(value)[:40]}")
    return number


def ref_to_json(ref: BlobRef) -> list[Any]:
    """Plain values for canonical bytes."""
    return [ref.digest.hex(), ref.size, ref.chunk_bytes]


def ref_from_json(value: Any) -> BlobRef:
    """The inverse of `ref_to_json`. Raises PeerError."""
    if not isinstance(value, list) or len(value) != 3:
        raise PeerError("?", "a malformed reference to a vector")
    return BlobRef(
        from_hex(value[0], "a digest", DIGEST_BYTES), natural(value[1], "a size"), natural(value[2], "chunks")
    )


__all__ = ["Absent", "Content", "Fence", "Note", "Offer", "Parcel", "Receipt", "real"]
