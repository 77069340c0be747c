"""A blob's digest binds its bytes, its size and its chunks; a digest list is believed only if it hashes to it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.protocol import limits
from farflung.protocol.blob import BlobRef, ChunkHasher, check_list, choose_chunk_bytes, chunk_digest, describe, split
from farflung.protocol.errors import PeerError

CHUNK = limits.BULK_CHUNK_BYTES_MIN


def content(size: int, seed: int = 0) -> bytes:
    return bytes((at * 31 + seed) & 255 for at in range(min(size, 997))) * (size // 997 + 1)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5 * CHUNK), st.lists(st.integers(1, 2 * CHUNK), max_size=6), st.integers(0, 255))
def test_a_stream_in_any_pieces_has_the_digests_of_the_whole(size, cuts, seed):
    data = content(size, seed)[:size]
    ref, digests = describe(data, CHUNK)
    hasher, start = ChunkHasher(CHUNK), 0
    for cut in cuts:
        hasher.feed(data[start : start + cut])
        start += cut
    hasher.feed(data[start:])
    assert hasher.end() == digests == [chunk_digest(piece) for piece in split(data, CHUNK)]
    assert ref.chunks == len(digests)
    assert b"".join(data[slice(*ref.span(at))] for at in range(ref.chunks)) == data
    assert check_list(ref, b"".join(digests), peer="?") == digests


def test_every_part_of_a_reference_changes_the_digest():
    data = content(3 * CHUNK)[: 3 * CHUNK]
    digests = {
        describe(data, CHUNK)[0].digest,
        describe(data, 2 * CHUNK)[0].digest,
        describe(data[:-1], CHUNK)[0].digest,
        describe(data + b"\0", CHUNK)[0].digest,
        describe(bytes([data[0] ^ 1]) + data[1:], CHUNK)[0].digest,
        describe(data[CHUNK:] + data[:CHUNK], CHUNK)[0].digest,
    }
    assert len(digests) == 6


def test_a_wrong_digest_list_is_refused():
    ref, digests = describe(content(3 * CHUNK)[: 3 * CHUNK], CHUNK)
    listed = b"".join(digests)
    bent = bytes([listed[0] ^ 1]) + listed[1:]
    for wrong in (bent, listed[:-32], listed + bytes(32), listed[32:] + listed[:32], b""):
        with pytest.raises(PeerError):
            check_list(ref, wrong, peer="x")


@pytest.mark.parametrize(
    ("digest", "size", "chunk"),
    [
        (bytes(31), 1, CHUNK),
        (bytes(32), 0, CHUNK),
        (bytes(32), -1, CHUNK),
        (bytes(32), 1, CHUNK - 1),
        (bytes(32), 1, limits.BULK_CHUNK_BYTES + 1),
        (bytes(32), CHUNK * limits.BLOB_CHUNKS_MAX + 1, CHUNK),
    ],
)
def test_a_reference_with_impossible_numbers_is_a_peer_error(digest, size, chunk):
    with pytest.raises(PeerError):
        BlobRef(digest, size, chunk)


def test_chunks_are_powers_of_two_within_the_limits():
    sizes = [1 << at for at in range(0, 42)]
    chunks = [choose_chunk_bytes(size) for size in sizes]
    assert chunks == sorted(chunks)
    assert {chunk & (chunk - 1) for chunk in chunks} == {0}
    assert (chunks[0], chunks[-1]) == (limits.BULK_CHUNK_BYTES_MIN, limits.BULK_CHUNK_BYTES)
