"""fp16: IEEE half precision, as OpenDiLoCo averages pseudo-gradients (arXiv:2407.07852)."""

from __future__ import annotations

import numpy as np
import torch

from farflung.compression.formats.records import dense, measured, plain, view
from farflung.compression.scheme import Field, Floats, Octets, Scheme, refuse_if
from farflung.compression.stage import Stage
from farflung.protocol.rows import WINDOW_ALIGN

FP16_ABS_MAX = np.float32(65504)
"""The largest finite half; larger entries saturate at it, as hivemind's fp16 does."""

FP16_INFINITY_BITS = np.uint16(0x7C00)


def fp16() -> Scheme:
    """Rounded to nearest even at 11 significant bits: 2 bytes. 16 bits per parameter.

    Keeps -0.0 and half's denormals. |error| <= 2**-11 |x| from 2**-14 to 65504, 2**-25 below; entries beyond 65504
    saturate there. Canonical: every half that is finite.
    """

    def write(x_bn: Floats, out_br: Octets, start: int, salt: int) -> None:
        x_bn, absmax_b = measured(x_bn)
        if absmax_b.max() > FP16_ABS_MAX:
            x_bn = np.clip(x_bn, -FP16_ABS_MAX, FP16_ABS_MAX)
        torch.from_numpy(view(out_br, "<f2")).copy_(torch.from_numpy(x_bn))  # twice as fast as numpy's

    def check(records_br: Octets, n: int) -> None:
        magnitude_bn = view(records_br, "<u2") & np.uint16(0x7FFF)
        refuse_if(magnitude_bn.max(1) >= FP16_INFINITY_BITS, "a value is not finite")

    def fill(records_br: Octets, out_bn: Floats) -> None:
        out_bn[:] = view(records_br, "<f2")

    return dense("fp16", WINDOW_ALIGN, lambda n: (Field("raw", 8, 2 * n),), write=write, check=check, fill=fill)


STAGES = (
    Stage(
        "fp16",
        "number format",
        "fp16",
        "Rounded to 11 significant bits; saturates at 65504.",
        "16",
        "none",
        "arXiv:2407.07852",
        plain(fp16),
        ("fp16",),
    ),
)
