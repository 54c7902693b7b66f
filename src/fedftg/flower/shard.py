"""One client's own data on its node: batches are made of its rows only."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from fedftg.config import RunConfig
from fedftg.data import sources
from fedftg.data.config import DataConfig, PartitionConfig
from fedftg.data.dataset import Channels, ImageDataset
from fedftg.data.federated import FederatedData, Partition, partition_dataset
from fedftg.data.partition import Indices, hold_back, needed_columns, noise_levels
from fedftg.errors import InputError
from fedftg.seeds import SERVER, numpy_rng


@dataclass(frozen=True)
class Shard:
    """What one client holds; its number is that in the whole federation."""

    client: int
    num_clients: int
    data: FederatedData
    """The other clients hold nothing in it."""


def load(
    config: RunConfig,
    client: int,
    device: torch.device | str,
    *,
    own_data: bool = False,
    normalisation: tuple[Channels, Channels] | None = None,
) -> Shard:
    """The training and held-back images of one client.

    The data set and its division are kept for the next call of this process; decoded images come from the cache.

    Args:
        config: data, partition and seed are used.
        client: its number, from 0.
        device: where batches are made.
        own_data: every training image here is the client's. Otherwise the recipe's partition says which are.
        normalisation: means and deviations of the federation; None takes those of the data set here.

    Raises:
        InputError: the data cannot be used, or there is no such client.
    """
    dataset, division = _divided(
        config.data.model_dump_json(), config.partition.model_dump_json(), config.seed, client if own_data else None
    )
    count = len(division.train)
    if client >= count:
        raise InputError(
            f"partition-id must be below {count}, the number of clients, got {client}; give each SuperNode a number "
            f"from 0 to {count - 1} by --node-config, or set partition.num_clients"
        )
    train, held_back = division.train[client], division.held_back[client]
    rows = torch.from_numpy(np.concatenate([train, held_back]))
    mean, std = normalisation or (dataset.mean, dataset.std)
    own = replace(
        dataset,
        train_images=dataset.train_images[rows],
        train_labels=dataset.train_labels[rows],
        test_images=dataset.test_images[:0],
        test_labels=dataset.test_labels[:0],
        columns={},
        mean=mean,
        std=std,
    )
    nothing: Indices = np.empty(0, dtype=np.int64)
    parts, kept = [nothing] * count, [nothing] * count
    parts[client], kept[client] = np.arange(len(train)), np.arange(len(train), len(rows))
    noise = noise_levels(count, config.partition.feature_noise)
    return Shard(client, count, FederatedData(own, parts, device, held_back=kept, noise=noise))


@lru_cache(maxsize=2)
def _divided(data: str, partition: str, seed: int, owner: int | None) -> tuple[ImageDataset, Partition]:
    division = PartitionConfig.model_validate(json.loads(partition))
    dataset = sources.load(DataConfig.model_validate(json.loads(data)), columns=needed_columns(division))
    if owner is None:
        return dataset, partition_dataset(dataset, division, seed)
    whole: list[Indices] = [np.empty(0, dtype=np.int64)] * division.num_clients
    if owner < len(whole):
        whole[owner] = np.arange(len(dataset.train_labels))
    labels = dataset.train_labels.numpy()
    rng = numpy_rng(seed, 0, SERVER, "hold_back")
    return dataset, Partition(whole, *hold_back(whole, labels, division.test_share, rng))
