"""Checking a signature twice gives the same answer twice: when many members of one process hear the same statement, its
signature is checked once. In the real world every node checks for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from farflung.protocol import identity

REMEMBERED = 256
"""Statements of one member: those of its last dozens of rounds."""


class _Key:
    """A public key that remembers what it has verified; a wrong signature raises, and that is never remembered."""

    def __init__(self, public_key: bytes) -> None:
        self.verify = lru_cache(REMEMBERED)(Ed25519PublicKey.from_public_bytes(public_key).verify)


@contextmanager
def remembered_signatures() -> Iterator[None]:
    """In this block, in this process. What was remembered is forgotten at its end."""
    before = identity.load_key
    identity.load_key = lru_cache(1024)(_Key)  # type: ignore[arg-type]
    try:
        yield
    finally:
        identity.load_key = before
