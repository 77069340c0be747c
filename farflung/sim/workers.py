"""What a node's work costs in virtual time: it is done at once, and its result comes when the work would be done.

The codec, the rule and the outer optimiser are the real ones, wrapped so that they note what they would have cost; the
disk notes every wait for it. A node's executor charges what was noted while a piece of work ran.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from farflung.aggregation.outer import OuterOptimizer
from farflung.aggregation.registry import ParsedRule
from farflung.aggregation.rule import Aggregate, Context
from farflung.compression.codec import Codec
from farflung.node.anchor import Anchor
from farflung.node.durable import waiting_by
from farflung.node.reference import ReferenceAnchor
from farflung.protocol.rows import Rows
from farflung.protocol.schema import Schema
from farflung.sim.inline import InlineExecutor
from farflung.sim.service_costs import THREADS

T = TypeVar("T")


class Costs(Protocol):
    """Seconds of one core for a model of the charged size."""

    def encode_s(self) -> float:
        """Of one update."""

    def check_s(self) -> float:
        """Of one payload that arrived: hash and check."""

    def apply_s(self, rows: int) -> float:
        """Decode and aggregate `rows` payloads, step, hash the state."""


@dataclass(eq=False)
class Disk:
    """One member's disk. `fsync_s`: per wait; `bytes_per_s`: 0 is infinitely fast. `slower`: a fault's factor."""

    fsync_s: float = 0.0
    bytes_per_s: float = 0.0
    slower: float = 1.0

    def cost_s(self, fresh_bytes: int) -> float:
        """Of one wait for so many bytes that were not on it yet."""
        move_s = fresh_bytes / self.bytes_per_s if self.bytes_per_s > 0 else 0.0
        return (self.fsync_s + move_s) * self.slower


class Workers(InlineExecutor):
    """One node's executor."""

    def __init__(self, desk: Desk, disk: Disk, costs: Costs, now_s: Callable[[], float] = lambda: 0.0) -> None:
        super().__init__()
        self._desk, self.disk, self.costs, self._now_s = desk, disk, costs, now_s
        self._free_s = [0.0] * THREADS
        self.owed_s = 0.0
        """Noted, and not charged yet."""

    def work(self, function: Callable[..., T], *arguments: Any) -> T:
        """Do it now; what it notes is charged by the loop."""
        before, self._desk.at_work = self._desk.at_work, self
        try:
            return function(*arguments)
        finally:
            self._desk.at_work = before

    def owe_cpu(self, seconds: float) -> None:
        """Note work of the processor."""
        self.owed_s += seconds

    def owe_disk(self, fresh_bytes: int) -> None:
        """Note a wait for the disk."""
        cost_s = self.disk.cost_s(fresh_bytes)
        self.owed_s += cost_s

    def charge(self) -> float:
        """How long what was noted since it was last asked takes, after what this node's threads have to do before."""
        owed_s, self.owed_s = self.owed_s, 0.0
        if owed_s <= 0:
            return 0.0
        now_s, first = self._now_s(), self._free_s.index(min(self._free_s))
        self._free_s[first] = max(self._free_s[first], now_s) + owed_s
        return self._free_s[first] - now_s

    def codec(self, codec: Codec) -> Codec:
        """The same codec, noting its costs."""

        def encode(update_d: Tensor, private: Any, shared: Any, round_index: int) -> tuple[bytes, Any]:
            self.owe_cpu(self.costs.encode_s())
            return codec.encode(update_d, private, shared, round_index)

        def check(payload: bytes, schema: Any, shared: Any, round_index: int) -> None:
            self.owe_cpu(self.costs.check_s())
            codec.check(payload, schema, shared, round_index)

        return codec._replace(encode=encode, check=check)

    def charge_for(self, anchor: Anchor) -> None:
        """Replace what this node computes with by the same things, noting their costs."""
        if isinstance(anchor, ReferenceAnchor):
            anchor.codec = self.mixing_codec(anchor.codec, anchor.schema.numel)
            anchor.outer = self.outer(anchor.outer)
        else:
            anchor.codec, anchor.rule = self.codec(anchor.codec), self.rule(anchor.rule)

    def mixing_codec(self, codec: Codec, d: int) -> Codec:
        """The same where members mix: each parcel is a fragment that is encoded when it leaves; when it has arrived it
        is checked, decoded and added to what its receiver holds."""
        costs = self.costs

        def encode(vector_d: Tensor, private: Any, shared: Any, round_index: int) -> tuple[bytes, Any]:
            self.owe_cpu(costs.encode_s() * vector_d.numel() / d)
            return codec.encode(vector_d, private, shared, round_index)

        def check(payload: bytes, schema: Schema, shared: Any, round_index: int) -> None:
            add_s = costs.apply_s(1) - costs.apply_s(0)
            self.owe_cpu((costs.check_s() + add_s) * schema.numel / d)
            codec.check(payload, schema, shared, round_index)

        return codec._replace(encode=encode, check=check)

    def outer(self, outer: OuterOptimizer) -> OuterOptimizer:
        """The same optimiser, noting what a member's own step costs: applying a round without payloads."""

        def step(*arguments: Any, **named: Any) -> Any:
            self.owe_cpu(self.costs.apply_s(0))
            return outer.step(*arguments, **named)

        return outer._replace(step=step)

    def rule(self, parsed: ParsedRule) -> ParsedRule:
        """The same rule, noting what decoding, combining and stepping cost."""

        def rule(rows: Rows[Tensor], weight_n: Tensor, *, f: int, context: Context) -> Aggregate:
            self.owe_cpu(self.costs.apply_s(rows.n))
            return parsed.rule(rows, weight_n, f=f, context=context)

        return parsed._replace(rule=rule)


class Desk:
    """Who is at work now: waits for the disk are noted there. One per world; nothing in it touches the real disk."""

    def __init__(self) -> None:
        self.at_work: Workers | None = None
        self._seen: dict[tuple[int, int], int] = {}

    def open(self) -> AbstractContextManager[None]:
        """While it is open, waiting for the disk is counting."""
        return waiting_by(self._wait)

    def _wait(self, handle: int) -> None:
        if self.at_work is None:
            return
        status = os.fstat(handle)
        fresh = 0
        if stat.S_ISREG(status.st_mode):
            key = (status.st_dev, status.st_ino)
            fresh = max(0, status.st_size - self._seen.get(key, 0))
            self._seen[key] = status.st_size
        self.at_work.owe_disk(fresh)
