"""The directory over hivemind's DHT, on the node's own event loop: no fork, no second Python.

Under the run's key every member keeps one entry: its peer id, with its signed record, until the lease ends. Every DHT
node of the run refuses entries whose record is not signed by the peer they are filed under, so nobody can squat on
another's entry. hivemind is imported when a directory starts: it brings torch along.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import ipaddress
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from farflung.node.p2pd import READY_S, Daemon, start_daemon
from farflung.node.recordbook import RecordBook, expires_ms
from farflung.node.runtime import Clock
from farflung.protocol import limits
from farflung.protocol.errors import ConfigError, LocalError, PeerError, TooFewPeers
from farflung.protocol.record import PeerRecord, decode_record

REPLICAS = 5
"""DHT nodes that keep each entry: a run's records survive any four of them leaving at once."""

SETTLE_S = 0.5
"""How long a lost connection may take to close its tasks."""


def host_maddrs(host: str, port: int = 0) -> tuple[str, ...]:
    """Where to listen, as multiaddresses. Raises ConfigError unless `host` is an IP address, "" or "localhost"."""
    try:
        address = ipaddress.ip_address({"": "0.0.0.0", "localhost": "127.0.0.1"}.get(host, host.strip("[]")))
    except ValueError:
        raise ConfigError(f"listen on an IP address, for example 0.0.0.0: {host!r}") from None
    return (f"/ip{address.version}/{address}/tcp/{port}",)


class HivemindDirectory:
    """A Directory among the run's DHT nodes. `bootstrap` are multiaddresses with /p2p/; none: this is the first node.

    With `identity` (a file, made if missing) the multiaddresses stay the same over restarts, given a fixed port. A
    `client` keeps nothing for others: for members that cannot be called.
    """

    def __init__(
        self,
        book: RecordBook,
        clock: Clock,
        *,
        listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",),
        announce: Sequence[str] = (),
        bootstrap: Sequence[str] = (),
        identity: Path | None = None,
        client: bool = False,
        start_s: float = 2 * READY_S,
    ) -> None:
        self.book = book
        self._clock, self._start_s = clock, start_s
        self._listen, self._announce, self._bootstrap = tuple(listen), tuple(announce), tuple(bootstrap)
        self._identity, self._client = identity, client
        self._key = f"farflung/{book.run_id.hex()}"
        self._daemon: Daemon | None = None
        self._p2p: Any = None
        self._node: Any = None
        self._restart = asyncio.Lock()

    async def start(self) -> tuple[str, ...]:
        """Join the DHT; returns our multiaddresses for an invite, loopback only if there is nothing else.

        Raises ConfigError if no bootstrap address answers. Started half-way and cancelled, it leaves nothing behind.
        """
        try:
            async with asyncio.timeout(self._start_s):
                return await self._begin()
        except BaseException as error:
            await asyncio.shield(self.stop())
            if not isinstance(error, Exception):
                raise
            tried = ", ".join(self._bootstrap) or "none: this is the first node"
            why = f"no answer in {self._start_s:.0f} s" if isinstance(error, TimeoutError) else str(error)
            raise ConfigError(
                f"the DHT did not start: {why}. Check the network, the firewall and this machine's clock, or ask a "
                f"member for a new invite (farflung invite --refresh). Bootstrap addresses tried: {tried}"
            ) from error

    async def _begin(self) -> tuple[str, ...]:
        program = await asyncio.to_thread(_import_hivemind)
        from hivemind.dht.node import DHTID, DHTNode
        from hivemind.p2p import P2P
        from hivemind.utils.multiaddr import Multiaddr

        if self._identity is not None and not self._identity.exists():
            await asyncio.to_thread(P2P.generate_identity, str(self._identity))
        self._daemon = await start_daemon(
            program,
            hosts=self._listen,
            announce=self._announce,
            bootstrap=self._bootstrap,
            identity=self._identity,
            client=self._client,
            nat=not all("/127.0.0.1/" in one or "/::1/" in one for one in self._listen),
        )
        await self._daemon.ready()
        self._p2p = await P2P.replicate(Multiaddr(self._daemon.control))
        self._node = await DHTNode.create(
            self._p2p,
            initial_peers=self._bootstrap or None,
            num_replicas=REPLICAS,
            client_mode=self._client,
            record_validator=_Validator(DHTID.generate(source=self._key).to_bytes()),
            strict=False,  # a clock that is off, or a node nobody can call, is worth a warning
            cache_locally=False,  # a cached entry is yesterday's address
            cache_on_store=False,
            cache_nearest=0,
            cache_refresh_before_expiry=0,
        )
        maddrs = [str(one) for one in await self._p2p.get_visible_maddrs(latest=True)]
        far = [one for one in maddrs if "/127.0.0.1/" not in one and "/::1/" not in one]
        return tuple(dict.fromkeys(far or maddrs))[: limits.ADDRESSES_MAX]

    async def stop(self) -> None:
        """Leave: handlers, connection, daemon, in this order; waits until the daemon is gone. Twice is fine."""
        node, p2p, daemon = self._node, self._p2p, self._daemon
        self._node = self._p2p = self._daemon = None
        if node is not None and daemon is not None and daemon.alive:
            with contextlib.suppress(Exception):  # whatever it says, we are leaving
                await asyncio.wait_for(node.shutdown(), SETTLE_S)
        if p2p is not None:
            await _disconnect(p2p)
        if daemon is not None:
            await daemon.stop()

    async def publish(self, record: PeerRecord, *, deadline_s: float) -> None:
        """File our record until its lease ends. Raises TooFewPeers if no DHT node took it, TimeoutError if too slow."""
        data = record.encode()
        if len(data) > limits.RECORD_BYTES_MAX:
            raise LocalError(f"our record has {len(data)} bytes; {limits.RECORD_BYTES_MAX} are allowed")
        try:
            self.book.add(data, self._clock.unix_ms())
        except PeerError as error:
            raise LocalError(f"our own record: {error.why}") from None
        entry = {"value": data, "subkey": str(record.peer_id), "expiration_time": _expiration_s(record)}
        stored = await self._call(lambda node: node.store(self._key, **entry), deadline_s / 2)
        if not stored and data not in await self._filed(deadline_s / 2):  # the same record twice is refused, and fine
            raise TooFewPeers("no DHT node took our record; a later one may be filed already")

    async def lookup(self, *, deadline_s: float) -> list[PeerRecord]:
        """Every live record filed under the run, and those known before. Raises TimeoutError if too slow."""
        filed = await self._filed(deadline_s)
        now_ms = self._clock.unix_ms()
        self.book.merge(filed, now_ms)
        return self.book.live(now_ms)

    async def _filed(self, deadline_s: float) -> list[bytes]:
        found = await self._call(lambda node: node.get(self._key, latest=True), deadline_s)
        entries = found.value if found is not None and isinstance(found.value, dict) else {}
        return [entry.value for entry in entries.values() if isinstance(entry.value, bytes)]

    async def _call(self, call: Any, deadline_s: float) -> Any:
        """Run one DHT call; start again first if the daemon died. Raises ConnectionError or TimeoutError."""
        async with asyncio.timeout(deadline_s):
            async with self._restart:
                if self._node is None or self._daemon is None or not self._daemon.alive:
                    await self.stop()
                    try:
                        await self.start()
                    except ConfigError as error:
                        raise ConnectionError(str(error)) from error
            try:
                return await call(self._node)
            except (TimeoutError, LocalError):
                raise
            except Exception as error:  # hivemind and its daemon have no common tree of errors
                raise ConnectionError(f"the DHT: {error!r}") from error


def _expiration_s(record: PeerRecord) -> float:
    return expires_ms(record) / 1000


@lru_cache(maxsize=1024)
def _signed(data: bytes) -> PeerRecord | None:
    """A record, decoded once: the same entry comes back with every answer of every DHT node."""
    try:
        return decode_record(data)
    except PeerError:
        return None


class _Validator:
    """What this DHT node accepts and believes (hivemind calls these three): entries that their owner signed."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def validate(self, entry: Any) -> bool:
        """Whether an entry is a record, filed under its owner's id, until its own lease ends."""
        from hivemind.utils.serializer import MSGPackSerializer

        try:
            subkey, data = MSGPackSerializer.loads(entry.subkey), MSGPackSerializer.loads(entry.value)
        except Exception:  # bytes of a peer: msgpack has many ways to say no
            return False
        if entry.key != self._key or not isinstance(data, bytes) or len(data) > limits.RECORD_BYTES_MAX:
            return False
        record = _signed(data)
        filed = record is not None and subkey == str(record.peer_id)
        return filed and record is not None and abs(entry.expiration_time - _expiration_s(record)) < 1e-3

    def sign_value(self, entry: Any) -> Any:
        """Records are signed already."""
        return entry.value

    def strip_value(self, entry: Any) -> Any:
        """Nothing was added."""
        return entry.value


async def _disconnect(p2p: Any) -> None:
    """Close hivemind's connection to the daemon and wait for its tasks: `shutdown` only asks them to end.

    Without this wait the loop closes under them and Python prints "Task was destroyed but it is pending".
    """
    control = p2p._client.control
    tasks = [control._read_task, control._write_task, p2p._listen_task, *control._handler_tasks.values()]
    await p2p.shutdown()
    for call in control._pending_calls.values():
        call.cancel()  # nobody will answer any more
    waiting = [task for task in tasks if task is not None]
    for task in waiting:
        task.cancel()
    if waiting:
        await asyncio.wait(waiting, timeout=SETTLE_S)


def _import_hivemind() -> Path:
    """Import what is needed, keep its logs in our logging, and return where p2pd is. Raises ConfigError."""
    spec = importlib.util.find_spec("hivemind")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("hivemind is not installed here (it has no Windows version): use `--directory rendezvous`")
    importlib.import_module("hivemind.dht.node")
    from hivemind.utils.logging import use_hivemind_log_handler

    logging.addLevelName(logging.WARNING, "WARNING")  # hivemind renames it for everybody
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(logging.WARNING)
    return Path(spec.submodule_search_locations[0]) / "hivemind_cli" / "p2pd"
