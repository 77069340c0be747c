"""Scenarios as TOML: a strict walk over the dataclasses of `scenario.py`, both ways.

A table is a dataclass and a key is a field; `[[network.link]]`, `[[fault]]` and `[[attack]]` are named in the singular.
Where a draw is wanted a number is a fixed one, and `{ loguniform = [50, 500] }` is drawn per member.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

from farflung.protocol.errors import ConfigError
from farflung.sim.bounds import default_of
from farflung.sim.draw import Draw
from farflung.sim.scenario import Network, Scenario

SINGULAR = {Network: {"link": "links"}, Scenario: {"fault": "faults", "attack": "attacks"}}
"""How a file calls the fields that are lists of tables."""

SUFFIX = ".toml"


class Preset(NamedTuple):
    """A scenario that comes with farflung."""

    name: str
    fidelity: str
    summary: str


def presets() -> list[Preset]:
    """All presets, by name. Reads little: nothing is checked, torch is not imported."""
    found = []
    for item in files("farflung.sim").joinpath("presets").iterdir():
        if item.name.endswith(SUFFIX):
            values = tomllib.loads(item.read_text(encoding="utf-8"))
            found.append(Preset(item.name.removesuffix(SUFFIX), values.get("fidelity", "timing"), values["summary"]))
    return sorted(found)


def load_scenario(name_or_path: str | Path) -> Scenario:
    """The preset of that name, or else the file at that path. Raises ConfigError, naming the key, table and file."""
    where = str(name_or_path)
    try:
        values = tomllib.loads(scenario_text(name_or_path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: {error}") from None
    return parse_scenario({"name": Path(where).name.removesuffix(SUFFIX), **values}, where=where)


def scenario_text(name_or_path: str | Path) -> str:
    """What is written there, comments included. Raises ConfigError if there is no such preset or file."""
    where = str(name_or_path)
    if where in (known := [preset.name for preset in presets()]):
        return files("farflung.sim").joinpath("presets", where + SUFFIX).read_text(encoding="utf-8")
    try:
        return Path(where).read_text(encoding="utf-8")
    except FileNotFoundError:
        close = difflib.get_close_matches(where, known, 1)
        hint = f"did you mean {close[0]!r}" if close else "`farflung sim --list` names the presets"
        raise ConfigError(f"neither a preset nor a file, {hint}: {where!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {error}") from None


def scenario_folder(name_or_path: str | Path) -> Path | None:
    """Where files that the scenario names are looked for: beside its own file; None for a preset."""
    return None if str(name_or_path) in [preset.name for preset in presets()] else Path(name_or_path).parent


def parse_scenario(values: Mapping[str, Any], *, where: str) -> Scenario:
    """The scenario in a table that tomllib read. Raises ConfigError; `where` begins its message."""
    try:
        return cast(Scenario, _make(Scenario, values, ""))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def parse_value(wanted: Any, value: Any, where: str) -> Any:
    """What tomllib read, as the type that a field is annotated with. Raises ConfigError that begins with `where`."""
    wanted = _without_none(wanted)
    if wanted is Draw:
        return _draw(value, where)
    if get_origin(wanted) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(parse_value(get_args(wanted)[0], item, where) for item in value)
    if get_origin(wanted) is dict or is_dataclass(wanted):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table, got {value!r}")
        return _plain_table(value, where) if get_origin(wanted) is dict else _make(wanted, value, where)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ConfigError(f"{where} must be {_ARTICLES[wanted]}, got {value!r}")
    return value


def field_types(kind: type) -> dict[str, Any]:
    """Annotations of a dataclass' fields, by the names that a file uses."""
    hints = get_type_hints(kind)
    plural = {name: key for key, name in SINGULAR.get(kind, {}).items()}
    return {plural.get(item.name, item.name): hints[item.name] for item in fields(kind)}


def field_name(kind: type, key: str) -> str:
    """The field that a file calls `key`."""
    return SINGULAR.get(kind, {}).get(key, key)


def check_key(kind: type, key: str, where: str) -> None:
    """Raise ConfigError, with the nearest valid key, if a file cannot say this there."""
    known = field_types(kind)
    if key not in known:
        close = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {close[0]!r}" if close else f"known are {', '.join(known)}"
        table = f"in [{where}]" if where else "at the top"
        raise ConfigError(f"unknown key {table}, {hint}: {key!r}")


def to_toml(scenario: Scenario, *, full: bool = False) -> str:
    """The canonical text: settings that differ from their default, or with `full` every one that can be written.

    `parse_scenario(tomllib.loads(to_toml(s)), where="")` equals s.
    """
    return "\n".join(_table_lines(scenario, "", full)).strip("\n") + "\n"


_ARTICLES = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}


def _make(kind: type, values: Mapping[str, Any], where: str) -> Any:
    made = {}
    for key, value in values.items():
        check_key(kind, key, where)
        made[field_name(kind, key)] = parse_value(field_types(kind)[key], value, f"{where}.{key}" if where else key)
    for item in fields(kind):
        if item.name not in made and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{f'[{where}]' if where else 'the scenario'} needs a key {item.name!r}")
    return kind(**made)


def _draw(value: Any, where: str) -> Draw:
    if type(value) in (int, float):
        value = {"fixed": [value]}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(f"{where} must be a number or a draw such as {{ uniform = [50, 500] }}, got {value!r}")
    ((kind, numbers),) = value.items()
    numbers = numbers if isinstance(numbers, list) else [numbers]
    try:
        return Draw(kind, tuple(parse_value(float, number, f"{kind}'s number") for number in numbers))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _plain_table(value: Mapping[str, Any], where: str) -> dict[str, object]:
    try:
        _literal(dict(value))
    except TypeError as error:
        raise ConfigError(f"{where} must be plain data, got {error}") from None
    return dict(value)


def _without_none(wanted: Any) -> Any:
    if get_origin(wanted) in (Union, types.UnionType):
        (wanted,) = (part for part in get_args(wanted) if part is not type(None))
    return wanted


def _table_lines(value: Any, where: str, full: bool) -> Iterator[str]:
    """Keys first, then tables: what follows a table's header belongs to it."""
    later: list[tuple[str, Any]] = []
    for key in field_types(type(value)):
        name = field_name(type(value), key)
        item = getattr(value, name)
        path = f"{where}.{key}" if where else key
        if item is None or (item == default_of(value, name) and not (full and item not in ((), {}))):
            continue
        if is_dataclass(item) and not isinstance(item, Draw):
            later.append((f"[{path}]", item))
        elif isinstance(item, tuple) and item and is_dataclass(item[0]):
            later += [(f"[[{path}]]", part) for part in item]
        elif isinstance(item, dict):
            later.append((f"[{path}]", item))
        else:
            yield f"{key} = {_typed(item)}"
    for header, item in later:
        yield from ("", header)
        if isinstance(item, dict):
            yield from (f"{_key(name)} = {_literal(part)}" for name, part in item.items())
        else:
            yield from _table_lines(item, header.strip("[]"), full)


def _typed(value: Any) -> str:
    """A field's value: floats that are whole are written without a point, since the reader knows what is wanted."""
    if isinstance(value, Draw):
        numbers = ", ".join(_typed(number) for number in value.numbers)
        return numbers if value.kind == "fixed" else f"{{ {value.kind} = [{numbers}] }}"
    if isinstance(value, tuple):
        return f"[{', '.join(_typed(item) for item in value)}]"
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):_}"
    return _literal(value)


def _literal(value: Any) -> str:
    """Plain data as a TOML value of the same type. Raises TypeError for what is not plain."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(name)} = {_literal(part)}' for name, part in value.items())} }}"
    raise TypeError(repr(value))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _literal(name)
