"""Losses against numbers derived by hand.

``C = 2``: logits ``(ln 3, 0)`` are probabilities ``(3/4, 1/4)``; equal logits are ``(1/2, 1/2)``; so
``KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.3040988 - 0.1732868 = 0.1308120``.

``C = 3``: logits ``(ln 2, 0, 0)`` are ``(1/2, 1/4, 1/4)``; against ``(1/3, 1/3, 1/3)`` the KL is
``1/2 ln(3/2) + 1/2 ln(3/4) = 0.2027326 - 0.1438410 = 0.0588915``.
"""

from math import exp, log

import pytest
import torch

from fedftg.distill import losses

KL_TWO, KL_THREE = 0.1308120, 0.0588915
SKEWED_TWO, SKEWED_THREE = [log(3), 0.0], [log(2), 0.0, 0.0]


def close(got, expected):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=1e-6)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_kl():
    """The other way round: ``KL((1/2, 1/2) || (3/4, 1/4)) = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3) = 0.1438410``.

    Logits ``(2 ln 3, 0)`` at temperature 2 are those of the head of this file: 4 times that KL.
    """
    close(losses.kl_divergence(tensor([SKEWED_TWO]), torch.zeros(1, 2)), [[KL_TWO]])
    close(losses.kl_divergence(tensor([SKEWED_THREE]), torch.zeros(1, 3)), [[KL_THREE]])
    close(losses.kl_divergence(torch.zeros(1, 1, 2), tensor(SKEWED_TWO)), [[0.1438410]])
    close(losses.kl_divergence(2 * tensor([SKEWED_TWO]), torch.zeros(1, 2), 2.0), [[4 * KL_TWO]])


@pytest.mark.parametrize(("classes", "skewed", "kl"), [(2, SKEWED_TWO, KL_TWO), (3, SKEWED_THREE, KL_THREE)])
def test_discrepancy_of_the_paper(classes, skewed, kl):
    """Two teachers, two samples, student uniform. Teacher 0 is skewed on both, teacher 1 on sample 1 only.

    Weights ``a_0 = (0.25, 1)``, ``a_1 = (0.75, 0)``: sample 0 gives 0.25 KL, sample 1 gives KL; mean 0.625 KL.
    Masked to sample 0 the mean is still over both: 0.125 KL.
    """
    flat = [0.0] * classes
    teachers, student = tensor([skewed, skewed], [flat, skewed]), torch.zeros(2, classes)
    weights = tensor([0.25, 1.0], [0.75, 0.0])
    close(losses.model_discrepancy(teachers, student, weights), 0.625 * kl)
    masked = losses.model_discrepancy(teachers, student, weights, mask=torch.tensor([True, False]))
    close(masked, 0.125 * kl)
    warm = losses.model_discrepancy(3 * teachers, student, weights, temperature=3.0)
    close(warm, 9 * 0.625 * kl)


def test_discrepancy_of_the_public_code():
    """L1 of teacher 0: ``(|2| + |0|) / 2 = 1`` and ``(|0| + |4|) / 2 = 2``; weights 0.5 and 0.25: mean 0.5."""
    teachers, student = tensor([[3, 1], [1, -3]]), torch.ones(2, 2)
    close(losses.model_discrepancy(teachers, student, tensor([0.5, 0.25]), kind="l1_logits"), 0.5)
    hot = losses.model_discrepancy(teachers, student, tensor([0.5, 0.25]), kind="l1_logits", temperature=5.0)
    close(hot, 0.5)


@pytest.mark.parametrize(
    ("classes", "skewed", "right", "wrong"),
    [(2, SKEWED_TWO, log(4 / 3), log(4)), (3, SKEWED_THREE, log(2), log(4))],
)
def test_fidelity(classes, skewed, right, wrong):
    """Labels 0 and 1. Cross-entropy of a skewed teacher: ``-ln p(0)`` (right) and ``-ln p(1)`` (wrong).

    ``p = (3/4, 1/4)`` or ``(1/2, 1/4, 1/4)``. Teacher 1 is uniform: ``ln C`` on both. Weights ``a_0 = (1, 0.5)`` and
    ``a_1 = (0, 0.5)``. Weighted by sample: ``(right + 0.5 wrong + 0.5 ln C) / 2``. By the batch's mean: teacher 0
    ``0.75 (right + wrong) / 2``, teacher 1 ``0.25 ln C``.
    """
    teachers = tensor([skewed, skewed], [[0.0] * classes] * 2)
    labels, weights = torch.tensor([0, 1]), tensor([1.0, 0.5], [0.0, 0.5])
    close(losses.fidelity(teachers, labels, weights), (right + 0.5 * wrong + 0.5 * log(classes)) / 2)
    expected = 0.75 * (right + wrong) / 2 + 0.25 * log(classes)
    close(losses.fidelity(teachers, labels, weights, weighting="batch_mean"), expected)


def test_diversity_by_hand(monkeypatch):
    """Two samples. Noise distance: mean of ``(2^2, 0^2) = 2``. Image distance: mean of ``(1, 0, 0, 1) = 0.5``.

    Of the four ordered pairs two are of a sample with itself: the mean is ``2 * 2 * 0.5 / 4 = 0.5``, so ``exp(-0.5)``.
    The gradient with respect to the first pixel of image 1, which is 1 above image 0's, is
    ``-exp(-0.5) * 2 pairs * 2 / 4 pixels / 4 pairs = -exp(-0.5) / 4``.
    """
    noise = tensor([0.0, 3.0], [2.0, 3.0])
    images = tensor([[[0.0, 0.0], [5.0, 0.0]]], [[[1.0, 0.0], [5.0, -1.0]]])
    for most in (2**24, 0):  # by all differences, and by cdist
        monkeypatch.setattr(losses, "_MOST_DIFFERENCES", most)
        leaf = images.clone().requires_grad_()
        value = losses.diversity(noise, leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        close(value.detach(), exp(-0.5))
        close(gradient[1, 0, 0, 0], -exp(-0.5) / 4)
        close(gradient[0, 0, 0, 0], exp(-0.5) / 4)
        close(losses.diversity(torch.randn(4, 3), torch.ones(4, 1, 8, 8)), 1.0)


def test_ensemble_probabilities():
    """``(1, 0)`` of teacher 0 and ``(0.25, 0.75)`` of teacher 1 give ``0.25 (3/4, 1/4) + 0.75 (1/2, 1/2)``."""
    teachers = tensor([SKEWED_TWO, SKEWED_TWO], [[0.0, 0.0], [0.0, 0.0]])
    weights = tensor([1.0, 0.25], [0.0, 0.75])
    close(losses.ensemble_probabilities(teachers, weights), [[0.75, 0.25], [0.5625, 0.4375]])
    close(losses.ensemble_probabilities(2 * teachers, weights, 2.0), [[0.75, 0.25], [0.5625, 0.4375]])


def test_student_loss_by_hand():
    """Ensemble ``(3/4, 1/4)``, uniform student: KL as above. Cross-entropy ``ln 2``, over two classes ``ln 2 / 2``.

    A second sample, where both agree, adds 0: half the KL.
    """
    ensemble, student = tensor([0.75, 0.25]), torch.zeros(1, 2)
    close(losses.student_loss(student, ensemble), KL_TWO)
    close(losses.student_loss(student, ensemble, kind="soft_cross_entropy"), log(2) / 2)
    ensemble, student = tensor([0.5, 0.25, 0.25]), torch.zeros(1, 3)
    close(losses.student_loss(student, ensemble), KL_THREE)
    close(losses.student_loss(student, ensemble, kind="soft_cross_entropy"), log(3) / 3)
    close(losses.student_loss(torch.zeros(2, 2), tensor([0.75, 0.25], [0.5, 0.5])), KL_TWO / 2)


def test_a_probability_of_zero_adds_nothing():
    """``KL((1, 0) || (3/4, 1/4)) = ln(4/3)``, and the gradient is ``student - ensemble = (-1/4, 1/4)``."""
    logits = tensor(SKEWED_TWO).requires_grad_()
    loss = losses.student_loss(logits, tensor([1.0, 0.0]))
    loss.backward()
    close(loss.detach(), log(4 / 3))
    assert logits.grad is not None
    close(logits.grad, [[-0.25, 0.25]])


@pytest.mark.parametrize("kind", ["kl", "soft_cross_entropy"])
def test_student_loss_at_a_temperature(kind):
    ensemble, student = tensor([0.75, 0.25]), tensor([1.0, -2.0])
    cold = losses.student_loss(student, ensemble, kind=kind)
    close(losses.student_loss(2 * student, ensemble, kind=kind, temperature=2.0), 4 * cold)


def test_transferable():
    """All four cases of ensemble and student right or wrong; it counts where the ensemble alone is right."""
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    ensemble, student = tensor(right, right, wrong, wrong), tensor(wrong, right, wrong, right)
    labels = torch.zeros(4, dtype=torch.int64)
    assert losses.transferable(ensemble, student, labels).tolist() == [True, False, False, False]
