"""Each part imports only what lies below it (docs/design.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "fedftg"
ORDER = (
    "augment params precision seeds errors recipes registry", "distill models data", "algorithms", "engine rundir",
    "track", "config", "progress", "experiment report oneshot", "build export", "loop", "flower", "cli __init__",
)  # fmt: skip
LAYERS = {name: level for level, names in enumerate(ORDER) for name in names.split()}
ISLANDS = {"distill", "models", "data", "report"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib"}


def imports(path: Path, nodes: list[ast.stmt] | None = None) -> Iterator[str]:
    """The full name of every module that a file, or some statements of it, imports."""
    for node in ast.walk(ast.parse(path.read_text())) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "fedftg":
            yield from (f"fedftg.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_imports_go_down() -> None:
    for path in sorted(SOURCE.rglob("*.py")):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        names = set(imports(path))
        for other in {name.split(".")[1] for name in names if name.startswith("fedftg.")} - {part, "__version__"}:
            assert other in LAYERS, f"{other} has no place in the layers"
            assert LAYERS[other] <= LAYERS[part], f"{path} must not import {other}"
            assert LAYERS[other] < LAYERS[part] or not ({part, other} & ISLANDS), f"{path}: {other} is an island"
        libraries = {name.split(".")[0] for name in names}
        assert "flwr" not in libraries or part == "flower", path
        # Files and messages are never unpickled; a worker is a process of our own.
        assert not PICKLES & libraries or path.name == "workers.py", path
        assert "torch.load(" not in path.read_text(), path
    top = imports(SOURCE / "cli.py", ast.parse((SOURCE / "cli.py").read_text()).body)
    assert not any(name.startswith("fedftg.flower") for name in top), "flower is imported when its command is called"


def test_report_reads_only_folders() -> None:
    for path in (SOURCE / "report").glob("*.py"):
        parts = {name.split(".")[1] for name in imports(path) if name.startswith("fedftg.")}
        assert parts <= {"report", "errors", "rundir"}, path
