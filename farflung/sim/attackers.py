"""Members that lie or use the network as a weapon: hooks on a real node, from outside.

Values: `sign_flip` sends −strength x Δ, `noise` Δ's own spread in random numbers, `garbage` bytes that no codec made.
Network: `straggle` speaks as late as it can, `equivocate` says two things to two halves of the swarm and late,
`starve` never answers some members that ask it for bytes. Any other kind is the text of one of `farflung.sim.attacks`,
whose liars collude (`colluders.Ring`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from farflung.compression import parse_codec
from farflung.node.mailbox import LocalResult
from farflung.node.shell import Node
from farflung.protocol.blob import describe
from farflung.protocol.identity import PeerId
from farflung.protocol.statements import Announcement
from farflung.protocol.wire import encode_message
from farflung.sim.attacks import FlippedTask, Forgery, flip_labels, parse_attack
from farflung.sim.attacks.data import Loss
from farflung.sim.colluders import Ring, begun
from farflung.sim.life import Life
from farflung.sim.scenario import Attack

EARLY_S = 0.5
"""How much before a deadline a straggler speaks: enough for the message to arrive."""


def equip(life: Life, attack: Attack, rng: np.random.Generator, members: int, rings: dict[Attack, Ring]) -> None:
    """Make a member an attacker from `attack.from_round` on. `rng` is its own stream; colluders meet in `rings`."""
    match attack.kind:
        case "sign_flip":
            life.change = _from_round(attack, lambda result: result.delta_d * -attack.strength)
        case "noise":
            life.change = _from_round(attack, lambda result: _noise(result.delta_d, attack.strength, rng))
        case "garbage":
            life.encode = _garbage(life, attack, rng)
        case "straggle":
            life.before_speaking = _straggler(attack)
        case "equivocate":
            life.on_open = lambda node: _equivocate(life, node, attack)
        case "starve":
            victims = _victims(life.index, attack, rng, members)
            life.world.channels.machines[life.index].lies = _starver(life, victims, attack)
        case _:
            _equip_from_catalogue(life, attack, rng, rings)


def listen(lives: Sequence[Life], rings: Mapping[Attack, Ring]) -> None:
    """Let colluders hear what every other member sends. Changes nothing that is sent."""

    def heard(life: Life) -> Callable[[bytes, int], bytes]:
        def pass_on(payload: bytes, round_index: int) -> bytes:
            for ring in rings.values():
                ring.hear(life, payload, round_index)
            return payload

        return pass_on

    for life in lives if rings else ():
        if life.spec.attack is None:
            life.encode = heard(life)


def _equip_from_catalogue(life: Life, attack: Attack, rng: np.random.Generator, rings: dict[Attack, Ring]) -> None:
    what = parse_attack(attack.kind)
    if what.layer == "data":
        life.train_on = lambda task: _flipped(life, attack, task)
    elif what.forge is not None:
        forge = what.forge
        life.encode = lambda payload, round_index: (
            forge(payload, _forgery(life, round_index, rng)) if _begun(life, attack) else payload
        )
    else:
        rings.setdefault(attack, Ring(what, attack.from_round, rng, life.world.lives)).join(life)


def _forgery(life: Life, round_index: int, rng: np.random.Generator) -> Forgery:
    assert life.node is not None
    return Forgery(parse_codec(life.node.genesis.codec), life.node.anchor.schema, round_index, rng)


def _flipped(life: Life, attack: Attack, task: Any) -> Any:
    """The task, with labels flipped in the rounds of the attack."""
    honest: Loss = task.loss
    flipped, lie = FlippedTask(task), flip_labels(honest)

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return lie(model, batch) if _begun(life, attack) else honest(model, batch)

    flipped.loss = loss
    return flipped


def _begun(life: Life, attack: Attack) -> bool:
    return begun(life, attack.from_round)


def _from_round(attack: Attack, change: Callable[[LocalResult], torch.Tensor]) -> Callable[..., LocalResult]:
    def lie(life: Life, result: LocalResult) -> LocalResult:
        return replace(result, delta_d=change(result)) if _begun(life, attack) else result

    return lie


def _noise(delta_d: torch.Tensor, strength: float, rng: np.random.Generator) -> torch.Tensor:
    spread = float(delta_d.std()) if delta_d.numel() > 1 else float(delta_d.abs().max())
    return torch.from_numpy(rng.standard_normal(delta_d.numel(), dtype=np.float32)) * (strength * spread)


def _garbage(life: Life, attack: Attack, rng: np.random.Generator) -> Callable[[bytes, int], bytes]:
    def lie(payload: bytes, round_index: int) -> bytes:
        return rng.bytes(len(payload)) if _begun(life, attack) else payload

    return lie


def _straggler(attack: Attack) -> Callable[[Life, LocalResult], Awaitable[None]]:
    """Wait until `strength` of the time that others would wait for it has passed."""

    async def wait(life: Life, result: LocalResult) -> None:
        machine = life.node.machine if life.node is not None else None
        adopted_s = life.times(result.round_index).adopted_s
        if machine is None or adopted_s is None or not _begun(life, attack):
            return
        patience_s = machine.pace.speak.value_s * attack.strength - EARLY_S
        await asyncio.sleep(max(0.0, adopted_s + patience_s - life.clock.now_s()))

    return wait


def _victims(index: int, attack: Attack, rng: np.random.Generator, members: int) -> frozenset[int]:
    others = [other for other in range(members) if other != index]
    count = min(len(others), math.ceil(attack.strength * len(others)))
    return frozenset(int(other) for other in rng.choice(others, size=count, replace=False))


def _starver(life: Life, victims: frozenset[int], attack: Attack) -> Callable[[str, int, bytes], bytes | None]:
    def lie(method: str, caller: int, data: bytes) -> bytes | None:
        return None if method == "Fetch" and caller in victims and _begun(life, attack) else data

    return lie


def _equivocate(life: Life, node: Node, attack: Attack) -> None:
    """Every second peer hears of another payload, and half a grace window after the others."""
    put, made = node.outbox.put, dict[int, bytes]()

    def lie(peer: PeerId, kind: str, envelope: bytes, *, current: bool = True) -> None:
        machine = node.machine
        members = sorted(machine.parent.member_of) if machine is not None else []
        odd = peer in members and members.index(peer) % 2 == 1
        if kind != "Announcement" or not odd or machine is None or not _begun(life, attack):
            put(peer, kind, envelope, current=current)
            return
        if machine.round_index not in made:
            made.clear()
            made[machine.round_index] = _other_announcement(life, node)
        late_s = node.genesis.timing.grace_ms / 2e3
        other = made[machine.round_index]
        life.world.loop.call_later(late_s, lambda: put(peer, kind, other) if life.node is node else None)

    node.outbox.put = lie  # type: ignore[method-assign]


def _other_announcement(life: Life, node: Node) -> bytes:
    """A second signed announcement for the same slot, of a payload that is as well-formed as the first."""
    machine, anchor = node.machine, node.anchor
    assert machine is not None
    rng = np.random.Generator(np.random.PCG64(machine.round_index))
    update_d = torch.from_numpy(rng.standard_normal(anchor.schema.numel, dtype=np.float32)) * 1e-3
    private, shared = anchor.codec.init(anchor.schema)
    payload, _ = anchor.codec.encode(update_d, private, shared, machine.round_index)
    ref, digests = describe(payload)
    node.parts.exchange.offer(node.store.put(payload, ref, digests))
    steps = node.genesis.inner_steps
    bare = Announcement(node.parts.identity.public_key, ref, steps, steps)
    statement = bare.signed(machine.slot, node.parts.identity.sign)
    slot = machine.slot
    return encode_message(node.parts.identity, slot.run_id, slot.round_index, slot.parent, statement)
