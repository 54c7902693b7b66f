from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fedftg.rundir.tensors import read_tensors, write_tensors


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    """Every type, an odd number of narrow values before wide ones, views that are not contiguous, shared memory."""
    types = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    types += (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
    given = {str(kind): torch.tensor([[0, 1, 1]]).to(kind) for kind in types}
    base = torch.randn(3, 4)
    given |= {"view": base.t(), "same": base, "scalar": torch.tensor(3), "empty": torch.ones(0, 2)}
    write_tensors(tmp_path / "file", given, {"note": "ä"})
    for back in (load_file(tmp_path / "file"), read_tensors(tmp_path / "file")):
        assert set(back) == set(given)
        for name, tensor in given.items():
            assert back[name].dtype == tensor.dtype
            assert torch.equal(back[name], tensor)
    assert list(read_tensors(tmp_path / "file")) == list(given)
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata()["note"] == "ä"
