"""Where the members' processes answer, and what all simulated calls need to know of each other."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import grpc
import numpy as np

from farflung.node.runtime import DIGEST_LIST
from farflung.protocol import messages_pb2 as pb
from farflung.sim.fabric import Fabric

if TYPE_CHECKING:
    from farflung.sim.connection import Connection


class _Details(NamedTuple):
    """What a generic handler looks at."""

    method: str
    invocation_metadata: tuple[()] = ()


class Aborted(Exception):
    """A handler refused."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code, self.details = code, details


class Context:
    """What a handler gets as its context."""

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn:
        """End the call with a status."""
        raise Aborted(code, details)


class Machine:
    """One member's machine: where its process answers, while it runs."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.generic: Sequence[Any] = ()
        """The process's handlers; empty while nobody listens."""

        self.handled: dict[int, asyncio.Task[None]] = {}
        self.connections: dict[int, Connection] = {}
        self.charged_sent = self.charged_received = 0
        """Bytes that were charged beyond those of real messages."""

        self.dead = False
        """Without power: it neither calls nor answers."""

        self.lies: Callable[[str, int, bytes], bytes | None] | None = None
        """An attacker's hook: (method, caller, answer or streamed message) -> what is sent instead; None: nothing."""

    def handler(self, method: str) -> Any:
        """The handler of a method."""
        for generic in self.generic:
            found = generic.service(_Details(method))
            if found is not None:
                return found
        return None

    def listen(self, generic: Sequence[Any]) -> None:
        """A process runs from now on; without handlers it only calls others."""
        self.generic, self.dead = generic, False

    def die(self) -> None:
        """Lose power."""
        self.dead = True
        self.silence()

    def silence(self) -> None:
        """The process is gone: connections break, what was being answered ends."""
        self.generic = ()
        for connection in [*self.connections.values()]:
            connection.break_up(f"member {self.index} is gone", self.index)
        for task in [*self.handled.values()]:
            task.cancel()
        self.handled.clear()


class Channels:
    """Everything that calls need to know of each other."""

    def __init__(
        self,
        fabric: Fabric,
        *,
        message_loss: float = 0.0,
        rng: np.random.Generator | None = None,
        scale: float = 1.0,
    ) -> None:
        self.fabric, self.loop, self._scale = fabric, fabric.loop, scale
        self.machines = [Machine(index) for index in range(len(fabric.topology.nodes))]
        self._message_loss, self._rng = message_loss, rng
        self._unscaled: dict[bytes, None] = {}
        self._calls = 0
        self.by_address: dict[str, int] = {}

    def charged(self, size: int) -> int:
        """How large so many bytes of a payload or a state count: they stand for those of a bigger model."""
        return size if self._scale == 1.0 else math.ceil(size * self._scale)

    def charge_plainly(self, digest: bytes) -> None:
        """This blob is as large for a big model as for a small one."""
        if self._scale != 1.0:
            self._unscaled[digest] = None

    def charged_message(self, name: str, data: bytes, source: int, target: int, request: bytes = b"") -> int:
        """The same for an answer: only a chunk's own bytes grow, not its frame, nor a list of digests."""
        if name != "Fetch" or self._scale == 1.0:
            return len(data)
        if self._unscaled and pb.BlobRequest.FromString(request).digest in self._unscaled:
            return len(data)
        chunk = pb.BlobChunk.FromString(data)
        more = 0 if chunk.index == DIGEST_LIST else self.charged(len(chunk.data)) - len(chunk.data)
        self.machines[source].charged_sent += more
        self.machines[target].charged_received += more
        return len(data) + more

    def lost(self) -> bool:
        """Whether a control call never arrives."""
        return self._message_loss > 0 and self._rng is not None and float(self._rng.random()) < self._message_loss

    def next_call(self) -> int:
        """A number no other call has."""
        self._calls += 1
        return self._calls
