"""ResNet-18 with the ImageNet or a small-image stem, and BatchNorm or GroupNorm.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385. Structure and initial
values follow torchvision's ``resnet18``: kaiming normal (fan out) for convolutions, 1 and 0 for normalisation layers,
torch's default for the classifier. GroupNorm in place of BatchNorm for skewed clients: Hsieh et al., ICML 2020; with 2
groups as in FedFTG's public code.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from fedftg.models.small import Normalisation, normalisation_layer

Stem = Literal["imagenet", "small"]

_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
"""Channels and first stride of the four stages of two blocks each."""


class LiveConv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1 and no bias that leaves out the taps that only ever meet padding.

    On a 1x1 map that leaves the centre tap, on a 2x2 map with stride 2 the lower right four; any other map meets all
    nine. The values differ from those of ``nn.Conv2d`` by rounding alone, dead taps have gradient zero as before, and
    parameters have the same names and shapes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride=stride, padding=1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Features ``(B, outputs, H / stride, W / stride)`` of ``(B, inputs, H, W)``."""
        height, width = input.shape[-2:]
        if height == width == 1:
            return functional.linear(input.flatten(1), self.weight[:, :, 1, 1])[..., None, None]
        if height == width == 2 and self.stride == (2, 2):
            return functional.linear(input.flatten(1), self.weight[:, :, 1:, 1:].flatten(1))[..., None, None]
        return super().forward(input)


def _conv3x3(inputs: int, outputs: int, stride: int, live_taps: bool) -> nn.Conv2d:
    if live_taps:
        return LiveConv3x3(inputs, outputs, stride)
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; the shortcut has a 1x1 convolution where the shape changes."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, normalisation: Normalisation, groups: int, *, live_taps: bool
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride, live_taps)
        self.norm1 = normalisation_layer(normalisation, outputs, groups)
        self.conv2 = _conv3x3(outputs, outputs, 1, live_taps)
        self.norm2 = normalisation_layer(normalisation, outputs, groups)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                normalisation_layer(normalisation, outputs, groups),
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Features ``(B, outputs, H / stride, W / stride)`` of ``(B, inputs, H, W)``."""
        inner = functional.relu(self.norm1(self.conv1(inputs)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(inputs))


class ResNet18(nn.Module):
    """ResNet-18 for images of any size from 8x8.

    Args:
        num_classes: C.
        image_shape: ``(D, H, W)``.
        stem: "imagenet": 7x7 convolution and 3x3 max-pool, both of stride 2, so that a 32x32 image is 8x8 when the
            first block sees it (the paper's choice); "small": 3x3 convolution of stride 1, which is more accurate on
            small images and takes about 15 times the work.
        normalisation: "batch", "group" or "none".
        groups: of GroupNorm.
        live_taps: leaves out what only meets padding (`LiveConv3x3`), in the last stage of 32x32 images behind the
            "imagenet" stem; False computes it all, for the last bits of runs from before.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        stem: Stem,
        normalisation: Normalisation,
        groups: int = 2,
        live_taps: bool = True,
    ) -> None:
        super().__init__()
        depth, height, width = image_shape
        if min(height, width) < 8:
            raise ValueError(f"images must be at least 8x8, got {height}x{width}")
        if stem == "imagenet":
            first: list[nn.Module] = [nn.Conv2d(depth, 64, 7, stride=2, padding=3, bias=False)]
            last: list[nn.Module] = [nn.MaxPool2d(3, stride=2, padding=1)]
        else:
            first, last = [nn.Conv2d(depth, 64, 3, padding=1, bias=False)], []
        self.stem = nn.Sequential(*first, normalisation_layer(normalisation, 64, groups), nn.ReLU(), *last)
        blocks: list[nn.Module] = []
        inputs = 64
        for outputs, stride in _STAGES:
            blocks.append(BasicBlock(inputs, outputs, stride, normalisation, groups, live_taps=live_taps))
            blocks.append(BasicBlock(outputs, outputs, 1, normalisation, groups, live_taps=live_taps))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(512, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)`` of images ``(B, D, H, W)``."""
        features = self.blocks(self.stem(images)).mean(dim=(2, 3))
        logits: Tensor = self.classifier(features)
        return logits


def resnet18(num_classes: int, image_shape: tuple[int, int, int], live_taps: bool = True) -> nn.Module:
    """ResNet-18, ImageNet stem, BatchNorm: the paper's model; 11,181,642 parameters on CIFAR-10."""
    return ResNet18(num_classes, image_shape, stem="imagenet", normalisation="batch", live_taps=live_taps)


def resnet18_gn(
    num_classes: int, image_shape: tuple[int, int, int], groups: int = 2, live_taps: bool = True
) -> nn.Module:
    """ResNet-18, ImageNet stem, GroupNorm, for skewed clients; 11,181,642 parameters on CIFAR-10."""
    return ResNet18(
        num_classes, image_shape, stem="imagenet", normalisation="group", groups=groups, live_taps=live_taps
    )


def resnet18_cifar(
    num_classes: int, image_shape: tuple[int, int, int], normalisation: Normalisation = "batch", groups: int = 2
) -> nn.Module:
    """ResNet-18 with a 3x3 stem and no max-pool, for small images; 11,173,962 parameters on CIFAR-10."""
    return ResNet18(num_classes, image_shape, stem="small", normalisation=normalisation, groups=groups)
