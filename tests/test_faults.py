"""`FAULTS.md` is complete: every fault has a row, and every row except the listed ones names existing tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = range(1, 78)
NOT_YET = {42, 50, 55, 57, 75}
"""Faults that are not handled yet, or that no test shows."""


def read_table() -> list[tuple[int, list[str]]]:
    """Number and cells of every row, in order."""
    lines = (TESTS / "FAULTS.md").read_text(encoding="ascii").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if re.match(r"\| *\d", line)]
    return [(int(row[0]), row[1:]) for row in cells]


def defined_tests(name: str) -> set[str]:
    """Names of the tests that a file defines."""
    path = TESTS / name
    statements = ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else []
    return {node.name for node in statements if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_fault_has_a_row_in_order() -> None:
    assert [number for number, _ in read_table()] == list(ROWS)
    assert all(len(cells) == 3 and all(cells) for _, cells in read_table())


@pytest.mark.parametrize("number", ROWS)
def test_every_row_names_existing_tests(number: int) -> None:
    (cells,) = [cells for row, cells in read_table() if row == number]
    if number in NOT_YET:
        assert cells[2] == "not yet" and "not yet" in cells[1]
        return
    tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", cells[2])
    assert tests and cells[2] == ", ".join(f"`{file}::{test}`" for file, test in tests)
    for file, test in tests:
        assert test in defined_tests(file), f"{file}::{test}"
