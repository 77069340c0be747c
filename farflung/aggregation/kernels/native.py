"""The kernels as compiled loops. Each does what the function of the same name in `reference` says, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from farflung.aggregation.kernels.compiled import compiled

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Index = NDArray[np.signedinteger[Any]]

FLOAT32_MAX = np.float32(np.finfo(np.float32).max)
LANES = 8
"""Sums over coordinates run in this many interleaved accumulators, added up in order: part of the definition."""
TILE_NUMBERS = 8192
"""Numbers the median sorts at a time: 32 KiB, within the first-level cache of anything that trains."""


@compiled
def add_dense(sum_w: F64, value_w: F32, weight: float) -> int:
    wild = 0
    for j in range(len(value_w)):
        value = value_w[j]
        wild += 0 if abs(value) <= FLOAT32_MAX else 1
        sum_w[j] += weight * np.float64(value)
    return wild


@compiled
def add_sparse(sum_w: F64, index_k: Index, value_k: F32, weight: float) -> int:
    wild, last = 0, -1
    for k in range(len(index_k)):
        index, value = index_k[k], value_k[k]
        if index <= last or index >= len(sum_w):
            return -1
        last = index
        wild += 0 if abs(value) <= FLOAT32_MAX else 1
        sum_w[index] += weight * np.float64(value)
    return wild


@compiled
def divide(out_w: F32, sum_w: F64, total: float) -> None:
    for j in range(len(out_w)):
        out_w[j] = np.float32(sum_w[j] / total)


@compiled
def load_dense(block_w: F32, value_w: F32) -> int:
    wild = 0
    for j in range(len(value_w)):
        value = value_w[j]
        wild += 0 if abs(value) <= FLOAT32_MAX else 1
        block_w[j] = value + np.float32(0)
    return wild


@compiled
def load_sparse(block_w: F32, index_k: Index, value_k: F32) -> int:
    block_w[:] = 0
    wild, last = 0, -1
    for k in range(len(index_k)):
        index, value = index_k[k], value_k[k]
        if index <= last or index >= len(block_w):
            return -1
        last = index
        wild += 0 if abs(value) <= FLOAT32_MAX else 1
        block_w[index] = value + np.float32(0)
    return wild


@compiled
def median(out_w: F32, hit_n: NDArray[np.int64], block_nw: F32, comparator_c2: NDArray[np.int64]) -> None:
    n, size = block_nw.shape
    low, high = (n - 1) // 2, n // 2
    tile = max(TILE_NUMBERS // n, 64)
    sorted_nt = np.empty((n, tile), np.float32)
    for start in range(0, size, tile):
        stop = min(start + tile, size)
        for i in range(n):
            sorted_nt[i, : stop - start] = block_nw[i, start:stop]
        for c in range(len(comparator_c2)):
            upper_t, lower_t = sorted_nt[comparator_c2[c, 0]], sorted_nt[comparator_c2[c, 1]]
            for t in range(stop - start):
                a, b = upper_t[t], lower_t[t]
                upper_t[t] = a if a < b else b
                lower_t[t] = b if a < b else a
        low_t, high_t = sorted_nt[low], sorted_nt[high]
        for t in range(stop - start):
            out_w[start + t] = np.float32((np.float64(low_t[t]) + np.float64(high_t[t])) * 0.5)
        for i in range(n):
            hits = 0
            for t in range(stop - start):
                value = block_nw[i, start + t]
                hits += 1 if (value != 0) & ((value == low_t[t]) | (value == high_t[t])) else 0
            hit_n[i] += hits


@compiled
def sgd(theta_out_w: F32, theta_w: F32, update_w: F32, lr: float) -> None:
    for j in range(len(theta_w)):
        theta_out_w[j] = np.float32(np.float64(theta_w[j]) - lr * np.float64(update_w[j]))


@compiled
def nesterov(
    theta_out_w: F32, momentum_out_w: F32, theta_w: F32, momentum_w: F32, update_w: F32, lr: float, momentum: float
) -> None:
    for j in range(len(theta_w)):
        update = np.float64(update_w[j])
        buffer = np.float32(momentum * np.float64(momentum_w[j]) + update)
        theta_out_w[j] = np.float32(np.float64(theta_w[j]) - lr * (update + momentum * np.float64(buffer)))
        momentum_out_w[j] = buffer


@compiled
def dot(left_w: F32, right_w: F32) -> float:
    lane_l = np.zeros(LANES)
    whole = len(left_w) // LANES * LANES
    for j in range(0, whole, LANES):
        for lane in range(LANES):
            lane_l[lane] += np.float64(left_w[j + lane]) * np.float64(right_w[j + lane])
    for j in range(whole, len(left_w)):
        lane_l[j - whole] += np.float64(left_w[j]) * np.float64(right_w[j])
    total = 0.0
    for lane in range(LANES):
        total += lane_l[lane]
    return total
