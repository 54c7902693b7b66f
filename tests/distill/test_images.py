"""The seam: another source of images, the same student's steps."""

import pytest
import torch
from torch import nn

from fedftg.distill.config import DistillConfig
from fedftg.distill.distiller import distil
from fedftg.distill.images import Call, ProxyImages
from fedftg.distill.teachers import Ensemble, ListedTeachers
from fedftg.params import clone

COUNTS = torch.tensor([[30, 10, 0], [0, 20, 40]])
PATTERNS = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
"""The three classes, to which their images add noise."""


def labelled(number, seed):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (number,), generator=rng)
    return PATTERNS[labels] + torch.randn(number, 1, 8, 8, generator=rng), labels


def knows(*classes):
    """A teacher that compares images with the patterns of these classes; the others have logit 0."""
    known = torch.zeros(3, 64)
    known[list(classes)] = PATTERNS[list(classes)].flatten(1)
    return lambda images: images.flatten(1) @ known.T / 8


TEACHERS = ListedTeachers([knows(0, 1), knows(1, 2)])


def student():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 3))


@torch.no_grad()
def accuracy(model):
    images, labels = labelled(500, seed=7)
    return float((model.eval()(images).argmax(dim=1) == labels).float().mean())


def test_a_student_learns_from_unlabelled_images_reproducibly():
    """Each teacher knows two of three classes and is at most 2/3 right; the student has seen no label."""
    images, _ = labelled(200, seed=3)
    config = DistillConfig(iterations=40, student_steps=1, student_lr=0.05, student_momentum=0.9, ensemble="samples")
    ends = []
    for seed in (0, 0, 1):
        model, rng = student(), torch.Generator().manual_seed(seed)
        start, before = accuracy(model), images.clone()
        metrics = distil(config, ProxyImages(images, batch_size=50), model, TEACHERS, COUNTS, rng=rng)
        assert list(metrics) == ["student"]
        assert metrics["student"].shape == (40,)
        assert metrics["student"][-5:].mean() < metrics["student"][:5].mean()
        assert start < 0.5
        assert accuracy(model) > 0.85
        assert torch.equal(images, before)
        ends.append(clone(model.state_dict()))
    assert torch.equal(ends[0]["2.weight"], ends[1]["2.weight"])
    assert not torch.equal(ends[0]["2.weight"], ends[2]["2.weight"])


def test_every_proxy_image_is_shown_once_per_pass():
    numbered = torch.arange(7.0).reshape(7, 1, 1, 1).expand(7, 1, 8, 8)
    ensemble = Ensemble(TEACHERS, COUNTS.double(), DistillConfig(), torch.zeros(()))
    source = ProxyImages(numbered, batch_size=3)
    draws = source.start(Call(student(), ensemble, 5, torch.Generator().manual_seed(0), 1.0))
    images, labels = zip(*(source.make(draw) for draw in draws), strict=True)
    assert labels == (None,) * 5
    shown = torch.cat(images)[:, 0, 0, 0].tolist()
    assert len(shown) == 15
    assert sorted(shown[:7]) == sorted(shown[7:14]) == list(range(7))
    assert shown[:7] != shown[7:14]


@pytest.mark.parametrize(("kind", "expected"), [("class", [0.4, 0.6]), ("uniform", [0.5, 0.5])])
def test_a_teachers_weight_on_an_image_of_unknown_class(kind, expected):
    """Its share of all samples, 40 and 60 of 100; teachers that are certain of different classes show it."""
    certain = [lambda images: torch.tensor([[99.0, 0, 0]] * len(images)), lambda images: torch.tensor([[0, 99.0, 0]])]
    for chunk in (0, 1):
        config = DistillConfig(ensemble=kind, teacher_chunk=chunk)
        ensemble = Ensemble(ListedTeachers(certain), COUNTS.double(), config, torch.zeros(()))
        found = ensemble.probabilities(torch.zeros(1, 1, 8, 8), None)
        torch.testing.assert_close(found, torch.tensor([[*expected, 0.0]]))


class Bright:
    """A source of one's own: images that `improve` makes brighter, with labels."""

    def __init__(self):
        self.level = 0.0

    def start(self, call):
        return range(call.iterations)

    def improve(self, call, draw):
        self.level += 1
        return {"level": torch.tensor(self.level)}

    def make(self, draw):
        return self.level * PATTERNS, torch.tensor([0, 1, 0])


def test_a_source_is_three_methods():
    """The ensemble takes images of class 2 to be class 2, so two of three labels agree."""
    rng, config = torch.Generator().manual_seed(0), DistillConfig(iterations=3)
    metrics = distil(config, Bright(), student(), TEACHERS, COUNTS, rng=rng)
    assert metrics["level"].tolist() == [1, 2, 3]
    torch.testing.assert_close(metrics["teacher_agreement"], torch.full((3,), 2 / 3))
