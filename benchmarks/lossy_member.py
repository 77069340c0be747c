"""A real member on a bad line: `farflung join`, with a transport that loses what its options say.

    python benchmarks/lossy_member.py '{"seed": 0, "bulk": 0.1, "log": ...}' join INVITE --home ...

Only the transport differs: losses are made at the caller, under the real gRPC and TLS. `push_sum_real.py` starts these.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farflung.node.transport.grpc import GrpcTransport
from farflung.protocol.blob import BlobRef
from farflung.protocol.errors import FarflungError
from farflung.protocol.mixing.notes import Note
from farflung.protocol.record import PeerRecord
from farflung.protocol.wire import decode_message

DEADLY_VECTOR = 2
"""Which vector of its last mixing a member does not survive: the second, so that mass is under way both ways."""


@dataclass
class Faults:
    """What is lost, as shares of calls, each kind from its own seeded stream. `log` gets a line per call."""

    seed: int = 0
    bulk: float = 0.0
    """Of all bulk calls: half of these never reach the peer, of the other half the answer is lost after it was sent."""
    vectors: float = 0.0
    """Of the vectors that members mix: these never arrive, however often they are asked for."""
    notes: float = 0.0
    """Of what members tell each other while they mix; the sender believes that it has arrived."""
    die_round: int = 0
    """kill -9 in the middle of the first mixing after this round's certificate; 0: never."""
    log: str = os.devnull
    _streams: dict[str, random.Random] = field(default_factory=dict)

    def draw(self, kind: str) -> float:
        """The next number of one stream, in [0, 1)."""
        stream = self._streams.setdefault(kind, random.Random(f"{self.seed} {kind}"))
        return stream.random()

    def note(self, what: str, fate: str) -> None:
        """A line for the experiment; what a kill -9 leaves is whole lines."""
        with Path(self.log).open("a", encoding="utf-8") as file:
            file.write(json.dumps([round(time.time(), 3), what, fate]) + "\n")

    def never(self, digest: bytes) -> bool:
        """Whether this vector is one that never arrives."""
        found = hashlib.sha256(f"{self.seed}".encode() + digest).digest()
        return int.from_bytes(found[:4], "big") < self.vectors * 2**32


class LossyTransport(GrpcTransport):
    """`GrpcTransport` under `faults`. A call whose request or answer is lost ends as one on a broken connection."""

    faults = Faults()

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._listed: set[bytes] = set()
        """Blobs whose list of chunks was asked for: accounts and states. Vectors are fetched without."""
        self._mixing, self._vectors = 0, 0

    async def deliver(self, to: PeerRecord, envelope: bytes, *, deadline_s: float) -> None:
        """See `GrpcTransport`; a lost note is no error."""
        message = decode_message(envelope, self._run_id)
        if isinstance(message.statement, Note):
            if message.round_index > self._mixing:
                self._mixing, self._vectors = message.round_index, 0
            lost = self.faults.draw("note") < self.faults.notes
            self.faults.note("note", "lost" if lost else "sent")
            if lost:
                return
        await super().deliver(to, envelope, deadline_s=deadline_s)

    async def fetch(
        self, to: PeerRecord, ref: BlobRef, chunks: Sequence[int], *, idle_s: float
    ) -> AsyncIterator[tuple[int, bytes]]:
        """See `GrpcTransport`."""
        if not chunks:
            self._listed.add(ref.digest)
        vector = ref.digest not in self._listed
        chance, fate = self.faults.draw("bulk"), "sent"
        if chance < self.faults.bulk:
            fate = "request lost" if chance < self.faults.bulk / 2 else "answer lost"
        if vector and self.faults.never(ref.digest):
            fate = "never"
        self.faults.note("vector" if vector else "blob", fate)
        if fate in ("request lost", "never"):
            raise ConnectionError("lost on the way there")
        async with aclosing(super().fetch(to, ref, chunks, idle_s=idle_s)) as stream:
            async for index, data in stream:
                if fate == "sent":
                    yield index, data
        if fate == "answer lost":
            raise ConnectionError("lost on the way back")
        if vector:
            self._die_if_due()

    def _die_if_due(self) -> None:
        self._vectors += 1
        if 0 < self.faults.die_round <= self._mixing and self._vectors == DEADLY_VECTOR:
            self.faults.note("life", f"ended in the mixing of round {self._mixing}")
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """`farflung`, with other lines."""
    from farflung import cli
    from farflung.node import opening

    LossyTransport.faults = Faults(**json.loads(sys.argv[1]))
    opening.GrpcTransport = LossyTransport  # type: ignore[misc]
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FarflungError as error:
        sys.exit(f"{type(error).__name__}: {error}")
