"""Who fetches which chunk from a blob's origin, so that the origin uploads it about once and the others relay.

Every member computes the same answer from the members' records, without a word. Where views differ for a moment,
a chunk is fetched twice or waits until it is seen to be stalled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from farflung.protocol.identity import PeerId


def relay_weights(upload_bytes_per_s: Mapping[PeerId, int]) -> dict[PeerId, float]:
    """How much each member should relay while all exchange payloads of equal size S; 0 = unknown, taken as the median.

    A round lasts T = S · max(1 / min u, n(n-1) / Σu). In that time member q can upload u_q·T, of which S is its own
    payload: it relays in proportion to u_q·T/S - 1. With equal links all weights are equal; the slowest link that
    sets T relays nothing.
    """
    known = [rate for rate in upload_bytes_per_s.values() if rate > 0]
    if not known:
        return dict.fromkeys(upload_bytes_per_s, 1.0)
    typical = median(known)
    rates = {peer: float(rate or typical) for peer, rate in upload_bytes_per_s.items()}
    n = len(rates)
    duration = max(1 / min(rates.values()), n * (n - 1) / math.fsum(rates.values()))
    weights = {peer: max(0.0, rate * duration - 1) for peer, rate in rates.items()}
    return weights if any(weights.values()) else dict.fromkeys(rates, 1.0)


def stripe_owners(members: Sequence[PeerId], weights: Mapping[PeerId, float], chunks: int, turn: int) -> list[PeerId]:
    """The owner of every chunk: smooth weighted round robin over the sorted members, starting at place `turn`.

    With equal weights that is chunk index mod n; with others, each member's share is in proportion and spread evenly.
    `members` leaves the origin out and is not empty.
    """
    ordered = sorted(members)
    ordered = ordered[turn % len(ordered) :] + ordered[: turn % len(ordered)]
    share = [weights.get(peer, 1.0) for peer in ordered]
    if not any(share):
        share = [1.0] * len(ordered)
    if len(set(share)) == 1:
        return [ordered[index % len(ordered)] for index in range(chunks)]
    total, credit, owners = math.fsum(share), [0.0] * len(ordered), list[PeerId]()
    for _ in range(chunks):
        credit = [have + more for have, more in zip(credit, share, strict=True)]
        best = max(range(len(ordered)), key=lambda place: (credit[place], -place))
        credit[best] -= total
        owners.append(ordered[best])
    return owners


def mix(index: int, salt: int) -> int:
    """A small seeded hash, the same on every machine (the finaliser of splitmix64)."""
    value = (index * 0x9E3779B97F4A7C15 + salt) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
