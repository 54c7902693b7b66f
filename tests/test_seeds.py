import hashlib

import torch

from fedftg.seeds import SERVER, numpy_rng, seed_for, torch_rng


def test_seed_is_the_documented_hash() -> None:
    digest = hashlib.sha256(b"7/3/12/local").digest()
    assert seed_for(7, 3, 12, "local") == int.from_bytes(digest[:8], "big") >> 1


def test_generators_repeat() -> None:
    assert torch.equal(
        torch.rand(5, generator=torch_rng(0, 1, SERVER, "x")), torch.rand(5, generator=torch_rng(0, 1, SERVER, "x"))
    )
    assert numpy_rng(0, 1, 2, "x").random() == numpy_rng(0, 1, 2, "x").random()
