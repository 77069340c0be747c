"""Side by side with hivemind's DecentralizedAverager: four peers on loopback, averaging back to back, no training.

    python benchmarks/against_hivemind.py --params 10 50
    python benchmarks/against_hivemind.py --hivemind fp16 --farflung --codec "ef(0.95)|topk(64/4096)|q2"

One averaging is timed from the word "now" to all peers until the last of them has the result. For farflung it is a
whole round: encode, fsync, announce, exchange, check, decode, mean, digest, votes, certificate, adopt, with TLS. For
hivemind it is matchmaking and all-reduce, both also apart. Every peer compares every coordinate with the true mean.
A sparse codec sends the largest coordinates only and the rest later: there members' states are compared instead.
"""

from __future__ import annotations

import contextlib
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from report import arguments, console, goal, noise, publish

from farflung.node.founding import found_run
from farflung.node.run_file import RunFile
from farflung.node.store import open_home
from farflung.protocol.genesis import Timing

PEER = str(Path(__file__).with_name("averaging_peer.py"))
PEERS = 4
DROPPED = 2
"""Rounds at the start that do not count: connections open, kernels compile, pages are touched."""

ROUND_S = 60.0
SPARSE = "ef(0.95)|topk(64/4096)|q2"


class Peer:
    """A process that averages when told."""

    def __init__(self, log: Path, **options: Any) -> None:
        self.log = log
        command = [sys.executable, PEER, json.dumps(options)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, bufsize=1
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def answer(self, seconds: float = ROUND_S) -> dict[str, Any]:
        """The next JSON line; other lines (libraries print) are passed over. Raises RuntimeError if none comes."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left_s)
            except queue.Empty:
                break
            if line is None:
                raise RuntimeError(f"a peer ended: {self.log.read_text()[-2000:]}")
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a peer did not answer within {seconds:.0f} s: {self.log.read_text()[-1000:]}")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(8)
        except subprocess.TimeoutExpired:
            family = [*psutil.Process(self.process.pid).children(recursive=True), self.process]  # averager, DHT, p2pd
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            self.process.wait()


def cpu_s(peers: Sequence[Peer]) -> float:
    """CPU seconds of all peers so far, with the processes they started (hivemind's averager, DHT and p2pd)."""
    total = 0.0
    for peer in peers:
        process = psutil.Process(peer.process.pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                total += times.user + times.system
    return total


def measure(peers: Sequence[Peer], rounds: int) -> list[dict[str, Any]]:
    """Rounds, one after the other; all peers get the word at the same time."""
    results = []
    for number in range(rounds):
        for peer in peers:
            peer.tell(f"go {number}")
        for peer in peers:
            peer.answer()
        began_s, began_cpu_s = time.monotonic(), cpu_s(peers)
        for peer in peers:
            peer.tell("now")
        answers = [peer.answer() for peer in peers]
        judged_s = sum(answer["judge_cpu_s"] for answer in answers)
        used_s = cpu_s(peers) - began_cpu_s - judged_s
        took_s = max(answer["ended"] for answer in answers) - began_s
        results.append({"s": took_s, "cpu_s": used_s, "peers": answers, "began": began_s})
    return results


def run_hivemind(codec: str, params: int, rounds: int, root: Path, matchmaking_s: float) -> list[dict[str, Any]]:
    peers: list[Peer] = []
    addresses: list[str] = []
    try:
        for index in range(PEERS):
            options = {"system": "hivemind", "peer": index, "params": params, "codec": codec}
            peers.append(Peer(root / f"h{index}.log", **options, initial_peers=addresses, matchmaking_s=matchmaking_s))
            addresses = addresses or peers[0].answer()["maddrs"]
        for peer in peers[1:]:
            peer.answer()
        return measure(peers, rounds)
    finally:
        for peer in peers:
            peer.close()


def run_farflung(codec: str, outer: str, params: int, rounds: int, root: Path, tls: bool) -> list[dict[str, Any]]:
    run = RunFile(
        name="averaging",
        task="builtin:stub",
        task_options={"params": params},
        codec=codec,
        outer=outer,
        inner_steps=1,
        start_members=PEERS,
        quorum_percent=100,
        snapshot_rounds=1000,
        timing=Timing(grace_ms=60_000, deadline_floor_ms=60_000),  # a busy machine is no reason to leave a payload out
    )
    founded = found_run(run, open_home(root / "f0"), listen="127.0.0.1:0")
    peers: list[Peer] = []
    try:
        for index in range(PEERS):
            options = {"system": "farflung", "peer": index, "params": params, "home": str(root / f"f{index}")}
            listen = founded.listen if index == 0 else "127.0.0.1:0"
            peers.append(Peer(root / f"f{index}.log", **options, invite=str(founded.invite), listen=listen, tls=tls))
            peers[-1].answer()
        for peer in peers:
            peer.answer()
        return measure(peers, rounds)
    finally:
        for peer in peers:
            peer.close()


def summarise(system: str, codec: str, params: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the counted rounds; the averaged fraction is the worst peer's mean over rounds."""
    counted = results[DROPPED:]
    answers = [answer for result in counted for answer in result["peers"]]
    row = {
        "system": system,
        "codec": codec,
        "million": params / 1e6,
        "rounds": len(counted),
        "s (median)": statistics.median(result["s"] for result in counted),
        "s (min)": min(result["s"] for result in counted),
        "s (max)": max(result["s"] for result in counted),
        "CPU s": statistics.median(result["cpu_s"] for result in counted),
        "averaged": statistics.mean(answer["averaged"] for answer in answers),
        "averaged (worst)": min(answer["averaged"] for answer in answers),
        "not touched": statistics.mean(answer["own"] for answer in answers),
        "largest error": max(answer["error"] for answer in answers),
    }
    if is_sparse(codec):  # most coordinates stay for later rounds
        row |= dict.fromkeys(("averaged", "averaged (worst)", "not touched", "largest error"), None)
    if "state" in answers[0]:
        states = [{answer["state"] for answer in result["peers"]} for result in counted]
        row["same state"] = sum(len(one) == 1 for one in states) / len(states)
    if "matchmaking_s" in answers[0]:
        row["matchmaking s"] = statistics.median(answer["matchmaking_s"] for answer in answers)
        row["all-reduce s"] = statistics.median(answer["transfer_s"] for answer in answers)
    return row


def is_sparse(codec: str) -> bool:
    """Whether a round of this codec leaves most coordinates as they are."""
    return any(word in codec for word in ("topk", "randk", "deadzone", "lowrank", "sketch"))


def breakdown(results: list[dict[str, Any]], codec: str, params: int) -> list[dict[str, Any]]:
    """Where a farflung round's time goes: seconds of work per member, and when it begins and ends in the round."""
    counted = results[DROPPED:]
    pairs = [(result["began"], answer) for result in counted for answer in result["peers"]]
    names = sorted({name for _, answer in pairs for name in answer["spent"]})
    rows = []
    for name in names:
        with_it = [(began, answer) for began, answer in pairs if name in answer["spent"]]
        rows.append(
            {
                "codec": codec,
                "million": params / 1e6,
                "work": name,
                "s per member": statistics.median(answer["spent"][name][0] for _, answer in with_it),
                "CPU s": statistics.median(answer["spent"][name][1] for _, answer in with_it),
                "begins at": statistics.median(answer["spans"][name][0] - began for began, answer in with_it),
                "ends at": statistics.median(answer["spans"][name][1] - began for began, answer in with_it),
            }
        )
    return sorted(rows, key=lambda row: row["begins at"])


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--params", type=float, nargs="+", default=[10.0], help="millions of parameters")
    parser.add_argument("--rounds", type=int, default=8, help=f"per cell; the first {DROPPED} do not count")
    parser.add_argument(
        "--hivemind", nargs="*", default=["fp32", "fp16", "uniform8"], help="also blockwise8, which needs bitsandbytes"
    )
    parser.add_argument("--farflung", nargs="*", default=["fp32", "bf16", "int8", SPARSE], help="codecs")
    parser.add_argument("--codec", nargs="*", default=[], help="more codecs for farflung")
    parser.add_argument("--outer", default="sgd(lr=1.0)", help="farflung's outer optimiser")
    parser.add_argument("--matchmaking-s", type=float, default=1.0, help="hivemind's min_matchmaking_time")
    parser.add_argument(
        "--no-tls", dest="tls", action="store_false", help="farflung in plain text, like hivemind on loopback"
    )
    args = parser.parse_args()
    rows, parts = [], []
    for million in args.params:
        params = int(million * 1e6)
        # farflung and hivemind take turns, so that a machine that is busier for a while is so for both
        cells = [("farflung", codec) for codec in dict.fromkeys(args.farflung + args.codec)]
        cells += [("hivemind", codec) for codec in args.hivemind]
        for system, codec in sorted(cells, key=lambda cell: cell[1]):
            with tempfile.TemporaryDirectory(prefix="farflung-bench-", ignore_cleanup_errors=True) as folder:
                try:
                    if system == "hivemind":
                        results = run_hivemind(codec, params, args.rounds, Path(folder), args.matchmaking_s)
                    else:
                        results = run_farflung(codec, args.outer, params, args.rounds, Path(folder), args.tls)
                        parts += breakdown(results, codec, params)
                except RuntimeError as error:
                    console.print(f"{system} {codec} {million:g} M failed: {error}", style="red", markup=False)
                    continue
            rows.append(summarise(system, codec, params, results))
            console.print(f"{system} {codec} {million:g} M: {rows[-1]['s (median)']:.2f} s, {noise()}", highlight=False)
    publish(args.out, "against_hivemind_parts", parts, title="where a farflung round's time goes")
    notes = [noise()]
    for million in args.params:
        found = {(row["system"], row["codec"]): row for row in rows if row["million"] == million}
        theirs = found.get(("hivemind", "fp16"))
        for (system, codec), ours in found.items():
            if system == "hivemind" or theirs is None or not (codec == "int8" or is_sparse(codec)):
                continue
            wanted = 5 if is_sparse(codec) else 2
            ratio, spent = theirs["s (median)"] / ours["s (median)"], theirs["CPU s"] / ours["CPU s"]
            sound = ours["same state"] == 1.0 and ours["averaged (worst)"] in {1.0, None}
            text = f"{million:g} M: {codec} round {ratio:.2f}x as fast as hivemind's fp16 (goal {wanted}x), "
            notes.append(goal(f"{text}CPU {spent:.2f}x less, one state: {sound}", ratio >= wanted and sound))
    publish(args.out, "against_hivemind", rows, title="seconds per averaging, 4 peers on loopback", notes=notes)


if __name__ == "__main__":
    main()
