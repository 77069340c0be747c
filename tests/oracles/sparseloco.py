"""SparseLoCo (arXiv:2508.15706, §3): error feedback, top-k of every chunk, statistical quantiser, mean of the rows."""

import numpy as np


def chunks_of(shape, side=64, chunk=4096):
    """Flat positions of every chunk of a tensor: square blocks of a matrix, runs of a vector.

    The side of a block is the largest divisor of each dimension that is at most `side`; a tensor of more dimensions is
    a matrix of its first one and the rest.
    """
    if len(shape) < 2:
        n = int(np.prod(shape))
        return [np.arange(start, min(start + chunk, n)) for start in range(0, n, chunk)]
    rows, columns = shape[0], int(np.prod(shape[1:]))
    position_mn = np.arange(rows * columns).reshape(rows, columns)
    high, wide = divisor(rows, side), divisor(columns, side)
    return [
        position_mn[top : top + high, left : left + wide].reshape(-1)
        for top in range(0, rows, high)
        for left in range(0, columns, wide)
    ]


def divisor(n, most):
    """The largest divisor of n that is at most `most`."""
    return next(side for side in range(min(n, most), 0, -1) if n % side == 0)


def keep(chunk, k):
    """Positions in a chunk of its k largest magnitudes, the first of equal ones first; ascending."""
    order = np.lexsort((np.arange(len(chunk)), -np.abs(chunk)))
    return np.sort(order[:k])


def statistical(values, bits=2):
    """Every value as the mean of its bin: 2**bits bins over six standard deviations around the mean."""
    values = np.asarray(values, np.float64)
    bins = 2**bits
    if len(values) < 2 or values.std(ddof=1) == 0:
        return values.copy()
    width = 6 * values.std(ddof=1) / bins
    code = np.clip(np.rint((values - values.mean()) / width + bins / 2), 0, bins - 1)
    decoded = np.empty_like(values)
    for found in np.unique(code):
        decoded[code == found] = values[code == found].mean()
    return decoded


def compress(acc, chunks, k, whole=4096, bits=2, group=None):
    """What is sent of a flat vector: k of `whole` from every chunk, quantised in groups of `group` kept values."""
    sent = np.zeros(len(acc), np.float64)
    kept = [chunk[keep(acc[chunk], -(-k * len(chunk) // whole))] for chunk in chunks]
    position = np.concatenate(kept)
    group = group or len(position)
    for start in range(0, len(position), group):
        part = position[start : start + group]
        sent[part] = statistical(acc[part], bits)
    return sent


def round_of(error, update, beta, chunks, k, **settings):
    """One member's round: what it sends, and the error it keeps."""
    acc = beta * error + update
    sent = compress(acc, chunks, k, **settings)
    return sent, acc - sent
