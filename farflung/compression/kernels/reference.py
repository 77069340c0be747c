"""The kernels in plain torch: slow, obvious, and what the fast ones are tested against."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from farflung.compression.kernels import (
    ABS_MAX_BITS,
    BF16_ABS_MAX_BITS,
    FAULTS,
    INT8_SCALE_MAX,
    LANES,
    LEVEL_MAX,
    NARROW,
    ORDER,
    PAST_END,
    REFINEMENTS,
    SCALE,
    SCALE_MAX_BITS,
    SIGNED_ZERO,
    UNSETTLED,
    UNUSED_CODE,
    USE,
    WILD,
    Floats,
    Integers,
    Kernels,
    Octets,
    Packing,
)

ABS_MAX = float(np.uint32(ABS_MAX_BITS).view(np.float32))
NORMAL_MIN = 2.0**-126
NORMAL_MIN_BITS = 0x0080
"""The same as bf16."""


def _first(*bad: tuple[int, Tensor]) -> int:
    """What `Packing.read` returns for pairs of (fault, records that have it); the first pair wins within a record."""
    for record in torch.stack([records_b for _, records_b in bad]).any(0).nonzero().flatten().tolist():
        return int(record) * len(FAULTS) + next(fault for fault, records_b in bad if records_b[record])
    return -1


def _not_finite(x_bn: Tensor) -> int:
    wild_b = ~x_bn.isfinite().all(1)
    return int(wild_b.int().argmax()) if wild_b.any() else -1


def _bf16_bits(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).view(torch.int16).int() & 0xFFFF


def _from_bf16(bits: Tensor) -> Tensor:
    return (bits << 16).view(torch.float32)


def _numbers(octets_br: Octets, dtype: type) -> Tensor:
    """Records, or a part of each, as numbers; of 16 bits as int32, so that none is negative."""
    return torch.from_numpy(
        np.ascontiguousarray(octets_br).view(dtype).astype(np.int32 if dtype is np.uint16 else dtype)
    )


def fp32_write(x_bn: Floats, out_br: Octets) -> int:
    """See `Packing.write`."""
    out_br[:] = torch.from_numpy(x_bn).clamp(-ABS_MAX, ABS_MAX).numpy().view(np.uint8)
    return _not_finite(torch.from_numpy(x_bn))


def fp32_read(records_br: Octets, out_bn: Floats) -> int:
    """See `Packing.read`."""
    out_bn[:] = records_br.view(np.float32)
    return _first((WILD, ~(torch.from_numpy(out_bn).abs() <= ABS_MAX).all(1)))


def bf16_write(x_bn: Floats, out_br: Octets) -> int:
    """See `Packing.write`. 1e6 itself rounds down to a bf16 number."""
    bits_bn = _bf16_bits(torch.from_numpy(x_bn).clamp(-ABS_MAX, ABS_MAX))
    out_br[:] = bits_bn.numpy().astype(np.uint16).view(np.uint8)
    return _not_finite(torch.from_numpy(x_bn))


def bf16_read(records_br: Octets, out_bn: Floats) -> int:
    """See `Packing.read`."""
    bits_bn = _numbers(records_br, np.uint16)
    out_bn[:] = _from_bf16(bits_bn).numpy()
    return _first((WILD, (bits_bn & 0x7FFF).amax(1) > BF16_ABS_MAX_BITS))


def _rounded(step_bn: Tensor, scale_b: Tensor, widest: int) -> Tensor:
    """To even, clamped; 0 where the scale is."""
    return step_bn.clamp(-widest, widest).round().where(scale_b[:, None] > 0, 0).int()


def _uses(step_bn: Tensor, scale_b: Tensor, widest: int) -> tuple[tuple[int, Tensor], tuple[int, Tensor]]:
    used_b = torch.where(scale_b > 0, widest, 0)
    return (UNUSED_CODE, step_bn.amin(1) < -widest), (NARROW, step_bn.abs().amax(1) != used_b)


def int8_write(x_bn: Floats, out_br: Octets) -> int:
    """See `Packing.write`."""
    x = torch.from_numpy(x_bn)
    if (bad := _not_finite(x)) >= 0:
        return bad
    scale_b = (x.abs().amax(1) / 127).clamp(max=float(INT8_SCALE_MAX))
    scale_b = torch.where(scale_b < NORMAL_MIN, 0, scale_b * 127 / 127)
    out_br[:, :4] = scale_b[:, None].contiguous().numpy().view(np.uint8)
    step_bn = _rounded(x / scale_b.where(scale_b > 0, 1)[:, None], scale_b, 127)
    out_br[:, 4:] = step_bn.to(torch.int8).numpy().view(np.uint8)
    return -1


def int8_read(records_br: Octets, out_bn: Floats) -> int:
    """See `Packing.read`."""
    scale_b = _numbers(records_br[:, :4], np.float32)[:, 0]
    step_bn = _numbers(records_br[:, 4:], np.int8).int()
    sound_b = (scale_b >= NORMAL_MIN) & (scale_b <= float(INT8_SCALE_MAX)) | (scale_b.view(torch.int32) == 0)
    out_bn[:] = (step_bn * scale_b[:, None]).numpy()
    return _first((SCALE, ~sound_b), (UNSETTLED, scale_b * 127 / 127 != scale_b), *_uses(step_bn, scale_b, 127))


def _packed(code_bn: Tensor, share: int, code_bits: int) -> Octets:
    """8 / code_bits codes to a byte: those of byte j are j, j + share, ... from the low bits up."""
    slots = 8 // code_bits
    code_bsq = torch.nn.functional.pad(code_bn, (0, slots * share - code_bn.shape[1])).view(-1, slots, share)
    byte_bq = (code_bsq << (torch.arange(slots) * code_bits)[:, None]).sum(1)
    octets_bq: Octets = byte_bq.numpy().astype(np.uint8)
    return octets_bq


def _codes(octets_bq: Octets, code_bits: int) -> Tensor:
    """The inverse of `_packed`, the unused ones too."""
    byte_bq = torch.from_numpy(octets_bq.astype(np.int32))
    return torch.cat([byte_bq >> shift & ((1 << code_bits) - 1) for shift in range(0, 8, code_bits)], 1)


def _packed_write(x_bn: Floats, out_br: Octets, code_bits: int) -> int:
    x, widest = torch.from_numpy(x_bn), (1 << (code_bits - 1)) - 1
    if (bad := _not_finite(x)) >= 0:
        return bad
    bits_b = _bf16_bits(x.abs().amax(1) / widest).clamp(max=SCALE_MAX_BITS[code_bits])
    bits_b = bits_b.where(bits_b >= NORMAL_MIN_BITS, 0)
    out_br[:, :2] = bits_b[:, None].numpy().astype(np.uint16).view(np.uint8)
    scale_b = _from_bf16(bits_b)
    inverse_b = 1 / scale_b.where(scale_b > 0, 1)
    code_bn = _rounded(x * inverse_b[:, None], scale_b, widest) & ((1 << code_bits) - 1)
    out_br[:, 2:] = _packed(code_bn, out_br.shape[1] - 2, code_bits)
    return -1


def _packed_read(records_br: Octets, out_bn: Floats, code_bits: int) -> int:
    n, half = out_bn.shape[1], 1 << (code_bits - 1)
    bits_b = _numbers(records_br[:, :2], np.uint16)[:, 0]
    code_bm = _codes(records_br[:, 2:], code_bits)
    step_bn = (code_bm[:, :n] ^ half) - half
    scale_b = _from_bf16(bits_b)
    out_bn[:] = (step_bn * scale_b[:, None]).numpy()
    sound_b = (bits_b >= NORMAL_MIN_BITS) & (bits_b <= SCALE_MAX_BITS[code_bits]) | (bits_b == 0)
    past_b = (code_bm[:, n:] != 0).any(1)
    return _first((SCALE, ~sound_b), (PAST_END, past_b), *_uses(step_bn, scale_b, half - 1))


def int4_write(x_bn: Floats, out_br: Octets) -> int:
    """See `Packing.write`."""
    return _packed_write(x_bn, out_br, 4)


def int4_read(records_br: Octets, out_bn: Floats) -> int:
    """See `Packing.read`."""
    return _packed_read(records_br, out_bn, 4)


def int2_write(x_bn: Floats, out_br: Octets) -> int:
    """See `Packing.write`."""
    return _packed_write(x_bn, out_br, 2)


def int2_read(records_br: Octets, out_bn: Floats) -> int:
    """See `Packing.read`."""
    return _packed_read(records_br, out_bn, 2)


def _lloyd(level_bn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold, sum and count of the high class, from a threshold at 1.25 mean levels."""
    n, total_b = level_bn.shape[1], level_bn.sum(1)
    threshold_b = (total_b * 5 // (4 * n) + 1).clamp(max=LEVEL_MAX)
    for step in range(REFINEMENTS + 1):
        high_bn = level_bn >= threshold_b[:, None]
        high_sum_b, high_count_b = (level_bn * high_bn).sum(1), high_bn.sum(1)
        low_count_b = n - high_count_b
        if step < REFINEMENTS:
            low_mean_b = (total_b - high_sum_b) // low_count_b.clamp(min=1)
            middle_b = (low_mean_b + high_sum_b // high_count_b.clamp(min=1) + 1) // 2
            threshold_b = middle_b.where((low_count_b > 0) & (high_count_b > 0), threshold_b)
    return threshold_b, high_sum_b, high_count_b


def q2_write(x_bn: Floats, out_br: Octets) -> int:
    """See `Packing.write`."""
    x, n = torch.from_numpy(x_bn), x_bn.shape[1]
    if (bad := _not_finite(x)) >= 0:
        return bad
    absmax_b = x.abs().amax(1)
    level_bn = (x.abs() / absmax_b.where(absmax_b > 0, 1)[:, None] * LEVEL_MAX).long()
    threshold_b, high_sum_b, high_count_b = _lloyd(level_bn)
    unit_b = absmax_b.double() / LEVEL_MAX

    def level(sum_b: Tensor, count_b: Tensor) -> Tensor:
        mean_b = sum_b.double() / count_b.clamp(min=1) * unit_b
        return _bf16_bits(mean_b.clamp(max=999424.0).float())

    low_b = level(level_bn.sum(1) - high_sum_b, n - high_count_b)
    high_b = level(high_sum_b, high_count_b)
    threshold_b = threshold_b.where(low_b != high_b, 0)
    low_b = low_b.where(low_b != high_b, 0)
    high_bn = (level_bn >= threshold_b[:, None]) & (high_b > 0)[:, None]
    negative_bn = (x < 0) & (high_bn | (low_b > 0)[:, None])
    out_br[:, :4] = torch.stack([low_b, high_b], 1).numpy().astype(np.uint16).view(np.uint8)
    out_br[:, 4:] = _packed(high_bn.int() + 2 * negative_bn.int(), out_br.shape[1] - 4, 2)
    return -1


def q2_read(records_br: Octets, out_bn: Floats) -> int:
    """See `Packing.read`."""
    n = out_bn.shape[1]
    low_b, high_b = _numbers(records_br[:, :4], np.uint16).T.contiguous()
    code_bm = _codes(records_br[:, 4:], 2)
    is_high_bn, is_negative_bn = code_bm[:, :n] & 1 > 0, code_bm[:, :n] & 2 > 0
    magnitude_bn = _from_bf16(high_b)[:, None].where(is_high_bn, _from_bf16(low_b)[:, None])
    out_bn[:] = magnitude_bn.where(~is_negative_bn, -magnitude_bn).numpy()
    return _first(
        (SCALE, high_b > BF16_ABS_MAX_BITS),
        (ORDER, (low_b >= high_b) & (low_b > 0)),
        (PAST_END, (code_bm[:, n:] != 0).any(1)),
        (USE, (is_high_bn.any(1) != (high_b > 0)) | (is_high_bn.all(1) & (low_b > 0))),
        (SIGNED_ZERO, (low_b == 0) & (is_negative_bn & ~is_high_bn).any(1)),
    )


def carry(error_d: Floats, update_d: Floats, beta: np.float32) -> None:
    """See `Kernels.carry`."""
    torch.from_numpy(error_d).mul_(float(beta)).add_(torch.from_numpy(update_d))


def take_away(x_d: Floats, index_k: Integers, value_k: Floats) -> None:
    """See `Kernels.take_away`."""
    x_d[index_k] -= value_k


def top_bits(x_d: Floats) -> int:
    """See `Kernels.top_bits`."""
    return int((torch.from_numpy(x_d).view(torch.int32) & 0x7FFFFFFF).max())


def square_sum(x_d: Floats) -> float:
    """See `Kernels.square_sum`."""
    lane_l = torch.zeros(LANES, dtype=torch.float64)
    for part in torch.split(torch.from_numpy(x_d).double(), LANES):
        lane_l[: len(part)] += part * part
    total = 0.0
    for lane in lane_l.tolist():
        total += lane
    return total


def topk_select(x_bn: Floats, k: int) -> Integers:
    """See `Kernels.topk_select`. A key of (magnitude, lowest index first) has no ties."""
    n = x_bn.shape[1]
    magnitude_bn = torch.from_numpy(x_bn).abs().view(torch.int32).long()
    key_bn = magnitude_bn * n + torch.arange(n - 1, -1, -1)
    index_bk: Integers = key_bn.topk(k, dim=1, sorted=False).indices.sort(1).values.numpy()
    return index_bk


KERNELS = Kernels(
    fp32=Packing(fp32_write, fp32_read),
    bf16=Packing(bf16_write, bf16_read),
    int8=Packing(int8_write, int8_read),
    int4=Packing(int4_write, int4_read),
    int2=Packing(int2_write, int2_read),
    q2=Packing(q2_write, q2_read),
    carry=carry,
    take_away=take_away,
    top_bits=top_bits,
    square_sum=square_sum,
    topk_select=topk_select,
)
