"""Class counts of the teachers: customised label sampling ``p_t(y)`` and ensemble weights ``a_k(y)``."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from fedftg.distill.config import EnsembleWeighting, LabelSampling
from fedftg.errors import InputError


def check_class_counts(class_counts: Num[Tensor, "K C"], *, num_teachers: int) -> Float[Tensor, "K C"]:
    """Returns ``(K, C)`` float64 on the CPU, checked: at least two classes, finite, no negative, not all 0."""
    if class_counts.ndim != 2 or len(class_counts) != num_teachers or class_counts.shape[1] < 2:
        raise InputError(f"class_counts must be (teachers = {num_teachers}, C >= 2), got {tuple(class_counts.shape)}")
    counts = class_counts.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        raise InputError("class_counts must be finite and >= 0; count each teacher's training samples of each class")
    if not bool(counts.sum() > 0):
        raise InputError("class_counts are all 0; leave out teachers that saw no data")
    return counts


def class_probabilities(class_counts: Float[Tensor, "K C"]) -> Float[Tensor, " C"]:
    """Returns ``p_t(y)``: ``(C,)`` float64, each class's share of all samples; 0 where no teacher holds any."""
    totals = class_counts.to(torch.float64).sum(dim=0)
    return totals / totals.sum()


def ensemble_weights(
    class_counts: Float[Tensor, "K C"], kind: EnsembleWeighting = "class", epsilon: float = 0.0
) -> Float[Tensor, "K C"]:
    """Returns ``a_k(y)``: ``(K, C)`` float32, the weight of teacher ``k`` on a sample drawn for class ``y``.

    ``class``: ``n_k^y / (sum_j n_j^y + epsilon)``, 0 for a class that no teacher holds; ``samples``:
    ``n_k / sum_j n_j`` for every class, as FedDF weights; ``uniform``: ``1 / K``.
    """
    counts = class_counts.to(torch.float64)
    if kind == "class":
        totals = counts.sum(dim=0) + epsilon
        weights = torch.where(totals > 0, counts / totals.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    elif kind == "samples":
        weights = (counts.sum(dim=1, keepdim=True) / counts.sum()).expand_as(counts)
    else:
        weights = torch.full_like(counts, 1 / counts.shape[0])
    return weights.to(torch.float32)


def label_log_prior(counts: Tensor) -> Tensor:
    """Returns the log of a client's label prior, float64, from its samples a class; ``(..., C)`` both."""
    counts = counts.double()
    return ((counts + 0.5) / (counts.sum(dim=-1, keepdim=True) + 0.5 * counts.shape[-1])).log()


def least_share(present: Float[Tensor, " C"], everyone: Float[Tensor, " C"]) -> float:
    """Returns the smallest quotient, over classes, of the share of some clients' samples and of everyone's.

    1 where all classes have their usual share; 0 where one is missing, or was never held by anyone.
    """
    usual = everyone / everyone.sum()
    return float(torch.where(usual > 0, present / present.sum() / usual.clamp(min=1e-12), 0.0).min())


def sample_labels(
    class_counts: Float[Tensor, "K C"],
    num_batches: int,
    batch_size: int,
    kind: LabelSampling = "iid",
    *,
    rng: torch.Generator,
) -> Int[Tensor, "I B"]:
    """Returns ``(I, B)`` int64 labels on the CPU. A class that no teacher holds is never drawn.

    ``iid`` draws each label from ``p_t(y)``, as in the paper; ``proportional`` shuffles labels of a fixed histogram
    over all batches, as the public code does; ``uniform`` draws each label from the held classes with equal chance.
    """
    probabilities = class_probabilities(class_counts)
    number = num_batches * batch_size
    if kind == "proportional":
        labels = _laid_out(probabilities, number)[torch.randperm(number, generator=rng)]
    else:
        present = probabilities.nonzero().squeeze(1)
        shares = probabilities[present] if kind == "iid" else torch.ones_like(probabilities[present])
        labels = present[torch.multinomial(shares, number, replacement=True, generator=rng)]
    return labels.view(num_batches, batch_size)


def _laid_out(probabilities: Float[Tensor, " C"], number: int) -> Int[Tensor, " N"]:
    """Returns labels in ascending order; class ``y`` ends at ``floor(number * sum_{c <= y} p(c))``."""
    # float64 products and a floor, as in the public code: exact arithmetic would move single labels.
    ends = (probabilities.cumsum(dim=0) * number).floor().to(torch.int64)
    # The last cut is the end whatever the rounding; taken at the last class that is held, an absent one stays absent.
    ends[int(probabilities.nonzero().max()) :] = number
    return torch.searchsorted(ends, torch.arange(number), right=True)
