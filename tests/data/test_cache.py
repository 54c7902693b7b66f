"""Decoded images on disk: found by the files' state, written whole or not at all."""

import os
import signal
import subprocess
import sys
import time
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


def test_progress_counts_what_is_decoded(tmp_path, root):
    counts = []
    for _ in range(2):
        config = DataConfig(name="parquet", root=root, cache=str(tmp_path / "cache"))
        load(config, progress=lambda done, total: counts.append((done, total)))
    assert counts == [(6, 12), (12, 12)]


def test_bad_image_leaves_nothing(tmp_path, root, hub):
    hub.write(root / "test-00000-of-00001.parquet", [b"x"], {"label": [0]}, names={"label": ["x", "y", "z"]})
    with pytest.raises(InputError, match="row 0: the image is corrupt"):
        read(root, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize(("suffix", "content"), [("npy", b""), ("npy", None), ("json", b"{"), ("json", None)])
def test_damaged_entry_is_made_again(tmp_path, root, decoded, suffix, content):
    first = read(root, tmp_path / "cache").train_images.clone()  # not mapped: the file is cut below
    (path,) = (tmp_path / "cache").glob(f"*.{suffix}")
    path.unlink() if content is None else path.write_bytes(content)
    assert torch.equal(read(root, tmp_path / "cache").train_images, first)
    assert len(decoded) == 24


STALLS = """
import sys, time
from fedftg.data import decode
from fedftg.data.config import DataConfig
from fedftg.data.sources import load
whole, count = decode.decode, [0]
def stalled(*given):
    count[0] += 1
    if count[0] == 9:
        print("decoding", flush=True)
        time.sleep(60)
    return whole(*given)
decode.decode = stalled
load(DataConfig(name="parquet", root=sys.argv[1], cache=sys.argv[2]))
"""


def test_a_killed_process_leaves_no_entry_and_is_cleaned_up_after_a_day(tmp_path, root):
    command = [sys.executable, "-c", STALLS, str(root), str(tmp_path / "cache")]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"decoding\n"
        process.send_signal(signal.SIGKILL)
    (left,) = (tmp_path / "cache").iterdir()
    first = read(root, tmp_path / "cache")
    assert left.is_dir()  # another process may still be writing it
    os.utime(left, (time.time() - 90_000,) * 2)
    read(root, tmp_path / "cache", max_train=3)
    assert not left.exists()
    assert torch.equal(first.train_images, read(root, "none").train_images)


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, hub):
    """A limit on the size of files stands for the full disk; 3,000 images of 32x32 are 9 MB."""
    content = [hub.encode(hub.colour(1)[0])] * 1500
    for split in ("train", "test"):
        hub.write(tmp_path / "set" / f"{split}.parquet", content, {"label": [0] * 1500})
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from fedftg.data.config import DataConfig\nfrom fedftg.data.sources import load\n"
        "load(DataConfig(name='parquet', root=sys.argv[1], cache=sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "set"), str(tmp_path / "cache")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(SOURCE)}, capture_output=True, text=True)
    assert f"InputError: decoded images cannot be kept in {tmp_path / 'cache'}" in done.stderr
    assert not list((tmp_path / "cache").iterdir())


def test_folder_that_cannot_be_written(tmp_path, root):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be kept in .*; free space or make it writable, or set data\.cache"):
        read(root, tmp_path / "file" / "cache")


def test_where_the_folder_is(monkeypatch):
    monkeypatch.setenv("FEDFTG_CACHE", "~/mine")
    assert cache.folder("auto") == Path.home() / "mine"
    assert cache.folder("/other") == Path("/other")
    assert cache.folder("none") is None
    monkeypatch.setenv("FEDFTG_CACHE", "none")
    assert cache.folder("auto") is None
    monkeypatch.delenv("FEDFTG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.folder("auto") == Path("/x/fedftg")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder("auto") == Path.home() / ".cache" / "fedftg"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux for the peak of this process alone")
def test_memory_does_not_grow_with_the_set(tmp_path, hub):
    """2,400 images of 256x256 are 472 MB; decoding them takes far less, and no more from the 300th to the last."""
    content = [hub.encode(image, "JPEG") for image in hub.colour(20, size=256)]
    root = tmp_path / "set"
    hub.write(root / "train.parquet", content * 120, {"label": [0] * 2400}, row_group_size=100)
    hub.write(root / "test.parquet", content[:2], {"label": [0] * 2})
    program = f"""
from fedftg.data.config import DataConfig
from fedftg.data.sources import load
def peak():  # getrusage would give the peak of the process that started this one, where that was higher
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
peaks = [peak()]
def progress(done, total):
    if done >= 300:
        peaks.append(peak())
load(DataConfig(name="parquet", root={str(root)!r}, cache={str(tmp_path / "cache")!r}), progress=progress)
print(peaks[0], peaks[1], peaks[-1])
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    before, early, last = (int(peak) / 1024 for peak in done.stdout.split())
    assert last - before < 300, (before, early, last)
    assert last - early < 40, (before, early, last)
