"""One member's own update: from the training thread to a payload on disk, and what becomes of it afterwards.

Never is one Δ both in the error feedback and in the parameters (DESIGN §3): what was encoded belongs to the codec's
state, and training adopts the new anchor plainly; what was not stays in the parameters.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

from farflung.compression.codec import Link
from farflung.compression.guards import remembers
from farflung.node.anchor import Anchor
from farflung.node.audit import Audit
from farflung.node.blobs import BlobSource
from farflung.node.data import RoundView
from farflung.node.entries import decode_entry
from farflung.node.mailbox import Adopt, Hurry, LocalResult, Mailbox, Stop
from farflung.node.runtime import Clock
from farflung.node.screen import Screen
from farflung.node.store import RunStore
from farflung.protocol import limits
from farflung.protocol.blob import BlobRef, describe
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import PeerId
from farflung.protocol.manifest import Manifest
from farflung.protocol.phase import Phase
from farflung.protocol.round import RoundMachine
from farflung.protocol.rows import Reason, Verdict
from farflung.protocol.statements import Announcement

SAVE_SHARE = 20
"""Saving the codec's private state may take one part in this of the time. With rounds of minutes every round's is
saved; a crash between two saves costs what error feedback held."""


class Spoken(NamedTuple):
    """What this member is about to announce: a payload, or None to abstain, and what it claims to have done."""

    ref: BlobRef | None
    source: BlobSource | None
    steps: int
    tokens: int


class LocalPhase:
    """Keeps the codec's private state (error feedback: one vector of length d) and speaks to training."""

    def __init__(
        self,
        genesis: Genesis,
        store: RunStore,
        anchor: Anchor,
        clock: Clock,
        mailbox: Mailbox,
        audit: Audit,
        me: PeerId,
    ) -> None:
        self._genesis, self._store, self._anchor, self._clock = genesis, store, anchor, clock
        self._mailbox, self._audit, self._me = mailbox, audit, me
        self.private, _ = anchor.codec.init(anchor.schema)
        self.screen = Screen()
        self._speaking: LocalResult | None = None
        """A result between its arrival and its announcement: its Δ is lent, training waits."""
        self._keep = True
        """Whether training's next adoption keeps what it has beyond the old anchor: true unless it was encoded."""
        self._wild = False
        """Whether the latest result was refused by the screen: then nothing of it may stay, however it ends."""
        self._announced = self._hurried = 0
        """The latest round in which this was done."""
        self._unsettled = 0
        """The round in which something was announced whose fate is not known yet; 0: none."""
        self.announced = 0
        """The latest round in which a payload was announced, in this life or before: the journal keeps it."""
        self._encoded = self._saved = 0
        """The round whose encoding left `private` behind, and that of the copy on disk."""
        self._save_after_s = -math.inf
        self._private_lock = threading.Lock()
        """Held while `private` is encoded into or saved."""

    # -- over restarts ------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Take the error feedback back from disk, if it is that of the last announcement or a later one.

        An older one holds what has been sent since: it is dropped, as if its rest had been forfeited.
        """
        codec, schema = self._anchor.codec, self._anchor.schema
        self.announced = _last_announced(self._store)
        saved, problem = self._store.read_local()
        if problem:
            self._audit.note(f"own state: {problem}", round_index=self._anchor.round_index)
        if saved is None or saved.meta.get("codec") != codec.spec:
            return
        of_round = int(saved.meta["round"])
        if of_round < self.announced:
            why = f"of round {of_round}, but a payload was announced in {self.announced}"
            self._audit.note(f"own state: {why}; error feedback starts anew", round_index=self._anchor.round_index)
            return
        self.private, self._encoded, self._saved = codec.restore_private(schema, saved.tensors), of_round, of_round

    def reached(self, tip: Manifest) -> None:
        """The anchor is at the tip; the first round of this life begins."""

    def wants_saving(self, now_s: float) -> bool:
        """Whether what the last encoding left behind is settled, not on disk, and enough time has passed.

        If so, the caller calls `save`.
        """
        settled = self._speaking is None and not self._unsettled
        wanted = settled and self._encoded > self._saved and now_s >= self._save_after_s
        if not wanted or not self._anchor.codec.private_tensors(self.private):
            return False
        self._save_after_s = math.inf
        return True

    def save(self) -> None:
        """Put the error feedback on disk. For a thread: it is read until this returns, and `encode` waits for it.

        Nothing else changes it meanwhile: what becomes of an update is only told after it was encoded.
        """
        codec = self._anchor.codec
        with self._private_lock:
            tensors, encoded, began_s = codec.private_tensors(self.private), self._encoded, self._clock.now_s()
            self._store.write_local(tensors, {"codec": codec.spec, "round": encoded})
            now_s = self._clock.now_s()
            self._saved, self._save_after_s = encoded, now_s + SAVE_SHARE * (now_s - began_s)

    # -- towards the others -------------------------------------------------------------------------------------------

    def accepts(self, result: LocalResult, machine: RoundMachine) -> bool:
        """Whether a result is of the present round. If not, its answer is in the mailbox: an anchor to go on from."""
        if result.round_index != machine.round_index or not machine.wants_steps:
            return False
        self._speaking = result
        return True

    def encode(self, result: LocalResult, link: Link) -> Spoken:
        """Encode and put the payload on disk. Without one the update is wild: this member abstains.

        The error feedback it leaves behind follows when there is time (`save`).
        """
        why = self._refuse(result)
        self._wild = why is not None
        if why is not None:
            self._audit.note(f"abstains: {why}", round_index=result.round_index)
            return Spoken(None, None, 0, 0)
        codec, shared = self._anchor.codec, self._anchor.shared
        with self._private_lock:
            tuned = codec.tune(self.private, link)
            payload, self.private = codec.encode(result.delta_d, tuned, shared, result.round_index)
            self._encoded = result.round_index
        ref, digests = describe(payload)
        return Spoken(ref, self._store.put(payload, ref, digests), result.steps, result.tokens)

    def _refuse(self, result: LocalResult) -> str | None:
        length = result.norm
        if limits.PAYLOAD_ABS_MAX < length < math.inf:  # only then can an entry be beyond what peers accept
            largest = max(abs(float(end)) for end in result.delta_d.aminmax())
            if largest > limits.PAYLOAD_ABS_MAX:
                return f"an entry of the update is {largest:.3g}, {limits.PAYLOAD_ABS_MAX:.0e} is the most"
        return self.screen.refuse(length)

    def hand_over(self, machine: RoundMachine) -> bool:
        """Whether what was just encoded can still be announced. If not, what was sent of it is forfeited."""
        result, self._speaking = self._speaking, None
        if result is not None and result.round_index == machine.round_index and machine.wants_steps:
            self._announced = self._unsettled = result.round_index
            if self._encoded == result.round_index:
                self.announced = self._encoded
            return True
        self._settle(Verdict(0.0, Reason.LATE))
        return False

    def judge(self, manifest: Manifest, verdicts: Mapping[PeerId, Verdict]) -> bool:
        """What the certificate did with my own row decides what is kept of it. Returns whether it was listed."""
        mine = next((item for item in manifest.announcements if item.peer_id == self._me), None)
        if mine is not None or self._announced == manifest.round_index:
            abstained = mine is not None and mine.payload is None
            self._settle(verdicts.get(self._me, Verdict(0.0, Reason.ABSTAINED if abstained else Reason.LATE)))
        return mine is not None

    def overtaken(self, manifest_of: Callable[[int], Manifest], tip: int) -> None:
        """The chain was fetched up to round `tip`: what it did with my own row counts, though I did not apply it.

        Its verdict is not known here. A rule that survives liars may have cut it: it counts as forfeited then, which is
        what encoding has left behind already.
        """
        if not 0 < self._unsettled <= tip:
            return
        manifest = manifest_of(self._unsettled)
        unknown = Verdict(0.0, Reason.CUT if self._anchor.rule.f else Reason.KEPT)
        self.judge(manifest, dict.fromkeys((item.peer_id for item in manifest.payloads), unknown))

    def _settle(self, verdict: Verdict) -> None:
        self._unsettled = 0
        self.private = self._anchor.codec.observe(self.private, verdict)
        carries_on = remembers(self._anchor.codec)
        self._keep = verdict.reason is Reason.LATE and not carries_on and not self._wild

    # -- towards training ---------------------------------------------------------------------------------------------

    def welcome(self, machine: RoundMachine) -> None:
        """Tell training that there is an anchor to go on from, once this node is a member and training has begun."""
        over = machine.phase is Phase.DONE
        if over or (machine.wants_steps and self._speaking is None):
            ahead_d = None if over else self._anchor.codec.ahead(self.private)  # a run ends with the model at θ
            self._mailbox.post(Adopt(self._view(machine), keep=self._keep, ahead_d=ahead_d))
            self._keep = True
        if over:
            self._mailbox.post(Stop())

    def hurry(self, machine: RoundMachine) -> None:
        """A quorum has spoken and half of the grace window is over: training should send what it has."""
        since_s = machine.attendance.quorum_since_s
        if since_s is None or not machine.wants_steps or self._speaking or self._hurried == machine.round_index:
            return
        if self._clock.now_s() >= since_s + self._genesis.timing.grace_ms / 2e3:
            self._hurried = machine.round_index
            self._mailbox.post(Hurry(machine.round_index))

    def _view(self, machine: RoundMachine) -> RoundView:
        parent = machine.parent
        members, run_id = tuple(parent.member_of), self._genesis.run_id
        return RoundView(run_id, machine.round_index, parent.digest, self._me, members, parent.trained)


def _last_announced(store: RunStore) -> int:
    """The latest round in which a payload was announced, as the journal knows; 0: none."""
    journal = store.journal
    for kind, value in (decode_entry(*entry) for entry in journal.read()):
        if kind == "own" and isinstance(value, Announcement) and value.payload is not None:
            return journal.round_index or 0
    return journal.announced
