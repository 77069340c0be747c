"""Is the simulator right about this machine? `farflung demo` is predicted from a short live run, then really run.

    python benchmarks/predict_demo.py            # about a minute of calibration, a simulation, three live demos

In this order, so that nothing can be fitted to what is to be predicted: a short demo runs live, `sim calibrate` reads
what its members logged, the long demo is simulated with training in the loop and the prediction is written down, then
the long demo runs live a few times. Data order follows the members' keys, which every demo makes anew: losses
differ between live runs and between seeds of the simulator by that, and by nothing else.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median

from report import arguments, cannot_run, console, goal, noise, publish

from farflung.node.demo import DemoSettings
from farflung.sim.calibrate import Calibration, calibrate
from farflung.sim.results import RunResult
from farflung.sim.scenario import Scenario

WALL_SHARE, SPREADS, LOSS_SHARE = 0.10, 2.0, 0.01
"""The goal: wall-clock within 10 % of the live median, or twice the live spread; final loss within 1 %."""

ROUND_S_MAX = 60.0
"""A demo that takes longer per round than this is stopped."""


@dataclass(frozen=True)
class Outcome:
    """One run, live or simulated."""

    who: str
    wall_s: float
    rounds: int
    loss: float
    sent_mb: float
    """By one member, mean."""
    load: str

    def row(self) -> dict[str, object]:
        """For the table."""
        return {
            "run": self.who,
            "wall s": round(self.wall_s, 1),
            "rounds": self.rounds,
            "validation loss": round(self.loss, 4),
            "MB sent per member": round(self.sent_mb, 2),
            "load before": self.load,
        }


def live(who: str, members: int, rounds: int, folder: Path) -> Outcome:
    """Run the demo."""
    load, result = noise(), folder.with_suffix(".json")
    console.print(f"{who}: {rounds} rounds live; {load}", highlight=False)
    command = [sys.executable, "-m", "farflung", "demo", "--plain", "--out", str(folder), "--json", str(result)]
    command += ["--members", str(members), "--rounds", str(rounds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120 + ROUND_S_MAX * rounds, check=False)
    except subprocess.TimeoutExpired:
        cannot_run(f"{who} took more than {ROUND_S_MAX:.0f} s per round")
    if done.returncode:
        cannot_run(f"{who} ended with status {done.returncode}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    facts = json.loads(result.read_text())
    sent = [member["bytes_up"] for member in facts["per_member"]]
    return Outcome(who, facts["wall_s"], facts["rounds"], facts["validation_loss"], fmean(sent) / 1e6, load)


def simulate(scenario: Scenario, seed: int) -> RunResult:
    """One simulated run. Runs in a process of its own."""
    from farflung.sim.training import run_training

    return run_training(scenario, seed)


def predict(calibration: Calibration, around_s: float, settings: DemoSettings, seeds: int) -> list[Outcome]:
    """The demo with these settings, once per seed."""
    scenario, load = calibration.standing_for(settings.run_file()), noise()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        results = list(pool.map(simulate, [scenario] * seeds, range(seeds)))
    outcomes = []
    for result in results:
        span_s = result.rounds[-1].end_s - result.rounds[0].start_s
        sent = fmean(member.bytes_sent for member in result.members) / 1e6
        loss = math.nan if result.final_loss is None else result.final_loss
        who = f"predicted, seed {result.seed}"
        outcomes.append(Outcome(who, around_s + span_s, len(result.rounds), loss, sent, load))
        console.print(f"{who}: {result.wall_s:.0f} s to simulate", highlight=False)
    return outcomes


def verdict(predicted: list[Outcome], lived: list[Outcome]) -> list[str]:
    """The goals, in words."""
    wall_s, loss = fmean(item.wall_s for item in predicted), fmean(item.loss for item in predicted)
    walls, losses = [item.wall_s for item in lived], [item.loss for item in lived]
    live_s, spread_s, live_loss = median(walls), max(walls) - min(walls), median(losses)
    room_s = max(WALL_SHARE * live_s, SPREADS * spread_s)
    off_s, off = wall_s - live_s, loss / live_loss - 1
    live_wall = f"{live_s:.1f} s live (median of {len(lived)}, spread {spread_s:.1f} s)"
    seeds = f"seeds {min(item.loss for item in predicted):.4f} to {max(item.loss for item in predicted):.4f}"
    return [
        goal(
            f"wall-clock {wall_s:.1f} s predicted, {live_wall}: "
            f"off by {off_s:+.1f} s ({100 * off_s / live_s:+.1f} %), allowed {room_s:.1f} s",
            abs(off_s) <= room_s,
        ),
        goal(
            f"final loss {loss:.4f} predicted ({seeds}), {live_loss:.4f} live "
            f"({min(losses):.4f} to {max(losses):.4f}): off by {100 * off:+.2f} %, allowed {100 * LOSS_SHARE:.0f} %",
            abs(off) <= LOSS_SHARE,
        ),
    ]


def error_s(calibration: Calibration, rounds: int) -> float:
    """Standard error of the predicted time: of the mean round, and of so many rounds' luck."""
    seen = calibration.round_s
    per_round_s = seen.error * math.sqrt(calibration.rounds_used)
    return math.hypot(rounds * seen.error, math.sqrt(rounds) * per_round_s)


def main() -> int:
    """See the module."""
    parser = arguments("A live demo against its prediction.")
    parser.add_argument("--members", type=int, default=4, help="processes")
    parser.add_argument("--calibration-rounds", type=int, default=16, help="of the live run that is calibrated on")
    parser.add_argument("--rounds", type=int, default=DemoSettings.rounds, help="of the demo that is predicted")
    parser.add_argument("--repeats", type=int, default=3, help="live demos")
    parser.add_argument("--seeds", type=int, default=2, help="simulated demos")
    options = parser.parse_args()
    settings = DemoSettings(members=options.members, rounds=options.rounds)
    with tempfile.TemporaryDirectory(prefix="farflung-predict-") as scratch:
        folder = Path(scratch)
        short = live("calibration", options.members, options.calibration_rounds, folder / "calibration")
        calibration = calibrate([folder / "calibration"])
        around_s = calibration.around_s(short.wall_s)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "predict_demo.toml").write_text(calibration.toml(), encoding="utf-8")
        console.print(calibration.toml().partition("\n\n")[0], highlight=False, markup=False)
        console.print(f"starting, finding each other and leaving: {around_s:.1f} s", highlight=False)
        predicted = predict(calibration, around_s, settings, options.seeds)
        known_s = error_s(calibration, options.rounds)
        publish(
            options.out,
            "predict_demo_before",
            [item.row() for item in predicted],
            title="predicted, before the demo ran",
            notes=[f"standard error of the wall-clock {known_s:.1f} s, if the machine stays as it was"],
        )
        lived = [
            live(f"live {number}", options.members, options.rounds, folder / f"live-{number}")
            for number in range(1, options.repeats + 1)
        ]
    rows = [item.row() for item in (short, *predicted, *lived)]
    publish(options.out, "predict_demo", rows, title="a demo and its prediction", notes=[noise()])
    for line in verdict(predicted, lived):
        console.print(line, highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
