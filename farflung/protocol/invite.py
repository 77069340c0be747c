"""One string that is enough to join: the run's id, where to knock, and for closed runs the join secret."""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import dataclass

from farflung.protocol import limits
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import ConfigError, PeerError
from farflung.protocol.genesis import RUN_ID_BYTES

PREFIX = "farflung1"
_HINT = "copy the whole line that `farflung new` or `farflung invite` printed"


@dataclass(frozen=True)
class Invite:
    """`addresses` are "peerid@host:port" of members; `dht` are multiaddresses of the run's DHT."""

    run_id: bytes
    addresses: tuple[str, ...]
    dht: tuple[str, ...] = ()
    secret: bytes = b""

    def __str__(self) -> str:
        """One word without punctuation that mail programs would break."""
        data = encode_canonical(
            {
                "addresses": list(self.addresses),
                "dht": list(self.dht),
                "run": self.run_id.hex(),
                "secret": self.secret.hex(),
            }
        )
        packed = zlib.crc32(data).to_bytes(4, "big") + zlib.compress(data, 9)
        return PREFIX + base64.urlsafe_b64encode(packed).decode("ascii").rstrip("=")


def parse_invite(text: str) -> Invite:
    """The invite in `text`. Raises ConfigError, saying what is wrong with it."""
    text = text.strip()
    if not text.startswith(PREFIX):
        raise ConfigError(f"this is not an invite: it does not start with {PREFIX}. To join, {_HINT}")
    if len(text) > limits.INVITE_CHARS_MAX:
        raise ConfigError(f"this is not an invite: it has {len(text)} characters")
    body = text.removeprefix(PREFIX)
    try:
        packed = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        inflate = zlib.decompressobj()
        data = inflate.decompress(packed[4:], limits.INVITE_CHARS_MAX)
        whole = (
            inflate.eof and not inflate.unused_data and base64.urlsafe_b64encode(packed).rstrip(b"=") == body.encode()
        )
        if not whole or zlib.crc32(data) != int.from_bytes(packed[:4], "big"):
            raise ConfigError(f"the invite is damaged or cut off: {_HINT}")
        value = decode_canonical(data, bytes_max=limits.INVITE_CHARS_MAX)
        invite = Invite(
            bytes.fromhex(value["run"]), tuple(value["addresses"]), tuple(value["dht"]), bytes.fromhex(value["secret"])
        )
    except (binascii.Error, zlib.error, PeerError, ValueError, KeyError, TypeError):
        raise ConfigError(f"the invite is damaged or cut off: {_HINT}") from None
    if len(invite.run_id) != RUN_ID_BYTES or not all(isinstance(x, str) for x in (*invite.addresses, *invite.dht)):
        raise ConfigError(f"the invite is damaged or cut off: {_HINT}")
    return invite
