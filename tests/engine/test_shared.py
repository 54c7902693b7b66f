import os
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
import torch

from fedftg.engine.shared import Inbox, Outbox, file_behind
from fedftg.params import Params


def test_received_tensors_keep_strides_and_identity() -> None:
    image = torch.randn(3, 8, 8, 1).permute(0, 3, 1, 2)
    tensors: Params = {
        "image": image,
        "turned": torch.randn(4, 5).t(),
        "gaps": torch.arange(12.0)[::2],
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
    }
    ours, theirs = Pipe()
    outbox, inbox = Outbox(), Inbox()
    outbox.write({"a": tensors, "b": {"same": image}})
    for copy in (False, True):
        outbox.send(ours)
        found = inbox.receive(theirs, copy=copy)
        for name, tensor in tensors.items():
            assert torch.equal(found["a"][name], tensor), name
            assert found["a"][name].dtype == tensor.dtype
        assert found["a"]["image"].stride() == image.stride()
        assert found["b"]["same"] is found["a"]["image"]


def test_memory_is_reused_and_grows_and_copies_stay() -> None:
    ours, theirs = Pipe()
    outbox, inbox = Outbox(), Inbox()
    received = []
    for value, size, copy in ((1.0, 2, True), (2.0, 2, False), (3.0, 2, False), (4.0, 100_000, False)):
        outbox.write({"a": {"x": torch.full((size,), value)}})
        outbox.send(ours)
        received.append(inbox.receive(theirs, copy=copy)["a"]["x"])
    outbox.close()
    assert [tensor[1].item() for tensor in received] == [1.0, 3.0, 3.0, 4.0]
    outbox.write({"none": {}})
    outbox.send(ours)
    assert inbox.receive(theirs) == {"none": {}}
    outbox.close()


def test_without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    ours, theirs = Pipe()
    outbox = Outbox()
    outbox.write({"a": {"x": torch.arange(3)}})
    outbox.send(ours)
    assert Inbox().receive(theirs)["a"]["x"].tolist() == [0, 1, 2]


def test_finds_the_file_behind_a_memory_map(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    np.save(path, np.arange(60_000, dtype=np.uint8).reshape(100, 1, 20, 30))
    images = torch.from_numpy(np.load(path, mmap_mode="c"))
    found = file_behind(images)
    if found is None:
        pytest.skip("no /proc/self/smaps here")
    name, start = found
    assert Path(name).read_bytes()[start:] == images.numpy().tobytes()
    assert file_behind(images[:, :, ::2]) is None
    images[0] = 0
    assert file_behind(images) is None, "it was written to: the file is no longer what the process sees"
    assert file_behind(torch.zeros(5)) is None
    other = torch.from_numpy(np.load(path, mmap_mode="c"))
    path.unlink()
    assert file_behind(other) is None
