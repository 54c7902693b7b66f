"""One call: in each iteration the images are improved, then the student takes its steps on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from fedftg.distill import losses
from fedftg.distill.config import StudentConfig
from fedftg.distill.images import Call, Draw, Images
from fedftg.distill.labels import check_class_counts
from fedftg.distill.teachers import Ensemble, Teachers
from fedftg.errors import InputError
from fedftg.seeds import drawn_seed, forked

Progress = Callable[[int, int], None]
"""Called as ``progress(batches done, batches in all)``, batches of the pool included."""


@torch.enable_grad()
def distil(
    config: StudentConfig,
    images: Images[Draw],
    student: nn.Module,
    teachers: Teachers,
    class_counts: Num[Tensor, "K C"],
    *,
    rng: torch.Generator,
    lr_scale: float = 1.0,
    progress: Progress | None = None,
) -> dict[str, Float[Tensor, " batches"]]:
    """Trains the student, and improves the images, in place for ``config.iterations`` iterations.

    Returns the metrics, ``(batches,)`` float32 on the CPU (``I`` without a pool): those of `Images.improve`,
    ``student`` (its loss, mean over its steps; 0 where it takes none) and, where the images have labels,
    ``teacher_agreement`` (the share of images for which the ensemble predicts the label).

    The student's modes and gradient flags are put back; parameters that do not require a gradient stay fixed. Whether
    the result is finite is left to the caller.

    Args:
        class_counts: ``(K, C)``, how many samples of each class each teacher has seen.
        rng: a CPU generator; all draws and the student's dropout come from it and from nothing else.
        lr_scale: factor on all rates; in round ``t``, counted from 0, ``config.lr_decay ** t``.
    """
    parameters = trainable(student)
    counts = check_class_counts(class_counts, num_teachers=len(teachers))
    call = Call(student, Ensemble(teachers, counts, config, parameters[0]), config.iterations, rng, lr_scale)
    rate, optimizer = config.student_lr * lr_scale, _optimizer(config, parameters)
    dropout_seed = drawn_seed(rng)
    rows: list[dict[str, Tensor]] = []
    with _frozen(student), forked(dropout_seed, parameters[0].device):
        draws = images.start(call)
        for done, draw in enumerate(draws, start=1):
            improved = images.improve(call, draw)
            decay = (1 + math.cos(math.pi * len(rows) / len(draws))) / 2 if config.student_schedule == "cosine" else 1
            optimizer.param_groups[0]["lr"] = rate * decay
            rows.append({**improved, **student_steps(config, call, optimizer, *images.make(draw))})
            if progress is not None:
                progress(done, len(draws))
    optimizer.zero_grad()
    table = torch.stack([torch.stack(list(row.values())) for row in rows]).to("cpu", torch.float32)
    return dict(zip(rows[0], table.unbind(dim=1), strict=True))


def _optimizer(config: StudentConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if config.student_optimizer == "adam":
        return torch.optim.Adam(parameters, weight_decay=config.student_weight_decay)
    return torch.optim.SGD(
        parameters, lr=config.student_lr, momentum=config.student_momentum, weight_decay=config.student_weight_decay
    )


def student_steps(
    config: StudentConfig,
    call: Call,
    optimizer: torch.optim.Optimizer,
    images: Float[Tensor, "B D H W"],
    labels: Int[Tensor, " B"] | None,
) -> dict[str, Float[Tensor, ""]]:
    """Takes ``config.student_steps`` steps towards the ensemble on one batch of images; returns the metrics."""
    ensemble = call.ensemble.probabilities(images, labels)
    parameters = optimizer.param_groups[0]["params"]
    call.student.train(config.student_mode == "train")
    for parameter in parameters:
        parameter.requires_grad_(True)
    total = torch.zeros((), device=images.device)
    for _ in range(config.student_steps):
        logits = call.predict(images)
        loss = losses.student_loss(logits, ensemble, kind=config.student_loss, temperature=config.temperature)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total = total + loss.detach()
    call.student.eval().requires_grad_(False)
    metrics = {"student": total / max(config.student_steps, 1)}
    if labels is not None:
        metrics["teacher_agreement"] = (ensemble.argmax(dim=-1) == labels).to(torch.float32).mean()
    return metrics


def trainable(student: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that require a gradient, of which there must be one."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("no parameter of the student requires a gradient; call student.requires_grad_(True)")
    return parameters


@contextmanager
def _frozen(student: nn.Module) -> Iterator[None]:
    # Without gradients of weights the backward pass to the images costs about a third less.
    modes = [(module, module.training) for module in student.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    student.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
