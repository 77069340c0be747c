"""The rules a run can name in its genesis."""

from __future__ import annotations

from typing import NamedTuple

from farflung.aggregation.mean import weighted_mean
from farflung.aggregation.median import coordinate_median
from farflung.aggregation.rule import Rule
from farflung.aggregation.spec import parse_call, parse_integer
from farflung.protocol.limits import MEMBERS_MAX


class ParsedRule(NamedTuple):
    """A rule and how many arbitrary rows it is asked to survive."""

    spec: str
    """Canonical text: "mean" or "median(f=1)"."""

    rule: Rule
    f: int
    """Passed to the rule every round. Zero: members trust each other."""

    @property
    def rows_min(self) -> int:
        """With fewer rows of weight > 0 the rule raises TooFewPeers."""
        return 2 * self.f + 1


def parse_rule(spec: str) -> ParsedRule:
    """The rule that `spec` names. Raises ConfigError with the position and what is allowed."""
    call = parse_call(spec, {"mean": (), "median": ("f",)})
    if call.name == "mean":
        return ParsedRule("mean", weighted_mean, 0)
    f = parse_integer(call, "f", 0, (MEMBERS_MAX - 1) // 2)
    return ParsedRule(f"median(f={f})", coordinate_median, f)
