"""A small model in place of a big one: what nodes must believe of sizes so that they exchange as the big one's would.

Bulk bytes are charged `scale` times. A payload must then be cut as finely as the big one's (about 64 chunks), and the
first guess of a peer's speed must be as much too fast or slow as it would be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from farflung.node import blob_state
from farflung.protocol import limits

SMALLEST_CHUNK_BYTES = 16
"""A digest is 32 bytes: below this a list of digests is larger than what it describes."""


@contextmanager
def stands_in(scale: float) -> Iterator[None]:
    """In this block chunks may be smaller, and speeds are guessed lower, by `scale`."""
    smallest, guess = limits.BULK_CHUNK_BYTES_MIN, blob_state.FIRST_BYTES_PER_S
    if scale > 1:
        small = smallest
        while small > SMALLEST_CHUNK_BYTES and small * scale > smallest:
            small //= 2
        limits.BULK_CHUNK_BYTES_MIN = small
        blob_state.FIRST_BYTES_PER_S = max(1, int(guess / scale))
    try:
        yield
    finally:
        limits.BULK_CHUNK_BYTES_MIN, blob_state.FIRST_BYTES_PER_S = smallest, guess
