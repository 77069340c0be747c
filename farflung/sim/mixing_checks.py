"""How updates meet in a scenario's run: its mode, the table [run.mixing], and what neither can be combined with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from farflung.protocol.errors import ConfigError
from farflung.protocol.genesis import MODES
from farflung.protocol.mixing.settings import Mixing
from farflung.sim import bounds

if TYPE_CHECKING:
    from farflung.sim.scenario import Run, Scenario

ATTACKS = ("sign_flip", "noise", "straggle", "label-flip")
"""Attacks on what a member has trained, or on when it speaks: they are the same in every mode. The others are about
updates that everybody gets, and nobody does where members mix."""


def mixing_of(run: Run) -> Mixing | None:
    """What the table and the mode say together; None where members gather. Raises ConfigError, with the key."""
    from farflung.node.mixing_check import default_mixing

    if run.mode == "gather":
        return None
    given: Mapping[str, Any] = run.mixing
    plain = default_mixing(run.mode)
    known = plain.to_json()
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"run.mixing has the keys {', '.join(known)}, got {key!r}")
        if type(value) is not type(known[key]):
            raise ConfigError(f"run.mixing.{key} must be of type {type(known[key]).__name__}, got {value!r}")
    return Mixing(**{**known, **given})


def check_mode(run: Run) -> None:
    """The mode is one, and the table says what can be said."""
    bounds.one_of("run.mode", run.mode, MODES)
    if mixing_of(run) is None and run.mixing:
        raise ConfigError(f'run.mixing is for mode = "push-sum" or "pairs", got {run.mixing}')


def check_mixing(scenario: Scenario) -> None:
    """Where members mix: codec, rule and graph can, and attackers do what can be done there."""
    run = scenario.run
    mixing = mixing_of(run)
    if mixing is None:
        return
    from farflung.aggregation.outer import parse_outer
    from farflung.aggregation.registry import parse_rule
    from farflung.aggregation.weights import parse_weights
    from farflung.compression import parse_codec
    from farflung.node.mixing_check import check_mixing_run
    from farflung.sim.service_costs import USUAL

    rule = parse_rule(run.rule)
    try:
        outer, weights = parse_outer(run.outer), parse_weights(run.weights)
        check_mixing_run(run.mode, mixing, parse_codec(run.codec), rule, outer, weights, rule.f, USUAL)
    except ConfigError as error:
        raise ConfigError(f"run.mode {run.mode!r}: {error}") from None
    for attack in scenario.attacks:
        if attack.kind.partition("(")[0].strip() not in ATTACKS:
            raise ConfigError(
                f"nobody gets others' updates in mode {run.mode!r}, so only {', '.join(ATTACKS)} can be tried there, "
                f"got {attack.kind!r}"
            )
