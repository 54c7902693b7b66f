"""The fine-tuning of one student, and the generator that is carried from call to call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from fedftg.distill.config import DistillConfig
from fedftg.distill.generator import Generator
from fedftg.distill.labels import check_class_counts, ensemble_weights
from fedftg.distill.steps import Task, generator_steps, student_steps
from fedftg.distill.teachers import Teachers
from fedftg.errors import InputError
from fedftg.params import Params, clone, prefixed, unprefixed
from fedftg.seeds import forked

Progress = Callable[[int, int], None]
"""Called as ``progress(iterations done, iterations in all)``."""

_CALLS, _GENERATOR, _AVERAGED, _OPTIMIZER = "calls", "generator.", "averaged.", "optimizer."


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
    """The student's loss, mean over its steps; 0 where it made none."""
    teacher_agreement: Tensor
    """The share of the student's images for which the weighted ensemble predicts the label they were drawn for."""

    def means(self) -> dict[str, float]:
        """The mean of each metric over the iterations."""
        return {item.name: float(getattr(self, item.name).mean()) for item in fields(self)}


class Distiller:
    """Distils teachers into a student on images from a generator, which gets better from call to call.

    Args:
        config: see `DistillConfig`.
        generator: trained in place; its device is where the work is done.

    Raises:
        InputError: the generator's noise length is not the config's, or its device has no bfloat16 that is asked for.
    """

    def __init__(self, config: DistillConfig, generator: Generator) -> None:
        if config.noise_dim != generator.noise_dim:
            raise InputError(
                f"noise_dim must be the generator's, {generator.noise_dim}, got {config.noise_dim}; change one of them"
            )
        device = next(generator.parameters()).device
        if config.precision == "bfloat16" and not _has_bfloat16(device):
            raise InputError(
                f"precision 'bfloat16' needs hardware that has it, and {device} has not: it would take a hundred times "
                "as long; set precision to 'float32'"
            )
        self.config = config
        self.generator = generator
        self._optimizer = self._new_optimizer()
        self._averaged: Params = {}
        self._calls = 0

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
        """Trains the student and the generator in place, for ``config.iterations`` iterations; metrics are ``(I,)``.

        The student's modes and gradient flags are put back; parameters that do not require a gradient stay fixed. A
        result that is not finite is left for the caller to judge.

        Args:
            student: on the generator's device; from images ``(B, D, H, W)`` to logits ``(B, C)``.
            teachers: ``K`` of them, with the same classes.
            class_counts: ``(K, C)``, how many samples of each class each teacher has seen.
            rng: a CPU generator; noise, labels and the student's dropout come from it and from nothing else.
            lr_scale: factor on both rates; in round ``t``, counted from 0, ``config.lr_decay ** t``.
            noise: ``(I, B, Z)`` to use instead of drawn noise.
            labels: ``(I, B)`` to use instead of drawn labels.
            progress: called after every iteration.

        Raises:
            InputError: shapes, counts or devices that do not fit together.
        """
        task = self._task(student, teachers, class_counts, rng, lr_scale)
        dropout_seed = int(torch.randint(2**62, (), generator=rng))
        rows: list[Tensor] = []
        with _borrowed(student, restore_buffers=self.config.restore_buffers), forked(dropout_seed, task.device):
            for batch in self._warmup_batches(task):
                generator_steps(task, *batch)
            for done, batch in enumerate(self._batches(task, noise, labels), start=1):
                rows.append(torch.cat([generator_steps(task, *batch), student_steps(task, *batch)]))
                if progress is not None:
                    progress(done, self.config.iterations)
            task.student_optimizer.zero_grad()
        self.generator.zero_grad()
        self._calls += 1
        self._average_generator()
        return DistillMetrics(*torch.stack(rows).to("cpu", torch.float32).unbind(dim=1))

    def memory(self) -> Params:
        """Copies of all that the next call needs: the generator, and Adam's moments and averaged weights where kept."""
        memory = {_CALLS: torch.tensor(self._calls)}
        memory |= prefixed(clone(self.generator.state_dict()), _GENERATOR)
        memory |= prefixed(clone(self._averaged), _AVERAGED)
        if self.config.generator_optimizer_state == "kept":
            for name, parameter in self.generator.named_parameters():
                memory |= prefixed(clone(self._optimizer.state.get(parameter, {})), f"{_OPTIMIZER}{name}:")
        return memory

    def load_memory(self, memory: Params) -> None:
        """Continues where `memory` was taken, bit for bit; the tensors are copied.

        Raises:
            InputError: it was taken with another generator.
        """
        saved, own = unprefixed(memory, _GENERATOR), self.generator.state_dict()
        wrong = sorted(
            name
            for name in {**saved, **own}
            if name not in saved or name not in own or saved[name].shape != own[name].shape
        )
        if wrong or _CALLS not in memory:
            raise InputError(
                f"the saved generator does not fit at {wrong[0] if wrong else _CALLS!r}; load it with the noise_dim, "
                "generator_width, classes and image size that it was saved with"
            )
        self.generator.load_state_dict(saved)
        self._calls = int(memory[_CALLS])
        device = next(self.generator.parameters()).device
        averaged = clone(unprefixed(memory, _AVERAGED)) if self.config.generator_ema else {}
        self._averaged = {name: tensor.to(device) for name, tensor in averaged.items()}
        self._optimizer = self._new_optimizer()
        if self.config.generator_optimizer_state == "kept":
            for name, parameter in self.generator.named_parameters():
                moments = clone(unprefixed(memory, f"{_OPTIMIZER}{name}:"))
                if moments:
                    # Adam counts its steps on the CPU, wherever the moments are.
                    self._optimizer.state[parameter] = {
                        key: tensor.to("cpu" if key == "step" else device) for key, tensor in moments.items()
                    }

    def _new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.generator.parameters(), lr=self.config.generator_lr)

    def _task(
        self, student: nn.Module, teachers: Teachers, class_counts: Tensor, rng: torch.Generator, lr_scale: float
    ) -> Task:
        """Checked inputs, and both optimisers with this call's rates."""
        config, generator = self.config, self.generator
        counts = check_class_counts(class_counts, num_teachers=len(teachers), num_classes=generator.num_classes)
        trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
        if not trainable:
            raise InputError("no parameter of the student requires a gradient; call student.requires_grad_(True)")
        device, dtype = next(generator.parameters()).device, next(generator.parameters()).dtype
        if trainable[0].device != device:
            raise InputError(
                f"student and generator must be on one device, got {trainable[0].device} and {device}; move one of them"
            )
        if config.generator_optimizer_state == "reset":
            self._optimizer = self._new_optimizer()
        for group in self._optimizer.param_groups:
            group["lr"] = config.generator_lr * lr_scale
        return Task(
            config=config,
            generator=generator,
            generator_optimizer=self._optimizer,
            averaged_generator=self._averaged,
            student=student,
            trainable=trainable,
            student_optimizer=torch.optim.SGD(
                trainable,
                lr=config.student_lr * lr_scale,
                momentum=config.student_momentum,
                weight_decay=config.student_weight_decay,
            ),
            teachers=teachers,
            class_counts=counts,
            class_weights=ensemble_weights(counts, config.ensemble, config.ensemble_epsilon).to(device, dtype),
            rng=rng,
            device=device,
        )

    def _warmup_batches(self, task: Task) -> list[tuple[Tensor, Tensor]]:
        """Noise and labels of the generator-only iterations: none but in the first call."""
        number = self.config.generator_warmup if self._calls == 0 else 0
        return list(zip(*task.draw(number), strict=True)) if number else []

    def _batches(self, task: Task, noise: Tensor | None, labels: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Noise ``(B, Z)`` and labels ``(B,)`` of every iteration: drawn, or as given."""
        shape = (self.config.iterations, self.config.batch_size)
        if noise is None or labels is None:
            drawn_noise, drawn_labels = task.draw(shape[0])
            noise = drawn_noise if noise is None else noise
            labels = drawn_labels if labels is None else labels
        if tuple(noise.shape) != (*shape, self.config.noise_dim) or tuple(labels.shape) != shape:
            raise InputError(
                f"noise must have shape (iterations, batch_size, noise_dim) = {(*shape, self.config.noise_dim)} and "
                f"labels {shape}, got {tuple(noise.shape)} and {tuple(labels.shape)}"
            )
        classes = self.generator.num_classes
        if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise InputError(f"labels must be whole numbers from 0 to {classes - 1}, got {labels.dtype} or others")
        dtype = next(self.generator.parameters()).dtype
        return list(zip(noise.to(task.device, dtype), labels.to(task.device, torch.int64), strict=True))

    def _average_generator(self) -> None:
        """Moves the averaged generator towards the current one; the first call puts it there."""
        factor = self.config.generator_ema
        if not factor:
            return
        state = clone(self.generator.state_dict())
        if self._averaged:
            state = {
                name: torch.lerp(now, self._averaged[name], factor) if now.is_floating_point() else now
                for name, now in state.items()
            }
        self._averaged = state


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without AVX512_BF16 or AMX a product of 2048x2048 measured 0.3 GFLOP/s beside 84 in float32 (AVX2).
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def _borrowed(student: nn.Module, *, restore_buffers: bool) -> Iterator[None]:
    """Puts the student's modes and gradient flags back afterwards, and its buffers where asked to."""
    modes = [(module, module.training) for module in student.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    buffers = clone(dict(student.named_buffers())) if restore_buffers else {}
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for name, buffer in student.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
