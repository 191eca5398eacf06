"""Which room may import which: the direction that keeps the core free of hosts and the adapters apart."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ikl_plugins"
HOSTS = {"mmcv", "mmengine", "mmpretrain", "pyautoattack", "robustbench", "torchdistill", "torchvision"}
ADAPTERS = {"mmengine", "mmpretrain", "robustbench", "torchdistill"}
# Beside itself and the core, each room may import these rooms and these hosts; a room that is not named here is core.
ROOMS = {
    "adversarial": (set(), set()),
    "models": (set(), {"robustbench"}),
    "torchdistill": ({"adversarial", "models"}, {"torchdistill", "torchvision"}),
    "mmengine": ({"adversarial", "models"}, {"mmengine"}),
    "mmpretrain": ({"adversarial", "mmengine", "models"}, {"mmcv", "mmengine", "mmpretrain", "torchvision"}),
    "robustbench": ({"adversarial", "models"}, HOSTS),
    "commands": ({"adversarial", "models", *ADAPTERS}, HOSTS),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """The full names of everything that a file imports, inside functions too."""
    here = ("ikl_plugins", *file.relative_to(PACKAGE).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def room(name: str) -> str:
    """The room of a module of the package: a folder, or '' for the core."""
    part = name.split(".")[1] if "." in name else ""
    return part if part in ROOMS else ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_what_lies_below_it(file: Path) -> None:
    own = file.relative_to(PACKAGE).parts[0] if len(file.relative_to(PACKAGE).parts) > 1 else ""
    rooms, hosts = ROOMS.get(own, (set(), set()))
    if own == "" and file.stem.startswith("_") and file.stem in ("_robustbench_import", "_autoattack"):
        hosts = {"robustbench", "pyautoattack"}
    if file.name == "__main__.py":
        rooms = {"commands"}
    names = imported(file)
    found = {room(name) for name in names if name.split(".")[0] == "ikl_plugins"} - {own, ""}
    assert found <= rooms
    assert {name.split(".")[0] for name in names} & HOSTS <= hosts
