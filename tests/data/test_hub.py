"""Downloads, from a local server that answers like the hub: the datasets library itself is under test with ours."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets")

SOURCE = Path(__file__).parents[2] / "src"
LOADER = """
import json, sys
from fedftg.data.config import DataConfig
from fedftg.data.sources import load
from fedftg.errors import InputError
for text in sys.argv[1:]:
    try:
        data = load(DataConfig(**json.loads(text)))
        print(json.dumps([list(data.train_images.shape), data.train_labels.tolist(), len(data.test_labels)]))
    except InputError as error:
        print(json.dumps(str(error)))
"""
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def fake_hub():
    spec = importlib.util.spec_from_file_location("fake_hub", Path(__file__).with_name("fake_hub.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(home, endpoint, *configs, **environment):
    """What loading each configuration gives, in a process of its own: the library reads its settings when imported."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "FEDFTG_CACHE": str(home / "decoded"),
        "PYTHONPATH": str(SOURCE),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, "-W", "error", "-c", LOADER, *map(json.dumps, configs)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def write_svhn(hub, repository):
    """The layout of ufldl-stanford/svhn: two configurations, of which the first is not to be taken."""
    for split, count in (("train", 20), ("test", 10), ("extra", 30)):
        images = [hub.encode(image) for image in hub.colour(count)]
        path = repository / "cropped_digits" / f"{split}-00000-of-00001.parquet"
        labels = {"label": [row % 10 for row in range(count)]}
        hub.write(path, images, labels, image_name="image", names={"label": DIGITS})
    hub.write(repository / "full_numbers" / "train-00000-of-00001.parquet", [b"x"], {"digits": [0]}, image_name="image")
    lines = ["---", "configs:"]
    for subset, splits in (("full_numbers", ["train"]), ("cropped_digits", ["train", "test", "extra"])):
        lines += [f"- config_name: {subset}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {subset}/{split}-*"]
    (repository / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.mark.slow
def test_download_that_breaks_off_then_whole_then_offline(tmp_path, hub, fake_hub):
    write_svhn(hub, tmp_path / "hub" / "ufldl-stanford" / "svhn")
    home, svhn = tmp_path / "home", {"name": "svhn"}
    with fake_hub.serving(tmp_path / "hub") as server:
        server.cut_after = 100
        (message,) = load(home, server.url, svhn)
        assert message.startswith("ufldl-stanford/svhn cannot be loaded from the hub (peer closed connection")
        assert message.endswith(
            "where there is network run 'hf download ufldl-stanford/svhn --repo-type dataset --local-dir DIR "
            '--include "cropped_digits/*"\', and set data.root to DIR'
        )
        assert not [path for path in home.rglob("*") if path.suffix in (".arrow", ".incomplete")]
        server.cut_after = None
        extra = {"name": "svhn", "train_split": "extra"}
        generic = {"name": "hub", "hub_id": "ufldl-stanford/svhn"}
        found = load(home, server.url, svhn, extra, generic, {**generic, "subset": "cropped_digits", "max_train": 10})
        assert found[0] == [[20, 3, 32, 32], [*range(10), *range(10)], 10]
        assert found[1] == [[30, 3, 32, 32], [row % 10 for row in range(30)], 10]
        assert "full_numbers" in found[2]
        assert "correct data.hub_id or data.subset" in found[2]
        assert (found[3][0], sorted(found[3][1])) == ([10, 3, 32, 32], list(range(10)))
        assert not any("full_numbers" in asked and asked.endswith(".parquet") for asked in server.asked)
    # The server is gone: what was downloaded is found, and another set is not.
    found = load(home, "http://127.0.0.1:9", svhn, {"name": "mnist"}, HF_HUB_OFFLINE="1")
    assert found[0] == [[20, 3, 32, 32], [*range(10), *range(10)], 10]
    assert '--local-dir DIR --include "mnist/*"\', and set data.root to DIR' in found[1]


@pytest.mark.slow
def test_unknown_id_and_images_beside_the_table(tmp_path, hub, fake_hub):
    """A repository of image files in class folders: the library's arrow files then only name the images."""
    for split, count in (("train", 3), ("test", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "hub" / "me" / "pets" / split / label
            folder.mkdir(parents=True)
            for number, image in enumerate(hub.colour(count, size=8)):
                (folder / f"{number}.png").write_bytes(hub.encode(image))
    with fake_hub.serving(tmp_path / "hub") as server:
        pets = {"name": "hub", "hub_id": "me/pets"}
        found = load(tmp_path / "home", server.url, pets, {"name": "hub", "hub_id": "me/nothing"})
    assert found[0] == [[6, 3, 8, 8], [0, 0, 0, 1, 1, 1], 4]
    assert found[1].startswith(
        "me/nothing cannot be loaded from the hub (Dataset 'me/nothing' doesn't exist on the Hub"
    )


def test_without_the_library(monkeypatch):
    from fedftg.data.config import DataConfig
    from fedftg.data.sources import load as load_here
    from fedftg.errors import InputError

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'fedftg\[data\]', or set data\.root"):
        load_here(DataConfig(name="cifar10"))
