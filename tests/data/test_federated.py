from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from fedftg.data import federated
from fedftg.data.config import DataConfig, PartitionConfig
from fedftg.data.dataset import ImageDataset
from fedftg.data.federated import FederatedData
from fedftg.errors import InputError


def make_dataset(train=20, test=7, depth=1, augment="none"):
    """Image i is constantly i, so a batch tells which samples it holds."""
    images = (torch.arange(train) % 256).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, depth, 8, 8)
    return ImageDataset(
        train_images=images,
        train_labels=torch.arange(train) % 3,
        test_images=torch.full((test, depth, 8, 8), 255, dtype=torch.uint8),
        test_labels=torch.arange(test) % 3,
        class_names=("a", "b", "c", "never"),
        mean=(0.5,) * depth,
        std=(0.25,) * depth,
        augment=augment,
    )


@pytest.fixture
def data():
    return FederatedData(make_dataset(), [np.arange(0, 10), np.array([10]), np.array([], dtype=int), np.arange(11, 20)])


def samples(batches):
    return [((images[:, 0, 0, 0] * 0.25 + 0.5) * 255).round().int().tolist() for images, _ in batches]


def draw(data, client, seed=0, **options):
    settings = {"num_epochs": 1, "num_steps": None, "batch_size": 4} | options
    return samples(data.batches(client, rng=torch.Generator().manual_seed(seed), **settings))


def test_facts(data):
    assert data.num_clients == 4
    assert data.num_classes == 4
    assert data.image_shape == (1, 8, 8)
    assert [data.num_samples(client) for client in range(4)] == [10, 1, 0, 9]
    assert [data.relative_size(client) for client in range(4)] == [2.0, 0.2, 0.0, 1.8]
    assert data.class_counts.tolist() == [[4, 3, 3, 0], [0, 1, 0, 0], [0, 0, 0, 0], [3, 3, 3, 0]]
    assert data.class_counts.dtype == torch.int64


def test_an_epoch_is_every_sample_once_in_a_new_order(data):
    batches = draw(data, 0, num_epochs=2)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = list(chain(*batches[:3])), list(chain(*batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_same_seed_same_batches_and_global_state_untouched(data):
    state = torch.get_rng_state()
    assert draw(data, 0, seed=1) == draw(data, 0, seed=1)
    assert draw(data, 0, seed=1) != draw(data, 0, seed=2)
    assert torch.equal(state, torch.get_rng_state())


def test_the_last_batch_of_an_epoch(data):
    assert [len(batch) for batch in draw(data, 3, min_batch=2)] == [4, 4]
    assert [len(batch) for batch in draw(data, 3, min_batch=1)] == [4, 4, 1]
    assert [len(batch) for batch in draw(data, 0, batch_size=64, min_batch=2)] == [10]


@pytest.mark.parametrize("client", [1, 2])
def test_too_few_samples_give_nothing_and_end(data, client):
    assert draw(data, client, num_epochs=3, min_batch=2) == []
    assert draw(data, client, num_steps=50, min_batch=2) == []


def test_num_steps_overrides_epochs_and_goes_round(data):
    batches = draw(data, 0, num_epochs=1, num_steps=7)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2, 4]
    assert draw(data, 1, num_steps=3) == [[10]] * 3


@pytest.mark.parametrize("depth", [1, 3])
def test_augmentation_pads_with_black_before_normalisation(depth):
    """0 and 255 of mean 0.5 and deviation 0.25 are -2 and 2."""
    dataset = replace(
        make_dataset(depth=depth, augment="flip_crop"), train_images=torch.full((20, depth, 8, 8), 255).byte()
    )
    data = FederatedData(dataset, [np.arange(20)])
    ((images, _),) = data.batches(0, num_epochs=1, num_steps=None, batch_size=20, rng=torch.Generator().manual_seed(0))
    assert images.dtype == torch.float32
    assert images.unique().tolist() == [-2.0, 2.0]


def test_test_batches_are_never_augmented():
    data = FederatedData(make_dataset(augment="flip_crop"), [np.arange(20)])
    batches = list(data.test_batches(3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.arange(7) % 3)
    assert all((images == 2.0).all() for images, _ in batches)


def test_held_back_samples_are_tested_on_and_never_trained_on():
    parts, held = [np.arange(0, 8), np.arange(10, 14)], [np.array([8, 9]), np.arange(14, 19)]
    data = FederatedData(make_dataset(), parts, held_back=held)
    assert sorted(chain(*draw(data, 0))) == list(range(8))
    assert data.holds_back
    assert [data.num_held_back(client) for client in range(2)] == [2, 5]
    assert data.class_counts.sum().item() == 12
    batches = list(data.held_back_batches(3))
    assert [len(labels) for _, labels, _ in batches] == [3, 3, 1]
    assert torch.cat([owners for _, _, owners in batches]).tolist() == [0, 0, 1, 1, 1, 1, 1]
    found = samples([(images, labels) for images, labels, _ in batches])
    assert list(chain(*found)) == [8, 9, 14, 15, 16, 17, 18]


def test_a_share_that_no_client_gets():
    """A quarter of 60 rows, by the seed; what is left is partitioned by its own values of the column."""
    dataset = replace(make_dataset(train=60), columns={"writer": np.arange(60) % 4})
    config = PartitionConfig(law="natural", column="writer", unlabelled_share=0.25)
    found = [federated.load(DataConfig(), config, seed, dataset=dataset) for seed in (0, 0, 1)]
    free = [data.unlabelled_images[:, 0, 0, 0].tolist() for data in found]
    assert free[0] == free[1] != free[2]
    assert sorted([*free[0], *torch.cat(found[0].parts).tolist()]) == list(range(60))
    assert [sum(row % 3 == label for row in free[0]) for label in range(3)] == [5, 5, 5]
    for writer, part in enumerate(found[0].parts):
        assert set((part % 4).tolist()) == {writer}


def test_a_share_that_holds_nothing_back():
    config = PartitionConfig(law="iid", num_clients=20, test_share=0.2)
    with pytest.raises(InputError, match="holds no sample back; raise it, or lower"):
        federated.load(DataConfig(), config, 0, dataset=make_dataset())


def test_noise_of_each_client_has_its_level():
    """8x8 pixels of 10 images: the deviation of 640 draws is within 10 % of the level."""
    parts, held = [np.arange(0, 10), np.arange(10, 20)], [np.arange(0, 10), np.arange(10, 20)]
    clean = FederatedData(make_dataset(), parts, held_back=held)
    noisy = FederatedData(make_dataset(), parts, held_back=held, noise=[0.0, 0.5])
    settings = {"num_epochs": 1, "num_steps": None, "batch_size": 10}
    for client, level in ((0, 0.0), (1, 0.5)):
        (plain, _), (changed, _) = (
            next(data.batches(client, rng=torch.Generator().manual_seed(0), **settings)) for data in (clean, noisy)
        )
        assert (changed - plain).std().item() == pytest.approx(level, rel=0.1)
    sizes = {}
    for size in (3, 10):
        images, labels, owners = map(torch.cat, zip(*noisy.held_back_batches(size), strict=True))
        sizes[size] = images
        assert labels.tolist() == [i % 3 for i in range(20)]
        assert owners.tolist() == [0] * 10 + [1] * 10
    assert torch.equal(sizes[3], sizes[10])
    plain = torch.cat([images for images, _, _ in clean.held_back_batches(20)])
    assert torch.equal(sizes[3][:10], plain[:10])
    assert (sizes[3] - plain)[10:].std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("depth", [1, 3])
def test_grey_images_have_the_strides_of_channels_last(depth):
    data = FederatedData(make_dataset(depth=depth), [np.arange(20)])
    images, _ = next(data.batches(0, num_epochs=1, num_steps=1, batch_size=4, rng=torch.Generator()))
    assert images.is_contiguous()
    assert images.stride()[1] == (1 if depth == 1 else 64)


def test_digest_tells_apart_whatever_training_would_see():
    parts = [np.arange(0, 10), np.arange(11, 20)]
    dataset = make_dataset()

    def digest(dataset=dataset, parts=parts, **options):
        return FederatedData(dataset, parts, **options).digest

    pixel = dataset.train_images.clone()
    pixel[3, 0, 2, 1] ^= 1
    others = [
        digest(replace(dataset, train_images=pixel)),
        digest(replace(dataset, test_images=dataset.test_images ^ 1)),
        digest(replace(dataset, train_labels=dataset.train_labels.roll(1))),
        digest(replace(dataset, mean=(0.4,))),
        digest(replace(dataset, std=(0.4,))),
        digest(replace(dataset, augment="flip")),
        digest(parts=[parts[0], parts[1][:-1]]),
        digest(held_back=[[10], []]),
        digest(noise=[0.0, 0.1]),
    ]
    assert digest() == digest(make_dataset())
    assert len({digest(), *others}) == 10


def test_digest_of_large_sets_reads_evenly_spaced_images_past_the_first_chunk(monkeypatch):
    dataset = make_dataset(train=4500)
    monkeypatch.setattr(federated, "_DIGESTED_BYTES", dataset.train_images.nbytes // 3)

    def digest(row):
        images = dataset.train_images.clone()
        images[row] ^= 1
        return FederatedData(replace(dataset, train_images=images), [np.arange(5)]).digest

    plain = FederatedData(dataset, [np.arange(5)]).digest
    assert [row for row in (0, 1, 2, 3, 4, 3071, 3072, 3073, 4497, 4498) if digest(row) != plain] == [0, 3, 3072, 4497]
