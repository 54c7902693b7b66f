import hashlib

import torch

from fedftg.seeds import SERVER, numpy_rng, seed_for, torch_rng


def test_seed_is_the_documented_hash() -> None:
    digest = hashlib.sha256(b"7/3/12/local").digest()
    assert seed_for(7, 3, 12, "local") == int.from_bytes(digest[:8], "big") >> 1


def test_each_part_changes_the_seed() -> None:
    seeds = {seed_for(*key) for key in [(0, 1, 2, "a"), (1, 1, 2, "a"), (0, 2, 2, "a"), (0, 1, 3, "a"), (0, 1, 2, "b")]}
    assert len(seeds) == 5


def test_no_collision_between_adjacent_digits() -> None:
    assert seed_for(1, 11, 1, "a") != seed_for(11, 1, 1, "a")


def test_generators_repeat() -> None:
    assert torch.equal(
        torch.rand(5, generator=torch_rng(0, 1, SERVER, "x")), torch.rand(5, generator=torch_rng(0, 1, SERVER, "x"))
    )
    assert numpy_rng(0, 1, 2, "x").random() == numpy_rng(0, 1, 2, "x").random()
