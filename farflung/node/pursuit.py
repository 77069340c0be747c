"""Behind by a few rounds: fetch the certificates that were missed, and hand them out as their rounds come."""

from __future__ import annotations

from farflung.node.audit import Audit
from farflung.node.peers import Peers
from farflung.node.runtime import Transport
from farflung.node.state_sync import last_dropped_round
from farflung.protocol.certificate import Certificate, check_certificate, decode_certificate
from farflung.protocol.errors import PeerError
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import PeerId
from farflung.protocol.round import RoundMachine

CALL_S = 10.0
"""How long one control call may take."""


class Pursuit:
    """One chase at a time. `hopeless`: so far behind that others have dropped the payloads; fetch the state again."""

    def __init__(self, genesis: Genesis, peers: Peers, transport: Transport, audit: Audit) -> None:
        self._genesis, self._peers, self._transport, self._audit = genesis, peers, transport, audit
        self._ahead: dict[int, Certificate] = {}
        self._running = False
        self.hopeless = False

    def wanted(self, round_index: int) -> bool:
        """Whether it is worth asking a peer who is in this round; marks the chase as begun if so."""
        if self._running or round_index in self._ahead:
            return False
        self._running = True
        return True

    def due(self, round_index: int) -> Certificate | None:
        """The certificate of a round, once; older ones are dropped."""
        self._ahead = {at: item for at, item in self._ahead.items() if at >= round_index}
        return self._ahead.pop(round_index, None)

    async def chase(self, peer: PeerId, machine: RoundMachine) -> bool:
        """Ask one peer for the certificates from the machine's round on; returns whether any came."""
        self.hopeless = False
        try:
            record = self._peers.record_of(peer)
            if record is None:
                return False
            start, parent, limit = machine.round_index, machine.parent, machine.me.payload_bytes_max
            chain, tip = await self._transport.chain(record, start, deadline_s=CALL_S)
            if tip - machine.round_index > self._genesis.snapshot_rounds:
                self.hopeless = True
                return False
            for data in chain:
                certificate = decode_certificate(data, peer=peer.short)
                check_certificate(certificate, parent, self._genesis, payload_bytes_max=limit)
                self._ahead[certificate.manifest.round_index] = certificate
                parent = certificate.manifest
            next_one = self._ahead.get(machine.round_index)
            dropped = machine.round_index <= last_dropped_round(self._genesis, parent)
            self.hopeless = dropped and next_one is not None and bool(machine.missing(next_one.manifest))
            return bool(chain) and not self.hopeless
        except (PeerError, TimeoutError, ConnectionError) as error:
            self._audit.note(f"catching up from {peer.short}: {error}", round_index=machine.round_index)
            return False
        finally:
            self._running = False
