"""Imports point one way: a package imports what stands below it, a file nothing that imports it."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

# What a package may import next to itself; train.py, above all of them, may import anything.
BELOW = {
    "configs": set(),
    "model": {"configs"},
    "data": {"configs"},
    "training": {"configs", "model", "data"},
    "eval": {"configs", "model", "data", "training"},
    "slurm": {"configs", "model", "data", "training", "eval"},
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in BELOW
    for path in sorted((ROOT / package).rglob("*.py"))
} | {"train": ROOT / "train.py"}


def imported(name: str, path: Path) -> set[str]:
    """Return the modules of this repository that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in FILES else node.module for module in whole}
    return {module for module in found if module in FILES} - {name}


IMPORTS = {name: imported(name, path) for name, path in FILES.items()}


@pytest.mark.parametrize("package", BELOW)
def test_a_package_imports_only_what_stands_below_it(package):
    allowed = BELOW[package] | {package}
    upward = [
        f"{name} imports {module}"
        for name, modules in IMPORTS.items()
        if name.split(".")[0] == package
        for module in sorted(modules)
        if module.split(".")[0] not in allowed
    ]
    assert not upward


def test_no_file_imports_a_file_that_imports_it():
    """Depth first over all imports: a module on the path that is imported again closes a circle."""
    done: set[str] = set()
    circles: list[str] = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            circles.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for module in sorted(IMPORTS[name]):
                visit(module, [*path, name])
            done.add(name)

    for name in FILES:
        visit(name, [])
    assert not circles


def test_no_file_is_longer_than_400_lines():
    files = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    assert not [str(path) for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 400]
