"""The image pool: what is in it, what the student sees, and that nothing but it is needed to continue."""

import pytest
import torch
from torch import nn

from fedftg.distill.config import DistillConfig
from fedftg.distill.distiller import distil
from fedftg.distill.images import Call, ProxyImages
from fedftg.distill.pool import PooledImages
from fedftg.distill.teachers import Ensemble, ListedTeachers

COUNTS = torch.tensor([[3.0, 3.0]]).double()
TEACHERS = ListedTeachers([nn.Sequential(nn.Flatten(), nn.Linear(64, 2))])


class Numbered:
    """Images whose pixels are their number and the level that `improve` raises; their label is the number modulo 2."""

    def __init__(self):
        self.number, self.level = 0, 0

    def start(self, call):
        numbers = torch.arange(self.number, self.number + 3 * call.iterations)
        self.number += len(numbers)
        return torch.split(numbers, 3)

    def improve(self, call, draw):
        self.level += 1
        return {"level": torch.tensor(float(self.level))}

    def make(self, draw):
        images = draw.float()[:, None, None, None].expand(-1, 1, 8, 8) + 100 * self.level
        return images.clone(), draw % 2


def call(config, seed=0):
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    ensemble = Ensemble(TEACHERS, COUNTS, config, torch.zeros(()))
    return Call(student, ensemble, config.iterations, torch.Generator().manual_seed(seed), 1.0)


def contents(images):
    return [int(value) for value in images.pool["images"][:, 0, 0, 0]]


FIRST, SECOND = list(range(200, 206)), list(range(406, 410))


@pytest.mark.parametrize(
    ("refresh", "second", "third", "fourth"),
    [
        (0.25, [*FIRST, *SECOND], [*FIRST[2:], *SECOND, 612, 613], [*FIRST[4:], *SECOND, 612, 613, 818, 819]),
        (1.0, [*FIRST[2:], *SECOND, 410, 411], [*range(408, 412), *range(612, 618)],
         [*range(614, 618), *range(818, 824)]),
        (0.0, *[[*FIRST, *SECOND]] * 3),
    ],
)  # fmt: skip
def test_images_are_added_and_then_replace_the_oldest(refresh, second, third, fourth):
    """Two iterations of three images, a pool of ten. The images are those after the last improvement of their call.

    The second call finds room for four of its six images; of a full pool a quarter is 2.5, rounded 2.
    """
    config = DistillConfig(iterations=2, batch_size=3, pool_size=10, pool_refresh=refresh)
    images, found = PooledImages(config, Numbered()), []
    for _ in range(4):
        rows = images.start(call(config))
        found.append(contents(images))
        assert images.pool["labels"].tolist() == [number % 2 for number in found[-1]]
    assert [float(row["level"]) for row in rows] == [7, 8]
    assert found == [FIRST, second, third, fourth]
    assert images.pool["images"].dtype == torch.float16


def test_a_batch_is_drawn_without_replacement_and_changed():
    """Each image has a bright left edge, which a flip moves to the right."""
    config = DistillConfig(iterations=2, batch_size=6, pool_size=6, pool_augment="flip", pool_batches=10)
    images = PooledImages(config, Numbered())
    rows = images.start(call(config))
    assert len(rows) == 20
    images.pool["images"][:, :, :, 0] += 1000
    flips, orders = 0, set()
    for row in rows:
        batch, labels = images.make(row)
        assert labels is not None
        assert batch.dtype == torch.float32
        middle = [int(value) for value in batch[:, 0, 0, 4]]
        assert sorted(middle) == [200, 201, 202, 203, 204, 205]
        assert labels.tolist() == [number % 2 for number in middle]
        left, right = batch[:, 0, 0, 0] > 1000, batch[:, 0, 0, 7] > 1000
        assert bool((left ^ right).all())
        flips += int(right.sum())
        orders.add(tuple(middle))
    assert 30 < flips < 90
    assert len(orders) == 20


def test_what_is_in_the_pool_stays_as_it_is():
    config = DistillConfig(iterations=2, batch_size=4, pool_size=6)
    images = PooledImages(config, Numbered())
    rows = images.start(call(config))
    before = {name: values.clone() for name, values in images.pool.items()}
    crops = [images.make(row)[0] for row in rows]
    assert any((crop == 0).any() for crop in crops)
    assert all(torch.equal(images.pool[name], values) for name, values in before.items())


def test_images_without_labels():
    config = DistillConfig(iterations=2, batch_size=3, pool_size=9)
    images = PooledImages(config, ProxyImages(torch.randn(5, 1, 8, 8), batch_size=3))
    batch, labels = images.make(images.start(call(config))[0])
    assert labels is None
    assert batch.shape == (3, 1, 8, 8)
    assert set(images.pool) == {"images"}


def test_the_student_learns_on_batches_of_the_pool_reproducibly():
    """As many rows and steps as iterations times batches; the same with a pool that was handed on."""
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
        assert metrics["student"].shape == metrics["level"].shape == (6,)
        ends.append([value.clone() for value in student.state_dict().values()])
    assert calls == [(done, 6) for done in range(1, 7)] * 4
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
