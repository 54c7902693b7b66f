"""FedDF as a refiner: the clients' mean logits, distilled into the aggregate on real images without labels.

Lin, Kong, Stich, Jaggi, "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020,
https://arxiv.org/abs/2006.07242.

    w <- w - rate grad_w KL(softmax(1/K sum_k f(x; w_k)) || softmax(f(x; w))),   x a proxy image

The proxy images are those of another data set, or training images that no client holds. What differs from the paper:
docs/algorithms/feddf.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedftg.algorithms.base import Refiner, RefinerContext
from fedftg.algorithms.distilled import Distilled, DistilledConfig
from fedftg.augment import augment
from fedftg.data import sources
from fedftg.data.config import DataConfig
from fedftg.distill.images import ProxyImages
from fedftg.errors import InputError

HELD_OUT = "heldout"
_LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue, as Pillow weights them


class ProxyConfig(DataConfig):
    """Which images the student is shown: the settings of a data set, whose labels and test images are not used."""

    name: str = Field(
        default=HELD_OUT, description="a data set by name, or heldout: the training images that no client holds"
    )


class FedDFConfig(DistilledConfig):
    """``refiner.name = "feddf"``: distils the clients' ensemble on real images without labels (NeurIPS 2020)."""

    paper: ClassVar[Mapping[str, Any]] = {
        "iterations": 500,
        "batch_size": 128,
        "student_steps": 1,
        "student_optimizer": "adam",
        "student_lr": 1e-3,
        "student_schedule": "cosine",
        "student_weight_decay": 0.0,
        "lr_decay": 1.0,
        "ensemble": "uniform",
        "ensemble_mean": "logits",
    }
    name: Literal["feddf"] = "feddf"
    proxy: ProxyConfig = Field(
        default=ProxyConfig(),
        description="the images without labels, by the keys of data: proxy.name, proxy.root, proxy.max_train, ...; by "
        "default heldout, the training images that no client holds (partition.unlabelled_share)",
    )

    def images(self, context: RefinerContext, rng: torch.Generator) -> ProxyImages:
        """Returns the proxy images, in the form of the clients'."""
        changes = "none" if self.proxy.augment == "default" else self.proxy.augment
        return ProxyImages(
            context.unlabelled, self.batch_size, lambda images: like_clients(augment(images, changes, rng), context)
        )

    def build(self, context: RefinerContext) -> Refiner:
        """Returns the refiner, with the proxy images in its context."""
        if not context.mean:
            raise InputError("refiner feddf needs the clients' normalisation; pass the strategy mean and std")
        images = context.unlabelled if self.proxy.name == HELD_OUT else _load(self.proxy, context)
        if len(images) < self.batch_size:
            raise InputError(
                f"refiner feddf has {len(images)} proxy images ({self.proxy.name}), fewer than refiner.batch_size "
                f"{self.batch_size}; set refiner.proxy.name to a data set, or raise partition.unlabelled_share"
            )
        shape, own = tuple(images.shape[1:]), replace(context, unlabelled=images.to(context.device))
        converted = "" if shape == context.image_shape else f", {shape} converted to {context.image_shape}"
        return FedDF(self, own, (f"proxy images: {len(images)} of {self.proxy.name}{converted}",))


@dataclass(frozen=True)
class FedDF(Distilled):
    """Distils on proxy images, and says which."""

    notes: tuple[str, ...]


def _load(config: ProxyConfig, context: RefinerContext) -> Tensor:
    """Returns the training images of a data set, as bytes; a test split is neither needed nor used."""
    settings: dict[str, Any] = {"image_size": max(context.image_shape[1:]), "renumber_labels": True, "max_test": 1}
    if not config.test_share:
        settings["test_split"] = config.train_split or "train"
    try:
        return sources.load(config.model_copy(update=settings)).train_images
    except InputError as error:
        fields = "|".join(DataConfig.model_fields)
        raise InputError(re.sub(rf"\bdata\.(?=({fields})\b)", "refiner.proxy.", str(error))) from None


def like_clients(images: Tensor, context: RefinerContext) -> Tensor:
    """Returns bytes ``(B, d, h, w)`` as normalised images ``(B, D, H, W)``, channels and size those of the clients'."""
    channels, *size = context.image_shape
    pixels, device = images.float() / 255, images.device
    if images.shape[1] > channels:
        pixels = (pixels * torch.tensor(_LUMINANCE, device=device).view(3, 1, 1)).sum(dim=1, keepdim=True)
    if list(images.shape[2:]) != size:
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (context.mean, context.std))
    return ((pixels - mean) / std).expand(-1, channels, -1, -1)
