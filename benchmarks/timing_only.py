"""How long does a timing-only simulation take? home-40 at three model sizes, classical exchanges, 1,000 members."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

from report import arguments, goal, noise, publish

from farflung.sim.draw import Draw
from farflung.sim.results import RunResult
from farflung.sim.scenario import Scenario
from farflung.sim.scenario_file import load_scenario
from farflung.sim.timing import run_timing

GOAL_S = 1.0
COLD = (
    "import time; start = time.perf_counter(); from dataclasses import replace;"
    "from farflung.sim.scenario_file import load_scenario; from farflung.sim.timing import run_timing;"
    "loaded = time.perf_counter() - start;"
    "run_timing(replace(load_scenario('home-40'), rounds=1), 0);"
    "print(loaded, time.perf_counter() - start - loaded)"
)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case; the median counts")
    parser.add_argument("--rounds", type=int, default=100, help="rounds of the 40-member cases")
    options = parser.parse_args()
    # A first process may have to compile; the second finds the machine code on disk.
    rows: list[dict[str, object]] = []
    for what in ("first process", "second process"):
        answer = subprocess.run([sys.executable, "-c", COLD], check=True, capture_output=True, text=True).stdout
        imports_s, first_s = map(float, answer.split())
        rows.append({"case": f"warm-up: {what}", "seconds": imports_s + first_s})
    for name, scenario in cases(options.rounds):
        run_timing(replace(scenario, rounds=1), 0)
        rows.append(measured(name, scenario, options.repeats))
    home = next(row for row in rows if row["case"] == "home-40")
    notes = [
        goal(f"home-40 in {home['seconds']:.2f} s, wanted below {GOAL_S:g} s", float(str(home["seconds"])) < GOAL_S)
    ]
    publish(options.out, "timing_only", rows, title="Timing-only simulation", notes=[*notes, noise()])


def cases(rounds: int) -> Iterator[tuple[str, Scenario]]:
    home = replace(load_scenario("home-40"), rounds=rounds, loss_goal=0.0)
    patient = replace(home.run, deadline_ceiling_s=36_000)
    yield "home-40", home
    for params in (10e9, 100e9):
        group = replace(home.members[0], gpu="", step_ms=Draw.fixed(5000))
        yield (
            f"home-40, {params / 1e9:g}B",
            replace(home, model=replace(home.model, params=params), members=(group,), run=patient),
        )
    dense = replace(patient, codec="int8")
    for exchange in ("gather", "star", "ring", "butterfly"):
        yield f"home-40, int8, {exchange}", replace(home, run=replace(dense, exchange=exchange))
    crowd = replace(home.members[0], count=1000)
    yield "1,000 members, 10 rounds", replace(home, members=(crowd,), rounds=10)


def measured(name: str, scenario: Scenario, repeats: int) -> dict[str, object]:
    seconds, result = [], None
    for seed in range(repeats):
        start = time.perf_counter()
        result = run_timing(scenario, seed)
        seconds.append(time.perf_counter() - start)
    assert isinstance(result, RunResult)
    return {
        "case": name,
        "seconds": median(seconds),
        "ms_per_round": 1e3 * median(seconds) / max(1, len(result.rounds)),
        "rounds": len(result.rounds),
        "virtual_hours": result.duration_s / 3600,
        "utilisation": result.utilisation,
        "payload_mb": result.extra["payload_bytes"] / 1e6,
    }


if __name__ == "__main__":
    main()
