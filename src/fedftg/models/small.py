"""Small convolutional classifiers: LeNet-5, the CNN of FedDyn's experiments, and ConvNet for any image size.

LeNet-5: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 1998;
here with ReLU and max-pooling, as in federated-learning benchmarks. CNN: Acar et al., "Federated Learning Based on
Dynamic Regularization", ICLR 2021. ConvNet has GroupNorm (Wu, He, "Group Normalization", ECCV 2018) by default: skewed
clients do not agree on BatchNorm's statistics (Hsieh et al., ICML 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

Normalisation = Literal["none", "group", "batch"]

UNPADDED_FROM = 28
"""From this image side on the 5x5 convolutions have no padding; below it they pad by 2, or nothing would be left."""


def normalisation_layer(kind: Normalisation, channels: int, groups: int) -> nn.Module:
    """Returns BatchNorm, GroupNorm with ``groups`` groups, or nothing.

    Raises:
        ValueError: unknown kind, or channels that ``groups`` does not divide.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(groups, channels)
    raise ValueError(f"normalisation must be 'none', 'group' or 'batch', got {kind!r}")


class TwoConvolutions(nn.Module):
    """Two blocks (5x5 convolution, normalisation, ReLU, 2x2 max-pool), two hidden dense layers, a linear classifier.

    Args:
        num_classes: C.
        image_shape: ``(D, H, W)``, H and W at least 8. Images below 28 pixels are padded by 2 in each convolution.
        channels: of the two convolutions.
        hidden: widths of the two dense layers.
        normalisation: "none"; "group", which does not mix samples and so suits skewed clients; or "batch".
        groups: of GroupNorm; 1 normalises all channels together.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        channels: Sequence[int],
        hidden: Sequence[int],
        normalisation: Normalisation = "none",
        groups: int = 2,
    ) -> None:
        super().__init__()
        depth, height, width = image_shape
        if min(height, width) < 8:
            raise ValueError(f"images must be at least 8x8, got {height}x{width}")
        padding = 0 if min(height, width) >= UNPADDED_FROM else 2
        first, second = channels
        self.features = nn.Sequential(
            nn.Conv2d(depth, first, 5, padding=padding),
            normalisation_layer(normalisation, first, groups),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5, padding=padding),
            normalisation_layer(normalisation, second, groups),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        side_lengths = [_after_two_blocks(side, padding) for side in (height, width)]
        wide, narrow = hidden
        self.dense = nn.Sequential(
            nn.Linear(second * side_lengths[0] * side_lengths[1], wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU()
        )
        self.classifier = nn.Linear(narrow, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits ``(B, C)`` of images ``(B, D, H, W)``."""
        logits: Tensor = self.classifier(self.dense(self.features(images)))
        return logits


def _after_two_blocks(side: int, padding: int) -> int:
    for _ in range(2):
        side = (side + 2 * padding - 4) // 2
    return side


class ConvNet(nn.Module):
    """Blocks of 3x3 convolution, normalisation, ReLU and 2x2 max-pool, a global average, a linear classifier.

    Blocks halve the image until 3 to 6 pixels are left, so the parameters do not grow with the image.

    Args:
        num_classes: C.
        image_shape: ``(D, H, W)``, H and W at least 8: one block at 8x8, three at 28x28 and 32x32, four at 64x64,
            five at 128x128.
        width: channels of the first block; each block doubles them, up to 256.
        normalisation: "group" (default), "batch" or "none".
        groups: of GroupNorm; must divide ``width``.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        width: int = 32,
        normalisation: Normalisation = "group",
        groups: int = 8,
    ) -> None:
        super().__init__()
        channels, height, side_width = image_shape
        side = min(height, side_width)
        if side < 8:
            raise ValueError(f"images must be at least 8x8, got {height}x{side_width}")
        layers: list[nn.Module] = []
        depth = 0
        while side >= 7:  # 28 -> 14 -> 7 -> 3, and 32 -> 16 -> 8 -> 4
            outputs = min(width * 2**depth, 256)
            layers += [
                nn.Conv2d(channels, outputs, 3, padding=1, bias=normalisation == "none"),
                normalisation_layer(normalisation, outputs, groups),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels, side, depth = outputs, side // 2, depth + 1
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits ``(B, C)`` of images ``(B, D, H, W)``."""
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits


def lenet(
    num_classes: int,
    image_shape: tuple[int, int, int],
    channels: Sequence[int] = (6, 16),
    hidden: Sequence[int] = (120, 84),
) -> nn.Module:
    """LeNet-5 with no normalisation; 62,006 parameters on CIFAR-10."""
    return TwoConvolutions(num_classes, image_shape, channels=channels, hidden=hidden)


def lenet_gn(
    num_classes: int,
    image_shape: tuple[int, int, int],
    channels: Sequence[int] = (6, 16),
    hidden: Sequence[int] = (120, 84),
    groups: int = 2,
) -> nn.Module:
    """LeNet-5 with GroupNorm after each convolution, for skewed clients; 62,050 parameters on CIFAR-10."""
    return TwoConvolutions(
        num_classes, image_shape, channels=channels, hidden=hidden, normalisation="group", groups=groups
    )


def lenet_bn(
    num_classes: int,
    image_shape: tuple[int, int, int],
    channels: Sequence[int] = (6, 16),
    hidden: Sequence[int] = (120, 84),
) -> nn.Module:
    """LeNet-5 with BatchNorm after each convolution; 62,050 parameters on CIFAR-10."""
    return TwoConvolutions(num_classes, image_shape, channels=channels, hidden=hidden, normalisation="batch")


def cnn(
    num_classes: int,
    image_shape: tuple[int, int, int],
    channels: Sequence[int] = (64, 64),
    hidden: Sequence[int] = (384, 192),
    normalisation: Normalisation = "none",
    groups: int = 2,
) -> nn.Module:
    """FedDyn's CNN: two 5x5 convolutions of 64, dense 384 and 192; 797,962 parameters on CIFAR-10."""
    return TwoConvolutions(
        num_classes, image_shape, channels=channels, hidden=hidden, normalisation=normalisation, groups=groups
    )


def convnet(
    num_classes: int,
    image_shape: tuple[int, int, int],
    width: int = 32,
    normalisation: Normalisation = "group",
    groups: int = 8,
) -> nn.Module:
    """Convolution blocks until 3 to 6 pixels are left, GroupNorm; for any image size; 94,762 parameters on CIFAR-10."""
    return ConvNet(num_classes, image_shape, width=width, normalisation=normalisation, groups=groups)
