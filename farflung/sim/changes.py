"""One setting of a scenario changed: what `--sweep uplink=20,50` does to it, by a path or a short name."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

from farflung.protocol.errors import ConfigError
from farflung.sim.draw import Draw
from farflung.sim.scenario import Scenario
from farflung.sim.scenario_checks import refuse_unused
from farflung.sim.scenario_file import check_key, field_name, field_types, parse_value

ALIASES = {
    "codec": "run.codec",
    "rule": "run.rule",
    "outer": "run.outer",
    "weights": "run.weights",
    "exchange": "run.exchange",
    "mode": "run.mode",
    "inner_steps": "run.inner_steps",
    "H": "run.inner_steps",
    "grace": "run.grace_s",
    "quorum": "run.quorum_percent",
    "params": "model.params",
    "tokens_per_step": "model.tokens_per_step",
    "uplink": "members.up_mbit",
    "downlink": "members.down_mbit",
    "queue": "members.queue",
    "step_ms": "members.step_ms",
    "gpu": "members.gpu",
    "mfu": "members.mfu",
    "jitter": "members.jitter",
    "speed_sigma": "members.speed_sigma",
    "packet_loss": "members.loss",
    "session": "members.churn.session_s",
    "gap": "members.churn.gap_s",
    "count": "members.count",
    "latency": "network.latency_ms",
    "message_loss": "network.message_loss",
    "attack": "attack.kind",
    "attackers": "attack.count",
    "strength": "attack.strength",
}
"""Short names of settings. A path is the tables and key of a file, joined by dots; `members.uplink` changes every
group, `members.NAME.up_mbit` one, and so for links by name and for faults and attacks by position."""


class Change(NamedTuple):
    """A setting by its full path, and the text of its new value."""

    key: str
    text: str


def full_key(key: str) -> str:
    """The path behind a short name; a path is returned as it is. Raises ConfigError listing the short names."""
    top = field_types(Scenario)
    if key in ALIASES or key.split(".", maxsplit=1)[0] in top:
        return ALIASES.get(key, key)
    close = difflib.get_close_matches(key, [*ALIASES, *top], 1)
    hint = f", did you mean {close[0]!r}" if close else ""
    names = ", ".join(ALIASES)
    raise ConfigError(f"no such setting{hint}; short names are {names}; others are paths like run.codec, got {key!r}")


def changed(scenario: Scenario, key: str, text: str) -> Scenario:
    """The scenario with one setting changed. A text that equals what was there changes nothing, and is allowed.

    Raises ConfigError if there is no such setting, the text is no value of it, the fidelity does not use it, or the
    changed scenario cannot work.
    """
    path = full_key(key)
    refuse_unused(scenario.fidelity, _general(path), got=text)
    try:
        if path == "network.latency_ms" and not text.lstrip().startswith("["):
            text = f"[{', '.join(_all_latencies(scenario, text))}]"
        return _changed(scenario, path.split("."), text, "")  # type: ignore[no-any-return]
    except ConfigError as error:
        raise ConfigError(f"{key}={text}: {error}") from None


def change_all(scenario: Scenario, changes: Mapping[str, str]) -> Scenario:
    """Several settings changed, one after the other. Raises ConfigError as `changed` does."""
    for key, text in changes.items():
        scenario = changed(scenario, key, text)
    return scenario


def read_value(wanted: Any, text: str, where: str) -> Any:
    """A command line's text as the type of a field: bare words are texts, `uniform(50, 500)` is a draw.

    Raises ConfigError that begins with `where`.
    """
    if wanted is str:
        return text
    if call := re.fullmatch(r"\s*([a-z]+)\s*\(([^()]*)\)\s*", text):
        text = f"{{ {call[1]} = [{call[2]}] }}"
    return parse_value(wanted, _toml_or_text(text), where)


def _changed(owner: Any, parts: list[str], text: str, where: str) -> Any:
    """A copy of the dataclass `owner` in which what `parts` lead to is `text`."""
    key, rest = parts[0], parts[1:]
    check_key(type(owner), key, where)
    name, path = field_name(type(owner), key), f"{where}.{key}" if where else key
    wanted, value = field_types(type(owner))[key], getattr(owner, name)
    if isinstance(value, dict) and rest:
        return replace(owner, **{name: {**value, ".".join(rest): _toml_or_text(text)}})
    if isinstance(value, tuple) and rest:
        return replace(owner, **{name: _changed_items(value, rest, text, path)})
    if rest:
        if not is_dataclass(value) or isinstance(value, Draw):
            raise ConfigError(f"{path} is not a table with settings of its own, got {'.'.join(parts)!r}")
        return replace(owner, **{name: _changed(value, rest, text, path)})
    if is_dataclass(value) and not isinstance(value, Draw):
        raise ConfigError(f"{path} is a table: name one of {', '.join(field_types(type(value)))}, got {path!r}")
    return replace(owner, **{name: read_value(wanted, text, path)})


def _changed_items(items: tuple[Any, ...], rest: list[str], text: str, where: str) -> tuple[Any, ...]:
    """All tables of a list changed, or the one that the next part names."""
    if not items or not is_dataclass(items[0]):
        raise ConfigError(f"the scenario has no [[{where}]] to change, got {'.'.join(rest)!r}")
    if rest[0] in field_types(type(items[0])):
        return tuple(_changed(item, rest, text, where) for item in items)
    names = [getattr(item, "name", str(index)) for index, item in enumerate(items)]
    if rest[0] not in names or len(rest) == 1:
        raise ConfigError(f"{where} has {', '.join(names)} and settings of all of them, got {rest[0]!r}")
    place = names.index(rest[0])
    one = _changed(items[place], rest[1:], text, f"{where}.{rest[0]}")
    return (*items[:place], one, *items[place + 1 :])


def _toml_or_text(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _all_latencies(scenario: Scenario, text: str) -> list[str]:
    n = len(scenario.network.regions)
    return [f"[{', '.join([text] * n)}]"] * n


def _general(path: str) -> str:
    """A path without the name or position of one table: `members.home.up_mbit` is `members.up_mbit`."""
    parts = path.split(".")
    tables = {field_name(Scenario, parts[0])} & {"members", "faults", "attacks"}
    if len(parts) > 2 and tables and parts[1] not in {item.name for item in fields(_element(tables.pop()))}:
        return ".".join([parts[0], *parts[2:]])
    return ".".join(parts[:2])


def _element(name: str) -> type:
    from farflung.sim.scenario import Attack, Fault, Members

    return {"members": Members, "faults": Fault, "attacks": Attack}[name]
