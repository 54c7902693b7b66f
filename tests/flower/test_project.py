"""`fedftg flower new` writes an app that Flower takes, and nothing where it should not."""

import importlib.util
import io
import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.fab_format_version import normalize_and_validate_fab_format, validate_fab_files_for_format

import fedftg
from fedftg import config as configs
from fedftg.flower import project
from fedftg.flower.settings import AppSettings, NodeSettings, on_node, on_server


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_app_has_everything(tmp_path: Path) -> None:
    overrides = ["rounds=7", "partition.num_clients=6", "algorithm.name=scaffold"]
    written = project.new(tmp_path / "My App", None, overrides)
    assert all(path.is_file() for path in written)
    given = tomllib.loads((tmp_path / "My App" / "pyproject.toml").read_text())
    assert given["project"]["name"] == "my-app"
    app = given["tool"]["flwr"]["app"]
    assert AppSettings(**app["config"]) == AppSettings()
    assert set(app["config"]) == {field.alias for field in AppSettings.model_fields.values()}
    package = tmp_path / "My App" / project.PACKAGE
    recipe = configs.load(package / "recipe.toml")
    assert (recipe.rounds, recipe.partition.num_clients, recipe.algorithm.name) == (7, 6, "scaffold")
    for side, kind in (("server", ServerApp), ("client", ClientApp)):
        assert app["components"][f"{side}app"] == f"{project.PACKAGE}.{side}_app:app"
        assert isinstance(loaded(package / f"{side}_app.py").app, kind)
    validate_fab_files_for_format(given, [str(path.relative_to(tmp_path / "My App")) for path in written])
    assert normalize_and_validate_fab_format(given).fab_format_version == 1
    assert "num-supernodes=6" in (tmp_path / "My App" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pathspec's, of Flower's call
@pytest.mark.parametrize(
    ("folder", "name"),
    [("my_app", "my-app"), ("1st try", "st-try"), ("2026", "app"), ("_.x", "x"), ("l" * 40, "l" * 32), ("né-e", "n-e")],
)
def test_flower_takes_the_name_that_any_folder_gives(tmp_path: Path, folder: str, name: str) -> None:
    project.new(tmp_path / folder, None, [])
    content = build_fab_from_disk(tmp_path / folder)
    assert tomllib.loads((tmp_path / folder / "pyproject.toml").read_text())["project"]["name"] == name
    with zipfile.ZipFile(io.BytesIO(content)) as fab:
        assert {"LICENSE", "README.md", f"{project.PACKAGE}/recipe.toml"} <= set(fab.namelist())


def test_mistakes_are_one_line_and_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for folder, message in (("taken", "exists already"), ("file", "exists already"), ("file/app", "Not a directory")):
        with pytest.raises(fedftg.InputError, match=message):
            project.new(tmp_path / folder, None, [])
    for overrides in (["local.lrr=1"], ["data.name=tensors"]):
        with pytest.raises(fedftg.InputError):
            project.new(tmp_path / "fresh", None, overrides)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
    (tmp_path / "empty").mkdir()
    assert project.new(tmp_path / "empty", "default_base", [])


def test_the_command_line(tmp_path: Path) -> None:
    """Without Flower it is one line that names the extra."""
    script = (
        "import sys; sys.modules['flwr'] = None; from fedftg.cli import main; "
        "sys.argv = ['fedftg', 'flower', 'new', 'app']; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "fedftg: Flower is not installed; pip install 'fedftg[flower]'\n"
    assert not (tmp_path / "app").exists()


def test_an_app_holds_wherever_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved partition travels with it, a relative data.root becomes absolute, and plugins are named."""
    monkeypatch.chdir(tmp_path)
    rows = [list(range(client, 100, 3)) for client in range(3)]
    Path("mine.json").write_text(json.dumps(rows))
    overrides = ["partition.law=file", "partition.file=mine.json", "data.name=cifar10", "data.root=somewhere"]
    project.new(Path("app"), None, [*overrides, "plugins=['json']"])
    Path("mine.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    Path("app").rename(tmp_path / "elsewhere" / "app")
    package = tmp_path / "elsewhere" / "app" / project.PACKAGE
    given = on_server(package / "recipe.toml", AppSettings())
    assert given.partition.file is not None
    assert json.loads(given.partition.file.read_text()) == rows
    assert given.data.root == tmp_path / "somewhere"
    node = on_node(package / "recipe.toml", AppSettings(), NodeSettings(**{"partition-id": 1}))
    assert node.partition.file == given.partition.file
    assert "module `json` must be installed" in (tmp_path / "elsewhere" / "app" / "README.md").read_text()
    with pytest.raises(fedftg.InputError, match=r"gone\.json: No such file"):
        project.new(Path("other"), None, ["partition.law=file", "partition.file=gone.json"])
    assert not Path("other").exists()
