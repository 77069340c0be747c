"""The answering half: gRPC calls in, `Service` calls out.

Requests are parsed here and not by gRPC, so that nonsense becomes a refusal instead of a traceback.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from farflung.node.runtime import DIGEST_LIST, Service
from farflung.node.streams import closing
from farflung.node.transport.flow import Traffic, UploadCap
from farflung.protocol import limits
from farflung.protocol import messages_pb2 as pb
from farflung.protocol.errors import PeerError

_log = logging.getLogger(__name__)
_WHY_CHARS = 300
"""Of a refusal's reason on the wire: it travels in an HTTP/2 header."""
_DIGEST_PIECE_BYTES = 1 << 20

M = TypeVar("M", bound=Message)
Context = grpc.aio.ServicerContext[bytes, bytes]


class Handlers:
    """What a gRPC server needs to answer for a `Service` of one run."""

    def __init__(self, service: Service, run_id: bytes, traffic: Traffic, cap: UploadCap) -> None:
        self._service, self._run_id, self._traffic, self._cap = service, run_id, traffic, cap
        self._bugs_seen: set[str] = set()
        self._running: dict[asyncio.Task[Any], None] = {}

    def generic(self) -> list[grpc.GenericRpcHandler[bytes, bytes]]:
        """Handlers of both services, on raw bytes."""
        unary = {
            "Deliver": self._deliver,
            "Records": self._records,
            "Genesis": self._genesis,
            "Chain": self._chain,
            "Snapshot": self._snapshot,
        }
        control: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(self._answer(name, answer)) for name, answer in unary.items()
        }
        control["Watch"] = grpc.unary_stream_rpc_method_handler(self._stream("Watch", self._watch))
        bulk = {"Fetch": grpc.unary_stream_rpc_method_handler(self._stream("Fetch", self._fetch))}
        return [
            grpc.method_handlers_generic_handler("farflung.Control", control),
            grpc.method_handlers_generic_handler("farflung.Bulk", bulk),
        ]

    async def wind_up(self) -> None:
        """After the server's stop: wait until cancelled answers have ended, so that no task outlives the transport."""
        while self._running:
            for task in [*self._running]:
                task.cancel()
            await asyncio.wait([*self._running])

    def _note(self) -> None:
        task = asyncio.current_task()
        if task is not None and task not in self._running:
            self._running[task] = None
            task.add_done_callback(lambda done: self._running.pop(done, None))

    # -- control ---------------------------------------------------------------------------------------------------

    async def _deliver(self, request: bytes) -> Message:
        await self._service.on_envelope(request)
        return pb.Reply(accepted=True)

    async def _records(self, request: bytes) -> Message:
        asked = self._parse(pb.RecordsRequest, request)
        answer = await self._service.on_records(self._run_id, list(asked.records))
        return pb.RecordsReply(records=fitting(answer, limits.CONTROL_BYTES_MAX))

    async def _genesis(self, request: bytes) -> Message:
        self._parse(pb.GenesisRequest, request)
        return pb.GenesisReply(genesis=await self._service.on_genesis(self._run_id))

    async def _chain(self, request: bytes) -> Message:
        asked = self._parse(pb.ChainRequest, request)
        certificates, tip_round = await self._service.on_chain(self._run_id, asked.from_round)
        kept = fitting(certificates[: limits.CHAIN_ANSWER_MAX], limits.BULK_MESSAGE_BYTES_MAX)
        return pb.ChainReply(certificates=kept, tip_round=tip_round)

    async def _snapshot(self, request: bytes) -> Message:
        self._parse(pb.SnapshotRequest, request)
        after_round, ref = await self._service.on_snapshot(self._run_id)
        return pb.SnapshotReply(round=after_round, size=ref.size, chunk_bytes=ref.chunk_bytes, digest=ref.digest)

    # -- streams ---------------------------------------------------------------------------------------------------

    async def _watch(self, request: bytes) -> AsyncIterator[bytes]:
        self._parse(pb.WatchRequest, request)
        async with closing(self._service.on_watch(self._run_id)) as news:
            async for holdings in news:
                listed = [pb.Holding(digest=h.digest, all=h.all, chunks=h.chunks) for h in holdings]
                data = pb.Holdings(holdings=listed).SerializeToString()
                self._traffic.control_sent += len(data)
                yield data

    async def _fetch(self, request: bytes) -> AsyncIterator[bytes]:
        asked = self._parse(pb.BlobRequest, request)
        async with closing(self._service.on_fetch(self._run_id, asked.digest, list(asked.chunks))) as chunks:
            async for index, data in chunks:
                for piece in _pieces(data) if index == DIGEST_LIST else (data,):
                    message = encode_chunk(index, piece)
                    await self._cap.pay(len(message))
                    self._traffic.bulk_sent += len(message)
                    yield message

    # -- around every call -----------------------------------------------------------------------------------------

    def _parse(self, kind: type[M], request: bytes) -> M:
        message = parse(kind, request, peer="?")
        if message.run_id != self._run_id:  # type: ignore[attr-defined]
            raise PeerError("?", "a message of another run")
        return message

    def _answer(
        self, name: str, answer: Callable[[bytes], Awaitable[Message]]
    ) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def call(request: bytes, context: Context) -> bytes:
            self._note()
            self._traffic.control_received += len(request)
            try:
                data = (await answer(request)).SerializeToString()
            except Exception as error:
                await self._refuse(name, error, context)
                raise  # unreachable: abort raises
            self._traffic.control_sent += len(data)
            return data

        return call

    def _stream(
        self, name: str, answer: Callable[[bytes], AsyncIterator[bytes]]
    ) -> Callable[[bytes, Context], AsyncIterator[bytes]]:
        async def call(request: bytes, context: Context) -> AsyncIterator[bytes]:
            self._note()
            if name == "Fetch":
                self._traffic.bulk_received += len(request)
            else:
                self._traffic.control_received += len(request)
            try:
                async with closing(answer(request)) as messages:
                    async for data in messages:
                        yield data
            except Exception as error:
                await self._refuse(name, error, context)

        return call

    async def _refuse(self, name: str, error: Exception, context: Context) -> None:
        """Answer with the reason for a PeerError; anything else is our bug: logged once, told to nobody."""
        if isinstance(error, PeerError):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.why[:_WHY_CHARS])
        bug = f"{name}: {type(error).__name__} {traceback.extract_tb(error.__traceback__)[-1:]}"
        if bug not in self._bugs_seen:
            self._bugs_seen.add(bug)
            _log.error("answering %s failed; the peer is told so, this is logged once", name, exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "the peer has a bug; its log says which")


def parse(kind: type[M], data: bytes, *, peer: str) -> M:
    """A message from the network. Raises PeerError."""
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise PeerError(peer, f"{len(data)} bytes that are no {kind.__name__}") from None
    return message


def encode_chunk(index: int, data: bytes) -> bytes:
    """A BlobChunk's bytes with one copy of the data instead of protobuf's two (half the cost of sending it)."""
    if not index or not data:  # protobuf leaves out what is zero or empty
        return pb.BlobChunk(index=index, data=data).SerializeToString()
    return b"".join((b"\x08", _varint(index), b"\x12", _varint(len(data)), data))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def fitting(items: Any, bytes_max: int) -> list[bytes]:
    """The first items that together fit one message; each costs up to 8 bytes of framing."""
    kept, room = list[bytes](), bytes_max - 64
    for item in items:
        room -= len(item) + 8
        if room < 0:
            break
        kept.append(item)
    return kept


def _pieces(data: bytes) -> list[bytes]:
    """A digest list in messages of a chunk's size; it may be 32 MB."""
    return [data[at : at + _DIGEST_PIECE_BYTES] for at in range(0, len(data), _DIGEST_PIECE_BYTES)] or [b""]
