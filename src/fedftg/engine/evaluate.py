"""Accuracy and loss on the test set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedftg.algorithms.base import ClientResult
from fedftg.data.federated import FederatedData
from fedftg.distill.labels import label_log_prior
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params


class EvaluationConfig(BaseModel):
    """When and how models are evaluated."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    every: int = Field(default=1, ge=1, description="evaluate every N rounds, and always after the last one")
    batch_size: int = Field(default=500, ge=1, description="changes speed and memory, not results")
    track_all: bool = Field(
        default=True, description="keep every client's last upload for the 'all' accuracy (one model per client)"
    )
    ensemble: bool = Field(
        default=False,
        description="measure the ensemble of the round's clients too, a ceiling of distillation, and the best client; "
        "takes a pass a client",
    )
    targets: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        default=(), description="accuracies between 0 and 1; the summary says in which round each was first reached"
    )


Result = tuple[float, float, Tensor]
"""Accuracy in [0, 1], mean cross-entropy, and how often each class (rows) is predicted as each: ``(C, C)`` int64."""


@dataclass(frozen=True)
class Measured:
    """The results of an evaluation, by kind of model; empty in rounds without one."""

    accuracy: dict[str, float] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    confusion: dict[str, Tensor] = field(default_factory=dict)
    clients: dict[str, dict[int, float]] = field(default_factory=dict)  # `evaluate_clients`
    not_measured: list[dict[str, int | str]] = field(default_factory=list)
    """Clients that hold samples back and are not in ``clients``: ``{client, reason}``."""

    def add(self, kind: str, found: Result) -> None:
        """Takes the result of a kind of model."""
        self.accuracy[kind], self.loss[kind], self.confusion[kind] = found


def evaluate(
    model: FunctionalModel, models: Mapping[str, tuple[Params, Params]], data: FederatedData, batch_size: int
) -> dict[str, Result]:
    """Returns the result of each of several parameters and buffers over the whole test set, in evaluation mode."""
    calls = [partial(model, *values, train=False) for values in models.values()]
    return dict(zip(models, _evaluate(lambda images: [call(images) for call in calls], data, batch_size), strict=True))


def evaluate_ensemble(
    models: Sequence[FunctionalModel], clients: Sequence[ClientResult], data: FederatedData, batch_size: int
) -> dict[str, Result]:
    """Returns what `evaluate` does for a round's clients together, each weighted by its samples.

    ``ensemble`` predicts the mean of their probabilities; ``ensemble_prior`` the softmax of the mean of their logits,
    each without the log of its client's label prior (`label_log_prior`). ``best_client`` is the most accurate of them,
    alone. Client k has the k-th model, over and over.
    """
    pairs = [(models[one.client % len(models)], one) for one in clients]
    counts = torch.stack([one.class_counts for one in clients]).to(data.device)
    shares = (counts.sum(dim=1) / counts.sum())[:, None, None]
    priors = label_log_prior(counts)[:, None].float()

    def predict(images: Tensor) -> list[Tensor]:
        logits = torch.stack([model(one.params, one.buffers, images, train=False) for model, one in pairs])
        mixed = (logits.log_softmax(dim=-1) + shares.log()).logsumexp(dim=0)
        return [mixed, (shares * (logits - priors)).sum(dim=0), *logits]

    ensemble, without_priors, *alone = _evaluate(predict, data, batch_size)
    best = max(alone, key=lambda result: result[0])
    return {"ensemble": ensemble, "ensemble_prior": without_priors, "best_client": best}


@torch.no_grad()
def _evaluate(predict: Callable[[Tensor], Sequence[Tensor]], data: FederatedData, batch_size: int) -> list[Result]:
    """Returns what `evaluate` does for each of the logits ``(B, C)`` that a function returns."""
    true, predicted, losses = [], [], []
    for images, labels in data.test_batches(batch_size):
        found = predict(images)
        true.append(labels)
        predicted.append(torch.stack([logits.argmax(dim=1) for logits in found]))
        losses.append([F.cross_entropy(logits, labels, reduction="sum").double() for logits in found])
    labels, columns = torch.cat(true), found[0].shape[1]
    results = []
    for chosen, parts in zip(torch.cat(predicted, dim=1), zip(*losses, strict=True), strict=True):
        confusion = torch.bincount(labels * columns + chosen, minlength=data.num_classes * columns)
        right, loss = (chosen == labels).sum(), torch.stack(parts).sum()
        results.append((float(right) / len(labels), float(loss) / len(labels), confusion.view(-1, columns)))
    return results


def evaluate_clients(
    model: FunctionalModel, params: Params, buffers: Params, data: FederatedData, batch_size: int
) -> dict[int, float]:
    """Returns the accuracy on held-back samples of each client that has some."""
    correct = correct_held_back(model, params, buffers, data, batch_size).tolist()
    sizes = [data.num_held_back(client) for client in range(data.num_clients)]
    return {client: correct[client] / size for client, size in enumerate(sizes) if size}


@torch.no_grad()
def correct_held_back(
    model: FunctionalModel, params: Params, buffers: Params, data: FederatedData, batch_size: int
) -> Tensor:
    """Counts each client's correctly classified held-back samples: ``(clients,)`` int64, on the CPU."""
    correct = torch.zeros(data.num_clients, dtype=torch.int64, device=data.device)
    for images, labels, owners in data.held_back_batches(batch_size):
        right = model(params, buffers, images, train=False).argmax(dim=1) == labels
        correct += torch.bincount(owners[right], minlength=data.num_clients)
    return correct.cpu()


def over_clients(accuracies: Mapping[int, float]) -> dict[str, float]:
    """Returns ``mean``, ``worst_10`` and ``std`` of the accuracies of at least one client, each counted once.

    ``worst_10`` is the mean of the worst tenth of the clients (rounded up to whole clients).
    """
    ordered = torch.tensor(sorted(accuracies.values()), dtype=torch.float64)
    return {
        "mean": float(ordered.mean()),
        "worst_10": float(ordered[: -(-len(ordered) // 10)].mean()),
        "std": float(ordered.std(correction=0)),
    }
