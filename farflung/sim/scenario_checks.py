"""What a scenario may say: values that cannot work, and settings that would change nothing, are refused.

Each check belongs to one dataclass of `scenario.py` and raises ConfigError with the value that was wrong at the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from farflung.protocol.errors import ConfigError
from farflung.protocol.limits import MEMBERS_MAX, NAME_CHARS_MAX
from farflung.sim import bounds
from farflung.sim.compute import find_gpu

if TYPE_CHECKING:
    from farflung.sim.scenario import Attack, Churn, Fault, Members, Model, Network, Run, Scenario, SharedLink

UNUSED: Mapping[str, Mapping[str, str]] = {
    "timing": {
        "model.task": "nothing is trained",
        "model.options": "nothing is trained",
        "run.weights": "nothing is averaged",
        "run.mode": "how members mix is not modelled",
        "members.clock_skew_s": "nobody reads a clock",
        "network.message_loss": "control messages are not simulated one by one",
    },
    "training": {
        "model.tokens": "the loss is measured, not estimated",
    },
}
"""Settings that a fidelity does not use, and why: they may not differ from their default."""

TIMING_FAULTS = ("crash", "leave", "partition", "slow_disk", "link", "straggle")
TIMING_ATTACKS = ("straggle", "starve")
"""What makes a difference where no values travel."""

FACTOR_FAULTS = ("slow_disk", "straggle", "link", "clock_skew")
STRENGTH_ATTACKS = ("sign_flip", "noise", "straggle", "starve")
"""Kinds that read `factor` and `strength`."""

SIZE_MAX = 100_000
"""Members of a timing-only run: a hundred times what it is built for; beyond, a slip of the pen."""


def check_run(run: Run) -> None:
    """Specs parse, numbers are within the genesis' own bounds. Costs an import of torch."""
    from farflung.aggregation.outer import parse_outer
    from farflung.aggregation.registry import parse_rule
    from farflung.aggregation.weights import parse_weights
    from farflung.compression import parse_codec
    from farflung.sim.scenario import EXCHANGES

    for parse, key in (
        (parse_codec, "codec"),
        (parse_rule, "rule"),
        (parse_outer, "outer"),
        (parse_weights, "weights"),
    ):
        try:
            parse(getattr(run, key))
        except ConfigError as error:
            raise ConfigError(f"run.{key}: {error}") from None
    bounds.one_of("run.exchange", run.exchange, EXCHANGES)
    bounds.within("run.inner_steps", run.inner_steps, 1, 1_000_000)
    bounds.within("run.grace_s", run.grace_s, 0.001, 86_400)
    bounds.within("run.quorum_percent", run.quorum_percent, 1, 100)
    bounds.within("run.deadline_floor_s", run.deadline_floor_s, 0.001, 86_400)
    bounds.within("run.deadline_ceiling_s", run.deadline_ceiling_s, 0.001, 86_400)
    bounds.within("run.snapshot_rounds", run.snapshot_rounds, 1, 10_000)
    if run.deadline_floor_s > run.deadline_ceiling_s:
        raise ConfigError(
            f"run.deadline_floor_s must not be above deadline_ceiling_s {run.deadline_ceiling_s:g}, "
            f"got {run.deadline_floor_s:g}"
        )


def check_model(model: Model) -> None:
    """Sizes are finite and not negative, a task has a name that can be one."""
    for key in ("params", "layers", "tokens_per_step", "tokens"):
        bounds.not_negative(f"model.{key}", getattr(model, key))
    if 0 < model.params < 1:
        raise ConfigError(f"model.params is a number of parameters, got {model.params:g}")
    if model.task and not re.fullmatch(r"[\w.]+:[\w.-]+", model.task):
        raise ConfigError(f'model.task is a built-in task or "module:object", got {model.task!r}')
    if model.options and not model.task:
        raise ConfigError(f"model.options belong to a task: set model.task, got {sorted(model.options)}")


def check_churn(churn: Churn) -> None:
    """Each kind has what it draws from, and nothing that it does not read."""
    from farflung.sim.scenario import CHURNS

    bounds.one_of("churn.kind", churn.kind, CHURNS)
    bounds.within("churn.crash", churn.crash, 0, 1)
    renewal = churn.kind not in ("diurnal", "trace")
    used = {"diurnal": ("low", "high", "period_h", "crash"), "trace": ("trace",)}.get(
        churn.kind, ("session_s", "gap_s", "crash")
    )
    bounds.only(churn, used, "churn", f"is not read by kind {churn.kind!r}")
    if renewal:
        bounds.positive("churn.session_s", churn.session_s)
        bounds.positive("churn.gap_s", churn.gap_s)
        if churn.session_s is not None and churn.session_s.kind != churn.kind:
            raise ConfigError(
                f"churn.kind says how session_s is drawn: write session_s = {{ {churn.kind} = [...] }}, "
                f"got {churn.session_s}"
            )
    elif churn.kind == "diurnal":
        bounds.within("churn.low", churn.low, 0, 1)
        bounds.within("churn.high", churn.high, 0, 1)
        bounds.above("churn.period_h", churn.period_h, 0)
        if churn.low > churn.high:
            raise ConfigError(f"churn.low must not be above churn.high {churn.high:g}, got {churn.low:g}")
    elif not churn.trace:
        raise ConfigError(f"churn of kind 'trace' needs a file: set churn.trace, got {churn.trace!r}")


def check_members(group: Members) -> None:
    """Lines, machines and habits of a group are possible, and each setting has what makes it matter."""
    from farflung.sim.scenario import QUEUES

    where = f"members {group.name!r}"
    if not (0 < len(group.name) <= NAME_CHARS_MAX and group.name.isprintable()):
        raise ConfigError(f"members.name must have 1 to {NAME_CHARS_MAX} printable characters, got {group.name!r}")
    bounds.within(f"{where}: count", group.count, 1, SIZE_MAX)
    bounds.positive(f"{where}: up_mbit", group.up_mbit)
    bounds.positive(f"{where}: down_mbit", group.down_mbit)
    bounds.one_of(f"{where}: queue", group.queue, QUEUES)
    for key in ("queue_ms", "data_cap_gb", "speed_sigma", "jitter", "busy_every_s", "busy_for_s", "memory_gb"):
        bounds.not_negative(f"{where}: {key}", getattr(group, key))
    for key in ("fsync_ms", "disk_mb_s"):
        bounds.not_negative(f"{where}: {key}", getattr(group, key))
    if group.queue == "fq":
        bounds.default(group, "queue_ms", where, 'matters only with queue = "fifo"')
    elif group.queue_ms == 0:
        raise ConfigError(f'{where}: a fifo without room does not queue, use queue = "fq"; got queue_ms {0.0:g}')
    if not 0 <= group.loss < 1:
        raise ConfigError(f"{where}: loss is a share from 0 to below 1, got {group.loss:g}")
    _check_speed(group, where)


def check_link(link: SharedLink) -> None:
    """A name and two rates."""
    if not link.name:
        raise ConfigError(f"a shared link needs a name that members can refer to, got {link.name!r}")
    bounds.above(f"network link {link.name!r}: up_mbit", link.up_mbit, 0)
    bounds.above(f"network link {link.name!r}: down_mbit", link.down_mbit, 0)


def check_network(network: Network) -> None:
    """As many rows and columns of latencies as regions; names used once."""
    if not network.regions:
        raise ConfigError(f"network.regions needs at least one name, got {list(network.regions)}")
    bounds.unique("network.regions", network.regions)
    bounds.unique("network.link names", [link.name for link in network.links])
    n = len(network.regions)
    shape = [len(row) for row in network.latency_ms]
    if shape != [n] * n:
        raise ConfigError(f"network.latency_ms must have {n} rows of {n} numbers, one per region, got rows of {shape}")
    for row in network.latency_ms:
        for latency in row:
            bounds.not_negative("network.latency_ms", latency)
    bounds.within("network.header_overhead", network.header_overhead, 1, 10)
    bounds.above("network.window_mb", network.window_mb, 0)
    if not 0 <= network.message_loss < 1:
        raise ConfigError(f"network.message_loss is a share from 0 to below 1, got {network.message_loss:g}")


def check_fault(fault: Fault) -> None:
    """It has a kind, a time and victims, and a factor exactly if its kind reads one."""
    from farflung.sim.scenario import FAULTS

    bounds.one_of("fault.kind", fault.kind, FAULTS)
    where = f"fault {fault.kind!r}"
    bounds.not_negative(f"{where}: at_s", fault.at_s)
    bounds.not_negative(f"{where}: for_s", fault.for_s)
    if not fault.members:
        raise ConfigError(f"{where} hits nobody: set members to positions from 0 on, got {list(fault.members)}")
    bounds.unique(f"{where}: members", fault.members)
    if fault.kind not in FACTOR_FAULTS:
        bounds.default(fault, "factor", where, f"is read by {', '.join(FACTOR_FAULTS)} only")
    elif not math.isfinite(fault.factor):
        raise ConfigError(f"{where}: factor must be finite, got {fault.factor}")
    elif fault.kind in ("slow_disk", "straggle") and fault.factor <= 1:
        raise ConfigError(f"{where}: factor is how many times slower and must be above 1, got {fault.factor:g}")
    elif fault.kind == "link" and (fault.factor <= 0 or fault.factor == 1):
        raise ConfigError(
            f"{where}: factor multiplies the capacity: above 0, not 1 (a partition cuts off), got {fault.factor:g}"
        )
    elif fault.kind == "clock_skew" and fault.factor == 0:
        raise ConfigError(f"{where}: factor is the skew in seconds and changes nothing at {fault.factor:g}")


def check_attack(attack: Attack) -> None:
    """It has a kind, attackers by position or by number, and a strength only if its kind reads one."""
    from farflung.sim.scenario import ATTACKS

    if attack.kind not in ATTACKS:
        _check_catalogued(attack.kind)
    where = f"attack {attack.kind!r}"
    bounds.not_negative(f"{where}: count", attack.count)
    if bool(attack.members) == bool(attack.count):
        raise ConfigError(
            f"{where}: set either members or count, got members {list(attack.members)} and count {attack.count}"
        )
    bounds.unique(f"{where}: members", attack.members)
    bounds.within(f"{where}: from_round", attack.from_round, 1, 1_000_000_000)
    if attack.kind in STRENGTH_ATTACKS:
        bounds.above(f"{where}: strength", attack.strength, 0)
        if attack.kind == "starve":
            bounds.within(f"{where}: strength", attack.strength, 0, 1)
    else:
        bounds.default(attack, "strength", where, f"is read by {', '.join(STRENGTH_ATTACKS)} only")


def _check_catalogued(kind: str) -> None:
    """The text of an attack that a real node can carry out. Costs an import of torch."""
    from farflung.sim.attacks import ATTACKS as CATALOGUE
    from farflung.sim.attacks import parse_attack
    from farflung.sim.scenario import ATTACKS

    if kind.partition("(")[0].strip() not in CATALOGUE:
        raise ConfigError(f"attack.kind is one of {', '.join((*ATTACKS, *CATALOGUE))}, got {kind!r}")
    attack = parse_attack(kind)
    if attack.layer == "raw" or attack.name == "index-bomb":
        raise ConfigError(
            f"attack.kind: no node encodes or announces that, only rules and codecs can be tried with it: got {kind!r}"
        )


def check_scenario(scenario: Scenario) -> None:
    """The parts fit together and each is used by the fidelity that was asked for."""
    from farflung.sim.scenario import FIDELITIES

    if not re.fullmatch(rf"[A-Za-z0-9._-]{{1,{NAME_CHARS_MAX}}}", scenario.name) or not scenario.name.strip("."):
        raise ConfigError(f"name must be 1 to {NAME_CHARS_MAX} letters, digits and ._-, got {scenario.name!r}")
    bounds.one_of("fidelity", scenario.fidelity, FIDELITIES)
    bounds.within("rounds", scenario.rounds, 1, 1_000_000)
    bounds.above("limit_h", scenario.limit_h, 0)
    bounds.not_negative("loss_goal", scenario.loss_goal)
    if not scenario.members:
        raise ConfigError("a scenario needs members: add a [[members]] table, got none")
    bounds.unique("names of [[members]]", [group.name for group in scenario.members])
    training = scenario.fidelity == "training"
    bounds.within(f"members of a {scenario.fidelity} run", scenario.size, 1, MEMBERS_MAX if training else SIZE_MAX)
    _check_fidelity(scenario)
    _check_places(scenario)
    _check_founder(scenario)
    _check_events(scenario)
    _check_rows(scenario)


def refuse_unused(fidelity: str, key: str, *, got: object) -> None:
    """Raise ConfigError if this fidelity never reads the setting called `key` ("model.tokens")."""
    if key in UNUSED[fidelity]:
        raise ConfigError(f"{key} changes nothing in {fidelity} fidelity ({UNUSED[fidelity][key]}), got {got!r}")


def _check_fidelity(scenario: Scenario) -> None:
    model, fidelity = scenario.model, scenario.fidelity
    for key in UNUSED[fidelity]:
        part, _, name = key.partition(".")
        owners = scenario.members if part == "members" else (getattr(scenario, part),)
        for owner in owners:
            if getattr(owner, name) != bounds.default_of(owner, name):
                refuse_unused(fidelity, key, got=bounds.plain(getattr(owner, name)))
    gpus = [group.gpu for group in scenario.members if group.gpu]
    if model.layers and not gpus and not any(group.memory_gb for group in scenario.members):
        raise ConfigError(
            f"model.layers only matters for memory, and no member has a gpu or memory_gb, got {model.layers}"
        )
    if fidelity == "training":
        if not model.task:
            raise ConfigError(f'a training run needs model.task, "builtin:stdlib-gpt" for instance, got {model.task!r}')
        if scenario.run.exchange != "gather":
            raise ConfigError(
                f'real nodes exchange by "gather": use fidelity = "timing", got {scenario.run.exchange!r}'
            )
        if model.tokens_per_step and not gpus:
            raise ConfigError(
                f"model.tokens_per_step sets the pace of members with a gpu, and none has one, "
                f"got {model.tokens_per_step:g}"
            )
        return
    _check_goal(scenario)
    if not model.params:
        raise ConfigError(f"a timing run needs model.params, the number of parameters, got {model.params:g}")
    if gpus and not model.tokens_per_step:
        raise ConfigError(
            f"members with a gpu need model.tokens_per_step, the tokens of one step, got {model.tokens_per_step:g}"
        )


def _check_goal(scenario: Scenario) -> None:
    model, goal = scenario.model, scenario.loss_goal
    if model.tokens and not goal:
        raise ConfigError(f"model.tokens is the budget for meeting a loss_goal, and none is set, got {model.tokens:g}")
    if goal and not model.tokens_per_step:
        raise ConfigError(f"a loss_goal in timing fidelity needs model.tokens_per_step for its estimate, got {goal:g}")


def _check_places(scenario: Scenario) -> None:
    regions, links = scenario.network.regions, [link.name for link in scenario.network.links]
    for group in scenario.members:
        if group.region and group.region not in regions:
            raise ConfigError(f"members {group.name!r}: region is one of {', '.join(regions)}, got {group.region!r}")
        if group.link and group.link not in links:
            known = f"one of {', '.join(links)}" if links else "the name of a [[network.link]], and there is none"
            raise ConfigError(f"members {group.name!r}: link is {known}, got {group.link!r}")
    crossed = [group.link for group in scenario.members]
    for link in links:
        if link not in crossed:
            raise ConfigError(f"nobody crosses this shared link: name it in members' link, or remove it: {link!r}")


def _check_founder(scenario: Scenario) -> None:
    founders = scenario.members[0]
    if founders.count > 1:
        return
    for key in ("churn", "join_after_s"):
        if getattr(founders, key) != bounds.default_of(founders, key):
            raise ConfigError(
                f"{key} changes nothing for the founder, who is always there: give the first group more members "
                f"or put another first, got it in {founders.name!r}"
            )


def _check_events(scenario: Scenario) -> None:
    size, limit_s = scenario.size, scenario.limit_h * 3600
    for fault in scenario.faults:
        if scenario.fidelity == "timing" and fault.kind not in TIMING_FAULTS:
            raise ConfigError(f'this fault changes nothing in timing fidelity, use "training": {fault.kind!r}')
        bounds.positions(f"fault {fault.kind!r}", fault.members, size)
        if fault.kind == "slow_disk":
            _check_disks(scenario, fault)
        if fault.at_s >= limit_s:
            raise ConfigError(f"fault {fault.kind!r} would come after the run's limit_h, got at_s {fault.at_s:g}")
        if fault.kind == "partition" and len(fault.members) == size:
            raise ConfigError(f"a partition of everybody from nobody cuts nothing, got {list(fault.members)}")
    named: list[int] = []
    for attack in scenario.attacks:
        if scenario.fidelity == "timing" and attack.kind not in TIMING_ATTACKS:
            raise ConfigError(f'this attack changes nothing in timing fidelity, use "training": {attack.kind!r}')
        bounds.positions(f"attack {attack.kind!r}", attack.members, size)
        if attack.from_round > scenario.rounds:
            raise ConfigError(
                f"attack {attack.kind!r} would begin after the last of {scenario.rounds} rounds, "
                f"got from_round {attack.from_round}"
            )
        named += attack.members
    bounds.unique("members of attacks", named)
    drawn = sum(attack.count for attack in scenario.attacks)
    if drawn and drawn + len([member for member in named if member]) > size - 1:
        raise ConfigError(f"of {size} members all but the founder can be drawn to attack, got {drawn}")


def _check_disks(scenario: Scenario, fault: Fault) -> None:
    groups = [group for group in scenario.members for _ in range(group.count)]
    for member in fault.members:
        if not (groups[member].fsync_ms or groups[member].disk_mb_s):
            raise ConfigError(
                f"fault 'slow_disk' needs a disk that is charged: set fsync_ms or disk_mb_s, got member {member}"
            )


def _check_rows(scenario: Scenario) -> None:
    """The rule has the members it needs, and those whom it trusts."""
    from farflung.aggregation.registry import parse_rule
    from farflung.sim.rule_costs import rule_work

    rule = parse_rule(scenario.run.rule)
    if rule.rows_min > scenario.size:
        raise ConfigError(f"{scenario.run.rule} needs {rule.rows_min} members, got {scenario.size}")
    rule_work(rule.spec, scenario.size)
    for fault in scenario.faults if rule.needs_root else ():
        if fault.kind in ("crash", "leave") and 0 in fault.members and not fault.for_s:
            raise ConfigError(f"{rule.spec} stands still without the founder: give this fault a for_s, got {fault}")


def _check_speed(group: Members, where: str) -> None:
    if bool(group.gpu) == (group.step_ms is not None):
        got = f"{group.gpu!r} and {group.step_ms}" if group.gpu else "neither"
        raise ConfigError(f"{where}: set either gpu or step_ms, got {got}")
    if group.gpu:
        find_gpu(group.gpu)
    if group.step_ms is not None:
        bounds.positive(f"{where}: step_ms", group.step_ms)
        bounds.default(group, "mfu", where, "belongs to a gpu")
    bounds.within(f"{where}: mfu", group.mfu, 0, 1)
    if not group.busy_every_s:
        bounds.default(group, "busy_for_s", where, "needs busy_every_s")
        bounds.default(group, "busy_slowdown", where, "needs busy_every_s")
    elif not group.busy_for_s:
        raise ConfigError(f"{where}: busy_every_s needs busy_for_s, the length of an episode, got {group.busy_for_s:g}")
    if group.busy_slowdown <= 1 or not math.isfinite(group.busy_slowdown):
        raise ConfigError(f"{where}: busy_slowdown is how many times slower, above 1, got {group.busy_slowdown:g}")
