"""The text of a codec, and the codec of a text.

spec    = [ "ef(" beta ")" "|" ] ( dense | "topk(" k "/" chunk ")" "|" value )
dense   = "fp32" | "bf16" | "int8" [ "(block=" n ")" ] | "q2" [ "(block=" n ")" ]
value   = "fp32" | "bf16" | "int8" | "q2"                   one block per chunk
"""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn

from farflung.compression import dense, sparse
from farflung.compression.codec import Codec
from farflung.compression.feedback import error_feedback
from farflung.compression.scheme import Scheme, stateless
from farflung.protocol.errors import ConfigError
from farflung.protocol.rows import WINDOW_ALIGN

SPEC_CHARS_MAX = 200
"""A longer text is no codec; the longest today has 40 characters."""

BLOCK_MIN = 16
"""Smaller blocks would spend more bits on scales than on values."""

INT8_BLOCK = 1024
"""8.03 bits per parameter; a spike spoils the resolution of 1,023 neighbours at most."""

Q2_BLOCK = 512
"""2.0625 bits per parameter; fine enough that a block seldom straddles matrices of different scale."""

PLAIN = ("fp32", "bf16")
BLOCKED = {"int8": INT8_BLOCK, "q2": Q2_BLOCK}
FIRST = ("ef(beta)", "fp32", "bf16", "int8", "int8(block=n)", "q2", "q2(block=n)", "topk(k/chunk)")


class Stage(NamedTuple):
    """One part between bars: `name` or `name(argument)`, and the column where it starts, from 1."""

    name: str
    argument: str | None
    column: int


def parse_codec(spec: str) -> Codec:
    """The codec of a text such as "ef(1)|q2" or "ef(0.95)|topk(64/4096)|q2"; spaces around stages are ignored.

    `Codec.spec` is the canonical text with every default written out, so that a genesis does not change its meaning
    when a default does. Raises ConfigError with the column and what is allowed there.
    """
    stages = _stages(spec)
    beta = None
    if stages[0].name == "ef":
        beta = _beta(stages.pop(0))
        if not stages:
            raise ConfigError(f"codec {spec!r} ends after ef: add one of {', '.join(FIRST[1:])}")
    codec = stateless(_scheme(stages, FIRST if beta is None else FIRST[1:]))
    return codec if beta is None else error_feedback(beta, codec)


def codec_presets() -> tuple[str, ...]:
    """Specs that together use every stage; contract tests and benchmarks run over all of them."""
    return (
        "fp32",
        "bf16",
        "int8",
        "q2",
        "topk(64/4096)|fp32",
        "topk(64/4096)|bf16",
        "topk(64/4096)|int8",
        "topk(64/4096)|q2",
        "ef(1)|int8",
        "ef(1)|q2",
        "ef(0.95)|topk(64/4096)|q2",
    )


def _stages(spec: str) -> list[Stage]:
    if len(spec) > SPEC_CHARS_MAX:
        raise ConfigError(f"a codec is at most {SPEC_CHARS_MAX} characters long, got {len(spec)}")
    stages, column = [], 1
    for part in spec.split("|"):
        match = re.fullmatch(r"\s*([a-z0-9]+)\s*(?:\(([^()]*)\))?\s*", part, re.ASCII)
        if match is None:
            raise ConfigError(f"codec, column {column}: expected name or name(argument), got {part!r}")
        argument = match[2]
        stages.append(Stage(match[1], None if argument is None else argument.strip(), column + match.start(1)))
        column += len(part) + 1
    return stages


def _scheme(stages: list[Stage], allowed: tuple[str, ...]) -> Scheme:
    """The stateless rest of a spec: one dense stage, or topk and a value format."""
    first, *rest = stages
    if first.name == "topk":
        k, chunk = _fraction(first)
        if not rest:
            _refuse(first, "needs a value format after it", (*PLAIN, *BLOCKED))
        scheme = sparse.topk(k, chunk, _value(rest[0], k))
        rest = rest[1:]
    else:
        scheme = _dense(first, allowed)
    if rest:
        _refuse(rest[0], "nothing may follow here", ())
    return scheme


def _dense(stage: Stage, allowed: tuple[str, ...]) -> Scheme:
    if stage.name in PLAIN and stage.argument is None:
        return dense.fp32() if stage.name == "fp32" else dense.bf16()
    if stage.name not in BLOCKED:
        _refuse(stage, "no such stage here", allowed)
    block = BLOCKED[stage.name]
    if stage.argument is not None:
        match = re.fullmatch(r"block\s*=\s*([0-9]{1,6})", stage.argument)
        block = int(match[1]) if match else 0
    if not BLOCK_MIN <= block <= WINDOW_ALIGN or WINDOW_ALIGN % block:
        _refuse(
            stage, f"block must be a power of two from {BLOCK_MIN} to {WINDOW_ALIGN}", (f"{stage.name}(block=512)",)
        )
    return dense.int8(block) if stage.name == "int8" else dense.q2(block)


def _value(stage: Stage, k: int) -> Scheme:
    if stage.name not in (*PLAIN, *BLOCKED) or stage.argument is not None:
        _refuse(stage, "a value format after topk takes no argument (its block is the chunk)", (*PLAIN, *BLOCKED))
    match stage.name:
        case "fp32":
            return dense.fp32()
        case "bf16":
            return dense.bf16()
        case "int8":
            return dense.int8(k)
        case _:
            return dense.q2(k)


def _fraction(stage: Stage) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})\s*/\s*([0-9]{1,6})", stage.argument or "")
    k, chunk = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (BLOCK_MIN <= chunk <= WINDOW_ALIGN and WINDOW_ALIGN % chunk == 0 and 1 <= k <= chunk):
        why = f"chunk must be a power of two from {BLOCK_MIN} to {WINDOW_ALIGN}, k from 1 to chunk"
        _refuse(stage, why, ("topk(64/4096)",))
    return k, chunk


def _beta(stage: Stage) -> float:
    match = re.fullmatch(r"[0-9](\.[0-9]{1,5})?", stage.argument or "")
    beta = float(match[0]) if match else 0.0
    if not 0.001 <= beta <= 1:
        _refuse(stage, "beta must be a decimal from 0.001 to 1", ("ef(1)", "ef(0.95)"))
    return beta


def _refuse(stage: Stage, why: str, allowed: tuple[str, ...]) -> NoReturn:
    text = stage.name if stage.argument is None else f"{stage.name}({stage.argument})"
    hint = f"; allowed: {', '.join(allowed)}" if allowed else ""
    raise ConfigError(f"codec, column {stage.column}: {why}{hint}; got {text!r}")
