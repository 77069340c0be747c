"""Numbers that scenarios draw: `up_mbit = 100`, or `up_mbit = { loguniform = [50, 500] }`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farflung.protocol.errors import ConfigError

KINDS = {
    "fixed": 1,
    "uniform": 2,
    "loguniform": 2,
    "normal": 2,
    "lognormal": 2,
    "exponential": 1,
    "weibull": 2,
    "choice": 0,
}
"""How many numbers each kind takes; 0: one or more."""


@dataclass(frozen=True)
class Draw:
    """A distribution of non-negative numbers: what is drawn below zero becomes zero.

    fixed [value], uniform [low, high], loguniform [low, high], normal [mean, deviation], lognormal [median, sigma of
    the logarithm], exponential [mean], weibull [shape, scale], choice [one, of, these]. Raises ConfigError.
    """

    kind: str
    numbers: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"numbers are drawn by one of {', '.join(KINDS)}, got {self.kind!r}")
        wanted = KINDS[self.kind]
        if not self.numbers or (wanted and len(self.numbers) != wanted):
            raise ConfigError(f"{self.kind} takes {wanted or 'one or more'} numbers, got {list(self.numbers)}")
        if any(not math.isfinite(number) or number < 0 for number in self.numbers):
            raise ConfigError(f"{self.kind} takes finite numbers from 0 on, got {list(self.numbers)}")
        ordered = self.kind in ("uniform", "loguniform")
        if ordered and self.numbers[0] > self.numbers[1]:
            raise ConfigError(f"{self.kind} takes [low, high], got {list(self.numbers)}")
        positive = self.kind in ("loguniform", "lognormal", "weibull")
        if positive and self.numbers[0] <= 0:
            raise ConfigError(f"{self.kind} needs a first number above 0, got {list(self.numbers)}")

    @staticmethod
    def fixed(value: float) -> Draw:
        """Always this."""
        return Draw("fixed", (float(value),))

    def sample(self, generator: np.random.Generator) -> float:
        """One number from the stream. A fixed one takes nothing from it."""
        first, last = self.numbers[0], self.numbers[-1]
        match self.kind:
            case "uniform":
                return float(generator.uniform(first, last))
            case "loguniform":
                return math.exp(generator.uniform(math.log(first), math.log(last)))
            case "normal":
                return max(0.0, float(generator.normal(first, last)))
            case "lognormal":
                return first * math.exp(last * float(generator.standard_normal()))
            case "exponential":
                return first * float(generator.standard_exponential())
            case "weibull":
                return last * float(generator.weibull(first))
            case "choice":
                return self.numbers[int(generator.integers(len(self.numbers)))]
        return first

    def sample_many(self, generator: np.random.Generator, count: int) -> NDArray[np.float64]:
        """`count` numbers from the stream, the same as one by one."""
        first, last = self.numbers[0], self.numbers[-1]
        match self.kind:
            case "uniform":
                return generator.uniform(first, last, count)
            case "normal":
                return np.maximum(0.0, generator.normal(first, last, count))
            case "exponential":
                return first * generator.standard_exponential(count)
            case "weibull":
                return last * generator.weibull(first, count)
            case "fixed":
                return np.full(count, first)
        return np.array([self.sample(generator) for _ in range(count)], dtype=np.float64)

    @property
    def is_fixed(self) -> bool:
        """Always the same: no stream needed."""
        return self.kind == "fixed"

    def __str__(self) -> str:
        if self.kind == "fixed":
            return f"{self.numbers[0]:g}"
        return f"{self.kind}({', '.join(f'{number:g}' for number in self.numbers)})"
