"""What a codec does to each parameter, in units of measured work: its text taken apart stage by stage.

A row of the table (`measured_costs.NANOSECONDS`) is "what.step": "topk/kept.encode" is what each kept value costs to
encode. A codec's `Work` says how many of each row one parameter needs; parts are added, so a codec costs what its
stages cost. Nothing is timed here, and no vector is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import isqrt
from typing import NamedTuple

from farflung.compression.formats.global_topk import PARTS, UNIT_MAX, UNIT_MIN
from farflung.compression.grammar import StageText, split_stages
from farflung.compression.parse import parse_codec
from farflung.compression.scheme import STRIDE, Scheme
from farflung.protocol.errors import ConfigError, LocalError
from farflung.protocol.schema import Schema, TensorSpec
from farflung.sim.compute import usual_layers

Units = dict[str, float]
"""Row of the table -> how many per parameter."""

STEPS = ("encode", "decode", "check", "advance")

HELP = "measure it with benchmarks/service_costs.py and add it to the table of farflung/sim/measured_costs.py"

FORMATS = (
    *("fp32", "bf16", "fp16", "int8", "int4", "int2", "q2", "e3m0", "nf4", "sign", "ternary", "qsgd", "natural"),
    "stat",
)

CODERS = ("pack", "rice", "elias-fano", "ans")

LOSES_VALUES = ("ternary", "qsgd2", "qsgd4", "int2")
"""Formats in which a kept value is often 0: a sparsifier then moves the codes that stay."""


class Work(NamedTuple):
    """Per parameter: units of each step, and what follows for memory and combining."""

    encode: Units
    decode: Units
    check: Units
    advance: Units
    """Moving the shared state with a certificate."""
    kept: float = 1.0
    """Share of coordinates that a row has."""
    sparse: bool = False
    private: float = 0.0
    """Numbers of private state."""
    shared: float = 0.0
    """Numbers of shared state."""
    remembers: bool = False
    """Whether what was not sent is kept for later."""

    @property
    def rows(self) -> list[str]:
        """Every row of the table that it needs."""
        return [*self.encode, *self.decode, *self.check, *self.advance]


class Records(NamedTuple):
    """A format of records: its text, and its work, which depends on how it is called."""

    text: str
    work: Callable[[float, float, float], Work]
    """(coordinates, blocks, calls), all per parameter of the whole -> work."""

    @property
    def scheme(self) -> Scheme:
        """The real one."""
        scheme = parse_codec(self.text).scheme
        if not isinstance(scheme, Scheme):
            raise LocalError(f"a format of records has a scheme, got {self.text!r}")
        return scheme.of(0)


class Coded(NamedTuple):
    """A format of records with the entropy coder behind it."""

    records: Records
    coder: str


Body = Records | Coded | Work | str
"""What stages make of each other, from right to left; a text is an entropy coder by itself."""


@cache
def work_of(spec: str, schema: Schema) -> Work:
    """The work of a codec's text or a preset's name on a model's tensors.

    Where a member chooses (`adapt`), all choices count alike; `warmup` is charged as the codec after it; `rules` by the
    parameters that each has in the schema. Raises ConfigError for a text that is no codec, or naming the stage that
    nobody measured.
    """
    return walk(split_stages(parse_codec(spec).spec), schema)


def usual_schema(params: int, layers: int = 0) -> Schema:
    """A transformer of that many parameters: every layer's matrices and norms, and the rest as embedding.

    Its width is what 12 layers x width^2 gives, rounded down to 64; a model too small for that is one vector.
    """
    deep = layers or usual_layers(params)
    width = isqrt(params // (12 * deep)) // 64 * 64
    while width and deep * (12 * width + 2) * width > params:
        width -= 64
    if not width:
        return Schema((TensorSpec("model", (params,), "float32"),))
    shapes = {"down": (width, 4 * width), "norm": (2 * width,), "out": (width, width), "qkv": (3 * width, width)}
    shapes["up"] = (4 * width, width)
    sizes = [(f"block.{i:04d}.{name}", shape) for i in range(deep) for name, shape in shapes.items()]
    words, rest = divmod(params - deep * (12 * width + 2) * width, width)
    sizes += [("embed", (words, width))] if words else []
    sizes += [("head.norm", (rest,))] if rest else []
    return Schema(tuple(TensorSpec(name, shape, "float32") for name, shape in sizes))


def walk(stages: Sequence[StageText], schema: Schema) -> Work:
    """The work of stages in canonical form."""
    body: Body | None = None
    for stage in reversed(stages):
        body = _on(stage, body, schema)
    return lift(body)


def lift(body: Body | None) -> Work:
    """The work of a whole codec."""
    if isinstance(body, Coded):
        return _coded(*body)
    if isinstance(body, Records):
        return body.work(1.0, 1 / body.scheme.block, 1 / STRIDE)
    if not isinstance(body, Work):
        raise LocalError(f"no codec: {body!r}")
    return body


def unmeasured(name: str) -> ConfigError:
    """Nobody knows what a part costs."""
    return ConfigError(f"nobody measured what {name!r} costs in a codec: {HELP}")


def added(*parts: Units) -> Units:
    """The sum of several."""
    total: Units = {}
    for part in parts:
        for row, units in part.items():
            total[row] = total.get(row, 0.0) + units
    return total


def scaled(part: Units, share: float) -> Units:
    """So much of it."""
    return {row: units * share for row, units in part.items()}


def step(name: str, **per: float) -> Units:
    """Rows of one step: `step("topk.encode", chunk=1/4096)` is one of "topk.encode" and some "topk/chunk.encode".

    A part that is not there is left out; `one=0` leaves out the row without a unit.
    """
    what, _, end = name.rpartition(".")
    whole = per.pop("one", 1.0)
    rows = {name: whole} | {f"{what}/{unit}.{end}": units for unit, units in per.items()}
    return {row: units for row, units in rows.items() if units}


def given(stage: StageText, *names: str) -> dict[str, str]:
    """The arguments of a stage in canonical form by name; those without a key are named in order."""
    bare = iter(names)
    return {item.key or next(bare): item.text for item in stage.arguments}


def _on(stage: StageText, inner: Body | None, schema: Schema) -> Body:
    """What a stage makes of those behind it."""
    from farflung.sim.wrapper_costs import WRAPPERS

    if stage.name in CODERS:
        return stage.name
    if stage.name in FORMATS:
        return Coded(_format(stage), inner) if isinstance(inner, str) else _format(stage)
    if stage.name == "global-topk" and isinstance(inner, Records):
        return _global_topk(stage, inner)
    if stage.name in SPARSIFIERS:
        if isinstance(inner, Coded):
            return inner._replace(records=SPARSIFIERS[stage.name](stage, inner.records))
        if isinstance(inner, Records):
            return SPARSIFIERS[stage.name](stage, inner)
    if stage.name in WRAPPERS:
        return WRAPPERS[stage.name](stage, inner, schema)
    raise unmeasured(stage.name)


def key_of(stage: StageText) -> str:
    """A format's name in the table: what has codes of several widths has a row for each."""
    told = given(stage)
    if stage.name == "stat":
        return f"stat{told['bits']}"
    if stage.name == "qsgd":
        levels = int(told["levels"])
        return f"qsgd{2 if levels == 1 else 4 if levels <= 7 else 8}"
    return stage.name


def _format(stage: StageText) -> Records:
    key, blocked = key_of(stage), "block" in given(stage)

    def work(coordinates: float, blocks: float, calls: float) -> Work:
        per = {"block": blocks if blocked else 0.0, "call": calls, "one": coordinates}
        encode, decode, check = (step(f"{key}.{name}", **per) for name in STEPS[:3])
        return Work(encode, decode, check, {})

    return Records(str(stage), work)


def _topk(stage: StageText, value: Records) -> Records:
    return _chunked(stage, value, moves=True)


def _randk(stage: StageText, value: Records) -> Records:
    return _chunked(stage, value, moves=False)


def _chunked(stage: StageText, value: Records, *, moves: bool) -> Records:
    """k values of every chunk; `moves`: whether zeros change places. To write or to check such records, they are read.

    The values of a record are one block of their format.
    """
    k, chunk = (int(part) for part in given(stage, "k")["k"].split("/"))
    text = f"{stage}|{value.text}"
    lost = 1.0 if moves and key_of(split_stages(value.text)[-1]) in LOSES_VALUES else 0.0

    def work(coordinates: float, blocks: float, calls: float) -> Work:
        chunks = coordinates / chunk
        kept = chunks * k
        inside = value.work(kept, coordinates / block, calls)
        own = [step(f"{stage.name}.{name}", one=coordinates, chunk=chunks, kept=kept, call=calls) for name in STEPS[:3]]
        read = inside.decode if moves else inside.check
        encode = added(own[0], inside.encode, inside.decode if moves else {}, step("topk/lost.encode", one=lost * kept))
        return Work(encode, added(own[1], inside.decode), added(own[2], read), {}, kept, sparse=True)

    records = Records(text, work)
    block = records.scheme.block
    return records


def _deadzone(stage: StageText, value: Records) -> Records:
    def work(coordinates: float, blocks: float, calls: float) -> Work:
        inside = value.work(coordinates, blocks, calls)
        return inside._replace(encode=added(inside.encode, step("deadzone.encode", one=coordinates)))

    return Records(f"{stage}|{value.text}", work)


def _cyclic(stage: StageText, value: Records) -> Records:
    parts = int(given(stage, "parts")["parts"])
    block = value.scheme.block

    def work(coordinates: float, blocks: float, calls: float) -> Work:
        sent = coordinates / parts
        inside = value.work(sent, sent / block, calls)
        own = [step(f"cyclic.{name}", one=coordinates if name == "encode" else 0.0, kept=sent) for name in STEPS[:2]]
        encode, decode = added(own[0], inside.encode), added(own[1], inside.decode)
        return inside._replace(encode=encode, decode=decode, kept=inside.kept / parts, sparse=True)

    return Records(f"{stage}|{value.text}", work)


SPARSIFIERS = {"topk": _topk, "randk": _randk, "deadzone": _deadzone, "cyclic": _cyclic}


def _global_topk(stage: StageText, value: Records) -> Work:
    """Values and indices of one unit after the other, each a block and a call of its own."""
    ratio = float(given(stage, "ratio")["ratio"])
    unit = 1 << (value.scheme.block * PARTS // round(ratio * PARTS)).bit_length() - 1
    units = 1 / min(max(unit, UNIT_MIN), UNIT_MAX)
    inside = value.work(ratio, units, units)
    own = [step(f"global-topk.{name}", one=float(name == "encode"), kept=ratio, unit=units) for name in STEPS[:3]]
    encode = added(own[0], inside.encode, inside.decode)
    return Work(encode, added(own[1], inside.decode), added(own[2], inside.decode), {}, ratio, sparse=True)


def _coded(records: Records, coder: str) -> Work:
    """Records, and then what their fields hold: indices, codes, bytes of raw numbers."""
    scheme = records.scheme
    inside = records.work(1.0, 1 / scheme.block, 1 / STRIDE)
    if coder == "pack":
        return inside
    index, symbols = 0.0, dict.fromkeys(("sign", "code", "raw"), 0.0)
    for field in scheme.fields(scheme.block):
        if field.kind == "index":
            index += field.length / scheme.block
        elif coder == "ans":
            kind = "raw" if field.kind == "raw" else "sign" if field.bits == 1 else "code"
            symbols[kind] += field.length / scheme.block
    own = [step(f"{coder}.{name}", index=index, **symbols) for name in STEPS[:3]]
    return inside._replace(
        encode=added(inside.encode, own[0]), decode=added(inside.decode, own[1]), check=added(inside.check, own[2])
    )
