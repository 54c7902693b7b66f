"""DFRD: the terms of the generator's loss by hand, what persists over rounds, and digits."""

import math
from dataclasses import replace

import pytest
import torch

from fedftg.algorithms import dfrd
from fedftg.algorithms.base import ServerState
from fedftg.algorithms.dfrd import DfrdConfig, DfrdImages, LabelledNoise
from fedftg.distill.images import Call
from fedftg.distill.teachers import Ensemble, ListedTeachers
from fedftg.params import clone, unprefixed

SMALL = {"iterations": 2, "batch_size": 8, "generator_width": 4, "noise_dim": 4, "student_steps": 1}


def rng(seed):
    return torch.Generator().manual_seed(seed)


def fixed(*odds):
    """Logits ln(odds) and 0 for each image in turn; the images have no effect."""
    return lambda images: torch.tensor([[math.log(one), 0.0] for one in odds])


def test_terms_by_hand(call):
    """Odds of 8 and 2 make 4 in the mean of the logits, so class 0 with 0.8. The student says class 1 with 0.8 for the
    first image and class 0 for the second. The discrepancy counts where the label is 0 and the student is wrong, the
    first, and is KL((0.8, 0.2), (0.2, 0.8)) = 0.6 ln 4; the temperature, 10, is the student's alone."""
    of = call(DfrdConfig(), fixed(0.25, 4.0), fixed(8.0, 8.0), fixed(2.0, 2.0))
    merged, images = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0.0, 3.0]).reshape(2, 1, 1, 1)
    for labels, discrepancy in (((0, 0), 0.6 * math.log(4) / 2), ((1, 0), 0.0)):
        found = dfrd.terms(of, torch.tensor(labels), merged, images)
        assert float(found["discrepancy"]) == pytest.approx(discrepancy)
        expected = [-math.log(0.2 if label else 0.8) for label in labels]
        assert float(found["fidelity"]) == pytest.approx(sum(expected) / 2)
        # Of four pairs, two are at distance 1/2 (mean square over Z) and 3.
        assert float(found["diversity"]) == pytest.approx(math.exp(-2 * 0.5 * 3 / 4))


def test_teachers_are_weighted_by_the_class_that_was_drawn(call):
    """Of class 0 the first teacher holds all: odds of 8. Of class 1 both hold the same: odds of 4."""
    of = call(DfrdConfig(), fixed(1.0, 1.0), fixed(8.0, 8.0), fixed(2.0, 2.0), counts=((5, 3), (0, 3)))
    found = dfrd.terms(of, torch.tensor([0, 1]), torch.zeros(2, 2), torch.zeros(2, 1, 1, 1))
    assert float(found["fidelity"]) == pytest.approx(-(math.log(8 / 9) + math.log(1 / 5)) / 2)


@pytest.mark.parametrize("reader", ["teacher", "student"])
def test_the_gradient_of_the_discrepancy_passes_teacher_and_student(call, reader):
    """Logits ln 4 and 0 for the teacher, 0 and ln 4 for the student; a brighter pixel moves one of them apart."""

    def side(name, logit, slope):
        def classify(images):
            pixel = slope * images.flatten(1) * (reader == name)
            return torch.cat([logit + pixel, 0 * pixel], dim=1)

        return classify

    images = torch.zeros(1, 1, 1, 1, requires_grad=True)
    of = call(DfrdConfig(), side("student", -math.log(4), -1), side("teacher", math.log(4), 1))
    dfrd.terms(of, torch.tensor([0]), torch.zeros(1, 2), images)["discrepancy"].backward()
    assert images.grad is not None
    assert float(images.grad) > 0.1


@pytest.mark.parametrize(
    ("settings", "term", "rises"),
    [
        ({"lambda_transfer": 0, "lambda_diversity": 0}, "fidelity", False),
        ({"lambda_transfer": 1000, "lambda_diversity": 0}, "discrepancy", True),
        ({"lambda_transfer": 0, "lambda_diversity": 1000}, "diversity", False),
    ],
)
def test_each_term_moves_the_generator_its_way(digits, settings, term, rises):
    config = DfrdConfig(generator_steps=20, batch_size=32, generator_width=8, generator_lr=0.01, **settings)
    model = digits.context.model
    teachers = ListedTeachers([model.module(one.params, one.buffers) for one in digits.results])
    counts = torch.stack([one.class_counts for one in digits.results]).double()
    of = Call(model.module(*model.init()), Ensemble(teachers, counts, config, torch.zeros(())), 1, rng(0), 1.0)
    source = images(config, digits)
    (draw,) = source.start(of)
    before, after = (source.improve(of, draw)[term] for _ in range(2))
    assert (after > before) == rises
    assert abs(after - before) > 0.02


def images(config, digits):
    memory = config.build(digits.context).init({}, rng(1))
    return DfrdImages(config, LabelledNoise(config, digits.context), memory)


def test_the_generator_persists_and_is_averaged_over_rounds(digits):
    """The average is the first round's generator, then 0.7 of that and 0.3 of the second's; integers are rounded."""
    config = DfrdConfig(**SMALL, average_decay=0.7)
    refiner, (params, buffers) = config.build(digits.context), digits.context.model.init()
    state = ServerState(0, params, buffers, {}, refiner.init(params, rng(0)))
    assert not unprefixed(state.refiner, "average.")
    first, _ = refiner.refine(state, digits.results, rng(1))
    second, _ = refiner.refine(replace(first, refiner=clone(first.refiner)), digits.results, rng(2))
    one, two = (unprefixed(after.refiner, "generator.") for after in (first, second))
    averages = [unprefixed(after.refiner, "average.") for after in (first, second)]
    name = "generator.to_image.weight"
    assert torch.equal(averages[0][name], one[name])
    assert not torch.equal(unprefixed(state.refiner, "generator.")[name], one[name])
    torch.testing.assert_close(averages[1][name], 0.7 * one[name] + 0.3 * two[name])
    assert averages[1].keys() == two.keys()
    again, _ = config.build(digits.context).refine(first, digits.results, rng(2))
    assert all(torch.equal(value, again.params[key]) for key, value in second.params.items())
    other, _ = refiner.refine(replace(first, refiner={**first.refiner, **state.refiner}), digits.results, rng(2))
    assert any(not torch.equal(value, other.params[key]) for key, value in second.params.items())


def test_the_student_sees_images_of_both_generators(call, digits):
    """From round 2 on half as many of the average, from the same noise and labels."""
    config = DfrdConfig(**SMALL)
    of = call(DfrdConfig(), fixed(1.0), fixed(1.0), counts=((1,) * 10,))
    source = images(config, digits)
    (draw,) = source.start(of)
    network = LabelledNoise(config, digits.context)
    assert torch.equal(network(*draw)[0], draw[0] * network.embedding.weight[draw[1]])
    alone, labels = source.make(draw)
    assert len(alone) == len(labels) == 8
    values = source.memory()
    for key in values:
        if key.startswith("average.generator.to_image"):
            values[key] = 2 * values[key]
    later = DfrdImages(config, LabelledNoise(config, digits.context), values)
    both, labels = later.make(draw)
    assert torch.equal(labels, torch.cat([draw[1], draw[1][:4]]))
    assert torch.equal(both[:8], alone)
    assert not torch.equal(both[8:], alone[:4])
    assert (
        len(DfrdImages(config.model_copy(update={"average_share": 0.0}), later._generator, values).make(draw)[0]) == 8
    )


def test_the_student_learns_digits_that_it_never_saw(digits):
    """From the run's initial weights in each of two rounds, so what is better in the second is due to the generator."""
    small = {"start": "fresh", "generator_width": 8, "noise_dim": 16, "student_lr": 0.1}
    config = DfrdConfig(**small, iterations=40, generator_steps=8, student_steps=10)
    (first, before), (second, after) = (digits.refined(config, rounds=rounds) for rounds in (1, 2))
    assert digits.ensemble > 0.93
    assert second > 0.65
    assert second > first + 0.05
    assert after["teacher_agreement"] > before["teacher_agreement"] + 0.1
