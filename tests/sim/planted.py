"""Bugs that are put into the real code for the length of a test, to see that exploration finds them. Never shipped."""

from __future__ import annotations

import math

from farflung.aggregation.outer import sgd
from farflung.node import assembly
from farflung.node.blobfiles import BlobFiles
from farflung.node.local_phase import LocalPhase
from farflung.node.shell import Node
from farflung.node.state_sync import StateSync
from farflung.protocol import ballot, certificate
from farflung.protocol.attendance import Attendance
from farflung.protocol.ballot import Ballot
from farflung.protocol.deadline import Pace
from farflung.protocol.effects import Broadcast
from farflung.protocol.round import RoundMachine
from farflung.protocol.statements import Announcement


def lost_announcement(monkeypatch) -> None:
    """Whoever missed an announcement never hears it: it is not said again."""
    resend = RoundMachine._resend

    def without(self, now_s):
        before = len(self._out)
        resend(self, now_s)
        said = self._out[before:]
        self._out[before:] = [
            effect
            for effect in said
            if not (isinstance(effect, Broadcast) and isinstance(effect.statement, Announcement))
        ]

    monkeypatch.setattr(RoundMachine, "_resend", without)


def double_vote(monkeypatch) -> None:
    """A member that restarts has forgotten that it voted."""
    restore = Ballot.restore

    def forgetful(self, kind, value, sign):
        if kind != "vote":
            restore(self, kind, value, sign)

    monkeypatch.setattr(Ballot, "restore", forgetful)


def broken_promise(monkeypatch) -> None:
    """A member votes in a view before the one it promised."""

    def may_vote(self, view):
        return self.votes_here and (self.my_vote is None or self.my_vote[0] != view)

    monkeypatch.setattr(Ballot, "may_vote", may_vote)


def forgotten_timeout(monkeypatch) -> None:
    """Nobody's patience with a proposer ever ends."""
    monkeypatch.setattr(Pace, "view_s", lambda self, view: math.inf)


PLANTED = {plant.__name__: plant for plant in (lost_announcement, double_vote, broken_promise, forgotten_timeout)}


def lone_quorum(monkeypatch) -> None:
    """One vote is enough."""
    monkeypatch.setattr(ballot, "is_quorum", lambda voters, yes: bool(yes))
    monkeypatch.setattr(certificate, "is_quorum", lambda voters, yes: bool(yes))


def wrong_mean(monkeypatch) -> None:
    """The outer step is a bit too short."""
    monkeypatch.setattr(assembly, "parse_outer", lambda spec: sgd(0.999))


def greedy_training(monkeypatch) -> None:
    """Training keeps what was sent and counted."""
    view = LocalPhase.welcome

    def welcome(self, machine):
        self._keep = True
        view(self, machine)

    monkeypatch.setattr(LocalPhase, "welcome", welcome)


def told_twice(monkeypatch) -> None:
    """A member is told twice what became of its update."""
    settle = LocalPhase._settle

    def twice(self, verdict):
        self._anchor.codec.observe(self.private, verdict)
        settle(self, verdict)

    monkeypatch.setattr(LocalPhase, "_settle", twice)


def biased_proposer(monkeypatch) -> None:
    """The last of several payloads is left out."""
    monkeypatch.setattr(
        Attendance, "listable", property(lambda self: LISTABLE.__get__(self)[:-1] or LISTABLE.__get__(self))
    )


LISTABLE = Attendance.listable


def hoarder(monkeypatch) -> None:
    """Old payloads are never dropped."""
    monkeypatch.setattr(StateSync, "prune", lambda self, in_use: [])


def orphans(monkeypatch) -> None:
    """The tasks of a node that ends go on."""

    async def end(self) -> None:
        await self.outbox.stop()

    monkeypatch.setattr(Node, "_end", end)


def clumsy_disk(monkeypatch) -> None:
    """Keeping a payload raises what nobody expects."""

    def put(self, data, ref, digests):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(BlobFiles, "put", put)


TEETH = {
    "one certificate": lone_quorum,
    "votes make a quorum": lone_quorum,
    "states are recomputed": wrong_mean,
    "steps count once": greedy_training,
    "verdicts come once": told_twice,
    "what is here is listed": biased_proposer,
    "nothing fails": clumsy_disk,
    "memory is bounded": hoarder,
    "nothing outlives its node": orphans,
}
"""For each law one bug that breaks it. Those of `PLANTED` break the others."""
