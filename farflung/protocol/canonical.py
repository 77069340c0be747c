"""Canonical bytes: one value, one byte string.

JSON with sorted keys, no white space, ASCII only, no floats (write them as text), integers of at most 64 bits.
A person can read it, any language can write it, and `decode_canonical` refuses every byte string that
`encode_canonical` would not have written, so a digest or a signature over the bytes is one over the value.
"""

from __future__ import annotations

import json
from typing import Any

from farflung.protocol import limits
from farflung.protocol.errors import LocalError, PeerError


def encode_canonical(value: Any) -> bytes:
    """Canonical bytes of nested dicts (text keys), lists, text, integers, booleans and None.

    Raises LocalError for any other type: what we sign is ours to get right.
    """
    _check(value, limits.JSON_DEPTH_MAX)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def decode_canonical(data: bytes, *, bytes_max: int, peer: str = "?") -> Any:
    """The value behind canonical bytes. Raises PeerError if they are too long, malformed or not canonical."""
    if len(data) > bytes_max:
        raise PeerError(peer, f"{len(data)} bytes of text where {bytes_max} are allowed")
    try:
        value = json.loads(data, parse_float=_refuse, parse_constant=_refuse)
        again = encode_canonical(value)
    except (ValueError, RecursionError, LocalError) as error:
        raise PeerError(peer, f"malformed text: {str(error)[:120]}") from None
    if again != data:
        raise PeerError(peer, "text that is not in canonical form")
    return value


def _refuse(text: str) -> Any:
    raise ValueError(f"a float: {text[:20]}")


def _check(value: Any, depth: int) -> None:
    if depth < 0:
        raise LocalError(f"canonical text nests deeper than {limits.JSON_DEPTH_MAX}")
    if value is None or isinstance(value, (bool, str)):
        return
    if isinstance(value, int):
        if abs(value) > limits.INTEGER_MAX:
            raise LocalError(f"an integer beyond 64 bits: {value}")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise LocalError(f"a key that is not text: {key!r}")
            _check(item, depth - 1)
        return
    if isinstance(value, (list, tuple)):
        for item in value:
            _check(item, depth - 1)
        return
    raise LocalError(f"{type(value).__name__} has no canonical form")
