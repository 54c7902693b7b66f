from itertools import product

import pytest
import torch

from fedftg import params as tree


def make(*values: float) -> tree.Params:
    return {"w": torch.tensor(values), "n": torch.tensor(3)}


def test_weighted_mean_by_hand() -> None:
    """(1*2 + 3*6) / 4 = 5 and (1*4 + 3*0) / 4 = 1; the integer 3 stays 3; (1 + 2 + 2) / 3 = 1.67 is 2."""
    mean = tree.weighted_mean([make(2.0, 4.0), make(6.0, 0.0)], [1, 3])
    assert mean["w"].tolist() == [5.0, 1.0]
    assert mean["n"].item() == 3
    assert mean["n"].dtype == torch.int64
    counts = [{"n": torch.tensor(value)} for value in (1, 2, 2)]
    assert tree.weighted_mean(counts, [1, 1, 1])["n"].item() == 2


def formula(trees: list[tree.Params], weights: list[float]) -> tree.Params:
    """The mean as its definition says, over whole tensors."""
    mean = {}
    for name, like in trees[0].items():
        value = torch.zeros_like(like, dtype=torch.float64)
        for params, weight in zip(trees, weights, strict=True):
            value = value + params[name].to(torch.float64) * (weight / sum(weights))
        mean[name] = value.to(like.dtype) if like.is_floating_point() else value.round().to(like.dtype)
    return mean


def several(count: int) -> list[tree.Params]:
    """Longer than a stretch that is summed at a time, not a multiple of it; strided, scalar, empty, half, integer."""
    rng = torch.Generator().manual_seed(0)
    return [
        {
            "long": torch.randn(3, 50_001, generator=rng),
            "strided": torch.randn(40, 50, generator=rng).t(),
            "image": torch.randn(8, 3, 5, 5, generator=rng).to(memory_format=torch.channels_last),
            "half": torch.randn(7, generator=rng).to(torch.bfloat16),
            "double": torch.randn(7, generator=rng).double(),
            "scalar": torch.randn((), generator=rng),
            "empty": torch.ones(0, 3),
            "count": torch.randint(100, (), generator=rng),
        }
        for _ in range(count)
    ]


def same_bits(left: tree.Params, right: tree.Params) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == value.dtype and torch.equal(left[name], value) for name, value in right.items()
    )


def test_sums_in_stretches_have_the_bits_of_the_formula() -> None:
    trees, weights = several(7), [3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0]
    before = several(7)
    assert same_bits(tree.weighted_mean(trees, weights), formula(trees, weights))
    total = {name: torch.randn(value.shape, dtype=torch.float64) for name, value in trees[0].items()}
    expected = dict(total)
    for weight, after, start in zip(weights, trees, reversed(trees), strict=True):
        for name in expected:
            change = after[name].to(torch.float64) - start[name].to(torch.float64)
            expected[name] = expected[name] + weight * change
    kept = {name: value.clone() for name, value in total.items()}
    changes = list(zip(weights, trees, reversed(trees), strict=True))
    assert same_bits(tree.add_changes(total, changes), expected)
    assert same_bits(total, kept)
    assert all(same_bits(left, right) for left, right in zip(trees, before, strict=True))


def test_mean_of_equal_trees_is_the_tree_and_weight_zero_is_skipped() -> None:
    one = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(0))}
    mean = tree.weighted_mean([one] * 7, [3, 1, 4, 1, 5, 9, 2])
    assert torch.equal(mean["w"], one["w"])

    mean = tree.weighted_mean([make(1.0), make(float("nan"))], [1, 0])
    assert mean["w"].tolist() == [1.0]


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0], []])
def test_impossible_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weight|shorter"):
        tree.weighted_mean([make(1.0), make(2.0)], weights)


def test_arithmetic_by_hand_and_arguments_unchanged() -> None:
    left, right = make(1.0, 2.0), make(10.0, 20.0)
    assert tree.add(left, right, scale=0.5)["w"].tolist() == [6.0, 12.0]
    assert tree.sub(right, left)["w"].tolist() == [9.0, 18.0]
    assert tree.zeros_like(left)["w"].tolist() == [0.0, 0.0]
    assert left["w"].tolist() == [1.0, 2.0]
    assert right["w"].tolist() == [10.0, 20.0]


def test_norm_is_over_all_floating_tensors() -> None:
    """sqrt(3^2 + 4^2) = 5; the integer does not count."""
    assert tree.norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0]), "n": torch.tensor(100)}) == 5.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_first_non_finite_finds_one_in_many(bad: float) -> None:
    for place, kind in product((0, 17, 999), (torch.float32, torch.float64, torch.bfloat16, torch.float16)):
        value = torch.randn(1000)
        value[place] = bad
        params = {"n": torch.tensor(1), "none": torch.ones(0), "a": torch.full((9,), 6e4, dtype=kind)}
        assert tree.first_non_finite({**params, "b": value.to(kind)}) == "b"
        assert tree.first_non_finite({**params, "b": torch.ones(1)}) is None
