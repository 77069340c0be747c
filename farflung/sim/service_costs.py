"""What a round costs besides training and the network: encoding, checking, combining, the outer step, hashing.

Measured, not guessed: `benchmarks/service_costs.py` prints the table again on any machine. Costs are of one core and
add up from parts, so a codec or rule that has no measured part is refused, never free.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from farflung.protocol.errors import ConfigError

NANOSECONDS: dict[str, float] = {
    "fp32.encode": 2.9,
    "fp32.decode": 0.50,
    "fp32.check": 0.31,
    "bf16.encode": 2.7,
    "bf16.decode": 0.55,
    "bf16.check": 0.18,
    "int8.encode": 1.2,
    "int8.decode": 0.61,
    "int8.check": 0.41,
    "q2.encode": 3.0,
    "q2.decode": 0.64,
    "q2.check": 0.38,
    "topk.scan": 3.4,
    "topk.chunk": 1850.0,
    "topk.write": 25.5,
    "topk.visit": 1.3,
    "topk.read": 7.5,
    "topk.look": 1.1,
    "topk.check": 5.0,
    "topk.code": 0.75,
    "topk.uncode": 0.25,
    "ef": 2.1,
    "mean.row": 0.44,
    "mean.kept": 4.4,
    "mean.divide": 0.95,
    "median.row": 1.1,
    "median.compare": 0.21,
    "sgd": 1.1,
    "nesterov": 1.85,
    "norm": 0.24,
    "gain": 0.73,
    "hash": 0.155,
}
"""Nanoseconds on one core of an Intel Xeon (Sapphire Rapids class, 2 virtual cores), vectors of 4 to 17 million.

Per coordinate; per *kept* coordinate for topk.write, topk.read, topk.check and mean.kept; per chunk for topk.chunk; per
row and coordinate for mean.row and median.row; per comparator of the sorting network and coordinate for median.compare;
per byte for hash. topk.code and topk.uncode are what int8 and q2 values add. 4 / ns is GB/s of fp32: int8 encodes at
3.3 GB/s, q2 at 1.3, topk(64/4096) at 1.0. Much of an encoder's time is the kernel handing out memory for the payload.
"""

THREADS = 4
"""Cores that a simulated member's node has beside training: four of a usual machine's eight."""

DENSE = ("fp32", "bf16", "int8", "q2")
CODED = ("int8", "q2")
OUTER = ("sgd", "nesterov")


class _Parts(NamedTuple):
    """A codec's spec as costs see it: `kept` is the share of coordinates sent."""

    feedback: bool
    value: str
    kept: float
    chunk: int
    """0: dense."""


@dataclass(frozen=True)
class ServiceCosts:
    """Seconds that a member with `threads` cores of `speed` times the measured one needs for `d` parameters.

    What the node does on one thread (encode, check, hash of a payload) does not profit from `threads`; aggregation, the
    outer step and the state's digest do. Raises ConfigError for specs that are not known here.
    """

    codec: str
    rule: str = "mean"
    outer: str = "nesterov"
    threads: int = 1
    speed: float = 1.0

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"at least one thread must do the work, got {self.threads}")
        if not self.speed > 0:
            raise ConfigError(f"speed is relative to the measured core and above 0, got {self.speed}")
        if self._outer not in OUTER:
            raise ConfigError(f"the cost of an outer step is known for {', '.join(OUTER)}, got {self.outer!r}")
        if self._rule not in ("mean", "median"):
            raise ConfigError(f"the cost of a rule is known for mean and median, got {self.rule!r}")
        _ = self._parts

    @cached_property
    def _parts(self) -> _Parts:
        return _parts_of(self.codec)

    @property
    def _rule(self) -> str:
        return self.rule.partition("(")[0].strip()

    @property
    def _outer(self) -> str:
        return self.outer.partition("(")[0].strip()

    def encode_s(self, d: float) -> float:
        """From the pseudo-gradient to the payload, error feedback (which decodes the own payload) included."""
        parts, ns = self._parts, NANOSECONDS
        if parts.chunk:
            each = ns["topk.scan"] + ns["topk.chunk"] / parts.chunk + ns["topk.write"] * parts.kept
            each += ns["topk.code"] if parts.value in CODED else 0.0
        else:
            each = ns[f"{parts.value}.encode"]
        each += ns["ef"] if parts.feedback else 0.0
        return self._seconds(d * each) + (self.decode_s(d) if parts.feedback else 0.0)

    def decode_s(self, d: float) -> float:
        """One payload to a row."""
        return self._read_s(d, "decode", "topk.visit", "topk.read")

    def check_s(self, d: float) -> float:
        """Whether one payload is canonical: done once for every payload that arrives."""
        return self._read_s(d, "check", "topk.look", "topk.check")

    def aggregate_s(self, d: float, n: int) -> float:
        """n payloads to one update: decode them window by window and apply the rule."""
        if n < 1:
            return 0.0
        if self._rule == "median":
            ns = _median_ns(n)
        elif self._parts.chunk:
            ns = n * self._parts.kept * NANOSECONDS["mean.kept"] + NANOSECONDS["mean.divide"]
        else:
            ns = n * NANOSECONDS["mean.row"] + NANOSECONDS["mean.divide"]
        return (n * self.decode_s(d) + self._seconds(d * ns)) / self.threads

    def outer_step_s(self, d: float) -> float:
        """The step on the anchor, and the norms that the round log wants."""
        ns = NANOSECONDS[self._outer] + NANOSECONDS["norm"] + (NANOSECONDS["gain"] if self._outer == "nesterov" else 0)
        return self._seconds(d * ns) / self.threads

    def hash_s(self, size_bytes: float) -> float:
        """BLAKE3 of some bytes on one thread."""
        return self._seconds(size_bytes * NANOSECONDS["hash"])

    def apply_s(self, d: float, n: int) -> float:
        """Everything from a manifest of n payloads to a vote: aggregate, outer step, digest of the new state."""
        vectors = 2 if self._outer == "nesterov" else 1
        return self.aggregate_s(d, n) + self.outer_step_s(d) + self.hash_s(4 * vectors * d) / self.threads

    def _read_s(self, d: float, dense: str, each: str, kept: str) -> float:
        parts, ns = self._parts, NANOSECONDS
        if not parts.chunk:
            return self._seconds(d * ns[f"{parts.value}.{dense}"])
        coded = ns["topk.uncode"] if parts.value in CODED else 0.0
        return self._seconds(d * (ns[each] + coded + ns[kept] * parts.kept))

    def _seconds(self, ns: float) -> float:
        return ns * 1e-9 / self.speed


@cache
def _median_ns(n: int) -> float:
    from farflung.aggregation.network import median_network

    return n * NANOSECONDS["median.row"] + len(median_network(n)) * NANOSECONDS["median.compare"]


def _parts_of(spec: str) -> _Parts:
    """Take a codec's text apart. Raises ConfigError naming the stage whose cost nobody measured."""
    stages = [stage.strip() for stage in spec.split("|")]
    feedback = stages[0].startswith("ef(")
    rest = stages[1:] if feedback else stages
    kept, chunk = 1.0, 0
    if rest and (match := re.fullmatch(r"topk\(\s*(\d+)\s*/\s*(\d+)\s*\)", rest[0])):
        kept, chunk, rest = int(match[1]) / int(match[2]), int(match[2]), rest[1:]
    value = rest[0].partition("(")[0].strip() if len(rest) == 1 else ""
    if value not in DENSE:
        raise ConfigError(
            f"codec costs are known for ef(), topk() and {', '.join(DENSE)}: measure the others with "
            f"benchmarks/service_costs.py and add them to its table, got {spec!r}"
        )
    return _Parts(feedback, value, kept, chunk)
