"""The layers of the code: a module imports from its own layer and from those before it, and never in a circle.

Tests share code by tests/helpers/ and conftest.py, and never import one another.
"""

import ast
import importlib
import re
from pathlib import Path

from tests.helpers.paths import ROOT

import pytest

COMMANDS = (
    "inference",
    "compare",
    "inspect_data",
    "lr_finder",
    "repeat",
    "replay",
    "report",
    "review",
    "soup",
    "wandb_sync",
)  # addresses that people type
LAYERS = ("base", "distributed", "data", "model", "run", "tracking", "training", "commands")  # what docs/design.md says
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "pipelines").rglob("*.py"))
}


def layer_of(module: str) -> str:
    _, first, *below = *module.split("."), ""
    return first if any(below) else "commands" if first in COMMANDS else "base"


def imported_by(path: Path) -> set[str]:
    """The modules of ours that a file imports anywhere in it, in its functions too, as absolute names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.update({f"{node.module}.{name.name}" for name in node.names} & MODULES.keys() or {str(node.module)})
    return {name for name in found if name in MODULES and name != "pipelines"}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "pipelines"])
def test_imports_point_down(module: str) -> None:
    for other in imported_by(MODULES[module]):
        assert LAYERS.index(layer_of(other)) <= LAYERS.index(layer_of(module)), f"{module} imports {other}"


def test_there_is_no_circle() -> None:
    waiting = {module: imported_by(path) for module, path in MODULES.items()}
    while ready := [module for module, needed in waiting.items() if not needed & waiting.keys()]:
        for module in ready:
            del waiting[module]
    assert not waiting, "these import each other"


def test_job_scripts_import_what_is_there() -> None:
    """Python within shell scripts, which neither ruff nor mypy sees."""
    scripts = [*ROOT.glob("slurm/*.s*"), *ROOT.glob("docs/*.sh"), *ROOT.glob("tests/helpers/*.sh")]
    lines = [line for path in scripts for line in path.read_text(encoding="utf-8").splitlines()]
    found = [match for line in lines if (match := re.match(r"from (pipelines[\w.]*) import ([\w, ]+)$", line))]
    assert found
    for module, names in (match.groups() for match in found):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


def test_scripts_are_imported_by_nothing() -> None:
    for module, path in MODULES.items():
        source = ast.parse(path.read_text(encoding="utf-8"))
        names = {str(node.module).split(".")[0] for node in ast.walk(source) if isinstance(node, ast.ImportFrom)}
        assert not names & {"train", "evaluate", "deploy"}, module


def test_scripts_answer_ctrl_c_while_their_libraries_load() -> None:
    """Before the first import of ours, and so of a library: that takes seconds."""
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("deploy/*.py"), *(ROOT / "pipelines").rglob("*.py")]
    found = [path for path in scripts if "sys.exit(run_script(" in path.read_text(encoding="utf-8")]
    assert len(found) >= 5
    for path in found:
        ours = re.findall(
            r"^ *(?:from|import) ((?:pipelines|deploy)\b[\w.]*)", path.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert ours[0] == "pipelines.early_interrupt", path


def test_no_test_module_imports_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [node.module or "", *(name.name for name in node.names)] if isinstance(node, ast.ImportFrom) else []
            named += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            parts = {part for name in named for part in name.split(".")}
            assert not any(part.startswith("test_") or part == "conftest" for part in parts), f"{path} imports {named}"
