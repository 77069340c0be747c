"""The last step to a node, once its transport, directory and genesis are there: the same in every world."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from farflung.aggregation.graphs import parse_graph
from farflung.aggregation.outer import parse_outer
from farflung.aggregation.registry import parse_rule
from farflung.aggregation.weights import parse_weights
from farflung.compression import parse_codec
from farflung.node.anchor import Anchor
from farflung.node.answers import Answers
from farflung.node.audit import Audit
from farflung.node.blobs import BlobExchange
from farflung.node.flat import read_parameters
from farflung.node.mailbox import Mailbox
from farflung.node.mixing_codec import EXACT, MixingCodec, cut
from farflung.node.mixing_round import terms_of
from farflung.node.peers import Peers
from farflung.node.reference import ReferenceAnchor
from farflung.node.runtime import Clock, Transport
from farflung.node.shell import Node, Parts
from farflung.node.store import RunStore
from farflung.protocol.genesis import Genesis
from farflung.protocol.identity import Identity, PeerId


@dataclass(frozen=True)
class Surroundings:
    """What a node is put into: one machine's disk, network, clock, and the threads that may wait."""

    identity: Identity
    secret: bytes
    store: RunStore
    transport: Transport
    peers: Peers
    answers: Answers
    clock: Clock
    mailbox: Mailbox
    workers: Executor | None = None
    """None: threads of the node's own."""

    in_thread: Callable[[Callable[[], Any]], Awaitable[Any]] = asyncio.to_thread
    """For what the blob exchange does on the disk."""


def assemble(
    stack: AsyncExitStack, around: Surroundings, genesis: Genesis, anchor: Anchor, *, invite: str, audit: Audit
) -> Node:
    """A node that answers from now on. The exchange is left to `stack` to be stopped."""
    me = around.identity.peer_id
    exchange = BlobExchange(around.transport, around.clock, me, around.store.partial, in_thread=around.in_thread)
    stack.push_async_callback(exchange.stop)
    parts = Parts(
        genesis,
        around.identity,
        around.secret,
        around.store,
        around.transport,
        exchange,
        around.peers,
        anchor,
        around.clock,
        around.mailbox,
        audit,
        invite,
        around.workers,
    )
    if isinstance(anchor, ReferenceAnchor):
        anchor.open_blob = around.store.blob
    around.answers.node, around.answers.exchange = Node(parts), exchange
    return around.answers.node


def make_anchor(genesis: Genesis, model: nn.Module, *, threads: int = 1) -> Anchor:
    """The anchor of round 0 as this model was built; state sync replaces it where the run began elsewhere.

    Raises ConfigError for what this version of farflung cannot do.
    """
    theta_d = torch.empty(genesis.schema.numel)
    read_parameters(model, theta_d)
    codec = parse_codec(genesis.codec)
    parts: dict[str, Any] = {
        "schema": genesis.schema,
        "codec": codec,
        "rule": parse_rule(genesis.rule),
        "outer": parse_outer(genesis.outer),
        "weights": parse_weights(genesis.weights),
        "theta_d": theta_d,
        "shared": codec.init(genesis.schema)[1],
        "threads": threads,
        "founder": PeerId.of(genesis.founder),
    }
    if genesis.mode == "gather":
        return Anchor(**parts)
    parse_graph(genesis.mixing.graph)  # what this version cannot mix by is said now, not in the first mixing
    MixingCodec(codec, cut(genesis.schema.numel, genesis.mixing.fragments))
    terms = terms_of(codec.spec == EXACT)
    return ReferenceAnchor(**parts, mode=genesis.mode, mixing=genesis.mixing, terms=terms)
