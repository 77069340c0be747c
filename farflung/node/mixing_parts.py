"""What a node of a run in push-sum or pairs mode has besides: its own parameters, and a mixer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farflung.node.mixer import Mixer, Ways
from farflung.node.mixing_phase import MixingPhase
from farflung.node.reference import ReferenceAnchor
from farflung.node.replica import Replica
from farflung.protocol.errors import LocalError
from farflung.protocol.identity import PeerId
from farflung.protocol.mixing.notes import Note
from farflung.protocol.statements import Slot

if TYPE_CHECKING:
    from farflung.node.shell import Node


def mixing_parts(node: Node) -> tuple[MixingPhase, Mixer]:
    """The local phase and the mixer of one node. Raises LocalError if its anchor is of another mode."""
    parts, anchor = node.parts, node.anchor
    if not isinstance(anchor, ReferenceAnchor):
        raise LocalError("mixing takes a reference")
    replica = Replica(anchor.outer, anchor.schema.numel)

    def tell(peer: PeerId, kind: str, slot: Slot, note: Note) -> None:
        node.outbox.put(peer, kind, node._envelope(slot, note), current=False)

    ways = Ways(
        me=node.me,
        genesis=parts.genesis,
        anchor=anchor,
        replica=replica,
        exchange=parts.exchange,
        transport=parts.transport,
        clock=parts.clock,
        record_of=parts.peers.record_of,
        heard=lambda peer: None if node.machine is None else node.machine.heard_s.get(peer),
        tell=tell,
        spawn=node._spawn,
        in_thread=node._in_thread,
        in_loop=node.in_loop,
        over=node.mixed,
        note=lambda text: parts.audit.note(text, round_index=node._round),
    )
    mixer = Mixer(ways)
    phase = MixingPhase(parts.genesis, parts.store, anchor, parts.clock, parts.mailbox, parts.audit, node.me)
    phase.take(anchor, replica, mixer)
    return phase, mixer
