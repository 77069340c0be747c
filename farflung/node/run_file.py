"""A run as its founder writes it down: TOML in, genesis out. Every key is used or refused."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from farflung.aggregation.outer import parse_outer
from farflung.aggregation.registry import ParsedRule, parse_rule, robust_rule
from farflung.aggregation.weights import parse_weights
from farflung.compression import parse_codec
from farflung.node.anchor import first_buffers
from farflung.node.flat import read_parameters, schema_of
from farflung.node.mixing_check import check_mixing_run, default_codec, default_mixing, default_outer
from farflung.node.state_sync import first_state
from farflung.node.tasks.load import describe_task, load_task
from farflung.protocol import limits
from farflung.protocol.errors import ConfigError
from farflung.protocol.genesis import MODES, Genesis, Timing, secret_digest
from farflung.protocol.mixing.settings import Mixing

T = TypeVar("T")


@dataclass(frozen=True)
class RunFile:
    """A run's settings. Each has a default that trains the built-in model among a few trusting members."""

    name: str = "stdlib"
    """For people."""

    task: str = "builtin:stdlib-gpt"
    """What is trained: a built-in task or "module:object"."""

    task_options: Mapping[str, Any] = field(default_factory=dict)
    """The task's own options."""

    codec: str = ""
    """How updates travel. Left out: "ef(1)|q2", 2 bits per parameter with error feedback; where members mix "int8"."""

    mode: str = "gather"
    """How updates meet: "gather" (everybody gets every update), "push-sum" or "pairs" (docs/push-sum.md)."""

    mixing: Mixing | None = None
    """How they mix: the table [mixing]; only with push-sum or pairs. Left out: by the mode."""

    rule: str = ""
    """How updates are combined: "mean", "geometric-median(f=1)", ... (`farflung bench rule --list` has all). Left out:
    the mean if no member lies, otherwise the rule we would choose for so many liars."""

    liars: int = 0
    """How many members' updates may be lies; 0: everybody is trusted. Named again in the rule, as its f."""

    outer: str = ""
    """How the anchor moves: "sgd(lr=1.0)" averages models. Left out: Nesterov, and less of it where a round does not
    bring members together."""

    inner_steps: int = 30
    """Local steps per round. Traffic per step falls with it, and so, slowly, does what a step is worth."""

    rounds: int = 0
    """The run is over after this many; 0: never."""

    weights: str = "uniform"
    """What members count for: "uniform", "steps(cap=500)", "tokens(cap=100000)"."""

    closed: bool = True
    """Closed: only who has the invite's secret is admitted."""

    start_members: int = 0
    """Training starts when this many are there. Left out: 1, or as many as it takes for a quorum to be enough for the
    rule."""

    quorum_percent: int = 66
    """Share of members whose updates start the grace window."""

    snapshot_rounds: int = 5
    """How often members write the state to disk."""

    timing: Timing = field(default_factory=Timing)
    """How long rounds may wait."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode is one of {', '.join(MODES)}, got {self.mode!r}")
        if self.mixing is not None and self.mode == "gather":
            raise ConfigError('[mixing] is for runs with mode = "push-sum" or "pairs"')
        found = {
            "codec": self.codec or default_codec(self.mode),
            "mixing": self.mixing or (None if self.mode == "gather" else default_mixing(self.mode)),
        }
        found["outer"] = self.outer or default_outer(found["mixing"])  # type: ignore[arg-type]
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def parsed_rule(self) -> ParsedRule:
        """The rule, by name or by the number of liars. Raises ConfigError if the two disagree."""
        if self.liars < 0:
            raise ConfigError(f"liars is a number of members, got {self.liars}")
        if not self.rule:
            return parse_rule(robust_rule(self.liars) if self.liars else "mean")
        found = parse_rule(self.rule)
        if self.liars and found.f != self.liars:
            raise ConfigError(
                f"liars = {self.liars}, but the rule {found.spec!r} is asked to survive {found.f}: "
                f"leave the rule out, or name f={self.liars} in it"
            )
        return found

    def members_to_start(self, rule: ParsedRule) -> int:
        """How many members training waits for. Raises ConfigError if they would be too few for the rule."""
        if self.start_members:
            if self.start_members < rule.rows_min:
                raise ConfigError(
                    f"start_members = {self.start_members}, but {rule.spec} needs updates of {rule.rows_min} members"
                )
            return self.start_members
        quorum_of = range(1, limits.MEMBERS_MAX + 1)
        enough = [n for n in quorum_of if -(-n * self.quorum_percent // 100) >= rule.rows_min]
        if not enough:
            raise ConfigError(f"{rule.spec} needs the updates of {rule.rows_min} members, more than a run can have")
        return 1 if rule.f == 0 else enough[0]


def read_run_file(path: Path) -> RunFile:
    """The settings in a TOML file. Raises ConfigError, naming the key, for whatever cannot work."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; `farflung new --example` prints one") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return parse_run(values, where=str(path))


def parse_run(values: Mapping[str, Any], *, where: str) -> RunFile:
    """The settings in a table. Raises ConfigError."""
    timing = values.get("timing", {})
    if not isinstance(timing, Mapping):
        raise ConfigError(f"{where}: [timing] must be a table")
    tables: dict[str, Any] = {"timing": _make(Timing, timing, f"{where} [timing]")}
    if "mixing" in values:
        mixing, mode = values["mixing"], str(values.get("mode", "gather"))
        if not isinstance(mixing, Mapping):
            raise ConfigError(f"{where}: [mixing] must be a table")
        given = {"graph": default_mixing(mode).graph, "ticks": default_mixing(mode).ticks} | dict(mixing)
        tables["mixing"] = _make(Mixing, given, f"{where} [mixing]")
    return _make(RunFile, {**values, **tables}, where)


def _make(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {name!r}{hint}")
        wanted = str(known[name].type)
        if wanted in {"str", "int", "bool"} and type(value).__name__ != wanted:
            raise ConfigError(f"{where}: {name} must be of type {wanted}, got {value!r}")
    return kind(**values)


def make_genesis(run: RunFile, founder: bytes, secret: bytes) -> tuple[Genesis, torch.Tensor]:
    """Build the model once; returns the genesis and θ₀ [d].

    Raises ConfigError if a codec, rule, optimiser, weight policy or task cannot work.
    """
    task = load_task(run.task, run.task_options)
    model = task.build_model()
    schema = schema_of(model)
    theta_d = torch.empty(schema.numel)
    read_parameters(model, theta_d)
    outer, codec, rule = parse_outer(run.outer), parse_codec(run.codec), run.parsed_rule()
    weights = parse_weights(run.weights)
    if run.mixing is not None:
        check_mixing_run(run.mode, run.mixing, codec, rule, outer, weights, run.liars, schema)
    if weights.scale is not None and (rule.f or not rule.scales):
        why = "it would believe what members claim" if rule.f else "it looks at coordinates one by one"
        raise ConfigError(
            f"the weight policy {weights.spec!r} scales rows, which {rule.spec!r} cannot allow: {why}. "
            "Take another policy, for instance steps"
        )
    described = describe_task(run.task, run.task_options, task=task)
    digest = getattr(task, "data_digest", None)
    genesis = Genesis(
        name=run.name,
        founder=founder,
        state_digest=first_state(theta_d, first_buffers(outer, codec, rule, schema))[0].digest,
        schema=schema,
        task=described["name"],
        task_options=described["options"],
        codec=codec.spec,
        rule=rule.spec,
        outer=outer.spec,
        weights=weights.spec,
        mode=run.mode,
        mixing=run.mixing or Mixing(),
        inner_steps=run.inner_steps,
        rounds=run.rounds,
        closed=run.closed,
        secret_digest=secret_digest(secret),
        start_members=run.members_to_start(rule),
        payloads_min=rule.rows_min,
        quorum_percent=run.quorum_percent,
        snapshot_rounds=run.snapshot_rounds,
        timing=run.timing,
        validation_digest=digest() if callable(digest) else "",
    )
    return genesis, theta_d


EXAMPLE = """\
# A farflung run. Every key has a default; nobody can change a run once it is created.
name = "my first swarm"
task = "builtin:stdlib-gpt"       # or "module:object", an object of your own (docs/tasks.md)
inner_steps = 30                  # local steps per round
codec = "ef(1)|q2"                # 2 bits per parameter, with error feedback
outer = "nesterov(lr=0.7,momentum=0.6)"
# mode = "push-sum"               # members mix in small groups instead of getting every update (docs/push-sum.md)
# liars = 1                       # so many members' updates may be lies: a robust rule combines them
closed = true                     # only who has the invite may join

[task_options]
width = 128

[timing]
grace_ms = 5000                   # how long a quorum waits for the others
"""
