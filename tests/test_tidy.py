"""Reads the code: rooms import one way, functions fit a screen, every test asserts something (DESIGN §1, STYLE §8)."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "farflung"
GENERATED = ("messages_pb2.py", "messages_pb2_grpc.py")
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in GENERATED)
TESTS = sorted(path for path in (ROOT / "tests").rglob("test_*.py"))
FUNCTION_LINES_MAX, FILE_LINES_MAX, LINE_CHARS_MAX = 70, 400, 120

ALLOWED = {
    "protocol": set(),
    "compression": {"protocol"},
    "aggregation": {"protocol"},
    "node": {"protocol", "compression", "aggregation"},
    "sim": {"protocol", "compression", "aggregation", "node"},
}
"""Which rooms a room may import, besides itself."""

MAY_IMPORT_SIM = ("farflung/cli.py", "farflung/node/cli.py", "farflung/__init__.py")
PROTOCOL_LIBRARIES = {"cryptography", "google", "blake3", "farflung"}
IMPURE = {"torch", "numpy", "grpc", "asyncio", "time", "socket", "random", "threading", "os", "pathlib", "subprocess"}

LONG_FILES = {"farflung/protocol/round.py", "farflung/node/shell.py"}
"""Longer than FILE_LINES_MAX, each for a reason: the round machine and its shell are one law each, in one place."""

LONG_FUNCTIONS = {
    "farflung/cli.py:join",
    "farflung/node/demo_cli.py:demo",
    "farflung/sim/bench/cli.py:codec",
    "farflung/sim/bench/cli.py:rule",
}
"""Longer than FUNCTION_LINES_MAX: a command is its list of options."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything imported anywhere in a file, except what only type checkers see."""
    found: set[str] = set()
    hidden = {
        id(inner)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree_of(path)):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def long_functions_of(path: Path) -> set[str]:
    return {
        f"{name_of(path)}:{item.name}"
        for item in functions_of(path)
        if (item.end_lineno or 0) - item.lineno >= FUNCTION_LINES_MAX
    }


def test_there_is_something_to_read():
    assert len(SOURCES) > 50
    assert len(TESTS) > 15
    assert {room_of(path) for path in SOURCES} - {""} <= ALLOWED.keys()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_rooms_import_one_way(path):
    room, name = room_of(path), name_of(path)
    rooms = {item.split(".")[1] for item in imports_of(path) if item.startswith("farflung.") and "." in item[9:]}
    rooms &= ALLOWED.keys()
    if room:
        assert rooms - {room} <= ALLOWED[room] | ({"sim"} if name in MAY_IMPORT_SIM else set())
    elif name not in MAY_IMPORT_SIM:
        assert "sim" not in rooms


@pytest.mark.parametrize("path", [path for path in SOURCES if room_of(path) == "protocol"], ids=name_of)
def test_the_protocol_has_no_clock_no_socket_no_tensor_and_no_dice(path):
    import sys

    tops = {item.split(".")[0] for item in imports_of(path)}
    assert not tops & IMPURE
    assert tops <= set(sys.stdlib_module_names) | PROTOCOL_LIBRARIES


def test_nothing_unpickles_or_evaluates():
    for path in SOURCES:
        tops = {item.split(".")[0] for item in imports_of(path)}
        assert not tops & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, name_of(path)
        calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
        names = {ast.unparse(call.func) for call in calls}
        assert not names & {"eval", "exec", "torch.load"}, name_of(path)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_code_fits_a_screen(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= FILE_LINES_MAX or name_of(path) in LONG_FILES, f"{len(lines)} lines"
    assert max(map(len, lines), default=0) <= LINE_CHARS_MAX
    assert not long_functions_of(path) - LONG_FUNCTIONS


def test_the_lists_of_long_things_are_not_longer_than_they_must_be():
    for name in LONG_FILES:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) > FILE_LINES_MAX, name
    assert not LONG_FUNCTIONS - set().union(*map(long_functions_of, SOURCES))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_what_is_public_says_what_it_does(path):
    module = tree_of(path)
    assert ast.get_docstring(module), "a module without a docstring"
    scopes: list[ast.Module | ast.ClassDef] = [module]
    scopes += [item for item in module.body if isinstance(item, ast.ClassDef) and not item.name.startswith("_")]
    for scope in scopes:
        for item in scope.body:
            if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and item.name[0] != "_":
                if [ast.unparse(mark) for mark in item.decorator_list] == ["compiled"]:
                    continue  # a kernel does what the reference of the same name says
                assert ast.get_docstring(item), f"{item.name} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_error_is_swallowed_whole(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "BaseException"
            silent = all(isinstance(item, (ast.Pass, ast.Continue)) for item in node.body)
            assert not (silent and caught in ("Exception", "BaseException")), f"line {node.lineno}"


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_every_test_file_asserts_something(path):
    words = path.read_text(encoding="utf-8")
    assert "assert " in words or "pytest.raises" in words
    assert path.parent == ROOT / "tests" or (PACKAGE / path.parent.relative_to(ROOT / "tests")).is_dir()


def test_tests_mirror_the_rooms():
    rooms = {path.parent.name for path in TESTS if path.parent != ROOT / "tests"}
    assert rooms <= ALLOWED.keys() | {"transport", "tasks"}
