"""Addresses ("host:port", "[v6]:port", "peerid@host:port"), and which of them to announce."""

from __future__ import annotations

import socket

import psutil

from farflung.protocol import limits
from farflung.protocol.errors import ConfigError, PeerError
from farflung.protocol.identity import PeerId

_WILDCARDS = ("", "0.0.0.0", "::", "*")
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Documentation addresses (RFC 5737, 3849): asking for the route to them sends nothing."""


def split_address(address: str) -> tuple[str, int]:
    """Host (without brackets) and port. Raises PeerError: addresses come from records and invites."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535 or (":" in host and host[0] != "["):
        raise PeerError("?", f'an address that is not "host:port": {address[:80]!r}')
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_named(address: str) -> tuple[PeerId | None, str]:
    """The peer id an invite asks for, if it does, and the plain address. Raises PeerError."""
    name, at, plain = address.rpartition("@")
    split_address(plain)
    return (PeerId.parse(name) if at else None), plain


def announced(listen_host: str, port: int, announce: tuple[str, ...]) -> tuple[str, ...]:
    """What to tell others: what the user said (the port may be left out), or else this machine's outward addresses."""
    if announce:
        return tuple(_with_port(address, port) for address in announce)[: limits.ADDRESSES_MAX]
    hosts = _own_hosts() if listen_host in _WILDCARDS else [listen_host]
    return tuple(join_address(host, port) for host in hosts)[: limits.ADDRESSES_MAX]


def _with_port(address: str, port: int) -> str:
    try:
        return join_address(*split_address(address))
    except PeerError:
        return join_address(address.removeprefix("[").removesuffix("]"), port)


def _own_hosts() -> list[str]:
    """Addresses of the routes outward; without any, those of all interfaces; without any, this machine's loopback."""
    hosts = [host for family, target in _ELSEWHERE.items() if (host := _route(family, target))]
    if not hosts:
        found = [item for items in psutil.net_if_addrs().values() for item in items if item.family in _ELSEWHERE]
        hosts = [item.address for item in found if not item.address.startswith(("127.", "169.254.", "fe80", "::1"))]
    return hosts or ["127.0.0.1"]


def _route(family: socket.AddressFamily, target: str) -> str | None:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def take_port(listen: str) -> tuple[str, int]:
    """Host and port of "host:port", with a port that is free right now where it is 0.

    Raises ConfigError if the port is taken, or it is not such an address.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"listen on host:port, for example 0.0.0.0:0, got {listen!r}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise ConfigError(f"cannot listen there ({error.strerror}); choose another port or 0: {listen}") from None
        return host, int(probe.getsockname()[1])
