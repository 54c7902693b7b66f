"""The one local training loop: every executor, and any deployment, calls `train`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from fedftg import params as tree
from fedftg.algorithms.base import Batch, ClientResult, LocalRule, LocalTask
from fedftg.data.federated import FederatedData
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params


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
        default=10.0, ge=0, description="gradients are clipped at this norm; 0 switches it off"
    )

    def lr_at(self, round: int) -> float:
        """The rate in a round counted from 1."""
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


def clip(grads: Params, max_norm: float, into: Params | None = None) -> Params:
    """Scales gradients so that their joint norm is at most ``max_norm``; 0 returns them unchanged.

    Args:
        into: on a CPU, tensors of the last step to write to. Gradients within the norm are then returned unchanged,
            which a GPU would have to wait for. The numbers are the same.
    """
    if max_norm == 0:
        return grads
    norms = torch._foreach_norm(list(grads.values()))
    factor = (max_norm / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)
    if into is not None and float(factor) == 1.0:
        return grads
    if into is None:
        return dict(zip(grads, torch._foreach_mul(list(grads.values()), factor), strict=True))
    for name, grad in grads.items():
        kept = into.get(name)
        if kept is not None and kept.shape == grad.shape and kept.stride() == grad.stride():
            torch.mul(grad, factor, out=kept)
        else:
            into[name] = torch.mul(grad, factor)
    return {name: into[name] for name in grads}


class Sgd:
    """SGD with weight decay and momentum on leaf tensors, in place; the arithmetic of ``torch.optim.SGD``.

    On a CPU torch's fused kernel makes one pass over parameters and gradients: 5 ms for ResNet-18 instead of 12 (one
    thread, AVX2). Without momentum the bits are the same.

    Args:
        lr: the rate; a tensor of the parameters' type is read in each step, also in a recorded one.
        velocity: initial momentum, one tensor a parameter, updated in place; None starts from the first gradients.
    """

    def __init__(
        self, params: Params, lr: float | Tensor, settings: LocalConfig, velocity: Sequence[Tensor] | None = None
    ) -> None:
        self._params = list(params.values())
        self._lr = lr
        self._weight_decay = settings.weight_decay
        self._momentum = settings.momentum
        self._velocity = None if velocity is None else list(velocity)
        # A GPU's allocator caches memory, and there one call for all tensors is faster.
        on_cpu = all(param.device.type == "cpu" for param in self._params)
        self.scratch: Params | None = {} if on_cpu else None
        """Tensors that `clip` overwrites in each step."""
        self._fused = on_cpu and all(
            param.dtype in (torch.float32, torch.float64) and torch.empty_like(param).stride() == param.stride()
            for param in self._params
        )

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
            if self._velocity is None:
                self._velocity = [step.clone() for step in steps]
            else:
                torch._foreach_mul_(self._velocity, self._momentum)
                torch._foreach_add_(self._velocity, steps)
            steps = self._velocity
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
        velocity: list[Tensor | None] = [None] * len(steps) if self._velocity is None else [*self._velocity]
        torch_sgd(
            [param.detach() for param in self._params], steps, velocity, fused=True, weight_decay=self._weight_decay,
            momentum=self._momentum, lr=self._lr, dampening=0.0, nesterov=False,  # type: ignore[arg-type]
            maximize=False,
        )  # fmt: skip
        if self._momentum:
            self._velocity = [tensor for tensor in velocity if tensor is not None]


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

    Order: the rule's gradient correction, clipping, weight decay, momentum, step. Nothing waits for a value, so a GPU
    can record the step.
    """
    loss = rule.loss(model, params, buffers, batch, task)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        corrected = rule.correct(dict(zip(params, grads, strict=True)), params, task)
        clipped = clip(corrected, max_grad_norm, sgd.scratch)
        sgd.step(clipped)
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
        class_counts: ``(C,)``, passed on in the result.
    """
    params = {name: tensor.detach().clone().requires_grad_() for name, tensor in task.params.items()}
    buffers = tree.clone(task.buffers)
    sgd = Sgd(params, task.lr, settings)
    losses: list[Tensor] = []
    for images, labels in batches:
        batch = Batch(images, labels)
        losses.append(client_step(model, rule, params, buffers, batch, task, sgd, settings.max_grad_norm))
    trained = {name: tensor.detach() for name, tensor in params.items()}
    extra, memory = rule.finish(trained, buffers, task, len(losses))
    mean_loss = float(torch.stack(losses).double().mean()) if losses else float("nan")
    return ClientResult(task.client, task.num_samples, class_counts, trained, buffers, extra, memory, mean_loss)
