"""The kernels in plain torch: slow, obvious, and what the fast ones are tested against."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from farflung.compression.kernels import LEVEL_MAX, REFINEMENTS, Floats, Integers, Kernels, Levels, Octets, Split


def int8_pack(x_bn: Floats, scale_b: Floats, out_br: Octets) -> None:
    """See `Kernels.int8_pack`."""
    scale_b1 = torch.from_numpy(scale_b)[:, None]
    step_bn = (torch.from_numpy(x_bn) / scale_b1.where(scale_b1 > 0, 1)).clamp(-127, 127).round()
    out_br[:, 4:] = step_bn.where(scale_b1 > 0, 0).to(torch.int8).numpy().view(np.uint8)


def int8_unpack(records_br: Octets, scale_b: Floats, out_bn: Floats) -> None:
    """See `Kernels.int8_unpack`."""
    step_bn = torch.from_numpy(records_br[:, 4:].view(np.int8).astype(np.float32))
    out_bn[:] = (step_bn * torch.from_numpy(scale_b)[:, None]).numpy()


def q2_measure(x_bn: Floats, absmax_b: Floats) -> Split:
    """See `Kernels.q2_measure`."""
    absmax_b1 = torch.from_numpy(absmax_b)[:, None]
    part_bn = torch.from_numpy(x_bn).abs() / absmax_b1.where(absmax_b1 > 0, 1)
    level_bn = (part_bn * LEVEL_MAX).to(torch.int64)
    n, total_b = level_bn.shape[1], level_bn.sum(1)
    threshold_b = (total_b * 5 // (4 * n) + 1).clamp(max=LEVEL_MAX)
    for step in range(REFINEMENTS + 1):
        high_bn = level_bn >= threshold_b[:, None]
        high_sum_b, high_count_b = (level_bn * high_bn).sum(1), high_bn.sum(1)
        low_count_b = n - high_count_b
        if step < REFINEMENTS:
            middle_b = (
                (total_b - high_sum_b) // low_count_b.clamp(min=1) + high_sum_b // high_count_b.clamp(min=1) + 1
            ) // 2
            threshold_b = middle_b.where((low_count_b > 0) & (high_count_b > 0), threshold_b)
    return Split(*(part.numpy() for part in (level_bn.int(), threshold_b, total_b, high_sum_b, high_count_b)))


def q2_pack(
    x_bn: Floats, level_bn: Levels, threshold_b: Integers, low_is_zero_b: NDArray[np.bool_], out_br: Octets
) -> None:
    """See `Kernels.q2_pack`."""
    n, quarter = x_bn.shape[1], out_br.shape[1] - 4
    high_bn = torch.from_numpy(level_bn) >= torch.from_numpy(threshold_b)[:, None]
    negative_bn = (torch.from_numpy(x_bn) < 0) & (high_bn | ~torch.from_numpy(low_is_zero_b)[:, None])
    code_bn = high_bn.to(torch.uint8) + 2 * negative_bn.to(torch.uint8)
    code_b4q = torch.nn.functional.pad(code_bn, (0, 4 * quarter - n)).view(-1, 4, quarter)
    out_br[:, 4:] = sum(code_b4q[:, slot] << (2 * slot) for slot in range(4)).numpy()  # type: ignore[union-attr]


def q2_unpack(records_br: Octets, low_b: Floats, high_b: Floats, out_bn: Floats) -> None:
    """See `Kernels.q2_unpack`."""
    byte_bq = torch.from_numpy(records_br[:, 4:].copy())
    code_bn = torch.cat([byte_bq >> (2 * slot) & 3 for slot in range(4)], 1)[:, : out_bn.shape[1]]
    low_b1, high_b1 = torch.from_numpy(low_b)[:, None], torch.from_numpy(high_b)[:, None]
    magnitude_bn = high_b1.where(code_bn & 1 > 0, low_b1)
    out_bn[:] = magnitude_bn.where(code_bn & 2 == 0, -magnitude_bn).numpy()


def topk_select(x_bn: Floats, k: int) -> Integers:
    """See `Kernels.topk_select`. A key of (magnitude, lowest index first) has no ties."""
    n = x_bn.shape[1]
    magnitude_bn = torch.from_numpy(x_bn).abs().view(torch.int32).long()
    key_bn = magnitude_bn * n + torch.arange(n - 1, -1, -1)
    index_bk: Integers = key_bn.topk(k, dim=1, sorted=False).indices.sort(1).values.numpy()
    return index_bk


KERNELS = Kernels(int8_pack, int8_unpack, q2_measure, q2_pack, q2_unpack, topk_select)
