"""Push-sum among eight real processes that lose messages, one of which is killed and one of which comes late.

    python benchmarks/push_sum_real.py     # all losses with fp32 and int8: about 25 minutes on two cores
    python benchmarks/push_sum_real.py --codecs int8 --losses none bulk

Every process is `farflung join` on loopback, with real gRPC and TLS; only its transport loses messages
(`lossy_member.py`), from a seed. Without losses eight members start and finish together. With them seven start, the
eighth is started after a third of the rounds, and one is killed with SIGKILL in the middle of a mixing, half-way, and
started again. Shown: the mean of the members' validation losses after the same number of rounds, what every round's
audit found, how the killed one and the late one come back, bytes, disk and memory.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from report import Row, arguments, console, goal, noise, publish

from farflung.node.founding import found_run
from farflung.node.progress import read_progress
from farflung.node.run_file import RunFile
from farflung.node.store import open_home
from farflung.protocol.genesis import Timing
from farflung.protocol.mixing.settings import Mixing

MEMBER = str(Path(__file__).with_name("lossy_member.py"))
MEMBERS = 8
VICTIM, LATE = 3, MEMBERS - 1
DOWN_S = 4.0
"""How long the killed member stays down."""

STALL_S = 180.0
"""Without a round in this long the experiment has failed."""

NEAR = 1.02
"""A member whose loss is within this of the others' mean is level with them."""


class Losses(NamedTuple):
    """What is lost, as `lossy_member.Faults` reads it."""

    what: str
    faults: Mapping[str, float]


LOSSES = {
    "none": Losses("nothing", {}),
    "bulk": Losses("10 % of bulk", {"bulk": 0.1}),
    "notes": Losses("10 % of bulk, 10 % of notes", {"bulk": 0.1, "notes": 0.1}),
    "vectors": Losses("the same, 10 % of vectors for good", {"bulk": 0.1, "notes": 0.1, "vectors": 0.1}),
}


@dataclass
class Play:
    """One run of it: processes, what they said, and what was seen from outside."""

    root: Path
    codec: str
    losses: Losses
    rounds: int
    inner_steps: int
    seed: int
    children: dict[int, subprocess.Popen[Any]] = field(default_factory=dict)
    lives: Counter[int] = field(default_factory=Counter)
    disk: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Files and bytes under blobs/, one sample per look, of every member."""
    memory: dict[int, list[int]] = field(default_factory=dict)
    """Bytes resident, likewise; from the start of the present process."""
    began_s: float = 0.0
    ended_s: float = 0.0

    def __post_init__(self) -> None:
        home = open_home(self.root / "0")
        self.founded = found_run(self.run_file(), home, listen="127.0.0.1:0")

    @property
    def faulty(self) -> bool:
        return bool(self.losses.faults)

    def run_file(self) -> RunFile:
        """A GPT so small that runs with other orders of data end within about 1 % of each other; with twice the width
        and context they were 4 % apart. References are renewed often enough to be lost."""
        options = {"layers": 1, "width": 32, "context": 32, "batch": 8, "lr": 4e-3, "warmup": 20}
        return RunFile(
            name="real",
            task_options={**options, "decay_steps": self.rounds * self.inner_steps},
            mode="push-sum",
            codec=self.codec,
            inner_steps=self.inner_steps,
            rounds=self.rounds,
            start_members=MEMBERS - self.faulty,
            snapshot_rounds=3,
            mixing=Mixing(reference_rounds=5),
            timing=Timing(grace_ms=3_000, deadline_floor_ms=30_000, deadline_ceiling_ms=60_000, resend_ms=500),
        )

    # -- processes ----------------------------------------------------------------------------------------------------

    def start(self, member: int) -> None:
        """A first start joins by the invite; later ones resume from the disk."""
        self.lives[member] += 1
        life = self.lives[member]
        faults = {**self.losses.faults, "seed": 1000 * self.seed + 10 * member + life}
        faults |= {"log": str(self.root / f"{member}.faults"), "die_round": self._death(member, life)}
        command = [sys.executable, MEMBER, json.dumps(faults), "join"]
        command += [str(self.founded.invite)] if life == 1 else []
        command += ["--home", str(self.root / str(member)), "--name", f"m{member}", "--discovery", "rendezvous"]
        command += ["--listen", self.founded.listen if member == 0 else "127.0.0.1:0", "--plain", "--device", "cpu"]
        command += ["--threads", "1", "--eval-rounds", "1"]
        with (self.root / f"{member}.log").open("a") as log:
            self.children[member] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.memory[member] = []

    def _death(self, member: int, life: int) -> int:
        return self.rounds // 2 if self.faulty and member == VICTIM and life == 1 else 0

    def play(self) -> None:
        """From the start to the last member's end. Raises TimeoutError with the ends of the logs."""
        self.start(0)
        begun_s = time.monotonic()
        while not (self.directory(0) / "status.json").exists():
            if self.children[0].poll() is not None or time.monotonic() - begun_s > STALL_S:
                raise TimeoutError(f"the founder does not listen\n{self.tails()}")
            time.sleep(0.1)
        for member in range(1, MEMBERS - self.faulty):
            self.start(member)
        seen, seen_s, killed_s = -1, time.monotonic(), 0.0
        while any(child.poll() is None for child in self.children.values()):
            time.sleep(0.2)
            tip, now_s = self.tip(), time.monotonic()
            self._look()
            if tip != seen:
                seen, seen_s = tip, now_s
                self.began_s = self.began_s or now_s
            if now_s - seen_s > STALL_S:
                raise TimeoutError(f"no round in {STALL_S:.0f} s\n{self.tails()}")
            if self.faulty and not self.lives[LATE] and tip >= self.rounds // 3:
                self.start(LATE)
            for member, child in list(self.children.items()):
                if child.poll() == -9 and member == VICTIM and self.lives[member] == 1:
                    killed_s = killed_s or now_s
                    if now_s - killed_s >= DOWN_S:
                        self.start(member)
                elif child.poll():
                    raise TimeoutError(f"member {member} ended with {child.returncode}\n{self.tails()}")
        self.ended_s = time.monotonic()

    def stop(self) -> None:
        """Nothing is left running."""
        for child in self.children.values():
            if child.poll() is None:
                child.kill()
            child.wait()

    def _look(self) -> None:
        for member, child in self.children.items():
            if child.poll() is not None:
                continue
            sizes = []
            for path in self.directory(member).glob("blobs/*"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:  # pruned meanwhile
                    continue
            self.disk.setdefault(member, []).append((len(sizes), sum(sizes)))
            try:
                self.memory[member].append(psutil.Process(child.pid).memory_info().rss)
            except psutil.Error:
                continue

    # -- what they left -----------------------------------------------------------------------------------------------

    def directory(self, member: int) -> Path:
        return self.root / str(member) / "runs" / self.founded.genesis.run_id.hex()

    def log(self, member: int) -> list[dict[str, Any]]:
        """Its rounds; a line that a kill cut off is not there."""
        path, entries = self.directory(member) / "rounds.jsonl", []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return entries

    def tip(self) -> int:
        """Trained rounds, as the founder knows."""
        log = self.log(0)
        return int(log[-1]["trained"]) if log else 0

    def validation(self, member: int) -> dict[int, float]:
        """Round -> loss of this member's own parameters after it."""
        return {
            int(at): float(loss) for at, loss in (read_progress(self.directory(member)) or {}).get("validation", [])
        }

    def words(self, pattern: str) -> int:
        """Lines of all logs that match."""
        found = re.compile(pattern)
        return sum(
            1 for path in self.root.glob("*.log") for line in path.read_text().splitlines() if found.search(line)
        )

    def fates(self) -> Counter[tuple[str, str]]:
        """(kind of message, what became of it) -> how many."""
        lines = [line for path in self.root.glob("*.faults") for line in path.read_text().splitlines()]
        return Counter((what, fate) for _, what, fate in map(json.loads, lines))

    def tails(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.root.glob("*.log")))


def summary(play: Play) -> dict[str, Any]:
    """What came of it: one row of the first table."""
    logs = [play.log(member) for member in play.children]
    entries = [entry for log in logs for entry in log]
    last = max(int(entry["round"]) for entry in entries)
    curves = [play.validation(member) for member in play.children]
    finals = [curve[last] for curve in curves if last in curve]
    states: dict[int, set[str]] = {}
    for entry in entries:
        states.setdefault(int(entry["round"]), set()).add(str(entry["state"]))
    return {
        "codec": play.codec,
        "lost": play.losses.what,
        "rounds": int(logs[0][-1]["trained"]),
        "finished": len(finals),
        "loss": statistics.mean(finals),
        "worst": max(finals),
        "mass error": max(float(entry.get("mass_error", 0.0)) for entry in entries),
        "limbo": max(float(entry.get("mass_limbo", 0.0)) for entry in entries),
        "audits": sum("mass_error" in entry for entry in entries),
        "with unseen": sum(float(entry.get("mass_unseen", 0.0)) > 0 for entry in entries),
        "discrepancies": play.words("mass is not conserved"),
        "states differ": sum(len(found) > 1 for found in states.values()),
        "warnings": play.words(r"\d (?:warning|error|critical): |Traceback"),
    }


def costs(play: Play) -> dict[str, Any]:
    """What it took: one row of the second table. Seconds are of this machine; vectors are counted by attempts."""
    logs = {member: play.log(member) for member in play.children}
    entries = [entry for log in logs.values() for entry in log]
    fates = play.fates()
    vectors = sum(count for (what, _), count in fates.items() if what == "vector")
    mix_s = [float(entry["mix_seconds"]) for entry in entries if "mix_seconds" in entry]
    return {
        "codec": play.codec,
        "lost": play.losses.what,
        "vectors": vectors,
        "lost v.": vectors - fates["vector", "sent"],
        "lost notes": fates["note", "lost"],
        "given up": sum(int(entry.get("mix_given_up", 0)) for entry in entries),
        "mix s": statistics.median(mix_s),
        "mix s max": max(mix_s),
        "wall s": play.ended_s - play.began_s,
        "MB up": statistics.mean(sum(entry["bytes_up"] for entry in log) for log in logs.values()) / 1e6,
        "blobs max": max(count for member in logs for count, _ in play.disk[member]),
        "blobs MB max": max(size for member in logs for _, size in play.disk[member]) / 1e6,
        "blobs at end": max(play.disk[member][-1][0] for member in logs),
        "RSS +MB": max(_growth(play.memory[member]) for member in logs) / 1e6,
    }


def _growth(resident: Sequence[int]) -> float:
    """From the middle of a process' life to its end."""
    if len(resident) < 40:
        return 0.0
    middle, tenth = len(resident) // 2, max(1, len(resident) // 10)
    return statistics.median(resident[-tenth:]) - statistics.median(resident[middle : middle + tenth])


def returns(play: Play) -> dict[str, Any]:
    """How the killed and the late member came back; rounds are counted from the last in which they were missing."""
    fate = next(fate for what, fate in play.fates() if what == "life")
    killed_in = int(re.findall(r"\d+", fate)[0])
    found: dict[str, Any] = {"codec": play.codec, "lost": play.losses.what, "killed in": killed_in}
    others = [member for member in play.children if member not in (VICTIM, LATE)]
    curves = {member: play.validation(member) for member in play.children}
    for name, member, after in (("killed", VICTIM, killed_in), ("late", LATE, 0)):
        mixed = {int(e["round"]): e for e in play.log(member) if int(e["round"]) > after and e.get("mix_held_weight")}
        behind = [int(entry["mix_behind"]) for _, entry in sorted(mixed.items())]
        gaps = {
            index: loss / statistics.mean(curves[other][index] for other in others)
            for index, loss in sorted(curves[member].items())
            if index > after and all(index in curves[other] for other in others)
        }
        if not gaps:  # the run was over before it came
            continue
        first = min(gaps)
        level = next((index for index in gaps if all(gap < NEAR for at, gap in gaps.items() if at >= index)), None)
        found |= {
            f"{name}: back in": first,
            f"{name}: behind": " ".join(map(str, behind[:4])),
            f"{name}: gap": f"{gaps[first] - 1:+.1%}",
            f"{name}: level after": None if level is None else level - first,
        }
    return found


def show(out: Path, rows: Sequence[Row], took: Sequence[Row], back: Sequence[Row]) -> bool:
    """Tables, CSV files and goals; whether all were reached."""
    lines, sound = [], True
    for row in rows:
        whole = next((r["loss"] for r in rows if r["codec"] == row["codec"] and r["lost"] == "nothing"), None)
        gap = row["loss"] / whole - 1 if whole else float("nan")
        safe = row["mass error"] < 1e-6 and not row["discrepancies"] and not row["states differ"]
        reached = safe and gap <= 0.02 and row["finished"] == MEMBERS
        sound &= reached
        lines.append(
            goal(
                f"{row['codec']}, {row['lost']} lost: loss {gap:+.2%} (goal 2 %), mass error {row['mass error']:.1e} "
                f"in {row['audits']} audits, {row['discrepancies']} discrepancies",
                reached,
            )
        )
    publish(out, "push_sum_real", rows, title=f"push-sum among {MEMBERS} processes on loopback", notes=lines)
    publish(out, "push_sum_real_costs", took, title="what it took, per member where not counted", notes=[noise()])
    if back:
        publish(out, "push_sum_real_returns", back, title="the killed member and the late one", notes=[])
    return sound


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--codecs", nargs="*", default=["fp32", "int8"])
    parser.add_argument("--losses", nargs="*", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--inner-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where homes and logs stay, for those who want to look")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rows, took, back, failed = list[Row](), list[Row](), list[Row](), False
    for codec, name in [(codec, name) for codec in args.codecs for name in args.losses]:
        root = Path(tempfile.mkdtemp(prefix="farflung-real-"))
        play = Play(root, codec, LOSSES[name], args.rounds, args.inner_steps, args.seed)
        try:
            play.play()
            rows.append(summary(play))
            took.append(costs(play))
            back += [returns(play)] if play.faulty else []
            for row in (rows[-1], took[-1], *(back[-1:] if play.faulty else ())):
                console.print(json.dumps(row), highlight=False, soft_wrap=True)
        except TimeoutError as error:
            failed = True
            console.print(f"{codec}, {name}: {error}", style="red", markup=False, highlight=False)
        except KeyboardInterrupt:
            console.print("interrupted: what there is so far follows")
            failed = True
            break
        finally:
            play.stop()
            if args.keep is not None:
                shutil.copytree(root, args.keep / f"{codec}-{name}", dirs_exist_ok=True)
            shutil.rmtree(root, ignore_errors=True)
    sound = show(args.out, rows, took, back) if rows else False
    sys.exit(0 if sound and not failed else 1)


if __name__ == "__main__":
    main()
