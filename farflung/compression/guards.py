"""What may stand before what. Codecs are asked by their canonical texts: states depend on the model, texts do not."""

from __future__ import annotations

import math
import re

from farflung.compression.codec import Codec

FEEDBACK = ("ef", "ef21", "dgc")
"""Stages that carry on what a payload did not send."""

_SHARED = re.compile(r"(?<![a-z0-9_-])lowrank\([^()]*shared\)")
_QSGD = re.compile(r"(?<![a-z0-9_-])qsgd\(levels=([0-9]+), block=([0-9]+)\)")


def has_stage(codec: Codec, *names: str) -> bool:
    """Whether a stage of one of these names stands anywhere in a codec."""
    pattern = rf"(?<![a-z0-9_-])(?:{'|'.join(names)})(?=[(),|]|$)"
    return re.search(pattern, codec.spec) is not None


def shares_state(codec: Codec) -> bool:
    """Whether members hold a state alike that moves with certificates."""
    return has_stage(codec, "ef21") or _SHARED.search(codec.spec) is not None


def keeps_state(codec: Codec) -> bool:
    """Whether a member must remember something between rounds to encode; a measured line does not count."""
    return has_stage(codec, *FEEDBACK) or has_stage(codec, "lowrank")


def remembers(codec: Codec) -> bool:
    """Whether what a payload did not send is carried on, so that nothing of it may stay in the parameters too."""
    return has_stage(codec, *FEEDBACK)


def expands(codec: Codec) -> str:
    """Why error feedback around this codec grows without bound, or "".

    Its error must be shorter than what it encodes (arXiv:1901.09847, Assumption A); unbiased schemes buy their
    unbiasedness with longer ones. (Measured: with ef(1)|qsgd on normal
    numbers |e| is 631 updates after 60 rounds.)
    """
    if "form=unbiased" in codec.spec:
        return "unbiased random-k errs by more than the update: use form=biased"
    if re.search(r"(?<![a-z0-9_-])sketch\([^()]*keep=0\)", codec.spec):
        return "a sketch without recovery errs by more than the update: use keep=k"
    for levels, block in _QSGD.findall(codec.spec):
        s, n = int(levels), int(block)
        if min(n / s**2, math.sqrt(n) / s) > 1:
            return f"qsgd of {s} levels on {n} coordinates errs by more than the update: more levels, a smaller block"
    return ""
