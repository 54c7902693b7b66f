"""A plain convolutional classifier whose depth follows the image size.

Blocks of 3x3 convolution, normalisation, ReLU and 2x2 max-pool halve the image until 3 to 6 pixels are left; a global
average and one linear layer follow, so that the parameters do not grow with the image. With GroupNorm (Wu, He, "Group
Normalization", ECCV 2018) by default: skewed clients do not agree on BatchNorm's statistics (Hsieh et al., ICML 2020).
"""

from __future__ import annotations

from torch import Tensor, nn

from fedftg.models.cnn import Normalisation, normalisation_layer

HALVED_FROM = 7
"""A map whose shorter side is this or more is halved once more: 28 -> 14 -> 7 -> 3, and 32 -> 16 -> 8 -> 4."""

MOST_CHANNELS = 256


class ConvNet(nn.Module):
    """Blocks of convolution, normalisation, ReLU and max-pool, a global average, a linear classifier.

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
        while side >= HALVED_FROM:
            outputs = min(width * 2**depth, MOST_CHANNELS)
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
        """Logits ``(B, C)`` of images ``(B, D, H, W)``."""
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits


def convnet(
    num_classes: int,
    image_shape: tuple[int, int, int],
    width: int = 32,
    normalisation: Normalisation = "group",
    groups: int = 8,
) -> nn.Module:
    """Convolution blocks until 3 to 6 pixels are left, GroupNorm; for any image size; 94,762 parameters on CIFAR-10."""
    return ConvNet(num_classes, image_shape, width=width, normalisation=normalisation, groups=groups)
