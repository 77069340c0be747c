"""E3M0, Streaming DiLoCo's 4-bit float (arXiv:2501.18512, §3): a sign, three bits of exponent, no mantissa."""

import numpy as np

LEVELS = np.array([0, 1 / 4, 1 / 2, 1, 2, 4, 8, 16])
"""oneDNN's f4_e3m0."""


def quantise(values):
    """Every value as the nearest level times the scale that maps the largest magnitude to 16; halfway goes up."""
    values = np.asarray(values, np.float64)
    top = np.abs(values).max(initial=0.0)
    if top == 0:
        return np.zeros_like(values)
    scaled = np.abs(values) / top * LEVELS[-1]
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2
    level = (scaled[:, None] >= middle[None, :]).sum(1)
    return np.sign(values) * LEVELS[level] * top / LEVELS[-1]
