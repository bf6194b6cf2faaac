"""What the documentation says of the tests."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    line
    for line in (ROOT / "docs" / "reliability.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| what comes in")
]


def names_in(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_each_row_is_a_test(row):
    _, what_comes_in, what_it_gets, tests, _ = row.split("|")
    named = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", tests)
    assert len(named) == tests.count("`") / 2, "each test as `tests/file.py::name`"
    assert named or "**not noticed**" in what_it_gets  # for which there can be none
    for file, name in named:
        assert name in names_in(ROOT / file), f"{file} has no {name}"
