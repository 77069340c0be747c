"""How a rule tells each member what became of its row."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from farflung.protocol.rows import Reason, Verdict


def judge(shares: Sequence[float], weights: Sequence[float], wild: AbstractSet[int]) -> tuple[Verdict, ...]:
    """One verdict per row: KEPT with its share; ABSTAINED for weight zero; ANOMALY for the rows in `wild`."""
    verdicts = []
    for i, (share, weight) in enumerate(zip(shares, weights, strict=True)):
        if i in wild:
            verdicts.append(Verdict(0.0, Reason.ANOMALY))
        elif weight == 0:
            verdicts.append(Verdict(0.0, Reason.ABSTAINED))
        else:
            verdicts.append(Verdict(share, Reason.KEPT))
    return tuple(verdicts)
