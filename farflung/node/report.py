"""What a node and its swarm are doing, as plain values: for `farflung status`, displays and dashboards."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from farflung.protocol.waiting import why_waiting

if TYPE_CHECKING:
    from farflung.node.shell import Node


def describe(node: Node) -> dict[str, Any]:
    """The node as it is now; any thread may ask. Always says why a round waits, and for whom."""
    machine, audit, parts = node.machine, node.parts.audit, node.parts
    status: dict[str, Any] = {
        "peer": str(node.me),
        "run": node.genesis.name,
        "run_id": node.genesis.run_id.hex(),
        "pid": os.getpid(),
        "unix_ms": node.clock.unix_ms(),
        "invite": parts.invite,
        "phase": "starting",
        "round": node.anchor.round_index + 1,
        "why": node.sync.doing,
        "known": [record.peer_id.short for record in parts.peers.others()],
        "unreachable": {peer.short: why for peer, why in list(node.outbox.unreachable.items())},
        "bytes_up": parts.transport.bytes_sent,
        "bytes_down": parts.transport.bytes_received,
        "steps": audit.steps,
        "tokens": audit.tokens,
        "train_s": audit.train_s,
        "wait_s": audit.wait_s,
        "refusals": audit.refusals,
        "last_round": audit.last_round,
    }
    if node.mixer is not None:
        status["mixing"] = node.mixer.status()
    if machine is not None:
        status |= {
            "phase": str(machine.phase),
            "round": machine.round_index,
            "trained": machine.parent.trained,
            "why": (node.mixer.why if node.mixer is not None else "") or why_waiting(machine, node.clock.now_s()),
            "members": [peer.short for peer in machine.parent.member_of],
            "state": machine.tip.state_digest.hex(),
        }
    return status
