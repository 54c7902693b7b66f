"""DAFL: the terms of the generator's loss by hand, and their directions."""

import math

import pytest
import torch
from torch import nn

from fedftg.algorithms import dafl
from fedftg.algorithms.dafl import DaflConfig
from fedftg.distill.images import Call
from fedftg.distill.teachers import Ensemble, ListedTeachers, StackedTeachers, stack_or_list
from fedftg.models.functional import FunctionalModel
from fedftg.models.registry import MODELS
from fedftg.params import stack

SAME = [[1.0, -2.0], [1.0, -2.0]]
OPPOSITE = [[1.0, -2.0], [-2.0, 1.0]]


def teacher(factor):
    """Two pixels, ReLU of ``factor`` times them, and logits of 1 and 3 ln 2 times the first or the second."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    layers[1].weight.data = factor * torch.eye(2)
    layers[3].weight.data = math.log(2) * torch.eye(2)
    return layers


def ensemble_of(teachers, classes=2, **settings):
    counts = torch.ones(len(teachers), classes, dtype=torch.float64)
    return Ensemble(teachers, counts, DaflConfig(**settings), torch.zeros(()))


@pytest.mark.parametrize(
    ("images", "entropy"), [(SAME, 0.2 * math.log(5) + 0.8 * math.log(1.25)), (OPPOSITE, math.log(2))]
)
def test_terms_by_hand(images, entropy):
    """Features (1, 0) and (3, 0): means 1/2 and 3/2. The mean of the logits is (2 ln 2, 0), so odds of 4."""
    ensemble = ensemble_of(ListedTeachers([teacher(1.0), teacher(3.0)]))
    found = dafl.terms(ensemble, torch.tensor(images).reshape(2, 1, 1, 2))
    assert float(found["one_hot"]) == pytest.approx(-math.log(0.8))
    assert float(found["activation"]) == pytest.approx(1.0)
    assert float(found["entropy"]) == pytest.approx(entropy)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_features_are_what_enters_the_last_layer_of_every_model(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FunctionalModel(MODELS[name](num_classes=4, image_shape=(3, 16, 16)))
    params, buffers = model.init()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    logits, features = model.with_features(params, buffers, images, train=False)

    def function(params, buffers, images):
        return model(params, buffers, images, train=False)

    stacked = StackedTeachers(function, stack([params]), stack([buffers]))
    for teachers in (stack_or_list(function, [params], [buffers]), stacked):
        ensemble = ensemble_of(teachers, classes=4)
        found, activation = ensemble.measured(dafl._features, images, torch.ones(1, 2), 0, 1)
        torch.testing.assert_close(found[0], logits)
        torch.testing.assert_close(activation[0], features.abs().mean())


@pytest.mark.parametrize(
    ("settings", "term", "rises"),
    [
        ({"lambda_activation": 0, "lambda_entropy": 0}, "one_hot", False),
        ({"lambda_activation": 1000}, "activation", True),
        ({"lambda_entropy": 1000, "lambda_activation": 0}, "entropy", True),
    ],
)
def test_each_term_moves_the_generator_its_way(digits, settings, term, rises):
    """Also that gradients pass the teachers, which alone connect the loss with the images."""
    config = DaflConfig(generator_steps=15, batch_size=32, generator_width=8, generator_lr=0.003, **settings)
    counts = torch.stack([result.class_counts for result in digits.results]).double()
    model, results = digits.context.model, digits.results
    teachers = stack_or_list(
        lambda *given: model(*given, train=False), [one.params for one in results], [one.buffers for one in results]
    )
    ensemble = Ensemble(teachers, counts, config, torch.zeros(()))
    source = config.images(digits.context, torch.Generator().manual_seed(0))
    call = Call(nn.Flatten(), ensemble, 3, torch.Generator().manual_seed(0), 1.0)
    draws = source.start(call)
    values = []
    for draw in draws:
        images, labels = source.make(draws[0])
        assert labels is None
        assert not images.requires_grad
        values.append(float(dafl.terms(ensemble, images)[term]))
        assert set(source.improve(call, draw)) == {"one_hot", "activation", "entropy"}
    assert (values[-1] > values[0]) == rises
    assert abs(values[-1] - values[0]) > 0.02
