"""kill -9 at random instants: four `farflung join` processes, and one of them is always dying.

    python benchmarks/kill_soak.py --kills 20 --seed 0

Every kill picks a member (every third time this round's proposer) and an instant, both from the seed; the member is
restarted at once. Checked each time: the others finish their round within the round's deadline; the killed one comes
back as a member with the same state; no update of the other three is missing from any certificate meanwhile. At the
end all four are killed at once, and the run must go on. Exit status 1 if anything of this does not hold.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import arguments, console, goal, noise, publish

from farflung.node.founding import found_run
from farflung.node.journal import CertificateLog
from farflung.node.run_file import RunFile
from farflung.node.store import open_home
from farflung.protocol.certificate import decode_certificate
from farflung.protocol.genesis import Timing
from farflung.protocol.manifest import proposer_order

MEMBERS = 4
DEADLINE_S, VIEW_S = 20.0, 2.0
TIMING = Timing(  # on a busy machine a member may train for seconds longer than usual: the floor says when that is late
    grace_ms=2_000,
    deadline_floor_ms=int(DEADLINE_S * 1e3),
    deadline_ceiling_ms=int(DEADLINE_S * 1e3),
    view_floor_ms=int(VIEW_S * 1e3),
    resend_ms=300,
)
BACK_S = 120.0
"""How long a killed member may take to be a member again: it imports torch on a busy machine first."""


class Soak:
    """The four processes and what their disks say."""

    def __init__(self, root: Path, inner_steps: int) -> None:
        self.root = root
        run = RunFile(
            name="soak",
            task_options={"layers": 1, "width": 32, "context": 32, "batch": 4},
            inner_steps=inner_steps,
            start_members=MEMBERS,
            snapshot_rounds=3,
            timing=TIMING,
        )
        homes = [open_home(root / str(member)) for member in range(MEMBERS)]
        self.ids = [str(home.identity.peer_id) for home in homes]
        self.founded = found_run(run, homes[0], listen="127.0.0.1:0")
        self.children: list[subprocess.Popen[Any] | None] = [None] * MEMBERS

    def start(self, member: int) -> None:
        """A first start joins by the invite; later ones resume."""
        home = self.root / str(member)
        known = any((home / "runs").glob("*/genesis")) if member else True
        command = [sys.executable, "-m", "farflung", "join", *([] if known else [str(self.founded.invite)])]
        command += ["--home", str(home), "--discovery", "rendezvous", "--plain", "--threads", "1", "--eval-rounds", "0"]
        command += ["--listen", self.founded.listen if member == 0 else "127.0.0.1:0"]
        log = (self.root / f"{member}.log").open("a")
        self.children[member] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def kill(self, member: int) -> None:
        child = self.children[member]
        assert child is not None
        child.kill()
        child.wait()

    def rounds(self, member: int) -> dict[int, dict[str, Any]]:
        """A member's round log; what a kill cut off is not there."""
        entries = {}
        for path in (self.root / str(member) / "runs").glob("*/rounds.jsonl"):
            for line in path.read_text(errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    entries[entry["round"]] = entry
                except (ValueError, KeyError):
                    continue
        return entries

    def tip(self, member: int) -> int:
        return max(self.rounds(member), default=0)

    def proposer(self, member: int) -> int:
        """Who should propose the round that this member is in."""
        with tempfile.TemporaryDirectory() as folder:
            path = next((self.root / str(member) / "runs").glob("*/certificates.log"))
            copy = shutil.copy(path, folder)
            log = CertificateLog(Path(copy))
            data = log.certificate(log.next_round - 1)
            log.close()
        assert data is not None
        return self.ids.index(str(proposer_order(decode_certificate(data).manifest)[0]))

    def wait(self, what: str, holds: Any, seconds: float) -> float:
        """Seconds until `holds()`. Raises TimeoutError with the ends of the logs."""
        began_s = time.monotonic()
        while not holds():
            for member, child in enumerate(self.children):
                if child is not None and child.poll() not in (None, -9):
                    raise TimeoutError(f"{what}: member {member} ended with {child.returncode}\n{self.tails()}")
            if time.monotonic() - began_s > seconds:
                raise TimeoutError(f"{what}: not within {seconds:.0f} s\n{self.tails()}")
            time.sleep(0.05)
        return time.monotonic() - began_s

    def whole(self, after: int) -> bool:
        """Whether a later round lists payloads of all members, and every member has it on disk with the same state."""
        logs = [self.rounds(member) for member in range(MEMBERS)]
        common = [index for index in set.intersection(*(set(log) for log in logs)) if index > after]
        full = [i for i in common if sum(p["bytes"] > 0 for p in logs[0][i]["payloads"].values()) == MEMBERS]
        return bool(full)

    def different_states(self) -> int:
        """Rounds in which two members' states differ."""
        states: dict[int, set[str]] = {}
        for member in range(MEMBERS):
            for index, entry in self.rounds(member).items():
                states.setdefault(index, set()).add(entry["state"])
        return sum(len(found) > 1 for found in states.values())

    def tails(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-1200:]}" for path in sorted(self.root.glob("*.log")))

    def stop(self) -> None:
        for child in self.children:
            if child is not None and child.poll() is None:
                child.terminate()
        for child in self.children:
            if child is not None:
                try:
                    child.wait(15)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()


def one_kill(soak: Soak, number: int, rng: random.Random, round_s: float) -> dict[str, Any]:
    """Kill, watch the others, restart, watch it come back."""
    time.sleep(rng.uniform(0.0, round_s))
    wanted = rng.randrange(MEMBERS)
    witness = (wanted + 1) % MEMBERS
    proposer = soak.proposer(witness)
    victim = proposer if number % 3 == 0 else wanted
    others = [member for member in range(MEMBERS) if member != victim]
    before = max(soak.tip(member) for member in others)
    soak.kill(victim)
    limit_s = DEADLINE_S + 6 * VIEW_S
    took_s = soak.wait("the others' round", lambda: min(soak.tip(m) for m in others) > before, 6 * limit_s)
    soak.start(victim)
    back_s = soak.wait("its return", lambda: soak.whole(before + 1), BACK_S)
    last = min(soak.tip(member) for member in range(MEMBERS))
    lost = 0
    for index in range(before + 1, last + 1):
        payloads = soak.rounds(others[0])[index]["payloads"]
        if any(part["bytes"] for part in payloads.values()):  # a void round loses nothing: updates wait for the next
            lost += sum(payloads.get(soak.ids[m], {"bytes": 0})["bytes"] == 0 for m in others)
    views = sum(soak.rounds(others[0])[index]["view"] for index in range(before + 1, last + 1))
    return {
        "kill": number,
        "member": victim,
        "proposer": "yes" if victim == proposer else "",
        "in round": before + 1,
        "others' round s": took_s,
        "in time": "yes" if took_s <= limit_s else "NO",
        "back after s": back_s,
        "rounds meanwhile": last - before,
        "others' updates lost": lost,
        "view changes": views,
        "states differ": soak.different_states(),
    }


def restart_all(soak: Soak) -> dict[str, Any]:
    before = max(soak.tip(member) for member in range(MEMBERS))
    for child in soak.children:
        assert child is not None
        child.kill()
    for member in range(MEMBERS):
        soak.kill(member)
        soak.start(member)
    back_s = soak.wait("the run after a restart of all", lambda: soak.whole(before + 1), BACK_S)
    return {
        "tip before": before,
        "a round of all four after s": back_s,
        "tip after": min(soak.tip(member) for member in range(MEMBERS)),
        "states differ": soak.different_states(),
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inner-steps", type=int, default=150, help="sets how long a round lasts")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    root = Path(tempfile.mkdtemp(prefix="farflung-soak-"))
    soak, rows = Soak(root, args.inner_steps), list[dict[str, Any]]()
    failed = ""
    again: list[dict[str, Any]] = []
    try:
        soak.start(0)
        soak.wait("the founder", lambda: any((root / "0" / "runs").glob("*/status.json")), 60)
        for member in range(1, MEMBERS):
            soak.start(member)
        soak.wait("the first rounds", lambda: soak.whole(4), BACK_S)
        round_s = statistics.median(entry["round_s"] for entry in soak.rounds(0).values() if entry["payloads"])
        for number in range(args.kills):
            rows.append(one_kill(soak, number, rng, max(round_s, 0.5)))
            console.print(json.dumps(rows[-1]), highlight=False, soft_wrap=True)
        again.append(restart_all(soak))
    except TimeoutError as error:
        failed = str(error)
        console.print(failed, style="red", markup=False, highlight=False)
    finally:
        soak.stop()
        for path in root.glob("*.log"):
            args.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, args.out / f"kill_soak_{path.name}")
        shutil.rmtree(root, ignore_errors=True)
    late = sum(row["in time"] != "yes" for row in rows)
    lost = sum(row["others' updates lost"] for row in rows)
    differ = max((row["states differ"] for row in rows + again), default=0)
    sound = not failed and not late and not lost and not differ
    publish(
        args.out,
        "kill_soak",
        rows,
        title=f"kill -9 of one of {MEMBERS}, seed {args.seed}",
        notes=[
            f"the others' round: limit {DEADLINE_S + 6 * VIEW_S:.0f} s (deadline ceiling and three views)",
            noise(),
            goal(
                f"{late} rounds late, {lost} updates of uninvolved members lost, {differ} rounds with two states", sound
            ),
        ],
    )
    publish(args.out, "kill_soak_all", again, title="kill -9 of all four at once")
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
