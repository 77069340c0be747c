"""`farflung new`: a run comes into being on the disk of its founder. Nothing is sent."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path
from typing import NamedTuple

import torch

from farflung.aggregation.outer import parse_outer
from farflung.node.directory import parse_door
from farflung.node.run_file import RunFile, make_genesis
from farflung.node.store import Home, RunStore
from farflung.node.transport.addresses import announced
from farflung.protocol.certificate import certify_first
from farflung.protocol.errors import ConfigError
from farflung.protocol.genesis import Genesis
from farflung.protocol.invite import Invite

SECRET_BYTES = 16
"""Of the join secret: its hash is public in genesis, so it must not be guessable."""


class Founded(NamedTuple):
    """A new run."""

    genesis: Genesis
    invite: Invite
    directory: Path
    listen: str
    """Where its founder will listen, with the port that the invite names."""


def found_run(run: RunFile, home: Home, *, listen: str = "0.0.0.0:0", announce: tuple[str, ...] = ()) -> Founded:
    """Write genesis, certificate 0 and snapshot 0 into the founder's home.

    Takes a free port now if `listen` names none, so that the invite stays right. Raises ConfigError for settings that
    cannot work and for a taken port; nothing is left behind then.
    """
    host, port = choose_port(listen)
    addresses = announced(host.strip("[]"), port, announce)
    for address in addresses:
        parse_door(address)
    identity = home.identity
    secret = secrets.token_bytes(SECRET_BYTES)
    genesis, theta_d = make_genesis(run, identity.public_key, secret)
    invite = Invite(genesis.run_id, tuple(f"{identity.peer_id}@{address}" for address in addresses), secret=secret)
    with home.run(genesis.run_id) as store:
        store.write_genesis(genesis.canonical_bytes)
        store.write_snapshot(0, theta_d, _first_buffers(genesis, theta_d))
        store.append_certificate(0, certify_first(genesis, identity.sign).canonical_bytes)
        store.write_invite(str(invite))
        write_port(store, port)
        return Founded(genesis, invite, store.directory, f"{host}:{port}")


def _first_buffers(genesis: Genesis, theta_d: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"momentum": torch.zeros_like(theta_d)} if parse_outer(genesis.outer).state_buffers else {}


def choose_port(listen: str) -> tuple[str, int]:
    """Host and port of "host:port"; a free port where it is 0. Raises ConfigError if it is taken or not an address."""
    host, _, text = listen.rpartition(":")
    if not host or not text.isdecimal() or int(text) > 65535:
        raise ConfigError(f"listen on host:port, for example 0.0.0.0:0, got {listen!r}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(text)))
        except OSError as error:
            raise ConfigError(f"cannot listen there ({error.strerror}); choose another port or 0: {listen}") from None
        return host, int(probe.getsockname()[1])


def write_port(store: RunStore, port: int) -> None:
    """Remember the port: an opening that is told port 0 takes it again (`opening._listen_address`)."""
    (store.directory / "port").write_text(str(port), encoding="ascii")
