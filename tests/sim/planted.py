"""Bugs that are put into the real code for the length of a test, to see that exploration finds them. Never shipped."""

from __future__ import annotations

import math

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
