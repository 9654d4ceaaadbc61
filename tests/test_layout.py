"""The package's rooms: each imports only from those before it, and none in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import hgpo_trl

ROOMS = (
    "common modes verification rewards inference serving tasks training reporting data evaluation scripts".split()
)  # each may import from those before it
ROOT = Path(hgpo_trl.__file__).parent


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, dotted, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hgpo_trl":
            module = str(node.module)
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if (ROOT.parent / f"{name.replace('.', '/')}.py").is_file() else module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "hgpo_trl"}
    return found


def modules() -> dict[str, set[str]]:
    names = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): imports_of(path) for path, name in names.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in ROOT.iterdir() if any(path.glob("*.py"))}
    assert folders == set(ROOMS)


def test_imports_go_downwards() -> None:
    upwards = [
        f"{module} imports {other}"
        for module, others in modules().items()
        for other in others
        if room(module) in ROOMS and (room(other) not in ROOMS or ROOMS.index(room(other)) > ROOMS.index(room(module)))
    ]
    assert not upwards


def test_no_module_imports_in_a_circle() -> None:
    graph = {module: others - {module} for module, others in modules().items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, with the circle
