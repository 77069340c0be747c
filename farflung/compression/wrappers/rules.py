"""Rules by tensor: embeddings, norms and matrices each get the codec that suits them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farflung.compression.codec import Codec, Link, Reader, Row
from farflung.compression.grammar import Arguments
from farflung.compression.parts import (
    LENGTH_BYTES,
    clamp,
    frame,
    in_order,
    part_of,
    read_span,
    require_finite,
    unframe,
    within,
)
from farflung.compression.scheme import require_window
from farflung.compression.stage import Body, Stage, require
from farflung.compression.wrappers.groups import ELSE, Group, groups_of, join, matching
from farflung.protocol.rows import Verdict
from farflung.protocol.schema import Schema

EXAMPLE = "rules(*embed*=q2, 1d=bf16, else=topk(64/4096)|q2)"


class States(NamedTuple):
    """The private or shared states of the groups, in their order, and the groups."""

    groups: tuple[Group, ...]
    states: tuple[Any, ...]


def rules(patterns: tuple[str, ...], codecs: tuple[Codec, ...]) -> Codec:
    """Each tensor goes to the first rule that matches it, each rule's tensors together to its codec.

    A pattern is compared with the tensor's name as `fnmatch` does, case and all; "1d" takes what has fewer than two
    dimensions, "else" (the last one) the rest. A rule that matches nothing costs nothing; which ones do is known only
    with the model. Payload: one length (8 bytes) per group that has tensors, then the groups' payloads in the order of
    the rules. Private and shared state is the groups', named "<position of the rule>.<name>". A window is sparse if all
    its parts are. Reading costs at most one aligned window more per group and end; encoding one copy of a group.
    Entries beyond PAYLOAD_ABS_MAX saturate. LocalError, before any state moves, if an entry is not finite.
    """
    require(len(patterns) == len(codecs) > 0 and patterns[-1] == ELSE, "rules end with else")
    rule_of = matching(patterns)

    @lru_cache(maxsize=8)
    def groups(schema: Schema) -> tuple[Group, ...]:
        return groups_of(schema, rule_of)

    def init(schema: Schema) -> tuple[States, States]:
        pairs = [codecs[group.rule].init(group.schema) for group in groups(schema)]
        private, shared = (tuple(pair[side] for pair in pairs) for side in range(2))
        return States(groups(schema), private), States(groups(schema), shared)

    def encode(update_d: Tensor, private: States, shared: States, round_index: int) -> tuple[bytes, States]:
        require_finite(update_d, sum(group.d for group in private.groups))
        payloads, states = [], []
        for group, own, common in zip(private.groups, private.states, shared.states, strict=True):
            payload, state = codecs[group.rule].encode(clamp(group.gather(update_d)), own, common, round_index)
            payloads.append(payload)
            states.append(state)
        return frame(payloads), private._replace(states=tuple(states))

    def open_(payload: bytes, schema: Schema, shared: States, round_index: int) -> Reader:
        readers = []
        parts = unframe(payload, len(groups(schema)))
        for group, part, common in zip(groups(schema), parts, shared.states, strict=True):
            readers.append((group, codecs[group.rule].open(part, group.schema, common, round_index)))

        def read(start: int, stop: int) -> Row:
            require_window(start, stop, schema.numel)
            found = []
            for group, reader in readers:
                first, last = group.before(start), group.before(stop)
                if first < last:
                    found.append((group, first, read_span(reader, first, last, group.d)))
            return join(found, start, stop)

        return read

    def check(payload: bytes, schema: Schema, shared: States, round_index: int) -> None:
        parts = unframe(payload, len(groups(schema)))
        for group, part, common in zip(groups(schema), parts, shared.states, strict=True):
            codecs[group.rule].check(part, group.schema, common, round_index)

    def bits(schema: Schema) -> float:
        inside = sum(codecs[group.rule].bits(group.schema) * group.d for group in groups(schema))
        return (inside + 8 * LENGTH_BYTES * len(groups(schema))) / schema.numel

    text = ", ".join(f"{pattern}={codec.spec}" for pattern, codec in zip(patterns, codecs, strict=True))
    exact = all(codec.exact for codec in codecs)
    plain = Codec(f"rules({text})", exact, init, encode, open_, check, bits)
    return _with_states(plain, codecs, groups)


def _with_states(plain: Codec, codecs: tuple[Codec, ...], groups: Callable[[Schema], tuple[Group, ...]]) -> Codec:
    """The part of `rules` that keeps, moves and saves the groups' states."""

    def each(state: States, visit: Callable[[Codec, Any], Any]) -> States:
        pairs = zip(state.groups, state.states, strict=True)
        return state._replace(states=tuple(visit(codecs[group.rule], own) for group, own in pairs))

    def observe(private: States, verdict: Verdict) -> States:
        return each(private, lambda codec, own: codec.observe(own, verdict))

    def tune(private: States, link: Link) -> States:
        return each(private, lambda codec, own: codec.tune(own, link))

    def tensors_of(state: States, list_of: Callable[[Codec], Callable[[Any], dict[str, Tensor]]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for group, own in zip(state.groups, state.states, strict=True):
            found |= within(str(group.rule), list_of(codecs[group.rule])(own))
        return in_order(found)

    def restore(schema: Schema, back: Callable[[Codec, Schema, dict[str, Tensor]], Any], saved: Any) -> States:
        found = groups(schema)
        states = tuple(back(codecs[group.rule], group.schema, part_of(str(group.rule), saved)) for group in found)
        return States(found, states)

    def advance(shared: States, update_d: Tensor, round_index: int) -> States:
        moved = []
        for group, common in zip(shared.groups, shared.states, strict=True):
            codec = codecs[group.rule]
            still = not codec.shared_tensors(common)  # nothing to move: spare the copy
            moved.append(common if still else codec.advance(common, group.gather(update_d), round_index))
        return shared._replace(states=tuple(moved))

    def ahead(private: States) -> Tensor | None:
        parts = [codecs[group.rule].ahead(own) for group, own in zip(private.groups, private.states, strict=True)]
        if all(part is None for part in parts):
            return None
        whole_d = torch.zeros(sum(group.d for group in private.groups))
        for group, part in zip(private.groups, parts, strict=True):
            if part is not None:
                group.scatter(part, whole_d)
        return whole_d

    return plain._replace(
        observe=observe,
        tune=tune,
        private_tensors=lambda private: tensors_of(private, lambda codec: codec.private_tensors),
        restore_private=lambda schema, saved: restore(
            schema, lambda codec, inner, own: codec.restore_private(inner, own), saved
        ),
        advance=advance,
        shared_tensors=lambda shared: tensors_of(shared, lambda codec: codec.shared_tensors),
        restore_shared=lambda schema, saved: restore(
            schema, lambda codec, inner, own: codec.restore_shared(inner, own), saved
        ),
        ahead=ahead,
    )


def _build(arguments: Arguments, inner: Body | None, parse: Any) -> Body:
    given = arguments.rest()
    if inner is not None:
        arguments.stage.refuse("nothing may follow: its codecs stand inside", EXAMPLE)
    for item in given:
        if not item.key:
            arguments.stage.refuse("every codec needs a pattern before it", EXAMPLE, column=item.column)
    if not given or given[-1].key != ELSE:
        arguments.stage.refuse("the last rule must be else", EXAMPLE)
    return rules(tuple(item.key for item in given), tuple(parse(item.text, item.column) for item in given))


STAGES = (
    Stage(
        "rules",
        "wrapper",
        "rules(pattern=codec, ..., else=codec)",
        "Each tensor to the first rule whose pattern matches its name; 1d: fewer than two dimensions.",
        "the groups', by size",
        "that of the groups",
        "cf. DeMo, Muon: norms and embeddings differ from matrices",
        _build,
        (
            "rules(1d=bf16, *embed*=q2, else=topk(64/4096)|q2)",
            "ef(1)|rules(1d=fp32, head=int8, else=topk(64/4096)|q2)",
            "rules(1d=topk(4/16)|fp32, e*=ef(1)|topk(64/4096)|q2, else=ef(0.9)|topk(32/1024)|q2)",
            "rules(head=lookahead(1)|ef(1)|q2, else=ef(0.9)|topk(64/4096)|q2)",
        ),
    ),
)
