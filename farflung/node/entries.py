"""The round machine's persisted statements <-> bytes in the journal. Written and read by this node alone."""

from __future__ import annotations

from typing import Any

from farflung.protocol import limits
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.effects import Persist
from farflung.protocol.errors import LocalError
from farflung.protocol.manifest import Manifest, decode_manifest
from farflung.protocol.statements import Announcement
from farflung.protocol.wire import Promise, Proposal


def encode_entry(entry: Persist) -> bytes:
    """The bytes of one statement to keep."""
    match entry.value:
        case Announcement() as item:
            return encode_canonical(item.to_json())
        case Promise(view, voted):
            return encode_canonical({"view": view, "voted": voted and [voted[0], _text(voted[1])]})
        case Proposal(view, manifest):
            return encode_canonical({"manifest": _text(manifest), "view": view})
        case (view, manifest, state_digest):
            return encode_canonical({"manifest": _text(manifest), "state": state_digest.hex(), "view": view})
    raise LocalError(f"nothing to keep of {entry.kind}")


def decode_entry(kind: str, data: bytes) -> tuple[str, object]:
    """What `RoundMachine.begin` takes back."""
    value: Any = decode_canonical(data, bytes_max=2 * limits.CONTROL_BYTES_MAX)
    match kind:
        case "own":
            return kind, Announcement.from_json(value)
        case "promise":
            voted = value["voted"]
            return kind, Promise(value["view"], voted and (voted[0], _manifest(voted[1])))
        case "proposal":
            return kind, Proposal(value["view"], _manifest(value["manifest"]))
        case "vote":
            return kind, (value["view"], _manifest(value["manifest"]), bytes.fromhex(value["state"]))
    raise LocalError(f"a journal entry of kind {kind!r}")


def _text(manifest: Manifest) -> str:
    return manifest.canonical_bytes.decode("ascii")


def _manifest(text: str) -> Manifest:
    return decode_manifest(text.encode("ascii"))
