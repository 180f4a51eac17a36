"""The package keeps its structure: who may import whom, and what is never done."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import distgpt

PACKAGE = Path(distgpt.__file__).parent
ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

ROWS = [
    {"errors", "durable"},
    {"source", "tokenizer", "shards", "loss", "documents", "plan", "checkpoint", "lock"},
    {"config"},
    {"corpus", "world", "model", "optim"},
    {"data", "parallel", "saver", "metrics", "profile", "supervise"},
    {"trained"},
    {"check", "step", "evaluate"},
    {"train", "generate", "cli"},
]
"""A room imports only from rooms in rows above its own."""

MAY_NAME = {
    "torch.distributed": {"world", "parallel", "saver", "trained"},
    "os.environ": {"__init__", "errors", "supervise", "world"},
}
TORCH_FREE = {
    "errors",
    "durable",
    "source",
    "plan",
    "config",
    "tokenizer",
    "shards",
    "corpus",
    "check",
    "checkpoint",
    "trained",
    "lock",
    "supervise",
}


def tree(room: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{room}.py").read_text())


def imported(room: str) -> set[str]:
    """Full names of what a room imports when it is imported or used."""
    names = set()
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_room_has_a_row() -> None:
    assert sorted(room for row in ROWS for room in row) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rows_above(room: str) -> None:
    row = next(i for i, rooms in enumerate(ROWS) if room in rooms)
    above = {name for rooms in ROWS[:row] for name in rooms}
    used = {name.split(".")[1] for name in imported(room) if name.startswith("distgpt.")}
    assert used <= above


@pytest.mark.parametrize("room", ROOMS)
def test_communication_and_environment_are_named_where_they_belong(room: str) -> None:
    uses = imported(room) | {ast.unparse(node) for node in ast.walk(tree(room)) if isinstance(node, ast.Attribute)}
    for name, rooms in MAY_NAME.items():
        if any(use == name or use.startswith(f"{name}.") for use in uses):
            assert room in rooms, f"{room} names {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_is_unpickled_evaluated_or_left_to_a_shell(room: str) -> None:
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {"eval", "exec", "torch.load", "yaml.load", "os.system", "pickle.load", "pickle.loads"}
            assert not any(keyword.arg in {"shell", "allow_pickle"} for keyword in node.keywords)
    assert not any(name.split(".")[0] in {"pickle", "shelve", "marshal", "dill"} for name in imported(room))


@pytest.mark.parametrize("room", ROOMS)
def test_functions_are_short_and_documented(room: str) -> None:
    module = tree(room)
    assert ast.get_docstring(module)
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(node), f"{room}.{node.name} has no docstring"


@pytest.mark.parametrize("room", sorted(TORCH_FREE))
def test_rooms_that_check_before_torch_loads_do_not_load_it(room: str) -> None:
    at_import = set()
    for node in tree(room).body:
        if isinstance(node, ast.Import):
            at_import |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            at_import.add(node.module)
    assert not any(name.split(".")[0] in {"torch", "torchdata", "wandb", "safetensors"} for name in at_import)
