"""Bounds of everything that grows in a node or between nodes, and how much of it there is now."""

from __future__ import annotations

from collections.abc import Iterator

from farflung.node.mixer import Mixer
from farflung.node.outbox import WAITING_MAX
from farflung.node.shell import Node
from farflung.protocol import limits
from farflung.protocol.ballot import VIEWS_AHEAD_MAX
from farflung.sim.explore.ground import SNAPSHOT_ROUNDS
from farflung.sim.explore.stage import Stage

STATEMENTS = 8
"""Kinds of control messages: an outbox keeps one of each for a peer."""

ROUND_PAYLOADS = 3 * SNAPSHOT_ROUNDS + 3
"""Rounds whose payloads may be on a disk: since the older of two snapshots, and those that a prune has yet to reach."""

HELD_MAX = 64
"""Messages that wait in one pipe for a partition to end: a call is made at most every 10 s, and streams are short."""


def _in_node(stage: Stage, node: Node) -> Iterator[tuple[str, int, int]]:
    n, machine = len(stage.lives), node.machine
    yield "events in the inbox", node._inbox.qsize(), 4 * STATEMENTS * n
    yield "tasks of the shell", len(node._tasks), 8 + 4 * n
    yield "fetches", len(node._fetching), 2 * n
    for peer, queue in sorted(node.outbox._waiting.items()):
        yield f"messages for {peer.short}", len(queue), STATEMENTS if node.mixer is None else WAITING_MAX
    yield "senders", len(node.outbox._tasks), n
    yield "certificates fetched ahead", len(node.pursuit._ahead), limits.CHAIN_ANSWER_MAX
    yield "payloads on disk", len(list(node.store.blobs.blobs())), n * ROUND_PAYLOADS
    yield "snapshots on disk", len(list(node.store.snapshots.rounds())), 3
    if node.mixer is not None:
        yield from _in_mixer(node.mixer, n)
    if machine is not None:
        ballot, attendance = machine.ballot, machine.attendance
        yield "announcements", len(attendance.announcements), n
        yield "requests to join", len(attendance.joins), n
        yield "payloads held or refused", len(attendance.held) + len(attendance.refused), 2 * n
        yield "proposals", len(ballot.proposals), ballot.view + VIEWS_AHEAD_MAX + 1
        yield "promised views", len(ballot.promises), ballot.view + VIEWS_AHEAD_MAX + 1
        yield "votes", sum(map(len, ballot.votes.values())), n * (ballot.view + VIEWS_AHEAD_MAX + 1)


def _in_mixer(mixer: Mixer, n: int) -> Iterator[tuple[str, int, int]]:
    """Each tick has one partner, and a fragment each; a graph of so few members has at most n ticks."""
    yield "vectors on offer", len(mixer._lent), 2 * n
    yield "vectors being fetched", len(mixer._fetches), 2 * n
    yield "rounds whose notes are early", len(mixer._early), 2
    yield "early notes", sum(map(len, mixer._early.values())), 16 * n
    yield "notes in a row", mixer._queue.qsize(), 16 * n


def _between_nodes(stage: Stage) -> Iterator[tuple[str, int, int]]:
    n = len(stage.lives)
    for machine in stage.channels.machines:
        where = f"machine {machine.index}: "
        yield where + "connections", len(machine.connections), 6 * n
        yield where + "calls being answered", len(machine.handled), 8 * n
        yield where + "open calls", sum(len(one.calls) for one in machine.connections.values()), 16 * n
    for pipe in stage.fabric._blocked.values():
        yield f"messages from {pipe.source} to {pipe.target} in a partition", len(pipe.held), HELD_MAX
    yield "timers", len(stage.loop._heap), 2_000 * n


def look(stage: Stage) -> None:
    """Note whatever is beyond its bound now."""
    now_s = stage.loop.time()
    for life in stage.lives:
        if life.node is None:
            continue
        for what, count, most in _in_node(stage, life.node):
            if count > most:
                stage.facts.crowds.append(f"member {life.index} at {now_s:.3f} s: {count} {what}, at most {most}")
    for what, count, most in _between_nodes(stage):
        if count > most:
            stage.facts.crowds.append(f"at {now_s:.3f} s: {count} {what}, at most {most}")
