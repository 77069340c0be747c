"""Lookahead: the next local phase starts from the member's own unsent progress."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from farflung.compression.codec import Codec
from farflung.compression.grammar import Arguments
from farflung.compression.guards import has_stage
from farflung.compression.parts import PROBE, RESIDUAL, decimal_text
from farflung.compression.stage import Body, Stage, on_codec, require


def lookahead(share: float, inner: Codec) -> Codec:
    """Start from theta - share x e, e the residual of the error feedback inside (DESIGN §3; cf. LOSCAR 2605.20866).

    With share = 1 and beta = 1, e is exactly theta - w, w the weights of a member that never drops its own progress,
    provided that Delta = phi_start - phi_end with phi_start the point this told: with Delta = theta - phi_end, e would
    count twice and grow without bound. Good with low rank and signs, harmful with a small top-k (benchmarks). share < 1
    costs `ahead` one new vector; share = 1 is a view. Nothing on the wire.
    Raises LocalError if the codec inside keeps no error feedback.
    """
    require(has_feedback(inner), f"lookahead needs error feedback inside, got {inner.spec}")

    def ahead(private: Any) -> Tensor:
        error_d = inner.private_tensors(private)[RESIDUAL]
        return error_d if share == 1 else error_d * share

    return inner._replace(spec=f"lookahead({decimal_text(share)})|{inner.spec}", ahead=ahead)


def has_feedback(codec: Codec) -> bool:
    """Whether a codec's outermost state is that of error feedback."""
    return RESIDUAL in codec.private_tensors(codec.init(PROBE)[0])


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    share = arguments.decimal("lambda", 0.0000001, 1)
    arguments.end()
    codec = on_codec(inner, arguments.stage)
    if not has_feedback(codec):
        arguments.stage.refuse("needs error feedback directly after it", f"{arguments.stage}|ef(1)|q2")
    if has_stage(codec, "lookahead"):
        arguments.stage.refuse("there is a lookahead after it already")
    return lookahead(share, codec)


STAGES = (
    Stage(
        "lookahead",
        "wrapper",
        "lookahead(lambda)",
        "The local phase starts from theta - lambda e: a member keeps its own unsent progress.",
        "0",
        "none beyond the error feedback inside",
        "ours; cf. arXiv:2605.20866",
        _build,
        ("lookahead(1)|ef(1)|q2", "lookahead(0.5)|ef(0.9)|int8"),
    ),
)
