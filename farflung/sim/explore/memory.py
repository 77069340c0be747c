"""Checking a signature twice gives the same answer twice: while many members of one process hear the same bytes, each
signature is checked once. Only explored worlds do this; every node of its own process checks for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from farflung.protocol import identity


class _Remembering:
    """A public key that knows what it has verified. A wrong signature is never remembered."""

    def __init__(self, public_key: bytes) -> None:
        self._key = Ed25519PublicKey.from_public_bytes(public_key)
        self._sound: dict[tuple[bytes, bytes], None] = {}

    def verify(self, signature: bytes, data: bytes) -> None:
        if (signature, data) not in self._sound:
            self._key.verify(signature, data)
            self._sound[signature, data] = None


@contextmanager
def remembered_signatures() -> Iterator[None]:
    """In this block, in this process. What was remembered is forgotten at its end."""
    keys: dict[bytes, _Remembering] = {}

    def load(public_key: bytes) -> _Remembering:
        if public_key not in keys:
            keys[public_key] = _Remembering(public_key)
        return keys[public_key]

    before = identity.load_key
    setattr(identity, "load_key", load)  # noqa: B010
    try:
        yield
    finally:
        setattr(identity, "load_key", before)  # noqa: B010
