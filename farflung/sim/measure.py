"""From what members of a world did to results: rounds, whose fault their time was, and what a Gantt chart shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from farflung.protocol.certificate import Certificate
from farflung.protocol.identity import PeerId
from farflung.sim.life import Life, Times
from farflung.sim.population import MBIT_BYTES
from farflung.sim.results import Blame, MemberResult, RoundResult, Segment
from farflung.sim.world import World

NOTHING = Times()

TRIPS = 3
"""One-way latencies after the last payload arrived: who holds it is told, a proposal, the votes."""


@dataclass(frozen=True)
class Losses:
    """What a round's loss was: mean over members, and of the anchor if it was measured."""

    training: float | None
    validation: float | None


class Measure:
    """Reads a world that has run. `apply_s(rows)` is what a node charges for applying a round. `parcel_bytes`: where
    members mix, what their whole vectors are as payloads; the certified ones are only accounts."""

    def __init__(
        self,
        world: World,
        validation: dict[int, float],
        apply_s: Callable[[int], float],
        parcel_bytes: int | None = None,
    ) -> None:
        self._world, self._validation, self._apply_s, self._parcel_bytes = world, validation, apply_s, parcel_bytes
        self._life_of: dict[PeerId, Life] = {life.peer_id: life for life in world.lives}

    def rounds(self) -> tuple[RoundResult, ...]:
        """All rounds that trained, in order."""
        return tuple(self._round(certificate) for certificate in self._trained())

    def _trained(self) -> Iterator[Certificate]:
        for index in sorted(self._world.certificates):
            certificate = self._world.certificates[index]
            if certificate.manifest.payloads and index in self._world.applied_s:
                yield certificate

    def _round(self, certificate: Certificate) -> RoundResult:
        manifest = certificate.manifest
        parent = self._world.certificates.get(manifest.round_index - 1)
        index, start_s, end_s = manifest.round_index, self._start_s(manifest.round_index), self._end_s(certificate)
        sizes = [item.payload.size for item in manifest.payloads if item.payload is not None]
        losses = self.losses(certificate)
        return RoundResult(
            round_index=manifest.trained,
            start_s=start_s,
            end_s=end_s,
            members=len(parent.manifest.member_of) if parent is not None else len(manifest.member_of),
            payloads=len(sizes),
            payload_bytes=self._size(sizes),
            views=certificate.view,
            loss=losses.training,
            validation=losses.validation,
            blame=self._blame(certificate, start_s, end_s, index),
        )

    def _size(self, sizes: Sequence[int]) -> int:
        if self._parcel_bytes is not None:
            return self._parcel_bytes
        return self._world.channels.charged(sum(sizes) // len(sizes))

    def losses(self, certificate: Certificate) -> Losses:
        """Of one round; a member's loss that is not finite is left out."""
        index = certificate.manifest.round_index
        told = [self._times(item.peer_id, index).loss for item in certificate.manifest.payloads]
        finite = [loss for loss in told if loss is not None and math.isfinite(loss)]
        return Losses(math.fsum(finite) / len(finite) if finite else None, self._validation.get(index))

    def _times(self, peer: PeerId, index: int) -> Times:
        return self._of(self._life_of[peer], index)

    @staticmethod
    def _of(life: Life, index: int) -> Times:
        """What happened to a member in a round; nothing, if it was not there."""
        return life.history.get(index, NOTHING)

    def _end_s(self, certificate: Certificate) -> float:
        """When the median member applied it."""
        applied = sorted(self._world.applied_s[certificate.manifest.round_index])
        return applied[len(applied) // 2]

    def _start_s(self, index: int) -> float:
        before = [known for known in self._world.certificates if known < index and known in self._world.applied_s]
        return self._end_s(self._world.certificates[max(before)]) if before else 0.0

    # -- blame --------------------------------------------------------------------------------------------------------

    def _blame(self, certificate: Certificate, start_s: float, end_s: float, index: int) -> tuple[Blame, ...]:
        """Walk along the median member's round; every second between two of its marks has one cause."""
        counted = [item.peer_id for item in certificate.manifest.payloads]
        times = {peer: self._times(peer, index) for peer in counted}
        trained = {peer: time.trained_s for peer, time in times.items() if time.trained_s is not None}
        spoke = {peer: time.spoke_s for peer, time in times.items() if time.spoke_s is not None}
        if not trained or not spoke:
            return (Blame("protocol", -1, end_s - start_s),)
        slowest = max(sorted(trained), key=lambda peer: trained[peer])
        speaker = max(sorted(spoke), key=lambda peer: spoke[peer])
        reader, arrived = self._reader(certificate)
        last = max(sorted(arrived), key=lambda peer: arrived[peer]) if arrived else speaker
        mixes = self._parcel_bytes is not None
        # Where members mix the certificate lists accounts: small enough that only the way there takes time.
        line, owner = ("latency", -1) if mixes else self._bottleneck(last, reader, len(counted), index)
        adopted = [time.adopted_s for time in times.values() if time.adopted_s is not None]
        mixed_s = median(adopted) if adopted and mixes else start_s
        marks: list[tuple[float, str, int]] = [
            (mixed_s, "mixing", -1),
            (median(trained.values()), "compute", -1),
            (trained[slowest], "straggler", self._life_of[slowest].index),
            (spoke[speaker], "codec", self._life_of[speaker].index),
            (arrived.get(last, spoke[speaker]), line, owner),
        ]
        blame, at_s = [], start_s
        for when_s, cause, member in marks:
            until_s = min(max(when_s, at_s), end_s)
            if until_s > at_s:
                blame.append(Blame(cause, member, until_s - at_s))
            at_s = until_s
        return (*blame, *self._tail(certificate, end_s - at_s))

    def _reader(self, certificate: Certificate) -> tuple[Life, dict[PeerId, float]]:
        """The member that completed the majority who hold every payload, and when each reached it."""
        index = certificate.manifest.round_index
        counted = [item.peer_id for item in certificate.manifest.payloads]
        held = [
            (
                life,
                {
                    peer: self._of(life, index).arrived_s[peer]
                    for peer in counted
                    if peer in self._of(life, index).arrived_s
                },
            )
            for life in self._world.lives
            if self._of(life, index).applied_s is not None
        ]
        held.sort(key=lambda one: (max(one[1].values(), default=0.0), one[0].index))
        return held[len(held) // 2]

    def _bottleneck(self, last: PeerId, reader: Life, payloads: int, index: int) -> tuple[str, int]:
        """The line that the last payload waited for: its maker's, the reader's, or all uploads together."""
        maker, lives = self._life_of[last], [life for life in self._world.lives if self._of(life, index).applied_s]
        together = math.fsum(life.spec.up_bytes_per_s for life in lives)
        down_s = (payloads - 1) / reader.spec.down_bytes_per_s
        swarm_s = payloads * (payloads - 1) / together
        own_s = 1 / maker.spec.up_bytes_per_s
        if down_s >= max(swarm_s, own_s):
            return "download", reader.index
        return ("upload", maker.index) if own_s >= swarm_s else ("upload", -1)

    def _tail(self, certificate: Certificate, left_s: float) -> Iterator[Blame]:
        """After the last payload: applying it, messages there and back, and perhaps waiting for who never spoke."""
        manifest, topology = certificate.manifest, self._world.fabric.topology
        spoken = {item.peer_id for item in manifest.announcements}
        parent = self._world.certificates.get(manifest.round_index - 1)
        absent = [peer for peer in sorted(parent.manifest.member_of) if peer not in spoken] if parent else []
        voters = [self._life_of[peer].index for peer in sorted(manifest.member_of) if peer in self._life_of]
        far_s = max((topology.one_way_latency_s(voters[0], other) for other in voters[1:]), default=0.0)
        for cause, member, seconds in (
            ("codec", -1, self._apply_s(len(manifest.payloads))),
            ("latency", -1, TRIPS * far_s),
        ):
            taken_s = min(seconds, left_s)
            left_s -= taken_s
            if taken_s > 0:
                yield Blame(cause, member, taken_s)
        if left_s > 0 and absent:
            yield Blame("deadline", self._life_of[absent[0]].index, left_s)
        elif left_s > 0:
            yield Blame("protocol", -1, left_s)

    # -- members and charts -------------------------------------------------------------------------------------------

    def members(self) -> tuple[MemberResult, ...]:
        """Everybody over the whole run."""
        return tuple(self._member(life) for life in self._world.lives)

    def _member(self, life: Life) -> MemberResult:
        spec, counted = life.spec, [times for times in life.history.values() if times.counted]
        wire_sent, wire_received = self._world.fabric.wire_bytes(life.index)
        return MemberResult(
            name=spec.name,
            up_mbit=spec.up_bytes_per_s / MBIT_BYTES,
            down_mbit=spec.down_bytes_per_s / MBIT_BYTES,
            step_s=life.train_s / life.steps if life.steps else spec.step_s,
            online_s=life.online_s,
            train_s=math.fsum(times.train_s for times in counted),
            steps=life.steps,
            tokens=life.tokens,
            bytes_sent=life.traffic()[0],
            bytes_received=life.traffic()[1],
            wire_sent=wire_sent,
            wire_received=wire_received,
            rounds_counted=len(counted),
            attacker=spec.attack.kind if spec.attack is not None else "",
        )

    def segments(self, rounds: Sequence[RoundResult]) -> tuple[Segment, ...]:
        """Two rounds for a Gantt chart: one of median length and the slowest."""
        if not rounds:
            return ()
        ordered = sorted(rounds, key=lambda item: (item.end_s - item.start_s, item.round_index))
        shown = {item.round_index: item for item in (ordered[len(ordered) // 2], ordered[-1])}
        by_trained = {certificate.manifest.trained: certificate for certificate in self._trained()}
        return tuple(segment for index in sorted(shown) for segment in self._chart(by_trained[index], shown[index]))

    def _chart(self, certificate: Certificate, result: RoundResult) -> Iterator[Segment]:
        index = certificate.manifest.round_index
        for life in self._world.lives:
            times = self._of(life, index)
            arrived_s = max(times.arrived_s.values(), default=None)
            marks = [
                (times.adopted_s, "wait" if self._parcel_bytes is None else "exchange"),
                (times.trained_s, "train"),
                (times.spoke_s, "encode"),
                (arrived_s, "exchange"),
                (times.applied_s, "aggregate"),
            ]
            if times.adopted_s is None and times.applied_s is None:
                yield Segment(life.index, result.round_index, "offline", result.start_s, result.end_s)
                continue
            at_s = result.start_s
            for when_s, kind in marks:
                if when_s is not None and when_s > at_s:
                    yield Segment(life.index, result.round_index, kind, at_s, when_s)
                    at_s = when_s
            if at_s < result.end_s:
                yield Segment(life.index, result.round_index, "wait", at_s, result.end_s)
