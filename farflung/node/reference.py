"""The certified state of a run whose members mix: the reference θ_ref, and what applying a certificate is there.

In push-sum and pairs mode members' parameters differ; what they agree on is who takes part with which weight, and a
state from which offsets are measured and joiners start: θ_ref with the outer buffers of whoever published it. A
manifest lists accounts (`protocol.mixing.account`) in the place of payloads. Applying it audits them; if one of them
offers a new reference, that becomes the state. Everything here follows from the manifest, so the state and its digest
are the same everywhere, as in gather mode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

import torch

from farflung.aggregation.mass import late_weight
from farflung.aggregation.weights import Claim
from farflung.node.anchor import Anchor, Trial, state_digests
from farflung.node.blob_sources import BlobSource, read_stream
from farflung.protocol.blob import BlobRef, choose_chunk_bytes
from farflung.protocol.certificate import Certificate
from farflung.protocol.errors import LocalError, PeerError, TooFewPeers
from farflung.protocol.identity import PeerId
from farflung.protocol.ledger.audit import Discrepancy
from farflung.protocol.ledger.books import Terms
from farflung.protocol.manifest import Manifest
from farflung.protocol.mixing.account import ACCOUNT_BYTES_MAX, Account, decode_account
from farflung.protocol.mixing.auditing import MassAudit, audit_accounts
from farflung.protocol.mixing.settings import Mixing
from farflung.protocol.rows import Reason, Verdict

PAIR_WEIGHT_MIN = 1.0 / 1024
"""Pairs: of the largest weight, no member that did anything has less: nobody's claim can make others' count nothing."""


class Roll(NamedTuple):
    """Who mixes after a certificate. All lists are in the order of the members' ids."""

    round_index: int
    members: tuple[PeerId, ...]
    mass: tuple[float, ...]
    """What each begins with: its weight, shrunk for rounds it missed, over the largest; 0: it only receives."""
    scale: tuple[float, ...]
    """What each member's own Δ is multiplied by first (fednova); 1 for other weight policies."""


@dataclass
class ReferenceAnchor(Anchor):
    """`open_blob` gives what is on this disk. `trained` and `reference_trained` follow `locate` after every load."""

    mode: str = "push-sum"
    mixing: Mixing = field(default_factory=Mixing)
    terms: Terms = field(default_factory=Terms)
    open_blob: Callable[[bytes], BlobSource | None] = lambda digest: None
    trained: int = 0
    """Rounds that trained, as certified."""
    trained_before: int = 0
    """The same, one round before."""
    reference_trained: int = 0
    """About how many of them are in the reference: one less than when it was taken. It was offered a round before that
    at the latest; on slow lines some more, which only its offers said."""
    roll: Roll | None = None
    """Who mixes after the round that was committed last."""
    audited: MassAudit | None = None
    """What the accounts said that were committed last."""
    standing: tuple[BlobRef, ...] = ()
    """References that were on offer then and were not taken."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ref: BlobRef | None = None
        self._next: tuple[Manifest, Roll, MassAudit, bool, tuple[BlobRef, ...]] | None = None

    # -- payloads are accounts ----------------------------------------------------------------------------------------

    @property
    def payload_bytes_max(self) -> int:
        """Of an account."""
        return ACCOUNT_BYTES_MAX

    def check(self, payload: bytes, round_index: int, peer: PeerId) -> None:
        """Raise PeerError unless this is an account of this member, of the run's kind and of a round that is over, and
        a reference in it has the state's size."""
        account = decode_account(payload, self.terms)
        if account.member != peer:
            raise PeerError(peer.short, "an account in somebody else's name")
        kept = [book.ledger is not None for book in account.books]
        fits = len(kept) == self.mixing.fragments and any(kept) == (self.mode != "pairs")
        if kept and not fits:
            raise PeerError(peer.short, f"an account of {len(kept)} fragments, {sum(kept)} of them with ledgers")
        if account.round_index >= round_index:
            raise PeerError(peer.short, f"an account of round {account.round_index} in round {round_index}")
        if account.reference is not None and not self._fits(account.reference):
            raise PeerError(peer.short, f"a reference of {account.reference.size} bytes")

    @property
    def offers_blobs(self) -> bool:
        """See `Anchor`: accounts offer references."""
        return True

    def offered(self, payload: bytes) -> BlobRef | None:
        """The reference that an account offers, if it may."""
        return self._offer_in(decode_account(payload, self.terms))

    def taken(self, manifest: Manifest, payloads: Sequence[bytes]) -> BlobRef | None:
        """The reference that a manifest takes: one that more than half of those who are listed have on disk."""
        return self._taken(manifest, [decode_account(payload, self.terms) for payload in payloads])

    def _taken(self, manifest: Manifest, accounts: Sequence[Account]) -> BlobRef | None:
        for offer in self._offers(manifest, accounts):
            held = sum(account.holds == offer.digest for account in accounts)
            if 2 * held > len(accounts):
                return offer
        return None

    def _offer_in(self, account: Account) -> BlobRef | None:
        offer = account.reference if self._may_publish(account.member) else None
        return offer if offer is not None and self._fits(offer) else None

    def _offers(self, manifest: Manifest, accounts: Sequence[Account]) -> list[BlobRef]:
        """What is on offer, in one order for all: by a hash of the round and who offers."""
        tag = b"farflung reference\0" + manifest.run_id + manifest.round_index.to_bytes(8, "big")
        ranked = sorted((hashlib.sha256(tag + account.member.digest).digest(), account) for account in accounts)
        found = [self._offer_in(account) for _, account in ranked]
        return [offer for offer in found if offer is not None]

    def _may_publish(self, peer: PeerId) -> bool:
        """With pairs members do not trust each other: the founder's reference is the only one they take."""
        return self.mode != "pairs" or peer == self.founder

    def _fits(self, ref: BlobRef) -> bool:
        size = sum(array.nbytes for array in self.arrays())
        return (ref.size, ref.chunk_bytes) == (size, choose_chunk_bytes(size))

    # -- applying a manifest ------------------------------------------------------------------------------------------

    def loaded(self, round_index: int) -> None:
        """See `Anchor`."""
        super().loaded(round_index)
        self._ref, self._next, self.roll, self.audited, self.standing = None, None, None, None, ()

    def locate(self, certificate: Callable[[int], Certificate]) -> None:
        """Find out from the chain when the present reference was published. Costs one certificate per round since."""
        here = certificate(self.round_index)
        self.trained, first = here.manifest.trained, self.round_index
        while first > 0 and certificate(first - 1).state_digest == here.state_digest:
            first -= 1
        self.reference_trained = max(0, certificate(first - 1).manifest.trained - 1) if first else 0

    def try_out(self, manifest: Manifest, payloads: Sequence[bytes], pool: object = None) -> Trial:
        """See `Anchor`. Costs a pass over the accounts, and over the state if one of them offers a reference."""
        if manifest.round_index != self.round_index + 1:
            raise LocalError(f"manifest {manifest.round_index} on the state of round {self.round_index}")
        accounts = {}
        for item, payload in zip(manifest.payloads, payloads, strict=True):
            accounts[item.peer_id] = decode_account(payload, self.terms)
        roll, audited = self._call(manifest, accounts), self._audit(accounts)
        chosen = self._taken(manifest, [*accounts.values()])
        taken = chosen is not None and self._read(chosen)
        ref = chosen if chosen is not None and taken else self.present_ref()
        total = sum(roll.mass)
        verdicts = {
            peer: Verdict(mass / total if total else 0.0, Reason.KEPT)
            for peer, mass in zip(roll.members, roll.mass, strict=True)
        }
        numbers = {
            "mass_round": float(audited.round_index),
            "mass_members": float(audited.members),
            "mass_error": audited.error,
            "mass_limbo": audited.limbo,
            "mass_unseen": float(len(audited.unseen)),
            "new_reference": float(taken),
        }
        standing = () if taken else tuple(self._offers(manifest, [*accounts.values()]))
        self._next = manifest, roll, audited, taken, standing
        self._trial = Trial(manifest.digest, ref, verdicts, numbers)
        return self._trial

    def commit(self, manifest_digest: bytes) -> Trial:
        """See `Anchor`."""
        trial, following = self._trial, self._next
        if trial is None or following is None or trial.manifest_digest != manifest_digest:
            raise LocalError("a certificate for a manifest that was not the last one tried out")
        manifest, self.roll, self.audited, taken, self.standing = following
        if taken:
            with self.lock:
                # A mixing that is still under way measures from the old one: its room is not for the next.
                self.theta_d, self._next_theta_d = self._next_theta_d, torch.empty_like(self.theta_d)
                self.state, self._next_state = self._next_state, self.state
            self.reference_trained, self._ref = max(0, self.trained - 1), trial.ref
        self.trained_before, self.trained = self.trained, manifest.trained
        self.round_index, self._trial, self._next = self.round_index + 1, None, None
        return trial

    # -- what a manifest says -----------------------------------------------------------------------------------------

    def _call(self, manifest: Manifest, accounts: dict[PeerId, Account]) -> Roll:
        items = manifest.payloads
        claims = [Claim(item.steps, item.tokens) for item in items]
        try:
            weights = self.weights.weigh(claims).tolist()
        except TooFewPeers:
            weights = [0.0] * len(items)
        shrink = self.mixing.late_percent / 100
        mass = [  # who did no step has nothing to say, whatever the policy gives
            late_weight(weight, accounts[item.peer_id].behind, shrink) if item.steps else 0.0
            for item, weight in zip(items, weights, strict=True)
        ]
        most = max(mass, default=0.0) or 1.0
        least = PAIR_WEIGHT_MIN if self.mode == "pairs" else 0.0
        scale = (1.0,) * len(items) if self.weights.scale is None else self.weights.scale(claims)
        return Roll(
            manifest.round_index,
            tuple(item.peer_id for item in items),
            tuple(max(part / most, least) if part else 0.0 for part in mass),
            scale,
        )

    def _audit(self, accounts: dict[PeerId, Account]) -> MassAudit:
        roll = self.roll
        if roll is not None:  # an account of another round says nothing of the mixing that was certified last
            accounts = {peer: account for peer, account in accounts.items() if account.round_index == roll.round_index}
        audited = audit_accounts(accounts)
        if roll is None or roll.round_index != audited.round_index:
            return audited
        certified = dict(zip(roll.members, roll.mass, strict=True))
        wrong = [
            Discrepancy(
                (peer,), f"began with {float(book.ledger.opened)}, certified was {certified.get(peer, 0.0)}", ()
            )
            for peer, account in sorted(accounts.items())
            for book in account.books
            if account.round_index == roll.round_index
            and book.ledger is not None
            and book.ledger.opened != Fraction(certified.get(peer, 0.0))
        ]
        return replace(audited, discrepancies=(*audited.discrepancies, *wrong))

    def _read(self, ref: BlobRef) -> bool:
        """Read a reference into the room of the next state. False if it holds numbers that are not finite."""
        source = self.open_blob(ref.digest)
        if source is None:
            raise LocalError(f"reference {ref.short} is not on disk")
        room = (self._next_theta_d, *self._next_state)
        read_stream(source, [part.numpy() for part in room])
        return all(bool(part.isfinite().all()) for part in room)

    def present_ref(self) -> BlobRef:
        """The name of the present state. Costs a digest the first time."""
        if self._ref is None:
            self._ref, _ = state_digests(self.arrays())
        return self._ref
