"""What came out of a demo: equal states, loss, bytes, waits; as a table, a plot, JSON, and a sample of text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from farflung.node.baseline import Alone, train_alone
from farflung.node.display import human_bytes, human_count, human_loss
from farflung.node.flat import write_parameters
from farflung.node.founding import Founded
from farflung.node.plot import Curves, plot_losses
from farflung.node.progress import read_progress
from farflung.node.replica import THETA
from farflung.node.store import open_home, read_status
from farflung.node.tasks import Task, load_described

if TYPE_CHECKING:
    from farflung.node.demo import DemoSettings
    from farflung.node.fleet import Child

PROMPT = "def "
SAMPLE_BYTES = 160


@dataclass(frozen=True)
class MemberResult:
    """One member's numbers."""

    name: str
    bytes_up: int
    bytes_down: int
    tokens: int
    wait_s: float
    restarts: int
    validation_loss: float | None


@dataclass(frozen=True)
class Chain:
    """What the members' round logs say together."""

    states: dict[int, set[str]]
    """The state digests that were logged after each round; more than one is a fault."""
    tokens: dict[int, int]
    """Tokens of all members up to and including each round."""
    trained: int
    """Rounds that had payloads."""
    steps: int
    """Optimiser steps of all members in them; a member that is late sends what it has."""
    complete: bool
    """Every member logged the last round."""

    @property
    def equal(self) -> bool:
        """All members held the same bytes after every round."""
        return self.complete and all(len(digests) == 1 for digests in self.states.values())


def read_rounds(directory: Path) -> list[dict[str, Any]]:
    """A member's round log."""
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def compare_logs(logs: Sequence[Sequence[Mapping[str, Any]]], rounds: int) -> Chain:
    """Hold the logs against each other. A restarted member may lack rounds, which it has as certificates."""
    states: dict[int, set[str]] = {}
    tokens_of: dict[int, int] = {}
    steps_of: dict[int, int] = {}
    for log in logs:
        for entry in log:
            index = int(entry["round"])
            states.setdefault(index, set()).add(str(entry["state"]))
            payloads = [item for item in entry["payloads"].values() if item["bytes"]]
            tokens_of[index] = sum(int(item["tokens"]) for item in payloads)
            steps_of[index] = sum(int(item["steps"]) for item in payloads)
    total, tokens = 0, {}
    for index in sorted(tokens_of):
        total += tokens_of[index]
        tokens[index] = total
    complete = all(log and int(log[-1]["trained"]) == rounds for log in logs)
    trained = sum(1 for steps in steps_of.values() if steps)
    return Chain(states, tokens, trained, sum(steps_of.values()), complete)


def mass_error_max(logs: Sequence[Sequence[Mapping[str, Any]]]) -> float:
    """The largest error that any member's audit of any round's mixing found: relative, of weights and numerators."""
    return max((float(entry.get("mass_error", 0.0)) for log in logs for entry in log), default=0.0)


def member_result(child: Child, log: Sequence[Mapping[str, Any]]) -> MemberResult:
    """From what it left on disk. Bytes of a process that was killed are those of its finished rounds."""
    status, train = read_status(child.run_directory) or {}, read_progress(child.run_directory) or {}
    me = str(status.get("peer", ""))

    def total(name: str) -> int:
        return max(int(status.get(name, 0)), sum(int(entry[name]) for entry in log))

    return MemberResult(
        name=child.name,
        bytes_up=total("bytes_up"),
        bytes_down=total("bytes_down"),
        tokens=sum(int(entry["payloads"].get(me, {}).get("tokens", 0)) for entry in log),
        wait_s=sum(float(entry["wait_s"]) for entry in log),
        restarts=child.restarts,
        validation_loss=train.get("validation_loss"),
    )


def ring_bytes(members: int, parameters: int, steps: int) -> float:
    """What data-parallel training sends per member: a ring all-reduce of fp32 gradients at every step."""
    return 2 * (members - 1) / members * 4 * parameters * steps


def report(
    settings: DemoSettings,
    founded: Founded,
    children: Sequence[Child],
    console: Console,
    folder: Path,
    wall_s: float,
    json_path: Path | None,
) -> int:
    """Print and write everything; returns 1 if states differed or somebody did not finish."""
    logs = [read_rounds(child.run_directory) for child in children]
    chain = compare_logs(logs, settings.rounds)
    results = [member_result(child, log) for child, log in zip(children, logs, strict=True)]
    steps = round(chain.steps / settings.members)
    ring = ring_bytes(settings.members, founded.genesis.schema.numel, steps)
    ratio = ring / max(1.0, sum(result.bytes_up for result in results) / len(results))
    genesis = founded.genesis
    task = load_described({"name": genesis.task, "options": genesis.task_options}, builtin_only=True)
    mixes = genesis.mode != "gather"
    text = _sample(task, folder / "member-0", genesis.run_id, mixes=mixes)
    alone = _train_alone(settings, task, steps, console) if settings.baseline else None
    value = {
        "members": settings.members,
        "rounds": chain.trained,
        "digests_equal": chain.equal,
        "validation_loss": results[0].validation_loss,
        "bytes_ratio_vs_ddp_fp32": ratio,
        "wall_s": wall_s,
        "mode": genesis.mode,
        "mass_error_max": mass_error_max(logs) if mixes else None,
        "inner_steps": settings.inner_steps,
        "parameters": genesis.schema.numel,
        "baseline_validation_loss": alone.validation_loss if alone else None,
        "sample": text,
        "per_member": [asdict(result) for result in results],
    }
    plot = folder / "loss.png"
    plot_losses(
        plot, _curves(children, chain, alone), title=f"{settings.members} members, {genesis.mode}, {genesis.codec}"
    )
    console.print(_table(results, ring))
    for line in _conclusions(value, chain, ring, alone):
        console.print(line, markup=False)
    console.print(f"\nA sample of what it learned to write:\n\n{text}\n", markup=False)
    console.print(f"loss curve {plot}, homes and logs {folder}", markup=False)
    if json_path is not None:
        json_path.write_text(json.dumps(value, indent=2) + "\n")
    return 0 if chain.equal else 1


def _train_alone(settings: DemoSettings, task: Task, steps: int, console: Console) -> Alone:
    console.print(f"baseline: one process, batch {settings.members} x {settings.batch}, {steps} steps ...")
    return train_alone(task, members=settings.members, steps=steps)


def _sample(task: Task, home: Path, run_id: bytes, *, mixes: bool) -> str:
    """Text from the certified state on the founder's disk; where members mix, from the founder's own parameters."""
    with open_home(home).run(run_id) as store:
        snapshot, own = store.latest_snapshot(), store.read_local()[0]
        if (own if mixes else snapshot) is None:
            return ""
        model = task.build_model()
        theta_d = own.tensors[THETA] if mixes and own else torch.from_numpy(snapshot.load()[0]) if snapshot else None
        assert theta_d is not None
        write_parameters(model, theta_d)
    sample = getattr(task, "sample", None)
    return str(sample(model, PROMPT, length=SAMPLE_BYTES)) if callable(sample) else ""


def _curves(children: Sequence[Child], chain: Chain, alone: Alone | None) -> Curves:
    """Losses over the tokens of all members."""
    trains = [read_progress(child.run_directory) or {} for child in children]

    def over_tokens(pairs: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
        return [(chain.tokens[int(at)], loss) for at, loss in pairs if int(at) in chain.tokens]

    return Curves(
        training={
            child.name: over_tokens(train.get("losses", [])) for child, train in zip(children, trains, strict=True)
        },
        validation=over_tokens(trains[0].get("validation", [])),
        baseline=[] if alone is None else alone.training,
        baseline_validation=None if alone is None else alone.validation_loss,
    )


def _table(results: Sequence[MemberResult], ring: float) -> Table:
    table = Table(title="what each member did", title_justify="left")
    for name in ("node", "tokens", "sent", "received", "ddp fp32 / sent", "waited", "validation"):
        table.add_column(name, justify="left" if name == "node" else "right")
    for result in results:
        table.add_row(
            result.name + (", killed" if result.restarts else ""),
            human_count(result.tokens),
            human_bytes(result.bytes_up),
            human_bytes(result.bytes_down),
            f"{ring / max(1, result.bytes_up):.0f} x",
            f"{result.wait_s:.1f} s",
            human_loss(result.validation_loss),
        )
    return table


def _conclusions(value: Mapping[str, Any], chain: Chain, ring: float, alone: Alone | None) -> list[str]:
    differ = sorted(index for index, digests in chain.states.items() if len(digests) > 1)
    same = "the same on all members after every round" if chain.equal else f"DIFFERENT in rounds {differ}"
    if not differ and not chain.complete:
        same = "not complete: a member did not reach the last round"
    lines = [
        f"{value['rounds']} rounds of {value['inner_steps']} steps in {value['wall_s']:.0f} s",
        f"state digests: {same}",
        f"validation loss {human_loss(value['validation_loss'])} nats per byte",
        f"traffic: {value['bytes_ratio_vs_ddp_fp32']:.0f} times less than data-parallel fp32, "
        f"which sends {human_bytes(ring)} per member",
    ]
    if value["mass_error_max"] is not None:
        lines[1] = f"state digests of the reference: {same}; members' own parameters differ by rounding or more"
        lines.append(f"mass: the largest error that an audit found is {value['mass_error_max']:.1e}")
    if alone is not None and value["validation_loss"]:
        ratio = value["validation_loss"] / alone.validation_loss
        lines.append(
            f"one process on the same tokens: validation loss {alone.validation_loss:.3f} in {alone.wall_s:.0f} s; "
            f"the swarm's is {ratio:.3f} times that"
        )
    return lines
