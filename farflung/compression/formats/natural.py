"""Natural compression: a sign and a power of two, rounded at random without bias."""

from __future__ import annotations

import numpy as np

from farflung.compression.formats.records import ABS_MAX, dense, measured, plain
from farflung.compression.kernels.codes import NATURAL_TOP_EXPONENT, fastest_codes
from farflung.compression.scheme import Field, Floats, Octets, Scheme, refuse_if
from farflung.compression.stage import Stage
from farflung.protocol.rows import WINDOW_ALIGN

TOP_CODE = NATURAL_TOP_EXPONENT + 1


def _values() -> Floats:
    """What each code stands for; refused codes for 0."""
    value_l = np.zeros(256, np.float32)
    value_l[1:TOP_CODE] = (np.arange(1, TOP_CODE, dtype=np.uint32) << np.uint32(23)).view(np.float32)
    value_l[TOP_CODE] = ABS_MAX
    return value_l


VALUES = _values()


def natural() -> Scheme:
    """|x| between two powers of two goes to one of them at random, so that the mean is x (arXiv:1905.10988, Def. 1).

    Record: ceil(n / 8) bytes of signs, 1 for negative; then one byte per coordinate: the biased fp32 exponent 1..146,
    0 for zero, 147 for PAYLOAD_ABS_MAX, which stands above 2**19 instead of 2**20 so that no entry is out of range.
    9 bits per parameter. Exactly unbiased below 2**19: the mantissa itself is the chance of going up. Variance at most
    x^2 / 8; denormals go to 0 or 2**-126, unbiased too. Canonical: no exponent above 147; zero has no sign.
    """

    def write(x_bn: Floats, out_br: Octets, start: int, salt: int) -> None:
        x_bn, _ = measured(x_bn)
        fastest_codes().natural_pack(x_bn, start, salt, out_br)

    def check(records_br: Octets, n: int) -> None:
        signs = -(-n // 8)
        exponent_bn = records_br[:, signs:]
        refuse_if(exponent_bn.max(1) > TOP_CODE, "an exponent is too large")
        sign_bn = np.empty(exponent_bn.shape, np.float32)
        fastest_codes().unpack_scaled(records_br, 0, 1, _SIGNS, np.ones(len(records_br), np.float32), sign_bn)
        refuse_if(((exponent_bn == 0) & (sign_bn < 0)).any(1), "a zero has a sign")
        refuse_if(fastest_codes().seen(records_br, 0, 1, n)[1], "a sign past the end is not 0")

    def fill(records_br: Octets, out_bn: Floats) -> None:
        one_b, signs = np.ones(len(records_br), np.float32), -(-out_bn.shape[1] // 8)
        fastest_codes().unpack_scaled(records_br, signs, 8, VALUES, one_b, out_bn)
        sign_bn = np.empty_like(out_bn)
        fastest_codes().unpack_scaled(records_br, 0, 1, _SIGNS, np.ones(len(records_br), np.float32), sign_bn)
        out_bn *= sign_bn

    return dense(
        "natural",
        WINDOW_ALIGN,
        lambda n: (Field("codes", 1, n), Field("codes", 8, n)),
        write=write,
        check=check,
        fill=fill,
        salted=True,
    )


_SIGNS = np.array([1, -1], np.float32)

STAGES = (
    Stage(
        "natural",
        "number format",
        "natural",
        "A sign and a power of two, rounded at random, unbiased.",
        "9",
        "none",
        "arXiv:1905.10988",
        plain(natural),
        ("natural", "topk(64/4096)|natural"),
    ),
)
