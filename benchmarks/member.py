"""One real member with its eyes open: what a `farflung join` process does, and a line of JSON for all that happens.

    python benchmarks/member.py '{"home": ..., "invite": ..., "listen": ..., "events": ...}'

Times are CLOCK_MONOTONIC, which all processes of a machine share. `swarm_rig.py` starts these and reads the events.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from farflung.node.data import Sharder
from farflung.node.join import start_member
from farflung.node.opening import JoinSettings
from farflung.node.shell import Node
from farflung.node.swarm import Swarm
from farflung.node.tasks.load import load_described
from farflung.node.tasks.task import Task, count_tokens
from farflung.node.trainer import Trainer
from farflung.protocol.errors import FarflungError
from farflung.protocol.genesis import Genesis
from farflung.protocol.invite import parse_invite
from farflung.protocol.wire import decode_message


class Events:
    """Lines of JSON, written as they happen."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1, encoding="utf-8")

    def __call__(self, kind: str, **values: Any) -> None:
        self._file.write(json.dumps({"t": time.monotonic(), "kind": kind, **values}) + "\n")


def watch(node: Node, events: Events) -> None:
    """Report every message heard, every chunk received and served, every blob fetched. Changes nothing."""
    exchange, transport = node.parts.exchange, node.parts.transport
    receive, on_fetch, fetch_chunks, fetch_blob = node.receive, exchange.on_fetch, transport.fetch, exchange.fetch

    def heard(envelope: bytes) -> None:
        receive(envelope)
        message = decode_message(envelope, node.genesis.run_id)
        events("heard", peer=message.sender.short, what=type(message.statement).__name__)

    async def served(run_id: bytes, digest: bytes, chunks: Any) -> AsyncIterator[tuple[int, bytes]]:
        async for index, data in on_fetch(run_id, digest, chunks):
            yield index, data
            events("served", blob=digest.hex()[:8], bytes=len(data), list=index == 0xFFFFFFFF)

    async def chunk(to: Any, ref: Any, chunks: Any, *, idle_s: float) -> AsyncIterator[tuple[int, bytes]]:
        async for index, data in fetch_chunks(to, ref, chunks, idle_s=idle_s):
            events("chunk", blob=ref.short, peer=to.peer_id.short, bytes=len(data), list=index == 0xFFFFFFFF)
            yield index, data

    async def blob(ref: Any, *where: Any, **how: Any) -> Any:
        events("fetch", blob=ref.short, bytes=ref.size)
        source = await fetch_blob(ref, *where, **how)
        events("fetched", blob=ref.short, bytes=ref.size)
        return source

    node.receive, exchange.on_fetch = heard, served  # type: ignore[method-assign]
    transport.fetch, exchange.fetch = chunk, blob  # type: ignore[method-assign]


def main() -> int:
    options = json.loads(sys.argv[1])
    events = Events(Path(options["events"]))
    torch.set_num_threads(int(options.get("threads", 1)))
    parts: dict[str, Any] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def model_of(genesis: Genesis) -> nn.Module:
        task = load_described({"name": genesis.task, "options": genesis.task_options})
        parts.update(task=task, model=task.build_model())
        return parts["model"]

    settings = JoinSettings(
        home=Path(options["home"]),
        name=options.get("name", ""),
        listen=options["listen"],
        upload_mbit=options.get("upload_mbit"),
        discovery=options.get("discovery", "rendezvous"),
        tls=options.get("tls", True),
    )
    member = start_member(parse_invite(options["invite"]), model_of, settings)
    watch(member.node, events)
    events("opened", peer=member.node.me.short, pid=os.getpid())
    with Swarm(member, parts["model"], lambda view: events("adopt", round=view.round_index)) as swarm:
        train(swarm, parts["task"], parts["model"], events, float(options.get("step_s", 0.0)))
    events("done")
    return 0


def train(swarm: Swarm, task: Task, model: nn.Module, events: Events, step_s: float) -> None:
    """Until the run is over. A step lasts at least `step_s`: a slow machine, without its heat."""
    trainer = Trainer(
        model,
        task.build_optimizer(model),
        task.loss,
        iter(task.batches(Sharder(swarm.view))),
        lr_at=getattr(task, "lr_at", None),
        tokens=getattr(task, "tokens", count_tokens),
    )
    while not swarm.finished:
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        trainer.global_step = swarm.global_step
        try:
            result = trainer.train_step()
        except StopIteration:
            break
        if (rest_s := step_s - (time.monotonic() - began_s)) > 0:
            time.sleep(rest_s)
        cpu_s = time.process_time() - began_cpu_s  # of all threads: training, and the node's serving beside it
        events("step", round=swarm.round_index, took=time.monotonic() - began_s, cpu=cpu_s)
        swarm.step(result.tokens, result.loss)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except FarflungError as error:
        sys.exit(f"{type(error).__name__}: {error}")
