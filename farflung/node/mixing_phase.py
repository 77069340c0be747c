"""A member's own update where members mix: it is kept until the certificate, and announced by an account.

What gather mode encodes at once travels here only after the certificate, as mass or as an offset. The announcement
says what this member did (claims), how far behind it is, and what became of its last mixing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from farflung.compression.codec import Link
from farflung.node.local_phase import LocalPhase, Spoken
from farflung.node.mailbox import LocalResult
from farflung.node.mixer import Mixer
from farflung.node.reference import ReferenceAnchor
from farflung.node.replica import Replica
from farflung.protocol.blob import BlobRef, describe
from farflung.protocol.errors import LocalError
from farflung.protocol.manifest import Manifest, proposer_order
from farflung.protocol.round import RoundMachine

NOISE_MAX = 0.5
"""A new reference is due when rounding leaves out more of a round's movement than this: offsets from an old one drown.
A reference is as large as the state, and rounding is forgiving: training with int4 and references 20 rounds old, far
beyond this, cost 0.09 % (docs/push-sum.md)."""


OFFER_ROUNDS = 20
"""An offer stands at least so long: others need time to fetch it."""


class MixingPhase(LocalPhase):
    """`LocalPhase` with a replica in the place of error feedback."""

    def take(self, anchor: ReferenceAnchor, replica: Replica, mixer: Mixer) -> None:
        """What this phase works on besides what every local phase does."""
        self.reference, self.replica, self.mixer = anchor, replica, mixer
        self._parent: Manifest | None = None
        self._restored = False
        self._saved_after = 0
        self._offered: tuple[BlobRef, int, int] | None = None
        """What this member offers as the new reference, since which trained round, and what the reference was then."""

    # -- over restarts ------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Take the parameters of last time back from disk."""
        saved, problem = self._store.read_local()
        if problem:
            self._audit.note(f"own state: {problem}", round_index=self._anchor.round_index)
        if saved is None:
            return
        try:
            self.replica.restore(saved.tensors, saved.meta)
            self._restored, self._saved_after = True, self.replica.round_index
        except (LocalError, KeyError, ValueError) as error:
            self._audit.note(f"own state: {error}", round_index=self._anchor.round_index)

    def reached(self, tip: Manifest) -> None:
        """The anchor is at the tip. Parameters of one's own are kept if they hold more rounds than the reference."""
        reference, replica = self.reference, self.replica
        ahead = self._restored and reference.reference_trained <= replica.trained <= tip.trained
        if ahead:
            replica.stay(tip.round_index)
        else:
            replica.start_from(
                reference.theta_d, reference.state, round_index=tip.round_index, trained=reference.reference_trained
            )
            self._restored = True
        missed = tip.trained - replica.trained
        if missed:
            self._audit.note(f"behind by {missed} rounds; weighs less until it has mixed", round_index=tip.round_index)

    def wants_saving(self, now_s: float) -> bool:
        """Every `snapshot_rounds`, and at the end."""
        newer = self.replica.round_index > self._saved_after and not self.mixer.busy
        due = now_s == math.inf or self.replica.round_index - self._saved_after >= self._genesis.snapshot_rounds
        return newer and due

    def save(self) -> None:
        """Put the parameters on disk. For a thread; a mixing that ends meanwhile waits."""
        with self.replica.lock:
            self._store.write_local(self.replica.tensors(), self.replica.meta())
            self._saved_after = self.replica.round_index

    # -- towards the others -------------------------------------------------------------------------------------------

    def accepts(self, result: LocalResult, machine: RoundMachine) -> bool:
        """See `LocalPhase`."""
        self._parent = machine.parent
        return super().accepts(result, machine)

    def encode(self, result: LocalResult, link: Link) -> Spoken:
        """Keep φ, and write the account. A wild update is kept back: this member then takes part without mass."""
        why = self._refuse(result)
        self._wild = why is not None
        steps, tokens = result.steps, result.tokens
        if why is not None:
            self._audit.note(f"takes part without mass: {why}", round_index=result.round_index)
            self.replica.phi_d.copy_(self.replica.theta_d)
            steps = tokens = 0
        else:
            self.replica.note_end(result.delta_d)
        self.replica.phi_round = result.round_index
        parent = self._parent
        assert parent is not None
        behind = max(0, parent.trained - self.replica.trained)
        offer = self._offer(parent, behind)
        holds = self._held([*self.reference.standing, *([offer] if offer else [])])
        account = replace(self.mixer.account, behind=behind, reference=offer, holds=holds)
        payload = account.canonical_bytes
        ref, digests = describe(payload)
        self._encoded = result.round_index
        return Spoken(ref, self._store.put(payload, ref, digests), steps, tokens)

    def _offer(self, parent: Manifest, behind: int) -> BlobRef | None:
        """This member's parameters as the new reference: when one is due, it is this member's turn and there is no
        other on offer; then in every account, until one is taken or this one is old. Others fetch it meanwhile."""
        reference, every = self.reference, self._genesis.mixing.reference_rounds
        if self._offered is not None:
            ref, since, before = self._offered
            stands = reference.reference_trained == before and ref != reference.present_ref()
            if stands and parent.trained - since <= max(every, OFFER_ROUNDS):
                return ref
            self._withdraw(ref)
        pairs, age = self._genesis.mode == "pairs", parent.trained - reference.reference_trained
        turn = reference.founder if pairs else proposer_order(parent)[0]
        noisy = self.mixer.numbers.get("noise", 0.0) > NOISE_MAX and age > 2
        if turn != self._me or behind or reference.standing or not (age >= every or noisy):
            return None
        with self.replica.lock:
            data = b"".join(tensor.numpy().tobytes() for tensor in self.replica.tensors().values())
        ref, digests = describe(data)
        source = self._store.put(data, ref, digests)
        self._tell_exchange(lambda: self.mixer.ways.exchange.offer(source))
        self._offered = ref, parent.trained, reference.reference_trained
        return ref

    def _withdraw(self, ref: BlobRef) -> None:
        """Another reference was taken, or nobody took this one: it need not be kept, unless it is the state now."""
        self._offered = None
        if ref != self.reference.present_ref():
            self._tell_exchange(lambda: self.mixer.ways.exchange.forget(ref.digest))
            self._store.drop(ref.digest)

    def _tell_exchange(self, what: Callable[[], None]) -> None:
        """The exchange belongs to the loop, and this is called from a thread."""
        self.mixer.ways.in_loop(what)

    def _held(self, offers: Sequence[BlobRef]) -> bytes:
        """The first of these that is on disk."""
        return next((ref.digest for ref in offers if self._store.blob(ref.digest) is not None), b"")

    # -- towards training ---------------------------------------------------------------------------------------------

    def welcome(self, machine: RoundMachine) -> None:
        """See `LocalPhase`; not before the mixing has ended."""
        if not self.mixer.busy:
            super().welcome(machine)
