"""Published systems' codecs by name, and ours. A preset is a spec; where it differs from the paper, `says` says how."""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """One system."""

    spec: str
    outer: str
    """The outer optimiser that its authors use with it."""
    says: str
    paper: str


PRESETS: dict[str, Preset] = {
    "diloco-fp32": Preset(
        "fp32",
        "nesterov(lr=0.7,momentum=0.9)",
        "Pseudo-gradients as they are.",
        "arXiv:2311.08105",
    ),
}
