"""What wrappers and transforms add to the codec behind them, in the units of `codec_costs`."""

from __future__ import annotations

from collections.abc import Callable

from farflung.compression.grammar import Argument, StageText, split_stages
from farflung.compression.transforms.factors import Sends, layout_of
from farflung.compression.wrappers.groups import groups_of, matching
from farflung.protocol.schema import Schema
from farflung.sim.codec_costs import Body, Coded, Units, Work, added, given, lift, scaled, step, walk

BOTH: tuple[Sends, ...] = ("P", "Q")


def _ef(stage: StageText, inner: Body | None, schema: Schema) -> Work:
    """Carry, encode, decode what is sent, subtract: of records run after run, before any entropy coder."""
    inside = lift(inner)
    sent = lift(inner.records) if isinstance(inner, Coded) else inside
    own = step(
        "ef.encode",
        dense=float(not inside.sparse),
        whole=float(isinstance(inner, Work)),
        bound=float("bound" in given(stage, "beta")),
    )
    encode = added(own, inside.encode, sent.decode)
    return inside._replace(encode=encode, private=inside.private + 1, remembers=True)


def _dgc(stage: StageText, inner: Body | None, schema: Schema) -> Work:
    inside = lift(inner)
    own = step("dgc.encode", clip=float("clip" in given(stage, "momentum")), kept=inside.kept)
    encode = added(own, inside.encode, inside.decode)
    return inside._replace(encode=encode, private=inside.private + 2, remembers=True)


def _ef21(stage: StageText, inner: Body | None, schema: Schema) -> Work:
    inside = lift(inner)
    return inside._replace(
        encode=added(step("ef21.encode"), inside.encode, inside.decode),
        decode=added(step("ef21.decode"), inside.decode),
        advance=added(step("ef21.advance"), inside.advance),
        kept=1.0,
        sparse=False,
        private=inside.private + 2,
        shared=inside.shared + 1,
        remembers=True,
    )


def _lookahead(stage: StageText, inner: Body | None, schema: Schema) -> Work:
    """A view of the error feedback, or a share of it."""
    inside = lift(inner)
    part = float(float(given(stage, "lambda")["lambda"]) < 1)
    return inside._replace(encode=added(step("lookahead.encode", one=part), inside.encode))


def _nested(item: Argument, schema: Schema) -> Work:
    return walk(split_stages(item.text), schema)


def _together(parts: list[tuple[float, Work]]) -> Work:
    """So much of each."""

    def of(units: Callable[[Work], Units]) -> Units:
        return added(*(scaled(units(part), share) for share, part in parts))

    return Work(
        of(lambda part: part.encode),
        of(lambda part: part.decode),
        of(lambda part: part.check),
        of(lambda part: part.advance),
        sum(share * part.kept for share, part in parts),
        all(part.sparse for _, part in parts),
        sum(share * part.private for share, part in parts),
        sum(share * part.shared for share, part in parts),
        any(part.remembers for _, part in parts),
    )


def _rules(stage: StageText, inner: Body | None, schema: Schema) -> Work:
    """Each rule by its parameters."""
    groups = groups_of(schema, matching(tuple(item.key for item in stage.arguments)))
    parts = [(group.d / schema.numel, _nested(stage.arguments[group.rule], group.schema)) for group in groups]
    inside = _together(parts)
    moved = {"sparse": 1.0, "kept": inside.kept, "one": 0.0} if inside.sparse else {}
    return inside._replace(
        encode=added(step("rules.encode"), inside.encode),
        decode=added(step("rules.decode", **moved), inside.decode),
    )


def _mix(stage: StageText, inner: Body | None, schema: Schema) -> Work:
    first, second = (_nested(item, schema) for item in stage.arguments)
    both = _together([(1.0, first), (1.0, second)])
    moved = {"sparse": 1.0, "kept": both.kept, "one": 0.0} if both.sparse else {}
    return both._replace(
        encode=added(step("mix.encode"), first.decode, both.encode),
        decode=added(step("mix.decode", **moved), both.decode),
        kept=min(both.kept, 1.0),
    )


def _adapt(stage: StageText, inner: Body | None, schema: Schema) -> Work:
    """Any choice as likely as another; the guard decodes it."""
    choices = [_nested(item, schema) for item in stage.arguments if not item.key]
    one = _together([(1 / len(choices), choice) for choice in choices])
    return one._replace(
        encode=added(step("adapt.encode"), one.encode, one.decode),
        advance=added(*(choice.advance for choice in choices)),
        shared=sum(choice.shared for choice in choices),
    )


def _warmup(stage: StageText, inner: Body | None, schema: Schema) -> Work:
    """The codec after the switch. Both shared states move all the time."""
    later, first = lift(inner), _nested(stage.arguments[1], schema)
    return later._replace(
        advance=added(first.advance, later.advance),
        shared=first.shared + later.shared,
        remembers=first.remembers or later.remembers,
    )


def _tiles(stage: StageText, inner: Body | None, schema: Schema) -> Work:
    inside = lift(inner)
    moved = {"sparse": 1.0, "kept": inside.kept, "one": 0.0} if inside.sparse else {}
    return inside._replace(
        encode=added(step("tiles.encode"), inside.encode), decode=added(step("tiles.decode", **moved), inside.decode)
    )


def _dct(stage: StageText, inner: Body | None, schema: Schema) -> Work:
    """Both products grow with the side, and short runs have their overhead."""
    side = float(given(stage, "side")["side"])
    return _dense(lift(inner), "dct", {"side": side, "edge": 1 / side})


def _rotate(stage: StageText, inner: Body | None, schema: Schema) -> Work:
    """Memory is what it waits for: blocks of 64 and of 4096 cost alike."""
    return _dense(lift(inner), "rotate", {})


def _dense(inside: Work, name: str, per: dict[str, float]) -> Work:
    """A transform of all coordinates, there and back."""
    return inside._replace(
        encode=added(step(f"{name}.encode", **per), inside.encode),
        decode=added(step(f"{name}.decode", **per), inside.decode),
        kept=1.0,
        sparse=False,
    )


def _sketch(stage: StageText, inner: Body | None, schema: Schema) -> Work:
    told = {name: int(text) for name, text in given(stage).items()}
    share, keeps = told["rows"] * told["cols"] / told["chunk"], float(told["keep"] > 0)
    inside = _together([(share, lift(inner))])
    return inside._replace(
        encode=added(step("sketch.encode", row=told["rows"]), inside.encode),
        decode=added(step("sketch.decode", row=told["rows"], keep=keeps), inside.decode),
        kept=told["keep"] / told["chunk"] if keeps else 1.0,
        sparse=bool(keeps),
    )


def _lowrank(stage: StageText, inner: Body | None, schema: Schema) -> Work:
    """By the real layout of the factors; with a shared basis, the mean of both turns."""
    told = given(stage, "rank", "basis")
    rank, shared = int(told["rank"]), told.get("basis") == "shared"
    layouts = [layout_of(schema, rank, side) for side in (BOTH if shared else ("PQ",))]
    share = sum(layout.derived.numel for layout in layouts) / len(layouts) / schema.numel
    inside = _together([(share, lift(inner))])
    matrices = [part for part in layouts[-1].parts if part.rows]
    ranks = rank * sum(part.size for part in matrices) / schema.numel
    square = rank * rank * sum(part.rows for part in matrices) / schema.numel
    basis = rank * sum(max(part.rows, part.columns) if shared else part.columns for part in matrices) / schema.numel
    name = "lowrank-shared" if shared else "lowrank"
    return inside._replace(
        encode=added(step(f"{name}.encode", rank=ranks, square=0.0 if shared else square), inside.encode),
        decode=added(step(f"{name}.decode", rank=ranks), inside.decode),
        advance=step(f"{name}.advance", rank=ranks, square=square) if shared else {},
        kept=1.0,
        sparse=False,
        private=inside.private + (0.0 if shared else basis),
        shared=basis if shared else 0.0,
    )


Wrap = Callable[[StageText, Body | None, Schema], Work]

WRAPPERS: dict[str, Wrap] = {
    "ef": _ef,
    "dgc": _dgc,
    "ef21": _ef21,
    "lookahead": _lookahead,
    "rules": _rules,
    "mix": _mix,
    "adapt": _adapt,
    "warmup": _warmup,
    "tiles": _tiles,
    "dct": _dct,
    "rotate": _rotate,
    "sketch": _sketch,
    "lowrank": _lowrank,
}
"""What each adds to (its text, what stands behind it, the model's tensors)."""
