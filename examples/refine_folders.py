"""Five classifiers of images in class folders become one, with a look at what it learnt from.

    python examples/refine_folders.py FOLDER --size 32

FOLDER has ``train/CLASS/*.png`` and ``test/CLASS/*.png`` (JPEG too). The training images go to five sites that hold few
classes each, and each site trains a classifier: where you have trained ones, put them in the place of ``sites`` and how
many images of each class they saw in ``counts``. `fedftg.refine` sees these two only. The accuracy of each class is
printed, the model is written to ``better.safetensors`` and synthetic images, a row a class, to ``synthetic.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import fedftg
from fedftg.algorithms.leaves import LeavesConfig

SITES, ALPHA = 5, 0.3


def load(folder: Path, names: list[str], size: int) -> tuple[Tensor, Tensor]:
    """Images ``(N, 3, size, size)`` in 0..1 and labels ``(N,)``, the places of their folders in ``names``."""
    files = [(file, label) for label, name in enumerate(names) for file in sorted((folder / name).glob("*.*"))]
    pixels = [np.asarray(Image.open(file).convert("RGB").resize((size, size))) for file, _ in files]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return images, torch.tensor([label for _, label in files])


def new_model(classes: int) -> nn.Module:
    """Any module from images to logits; GroupNorm suits sites that differ."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def trained(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def per_class(models: list[nn.Module], images: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Accuracy of each class, ``(C,)``, of the mean of the models' probabilities."""
    predicted = sum(torch.cat([model(part) for part in images.split(256)]).softmax(dim=1) for model in models)
    right = (predicted.argmax(dim=1) == labels).float()
    return torch.stack([right[labels == label].mean() for label in range(classes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=32, help="pixels a side; time grows with its square")
    parser.add_argument("--epochs", type=int, default=20, help="of the sites' training")
    parser.add_argument("--iterations", type=int, default=50, help="of refine, whose default is 200")
    given = parser.parse_args()
    torch.manual_seed(0)
    names = sorted(path.name for path in (given.folder / "train").iterdir() if path.is_dir())
    images, labels = load(given.folder / "train", names, given.size)
    test_images, test_labels = load(given.folder / "test", names, given.size)
    mean, std = (stat(images, dim=(0, 2, 3), keepdim=True) for stat in (torch.mean, torch.std))
    images, test_images = (images - mean) / std, (test_images - mean) / std

    shares = torch.distributions.Dirichlet(torch.full((SITES,), ALPHA)).sample((len(names),))
    site_of = torch.distributions.Categorical(shares[labels]).sample()
    first = new_model(len(names)).state_dict()  # sites that start from the same weights can be averaged
    sites, counts = [], []
    for site in range(SITES):
        model = new_model(len(names))
        model.load_state_dict(first)
        own = site_of == site
        sites.append(trained(model, images[own], labels[own], given.epochs))
        counts.append(torch.bincount(labels[own], minlength=len(names)))

    method = LeavesConfig(iterations=given.iterations)
    shape = (3, given.size, given.size)
    result = fedftg.refine(None, sites, torch.stack(counts), method=method, image_shape=shape, progress=True)

    rows = {f"site {site}": [model] for site, model in enumerate(sites)}
    rows |= {f"start: {result.start}": [result.before], "refined": [result.model], "all sites together": sites}
    print(f"{'accuracy in %':30}" + "".join(f"{name[:8]:>9}" for name in names) + f"{'mean':>9}")
    for row, models in rows.items():
        found = 100 * per_class(models, test_images, test_labels, len(names))
        print(f"{row:30}" + "".join(f"{value:9.1f}" for value in (*found.tolist(), float(found.mean()))))

    save_file(result.model.state_dict(), "better.safetensors")
    made = [result.sample(8, labels=[label] * 8)[0] for label in range(len(names))]
    grid = torch.cat([torch.cat([*row], dim=2) for row in made], dim=1) * std[0] + mean[0]
    Image.fromarray((255 * grid.clamp(0, 1)).byte().permute(1, 2, 0).numpy()).save("synthetic.png")
    print("wrote better.safetensors and synthetic.png")


if __name__ == "__main__":
    main()
