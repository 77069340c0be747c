"""Hooks around a node whose run mixes: what its mixer begins, gives away, counts, takes back and steps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from farflung.compression.codec import Link
from farflung.node.local_phase import Spoken
from farflung.node.mailbox import LocalResult
from farflung.node.mixer import Mixer
from farflung.node.mixing_phase import MixingPhase
from farflung.node.mixing_round import MixingRound
from farflung.node.shell import Node
from farflung.protocol.ledger.effects import Credit, Returned
from farflung.protocol.manifest import Manifest
from farflung.protocol.mixing.account import Account
from farflung.protocol.mixing.push_sum import Move, PushSumMachine
from farflung.protocol.rows import Verdict
from farflung.sim.explore.mixing_facts import Audited, Mixed

if TYPE_CHECKING:
    from farflung.sim.explore.stage import WatchedLife


def watch_mixing(life: WatchedLife, node: Node) -> None:
    """Tell the facts of a life what its node's mixer does. Changes nothing."""
    assert node.mixer is not None
    _watch_phase(life, node)
    _watch_rounds(life, node.mixer)
    _watch_chain(life, node.mixer)


def _watch_phase(life: WatchedLife, node: Node) -> None:
    """Accounts that are announced; and that each is settled once, as updates are."""
    local, facts, key = node.local, life.stage.facts, (life.index, life.lives)
    assert isinstance(local, MixingPhase)
    encode, codec = local.encode, node.anchor.codec
    facts.settling[key] = ""

    def encoded(result: LocalResult, link: Link) -> Spoken:
        spoken = encode(result, link)
        assert spoken.ref is not None
        source = node.store.blob(spoken.ref.digest)
        assert source is not None
        facts.accounts[spoken.ref.digest] = bytes(source.map())
        facts.settling[key] += "e"
        if local._wild:
            facts.screened[key] = life.clock.now_s()
        return spoken

    def observe(private: Any, verdict: Verdict) -> Any:
        facts.settling[key] += "o"
        return codec.observe(private, verdict)

    node.anchor.codec = codec._replace(observe=observe)
    setattr(local, "encode", encoded)  # noqa: B010


def _watch_chain(life: WatchedLife, mixer: Mixer) -> None:
    """What certificates say of the mass that there was; and rounds that this life only heard of."""
    after, sit_out, facts, number = mixer.after, mixer.sit_out, life.stage.facts, life.lives

    def applied(manifest: Manifest, trial: Any) -> Any:
        audit = mixer.ways.anchor.audited
        if audit is not None:
            facts.audits.append(Audited(life.index, number, audit, life.clock.now_s()))
        return after(manifest, trial)

    def overtaken(manifest: Manifest) -> None:
        facts.screened[life.index, number] = life.clock.now_s()  # an update that was to be mixed is gone
        life.drop_mixed()
        sit_out(manifest)

    setattr(mixer, "after", applied)  # noqa: B010
    setattr(mixer, "sit_out", overtaken)  # noqa: B010


def _watch_rounds(life: WatchedLife, mixer: Mixer) -> None:
    """Every round's mixing, from the moment when its vectors are there."""
    think = mixer._think

    async def thinking(work: Callable[[], Any]) -> Any:
        result = await _awaited(think, work)
        if isinstance(result, MixingRound):
            watch_round(life, result)
        return result

    setattr(mixer, "_think", thinking)  # noqa: B010


async def _awaited(think: Callable[[Callable[[], Any]], Awaitable[Any]], work: Callable[[], Any]) -> Any:
    return await think(work)


def watch_round(life: WatchedLife, current: MixingRound) -> None:
    """One round's moves, in the order in which its vectors make them."""
    replica, masses = current.replica, isinstance(current.machine, PushSumMachine)
    ahead_d = (replica.phi_d - replica.theta_d).numpy().copy()
    opened = float(sum(current.machine.opened)) if masses else None
    now_s = life.clock.now_s
    fact = Mixed(life.index, life.lives, current.round_index, now_s(), ahead_d, opened)
    life.stage.facts.mixed.append(fact)
    index_of, finish = life.stage.facts.index_of, current.finish

    def finished(trained: int) -> dict[str, float]:
        fact.steps += 1
        return finish(trained)

    setattr(current, "finish", finished)  # noqa: B010
    if masses:
        setattr(current, "split", partial(_split, fact, current, current.split, index_of))  # noqa: B010
        setattr(current, "move", partial(_move, fact, current.move, index_of, now_s))  # noqa: B010
        setattr(current, "account", partial(_account, fact, current, current.account))  # noqa: B010


def _split(
    fact: Mixed, current: MixingRound, split: Callable[[int], Any], index_of: Mapping[Any, int], tick: int
) -> Any:
    shares = split(tick)
    for (peer, part), share in shares.items():
        if share is None:
            fact.whole = False
            continue
        seq = current.machine.ledgers[part].out[peer].next_seq
        fact.sent[index_of[peer], part, seq] = float(share.posted.mass)
    return shares


def _move(
    fact: Mixed, move: Callable[[Move], None], index_of: Mapping[Any, int], now_s: Callable[[], float], what: Move
) -> None:
    move(what)
    effect = what.effect
    key = index_of[effect.peer], what.fragment, effect.seq
    if isinstance(effect, Credit):
        fact.counted.append((key, float(effect.amount.mass)))
    elif isinstance(effect, Returned):
        fact.home[key] = now_s()
    if isinstance(effect, Credit | Returned):
        fact.afterwards += fact.held is not None


def _account(fact: Mixed, current: MixingRound, account: Callable[[], Account]) -> Account:
    told = account()
    fact.held = sum(mass.weight for mass in current.carrier.round.masses)
    fact.whole = fact.whole and not current.machine.clock.given_up
    return told
