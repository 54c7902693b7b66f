"""One batch of FedFTG: the generator's steps, then the student's steps on what it makes of the same noise and labels.

Modes: the teachers evaluate always; the generator trains (BatchNorm by batch) in its own steps and evaluates in the
student's; the student evaluates in the generator's steps, and in its own does what ``student_mode`` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from fedftg.distill import losses
from fedftg.distill.config import DistillConfig
from fedftg.distill.generator import Generator
from fedftg.distill.labels import sample_labels
from fedftg.distill.teachers import Teachers
from fedftg.errors import InputError
from fedftg.params import Params


@dataclass(frozen=True)
class Task:
    """What stays the same through one call of `fedftg.distill.distiller.Distiller.refine`."""

    config: DistillConfig
    generator: Generator
    generator_optimizer: torch.optim.Optimizer
    averaged_generator: Params
    """Empty where there is none (yet)."""
    student: nn.Module
    trainable: list[nn.Parameter]
    """The student's parameters that are trained."""
    student_optimizer: torch.optim.Optimizer
    teachers: Teachers
    class_counts: Tensor
    """``(K, C)`` float64 on the CPU."""
    class_weights: Tensor
    """``a_k(y)``: ``(K, C)`` float32 on the device."""
    rng: torch.Generator
    device: torch.device

    def draw(self, num_batches: int) -> tuple[Float[Tensor, "I B Z"], Int[Tensor, "I B"]]:
        """Noise ``(I, B, Z)`` and labels ``(I, B)`` for ``num_batches``, drawn on the CPU, on the device."""
        batch_size = self.config.batch_size
        labels = sample_labels(self.class_counts, num_batches, batch_size, self.config.label_sampling, rng=self.rng)
        noise = torch.randn(num_batches, batch_size, self.config.noise_dim, generator=self.rng)
        return noise.to(self.device), labels.to(self.device)

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The ranges of teachers whose graphs are in memory at a time."""
        size = self.config.teacher_chunk or stop - start
        return [(first, min(first + size, stop)) for first in range(start, stop, size)]

    def student_logits(self, images: Float[Tensor, "B D H W"]) -> Float[Tensor, "B C"]:
        """Logits ``(B, C)`` of the student in its present mode.

        Raises:
            InputError: another number of classes than the class counts have.
        """
        logits: Tensor = self.student(images)
        expected = (images.shape[0], self.class_weights.shape[1])
        if tuple(logits.shape) != expected:
            raise InputError(
                f"the student's logits must have shape (batch, classes) = {expected}, got {tuple(logits.shape)}; "
                "class_counts needs one column per class of the student"
            )
        return logits

    def teacher_logits(self, images: Float[Tensor, "B D H W"], start: int, stop: int) -> Float[Tensor, "K B C"]:
        """Logits ``(stop - start, B, C)`` of some teachers.

        Raises:
            InputError: another number of classes than the class counts have.
        """
        logits = self.teachers.part(start, stop)(images)
        expected = (stop - start, images.shape[0], self.class_weights.shape[1])
        if tuple(logits.shape) != expected:
            raise InputError(
                f"the teachers' logits must have shape (teachers, batch, classes) = {expected}, "
                f"got {tuple(logits.shape)}; student, teachers and class_counts must have the same classes"
            )
        return logits

    @torch.no_grad()
    def ensemble(self, images: Float[Tensor, "B D H W"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B C"]:
        """``(B, C)``: the class-weighted mean of the teachers' probabilities, without a graph."""
        weights = self.class_weights[:, labels]
        parts = [
            losses.ensemble_probabilities(
                self.teacher_logits(images, first, last), weights[first:last], self.config.temperature
            )
            for first, last in self.chunks(0, len(self.teachers))
        ]
        return torch.stack(parts).sum(dim=0)


def require_grad(parameters: list[nn.Parameter], flag: bool) -> None:
    """Sets the flag on all of them."""
    for parameter in parameters:
        parameter.requires_grad_(flag)


def generator_steps(task: Task, noise: Float[Tensor, "B Z"], labels: Int[Tensor, " B"]) -> Float[Tensor, " 3"]:
    """``(3,)``: discrepancy, fidelity and diversity, mean over the ``generator_steps`` on one batch."""
    task.generator.train()
    task.student.eval()
    # Without weight gradients the backward pass through the student costs about a third less.
    require_grad(task.trainable, False)
    num_teachers = len(task.teachers)
    joint = task.config.generator_update == "joint"
    parts = [(0, num_teachers)] if joint else [(k, k + 1) for k in range(num_teachers)]
    total = torch.zeros(3, device=task.device)
    for _ in range(task.config.generator_steps):
        for start, stop in parts:
            total += _generator_step(task, noise, labels, start, stop)
    return total / task.config.generator_steps


def _generator_step(task: Task, noise: Tensor, labels: Tensor, start: int, stop: int) -> Float[Tensor, " 3"]:
    """One Adam step on the teachers ``start <= k < stop``; returns their share of the three metrics.

    The gradient is collected at the images and at the student's logits, teacher chunk by teacher chunk, so that the
    graphs of one chunk only are in memory. No gradient of a teacher's or the student's weights is computed.
    """
    config = task.config
    images = task.generator(noise, labels)
    leaf = images.detach().requires_grad_()
    student_logits = task.student_logits(leaf)
    student_leaf = student_logits.detach().requires_grad_()
    # Each of K single steps carries 1/K of the diversity, so that single steps and the joint one have the same sum.
    share = (stop - start) / len(task.teachers)
    diversity = share * losses.diversity(noise, leaf)
    (config.lambda_dis * diversity).backward(inputs=[leaf])  # type: ignore[no-untyped-call]
    discrepancy, fidelity = _teacher_terms(task, leaf, student_leaf, labels, start, stop)
    if student_leaf.grad is not None:
        student_logits.backward(student_leaf.grad, inputs=[leaf])  # type: ignore[no-untyped-call]
    task.generator_optimizer.zero_grad()
    images.backward(leaf.grad)
    task.generator_optimizer.step()
    return torch.stack([discrepancy, fidelity, diversity.detach()])


def _teacher_terms(
    task: Task, leaf: Tensor, student_leaf: Tensor, labels: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Adds the gradient of ``lambda_cls L_cls - lambda_md L_md`` to both leaves; returns ``L_md`` and ``L_cls``."""
    config = task.config
    weights = task.class_weights[:, labels]
    masked = config.discrepancy_mask == "transferable"
    mask: Bool[Tensor, " B"] | None = None
    chunks = task.chunks(start, stop)
    if masked and chunks != [(0, len(task.teachers))]:
        mask = losses.transferable(task.ensemble(leaf.detach(), labels), student_leaf, labels)
    discrepancies, fidelities = [], []
    for first, last in chunks:
        logits = task.teacher_logits(leaf, first, last)
        if masked and mask is None:
            ensemble = losses.ensemble_probabilities(logits.detach(), weights, config.temperature)
            mask = losses.transferable(ensemble, student_leaf, labels)
        discrepancy = losses.model_discrepancy(
            logits.detach() if config.teacher_gradient == "detached" else logits,
            student_leaf,
            weights[first:last],
            kind=config.discrepancy,
            temperature=config.temperature,
            mask=mask,
        )
        fidelity = losses.fidelity(logits, labels, weights[first:last], weighting=config.fidelity_weighting)
        # A term of weight 0 is left out, so that it cannot turn the others into NaN.
        loss = config.lambda_cls * fidelity if config.lambda_cls else fidelity.new_zeros(())
        if config.lambda_md:
            loss = loss - config.lambda_md * discrepancy
        if loss.requires_grad:
            loss.backward(inputs=[leaf, student_leaf])  # type: ignore[no-untyped-call]
        discrepancies.append(discrepancy.detach())
        fidelities.append(fidelity.detach())
    return torch.stack(discrepancies).sum(), torch.stack(fidelities).sum()


def student_steps(task: Task, noise: Float[Tensor, "B Z"], labels: Int[Tensor, " B"]) -> Float[Tensor, " 2"]:
    """``(2,)``: the student's loss, mean over its steps, and the teachers' agreement with the labels of the first."""
    config = task.config
    task.generator.eval()
    task.student.train(config.student_mode == "train")
    require_grad(task.trainable, True)
    if config.fresh_batches and config.student_steps:
        batches = list(zip(*task.draw(config.student_steps), strict=True))
    else:
        batches = [(noise, labels)]
    total = torch.zeros((), device=task.device)
    agreement = total
    for step in range(max(config.student_steps, 1)):
        # The images and targets of a batch are the same in all the student's steps on it: made once.
        if step < len(batches):
            images, ensemble, agreed = _targets(task, *batches[step])
            agreement = agreed if step == 0 else agreement
        if config.student_steps:
            total = total + _student_step(task, images, ensemble)
    return torch.stack([total / max(config.student_steps, 1), agreement])


def _student_step(task: Task, images: Tensor, ensemble: Tensor) -> Float[Tensor, ""]:
    config = task.config
    loss = losses.student_loss(
        task.student_logits(images), ensemble, kind=config.student_loss, temperature=config.temperature
    )
    task.student_optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    task.student_optimizer.step()
    return loss.detach()


@torch.no_grad()
def _targets(task: Task, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images, the ensemble's probabilities for them, and the share of those that are right."""
    images = task.generator(noise, labels)
    if task.averaged_generator:
        remembered: Tensor = functional_call(task.generator, task.averaged_generator, (noise, labels))
        images, labels = torch.cat([images, remembered]), torch.cat([labels, labels])
    ensemble = task.ensemble(images, labels)
    agreement = (ensemble.argmax(dim=-1) == labels).to(torch.float32).mean()
    return images, ensemble, agreement
