"""One run of one scenario, in the fidelity that it asks for: `farflung.simulate("home-40", seed=1)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from farflung.protocol.errors import ConfigError
from farflung.sim.changes import change_all, full_key
from farflung.sim.results import RunResult
from farflung.sim.scenario import Scenario
from farflung.sim.scenario_file import load_scenario, scenario_folder

Tell = Callable[[int, int], None]
"""Progress within a run: (rounds that trained so far, rounds in all)."""


def simulate(
    scenario: Scenario | str | Path,
    *,
    seed: int = 0,
    changes: Mapping[str, object] | None = None,
    folder: Path | None = None,
    log: Path | None = None,
    tell: Tell | None = None,
) -> RunResult:
    """Simulate once; equal arguments give equal results but for `wall_s`.

    `scenario` is a value, a preset's name or a file. `changes` are settings by path or short name, as for a sweep:
    {"codec": "int8", "uplink": 50}. `folder` is where trace files are looked for; by default beside the scenario's
    file. `log` is a file for the event log, and `tell` hears of rounds: both in training fidelity only. Timing takes a
    second or so, training minutes. Raises ConfigError for what the user can fix.
    """
    if not isinstance(scenario, Scenario):
        folder = folder if folder is not None else scenario_folder(scenario)
        scenario = load_scenario(scenario)
    texts = {full_key(key): str(value) for key, value in (changes or {}).items()}
    return run_scenario(change_all(scenario, texts), seed, changes=texts, folder=folder, log=log, tell=tell)


def run_scenario(
    scenario: Scenario,
    seed: int,
    *,
    changes: Mapping[str, str],
    folder: Path | None = None,
    log: Path | None = None,
    tell: Tell | None = None,
) -> RunResult:
    """Run what has been changed already; `changes` only says how, for the result. Raises ConfigError."""
    if scenario.fidelity == "training":
        from farflung.sim.training import run_training

        return replace(run_training(scenario, seed, folder=folder, log=log, tell=tell), changes=dict(changes))
    if log is not None:
        raise ConfigError(f"timing fidelity has no event log, only a digest: leave the log out, got {str(log)!r}")
    from farflung.sim.timing import run_timing

    return replace(run_timing(scenario, seed, folder=folder), changes=dict(changes))
