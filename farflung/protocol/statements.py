"""Signed statements that outlive their message: they go into manifests, where anybody can check them later."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from farflung.protocol import limits
from farflung.protocol.blob import BlobRef
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import PeerError
from farflung.protocol.identity import PeerId, check_signature

Sign = Callable[[bytes], bytes]


def natural(value: Any, what: str, most: int = limits.INTEGER_MAX) -> int:
    """`value` as an integer in [0, most]. Raises PeerError."""
    if type(value) is not int or not 0 <= value <= most:
        raise PeerError("?", f"{what} is not a whole number up to {most}: {str(value)[:40]}")
    return value


def from_hex(value: Any, what: str, length: int) -> bytes:
    """`value` as `length` bytes, from lower-case hexadecimal and nothing else. Raises PeerError."""
    if not isinstance(value, str) or len(value) != 2 * length:
        raise PeerError("?", f"{what} is not {length} bytes")
    try:
        data = bytes.fromhex(value)
    except ValueError:
        raise PeerError("?", f"{what} is not hexadecimal") from None
    if data.hex() != value:  # fromhex also takes capitals, and white space instead of bytes
        raise PeerError("?", f"{what} is not in canonical form")
    return data


@dataclass(frozen=True, slots=True)
class Announcement:
    """ "This is my payload of this round." One per member and round; a second, different one is proof of cheating.

    `steps` and `tokens` are claims: the run's weight policy says what they count for, and caps it.
    `payload` is None when the member abstains.
    """

    public_key: bytes
    payload: BlobRef | None
    steps: int
    tokens: int
    signature: bytes = b""

    @property
    def peer_id(self) -> PeerId:
        """Whose payload it is."""
        return PeerId.of(self.public_key)

    def signed(self, slot: Slot, sign: Sign) -> Announcement:
        """The same statement with the signature for one round."""
        return replace(self, signature=sign(self._signed_bytes(slot)))

    def check(self, slot: Slot) -> None:
        """Raise PeerError unless the signature is right for this round."""
        check_signature(self.public_key, self.signature, self._signed_bytes(slot), what="an announcement")

    def _signed_bytes(self, slot: Slot) -> bytes:
        return b"farflung announce\0" + slot.bytes() + encode_canonical({**self.to_json(), "signature": ""})

    def to_json(self) -> dict[str, Any]:
        """Plain values for canonical bytes."""
        ref = self.payload
        return {
            "key": self.public_key.hex(),
            "payload": [ref.digest.hex(), ref.size, ref.chunk_bytes] if ref else None,
            "signature": self.signature.hex(),
            "steps": self.steps,
            "tokens": self.tokens,
        }

    @staticmethod
    def from_json(value: Any) -> Announcement:
        """The inverse of `to_json`. Raises PeerError."""
        if not isinstance(value, dict) or value.keys() != {"key", "payload", "signature", "steps", "tokens"}:
            raise PeerError("?", "a malformed announcement")
        ref = value["payload"]
        return Announcement(
            public_key=from_hex(value["key"], "a key", 32),
            payload=None if ref is None else _ref_from_json(ref),
            steps=natural(value["steps"], "steps"),
            tokens=natural(value["tokens"], "tokens"),
            signature=from_hex(value["signature"], "a signature", 64),
        )


def _ref_from_json(value: Any) -> BlobRef:
    if not isinstance(value, list) or len(value) != 3:
        raise PeerError("?", "an announcement of a malformed payload")
    digest, size, chunk_bytes = value
    return BlobRef(from_hex(digest, "a digest", 32), natural(size, "a size"), natural(chunk_bytes, "a chunk", 1 << 30))


@dataclass(frozen=True, slots=True)
class Slot:
    """One round of one run, on one chain: what a statement is bound to."""

    run_id: bytes
    round_index: int
    parent: bytes

    def bytes(self) -> bytes:
        """The bytes that go under every signature made for this slot."""
        return self.run_id + self.round_index.to_bytes(8, "big") + self.parent


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """ "Admit me." `tip` is a recent manifest digest, so an old request cannot be replayed for ever.

    `proof` is HMAC-SHA256 under the join secret over (run, key, tip); empty where an open run is joined without it.
    """

    public_key: bytes
    tip: bytes
    proof: bytes
    signature: bytes = b""

    @property
    def peer_id(self) -> PeerId:
        """Who asks."""
        return PeerId.of(self.public_key)

    @staticmethod
    def make(run_id: bytes, public_key: bytes, tip: bytes, secret: bytes, sign: Sign) -> JoinRequest:
        """A signed request; an empty `secret` makes one without proof."""
        proof = join_proof(secret, run_id, public_key, tip) if secret else b""
        bare = JoinRequest(public_key, tip, proof)
        return JoinRequest(public_key, tip, proof, sign(bare._signed_bytes(run_id)))

    def check(self, run_id: bytes) -> None:
        """Raise PeerError unless the signature is right."""
        check_signature(self.public_key, self.signature, self._signed_bytes(run_id), what="a join request")

    def proves(self, run_id: bytes, secret: bytes) -> bool:
        """Whether the asker knows the join secret."""
        return hmac.compare_digest(self.proof, join_proof(secret, run_id, self.public_key, self.tip))

    def _signed_bytes(self, run_id: bytes) -> bytes:
        return b"farflung join\0" + run_id + self.tip + self.proof

    def to_json(self) -> dict[str, Any]:
        """Plain values for canonical bytes."""
        return {
            "key": self.public_key.hex(),
            "proof": self.proof.hex(),
            "signature": self.signature.hex(),
            "tip": self.tip.hex(),
        }

    @staticmethod
    def from_json(value: Any) -> JoinRequest:
        """The inverse of `to_json`. Raises PeerError."""
        if not isinstance(value, dict) or value.keys() != {"key", "proof", "signature", "tip"}:
            raise PeerError("?", "a malformed join request")
        proof = value["proof"]
        return JoinRequest(
            public_key=from_hex(value["key"], "a key", 32),
            tip=from_hex(value["tip"], "a digest", 32),
            proof=b"" if proof == "" else from_hex(proof, "a proof", 32),
            signature=from_hex(value["signature"], "a signature", 64),
        )


def join_proof(secret: bytes, run_id: bytes, public_key: bytes, tip: bytes) -> bytes:
    """HMAC-SHA256 under the join secret."""
    return hmac.digest(secret, b"farflung join proof\0" + run_id + public_key + tip, hashlib.sha256)


@dataclass(frozen=True, slots=True)
class LeaveNotice:
    """ "Leave me out from the next manifest on." Bound to the round in which it is given."""

    public_key: bytes
    signature: bytes = b""

    @property
    def peer_id(self) -> PeerId:
        """Who leaves."""
        return PeerId.of(self.public_key)

    @staticmethod
    def make(public_key: bytes, slot: Slot, sign: Sign) -> LeaveNotice:
        """A signed notice."""
        return LeaveNotice(public_key, sign(b"farflung leave\0" + slot.bytes()))

    def check(self, slot: Slot) -> None:
        """Raise PeerError unless the signature is right for this round."""
        check_signature(self.public_key, self.signature, b"farflung leave\0" + slot.bytes(), what="a leave notice")

    def to_json(self) -> dict[str, Any]:
        """Plain values for canonical bytes."""
        return {"key": self.public_key.hex(), "signature": self.signature.hex()}

    @staticmethod
    def from_json(value: Any) -> LeaveNotice:
        """The inverse of `to_json`. Raises PeerError."""
        if not isinstance(value, dict) or value.keys() != {"key", "signature"}:
            raise PeerError("?", "a malformed leave notice")
        return LeaveNotice(from_hex(value["key"], "a key", 32), from_hex(value["signature"], "a signature", 64))


def decode_statement(data: bytes, *, peer: str) -> Any:
    """The plain value of a canonical statement of one control message. Raises PeerError."""
    return decode_canonical(data, bytes_max=limits.CONTROL_BYTES_MAX, peer=peer)
