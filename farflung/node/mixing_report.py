"""A mixing in words and plain values: for `farflung status` and displays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farflung.protocol.mixing.auditing import MassAudit

if TYPE_CHECKING:
    from farflung.node.mixing_round import MixingRound


def why_mixing(current: MixingRound) -> str:
    """What a mixing waits for, and for whom."""
    machine = current.machine
    names = ", ".join(peer.short for peer in machine.waits_for())
    where = f"tick {machine.clock.tick + 1} of {len(machine.plan)}"
    return f"mixing, {machine.stage}, {where}" + (f": waits for {names}" if names else "")


def describe_round(current: MixingRound) -> dict[str, Any]:
    """Where a mixing is."""
    machine = current.machine
    return {
        "stage": str(machine.stage),
        "tick": machine.clock.tick + 1,
        "ticks": len(machine.plan),
        "waits_for": [peer.short for peer in machine.waits_for()],
    }


def describe_mass(audited: MassAudit | None) -> dict[str, Any]:
    """What the last audit found; empty before the first."""
    if audited is None:
        return {}
    return {
        "round": audited.round_index,
        "members": audited.members,
        "error": audited.error,
        "limbo": audited.limbo,
        "unseen": [peer.short for peer in audited.unseen],
        "discrepancies": [item.why for item in audited.discrepancies],
    }
