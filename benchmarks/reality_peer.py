"""One end of real transfers: serves a blob of random bytes over `GrpcTransport`, and fetches a neighbour's on command.

    python benchmarks/reality_peer.py '{"listen": "10.77.0.1:4400", "seed": 0, "bytes": 25000000}'

Talks JSON, a line each way. It begins with {"record", "ref"}. Told {"record", "ref"} of others, it connects and says
{"ready": true}; told {"at": t} it fetches all their blobs at CLOCK_MONOTONIC t and says {"ended_s", "bytes"}.
`reality.py` starts these.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from farflung.node.blobs import MemoryBlob
from farflung.node.runtime import DIGEST_LIST
from farflung.node.transport.grpc import GrpcTransport
from farflung.protocol.blob import BlobRef
from farflung.protocol.errors import PeerError
from farflung.protocol.identity import Identity
from farflung.protocol.record import PeerRecord, decode_record

RUN = b"reality\0" * 4
IDLE_S = 60.0


class Giver:
    """A `Service` that gives one blob, or its digest list, and has nothing else."""

    def __init__(self, blob: MemoryBlob) -> None:
        self.blob = blob

    async def on_fetch(self, run_id: bytes, digest: bytes, chunks: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        if digest != self.blob.ref.digest:
            raise PeerError("?", "another blob")
        if not chunks:
            yield DIGEST_LIST, b"".join(self.blob.digests)
        for index in chunks:
            yield index, self.blob.read_chunk(index)


async def fetch(transport: GrpcTransport, to: PeerRecord, ref: BlobRef, chunks: Sequence[int]) -> int:
    return sum([len(data) async for _, data in transport.fetch(to, ref, chunks, idle_s=IDLE_S)])


async def talk(transport: GrpcTransport) -> None:
    """Do as told until stdin ends."""
    wanted: list[tuple[PeerRecord, BlobRef]] = []
    while line := await asyncio.to_thread(sys.stdin.readline):
        told = json.loads(line)
        if "record" in told:
            record = decode_record(bytes.fromhex(told["record"]), run_id=RUN)
            ref = BlobRef(bytes.fromhex(told["ref"][0]), *told["ref"][1:])
            wanted.append((record, ref))
            await fetch(transport, record, ref, ())
            say(ready=True)
        else:
            await asyncio.sleep(max(0.0, told["at"] - time.monotonic()))
            sizes = await asyncio.gather(*(fetch(transport, to, ref, range(ref.chunks)) for to, ref in wanted))
            say(ended_s=time.monotonic(), bytes=sum(sizes))


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


async def main() -> None:
    options = json.loads(sys.argv[1])
    data = random.Random(options["seed"]).randbytes(options["bytes"])
    blob = MemoryBlob.of(data)
    me = Identity(options["seed"].to_bytes(32, "big"))
    transport = GrpcTransport(RUN, listen=options["listen"])
    addresses = await transport.start(Giver(blob))  # type: ignore[arg-type]  # the rest is never called
    hour_ms = 3_600_000
    record = PeerRecord(
        RUN, me.public_key, addresses, transport.certificate_der, time.time_ns() // 1_000_000, hour_ms
    ).signed(me)
    say(record=record.encode().hex(), ref=[blob.ref.digest.hex(), blob.ref.size, blob.ref.chunk_bytes])
    try:
        await talk(transport)
    finally:
        await transport.stop()


if __name__ == "__main__":
    asyncio.run(main())
