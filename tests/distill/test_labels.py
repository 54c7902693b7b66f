"""Class counts: ``p_t(y)``, ensemble weights and label sampling."""

import pytest
import torch

from fedftg.distill.labels import check_class_counts, class_probabilities, ensemble_weights, sample_labels
from fedftg.errors import InputError

# Class 2 is held by nobody, class 3 by teacher 1 alone. Totals 4, 4, 0, 2 of 10.
COUNTS = torch.tensor([[3.0, 1.0, 0.0, 0.0], [1.0, 3.0, 0.0, 2.0]])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_weights_by_hand():
    """With epsilon 1 the totals are 5, 5, 1, 3; the absent class keeps weight 0. Teacher 0 has 4 of 10 samples."""
    assert class_probabilities(COUNTS).tolist() == [0.4, 0.4, 0.0, 0.2]
    assert ensemble_weights(COUNTS).tolist() == [[0.75, 0.25, 0.0, 0.0], [0.25, 0.75, 0.0, 1.0]]
    expected = torch.tensor([[3 / 5, 1 / 5, 0, 0], [1 / 5, 3 / 5, 0, 2 / 3]])
    torch.testing.assert_close(ensemble_weights(COUNTS, epsilon=1.0), expected)
    torch.testing.assert_close(ensemble_weights(COUNTS, "samples"), torch.tensor([[0.4] * 4, [0.6] * 4]))
    torch.testing.assert_close(ensemble_weights(COUNTS, "uniform"), torch.full((2, 4), 0.5))


def test_proportional_labels_have_a_fixed_histogram():
    """The ends of the classes for 21 labels: floor(8.4), floor(16.8), floor(16.8), 21: 8, 8, 0 and 5."""
    for seed in range(3):
        labels = sample_labels(COUNTS, 3, 7, "proportional", rng=rng(seed))
        assert labels.shape == (3, 7)
        assert labels.dtype == torch.int64
        assert torch.bincount(labels.flatten(), minlength=4).tolist() == [8, 8, 0, 5]
        assert labels.flatten().tolist() != sorted(labels.flatten().tolist())  # shuffled over all batches


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_proportional_gives_what_rounding_leaves_to_a_class_that_is_held(absent):
    """Thirds of 10 labels end at 3.33 and 6.66: with the first, the middle or the last class absent, none of it."""
    counts = torch.tensor([[7.0, 7.0, 7.0]])
    counts[0, absent] = 0
    counts = torch.cat([counts, counts], dim=1)
    histogram = torch.bincount(sample_labels(counts, 1, 11, "proportional", rng=rng()).flatten(), minlength=6)
    assert int(histogram.sum()) == 11
    assert histogram[absent] == histogram[absent + 3] == 0


@pytest.mark.parametrize(("kind", "expected"), [("iid", [0.4, 0.4, 0.0, 0.2]), ("uniform", [1 / 3, 1 / 3, 0.0, 1 / 3])])
def test_frequencies(kind, expected):
    """Of 40,000 labels the share of a class of probability 0.4 has a standard deviation of 0.0025: 5 of them."""
    shares = [torch.bincount(sample_labels(COUNTS, 400, 100, kind, rng=rng(n)).flatten()) / 40_000 for n in (0, 1)]
    torch.testing.assert_close(shares[0], torch.tensor(expected), atol=0.0125, rtol=0)
    assert not torch.equal(*shares)  # not a fixed histogram


@pytest.mark.parametrize("kind", ["iid", "proportional", "uniform"])
def test_an_absent_class_is_never_drawn_and_draws_repeat(kind):
    counts = torch.tensor([[0.0, 5.0, 0.0, 1e6, 0.0]])
    labels = sample_labels(counts, 50, 100, kind, rng=rng())
    assert set(labels.unique().tolist()) <= {1, 3}
    assert torch.equal(labels, sample_labels(counts, 50, 100, kind, rng=rng()))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.ones(3, 4), r"must be \(teachers = 2, C >= 2\), got \(3, 4\)"),
        (torch.ones(2), r"got \(2,\)"),
        (torch.tensor([[1.0, -1, 0, 0], [1, 1, 1, 1]]), "finite and >= 0"),
        (torch.tensor([[1.0, float("nan"), 0, 0], [1, 1, 1, 1]]), "finite and >= 0"),
        (torch.zeros(2, 4), "are all 0"),
    ],
)
def test_wrong_counts_give_one_line(counts, message):
    with pytest.raises(InputError, match=message) as caught:
        check_class_counts(counts, num_teachers=2)
    assert "\n" not in str(caught.value)
