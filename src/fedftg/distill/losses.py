"""The losses of FedFTG as pure functions; all have a plus sign, `fedftg.distill.images` sets those of the objective.

min_w max_theta E_{y ~ p_t(y), z ~ N(0, I)} [ sum_k a_k(y) (L_md - lambda_cls L_cls) - lambda_dis L_dis ]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedftg.distill.config import Discrepancy, FidelityWeighting, StudentLoss

_MOST_DIFFERENCES = 2**22
"""How many differences of pixels `diversity` forms at once: the public code's arithmetic, to the last bit.

Beyond it (50 images of 3x32x32 have 7.7 million) ``cdist`` gives the same up to rounding in about a fifth of the time.
"""


def kl_divergence(
    teacher_logits: Float[Tensor, "K B C"], student_logits: Float[Tensor, "B C"], temperature: float = 1.0
) -> Float[Tensor, "K B"]:
    """Returns ``KL(teacher_k || student) temperature**2`` of every sample, in nats: ``(K, B)``.

    The factor keeps the gradient's size independent of the temperature (Hinton et al. 2015).
    """
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    student = F.log_softmax(student_logits / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1) * temperature**2


def l1_logits(teacher_logits: Float[Tensor, "K B C"], student_logits: Float[Tensor, "B C"]) -> Float[Tensor, "K B"]:
    """Returns the absolute difference of the logits, mean over classes (the public code's): ``(K, B)``."""
    return (teacher_logits - student_logits).abs().mean(dim=-1)


def model_discrepancy(
    teacher_logits: Float[Tensor, "K B C"],
    student_logits: Float[Tensor, "B C"],
    weights: Float[Tensor, "K B"],
    *,
    kind: Discrepancy = "kl",
    temperature: float = 1.0,
    mask: Bool[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """Returns the scalar ``sum_k a_k(y) L_md``: summed over teachers, mean over the batch.

    Args:
        weights: ``a_k(y_i)``, the ensemble weight of each teacher on each sample.
        temperature: for ``kl`` only.
        mask: samples that count; the others add 0 and the mean is still over all ``B``, so that a batch with few hard
            samples takes a small step instead of a noisy one. None: all count.
    """
    if kind == "kl":
        values = kl_divergence(teacher_logits, student_logits, temperature)
    else:
        values = l1_logits(teacher_logits, student_logits)
    per_sample = (weights * values).sum(dim=0)
    if mask is not None:
        per_sample = per_sample * mask
    return per_sample.mean()


def fidelity(
    teacher_logits: Float[Tensor, "K B C"],
    labels: Int[Tensor, " B"],
    weights: Float[Tensor, "K B"],
    *,
    weighting: FidelityWeighting = "sample",
) -> Float[Tensor, ""]:
    """Returns the scalar ``sum_k a_k(y) L_cls``: the teachers' cross-entropy on the drawn labels, summed over teachers.

    ``sample`` weights every sample, as in the paper; ``batch_mean`` multiplies each teacher's mean cross-entropy by its
    mean weight, as the public code does.
    """
    if weighting == "batch_mean":
        pairs = zip(teacher_logits, weights, strict=True)
        terms = [(F.cross_entropy(logits, labels) * weight).mean() for logits, weight in pairs]
        return torch.stack(terms).sum()
    num_teachers, batch, classes = teacher_logits.shape
    targets = labels.expand(num_teachers, batch).reshape(-1)
    values = F.cross_entropy(teacher_logits.reshape(-1, classes), targets, reduction="none").view(num_teachers, batch)
    return (weights * values).sum(dim=0).mean()


def diversity(noise: Float[Tensor, "B Z"], images: Float[Tensor, "B D H W"]) -> Float[Tensor, ""]:
    """Returns the scalar ``L_dis = exp(-mean_ij dist(z_i, z_j) dist(x_i, x_j))``; 1 where all images are equal.

    The mean is over all ``B * B`` pairs, ``i = j`` included. The public code gives the distances: mean squared
    difference of noise, mean absolute difference of pixels.
    """
    flat = images.flatten(start_dim=1)
    if len(flat) * flat.numel() <= _MOST_DIFFERENCES:
        image_distance = (flat[None] - flat[:, None]).abs().mean(dim=-1)
    else:  # the same up to rounding, without all differences in memory at once
        image_distance = torch.cdist(flat, flat, p=1.0) / flat.shape[1]
    noise_distance = (noise[None] - noise[:, None]).square().mean(dim=-1)
    return torch.exp((-noise_distance * image_distance).mean())


def batchnorm_distance(
    inputs: Float[Tensor, "B F ..."],
    running_mean: Float[Tensor, " F"],
    running_var: Float[Tensor, " F"],
    weights: Float[Tensor, " B"],
) -> Float[Tensor, ""]:
    """Returns the scalar distance of a BatchNorm layer's inputs from its running statistics (DeepInversion).

    It is ``||mean - running_mean||_2 + ||variance - running_var||_2``, the biased moments of each feature over places
    and samples, where sample ``i`` counts ``weights[i] / sum(weights)``.
    """
    values = inputs.reshape(*inputs.shape[:2], -1).to(running_mean.dtype)
    shares = (weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny))[:, None]
    mean = (shares * values.mean(dim=2)).sum(dim=0)
    variance = (shares * (values - mean[:, None]).square().mean(dim=2)).sum(dim=0)
    return torch.dist(mean, running_mean) + torch.dist(variance, running_var)


def ensemble_probabilities(
    teacher_logits: Float[Tensor, "K B C"], weights: Float[Tensor, "K B"], temperature: float = 1.0
) -> Float[Tensor, "B C"]:
    """Returns ``sum_k a_k(y_i) softmax(teacher_k / temperature)``: ``(B, C)``."""
    total = torch.zeros_like(teacher_logits[0])
    for logits, weight in zip(teacher_logits, weights, strict=True):
        total = total + F.softmax(logits / temperature, dim=-1) * weight[:, None]
    return total


def student_loss(
    student_logits: Float[Tensor, "B C"],
    ensemble: Float[Tensor, "B C"],
    *,
    kind: StudentLoss = "kl",
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Returns the scalar distance of the student from the ensemble's probabilities, times ``temperature**2``.

    ``kl``: ``KL(ensemble || student)`` in nats, mean over the batch, as in the paper; ``soft_cross_entropy``: mean over
    the batch *and the classes*, as in the public code, so its gradient is ``C`` times smaller.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=-1)
    if kind == "kl":
        # xlogy: a probability of 0 adds 0, not NaN.
        per_sample = (torch.xlogy(ensemble, ensemble) - ensemble * log_student).sum(dim=-1)
        return per_sample.mean() * temperature**2
    return -(ensemble * log_student).mean() * temperature**2


def transferable(
    ensemble: Float[Tensor, "B C"], student_logits: Float[Tensor, "B C"], labels: Int[Tensor, " B"]
) -> Bool[Tensor, " B"]:
    """Returns where the ensemble predicts the drawn label and the student does not: ``(B,)`` (DFRD, NeurIPS 2023)."""
    return (ensemble.argmax(dim=-1) == labels) & (student_logits.argmax(dim=-1) != labels)
