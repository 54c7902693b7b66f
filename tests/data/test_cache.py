"""Decoded images on disk: found by the files' state, written whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedftg.data import cache, decode
from fedftg.data.config import DataConfig
from fedftg.data.sources import load
from fedftg.errors import InputError

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def root(tmp_path, hub):
    hub.write_set(tmp_path / "set", hub.colour(6, size=8), [0, 1, 2, 0, 1, 2])
    return tmp_path / "set"


@pytest.fixture
def decoded(monkeypatch):
    """Grows by one with each image that is decoded."""
    counted, whole = [], decode.decode
    monkeypatch.setattr(decode, "decode", lambda *given: counted.append(given) or whole(*given))
    return counted


def read(root, folder, **options):
    return load(DataConfig(name="parquet", root=root, cache=str(folder), **options))


def entries(folder):
    assert not list(folder.glob("part-*"))
    return sorted(path.stem for path in folder.glob("*.npy"))


def test_second_start_decodes_nothing_and_gives_the_same(tmp_path, root, decoded):
    first = read(root, tmp_path / "cache")
    assert len(decoded) == 12
    again = read(root, tmp_path / "cache")
    assert len(decoded) == 12
    for other in (again, read(root, "none")):
        assert torch.equal(first.train_images, other.train_images)
        assert torch.equal(first.test_images, other.test_images)
        assert (first.mean, first.std, first.converted) == (other.mean, other.std, other.converted)


def test_images_are_mapped_and_changes_of_them_are_not_kept(tmp_path, root):
    first = read(root, tmp_path / "cache")
    before = first.train_images.clone()
    first.train_images.zero_()
    assert torch.equal(read(root, tmp_path / "cache").train_images, before)
    (entry,) = entries(tmp_path / "cache")
    raw = np.load(tmp_path / "cache" / f"{entry}.npy", allow_pickle=False)
    assert raw.shape == (12, 3, 8, 8)
    assert raw[:6].tobytes() == before.numpy().tobytes()


def test_what_makes_an_entry_of_its_own(tmp_path, root, hub, decoded):
    def count(**options):
        read(root, tmp_path / "cache", **options)
        return len(entries(tmp_path / "cache"))

    options = [{}, {"image_size": 16}, {"image_size": 16, "resize": "stretch"}, {"max_train": 3}]
    assert [count(**part) for part in options] == [1, 2, 3, 4]
    assert count(augment="flip") == 4
    path = root / "test-00000-of-00001.parquet"
    os.utime(path, (1, 1))
    assert count() == 5
    images = hub.colour(6, size=8, seed=1)
    hub.write(path, [hub.encode(image) for image in images], {"label": [0, 1, 2] * 2}, names={"label": ["x", "y", "z"]})
    data = read(root, tmp_path / "cache")
    assert torch.equal(data.test_images, torch.from_numpy(images).permute(0, 3, 1, 2))


@pytest.mark.parametrize(("suffix", "content"), [("npy", b""), ("npy", None), ("json", b"{"), ("json", None)])
def test_damaged_entry_is_made_again(tmp_path, root, decoded, suffix, content):
    first = read(root, tmp_path / "cache").train_images.clone()  # not mapped: the file is cut below
    (path,) = (tmp_path / "cache").glob(f"*.{suffix}")
    path.unlink() if content is None else path.write_bytes(content)
    assert torch.equal(read(root, tmp_path / "cache").train_images, first)
    assert len(decoded) == 24


def test_a_killed_process_leaves_no_entry(tmp_path, root):
    """The process stops at the tenth of twelve images, and is killed."""
    code = (
        "import sys, time\nfrom fedftg.data import decode\nfrom fedftg.data.config import DataConfig\n"
        "from fedftg.data.sources import load\nleft, whole = iter(range(9)), decode.decode\n"
        "def stall():\n    print('decoding', flush=True)\n    time.sleep(60)\n"
        "decode.decode = lambda *given: whole(*given) if next(left, None) is not None else stall()\n"
        "load(DataConfig(name='parquet', root=sys.argv[1], cache=sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(root), str(tmp_path / "cache")]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"decoding\n"
        process.send_signal(signal.SIGKILL)
    assert not list((tmp_path / "cache").glob("*.*"))
    assert torch.equal(read(root, tmp_path / "cache").train_images, read(root, "none").train_images)


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, hub):
    """A limit on the size of files stands for the full disk; 3,000 images of 32x32 are 9 MB."""
    content = [hub.encode(hub.colour(1)[0])] * 1500
    for split in ("train", "test"):
        hub.write(tmp_path / "set" / f"{split}.parquet", content, {"label": [0, 1] * 750})
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from fedftg.data.config import DataConfig\nfrom fedftg.data.sources import load\n"
        "load(DataConfig(name='parquet', root=sys.argv[1], cache=sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "set"), str(tmp_path / "cache")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(SOURCE)}, capture_output=True, text=True)
    assert f"InputError: cannot write to {tmp_path / 'cache'}" in done.stderr
    assert not list((tmp_path / "cache").iterdir())


def test_folder_that_cannot_be_written(tmp_path, root):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*; set data\.cache"):
        read(root, tmp_path / "file" / "cache")


def test_where_the_folder_is(monkeypatch):
    monkeypatch.setenv("FEDFTG_CACHE", "~/mine")
    folders = [Path.home() / "mine", Path("/other"), None]
    assert [cache.folder(setting) for setting in ("auto", "/other", "none")] == folders
    monkeypatch.setenv("FEDFTG_CACHE", "none")
    assert cache.folder("auto") is None
    monkeypatch.delenv("FEDFTG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.folder("auto") == Path("/x/fedftg")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder("auto") == Path.home() / ".cache" / "fedftg"
