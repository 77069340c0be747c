"""The anchor and the outer state: what a manifest does to them, on trial first, for good with a certificate.

Four vectors of length d for Nesterov, two for sgd, all fp32 on the CPU: θ and what the outer optimiser keeps, and the
room where the next ones are computed before anybody has agreed on them. The update is written straight into the room of
the next θ. A codec's shared state and what the rule keeps move with them; where there is none it costs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farflung.aggregation.landing import Landing
from farflung.aggregation.outer import OuterOptimizer, State, parse_outer
from farflung.aggregation.registry import ParsedRule, parse_rule
from farflung.aggregation.rule import Context, Evidence
from farflung.aggregation.weights import Claim, WeightPolicy
from farflung.compression import parse_codec
from farflung.compression.codec import Codec, Shared
from farflung.node.shared_state import shapes_of, shared_from, shared_vector
from farflung.protocol import limits
from farflung.protocol.blob import BlobRef, ChunkHasher, blob_digest, choose_chunk_bytes, chunk_digest
from farflung.protocol.certificate import Certificate
from farflung.protocol.errors import LocalError, PeerError, TooFewPeers
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import PeerId
from farflung.protocol.manifest import Manifest
from farflung.protocol.rows import DenseRow, SparseRow, Verdict
from farflung.protocol.schema import Schema

F32 = NDArray[np.float32]
_RULE, _SHARED = "rule", "shared"


def first_buffers(outer: OuterOptimizer, codec: Codec, rule: ParsedRule, schema: Schema) -> dict[str, Tensor]:
    """What the state holds besides θ before the first round: zeros for what the outer optimiser and the rule keep, and
    the codec's first shared state."""
    buffers = {name: torch.zeros(schema.numel) for name in outer.state_names}
    if size := rule.state_size(schema.numel):
        buffers[_RULE] = torch.zeros(size)
    shared = codec.init(schema)[1]
    vector = shared_vector(codec, shared, shapes_of(codec, shared))
    return buffers if vector is None else buffers | {_SHARED: vector}


def genesis_buffers(genesis: Genesis) -> dict[str, Tensor]:
    """`first_buffers` of a run."""
    return first_buffers(
        parse_outer(genesis.outer), parse_codec(genesis.codec), parse_rule(genesis.rule), genesis.schema
    )


def state_ref(size: int) -> Callable[[Sequence[bytes]], BlobRef]:
    """How a state of `size` bytes is named as a blob, given its chunk digests."""
    chunk = choose_chunk_bytes(size)
    return lambda digests: BlobRef(blob_digest(size, chunk, digests), size, chunk)


def state_digests(buffers: Sequence[F32], *, pool: ThreadPoolExecutor | None = None) -> tuple[BlobRef, list[bytes]]:
    """The state stream (the buffers' bytes, one after the other) as a blob. Costs one BLAKE3 pass."""
    size = sum(buffer.nbytes for buffer in buffers)
    chunk = choose_chunk_bytes(size)
    views = [buffer.view(np.uint8).data for buffer in buffers]

    def digest(start: int) -> bytes:
        hasher, offset = ChunkHasher(chunk), 0
        for view in views:
            first, last = max(start - offset, 0), min(start + chunk - offset, len(view))
            if first < last:
                if last - first == chunk:
                    return chunk_digest(view[first:last])
                hasher.feed(view[first:last])
            offset += len(view)
        return hasher.end()[0]

    starts = range(0, size, chunk)
    digests = list(pool.map(digest, starts) if pool else map(digest, starts))
    return state_ref(size)(digests), digests


class PayloadRows:
    """A round's payloads as rows that decode when they are read (`protocol.rows.Rows`). Reads from any thread."""

    def __init__(
        self, codec: Codec, schema: Schema, shared: Shared, round_index: int, payloads: Sequence[bytes]
    ) -> None:
        self._schema = schema
        self._readers = [codec.open(payload, schema, shared, round_index) for payload in payloads]

    @property
    def n(self) -> int:
        """Number of payloads."""
        return len(self._readers)

    @property
    def d(self) -> int:
        """Parameters."""
        return self._schema.numel

    def window(self, start: int, stop: int) -> tuple[DenseRow[Tensor] | SparseRow[Tensor], ...]:
        """Every payload's window."""
        return tuple(read(start, stop) for read in self._readers)


class Trial(NamedTuple):
    """What a manifest would do: the state it leads to, each payload's verdict, and numbers for the round log."""

    manifest_digest: bytes
    ref: BlobRef
    verdicts: dict[PeerId, Verdict]
    numbers: dict[str, float]
    evidence: Evidence | None = None


@dataclass
class Anchor:
    """The agreed state after `round_index`, and the room for the next one. Not thread-safe except where said."""

    schema: Schema
    codec: Codec
    rule: ParsedRule
    outer: OuterOptimizer
    weights: WeightPolicy
    theta_d: Tensor
    shared: Shared
    round_index: int = 0
    threads: int = 1
    founder: PeerId | None = None
    """Whose row is the certified root, for rules that need one."""

    def __post_init__(self) -> None:
        d = self.schema.numel
        if self.theta_d.dtype != torch.float32 or self.theta_d.shape != (d,):
            raise LocalError(f"an anchor of {self.theta_d.dtype} {tuple(self.theta_d.shape)} for {d} parameters")
        self.state: State = tuple(torch.zeros(d) for _ in self.outer.state_names)
        self._next_theta_d = torch.empty(d)
        self._next_state: State = tuple(torch.empty(d) for _ in self.outer.state_names)
        size = self.rule.state_size(d)
        self._rule_s: Tensor | None = torch.zeros(size) if size else None
        self._next_rule_s: Tensor | None = torch.zeros(size) if size else None
        self._shapes = shapes_of(self.codec, self.shared)
        self._shared_d = shared_vector(self.codec, self.shared, self._shapes)
        self._next_shared, self._next_shared_d = self.shared, self._shared_d
        self._trial: Trial | None = None
        self.lock = threading.Lock()
        """Held while θ is read from another thread or exchanged for the next one."""

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The state besides θ, in the order of the state stream: the outer optimiser's, the rule's, the codec's."""
        found: dict[str, Tensor | None] = dict(zip(self.outer.state_names, self.state, strict=True))
        found |= {_RULE: self._rule_s, _SHARED: self._shared_d}
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    @property
    def offers_blobs(self) -> bool:
        """Whether payloads of this run offer further blobs at all."""
        return False

    @property
    def payload_bytes_max(self) -> int:
        """More bytes than this no payload of the run may have; it is compared before anything is allocated."""
        return int(self.codec.bits(self.schema) * self.schema.numel / 8) + limits.PAYLOAD_OVERHEAD_BYTES

    def check(self, payload: bytes, round_index: int, peer: PeerId) -> None:
        """Raise PeerError unless a member's payload would decode. Any thread; costs one pass over the payload."""
        self.codec.check(payload, self.schema, self.shared, round_index)

    def locate(self, certificate: Callable[[int], Certificate]) -> None:
        """The state in here was loaded: find out from the chain what else belongs to it. Nothing, in gather mode."""

    def offered(self, payload: bytes) -> BlobRef | None:
        """A further blob that a checked payload offers: some later manifest may take it. None, in gather mode."""
        return None

    def taken(self, manifest: Manifest, payloads: Sequence[bytes]) -> BlobRef | None:
        """A further blob that applying this manifest takes; it must be on disk before. None, in gather mode."""
        return None

    def arrays(self) -> list[F32]:
        """The state stream's parts. Whoever writes to them calls `loaded` next."""
        return [self.theta_d.numpy(), *(buffer.numpy() for buffer in self.buffers.values())]

    def load(self, round_index: int, theta: F32, buffers: dict[str, F32]) -> None:
        """Replace the state, for instance by a snapshot. Raises PeerError if it does not fit."""
        mine = self.buffers
        fits = buffers.keys() == mine.keys() and all(buffers[name].shape == mine[name].shape for name in mine)
        if theta.shape != (self.schema.numel,) or not fits:
            raise PeerError("?", f"a state of {theta.shape} parameters and {sorted(buffers)}")
        with self.lock:
            self.theta_d.numpy()[:] = theta
            for name, buffer in mine.items():
                buffer.numpy()[:] = buffers[name]
        self.loaded(round_index)

    def loaded(self, round_index: int) -> None:
        """The state in `arrays` is now the one after this round."""
        if self._shared_d is not None:
            self.shared = shared_from(self.codec, self.schema, self._shared_d, self._shapes)
        self.round_index, self._trial = round_index, None

    def try_out(self, manifest: Manifest, payloads: Sequence[bytes], pool: ThreadPoolExecutor | None = None) -> Trial:
        """Compute the state after `manifest` beside the present one.

        `payloads` belong to `manifest.payloads`, in that order, and have been checked. Costs one pass over payloads
        and state and one digest. A manifest without payloads, or with too few for the rule, leaves the state as it is.
        """
        if manifest.round_index != self.round_index + 1:
            raise LocalError(f"manifest {manifest.round_index} on the state of round {self.round_index}")
        verdicts, numbers, evidence = self._step(manifest, payloads)
        parts = (self._next_theta_d, *self._next_state, self._next_rule_s, self._next_shared_d)
        ref, _ = state_digests([part.numpy() for part in parts if part is not None], pool=pool)
        self._trial = Trial(manifest.digest, ref, verdicts, numbers, evidence)
        return self._trial

    def commit(self, manifest_digest: bytes) -> Trial:
        """Make the trial of this manifest the present state. Costs nothing."""
        trial = self._trial
        if trial is None or trial.manifest_digest != manifest_digest:
            raise LocalError("a certificate for a manifest that was not the last one tried out")
        with self.lock:
            self.theta_d, self._next_theta_d = self._next_theta_d, self.theta_d
            self.state, self._next_state = self._next_state, self.state
            self._rule_s, self._next_rule_s = self._next_rule_s, self._rule_s
            self.shared, self._shared_d = self._next_shared, self._next_shared_d
            self.round_index, self._trial = self.round_index + 1, None
        return trial

    def _step(
        self, manifest: Manifest, payloads: Sequence[bytes]
    ) -> tuple[dict[PeerId, Verdict], dict[str, float], Evidence | None]:
        items = manifest.payloads
        rows = PayloadRows(self.codec, self.schema, self.shared, manifest.round_index, payloads)
        update_d = self._update_room()
        landing = Landing(
            self.outer,
            self.theta_d,
            self.state,
            update_d,
            theta_out_d=self._next_theta_d,
            state_out=self._next_state,
            trained=manifest.trained,
        )
        claims = [Claim(item.steps, item.tokens) for item in items]
        context = self._context(manifest, update_d, landing, claims)
        try:
            aggregate = self.rule.rule(rows, self.weights.weigh(claims), f=self.rule.f, context=context)
        except TooFewPeers:
            self._stand_still()
            if self._next_rule_s is not None and self._rule_s is not None:
                self._next_rule_s.copy_(self._rule_s)
            return {}, {"too_few_payloads": 1.0}, None
        verdicts = dict(zip((item.peer_id for item in items), aggregate.verdicts, strict=True))
        if aggregate.stand_still:
            self._stand_still()
            return verdicts, aggregate.certificate | {"stood_still": 1.0}, aggregate.evidence
        self._advance(aggregate.update_d, manifest.round_index)
        return verdicts, aggregate.certificate | landing.end(self.threads), aggregate.evidence

    def _update_room(self) -> Tensor:
        """Where the update is written: where the rule keeps it for the next round, or else where θ' will be."""
        if self.rule.keeps_previous and self._next_rule_s is not None:
            return self._next_rule_s[: self.schema.numel]
        return self._next_theta_d

    def _context(self, manifest: Manifest, update_d: Tensor, landing: Landing, claims: Sequence[Claim]) -> Context:
        members = [item.peer_id for item in manifest.payloads]
        # A shared state is advanced by the whole update, which the outer step writes over.
        finish = None if self._shapes else landing
        return Context(
            manifest.round_index,
            out_d=update_d,
            threads=self.threads,
            run_id=manifest.run_id,
            root=members.index(self.founder) if self.founder in members else None,
            scale_n=None if self.weights.scale is None else self.weights.scale(claims),
            state_s=self._rule_s,
            next_state_s=self._next_rule_s,
            audit=self.rule.f > 0,
            finish=finish,
            entries=None if finish is None else landing.entries,
        )

    def _advance(self, update_d: Tensor, round_index: int) -> None:
        """Move the shared codec state on trial, while the update is still whole: the outer step writes over it."""
        if self._shapes:
            self._next_shared = self.codec.advance(self.shared, update_d, round_index)
            self._next_shared_d = shared_vector(self.codec, self._next_shared, self._shapes)

    def _stand_still(self) -> None:
        self._next_shared, self._next_shared_d = self.shared, self._shared_d
        self._next_theta_d.copy_(self.theta_d)
        for next_d, part_d in zip(self._next_state, self.state, strict=True):
            next_d.copy_(part_d)


def model_sized(anchor: Anchor, others: Iterable[Tensor]) -> int:
    """How many vectors of length d this member keeps: the documented list of docs/memory.md."""
    vectors = [anchor.theta_d, anchor._next_theta_d, *anchor.state, *anchor._next_state, *others]
    if anchor.rule.keeps_previous:
        vectors += [room for room in (anchor._rule_s, anchor._next_rule_s) if room is not None]
    return len({vector.data_ptr() for vector in vectors})
