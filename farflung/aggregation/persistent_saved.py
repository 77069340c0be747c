"""A member of persistent push-sum as bytes: its sum, its momentum, its ledger, and all that is on its way, as one.

What is not in a checkpoint is lost with the process, and persistent mass never grows back; a checkpoint of x and w
alone would lose whatever the member had in flight. Layout, all integers big-endian, all vectors little-endian:

    8 bytes   length of the header
    header    canonical text: claim and weights as hexadecimal floats, lengths, the escrow's receivers and numbers
    ledger    `encode_ledger`
    vectors   x, the momentum if there is one, then the escrow's numerators in the header's order
    32 bytes  SHA-256 of everything before
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from farflung.aggregation.mass import Mass
from farflung.aggregation.persistent import PersistentRule, PersistentSum
from farflung.aggregation.persistent_member import Escrow, PersistentMember
from farflung.protocol import limits
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import ConfigError, PeerError
from farflung.protocol.identity import PeerId
from farflung.protocol.ledger.books import Terms
from farflung.protocol.ledger.saved import decode_ledger, encode_ledger

TYPES = {"<f4": torch.float32, "<f8": torch.float64}
DIGEST_BYTES = 32


def encode_member(member: PersistentMember) -> bytes:
    """Everything that must survive a crash; the run's rule and terms are not in it.

    Costs a SHA-256 over x, the momentum and the escrow, and in passing three times their memory.
    """
    mass, ledger = member.sum.mass, encode_ledger(member.ledger)
    kind = {kept: name for name, kept in TYPES.items()}[mass.numerator_d.dtype]
    escrow = sorted(member.escrow.items(), key=lambda item: item[0])
    header = encode_canonical(
        {
            "buffers": len(member.sum.buffers),
            "claim": member.sum.claim.hex(),
            "escrow": [[str(peer), seq, part.weight.hex()] for (peer, seq), part in escrow],
            "ledger_bytes": len(ledger),
            "size": len(mass.numerator_d),
            "type": kind,
            "weight": mass.weight.hex(),
        }
    )
    vectors = [mass.numerator_d, *member.sum.buffers, *(part.numerator_d for _, part in escrow)]
    pieces = [
        len(header).to_bytes(8, "big"),
        header,
        ledger,
        *(vector.numpy().astype(kind).tobytes() for vector in vectors),
    ]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return b"".join([*pieces, digest.digest()])


def decode_member(data: bytes, rule: PersistentRule, terms: Terms, *, threads: int = 1) -> PersistentMember:
    """The inverse of `encode_member`, in memory of its own. Raises ConfigError if the bytes are damaged, or the run's
    rule or terms are others than they were.
    """
    content = memoryview(data)[:-DIGEST_BYTES]
    if len(data) < DIGEST_BYTES or hashlib.sha256(content).digest() != data[-DIGEST_BYTES:]:
        raise ConfigError(f"a saved member of {len(data)} bytes is damaged: join anew")
    start = 8 + int.from_bytes(content[:8], "big")
    try:
        header = decode_canonical(bytes(content[8:start]), bytes_max=limits.LEDGER_BYTES_MAX)
        stop = start + header["ledger_bytes"]
        ledger = decode_ledger(bytes(content[start:stop]), terms)
    except PeerError as error:
        raise ConfigError(f"a saved member does not fit this run: {error.why}") from None
    if header["buffers"] != (1 if rule.momentum else 0):
        raise ConfigError(f"a saved member has {header['buffers']} momentum vectors, which is not so with {rule}")
    x_d, *rest = _vectors(content[stop:], header["type"], header["size"])
    buffers, escrowed = rest[: header["buffers"]], rest[header["buffers"] :]
    mass = Mass(x_d, float.fromhex(header["weight"]), threads=threads)
    escrow: Escrow = {}
    for (peer, seq, weight), part_d in zip(header["escrow"], escrowed, strict=True):
        escrow[PeerId.parse(peer), seq] = Mass(part_d, float.fromhex(weight), threads=threads)
    held = PersistentSum(rule, mass, tuple(buffers), float.fromhex(header["claim"]))
    return PersistentMember(held, ledger, escrow)


def _vectors(data: memoryview, kind: str, size: int) -> list[Tensor]:
    values = np.frombuffer(data, kind).astype(np.dtype(kind).newbyteorder("="))  # a copy, to be written to
    return [torch.from_numpy(values[start : start + size]) for start in range(0, len(values), size)]
