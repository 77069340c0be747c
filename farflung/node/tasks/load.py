"""From the name of a task to the task, and to the canonical description that goes into the genesis."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from farflung.node.tasks.task import REQUIRED, Task
from farflung.protocol.errors import ConfigError

BUILTIN = {
    "builtin:stdlib-gpt": "farflung.node.tasks.stdlib_gpt:StdlibGpt",
    "builtin:linear": "farflung.node.tasks.linear:Linear",
    "builtin:stub": "farflung.node.tasks.stub:Stub",
}
"""Tasks that come with farflung, and where they are."""


def load_task(name: str, options: Mapping[str, Any] | None = None, *, builtin_only: bool = False) -> Task:
    """The task called `name` ("module:object" or a built-in one), made with `options`.

    The object is a class with the methods of `Task`, called with the options, or an instance, which takes none. It is
    checked before it is called, so a name from a genesis cannot call anything else. Importing a module runs it: pass
    `builtin_only=True` unless the person at this machine wrote the name.
    Raises ConfigError if the name, the module, a method or an option is wrong.
    """
    target = _find(name, builtin_only)
    missing = [method for method in REQUIRED if not callable(getattr(target, method, None))]
    if missing:
        raise ConfigError(f"task {name!r} lacks the method{'s' * (len(missing) > 1)}: {', '.join(missing)}")
    options = dict(options or {})
    if not inspect.isclass(target):
        if options:
            raise ConfigError(f"task {name!r} is an object, not a class: it takes no options, got {sorted(options)}")
        return cast(Task, target)
    _check_options(name, target, options)
    return cast(Task, target(**options))


def describe_task(name: str, options: Mapping[str, Any] | None = None, *, task: Task | None = None) -> dict[str, Any]:
    """The canonical description for the genesis: the task's name, and its options as JSON text with sorted keys.

    With a `task` that is a dataclass every field is written out, so that a later default cannot change a run.
    Raises ConfigError for an option that is not plain data.
    """
    values = dict(options or {})
    if task is not None and is_dataclass(task) and not isinstance(task, type):
        values = {field.name: getattr(task, field.name) for field in fields(task) if field.init}
    try:
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"options of task {name!r} must be plain data: {error}") from None
    return {"name": name, "options": text}


def load_described(description: Any, *, builtin_only: bool = False) -> Task:
    """The task behind `describe_task`'s answer. Raises ConfigError if it is malformed, and as `load_task` does."""
    try:
        name, options = str(description["name"]), json.loads(description["options"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"not the description of a task: {error}") from None
    if not isinstance(options, dict):
        raise ConfigError(f"a task's options are a table, got {type(options).__name__}")
    return load_task(name, options, builtin_only=builtin_only)


def _find(name: str, builtin_only: bool) -> Any:
    if name not in BUILTIN and (builtin_only or name.startswith("builtin:")):
        advice = "name the task yourself to run its code here" if builtin_only else f"there are {', '.join(BUILTIN)}"
        raise ConfigError(f"not a built-in task ({advice}): {name!r}")
    module_name, _, attribute = BUILTIN.get(name, name).partition(":")
    if not module_name or not attribute or not attribute.isidentifier():
        raise ConfigError(f'a task is named "module:object", got {name!r}')
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(f"no module for task {name!r}: is its folder on PYTHONPATH?") from None
        raise ConfigError(f"task {name!r} needs a module that is not installed: {error.name}") from error
    except Exception as error:
        raise ConfigError(f"importing task {name!r} failed: {type(error).__name__}: {error}") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ConfigError(f"module {module_name!r} has no task {attribute!r}") from None


def _check_options(name: str, target: Any, options: dict[str, Any]) -> None:
    signature = inspect.signature(target)
    try:
        signature.bind(**options)
    except TypeError as error:
        known = ", ".join(signature.parameters) or "none"
        raise ConfigError(f"options of task {name!r}: {error} (it knows: {known})") from None
