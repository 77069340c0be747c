"""DeMo (arXiv:2411.19870, Alg. 1): DCT-II of every tile, the largest coefficients of each, and back."""

import math

import numpy as np


def dct_matrix(n):
    """Orthonormal DCT-II: coefficients = matrix @ values."""
    matrix = np.array([[math.cos(math.pi * (2 * j + 1) * i / (2 * n)) for j in range(n)] for i in range(n)])
    matrix *= math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def transform(tile):
    """Coefficients of a tile, along both of its axes or its only one."""
    tile = np.asarray(tile, np.float64)
    coefficients = dct_matrix(tile.shape[0]) @ tile
    return coefficients @ dct_matrix(tile.shape[1]).T if tile.ndim == 2 else coefficients


def inverse(coefficients):
    """The tile of some coefficients."""
    tile = dct_matrix(coefficients.shape[0]).T @ coefficients
    return tile @ dct_matrix(coefficients.shape[1]) if tile.ndim == 2 else tile


def compress(matrix, k, side=64):
    """A matrix of whole tiles after sending k coefficients of each; and the gap between the last kept and first left.

    Two coefficients closer than rounding may be chosen either way: callers look at the gap.
    """
    matrix = np.asarray(matrix, np.float64)
    out, gap = np.zeros_like(matrix), math.inf
    for top in range(0, matrix.shape[0], side):
        for left in range(0, matrix.shape[1], side):
            window = np.s_[top : top + side, left : left + side]
            coefficients = transform(matrix[window])
            order = np.argsort(-np.abs(coefficients), axis=None, kind="stable")
            flat = coefficients.reshape(-1)
            if k < flat.size:
                gap = min(gap, abs(flat[order[k - 1]]) - abs(flat[order[k]]))
            kept = np.zeros_like(flat)
            kept[order[:k]] = flat[order[:k]]
            out[window] = inverse(kept.reshape(coefficients.shape))
    return out, gap
