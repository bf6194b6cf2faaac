"""The house that the package is: imports go down its floors, and never in a circle."""

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import deltavlm_hf

SOURCE = Path(deltavlm_hf.__file__).parent
# From the top down; a room imports from floors below its own. `files` builds on how models are saved, which is in
# `modeling`: that folder goes to the Hub, where there is no package to import from.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("serving",),
    ("hub", "app", "scenes"),
    ("training",),
    ("evaluation",),
    ("inference",),
    ("data",),
    ("files", "journal"),
    ("modeling", "processing"),
    ("deltavlm_hf",),
    ("auto_classes", "lazy", "extras"),
)
# `modeling`, when it is imported, has its classes registered; that names them within a function, for names alone are
# announced before.
REGISTRATION = {("auto_classes", "modeling"), ("auto_classes", "processing")}


def imports_of(module: str, code: str, is_package: bool, modules: set[str]) -> Iterator[str]:
    """The package's own modules that a module imports, at its top, in functions or for types alone."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
            start = ".".join([*(above if node.level else []), *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" if f"{start}.{alias.name}" in modules else start for alias in node.names]
        else:
            continue
        yield from (name for name in names if name in modules and name != module)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    files = {}
    for path in SOURCE.rglob("*.py"):
        parts = ["deltavlm_hf", *path.relative_to(SOURCE).with_suffix("").parts]
        files[".".join(parts).removesuffix(".__init__")] = path
    return {
        module: set(imports_of(module, path.read_text(), path.name == "__init__.py", set(files)))
        for module, path in files.items()
    }


def test_the_graph_is_seen():
    modules = {f"deltavlm_hf.{name}" for name in ("a", "a.x", "a.y", "b", "c")} | {"deltavlm_hf"}
    code = "from .. import b\nfrom . import y, name\ndef f():\n    from ..c import g\nimport torch, deltavlm_hf.b"
    found = set(imports_of("deltavlm_hf.a.x", code, False, modules))
    assert found == {f"deltavlm_hf.{name}" for name in ("a", "a.y", "b", "c")}
    assert set(imports_of("deltavlm_hf.a", "from .x import f\nfrom ..b import g", True, modules)) == {
        "deltavlm_hf.a.x",
        "deltavlm_hf.b",
    }


def test_every_room_has_its_floor(graph):
    assert {room(module) for module in graph} <= {name for floor in FLOORS for name in floor}


def test_imports_go_down(graph):
    level = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    arrows = {(room(one), room(other), one, other) for one, others in graph.items() for other in others}
    wrong = [
        f"{one} imports {other}"
        for start, end, one, other in sorted(arrows)
        if start != end and (start, end) not in REGISTRATION and level[start] >= level[end]
    ]
    assert not wrong


def test_there_is_no_circle(graph):
    down = {
        module: {other for other in others if (room(module), room(other)) not in REGISTRATION}
        for module, others in graph.items()
    }
    try:
        TopologicalSorter(down).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_what_is_missing_is_told_by_one_helper():
    """With the way for a checkout; `modeling` and `processing` go to the Hub, and name packages alone."""
    told = {path for path in SOURCE.rglob("*.py") if "deltavlm-hf[" in path.read_text()}
    assert told == {SOURCE / "extras.py"}


def test_test_files_have_names_of_their_own():
    """Of two with one name pytest collects only one, and says so only where both folders are run."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, number in names.items() if number > 1] == []
