"""Trajectories on disk: JSON, one file for each key, written whole or not at all, and read strictly."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from farflung.protocol.errors import ConfigError
from farflung.sim.results import RunResult
from farflung.sim.scenario import Scenario
from farflung.sim.simulate import Tell
from farflung.sim.trajectory import TrainedRound, Trajectory, clock, combine, key_of, train, values_of
from farflung.sim.trajectory_ground import Ground, ground_of

VERSION = 1
"""Of the files; another one is refused."""

FILE_BYTES_MAX = 1 << 28
"""About a million rounds: no scenario has more."""


def default_shelf() -> Path:
    """Among the user's caches (XDG)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farflung" / "trajectories"


class Shelf:
    """The trajectories in a folder; what is not there is trained and put there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Trajectory | ConfigError] = {}

    def answer(
        self, scenario: Scenario, seed: int, *, folder: Path | None = None, tell: Tell | None = None
    ) -> RunResult:
        """`trajectory.apply` with the scenario's own trajectory. A network that is refused is not trained for.

        `folder` is where trace files are. Raises ConfigError as `apply`, `train` and `read_trajectory` do.
        """
        values = values_of(scenario, seed)
        timed = clock(scenario, seed, ground_of(scenario.model.task, str(values["options"])), folder=folder)
        return combine(self.trajectory(scenario, seed, tell=tell), scenario, timed)

    def trajectory(self, scenario: Scenario, seed: int, *, tell: Tell | None = None) -> Trajectory:
        """From memory, from the disk, or trained now. One that could not be trained is not tried again."""
        values = values_of(scenario, seed)
        key = key_of(values, ground_of(scenario.model.task, str(values["options"])), scenario.rounds)
        if key not in self._known:
            try:
                self._known[key] = self._fetch(key, scenario, seed, tell)
            except ConfigError as error:
                self._known[key] = error
        known = self._known[key]
        if isinstance(known, ConfigError):
            raise known
        return known

    def _fetch(self, key: str, scenario: Scenario, seed: int, tell: Tell | None) -> Trajectory:
        path = self._folder / f"{key}.json"
        if path.exists():
            found = read_trajectory(path)
            if found.key != key:
                raise ConfigError(f"{path} holds another trajectory: remove it, got {found.key}")
            return found
        trajectory = train(scenario, seed, tell=tell)
        write_trajectory(trajectory, path)
        return trajectory


def write_trajectory(trajectory: Trajectory, path: Path) -> None:
    """Write it there, with folders as needed; floats come back bit for bit. Raises ConfigError if that fails."""
    body = {
        "values": dict(trajectory.values),
        "ground": asdict(trajectory.ground),
        "rounds": [[_to_json(value) for value in asdict(item).values()] for item in trajectory.rounds],
    }
    text = _text(body)
    whole = f'{{"version": {VERSION}, "digest": "{_digest(text)}", "trajectory": {text}}}\n'
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(whole, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"the trajectory cannot be kept, set XDG_CACHE_HOME to a folder of yours: {error}") from None


def read_trajectory(path: Path) -> Trajectory:
    """What `write_trajectory` wrote. Raises ConfigError for anything else: a torn, edited or newer file."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ValueError(f"{path.stat().st_size} bytes")
        whole = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(whole, dict) or whole.keys() != {"version", "digest", "trajectory"}:
            raise ValueError("keys are not version, digest, trajectory")
        if whole["version"] != VERSION:
            raise ValueError(f"version {whole['version']}, this is farflung for version {VERSION}")
        body = whole["trajectory"]
        if whole["digest"] != _digest(_text(body)):
            raise ValueError("it is not what was written")
        if not isinstance(body, dict) or body.keys() != {"values", "ground", "rounds"}:
            raise ValueError("keys are not values, ground, rounds")
        return Trajectory(_values(body["values"]), _ground(body["ground"]), tuple(map(_round, body["rounds"])))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"not a trajectory, remove it: {path}: {error}") from None


def _text(body: Any) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _to_json(value: float | None) -> float | str | None:
    """JSON has no infinity, and a training that diverged has."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: object) -> float | None:
    if value is None or type(value) is float:
        return value
    if value in ("nan", "inf", "-inf"):
        return float(str(value))
    raise ValueError(f"a loss is a number or null, got {value!r}")


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a count is a whole number from 0 on, got {value!r}")
    return value


def _round(item: object) -> TrainedRound:
    if not isinstance(item, list) or len(item) != len(fields(TrainedRound)):
        raise ValueError(f"a round is a list of {len(fields(TrainedRound))}, got {item!r}")
    index, loss, validation, participants, payload_bytes = item
    return TrainedRound(
        _whole(index), _from_json(loss), _from_json(validation), _whole(participants), _whole(payload_bytes)
    )


def _ground(value: Any) -> Ground:
    hints = get_type_hints(Ground)
    if not isinstance(value, dict) or value.keys() != hints.keys():
        raise ValueError(f"a ground has {', '.join(hints)}")
    for name, part in value.items():
        if type(part) is not hints[name]:
            raise ValueError(f"{name} is a {hints[name].__name__}, got {part!r}")
    return Ground(**value)


VALUES = {
    **dict.fromkeys(("task", "options", "codec", "rule", "outer", "weights"), str),
    **dict.fromkeys(("inner_steps", "members", "seed"), int),
    "attacks": list,
}
"""What `values_of` gives, and of what type."""


def _values(value: Any) -> dict[str, object]:
    if not isinstance(value, dict) or value.keys() != VALUES.keys():
        raise ValueError(f"values are {', '.join(VALUES)}")
    for name, part in value.items():
        if type(part) is not VALUES[name]:
            raise ValueError(f"{name} is a {VALUES[name].__name__}, got {part!r}")
    for item in value["attacks"]:
        if not isinstance(item, list) or [type(part) for part in item] != [int, str, float]:
            raise ValueError(f"an attack is a member, a kind and a strength, got {item!r}")
    return dict(value)
