"""What a server knows about its clients, and the data that it measures models on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Federation(Protocol):
    """Sizes of the clients, and test data; nothing that a client trains on.

    The simulator's `fedftg.data.federated.FederatedData` is one; a server of real machines fills one from what its
    nodes say (`fedftg.flower.nodes`).
    """

    @property
    def device(self) -> torch.device:
        """Where batches are made and the server computes."""
        ...

    @property
    def num_clients(self) -> int:
        """How many clients there are, those without samples included."""
        ...

    @property
    def num_classes(self) -> int:
        """C."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(D, H, W)``."""
        ...

    @property
    def has_test_data(self) -> bool:
        """Whether `test_batches` gives anything."""
        ...

    @property
    def holds_back(self) -> bool:
        """Whether `held_back_batches` gives anything."""
        ...

    def num_samples(self, client: int) -> int:
        """How many training samples a client holds."""
        ...

    def num_held_back(self, client: int) -> int:
        """How many samples a client keeps for testing."""
        ...

    def relative_size(self, client: int) -> float:
        """The client's number of samples over the mean of all clients; 1 where all hold the same."""
        ...

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised test images ``(B, D, H, W)`` and labels ``(B,)``."""
        ...

    def held_back_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Held-back images ``(B, D, H, W)``, labels ``(B,)`` and the owners' numbers ``(B,)``."""
        ...
