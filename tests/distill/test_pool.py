"""The image pool: what is in it, what the student sees, and that nothing but it is needed to continue."""

import pytest
import torch
from torch import nn

from fedftg.distill.config import DistillConfig
from fedftg.distill.distiller import distil
from fedftg.distill.images import Call, ProxyImages
from fedftg.distill.pool import PooledImages
from fedftg.distill.teachers import Ensemble, ListedTeachers

SECOND = [102, 203, 204, 205, 306, 307, 308, 409, 410, 411]
COUNTS = torch.tensor([[3.0, 3.0]]).double()
TEACHERS = ListedTeachers([nn.Sequential(nn.Flatten(), nn.Linear(64, 2))])


class Numbered:
    """Images whose pixels are their number and the level that `improve` raises; their label is the number modulo 2."""

    def __init__(self, edge=0):
        self.number, self.level, self.edge = 0, 0, edge

    def start(self, call):
        numbers = torch.arange(self.number, self.number + 3 * call.iterations)
        self.number += len(numbers)
        return torch.split(numbers, 3)

    def improve(self, call, draw):
        self.level += 1
        return {"level": torch.tensor(float(self.level))}

    def make(self, draw):
        images = draw.float()[:, None, None, None].expand(-1, 1, 8, 8) + 100 * self.level
        images = images.clone()
        images[:, :, :, 0] += self.edge
        return images, draw % 2


def call(config, seed=0):
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    ensemble = Ensemble(TEACHERS, COUNTS, config, torch.zeros(()))
    return Call(student, ensemble, config.iterations, torch.Generator().manual_seed(seed), 1.0)


def contents(images):
    return [int(value) for value in images.pool["images"][:, 0, 0, 0]]


def run(config, images, seed=0):
    """What a call shows, as `distil` asks for it."""
    one = call(config, seed)
    for draw in images.start(one):
        yield images.improve(one, draw), *images.make(draw)


@pytest.mark.parametrize(
    ("refresh", "third"),
    [
        (0.2, [204, 205, 306, 307, 308, 409, 410, 411, 512, 615]),
        (0.3, [306, 307, 308, 409, 410, 411, 512, 513, 615, 616]),
        (1.0, [308, 409, 410, 411, 512, 513, 514, 615, 616, 617]),
        (0.0, SECOND),
    ],
)  # fmt: skip
def test_images_are_added_and_then_replace_the_oldest(refresh, third):
    """Two iterations of three images, a pool of ten, which the second call fills: the third replaces a share.

    0.2 lets one image an iteration in, 0.3 1.5, rounded up to 2.
    """
    config = DistillConfig(iterations=2, batch_size=3, pool_size=10, pool_refresh=refresh)
    images, found = PooledImages(config, Numbered()), []
    for _ in range(3):
        levels = [float(metrics["level"]) for metrics, *_ in run(config, images)]
        found.append(contents(images))
        assert images.pool["labels"].tolist() == [number % 2 for number in found[-1]]
    assert levels == [5, 5, 6, 6]
    assert found == [[100, 101, 102, 203, 204, 205], SECOND, third]
    assert images.pool["images"].dtype == torch.float16


def test_new_batches_and_batches_of_the_pool():
    """The pool's are drawn without replacement and flipped; each image has a bright left edge, which then is right."""
    config = DistillConfig(iterations=2, batch_size=6, pool_size=6, pool_augment="flip", pool_batches=10)
    images = PooledImages(config, Numbered(edge=1000))
    shown, flips, orders = list(run(config, images)), 0, set()
    assert len(shown) == 22
    for number, (_, batch, labels) in enumerate(shown):
        middle, right = [int(value) for value in batch[:, 0, 0, 4]], batch[:, 0, 0, 7] > 1000
        assert batch.dtype == torch.float32
        assert labels.tolist() == [value % 2 for value in middle]
        assert bool(((batch[:, 0, 0, 0] > 1000) ^ right).all())
        if number in (0, 11):
            assert middle == [[100, 101, 102], [203, 204, 205]][number // 11]
            assert not right.any()
        elif number > 11:
            assert sorted(middle) == [100, 101, 102, 203, 204, 205]
            flips += int(right.sum())
            orders.add(tuple(middle))
    assert 15 < flips < 45
    assert len(orders) == 10


def test_what_is_in_the_pool_stays_as_it_is():
    config = DistillConfig(iterations=2, batch_size=4, pool_size=6, pool_batches=3)
    images = PooledImages(config, Numbered())
    crops = [batch for _, batch, _ in run(config, images)]
    assert any((crop == 0).any() for crop in crops)
    assert all(torch.equal(image, image[0, 0, 0].expand(1, 8, 8)) for image in images.pool["images"])


def test_images_without_labels():
    config = DistillConfig(iterations=2, batch_size=3, pool_size=9)
    images = PooledImages(config, ProxyImages(torch.randn(5, 1, 8, 8), batch_size=3))
    for _, batch, labels in run(config, images):
        assert labels is None
        assert batch.shape == (3, 1, 8, 8)
    assert set(images.pool) == {"images"}


def test_the_student_learns_on_batches_of_the_pool_reproducibly():
    """A row a batch, new or of the pool: 2 (1 + 3); the same with a pool that was handed on."""
    config = DistillConfig(iterations=2, batch_size=3, student_steps=2, pool_size=12, pool_batches=3)
    ends, calls = [], []
    for handed_on in (False, True):
        torch.manual_seed(1)
        student, source = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), Numbered()
        images = PooledImages(config, source)
        for seed in (3, 4):
            if handed_on:
                images = PooledImages(config, source, images.pool)
            rng, seen = torch.Generator().manual_seed(seed), lambda *pair: calls.append(pair)
            metrics = distil(config, images, student, TEACHERS, COUNTS, rng=rng, progress=seen)
        assert metrics["student"].shape == metrics["level"].shape == (8,)
        ends.append([value.clone() for value in student.state_dict().values()])
    assert calls == [(done, 8) for done in range(1, 9)] * 4
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
