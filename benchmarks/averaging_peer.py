"""One peer of `against_hivemind.py`: averages vectors when it is told to, and says how long it took and what came out.

Reads "go N" lines, answers with JSON lines. Every peer's vector of round N follows from (peer, N), so that each peer
knows what the mean should be. Peer i's entries lie around a level of its own, far from the others': an entry that
was not averaged is nowhere near the mean.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

LEVELS = (-0.15, -0.05, 0.05, 0.15)
NOISE = 0.02
"""Entries of peer i are LEVELS[i] + uniform(-NOISE, NOISE); the mean's levels cancel."""

TOLERANCE = 0.02
"""Closer than this to the true mean is averaged: peers' own entries are at least 0.05 - 2 x 0.02 away, and 8-bit
quantisation of such data is off by at most 0.002."""

STRETCH = 1 << 20


def fill(out_d: torch.Tensor, peer: int, round_index: int) -> None:
    """out ← the vector of this peer and round: one block of noise, cut differently everywhere."""
    noise = torch.from_numpy(np.random.Generator(np.random.PCG64(peer)).random(2 * STRETCH, np.float32))
    noise.mul_(2 * NOISE).add_(LEVELS[peer] - NOISE)
    for number, start in enumerate(range(0, len(out_d), STRETCH)):
        part = out_d[start : start + STRETCH]
        cut = (number * 7919 + round_index * 104729 + peer * 1299709) % STRETCH
        part.copy_(noise[cut : cut + len(part)])


def judge(got_d: torch.Tensor, peer: int, round_index: int) -> dict[str, float]:
    """The fraction of entries that are averaged, and that are this peer's own still; the largest error of the first."""
    began_cpu_s = time.process_time()
    mean_d, one_d = torch.zeros_like(got_d), torch.empty_like(got_d)
    for other in range(len(LEVELS)):
        fill(one_d, other, round_index)
        mean_d += one_d
    fill(one_d, peer, round_index)
    own = one_d.sub_(got_d).abs_() <= 1e-3
    error_d = mean_d.div_(len(LEVELS)).sub_(got_d).abs_()
    fine = error_d <= TOLERANCE
    return {
        "own": float(own.float().mean(dtype=torch.float64)),
        "averaged": float(fine.float().mean(dtype=torch.float64)),
        "error": float(error_d[fine].max()) if fine.any() else float("nan"),
        "judge_cpu_s": time.process_time() - began_cpu_s,
    }


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def serve(options: dict[str, Any], vector_d: Callable[[], torch.Tensor], average: Callable[[], dict[str, Any]]) -> None:
    """Do as told until the input ends."""
    for line in sys.stdin:
        _, number = line.split()
        fill(vector_d(), options["peer"], int(number))
        say(ready=True)
        if sys.stdin.readline().strip() != "now":
            return
        began_s = time.monotonic()
        result = average()
        took_s = time.monotonic() - began_s
        say(took_s=took_s, ended=began_s + took_s, **judge(vector_d(), options["peer"], int(number)), **result)


def hivemind_peer(options: dict[str, Any]) -> None:
    """Peers find each other through hivemind's DHT and average by its butterfly all-reduce."""
    import hivemind
    from hivemind.averaging.averager import DecentralizedAverager
    from hivemind.averaging.control import AveragingStage
    from hivemind.compression.base import NoCompression
    from hivemind.compression.floating import Float16Compression
    from hivemind.compression.quantization import BlockwiseQuantization, Uniform8BitQuantization
    from hivemind.dht import DHT

    kinds = {
        "fp32": NoCompression,
        "fp16": Float16Compression,
        "uniform8": Uniform8BitQuantization,
        "blockwise8": BlockwiseQuantization,
    }
    assert hivemind.__version__
    dht = DHT(initial_peers=options["initial_peers"], host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    pieces = 10
    tensors = [torch.zeros(options["params"] // pieces) for _ in range(pieces)]
    averager = DecentralizedAverager(
        tensors,
        dht,
        start=True,
        prefix="bench",
        target_group_size=len(LEVELS),
        min_group_size=len(LEVELS),
        min_matchmaking_time=options["matchmaking_s"],
        request_timeout=options["matchmaking_s"] / 2,
        compression=kinds[options["codec"]](),
    )
    flat_d = torch.empty(options["params"])
    early = (AveragingStage.IDLE, AveragingStage.LOOKING_FOR_GROUP)
    say(open=True, maddrs=[str(address) for address in dht.get_visible_maddrs()])

    def average() -> dict[str, Any]:
        began_s = time.monotonic()
        step = averager.step(wait=False, require_trigger=True, timeout=60.0)
        while step.stage in early and not step.done():
            time.sleep(0.001)
        matched_s = time.monotonic()
        step.allow_allreduce()
        group = step.result()
        allreduce_s = time.monotonic() - matched_s
        store(flat_d, averager, to_flat=True)
        return {"matchmaking_s": matched_s - began_s, "transfer_s": allreduce_s, "group": len(group or ())}

    def store(vector_d: torch.Tensor, averager: Any, *, to_flat: bool) -> None:
        with averager.get_tensors() as held:
            for mine, tensor in zip(vector_d.chunk(pieces), held, strict=True):
                (mine if to_flat else tensor).copy_(tensor if to_flat else mine)

    for line in sys.stdin:  # as `serve`, but the vector goes through the averager's shared memory
        _, number = line.split()
        fill(flat_d, options["peer"], int(number))
        store(flat_d, averager, to_flat=False)
        say(ready=True)
        if sys.stdin.readline().strip() != "now":
            break
        began_s = time.monotonic()
        result = average()
        took_s = result["matchmaking_s"] + result["transfer_s"]
        say(took_s=took_s, ended=began_s + took_s, **judge(flat_d, options["peer"], int(number)), **result)
    averager.shutdown()
    dht.shutdown()


def farflung_peer(options: dict[str, Any]) -> None:
    """A real member that "trains" by writing its vector into the model: one round is one averaging."""
    from farflung.node.flat import trainable
    from farflung.node.join import start_member
    from farflung.node.opening import JoinSettings
    from farflung.node.swarm import Swarm
    from farflung.node.tasks.stub import Stub
    from farflung.protocol.invite import parse_invite

    model = Stub(params=options["params"]).build_model()
    settings = JoinSettings(
        home=Path(options["home"]), listen=options["listen"], discovery="rendezvous", tls=options["tls"], threads=1
    )
    member = start_member(parse_invite(options["invite"]), lambda genesis: model, settings)
    say(listening=True)
    spent = profile(member.node)
    swarm = Swarm(member, model)
    weight_d = trainable(model)[0].tensor
    say(open=True)

    def average() -> dict[str, Any]:
        spent.clear()
        SPANS.clear()
        threads = cpu_by_thread()
        before, began_cpu_s = swarm.round_index, time.process_time()
        began_s = time.monotonic()
        swarm.step(tokens=1)
        spent["the whole round"] = (time.monotonic() - began_s, time.process_time() - began_cpu_s)
        SPANS["the whole round"] = (began_s, time.monotonic())
        for name, cpu_s in cpu_by_thread().items():
            spent[f"thread: {name}"] = (0.0, cpu_s - threads.get(name, 0.0))
            SPANS[f"thread: {name}"] = SPANS["the whole round"]
        state = member.node.machine.tip.state_digest.hex()
        return {"rounds": swarm.round_index - before, "state": state, "spent": dict(spent), "spans": dict(SPANS)}

    serve(options, lambda: weight_d, average)
    swarm.leave(1.0)


def cpu_by_thread() -> dict[str, float]:
    """CPU seconds so far by kind of thread; names without numbers, "native" for those not Python's."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found: dict[str, float] = {}
    for path in Path("/proc/self/task").iterdir():
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        name = names.get(int(path.name), "native (gRPC)").rstrip("0123456789_- ")
        found[name] = found.get(name, 0.0) + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


SPANS: dict[str, tuple[float, float]] = {}
"""First begin and last end of each kind of work in this round."""


class Timed:
    """A blob in the making whose disk work is timed."""

    def __init__(self, made: Any, timed: Callable[..., Any]) -> None:
        self._made, self._timed = made, timed

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._made, name)
        return partial(self._timed, f"fetch: {name}", value) if name in ("write_chunk", "finish") else value


Spent = dict[str, tuple[float, float]]
"""Seconds on the clock and seconds of CPU, by kind of work. Work in several threads overlaps."""


def profile(node: Any) -> Spent:
    """Add up this member's work by kind."""
    spent: Spent = {}

    def note(name: str, began_s: float, cpu_s: float) -> None:
        ended_s = time.monotonic()
        clock_s, before_cpu_s = spent.get(name, (0.0, 0.0))
        spent[name] = clock_s + ended_s - began_s, before_cpu_s + cpu_s
        SPANS[name] = (min(began_s, SPANS.get(name, (began_s, 0.0))[0]), ended_s)

    def timed(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        began_s, began_cpu_s = time.monotonic(), time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            note(name, began_s, time.thread_time() - began_cpu_s)

    def wrap(holder: Any, attribute: str, name: str) -> None:
        setattr(holder, attribute, partial(timed, name, getattr(holder, attribute)))

    codec, fetch = node.anchor.codec, node.parts.exchange.fetch
    node.anchor.codec = codec._replace(
        encode=partial(timed, "encode", codec.encode), check=partial(timed, "check", codec.check)
    )
    wrap(node.store, "put", "put (write+fsync)")
    wrap(node.store, "begin_round", "journal reset")
    wrap(node.store, "append_certificate", "certificate fsync")
    wrap(node.store.journal, "record", "journal fsync")
    wrap(node.store, "write_snapshot", "snapshot")
    wrap(node.store, "write_local", "own state (background)")
    wrap(node.local, "_refuse", "screen")
    wrap(node.anchor, "_step", "decode+mean+outer")
    wrap(node.anchor, "try_out", "try_out (with digest)")

    partial_of = node.parts.exchange._sink

    def sink(*arguments: Any) -> Any:
        made = timed("fetch: open", partial_of, *arguments)
        return Timed(made, timed)

    node.parts.exchange._sink = sink

    async def fetched(*arguments: Any, **options: Any) -> Any:
        began_s = time.monotonic()
        try:
            return await fetch(*arguments, **options)
        finally:
            note("fetch (all)", began_s, 0.0)

    node.parts.exchange.fetch = fetched
    return spent


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if chunks := os.environ.get("BENCH_CHUNKS"):  # an experiment: into how many chunks payloads are cut
        from farflung.protocol import blob

        blob.choose_chunk_bytes = lambda size: min(1 << 20, max(1 << 14, 1 << (size // int(chunks)).bit_length()))
    {"hivemind": hivemind_peer, "farflung": farflung_peer}[given["system"]](given)
