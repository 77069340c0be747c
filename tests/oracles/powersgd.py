"""PowerSGD (arXiv:1905.13727, Alg. 1): one step of power iteration on a matrix, warm-started."""

import numpy as np


def orthonormal(matrix):
    """Columns made orthonormal, by a library's QR; the span is what counts."""
    return np.linalg.qr(np.asarray(matrix, np.float64))[0]


def compress(matrix, q):
    """The matrix's approximation P Q^T, and Q for the next time."""
    matrix = np.asarray(matrix, np.float64)
    p = orthonormal(matrix @ q)
    q = matrix.T @ p
    return p @ q.T, q


def best(matrix, rank):
    """The best approximation of that rank (Eckart-Young), from a library's SVD."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]
