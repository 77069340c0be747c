"""The codec of a text such as "ef(0.95)|topk(64/4096)|q2|rice": `grammar` reads it, `registry` knows the stages."""

from __future__ import annotations

from functools import lru_cache, partial

from farflung.compression import registry
from farflung.compression.codec import Codec
from farflung.compression.grammar import Arguments, StageText, split_stages
from farflung.compression.presets import PRESETS
from farflung.compression.scheme import Scheme
from farflung.compression.stage import Body, Coded, lift
from farflung.protocol.errors import ConfigError


@lru_cache(maxsize=256)
def parse_codec(spec: str, threads: int = 1) -> Codec:
    """The codec of a text, or of a preset's name; spaces around stages are ignored.

    `Codec.spec` is the canonical text with every default written out, so that a genesis does not change its meaning
    when a default does. Raises ConfigError with the column and what is allowed there. `threads` is on how many threads
    formats of records encode and check a whole payload; it changes no byte.
    """
    if threads < 1:
        raise ConfigError(f"a codec needs at least one thread, got {threads}")
    codec = _parse(spec, 1, threads)
    split_stages(codec.spec)  # a run's genesis holds this text: with its defaults, too, it must be within the limits
    return codec


def codec_presets() -> tuple[str, ...]:
    """Specs that together use every stage, and every preset: contract tests and benchmarks run over all of them."""
    return (*registry.examples(), *PRESETS)


def _parse(text: str, column: int, threads: int) -> Codec:
    preset = PRESETS.get(text.strip().lower())
    stages = split_stages(preset.spec if preset else text, column)
    body: Body | None = None
    for stage in reversed(stages):
        body = _threaded(_build(stage, body, threads, alone=len(stages) == 1), threads)
    if body is None:
        raise ConfigError(f"codec, column {column}: nothing to encode with, got {text!r}")
    return lift(body, stages[-1])


def _threaded(body: Body, threads: int) -> Body:
    """The same, told on how many threads its records may be written."""
    if isinstance(body, Coded):
        return body._replace(scheme=body.scheme._replace(threads=threads))
    return body._replace(threads=threads) if isinstance(body, Scheme) else body


def _build(stage: StageText, inner: Body | None, threads: int, *, alone: bool) -> Body:
    known = registry.stages()
    entry = known.get(stage.name)
    if entry is None:
        if stage.name in PRESETS:
            stage.refuse("a preset is a whole codec: it stands alone, or alone inside another one")
        stage.refuse("no such stage", *(item.usage for item in known.values()), *(PRESETS if alone else ()))
    return entry.build(Arguments(stage, entry.usage), inner, partial(_parse, threads=threads))
