"""Named random streams: who draws what never depends on who drew before, on the process or on the Python version."""

from __future__ import annotations

import numpy as np

from farflung.node.data import generator_of


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """The stream of this name in the world of this seed, at its beginning. Equal arguments give equal streams.

    Raises ValueError for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"a seed is a number from 0 on, got {seed}")
    return generator_of("simulator", seed, *names)
