"""One call: in each iteration the images are improved, then the student takes its steps on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from fedftg.distill import losses
from fedftg.distill.config import DistillConfig
from fedftg.distill.generator import Generator
from fedftg.distill.images import Call, Draw, GeneratorImages, Images
from fedftg.distill.labels import check_class_counts
from fedftg.distill.teachers import Ensemble, Teachers
from fedftg.errors import InputError
from fedftg.params import Params, clone
from fedftg.seeds import forked

Progress = Callable[[int, int], None]
"""Called as ``progress(iterations done, iterations in all)``."""


@torch.enable_grad()
def distil(
    config: DistillConfig,
    images: Images[Draw],
    student: nn.Module,
    teachers: Teachers,
    class_counts: Num[Tensor, "K C"],
    *,
    rng: torch.Generator,
    lr_scale: float = 1.0,
    progress: Progress | None = None,
    given: Mapping[str, Tensor | None] | None = None,
) -> dict[str, Float[Tensor, " I"]]:
    """Trains the student, and improves the images, in place for ``config.iterations`` iterations.

    Returns the metrics, ``(I,)`` float32 on the CPU: those of `Images.improve`, ``student`` (its loss, mean over its
    steps; 0 where it takes none) and, where the images have labels, ``teacher_agreement`` (the share of images for
    which the ensemble predicts the label).

    The student's modes and gradient flags are put back; parameters that do not require a gradient stay fixed. Whether
    the result is finite is left to the caller.

    Args:
        config: ``iterations``, the ``student_*`` fields, ``temperature``, and what `Ensemble` takes.
        images: the source of the images.
        student: from images ``(B, D, H, W)`` to logits ``(B, C)``.
        teachers: ``K`` of them, with the same classes.
        class_counts: ``(K, C)``, how many samples of each class each teacher has seen.
        rng: a CPU generator; all draws and the student's dropout come from it and from nothing else.
        lr_scale: factor on all rates; in round ``t``, counted from 0, ``config.lr_decay ** t``.
        progress: called after every iteration.
        given: see `Call.given`.

    Raises:
        InputError: shapes, counts or devices that do not fit together.
    """
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not trainable:
        raise InputError("no parameter of the student requires a gradient; call student.requires_grad_(True)")
    counts = check_class_counts(class_counts, num_teachers=len(teachers))
    call = Call(
        student, Ensemble(teachers, counts, config, trainable[0]), config.iterations, rng, lr_scale, given or {}
    )
    optimizer = torch.optim.SGD(
        trainable,
        lr=config.student_lr * lr_scale,
        momentum=config.student_momentum,
        weight_decay=config.student_weight_decay,
    )
    dropout_seed = int(torch.randint(2**62, (), generator=rng))
    rows: list[dict[str, Tensor]] = []
    with _borrowed(student, restore_buffers=config.restore_buffers), forked(dropout_seed, trainable[0].device):
        for done, draw in enumerate(images.start(call), start=1):
            improved = images.improve(call, draw)
            rows.append({**improved, **student_steps(config, call, optimizer, *images.make(draw))})
            if progress is not None:
                progress(done, config.iterations)
    optimizer.zero_grad()
    table = torch.stack([torch.stack(list(row.values())) for row in rows]).to("cpu", torch.float32)
    return dict(zip(rows[0], table.unbind(dim=1), strict=True))


def student_steps(
    config: DistillConfig,
    call: Call,
    optimizer: torch.optim.Optimizer,
    images: Float[Tensor, "B D H W"],
    labels: Int[Tensor, " B"] | None,
) -> dict[str, Float[Tensor, ""]]:
    """Takes ``config.student_steps`` steps towards the ensemble on one batch of images; returns the metrics."""
    ensemble = call.ensemble.probabilities(images, labels)
    call.student.train(config.student_mode == "train")
    total = torch.zeros((), device=images.device)
    for _ in range(config.student_steps):
        logits = call.student(images)
        loss = losses.student_loss(logits, ensemble, kind=config.student_loss, temperature=config.temperature)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total = total + loss.detach()
    metrics = {"student": total / max(config.student_steps, 1)}
    if labels is not None:
        metrics["teacher_agreement"] = (ensemble.argmax(dim=-1) == labels).to(torch.float32).mean()
    return metrics


@dataclass(frozen=True)
class DistillMetrics:
    """What happened in each iteration: ``(I,)`` float32 tensors on the CPU."""

    discrepancy: Tensor
    """``sum_k a_k L_md`` in the generator's steps, their mean; with a mask, what the mask leaves of it."""
    fidelity: Tensor
    """``sum_k a_k L_cls`` in the generator's steps, their mean."""
    diversity: Tensor
    """``L_dis`` in the generator's steps, their mean; 1 is a generator that makes one image."""
    student: Tensor
    """The student's loss, mean over its steps; 0 where it takes none."""
    teacher_agreement: Tensor
    """The share of the student's images for which the weighted ensemble predicts the label they were drawn for."""

    def means(self) -> dict[str, float]:
        """The mean of each metric over the iterations."""
        return {item.name: float(getattr(self, item.name).mean()) for item in fields(self)}


class Distiller:
    """FedFTG's distillation, on images of a generator that is improved from call to call.

    Args:
        config: see `DistillConfig`.
        generator: trained in place; its device is where the work is done.

    Raises:
        InputError: the generator's noise length is not the config's, or its device has no bfloat16 that is asked for.
    """

    def __init__(self, config: DistillConfig, generator: Generator) -> None:
        self.config, self.generator = config, generator
        self._images = GeneratorImages(config, generator)

    def refine(
        self,
        student: nn.Module,
        teachers: Teachers,
        class_counts: Num[Tensor, "K C"],
        *,
        rng: torch.Generator,
        lr_scale: float = 1.0,
        noise: Float[Tensor, "I B Z"] | None = None,
        labels: Int[Tensor, "I B"] | None = None,
        progress: Progress | None = None,
    ) -> DistillMetrics:
        """Trains the student and the generator in place; see `distil`.

        Args:
            student: on the generator's device.
            teachers: see `distil`.
            class_counts: see `distil`.
            rng: see `distil`.
            lr_scale: see `distil`.
            noise: ``(I, B, Z)`` to use instead of drawn noise.
            labels: ``(I, B)`` to use instead of drawn labels.
            progress: see `distil`.

        Raises:
            InputError: shapes, counts or devices that do not fit together.
        """
        found = distil(
            self.config, self._images, student, teachers, class_counts,
            rng=rng, lr_scale=lr_scale, progress=progress, given={"noise": noise, "labels": labels},
        )  # fmt: skip
        return DistillMetrics(**found)

    def memory(self) -> Params:
        """Copies of all that the next call needs: the generator, and Adam's moments where they are kept."""
        return self._images.memory()

    def load_memory(self, memory: Params) -> None:
        """Restores what `memory` returned, bit for bit; the tensors are copied.

        Raises:
            InputError: it was taken with another generator.
        """
        self._images.load_memory(memory)


@contextmanager
def _borrowed(student: nn.Module, *, restore_buffers: bool) -> Iterator[None]:
    """Puts the student's modes back afterwards, and its buffers where asked to."""
    modes = [(module, module.training) for module in student.modules()]
    buffers = clone(dict(student.named_buffers())) if restore_buffers else {}
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for name, buffer in student.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
