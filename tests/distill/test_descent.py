"""Steps down a weighted sum, and what an ensemble predicts, by hand."""

import math

import pytest
import torch

from fedftg.distill.config import StudentConfig
from fedftg.distill.descent import descend
from fedftg.distill.teachers import Ensemble, ListedTeachers


def test_steps_and_means_by_hand():
    """x = 3, loss 2 x - (x^2) / 2: its slope is 2 - x, and 0.1 of it is taken off: 3, 3.1, and then 3.21."""
    x = torch.tensor(3.0, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    weights = {"linear": 2.0, "square": -0.5, "ignored": 0.0}
    metrics = descend(
        optimizer, 2, weights, lambda: {"linear": x, "square": x.square(), "ignored": torch.tensor(math.nan)}
    )
    assert float(x.detach()) == pytest.approx(3.21)
    assert float(metrics["linear"]) == pytest.approx(3.05)
    assert float(metrics["square"]) == pytest.approx((9 + 9.61) / 2)


@pytest.mark.parametrize(("mean", "odds"), [("logits", 2.0), ("probabilities", (0.8 + 0.5) / (0.2 + 0.5))])
def test_what_an_ensemble_predicts(mean, odds):
    """Odds of 4 and 1: the mean of the logits gives their geometric mean, whatever the temperature."""
    teachers = [lambda images, odds=odds: torch.tensor([[math.log(odds), 0.0]]) for odds in (4.0, 1.0)]
    config = StudentConfig(ensemble="uniform", ensemble_mean=mean, temperature=5.0)
    ensemble = Ensemble(ListedTeachers(teachers), torch.ones(2, 2).double(), config, torch.zeros(()))
    logits = ensemble.logits(torch.zeros(1, 1, 1, 1), 0, 2)
    for labels in (None, torch.tensor([1])):
        found = ensemble.log_probabilities(logits, labels)
        torch.testing.assert_close(found.exp(), torch.tensor([[odds, 1.0]]) / (1 + odds))
