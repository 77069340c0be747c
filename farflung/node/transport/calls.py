"""The calling half: a node's calls as messages on channels. What a channel is made of, gRPC or a simulation, it does
not know: only that it behaves like `grpc.aio.Channel`, errors included.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from farflung.node.runtime import DIGEST_LIST, Holding
from farflung.node.transport.addresses import split_named
from farflung.node.transport.flow import Traffic
from farflung.node.transport.server import fitting, parse
from farflung.protocol import limits
from farflung.protocol import messages_pb2 as pb
from farflung.protocol.blob import DIGEST_BYTES, BlobRef
from farflung.protocol.errors import PeerError
from farflung.protocol.record import PeerRecord, decode_record

M = TypeVar("M", bound=Message)


class Link(Protocol):
    """One peer's connections."""

    async def channel(self, purpose: str, *, deadline_s: float) -> Any:
        """The "control" or "bulk" channel (`grpc.aio.Channel`). Raises ConnectionError if it cannot be had in time."""

    def failed(self) -> None:
        """The last call did not get through."""


class Links(Protocol):
    """All peers' connections."""

    async def to(self, record: PeerRecord) -> Link:
        """The link to a peer."""


class Calls(abc.ABC):
    """The part of `runtime.Transport` that calls peers, the same for every kind of channel."""

    def __init__(self, run_id: bytes, links: Links, traffic: Traffic) -> None:
        self._run_id, self._links, self.traffic = run_id, links, traffic

    @property
    def bytes_sent(self) -> int:
        """Bytes of messages handed to the network so far; `traffic` has control and bulk apart."""
        return self.traffic.control_sent + self.traffic.bulk_sent

    @property
    def bytes_received(self) -> int:
        """The same, inbound."""
        return self.traffic.control_received + self.traffic.bulk_received

    # -- control -----------------------------------------------------------------------------------------------------

    async def deliver(self, to: PeerRecord, envelope: bytes, *, deadline_s: float) -> None:
        """Hand over one signed control message; returns when the peer accepted it."""
        reply = await self._call(to, "Deliver", envelope, pb.Reply, deadline_s)
        if not reply.accepted:
            raise PeerError(to.peer_id.short, reply.why)

    async def records(self, to: PeerRecord, records: Sequence[bytes], *, deadline_s: float) -> list[bytes]:
        """Exchange peer records; the last are left out if they do not fit one message."""
        kept = fitting(records, limits.CONTROL_BYTES_MAX)
        request = pb.RecordsRequest(run_id=self._run_id, records=kept).SerializeToString()
        return list((await self._call(to, "Records", request, pb.RecordsReply, deadline_s)).records)

    async def genesis(self, to: PeerRecord, *, deadline_s: float) -> bytes:
        """The run's genesis bytes."""
        request = pb.GenesisRequest(run_id=self._run_id).SerializeToString()
        return (await self._call(to, "Genesis", request, pb.GenesisReply, deadline_s)).genesis

    async def chain(self, to: PeerRecord, from_round: int, *, deadline_s: float) -> tuple[list[bytes], int]:
        """Certificates from a round on, and the peer's tip."""
        request = pb.ChainRequest(run_id=self._run_id, from_round=from_round).SerializeToString()
        reply = await self._call(to, "Chain", request, pb.ChainReply, deadline_s)
        if len(reply.certificates) > limits.CHAIN_ANSWER_MAX:
            raise PeerError(to.peer_id.short, f"{len(reply.certificates)} certificates in one answer")
        return list(reply.certificates), reply.tip_round

    async def snapshot(self, to: PeerRecord, *, deadline_s: float) -> tuple[int, BlobRef]:
        """The peer's newest snapshot."""
        request = pb.SnapshotRequest(run_id=self._run_id).SerializeToString()
        reply = await self._call(to, "Snapshot", request, pb.SnapshotReply, deadline_s)
        try:
            return reply.round, BlobRef(reply.digest, reply.size, reply.chunk_bytes)
        except PeerError as error:
            raise PeerError(to.peer_id.short, error.why) from None

    async def _call(self, to: PeerRecord, method: str, request: bytes, kind: type[M], deadline_s: float) -> M:
        short = to.peer_id.short
        if len(request) > limits.CONTROL_BYTES_MAX:
            raise PeerError(short, f"{method} of {len(request)} bytes is more than any peer accepts")
        link = await self._links.to(to)
        started_s = asyncio.get_running_loop().time()
        channel = await link.channel("control", deadline_s=deadline_s)
        left_s = deadline_s - (asyncio.get_running_loop().time() - started_s)
        with _errors_of(short, link):
            reply = await self._unary(channel, method, request, left_s)
        return parse(kind, reply, peer=short)

    async def _unary(self, channel: grpc.aio.Channel, method: str, request: bytes, deadline_s: float) -> bytes:
        self.traffic.control_sent += len(request)
        reply: bytes = await channel.unary_unary(f"/farflung.Control/{method}", None, None)(
            request, timeout=max(deadline_s, 0.001)
        )
        self.traffic.control_received += len(reply)
        return reply

    @abc.abstractmethod
    def _open_door(self, plain: str, deadline_s: float) -> contextlib.AbstractAsyncContextManager[tuple[Any, bytes]]:
        """A channel to an address nobody vouched for yet, and the certificate that was presented there."""

    async def introduce(self, address: str, run_id: bytes, *, deadline_s: float) -> list[bytes]:
        """Ask an address nobody vouched for yet for its records: its own (first) and those it knows.

        Accepted only if the first record is signed, covers the certificate presented, and is the peer's whose id
        stands before the "@", if one does. Raises PeerError, TimeoutError or ConnectionError.
        """
        wanted, plain = split_named(address)
        async with asyncio.timeout(deadline_s), self._open_door(plain, deadline_s) as (channel, certificate):
            request = pb.RecordsRequest(run_id=run_id).SerializeToString()
            with _errors_of(plain, None):
                data = await self._unary(channel, "Records", request, deadline_s)
        records = list(parse(pb.RecordsReply, data, peer=plain).records)
        if not records:
            raise PeerError(plain, "answered without a record of its own")
        own = decode_record(records[0], run_id=run_id)
        if own.certificate_der != certificate:
            raise PeerError(own.peer_id.short, f"does not vouch for the certificate that {plain} presented")
        if wanted is not None and own.peer_id != wanted:
            raise PeerError(own.peer_id.short, f"answers at {plain} instead of {wanted.short}")
        return records

    # -- streams -----------------------------------------------------------------------------------------------------

    async def watch(self, to: PeerRecord) -> AsyncIterator[list[Holding]]:
        """What the peer holds, as it changes, until the connection breaks (ConnectionError) or the caller stops."""
        short = to.peer_id.short
        request = pb.WatchRequest(run_id=self._run_id).SerializeToString()
        link = await self._links.to(to)
        channel = await link.channel("control", deadline_s=10.0)
        self.traffic.control_sent += len(request)
        with (
            _errors_of(short, link),
            _cancelled(channel.unary_stream("/farflung.Control/Watch", None, None)(request)) as call,
        ):
            async for data in call:
                self.traffic.control_received += len(data)
                yield [_holding(item, short) for item in parse(pb.Holdings, data, peer=short).holdings]
        raise ConnectionError(f"peer {short} closed the watch")

    async def fetch(
        self, to: PeerRecord, ref: BlobRef, chunks: Sequence[int], *, idle_s: float
    ) -> AsyncIterator[tuple[int, bytes]]:
        """Chunks in the order asked (or the digest list, for none). TimeoutError if nothing comes for `idle_s`.

        Indices and sizes are right; whether the bytes are is the caller's to check.
        """
        short = to.peer_id.short
        request = pb.BlobRequest(run_id=self._run_id, digest=ref.digest, chunks=chunks).SerializeToString()
        link = await self._links.to(to)
        channel = await link.channel("bulk", deadline_s=idle_s)
        self.traffic.bulk_sent += len(request)
        with (
            _errors_of(short, link),
            _cancelled(channel.unary_stream("/farflung.Bulk/Fetch", None, None)(request)) as call,
        ):
            if not chunks:
                yield DIGEST_LIST, await self._digest_list(call, ref, short, idle_s)
                return
            for index in chunks:
                start, stop = ref.span(index)
                got, data = await self._next(call, short, idle_s)
                if got != index or len(data) != stop - start:
                    raise PeerError(short, f"chunk {got} of {len(data)} bytes instead of {index}")
                yield index, data

    async def _digest_list(self, call: Any, ref: BlobRef, short: str, idle_s: float) -> bytes:
        pieces, left = list[bytes](), ref.chunks * DIGEST_BYTES
        while left > 0:
            got, data = await self._next(call, short, idle_s)
            left -= len(data)
            if got != DIGEST_LIST or left < 0 or not data:
                raise PeerError(short, f"{len(data)} bytes that are no part of a list of {ref.chunks} digests")
            pieces.append(data)
        return b"".join(pieces)

    async def _next(self, call: Any, short: str, idle_s: float) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(idle_s):
                data = await call.read()
        except TimeoutError:
            raise TimeoutError(f"peer {short} sent nothing for {idle_s:.1f} s") from None
        if data is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise PeerError(short, "ended a fetch early")
        self.traffic.bulk_received += len(data)
        message = parse(pb.BlobChunk, data, peer=short)
        return message.index, message.data  # reading `data` copies it: once is enough


def _holding(item: pb.Holding, short: str) -> Holding:
    if len(item.digest) != DIGEST_BYTES:
        raise PeerError(short, f"holds a blob with a digest of {len(item.digest)} bytes")
    return Holding(item.digest, item.all, tuple(item.chunks))


@contextlib.contextmanager
def _cancelled(call: Any) -> Any:
    """A stream that ends with the block, so that a caller who stops reading stops the sender too."""
    try:
        yield call
    finally:
        call.cancel()


@contextlib.contextmanager
def _errors_of(short: str, link: Link | None) -> Any:
    """Turn gRPC's errors into the three a caller knows."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ConnectionError(f"the connection to {short} was closed") from None  # how gRPC says so
    except grpc.aio.UsageError as error:
        raise ConnectionError(f"the connection to {short} is closed: {error}") from None
    except grpc.aio.AioRpcError as error:
        raise _translated(error, short, link.failed if link else lambda: None) from None


def _translated(error: grpc.aio.AioRpcError, short: str, failed: Callable[[], None]) -> Exception:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        failed()
        return TimeoutError(f"peer {short} did not answer in time")
    unreachable = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    busy = code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" not in details
    if unreachable or busy:
        failed()
        return ConnectionError(f"peer {short} cannot be reached: {details[:200]}")
    return PeerError(short, details[:400] or code.name)
