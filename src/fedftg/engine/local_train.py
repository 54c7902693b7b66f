"""The one local training loop: every executor, and any deployment, calls `train`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from fedftg import params as tree
from fedftg.algorithms.base import Batch, ClientResult, LocalRule, LocalTask
from fedftg.data.federated import FederatedData
from fedftg.distill.labels import label_log_prior
from fedftg.models.functional import AdjustedModel, ComputedModel, FunctionalModel
from fedftg.params import Params
from fedftg.precision import MemoryFormat, Precision


class LocalConfig(BaseModel):
    """SGD on a client. The defaults are those of the FedFTG paper's CIFAR experiments."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lr: float = Field(default=0.1, gt=0, description="learning rate of the first round")
    lr_decay: float = Field(default=0.998, gt=0, le=1, description="factor per round; 1 keeps the rate")
    epochs: int = Field(default=5, ge=1, description="passes over the client's data in a round")
    steps: int | None = Field(default=None, ge=1, description="when given, this many minibatches instead of epochs")
    batch_size: int = Field(default=50, ge=1, description="the last batch of an epoch may be smaller")
    weight_decay: float = Field(default=1e-3, ge=0, description="added to the gradient after clipping, as SGD does")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="0 is plain SGD; the buffer is new in every round")
    max_grad_norm: float = Field(
        default=10.0, ge=0, description="gradients are clipped at this norm; 0 disables clipping"
    )
    loss: Literal["cross_entropy", "balanced_softmax", "fedrs"] = Field(
        default="cross_entropy",
        description="of what logits, with any algorithm, while a client trains: the model's, those plus loss_tau times "
        "the log of the client's label prior, or those of classes that it does not hold times loss_alpha",
    )
    loss_tau: float = Field(default=1.0, ge=0, description="balanced_softmax: 0 gives cross_entropy (paper: 1)")
    loss_alpha: float = Field(default=0.5, ge=0, le=1, description="fedrs: 1 gives cross_entropy")
    precision: Precision = Field(
        default="float32",
        description="bfloat16: mixed precision of a client's passes and of evaluation (weights and losses stay "
        "float32), on hardware that has it; auto takes it where available",
    )
    memory_format: MemoryFormat = Field(
        default="contiguous",
        description="layout of images and feature maps; channels_last is faster for some models: see docs/speed.md",
    )

    def lr_at(self, round: int) -> float:
        """Returns the rate in a round counted from 1."""
        return self.lr * self.lr_decay ** (round - 1)


def client_batches(
    model: FunctionalModel, data: FederatedData, settings: LocalConfig, task: LocalTask
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields images and labels of each step; order and augmentation depend on the task's seed alone."""
    return data.batches(
        task.client,
        num_epochs=settings.epochs,
        num_steps=settings.steps,
        batch_size=settings.batch_size,
        rng=torch.Generator().manual_seed(task.seed),
        min_batch=2 if model.has_batchnorm else 1,
    )


def local_model(model: FunctionalModel, settings: LocalConfig, class_counts: Tensor) -> FunctionalModel:
    """Returns the model as a client with these ``(C,)`` class counts trains it; a GPU can record it.

    ``balanced_softmax`` is that of Ren and others, NeurIPS 2020, arXiv 2007.10740, with the client's own prior;
    ``fedrs`` is the restricted softmax of Li and Zhan, KDD 2021. See docs/algorithms/client_losses.md.
    """
    model = ComputedModel(model, settings.precision, settings.memory_format)
    if settings.loss == "cross_entropy":
        return model
    scale = torch.ones_like(class_counts, dtype=torch.float32)
    if settings.loss == "fedrs":
        return AdjustedModel(model, scale.masked_fill(class_counts == 0, settings.loss_alpha), scale * 0)
    return AdjustedModel(model, scale, (settings.loss_tau * label_log_prior(class_counts)).float())


def clip(grads: Params, max_norm: float) -> Params:
    """Scales gradients so that their joint norm is at most ``max_norm``; 0 returns them unchanged."""
    if max_norm == 0:
        return grads
    norms = torch._foreach_norm(list(grads.values()))
    factor = (max_norm / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)
    if factor.device.type == "cpu" and float(factor) == 1.0:  # a GPU would have to be waited for
        return grads
    return dict(zip(grads, torch._foreach_mul(list(grads.values()), factor), strict=True))


class Sgd:
    """SGD with weight decay and momentum on leaf tensors, in place; the arithmetic of ``torch.optim.SGD``.

    On a CPU torch's fused kernel makes one pass over parameters and gradients: 5 ms for ResNet-18 instead of 12 (one
    thread, AVX2). A rate in a tensor of the parameters' type is read in each step, also in a recorded one.
    """

    def __init__(self, params: Params, lr: float | Tensor, settings: LocalConfig) -> None:
        self._params = list(params.values())
        self._lr = lr
        self._weight_decay = settings.weight_decay
        self._momentum = settings.momentum
        self.velocity = [torch.zeros_like(param) for param in self._params] if settings.momentum else []
        self._fused = all(param.device.type == "cpu" for param in self._params)

    @torch.no_grad()
    def step(self, grads: Params) -> None:
        """Makes one step along the gradients, which stay unchanged."""
        steps = list(grads.values())
        if self._fused:
            self._fused_step(steps)
            return
        if self._weight_decay:
            steps = list(torch._foreach_add(steps, self._params, alpha=self._weight_decay))
        if self._momentum:
            torch._foreach_mul_(self.velocity, self._momentum)
            torch._foreach_add_(self.velocity, steps)
            steps = self.velocity
        if isinstance(self._lr, Tensor):
            torch._foreach_sub_(self._params, torch._foreach_mul(steps, self._lr))
        else:
            torch._foreach_add_(self._params, steps, alpha=-self._lr)

    def _fused_step(self, steps: list[Tensor]) -> None:
        # The kernel needs gradients with the strides of their parameters, which a convolution's may not have.
        steps = [
            step
            if step.stride() == param.stride() and step.dtype == param.dtype
            else torch.empty_like(param).copy_(step)
            for step, param in zip(steps, self._params, strict=True)
        ]
        velocity: list[Tensor | None] = [*self.velocity] or [None] * len(steps)
        torch_sgd(
            [param.detach() for param in self._params], steps, velocity, fused=True, weight_decay=self._weight_decay,
            momentum=self._momentum, lr=self._lr, dampening=0.0, nesterov=False,  # type: ignore[arg-type]
            maximize=False,
        )  # fmt: skip


def client_step(
    model: FunctionalModel,
    rule: LocalRule,
    params: Params,
    buffers: Params,
    batch: Batch,
    task: LocalTask,
    sgd: Sgd,
    max_grad_norm: float,
) -> Tensor:
    """Makes one step of one client on leaf tensors ``params``, in place, and returns the detached loss.

    Order: the rule's gradient correction, clipping, weight decay, momentum, step. A GPU can record it.
    """
    loss = rule.loss(model, params, buffers, batch, task)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        corrected = rule.correct(dict(zip(params, grads, strict=True)), params, task)
        sgd.step(clip(corrected, max_grad_norm))
    return loss.detach()


def train(
    model: FunctionalModel,
    rule: LocalRule,
    task: LocalTask,
    batches: Iterable[tuple[Tensor, Tensor]],
    class_counts: Tensor,
    settings: LocalConfig,
) -> ClientResult:
    """Trains one client: `client_step` over ``batches``, starting from ``task.params``, which stay unchanged.

    Args:
        batches: images ``(B, D, H, W)`` and labels ``(B,)``; without any the received model is returned.
        class_counts: ``(C,)``, of the client's samples.
    """
    params = {name: tensor.detach().clone().requires_grad_() for name, tensor in task.params.items()}
    buffers = tree.clone(task.buffers)
    sgd = Sgd(params, task.lr, settings)
    losses: list[Tensor] = []
    model = local_model(model, settings, class_counts.to(next(iter(params.values())).device))
    for images, labels in batches:
        batch = Batch(images, labels)
        losses.append(client_step(model, rule, params, buffers, batch, task, sgd, settings.max_grad_norm))
    trained = {name: tensor.detach() for name, tensor in params.items()}
    return result_of(rule, task, trained, buffers, losses, class_counts)


def result_of(
    rule: LocalRule, task: LocalTask, params: Params, buffers: Params, losses: Sequence[Tensor], class_counts: Tensor
) -> ClientResult:
    """Returns the result of a client with these trained parameters and buffers, and the loss of each of its steps."""
    extra, memory = rule.finish(params, buffers, task, len(losses))
    loss = float(torch.stack(list(losses)).double().mean()) if losses else float("nan")
    return ClientResult(task.client, task.num_samples, class_counts, params, buffers, extra, memory, loss)
