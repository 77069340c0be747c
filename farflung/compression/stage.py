"""One stage of a codec's text: its name, what it makes of the stages behind it, and what `--list` says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from farflung.compression.codec import Codec
from farflung.compression.grammar import Arguments, StageText
from farflung.compression.scheme import Scheme, stateless
from farflung.protocol.errors import LocalError


class Coder(NamedTuple):
    """An entropy coder by itself: what stands behind a format and recodes its records without loss."""

    spec: str
    attach: Callable[[Scheme], Codec]
    """The codec of a format whose records are recoded."""


class Coded(NamedTuple):
    """A format with the coder that stands behind it, before anything needs the codec."""

    scheme: Scheme
    coder: Coder


Body = Coder | Coded | Scheme | Codec
"""What stages make of each other, from right to left."""

Build = Callable[[Arguments, Body | None, Callable[[str, int], Codec]], Body]
"""(arguments, what the stages to the right made or None at the end, parse a nested spec at a column) -> this stage on
top of it. Takes every argument it knows, then calls `arguments.end()`; refuses with `arguments.stage.refuse`."""


class Stage(NamedTuple):
    """One entry of the catalogue."""

    name: str
    kind: str
    """"number format", "sparsifier", "transform", "entropy coder" or "wrapper": how `--list` groups them."""
    usage: str
    """With its arguments: "topk(k/chunk)"."""
    says: str
    """One sentence."""
    bits: str
    """Per parameter on the wire, as a formula."""
    state: str
    """Private or shared vectors, or "none"."""
    paper: str
    build: Build
    examples: tuple[str, ...]
    """Whole specs that use it; contract tests, fuzzers and benchmarks run over all of them."""


def lift(body: Body, stage: StageText) -> Codec:
    """The codec of anything. A coder alone is none: it needs a format before it."""
    if isinstance(body, Coder):
        stage.refuse("an entropy coder needs a format before it", f"int4|{body.spec}")
    if isinstance(body, Coded):
        return body.coder.attach(body.scheme)
    return stateless(body) if isinstance(body, Scheme) else body


def with_coder(scheme: Scheme, inner: Body | None, stage: StageText) -> Body:
    """A number format, alone or with the entropy coder that stands behind it. Nothing else may."""
    if inner is not None and not isinstance(inner, Coder):
        stage.refuse("nothing but an entropy coder may follow a number format", f"{stage}|rice")
    return scheme if inner is None else Coded(scheme, inner)


def over(inner: Body | None, stage: StageText, wrap: Callable[[Scheme], Scheme]) -> Body:
    """A sparsifier over a number format, which may have its coder behind it already."""
    if not isinstance(inner, Coded | Scheme):
        stage.refuse("needs a number format after it", f"{stage}|q2")
    return inner._replace(scheme=wrap(inner.scheme)) if isinstance(inner, Coded) else wrap(inner)


def on_codec(inner: Body | None, stage: StageText) -> Codec:
    """What a wrapper or a transform stands before."""
    if inner is None:
        stage.refuse("needs a codec after it", f"{stage}|q2")
    return lift(inner, stage)


def require(condition: bool, why: str) -> None:
    """Raise LocalError: a factory was called with what the parser would have refused."""
    if not condition:
        raise LocalError(why)
