"""The real transport: grpc.aio, TLS by default, every peer pinned to the certificate its signed record carries."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import grpc

from farflung.node.runtime import Clock, Service, SystemClock
from farflung.node.transport.addresses import announced, split_address
from farflung.node.transport.calls import Calls
from farflung.node.transport.flow import Traffic, UploadCap
from farflung.node.transport.links import Links, open_channel
from farflung.node.transport.server import Handlers
from farflung.node.transport.tls import Tls, fetch_certificate, make_tls
from farflung.protocol import limits
from farflung.protocol.errors import ConfigError, PeerError

_CALLS_MAX = 16 * limits.MEMBERS_MAX
"""Calls answered at once: per member one watch, a few control messages and the blobs of a round."""

_STREAMS_PER_CONNECTION = 256
"""Calls one connection may have open; a peer's further calls wait on its own side."""

_CONNECTIONS_MAX = 8 * limits.MEMBERS_MAX
"""Open connections: two per member, and room for strangers, below the usual 4096 file descriptors."""

_SERVER_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.so_reuseport", 0),  # or a second node would silently share the port
    ("grpc.max_receive_message_length", limits.CONTROL_BYTES_MAX),
    ("grpc.max_send_message_length", limits.BULK_MESSAGE_BYTES_MAX),
    ("grpc.max_concurrent_streams", _STREAMS_PER_CONNECTION),
    ("grpc.max_allowed_incoming_connections", _CONNECTIONS_MAX),
    ("grpc.server_handshake_timeout_ms", 10_000),  # half-open connections are closed
    ("grpc.max_connection_idle_ms", 600_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
]


class GrpcTransport(Calls):
    """A `runtime.Transport`. One object per node and run; `start` and `stop` once each.

    `announce` replaces the addresses found by itself. `tls` is made anew by default; None serves in plain text, for
    tests and trusted networks, and then calls peers that serve so too.
    """

    def __init__(
        self,
        run_id: bytes,
        *,
        listen: str = "0.0.0.0:0",
        announce: Sequence[str] = (),
        tls: Tls | tuple[bytes, bytes] | Literal["new"] | None = "new",
        upload_bytes_per_s: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        try:
            self._listen_host, self._listen_port = split_address(listen)
        except PeerError:
            raise ConfigError(f'listen must be "host:port", such as 0.0.0.0:4400; got {listen!r}') from None
        made = make_tls() if tls == "new" else tls
        self._tls = None if made is None else Tls(*made)
        self._certificate_der = b"" if self._tls is None else self._tls.certificate_der
        self._listen, self._announce = listen, tuple(announce)
        self._cap = UploadCap(upload_bytes_per_s, clock or SystemClock())
        self._channels = Links(tls=self._tls is not None)
        super().__init__(run_id, self._channels, Traffic())
        self._server: grpc.aio.Server | None = None
        self.port = 0
        """Where it listens, once started."""
        self.addresses: tuple[str, ...] = ()
        """What to announce, once started."""
        self._handlers: Handlers

    async def start(self, service: Service) -> tuple[str, ...]:
        """Listen; returns the addresses to announce. Raises ConfigError if the port is taken."""
        server = grpc.aio.server(options=_SERVER_OPTIONS, maximum_concurrent_rpcs=_CALLS_MAX)
        handlers = Handlers(service, self._run_id, self.traffic, self._cap)
        server.add_generic_rpc_handlers(handlers.generic())
        try:
            port = self._bind(server)
        except RuntimeError:
            port = 0
        if not port:
            await server.stop(None)
            raise ConfigError(f"cannot listen on {self._listen}: in use or not ours; choose another with --listen")
        await server.start()
        self._server, self._handlers = server, handlers
        self.addresses = announced(self._listen_host, port, self._announce)
        return self.addresses

    def _bind(self, server: grpc.aio.Server) -> int:
        if self._tls is None:
            return server.add_insecure_port(self._listen)
        pair = (self._tls.key_pem, self._tls.certificate_pem)
        return server.add_secure_port(self._listen, grpc.ssl_server_credentials([pair]))

    async def stop(self) -> None:
        """Close everything: listener, connections, running calls."""
        await self._channels.close()
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)
            await self._handlers.wind_up()

    @property
    def certificate_der(self) -> bytes:
        """The TLS certificate callers must pin; empty without TLS."""
        return self._certificate_der

    @contextlib.asynccontextmanager
    async def _open_door(self, plain: str, deadline_s: float) -> AsyncIterator[tuple[Any, bytes]]:
        certificate = b""
        if self._tls is not None:
            certificate = await fetch_certificate(*split_address(plain), deadline_s=deadline_s)
        async with open_channel(plain, certificate) as channel:
            yield channel, certificate
