"""How to reach a peer: a signed record with a lease. Directories carry records and need not be trusted."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, replace
from typing import Any

from farflung.protocol import limits
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import LocalError, PeerError
from farflung.protocol.identity import Identity, PeerId, check_signature

_TAG = b"farflung record\0"


@dataclass(frozen=True)
class PeerRecord:
    """What a peer says of itself. `certificate_der` is its TLS certificate: signed here, pinned by whoever calls it."""

    run_id: bytes
    public_key: bytes
    addresses: tuple[str, ...]
    """"host:port", the most likely to work first. Empty: the peer cannot be called."""
    certificate_der: bytes
    """Self-signed EC P-256 certificate; empty when the peer serves without TLS."""
    issued_ms: int
    """Unix time of signing. Of two records of one peer the later wins."""
    lease_ms: int
    """Believed until issued_ms + lease_ms."""
    name: str = ""
    version: str = ""
    upload_bytes_per_s: int = 0
    """What the peer says it can upload; 0 = unknown. Only used to share out work."""
    signature: bytes = b""

    @property
    def peer_id(self) -> PeerId:
        """Whose record it is."""
        return PeerId.of(self.public_key)

    def alive(self, unix_ms: int) -> bool:
        """Whether the lease still runs."""
        return unix_ms < self.issued_ms + self.lease_ms

    def _json(self) -> dict[str, Any]:
        return {
            "addresses": list(self.addresses),
            "certificate": base64.b64encode(self.certificate_der).decode("ascii"),
            "issued_ms": self.issued_ms,
            "key": self.public_key.hex(),
            "lease_ms": self.lease_ms,
            "name": self.name,
            "run": self.run_id.hex(),
            "upload_bytes_per_s": self.upload_bytes_per_s,
            "version": self.version,
        }

    def signed(self, identity: Identity) -> PeerRecord:
        """The same record with its signature."""
        return replace(self, signature=identity.sign(_TAG + encode_canonical(self._json())))

    def encode(self) -> bytes:
        """Canonical bytes, at most limits.RECORD_BYTES_MAX."""
        return encode_canonical({**self._json(), "signature": self.signature.hex()})


def decode_record(data: bytes, *, run_id: bytes | None = None) -> PeerRecord:
    """A record whose signature is right and which belongs to `run_id` (None: to any). Raises PeerError."""
    value = decode_canonical(data, bytes_max=limits.RECORD_BYTES_MAX)
    try:
        record = PeerRecord(
            run_id=bytes.fromhex(value["run"]),
            public_key=bytes.fromhex(value["key"]),
            addresses=tuple(value["addresses"]),
            certificate_der=base64.b64decode(value["certificate"], validate=True),
            issued_ms=value["issued_ms"],
            lease_ms=value["lease_ms"],
            name=value["name"],
            version=value["version"],
            upload_bytes_per_s=value["upload_bytes_per_s"],
            signature=bytes.fromhex(value["signature"]),
        )
        sound = (
            len(value) == 10
            and len(record.addresses) <= limits.ADDRESSES_MAX
            and all(_is_plain(item, 256) and item for item in record.addresses)
            and _is_plain(record.name, limits.NAME_CHARS_MAX)
            and _is_plain(record.version, limits.NAME_CHARS_MAX)
            and all(
                type(number) is int and number >= 0
                for number in (record.issued_ms, record.lease_ms, record.upload_bytes_per_s)
            )
        )
        sound = sound and record.encode() == data
    except (KeyError, TypeError, ValueError, AttributeError, LocalError, binascii.Error) as error:
        raise PeerError("?", f"malformed record: {error}") from None
    if not sound:
        raise PeerError("?", "a record with values out of bounds")
    check_signature(record.public_key, record.signature, _TAG + encode_canonical(record._json()), what="a record")
    if run_id is not None and record.run_id != run_id:
        raise PeerError(record.peer_id.short, "a record of another run")
    return record


def _is_plain(text: Any, most: int) -> bool:
    """Short and printable: it is shown on terminals."""
    return isinstance(text, str) and len(text) <= most and text.isprintable()
