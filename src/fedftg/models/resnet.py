"""ResNet-18 with the ImageNet or a small-image stem, and BatchNorm or GroupNorm.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385. Structure and initial
values follow torchvision's ``resnet18``. GroupNorm with 2 groups as in FedFTG's public code.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from fedftg.models.small import Normalisation, Shape, check_size, normalisation_layer

_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels and first stride of two blocks each


class LiveConv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1 and no bias that leaves out the taps that only ever meet padding.

    On a 1x1 map that leaves the centre tap, on a 2x2 map with stride 2 the lower right four. The values differ from
    those of ``nn.Conv2d`` by rounding alone.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride=stride, padding=1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Returns features ``(B, outputs, H / stride, W / stride)`` of ``(B, inputs, H, W)``."""
        height, width = input.shape[-2:]
        if height == width == 1:
            return functional.linear(input.flatten(1), self.weight[:, :, 1, 1])[..., None, None]
        if height == width == 2 and self.stride == (2, 2):
            return functional.linear(input.flatten(1), self.weight[:, :, 1:, 1:].flatten(1))[..., None, None]
        return super().forward(input)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; the shortcut has a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, normalisation: Normalisation, groups: int) -> None:
        super().__init__()
        self.conv1 = LiveConv3x3(inputs, outputs, stride)
        self.norm1 = normalisation_layer(normalisation, outputs, groups)
        self.conv2 = LiveConv3x3(outputs, outputs)
        self.norm2 = normalisation_layer(normalisation, outputs, groups)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                normalisation_layer(normalisation, outputs, groups),
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns features ``(B, outputs, H / stride, W / stride)`` of ``(B, inputs, H, W)``."""
        inner = functional.relu(self.norm1(self.conv1(inputs)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(inputs))


class ResNet18(nn.Module):
    """ResNet-18 for images of any size from 8x8.

    Args:
        stem: "imagenet": 7x7 convolution and 3x3 max-pool, both of stride 2, so that a 32x32 image is 8x8 when the
            first block sees it (the paper's choice); "small": 3x3 convolution of stride 1, which is more accurate on
            small images and takes about 15 times the work.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: Shape,
        stem: Literal["imagenet", "small"],
        normalisation: Normalisation,
        groups: int = 2,
    ) -> None:
        super().__init__()
        check_size(image_shape)
        imagenet = stem == "imagenet"
        size, stride, padding = (7, 2, 3) if imagenet else (3, 1, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(image_shape[0], 64, size, stride=stride, padding=padding, bias=False),
            normalisation_layer(normalisation, 64, groups),
            nn.ReLU(),
            *([nn.MaxPool2d(3, stride=2, padding=1)] if imagenet else []),
        )
        blocks: list[nn.Module] = []
        inputs = 64
        for outputs, stride in _STAGES:
            blocks.append(BasicBlock(inputs, outputs, stride, normalisation, groups))
            blocks.append(BasicBlock(outputs, outputs, 1, normalisation, groups))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(512, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits ``(B, C)`` of images ``(B, D, H, W)``."""
        logits: Tensor = self.classifier(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return logits


def resnet18(num_classes: int, image_shape: Shape) -> ResNet18:
    """ResNet-18, ImageNet stem, BatchNorm: the paper's model; 11,181,642 parameters on CIFAR-10."""
    return ResNet18(num_classes, image_shape, "imagenet", "batch")


def resnet18_gn(num_classes: int, image_shape: Shape, groups: int = 2) -> ResNet18:
    """ResNet-18, ImageNet stem, GroupNorm, for skewed clients; 11,181,642 parameters on CIFAR-10."""
    return ResNet18(num_classes, image_shape, "imagenet", "group", groups)


def resnet18_cifar(
    num_classes: int, image_shape: Shape, normalisation: Normalisation = "batch", groups: int = 2
) -> ResNet18:
    """ResNet-18 with a 3x3 stem and no max-pool, for small images; 11,173,962 parameters on CIFAR-10."""
    return ResNet18(num_classes, image_shape, "small", normalisation, groups)
