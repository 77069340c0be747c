"""Named random streams: who draws what never depends on who drew before, on the process or on the Python version."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from farflung.node.data import generator_of


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """The stream of this name in the world of this seed, at its beginning. Equal arguments give equal streams.

    Raises ValueError for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"a seed is a number from 0 on, got {seed}")
    return generator_of("simulator", seed, *names)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """In this block the process's own generators (torch, numpy, random) belong to this seed, and torch has one thread.

    Users' tasks may draw from them, and sums may depend on threads. Afterwards everything is as it was.
    """
    generator = stream(seed, "ambient")
    before = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator.integers(1 << 62)))
        np.random.seed(int(generator.integers(1 << 32)))
        random.seed(int(generator.integers(1 << 62)))
        torch.set_num_threads(1)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_num_threads(before[2])
