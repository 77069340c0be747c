"""QSGD (arXiv:1610.02132, §3.1): levels of the bucket's norm, rounded at random without bias."""

import numpy as np


def neighbours(values, levels):
    """For each value the two numbers it may be rounded to, and the probability of the one farther from zero."""
    values = np.asarray(values, np.float64)
    norm = np.linalg.norm(values)
    if norm == 0:
        return np.zeros_like(values), np.zeros_like(values), np.zeros_like(values)
    scaled = np.abs(values) / norm * levels
    low = np.floor(scaled)
    sign = np.sign(values)
    return sign * norm * low / levels, sign * norm * (low + 1) / levels, scaled - low


def variance_bound(values, levels):
    """Lemma 3.1: E||Q(v) - v||^2 <= min(d / s^2, sqrt(d) / s) ||v||^2."""
    d = len(values)
    return min(d / levels**2, np.sqrt(d) / levels) * float(np.linalg.norm(values)) ** 2
