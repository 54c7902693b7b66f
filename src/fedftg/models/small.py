"""Small convolutional classifiers: LeNet-5, the CNN of FedDyn's experiments, and ConvNet for any image size.

LeNet-5: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998, here with ReLU and max-pooling.
CNN: Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021. GroupNorm suits skewed clients, which
do not agree on BatchNorm's statistics (Hsieh et al., ICML 2020).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Normalisation = Literal["none", "group", "batch"]
Shape = tuple[int, int, int]  # of an image: channels, height and width
Pair = tuple[int, int]


def normalisation_layer(kind: Normalisation, channels: int, groups: int) -> nn.Module:
    """Returns BatchNorm, GroupNorm with ``groups`` groups, or the identity."""
    if kind == "none":
        return nn.Identity()
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(groups, channels)
    raise ValueError(f"normalisation must be 'none', 'group' or 'batch', got {kind!r}")


def check_size(image_shape: Shape) -> None:
    """Raises ValueError unless images have at least 8x8 pixels."""
    if min(image_shape[1:]) < 8:
        raise ValueError(f"images must be at least 8x8, got {image_shape[1]}x{image_shape[2]}")


class CNN(nn.Module):
    """FedDyn's CNN: two 5x5 convolutions of 64, dense 384 and 192; 797,962 parameters on CIFAR-10.

    Args:
        image_shape: ``(D, H, W)``, H and W at least 8. Images below 28 pixels are padded by 2 in each convolution.
        channels: of the two convolutions, each followed by normalisation, ReLU and a 2x2 max-pool.
        normalisation: "none", "group" or "batch".
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: Shape,
        channels: Pair = (64, 64),
        hidden: Pair = (384, 192),
        normalisation: Normalisation = "none",
        groups: int = 2,
    ) -> None:
        super().__init__()
        check_size(image_shape)
        depth, *sides = image_shape
        padding = 0 if min(sides) >= 28 else 2  # or nothing would be left
        layers: list[nn.Module] = []
        for outputs in channels:
            layers += [
                nn.Conv2d(depth, outputs, 5, padding=padding),
                normalisation_layer(normalisation, outputs, groups),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            depth, sides = outputs, [(side + 2 * padding - 4) // 2 for side in sides]
        self.features = nn.Sequential(*layers, nn.Flatten())
        wide, narrow = hidden
        inputs = depth * sides[0] * sides[1]
        self.dense = nn.Sequential(nn.Linear(inputs, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU())
        self.classifier = nn.Linear(narrow, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits ``(B, C)`` of images ``(B, D, H, W)``."""
        logits: Tensor = self.classifier(self.dense(self.features(images)))
        return logits


class ConvNet(nn.Module):
    """Convolution blocks until 3 to 6 pixels are left, GroupNorm; for any image size; 94,762 parameters on CIFAR-10.

    A block is a 3x3 convolution, normalisation, ReLU and a 2x2 max-pool; a global average and a linear layer follow.

    Args:
        image_shape: ``(D, H, W)``, H and W at least 8: one block at 8x8, three at 28x28 and 32x32, four at 64x64,
            five at 128x128.
        width: channels of the first block; each block doubles them, up to 256.
        normalisation: "group", "batch" or "none".
        groups: of GroupNorm; must divide ``width``.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: Shape,
        width: int = 32,
        normalisation: Normalisation = "group",
        groups: int = 8,
    ) -> None:
        super().__init__()
        check_size(image_shape)
        inputs, side, outputs = image_shape[0], min(image_shape[1:]), min(width, 256)
        layers: list[nn.Module] = []
        while side >= 7:  # 28 -> 14 -> 7 -> 3, and 32 -> 16 -> 8 -> 4
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=normalisation == "none"),
                normalisation_layer(normalisation, outputs, groups),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            inputs, side, outputs = outputs, side // 2, min(2 * outputs, 256)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits ``(B, C)`` of images ``(B, D, H, W)``."""
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits


def lenet(num_classes: int, image_shape: Shape, channels: Pair = (6, 16), hidden: Pair = (120, 84)) -> CNN:
    """LeNet-5 with no normalisation; 62,006 parameters on CIFAR-10."""
    return CNN(num_classes, image_shape, channels, hidden)


def lenet_gn(
    num_classes: int, image_shape: Shape, channels: Pair = (6, 16), hidden: Pair = (120, 84), groups: int = 2
) -> CNN:
    """LeNet-5 with GroupNorm after each convolution, for skewed clients; 62,050 parameters on CIFAR-10."""
    return CNN(num_classes, image_shape, channels, hidden, "group", groups)


def lenet_bn(num_classes: int, image_shape: Shape, channels: Pair = (6, 16), hidden: Pair = (120, 84)) -> CNN:
    """LeNet-5 with BatchNorm after each convolution; 62,050 parameters on CIFAR-10."""
    return CNN(num_classes, image_shape, channels, hidden, "batch")
