"""Published systems' codecs by name, and ours. A preset is a spec; where it differs from the paper, `says` says how.

What they have in common here, whatever their authors ship: canonical bytes, entropy-coded integers where that is free
of loss, one scale per block rather than per tensor, and error feedback against the decoded bytes.
"""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """One system."""

    spec: str
    outer: str
    """The outer optimiser to use with it: its authors', at their scale."""
    says: str
    paper: str


DENSE = "nesterov(lr=0.7,momentum=0.9)"
"""DiLoCo's; small models and short runs want a momentum of 0.6 (docs/compression.md)."""

SPARSE = "sgd(lr=1.0)"
"""Where error feedback takes the place of outer momentum."""

PRESETS: dict[str, Preset] = {
    "diloco-fp32": Preset("fp32", DENSE, "Pseudo-gradients as they are.", "arXiv:2311.08105"),
    "opendiloco-fp16": Preset("fp16", DENSE, "Half precision, nothing else.", "arXiv:2407.07852"),
    "intellect-int8": Preset(
        "stat(bits=8, block=16384)|ans",
        DENSE,
        "256 bins over six sigmas, each decoded to its mean; here per block, and coded once instead of at every hop.",
        "arXiv:2412.01152",
    ),
    "streaming-e3m0": Preset(
        "e3m0(block=512)|ans",
        DENSE,
        "4-bit floats without error feedback; the paper does not give the granularity of its scales.",
        "arXiv:2501.18512, §3",
    ),
    "sparseloco": Preset(
        "ef(0.95)|tiles(64)|topk(64/4096)|stat(bits=2, block=1024)|ans",
        SPARSE,
        "Top 64 of every 64 x 64 tile in 2 bits; statistics per 1024 kept values instead of per tensor.",
        "arXiv:2508.15706, arXiv:2603.08163",
    ),
    "demo": Preset(
        "ef(0.999)|dct(64)|topk(32/4096)|fp32|rice",
        SPARSE,
        "Top 32 DCT coefficients of every tile. DeMo itself exchanges every step and takes the sign of the mean.",
        "arXiv:2411.19870, Alg. 1",
    ),
    "distro-sign": Preset(
        "ef(0.995)|dct(64)|topk(4/4096)|sign(block=512)|rice",
        SPARSE,
        "As in Psyche's largest run: the signs of 4 coefficients of every tile, with a scale here.",
        "Psyche, Consilience-40B",
    ),
    "dilocox": Preset(
        "ef(1)|lowrank(4)|int4(block=128)|ans",
        DENSE,
        "PowerSGD's factors in 4 bits; its authors adapt rank and H, and overlap by one round.",
        "arXiv:2506.21263",
    ),
    "muloco-2bit": Preset(
        "ef(0.9)|stat(bits=2, block=1024)|ans",
        "nesterov(lr=0.9,momentum=0.6)",
        "Statistical 2-bit quantiser with error feedback; the inner optimiser (Muon) is the task's.",
        "arXiv:2505.23725",
    ),
    "powersgd-r4": Preset(
        "ef(1)|lowrank(4)|fp16",
        DENSE,
        "Rank 4 by warm-started power iteration, per matrix.",
        "arXiv:1905.13727, Alg. 1",
    ),
    "ef-sign": Preset("ef(1)|sign(block=512)", DENSE, "Signs and one magnitude per block.", "arXiv:1901.09847, Alg. 2"),
    "qsgd": Preset("qsgd(levels=7, block=512)", DENSE, "Unbiased, without error feedback.", "arXiv:1610.02132"),
    "loco-4bit": Preset(
        "ef(1)|int4(block=128)|ans",
        DENSE,
        "4 bits with compensation; LoCo keeps the error in 8 bits and resets it now and then.",
        "arXiv:2407.04480",
    ),
    "farflung": Preset(
        "lookahead(0.25)|ef(0.95)|tiles(64)|topk(64/4096)|sign(block=512)|ans",
        "sgd(lr=2.8)",
        "Ours: signs of the top 64 of every tile, and a quarter of the own unsent progress kept. The outer rate is for "
        "4 members: halve it if the loss jumps.",
        "docs/compression.md",
    ),
}
