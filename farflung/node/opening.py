"""From an invite to a running node: the real world's parts, put together in the order in which they depend."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from farflung import __version__
from farflung.node.answers import Answers
from farflung.node.assembly import Surroundings, assemble, make_anchor
from farflung.node.audit import Audit
from farflung.node.dht import HivemindDirectory, host_maddrs
from farflung.node.directory import Combined, Rendezvous
from farflung.node.flat import schema_of
from farflung.node.mailbox import Mailbox
from farflung.node.peers import Peers
from farflung.node.recordbook import RecordBook
from farflung.node.runtime import Directory, SystemClock, Transport
from farflung.node.shell import Node
from farflung.node.store import Home, RunStore
from farflung.node.transport.addresses import take_port
from farflung.node.transport.grpc import GrpcTransport
from farflung.node.transport.tls import make_tls
from farflung.protocol.errors import ConfigError, PeerError
from farflung.protocol.genesis import Genesis, decode_genesis
from farflung.protocol.invite import Invite
from farflung.protocol.record import PeerRecord

log = logging.getLogger(__name__)

DISCOVERY = ("both", "dht", "rendezvous")
CALL_S = 10.0
FIND_S = 30.0
"""How long genesis may take to be found."""

RETRY_S = 0.5
"""Between two rounds of asking everybody known."""


@dataclass(frozen=True)
class JoinSettings:
    """How this machine takes part; nothing here changes what the run agrees on."""

    home: Path
    """Where identity, chain and checkpoints are kept."""

    name: str = ""
    """Shown to the others."""

    listen: str = "0.0.0.0:0"
    """Where to accept connections; port 0 takes a free one and keeps it over restarts."""

    announce: tuple[str, ...] = ()
    """"host:port" that others should use instead of what is found out: behind a forwarded port, for instance."""

    upload_mbit: float | None = None
    """Cap on bulk uploads in Mbit/s; None: as much as the line takes."""

    discovery: str = "both"
    """How members are found: "dht" (hivemind), "rendezvous" (the invite's addresses), or "both"."""

    tls: bool = True
    """Without it anybody on the way can read updates; members still check every signature and digest."""

    threads: int = 1
    """CPU threads for decoding, aggregating and the outer step. Changes speed, never a byte."""

    def __post_init__(self) -> None:
        if self.discovery not in DISCOVERY:
            raise ConfigError(f"discovery is one of {', '.join(DISCOVERY)}, got {self.discovery!r}")
        if self.upload_mbit is not None and self.upload_mbit <= 0:
            raise ConfigError(f"the upload cap must be positive, got {self.upload_mbit} Mbit/s")


async def open_node(
    stack: AsyncExitStack,
    mailbox: Mailbox,
    *,
    home: Home,
    store: RunStore,
    invite: Invite,
    model_of: Callable[[Genesis], nn.Module],
    settings: JoinSettings,
) -> Node:
    """Everything between an invite and a running node. What is opened is left to `stack`, to be closed backwards.

    `model_of` is called once, in the node's thread, when genesis is known; the training thread waits meanwhile.

    Raises ConfigError, in words for the user, for a dead invite, a taken port, a model that is not the run's, ...
    """
    identity, clock = home.identity, SystemClock()
    book = RecordBook(invite.run_id)
    answers = Answers(book, store, identity.peer_id, clock)
    transport = await _listen(stack, answers, home, store, invite, settings)
    directory = _directory(transport, book, home, store, invite, settings)
    peers = Peers(identity, book, directory, clock, _record_maker(transport, home, invite, settings), store.save_peers)
    peers.publish_own()
    doors = await directory.start()
    stack.push_async_callback(directory.stop)
    await peers.start()
    stack.push_async_callback(peers.stop)

    genesis = await _find_genesis(store, peers, transport, directory, invite.run_id)
    model = model_of(genesis)
    _check_model(genesis, model)
    if invite.secret and genesis.secret_digest and not genesis.admits(invite.secret):
        raise ConfigError("the invite's join secret is not this run's; ask for a new invite")
    anchor = make_anchor(genesis, model, threads=settings.threads)
    audit = Audit(identity.peer_id, clock, transport, store.rounds.append)
    fresh = Invite(
        invite.run_id,
        addresses=tuple(door for door in doors if "@" in door),
        dht=tuple(door for door in doors if "@" not in door),
        secret=invite.secret,
    )
    store.write_invite(str(fresh))
    around = Surroundings(identity, invite.secret, store, transport, peers, answers, clock, mailbox)
    return assemble(stack, around, genesis, anchor, invite=str(fresh), audit=audit)


async def _listen(
    stack: AsyncExitStack, answers: Answers, home: Home, store: RunStore, invite: Invite, settings: JoinSettings
) -> GrpcTransport:
    transport = GrpcTransport(
        run_id=invite.run_id,
        listen=_listen_address(store, settings.listen),
        announce=settings.announce,
        tls=home.tls(make_tls) if settings.tls else None,
        upload_bytes_per_s=None if settings.upload_mbit is None else settings.upload_mbit * 1e6 / 8,
        clock=SystemClock(),
    )
    await transport.start(answers)
    stack.push_async_callback(transport.stop)
    store.write_port(transport.port)
    return transport


def _record_maker(
    transport: GrpcTransport, home: Home, invite: Invite, settings: JoinSettings
) -> Callable[[int, int], PeerRecord]:
    def make_record(issued_ms: int, lease_ms: int) -> PeerRecord:
        return PeerRecord(
            run_id=invite.run_id,
            public_key=home.identity.public_key,
            addresses=transport.addresses,
            certificate_der=transport.certificate_der,
            issued_ms=issued_ms,
            lease_ms=lease_ms,
            name=settings.name,
            version=__version__,
            upload_bytes_per_s=int((settings.upload_mbit or 0) * 1e6 / 8),
        )

    return make_record


def _directory(
    transport: GrpcTransport, book: RecordBook, home: Home, store: RunStore, invite: Invite, settings: JoinSettings
) -> Combined:
    """The ways of finding members that the user wants, as one."""
    clock, me = SystemClock(), home.identity.peer_id
    directories: list[Directory] = []
    if settings.discovery != "dht":
        rendezvous = Rendezvous(
            transport,
            book,
            me,
            clock=clock,
            rng=random.Random(me.digest),
            addresses=transport.addresses,
            bootstrap=invite.addresses,
            saved=store.load_peers(),
            alone_ok=store.certificates.next_round > 0,
        )
        directories.append(rendezvous)
    if settings.discovery != "rendezvous":
        hosts = host_maddrs(settings.listen.rpartition(":")[0])
        key = store.directory / "dht.key"
        directories.append(HivemindDirectory(book, clock, listen=hosts, bootstrap=invite.dht, identity=key))
    return Combined(directories, book, clock)


async def _find_genesis(
    store: RunStore, peers: Peers, transport: Transport, directory: Combined, run_id: bytes
) -> Genesis:
    """From disk, or from any member; its hash is the run id, so it does not matter who gives it."""
    if (data := store.genesis) is not None:
        return decode_genesis(data, run_id)
    tried: dict[str, str] = {}
    end_s = time.monotonic() + FIND_S
    while (left_s := end_s - time.monotonic()) > 0:
        try:
            found = await peers.wait_for_others(left_s)
        except TimeoutError:
            break
        for record in found:
            try:
                data = await transport.genesis(record, deadline_s=CALL_S)
                genesis = decode_genesis(data, run_id)
                store.write_genesis(data)
                return genesis
            except (PeerError, TimeoutError, ConnectionError) as error:
                tried[record.peer_id.short] = str(error) or type(error).__name__
        await asyncio.sleep(RETRY_S)
    reasons = "; ".join(f"{name}: {why}" for name, why in (tried or directory.problems).items())
    raise ConfigError(
        f"no member gave the run's settings within {FIND_S:.0f} s ({reasons or 'no member was found'}). "
        "Ask a member whether the run is alive, or for a new invite (farflung invite --refresh)"
    )


def _check_model(genesis: Genesis, model: nn.Module) -> None:
    difference = schema_of(model).explain_difference(genesis.schema)
    if difference is not None:
        raise ConfigError(f"your model is not the run's: {difference}")


def _listen_address(store: RunStore, wanted: str) -> str:
    """`wanted`, with the port of last time in place of 0, if it is free: records and invites remember it."""
    host, _, port = wanted.rpartition(":")
    if port == "0" and store.port:
        with contextlib.suppress(ConfigError):
            take_port(f"{host}:{store.port}")
            return f"{host}:{store.port}"
    return wanted
