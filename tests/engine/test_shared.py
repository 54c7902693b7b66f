import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fedftg.engine.shared import Segment, file_behind, mapped


def test_written_tensors_come_back_with_their_strides() -> None:
    image = torch.randn(3, 8, 8, 1).permute(0, 3, 1, 2)
    tensors = {
        "image": image,
        "turned": torch.randn(4, 5).t(),
        "gaps": torch.arange(12.0)[::2],
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
    }
    writer = Segment()
    reader = Segment(os.dup(writer.descriptor))
    layout = json.loads(json.dumps(writer.write({"a": tensors, "b": {"same": image}})))
    for copy in (False, True):
        read = reader.read(layout, copy=copy)
        for name, tensor in tensors.items():
            assert torch.equal(read["a"][name], tensor), name
            assert read["a"][name].dtype == tensor.dtype
        assert read["a"]["image"].stride() == image.stride()
        assert read["b"]["same"] is read["a"]["image"]
    writer.close()
    reader.close()


def test_grows_and_copies_are_ones_own() -> None:
    segment = Segment()
    small = segment.read(segment.write({"a": {"x": torch.ones(2)}}), copy=True)
    large = segment.read(segment.write({"a": {"x": torch.full((100_000,), 2.0)}}), copy=False)
    assert small["a"]["x"].tolist() == [1.0, 1.0]
    assert large["a"]["x"].sum() == 200_000
    segment.close()


def test_finds_the_file_behind_a_memory_map(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    np.save(path, np.arange(60_000, dtype=np.uint8).reshape(100, 1, 20, 30))
    images = torch.from_numpy(np.load(path, mmap_mode="c"))
    found = file_behind(images)
    if found is None:
        pytest.skip("no /proc/self/smaps here")
    descriptor, start = found
    assert torch.equal(mapped(descriptor, start + images.numel(), private=True)[start:].view(100, 1, 20, 30), images)
    os.close(descriptor)
    images[0] = 0
    assert file_behind(images) is None, "it was written to: the file is no longer what the process sees"
    assert file_behind(torch.zeros(5)) is None
    other = torch.from_numpy(np.load(path, mmap_mode="c"))
    path.unlink()
    assert file_behind(other) is None
