"""Who a peer is: an Ed25519 key pair. The peer id is the hash of the public key.

The private key's file belongs to `node/store.py`; here are only values and pure functions.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from farflung.protocol.errors import PeerError

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
PEER_ID_BYTES = 20


@dataclass(frozen=True, order=True, slots=True)
class PeerId:
    """The first 20 bytes of SHA-256 of an Ed25519 public key. Orders as its bytes do; prints as base32."""

    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != PEER_ID_BYTES:
            raise PeerError("?", f"a peer id has {PEER_ID_BYTES} bytes, got {len(self.digest)}")

    def __hash__(self) -> int:
        return hash(self.digest)

    @staticmethod
    def of(public_key: bytes) -> PeerId:
        """The id that belongs to a public key."""
        return _id_of(public_key)

    @staticmethod
    def parse(text: str) -> PeerId:
        """The inverse of `str`. Raises PeerError."""
        try:
            return PeerId(base64.b32decode(text.upper(), casefold=False))
        except (ValueError, UnicodeError):
            raise PeerError("?", f"not a peer id: {text[:40]!r}") from None

    def __str__(self) -> str:
        return _text_of(self.digest)

    def __repr__(self) -> str:
        return f"PeerId({self.short})"

    @property
    def short(self) -> str:
        """Eight characters for people and logs."""
        return str(self)[:8]


@lru_cache(maxsize=4096)
def _id_of(public_key: bytes) -> PeerId:
    return PeerId(hashlib.sha256(b"farflung peer\0" + public_key).digest()[:PEER_ID_BYTES])


@lru_cache(maxsize=4096)
def _text_of(digest: bytes) -> str:
    return base64.b32encode(digest).decode("ascii").lower()


class Identity:
    """A key pair. `sign` is deterministic (RFC 8032), so the same statement always has the same signature."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key: bytes = self._key.public_key().public_bytes_raw()
        self.peer_id = PeerId.of(self.public_key)

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature over `data`."""
        return self._key.sign(data)

    def seed(self) -> bytes:
        """The 32 private bytes, for `node/store.py` alone."""
        return self._key.private_bytes_raw()


@lru_cache(maxsize=1024)
def load_key(public_key: bytes) -> Ed25519PublicKey:
    """A public key from its 32 bytes; the latest are remembered. Raises ValueError."""
    return Ed25519PublicKey.from_public_bytes(public_key)


def check_signature(public_key: bytes, signature: bytes, data: bytes, *, what: str) -> None:
    """Raise PeerError unless `signature` is `public_key`'s over `data`."""
    if len(public_key) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        raise PeerError("?", f"{what}: a key or signature of the wrong length")
    try:
        load_key(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise PeerError(PeerId.of(public_key).short, f"wrong signature on {what}") from None
