"""Decoded images on disk: found by content, written whole or not at all, by one process at a time."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedftg.data import assemble, cache
from fedftg.data.config import DataConfig
from fedftg.data.sources import load
from fedftg.errors import InputError

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def decoded_count(monkeypatch):
    """How many images are decoded from here on."""
    counts = [0]
    whole = assemble.decoded

    def counted(*arguments):
        for block in whole(*arguments):
            counts[0] += len(block)
            yield block

    monkeypatch.setattr(assemble, "decoded", counted)
    return counts


@pytest.fixture
def root(tmp_path, hub, monkeypatch):
    """Six training and six test images that count as written a while ago."""
    hub.write_set(tmp_path / "set", hub.colour(6, size=8), [0, 1, 2, 0, 1, 2])
    monkeypatch.setattr(cache, "_RECENT", -1.0)
    return tmp_path / "set"


def read(root, folder, **options):
    return load(DataConfig(name="parquet", root=root, cache=str(folder), **options))


def entries(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "stamps")


def test_second_start_decodes_nothing_reads_no_file_and_gives_the_same(tmp_path, root, decoded_count, monkeypatch):
    first = read(root, tmp_path / "cache")
    assert decoded_count == [12]
    monkeypatch.setattr(cache, "_file_digest", lambda path: pytest.fail(f"{path} was read again"))
    again = read(root, tmp_path / "cache")
    plain = read(root, "none")
    assert decoded_count == [24]
    for other in (again, plain):
        assert torch.equal(first.train_images, other.train_images)
        assert torch.equal(first.test_images, other.test_images)
        assert (first.mean, first.std, first.converted) == (other.mean, other.std, other.converted)


def test_images_are_mapped_and_changes_of_them_are_not_kept(tmp_path, root):
    first = read(root, tmp_path / "cache")
    before = first.train_images.clone()
    first.train_images.zero_()
    assert torch.equal(read(root, tmp_path / "cache").train_images, before)
    (entry,) = entries(tmp_path / "cache")
    raw = np.load(tmp_path / "cache" / entry / "train.npy", allow_pickle=False)
    assert raw.shape == (6, 3, 8, 8)
    assert raw.tobytes() == before.numpy().tobytes()


def test_a_copied_set_is_found_by_its_content(tmp_path, root, decoded_count):
    read(root, tmp_path / "cache")
    shutil.copytree(root, tmp_path / "copy")
    read(tmp_path / "copy", tmp_path / "cache")
    assert decoded_count == [12]


def test_a_changed_set_is_decoded_again_even_at_the_same_size_and_name(tmp_path, root, hub, decoded_count):
    """Uncompressed images: another picture has the same number of bytes. Only the time of change tells."""
    read(root, tmp_path / "cache")
    path = root / "test-00000-of-00001.parquet"
    size = path.stat().st_size
    images = hub.colour(6, size=8, seed=1)
    hub.write(path, [hub.encode(image) for image in images], {"label": [0, 1, 2] * 2}, names={"label": ["x", "y", "z"]})
    assert abs(path.stat().st_size - size) < 200
    data = read(root, tmp_path / "cache")
    assert decoded_count == [24]
    assert torch.equal(data.test_images, torch.from_numpy(images).permute(0, 3, 1, 2))


def test_files_changed_a_moment_ago_are_not_trusted_by_their_time(tmp_path, root, monkeypatch):
    monkeypatch.setattr(cache, "_RECENT", 2.0)
    read(root, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("stamps/*"))
    for path in root.iterdir():  # an old time of change is no proof either: it can be set
        os.utime(path, (1, 1))
    read(root, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("stamps/*"))
    monkeypatch.setattr(cache, "_RECENT", -1.0)
    read(root, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("stamps/*.json"))) == 1


@pytest.mark.parametrize("change", [{"image_size": 16}, {"image_size": 16, "resize": "stretch"}, {"max_train": 3}])
def test_settings_that_decide_the_pixels_have_entries_of_their_own(tmp_path, root, change):
    read(root, tmp_path / "cache")
    read(root, tmp_path / "cache", image_size=24)
    read(root, tmp_path / "cache", **change)
    assert len(entries(tmp_path / "cache")) == 3
    read(root, tmp_path / "cache", **change, augment="flip")
    assert len(entries(tmp_path / "cache")) == 3


def test_grey_sets_and_sets_that_turn_out_to_have_colour(tmp_path, hub):
    """A colour image among the last of the test images makes all images of both splits colour, here as in memory."""
    grey = hub.grey(400)
    content = [hub.encode(image) for image in grey]
    hub.write(tmp_path / "set" / "train.parquet", content, {"label": [0] * 400})
    hub.write(tmp_path / "set" / "test.parquet", content[:100], {"label": [0] * 100})
    data = read(tmp_path / "set", tmp_path / "cache")
    assert data.image_shape == (1, 8, 8)
    assert data.converted == {}
    late = [*content[:99], hub.encode(hub.colour(1, size=8)[0])]
    for train, test in ((content, late), ([*late, *content[100:]], content[:100])):
        hub.write(tmp_path / "set" / "train.parquet", train, {"label": [0] * 400})
        hub.write(tmp_path / "set" / "test.parquet", test, {"label": [0] * 100})
        for folder in (tmp_path / "cache", "none"):
            data = read(tmp_path / "set", folder)
            assert data.train_images.shape == (400, 3, 8, 8)
            assert data.converted == {"grey": 499}
            expected = torch.from_numpy(grey)[:, None].expand(400, 3, 8, 8)
            assert torch.equal(data.train_images[:99], expected[:99])
            assert torch.equal(data.train_images[100:], expected[100:])
            assert torch.equal(data.test_images[:99], expected[:99])


def test_progress_counts_what_is_decoded(tmp_path, root):
    told = []
    config = DataConfig(name="parquet", root=root, cache=str(tmp_path / "cache"))
    load(config, progress=lambda done, total: told.append((done, total)))
    assert told == [(6, 12), (12, 12)]
    load(config, progress=lambda done, total: told.append((done, total)))
    assert len(told) == 2


def test_bad_image_leaves_nothing(tmp_path, root, hub):
    hub.write(root / "test-00000-of-00001.parquet", [b"x"], {"label": [0]}, names={"label": ["x", "y", "z"]})
    with pytest.raises(InputError, match="row 0: the image is corrupt"):
        read(root, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_damaged_entry_is_made_again(tmp_path, root, decoded_count):
    before = read(root, tmp_path / "cache").train_images.clone()
    (entry,) = entries(tmp_path / "cache")
    with (tmp_path / "cache" / entry / "train.npy").open("r+b") as file:
        file.truncate(200)
    assert torch.equal(read(root, tmp_path / "cache").train_images, before)
    (tmp_path / "cache" / entry / "meta.json").write_text("{")
    for stamp in (tmp_path / "cache" / "stamps").iterdir():
        stamp.write_text("{")
    assert torch.equal(read(root, tmp_path / "cache").train_images, before)
    assert decoded_count == [36]
    content = (tmp_path / "cache" / entry / "train.npy").read_bytes()
    for wrong in (b"x" * len(content), content.replace(b"|u1", b"|i1")):  # of the right size, with another header
        (tmp_path / "cache" / entry / "train.npy").write_bytes(wrong)
        assert torch.equal(read(root, tmp_path / "cache").train_images, before)
    meta = tmp_path / "cache" / entry / "meta.json"
    meta.write_text(json.dumps({name: value for name, value in json.loads(meta.read_text()).items() if name != "std"}))
    assert torch.equal(read(root, tmp_path / "cache").train_images, before)
    assert decoded_count == [72]
    header = content.replace(b"(6, 3, 8, 8)", b"(3, 6, 8, 8)")
    for wrong in (header, content.replace(b"), }", b"(, }"), b"PK\x03\x04" + content[4:]):
        (tmp_path / "cache" / entry / "train.npy").write_bytes(wrong)
        assert torch.equal(read(root, tmp_path / "cache").train_images, before)
    whole = json.loads(meta.read_text())
    for change in ({"converted": []}, {"converted": 3}, {"mean": [0.5]}, {"shape": None}):
        meta.write_text(json.dumps(whole | change))
        data = read(root, tmp_path / "cache")
        assert (torch.equal(data.train_images, before), len(data.mean), data.converted) == (True, 3, {})


def test_a_set_that_changes_while_it_is_read_is_not_kept(tmp_path, root, hub, monkeypatch):
    whole = assemble.decoded

    def changing(*arguments):
        yield from whole(*arguments)
        hub.write_set(root, hub.colour(6, size=8, seed=3), [0, 1, 2, 0, 1, 2])

    monkeypatch.setattr(assemble, "decoded", changing)
    with pytest.raises(InputError, match="the data changed while they were read"):
        read(root, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_new_times_alone_are_no_change(tmp_path, root, hub, monkeypatch):
    whole = assemble.decoded

    def touching(*arguments):
        yield from whole(*arguments)
        for path in root.iterdir():
            os.utime(path, (5, 5))

    monkeypatch.setattr(assemble, "decoded", touching)
    read(root, tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 1


def test_an_entry_that_another_process_made_anew_is_not_discarded(tmp_path, root):
    read(root, tmp_path / "cache")
    (key,) = entries(tmp_path / "cache")
    seen = cache.identity(tmp_path / "cache" / key)
    shutil.rmtree(tmp_path / "cache" / key)
    read(root, tmp_path / "cache")
    assert cache.discard(tmp_path / "cache", key, seen)
    assert entries(tmp_path / "cache") == [key]
    assert cache.discard(tmp_path / "cache", key, cache.identity(tmp_path / "cache" / key))
    assert entries(tmp_path / "cache") == []


def test_a_stamp_that_cannot_be_kept_is_no_error(tmp_path, root, decoded_count):
    read(root, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "stamps")
    (tmp_path / "cache" / "stamps").write_text("in the way")
    read(root, tmp_path / "cache")
    assert decoded_count == [12]


def test_stamps_that_were_never_put_in_place_are_swept(tmp_path, root):
    stamps = tmp_path / "cache" / "stamps"
    stamps.mkdir(parents=True)
    for name, time_ in (("a.123", 1), ("b.456", time.time()), ("c.json", 1)):
        (stamps / name).write_text("{}")
        os.utime(stamps / name, (time_, time_))
    read(root, tmp_path / "cache")
    assert {path.name for path in stamps.iterdir()} >= {"b.456", "c.json"}
    assert not (stamps / "a.123").exists()


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_folder_name_is_refused(value):
    with pytest.raises(ValueError, match="cache"):
        DataConfig(cache=value)


def make_slowly(folder):
    (folder / "train.npy").write_bytes(b"123")
    time.sleep(0.5)
    with (folder / "made").open("a") as file:
        file.write("x")
    return {"bytes": {"train.npy": 3}}


def test_second_process_waits_for_the_first(tmp_path):
    """Four at once: one makes the entry, the others take it; more than one maker would fail on the part's folder."""
    calls = []

    def make(folder):
        calls.append(folder)
        return make_slowly(folder)

    threads = [threading.Thread(target=cache.open_or_make, args=(tmp_path, "key", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert (tmp_path / "key" / "made").read_text() == "x"


def make_and_hang(root, ready):
    def make(folder):
        (folder / "train.npy").write_bytes(b"half")
        ready.set()
        time.sleep(60)

    cache.open_or_make(root, "key", make)


def test_what_a_killed_process_left_is_swept_but_not_what_a_living_one_writes(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=make_and_hang, args=(tmp_path, ready))
    process.start()
    try:
        assert ready.wait(60)
        cache.open_or_make(tmp_path, "other", lambda folder: {"bytes": {}})
        assert (tmp_path / "key.part" / "train.npy").read_bytes() == b"half"
    finally:
        process.kill()
        process.join()
    assert (tmp_path / "key.part").is_dir()
    cache.open_or_make(tmp_path, "third", lambda folder: {"bytes": {}})
    assert not (tmp_path / "key.part").exists()
    assert entries(tmp_path) == ["other", "third"]


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, hub):
    """A limit of 100 kB on the size of a file: 300 images of 32x32x3 take 921 kB."""
    hub.write_set(tmp_path / "set", hub.colour(300), [0] * 300)
    program = f"""
import resource
from fedftg.data.config import DataConfig
from fedftg.data.sources import load
from fedftg.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    load(DataConfig(name="parquet", root={str(tmp_path / "set")!r}, cache={str(tmp_path / "cache")!r}))
except InputError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(f"decoded images cannot be kept in {tmp_path / 'cache'} ([Errno 27] File too large)")
    assert done.stdout.rstrip().endswith("set data.cache to another folder, or to none to keep them in memory")
    assert entries(tmp_path / "cache") == []


def test_folder_that_cannot_be_written(tmp_path, root):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"decoded images cannot be kept in .*file/cache \(.*data\.cache"):
        read(root, tmp_path / "file" / "cache")


def test_where_the_folder_is(monkeypatch):
    monkeypatch.setenv("FEDFTG_CACHE", "/a")
    assert cache.folder("auto") == Path("/a")
    assert cache.folder("~/b") == Path.home() / "b"
    assert cache.folder("none") is None
    monkeypatch.setenv("FEDFTG_CACHE", "none")
    assert cache.folder("auto") is None
    monkeypatch.delenv("FEDFTG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache.folder("auto") == Path("/c/fedftg")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder("auto") == Path.home() / ".cache" / "fedftg"


def test_entry_says_what_it_holds(tmp_path, root):
    read(root, tmp_path / "cache")
    (entry,) = entries(tmp_path / "cache")
    meta = json.loads((tmp_path / "cache" / entry / "meta.json").read_text())
    assert (meta["format"], meta["shape"], meta["converted"]) == (cache.FORMAT, [3, 8, 8], {})
    assert meta["bytes"]["train.npy"] == 128 + 6 * 3 * 8 * 8


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux for the peak of this process alone")
def test_memory_does_not_grow_with_the_set(tmp_path, hub):
    """2,400 images of 256x256 are 472 MB; decoding them takes far less, and no more from the 300th to the last."""
    content = [hub.encode(image, "JPEG") for image in hub.colour(20, size=256)]
    root = tmp_path / "set"
    hub.write(root / "train.parquet", content * 120, {"label": [0] * 2400}, row_group_size=100)
    hub.write(root / "test.parquet", content[:2], {"label": [0] * 2})
    program = f"""
from fedftg.data import assemble
from fedftg.data.config import DataConfig
from fedftg.data.sources import load
assemble.measured_normalisation = lambda images: ((0.5,) * 3, (0.5,) * 3)  # it maps the file: pages count
def peak():  # getrusage would tell the peak of the process that started this one, where that was higher
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
