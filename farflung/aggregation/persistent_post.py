"""Persistent push-sum among members in one memory: the reference for tests and for training tables.

There are no rounds, so what is under way outlives every tick: a post is kept as long as its members, and saved with
them. Networks, disks and receipts are `persistent_member`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from farflung.aggregation.graphs import Mixing
from farflung.aggregation.mass import Mass, Sums, add_sums
from farflung.aggregation.persistent import PersistentSum, check_regular
from farflung.aggregation.push_sum import Fate, on_time
from farflung.protocol.errors import LocalError


@dataclass(slots=True)
class _Letter:
    """One copy of a message. Copies of one message share `counted`."""

    due: int
    sender: int
    to: int
    mass: Mass
    counted: list[bool]


@dataclass(slots=True)
class Post:
    """Carries shares between members, each named by its position.

    With `ledger`, a message counts once or its mass goes home: repeated copies are refused, and a lost message is back
    with its sender a tick later. Without, messages are simply lost, or count twice: that is what the naive form does,
    and how it fails can be measured.
    """

    ledger: bool = True
    tick: int = 0
    """How many ticks were carried."""

    _letters: list[_Letter] = field(default_factory=list)

    def carry(self, members: Sequence[PersistentSum], mixing: Mixing, *, fate: Fate = on_time) -> None:
        """One tick: everybody sends by its column, and what is due arrives, in the order of senders. In place.

        `fate` is asked with this post's own tick. Raises ConfigError if the mixing is not regular, LocalError if it is
        of another number of members; nothing has moved then.
        """
        if len(mixing) != len(members):
            raise LocalError(f"a tick of {len(mixing)} members cannot be carried between {len(members)}")
        check_regular(mixing)
        for sender, member in enumerate(members):
            fates = {share.to: fate(self.tick, sender, share.to) for share in mixing[sender].sends}
            sends = [share for share in mixing[sender].sends if fates[share.to] is not None]
            for to, mass in member.send(sends).items():
                self._post(sender, to, mass, fates[to] or ())
        due = sorted((letter for letter in self._letters if letter.due <= self.tick), key=lambda letter: letter.sender)
        for letter in due:
            if not (self.ledger and letter.counted[0]):
                letter.counted[0] = True
                members[letter.to].receive(letter.mass)
        self._letters = [letter for letter in self._letters if letter.due > self.tick]
        self.tick += 1

    def recall(self, members: Sequence[PersistentSum]) -> None:
        """Everything that is under way and not counted goes home. Raises LocalError without a ledger."""
        if not self.ledger:
            raise LocalError("what was sent without a ledger cannot be recalled")
        for letter in self._letters:
            if not letter.counted[0]:
                letter.counted[0] = True
                members[letter.sender].receive(letter.mass)
        self._letters = []

    def under_way(self) -> tuple[Mass, ...]:
        """The masses of every message that nobody counted yet, of one copy each."""
        once = {id(letter.counted): letter.mass for letter in self._letters if not letter.counted[0]}
        return tuple(once.values())

    def sums(self, members: Sequence[PersistentSum]) -> Sums:
        """The audit's numbers over members and messages: with a ledger, only `update`, `begin` and loss of a member
        change them."""
        return add_sums([*(member.sums() for member in members), *(mass.sums() for mass in self.under_way())])

    def _post(self, sender: int, to: int, mass: Mass, delays: Sequence[int]) -> None:
        counted = [False]
        if delays:
            copies = [mass, *(mass.copy() for _ in delays[1:])]
            arrivals = zip(delays, copies, strict=True)
            self._letters += [_Letter(self.tick + delay, sender, to, copy, counted) for delay, copy in arrivals]
        elif self.ledger:
            self._letters.append(_Letter(self.tick + 1, sender, sender, mass, counted))
