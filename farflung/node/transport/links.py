"""Connections to peers: per peer one for control and one for bulk, each on a TCP connection of its own."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import grpc

from farflung.node.transport.tls import SERVER_NAME, der_to_pem
from farflung.protocol import limits
from farflung.protocol.errors import PeerError
from farflung.protocol.identity import PeerId
from farflung.protocol.record import PeerRecord

CONNECT_MS = 5_000
"""A TCP and TLS handshake takes three round trips; 5 s is enough across any working link."""

BACKOFF_MS, BACKOFF_MS_MAX = 200, 1_500
"""A peer that restarted is found again this soon."""

KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 20_000, 20_000
"""A connection that went silent is given up after this; home routers forget idle ones after minutes."""

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.use_local_subchannel_pool", 1),  # or control and bulk would share one TCP connection
    ("grpc.max_receive_message_length", limits.BULK_MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", limits.BULK_MESSAGE_BYTES_MAX),
    ("grpc.min_reconnect_backoff_ms", CONNECT_MS),
    ("grpc.initial_reconnect_backoff_ms", BACKOFF_MS),
    ("grpc.max_reconnect_backoff_ms", BACKOFF_MS_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]


def open_channel(address: str, certificate_der: bytes) -> grpc.aio.Channel:
    """A channel to a server that must present exactly this certificate; without one, plain text. Connects lazily."""
    if not certificate_der:
        return grpc.aio.insecure_channel(address, _OPTIONS)
    credentials = grpc.ssl_channel_credentials(der_to_pem(certificate_der))
    named = [*_OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME)]
    return grpc.aio.secure_channel(address, credentials, named)


Opener = Callable[[str, bytes], Any]


class Link:
    """One peer's connections. Several addresses are tried in order; the one that worked is kept until it fails."""

    def __init__(self, record: PeerRecord, opened: Opener) -> None:
        self.record, self._opened = record, opened
        self._address = record.addresses[0] if len(record.addresses) == 1 else None
        self._channels: dict[tuple[str, str], grpc.aio.Channel] = {}
        self._search = asyncio.Lock()

    async def channel(self, purpose: str, *, deadline_s: float) -> grpc.aio.Channel:
        """The "control" or "bulk" channel. Raises ConnectionError if no address answers in time."""
        if self._address is None:
            async with self._search:
                if self._address is None:
                    self._address = await self._find(deadline_s)
        return self._open(self._address, purpose)

    def failed(self) -> None:
        """The last call did not get through: look at the other addresses next time."""
        if len(self.record.addresses) > 1:
            self._address = None

    async def close(self) -> None:
        """Break both connections and the calls on them."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close(None)

    def _open(self, address: str, purpose: str) -> grpc.aio.Channel:
        key = (address, purpose)
        if key not in self._channels:
            self._channels[key] = self._opened(address, self.record.certificate_der)
        return self._channels[key]

    async def _find(self, deadline_s: float) -> str:
        addresses = self.record.addresses
        for address in addresses:
            try:
                async with asyncio.timeout(deadline_s / len(addresses)):
                    await _connected(self._open(address, "control"))
            except (TimeoutError, ConnectionError):
                continue
            return address
        raise ConnectionError(f"peer {self.record.peer_id.short} answers at none of {', '.join(addresses)}")


async def _connected(channel: grpc.aio.Channel) -> None:
    """Return when the handshake is done. Raises ConnectionError when it fails; the channel itself would try on."""
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
            raise ConnectionError
        await channel.wait_for_state_change(state)


class Links:
    """All peers' connections; the least recently used is closed when there are more than MEMBERS_MAX.

    `opened` makes a channel of an address and the certificate expected there.
    """

    def __init__(self, *, tls: bool, opened: Opener = open_channel) -> None:
        self._tls, self._opened = tls, opened
        self._links: OrderedDict[PeerId, Link] = OrderedDict()

    async def to(self, record: PeerRecord) -> Link:
        """The link to a peer. A later record with another certificate or other addresses replaces the connection."""
        peer = record.peer_id
        link = self._links.get(peer)
        if link is not None and record.issued_ms >= link.record.issued_ms:
            same = (record.addresses, record.certificate_der) == (link.record.addresses, link.record.certificate_der)
            if same:
                link.record = record
            else:
                del self._links[peer]
                await link.close()
                link = None
        if link is None:
            # `close` above gave others a turn: one of them may have opened the new link already
            link = self._links.get(peer) or self._links.setdefault(peer, Link(self._callable(record), self._opened))
        self._links.move_to_end(peer)
        if len(self._links) > limits.MEMBERS_MAX:
            await self._links.popitem(last=False)[1].close()
        return link

    def _callable(self, record: PeerRecord) -> PeerRecord:
        short = record.peer_id.short
        if not record.addresses:
            raise ConnectionError(f"peer {short} announces no address: only it can call us")
        if self._tls and not record.certificate_der:
            raise PeerError(short, "serves without TLS, and this node insists on it")
        return record

    async def close(self) -> None:
        """Break all connections."""
        links, self._links = list(self._links.values()), OrderedDict()
        for link in links:
            await link.close()
