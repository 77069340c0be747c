"""The one tree of errors, and whose fault each is.

    FarflungError
    ├── LocalError      our own code broke its own rule: stop, and file a bug
    ├── PeerError       their bytes: drop the message or the peer, log why, carry on
    ├── TooFewPeers     nobody's fault: wait, or skip the round
    └── ConfigError     the user can fix it: say what to change

Bytes from the network raise nothing but `PeerError`. A message ends with the value that was wrong.
"""

from __future__ import annotations


class FarflungError(Exception):
    """Whatever farflung raises on purpose."""


class LocalError(FarflungError):
    """Our own code broke the order of things. Never caused by a peer; never caught and ignored."""


class PeerError(FarflungError):
    """A peer sent something that may not be believed. `peer` is its short name, or "?" when nobody signed it."""

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(f"peer {peer}: {why}")
        self.peer = peer
        self.why = why


class TooFewPeers(FarflungError):
    """There are not enough rows, votes or answers to go on with. Wait, or skip the round."""


class ConfigError(FarflungError):
    """The user's input cannot work. The message says what to change; commands print it as one line and exit with 2."""
