"""Each part imports only what lies below it (docs/design.md)."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fedftg"
LAYERS = {
    "params": 0,
    "seeds": 0,
    "errors": 0,
    "recipes": 0,
    "distill": 1,
    "models": 1,
    "data": 1,
    "algorithms": 2,
    "engine": 3,
    "rundir": 3,
    "config": 4,
    "progress": 5,
    "rounds": 6,
    "experiment": 6,
    "report": 6,
    "flower": 7,
    "commands": 7,
    "cli": 8,
    "__init__": 8,
}
ISLANDS = {"distill", "models", "data", "report"}
FILES = sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fedftg":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fedftg.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_go_down(path: Path) -> None:
    part = part_of(path)
    for other in imported_parts(path) - {part, "__version__"}:
        assert other in LAYERS, f"{other} has no place in the layers"
        assert LAYERS[other] <= LAYERS[part], f"{part} must not import {other}"
        assert LAYERS[other] < LAYERS[part] or not ({part, other} & ISLANDS), f"{part} and {other} are islands"


def test_report_reads_only_folders() -> None:
    for path in (SOURCE / "report").glob("*.py"):
        assert imported_parts(path) <= {"report", "errors", "params"}, path.name


def test_no_drawers_for_things_that_belong_nowhere() -> None:
    assert not {path.stem for path in FILES} & {"utils", "common", "helpers", "util", "misc"}


def test_only_the_flower_folder_imports_flower() -> None:
    for path in FILES:
        if part_of(path) == "flower":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert "flwr" not in {name.split(".")[0] for name in names}, path


def test_the_core_does_not_import_the_flower_folder_at_its_top() -> None:
    for path in FILES:
        if part_of(path) not in ("flower", "cli"):
            assert "flower" not in imported_parts(path), path
    top = ast.parse((SOURCE / "cli.py").read_text()).body
    assert not any("flower" in ast.dump(node) for node in top if isinstance(node, ast.Import | ast.ImportFrom))


def test_no_pickle() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "cloudpickle", "dill", "joblib"} & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, path
