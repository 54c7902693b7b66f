"""The grid of images by hand, and in which rounds it is written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fedftg
from fedftg.rundir import pictures


def test_mosaic_by_hand() -> None:
    """Normalised 0, 1, 9 and -9 with mean .5 and std .2 are .5, .7, 1 and 0 of 255; nine images of class 2."""
    values = torch.tensor([0.0, 1.0, 9.0, -9.0, *[0.0] * 9])
    labels = torch.tensor([1, 0, 1, 1, *[2] * 9])
    found = pictures.mosaic(values.view(-1, 1, 1, 1).expand(-1, 1, 2, 3), labels, 4, (0.5,), (0.2,))
    assert found.shape == (8, 24, 1)
    assert (found[::2, ::3] == found[1::2, 2::3]).all()
    assert found[::2, ::3, 0].tolist() == [
        [178, *[255] * 7],
        [128, 255, 0, *[255] * 5],
        [128] * 8,
        [255] * 8,
    ]


def test_channels_and_rows_without_labels() -> None:
    """Ten images fill a row of eight and two cells of the next; of 30 classes there are 20 rows."""
    colours = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1).expand(10, 3, 1, 1)
    found = pictures.mosaic(colours, None, 30, (0.0,) * 3, (1.0,) * 3)
    assert found.shape == (20, 8, 3)
    assert found[0, 7].tolist() == found[1, 1].tolist() == [255, 0, 128]
    assert (found[1, 2:] == 255).all()


def test_rounds_that_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for number in range(1, 101):
        if pictures.due(folder, number):
            pictures.write(folder, number, np.full((2, 4, 3), number, dtype=np.uint8), labelled=number < 9)
    rounds = [1, 2, 3, 5, 8, 12, 18, 27, 41, 62, 93]
    assert sorted(path.name for path in folder.iterdir()) == [f"{number:05}.png" for number in rounds]
    assert list(pictures.found(folder)) == [(number, folder / f"{number:05}.png", number < 9) for number in rounds]
    with Image.open(folder / "00027.png") as image:
        assert (image.size, image.mode, image.getpixel((3, 1))) == ((4, 2), "RGB", (27, 27, 27))


@pytest.mark.parametrize("refiner", ["leaves", "dfrd", "feddf"])
def test_refiners_show_what_they_distil_on(tmp_path: Path, refiner: str) -> None:
    """A batch of 2 in the last round, with a generator's average beside it 3; proxy images have no labels."""
    settings = [
        "data.name=digits", "data.max_train=100", "data.max_test=20", "partition.num_clients=2", "cohort.size=2",
        "rounds=2", "local.epochs=1", f"refiner.name={refiner}", "refiner.iterations=1", "refiner.batch_size=2",
    ]  # fmt: skip
    settings += ["refiner.proxy.name=digits"] if refiner == "feddf" else []
    fedftg.run("default_base", overrides=settings, out=tmp_path / "run")
    assert [labelled for _, _, labelled in pictures.found(tmp_path / "run" / "images")] == [refiner != "feddf"] * 2
    with Image.open(tmp_path / "run" / "images" / "00002.png") as image:
        cells = np.asarray(image).reshape(10, 8, 8, 8).swapaxes(1, 2).reshape(80, 64)
    assert (cells != 255).any(axis=1).sum() == (3 if refiner == "dfrd" else 2)
