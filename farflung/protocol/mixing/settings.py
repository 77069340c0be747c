"""What a run in push-sum or pairs mode agrees on besides the mode: part of its genesis."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from farflung.protocol.errors import ConfigError

FRAGMENTS_MAX = 8
"""Of one vector: each has its own masses, ledger and messages."""

TICKS_MAX = 64
"""Of one round: a period of any offered graph among 256 members is shorter."""


@dataclass(frozen=True)
class Mixing:
    """Numbers are whole, so that genesis is canonical. Raises ConfigError, with the key, for what cannot work."""

    graph: str = "base(k=1)"
    """Who gives to whom (`aggregation.graphs`). Pairs need one whose ticks are matchings."""

    ticks: int = 0
    """Exchanges per round; 0: a whole period of the graph, which makes the result the exact mean if the graph is exact.
    With fewer, members differ and only drift together."""

    fragments: int = 1
    """Into how many parts the parameters are cut. Each is mixed by itself: when time is short, a slow line has brought
    some of them."""

    reference_rounds: int = 20
    """After so many trained rounds a member publishes what offsets are measured from; joiners start there."""

    gamma_percent: int = 100
    """Of a share that flows per message, with codecs that round: less for 2 bits (50) or sparse ones (10)."""

    late_percent: int = 100
    """How fast weights shrink of members that missed rounds: m / (1 + late_percent / 100 x rounds missed)."""

    radius_percent: int = 100
    """Pairs: how far a member lets itself be moved, as a share of its usual distance to partners."""

    tick_ms: int = 120_000
    """A tick is waited for at most so long; less, once members know how long ticks take. More for large vectors on slow
    lines: this must be enough for one to arrive."""

    settle_ms: int = 5_000
    """How long after the last tick members wait for word of what is still under way."""

    silence_ms: int = 10_000
    """A partner that was not heard for so long is not waited for."""

    def __post_init__(self) -> None:
        bounds = {
            "ticks": (0, TICKS_MAX),
            "fragments": (1, FRAGMENTS_MAX),
            "reference_rounds": (1, 1_000_000),
            "gamma_percent": (1, 100),
            "late_percent": (0, 10_000),
            "radius_percent": (1, 100_000),
            "tick_ms": (1, 86_400_000),
            "settle_ms": (1, 86_400_000),
            "silence_ms": (1, 86_400_000),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"mixing: {name} must be {low} to {high}, got {getattr(self, name)}")
        if not 0 < len(self.graph) <= 200:
            raise ConfigError(f"mixing: graph names one, got {self.graph!r}")

    def to_json(self) -> dict[str, Any]:
        """Plain values for canonical bytes."""
        return {item.name: getattr(self, item.name) for item in fields(self)}
