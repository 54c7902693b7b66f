"""FedDF: what it learns, by hand; in which form proxy images come, and where from."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedftg import build
from fedftg.algorithms.base import ClientResult, RefinerContext, ServerState
from fedftg.algorithms.feddf import FedDFConfig, like_clients
from fedftg.config import apply, from_mapping
from fedftg.errors import InputError
from fedftg.models.functional import FunctionalModel
from fedftg.progress import Progress

DIGITS = ["data.name=digits", "partition.num_clients=5", "partition.law=iid", "device=cpu", "refiner.name=feddf"]


class Says(nn.Module):
    """Predicts the same logits for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), 2)


def client(number: int, logits: list[float], counts: list[int]) -> ClientResult:
    params = {"logits": torch.tensor(logits)}
    return ClientResult(number, sum(counts), torch.tensor(counts), params, {}, {}, {}, 0.0)


# Mean logits (ln 3, 0), so .75 and .25; the mean of the probabilities would be .7, that of logits by samples .877.
CLIENTS = [client(0, [2 * math.log(3), 0.0], [6, 3]), client(1, [0.0, 0.0], [0, 1])]


def context(shape: tuple[int, int, int] = (1, 8, 8)) -> RefinerContext:
    images, (mean, std) = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), ((value,) * shape[0] for value in (0.5, 0.25))
    return RefinerContext(FunctionalModel(Says()), 2, shape, torch.device("cpu"), mean, std, unlabelled=images)


def refined(**settings: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """The logits of a student that starts at 0, and the metrics."""
    refiner = FedDFConfig(batch_size=2, **settings).build(context())
    state = ServerState(0, {"logits": torch.zeros(2)}, {}, {}, {})
    after, metrics = refiner.refine(state, CLIENTS, torch.Generator().manual_seed(0))
    return after.params["logits"], metrics


def test_one_step_by_hand() -> None:
    """The loss is .75 ln(.75 / .5) + .25 ln(.25 / .5); its gradient at the student's logits .5 - p = -.25 and .25."""
    logits, metrics = refined(iterations=1, student_optimizer="sgd", student_lr=1.0)
    torch.testing.assert_close(logits, torch.tensor([0.25, -0.25]))
    assert metrics == {"student": pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))}


def test_adam_with_cosine() -> None:
    """Adam's first steps are the rate times the sign of the gradient; the second of two has half the rate."""
    logits, _ = refined(iterations=2)
    torch.testing.assert_close(logits, torch.tensor([1.5e-3, -1.5e-3]), rtol=1e-3, atol=0)


def test_proxy_images_in_the_form_of_the_clients() -> None:
    """Normalised by mean .5 and deviation .25; bytes of 51 are .2."""
    colours = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    grey = like_clients(colours, context((1, 8, 8)))
    torch.testing.assert_close(grey, torch.full((2, 1, 8, 8), (0.299 + 0.114 * 0.2 - 0.5) / 0.25))
    coloured = like_clients(colours[:, 2:], context((3, 8, 8)))
    torch.testing.assert_close(coloured, torch.full((2, 3, 8, 8), (0.2 - 0.5) / 0.25))
    stripes = torch.tensor([0, 255] * 4, dtype=torch.uint8).expand(1, 1, 8, 8)
    low = like_clients(stripes, context((1, 8, 4)))
    assert low.shape == (1, 1, 8, 4)
    torch.testing.assert_close(low[..., 1:3], torch.zeros(1, 1, 8, 2), atol=0.3, rtol=0)  # antialiased: grey of 1/2


@pytest.mark.parametrize(("kind", "mirrored"), [("default", {0}), ("flip", set(range(1, 16)))])
def test_augmentation_is_off_unless_it_is_asked_for(kind: str, mirrored: set[int]) -> None:
    """Of 16 images that are white on the right."""
    images = torch.tensor([0] * 4 + [255] * 4, dtype=torch.uint8).expand(16, 1, 8, 8)
    config = FedDFConfig(batch_size=16, proxy={"augment": kind})  # type: ignore[arg-type]
    source = config.images(replace(context(), unlabelled=images), torch.Generator().manual_seed(0))
    batch, _ = source.make(torch.arange(16))
    assert int((batch[:, 0, 0, 0] > 0).sum()) in mirrored


def test_a_student_that_never_saw_a_label_is_near_the_ensemble() -> None:
    """Fresh, on the 40 % of the digits' training images that no client holds."""
    small = ["refiner.iterations=200", "refiner.batch_size=64", "refiner.student_lr=0.003", "refiner.start=fresh"]
    own = ["partition.unlabelled_share=0.4", "model.name=lenet_bn", "local.epochs=10", "local.batch_size=16"]
    config = from_mapping(apply({}, [*DIGITS, *small, *own, "rounds=1", "evaluation.ensemble=true", "threads=1"]))
    experiment = build.build(config)
    accuracy = experiment.run_round(Progress())["accuracy"]
    assert accuracy["ensemble"] > 0.85
    assert accuracy["refined"] > accuracy["ensemble"] - 0.05


def test_held_out_images_are_those_that_no_client_holds() -> None:
    given = [
        "partition.unlabelled_share=0.25",
        "partition.test_share=0.2",
        "refiner.batch_size=8",
        "data.max_train=200",
    ]
    experiment = build.build(from_mapping(apply({}, [*DIGITS, *given])))
    data = experiment.data
    held = torch.cat([*data.parts, *data._held_back])
    assert len(held) == len(held.unique()) == 150
    free = np.setdiff1d(np.arange(200), held.numpy())
    shown = experiment.refiner.context.unlabelled  # type: ignore[attr-defined]
    assert torch.equal(shown, data.dataset.train_images[free])
    assert torch.bincount(data.dataset.train_labels[free]).tolist() == pytest.approx([5] * 10, abs=1)
    assert experiment.refiner.notes == ("proxy images: 50 of heldout",)  # type: ignore[attr-defined]


def test_proxy_images_of_another_set(tmp_path: Any) -> None:
    """Its labels may have gaps, and it needs no test split."""
    images = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "other.npz", train_images=images, train_labels=np.arange(30) % 2 * 7)
    given = ["refiner.proxy.name=arrays", f"refiner.proxy.root={tmp_path / 'other.npz'}", "refiner.proxy.max_train=20"]
    refiner: Any = build.build(from_mapping(apply({}, [*DIGITS, *given, "refiner.batch_size=8"]))).refiner
    assert refiner.context.unlabelled.shape == (20, 3, 8, 8)
    assert refiner.notes == ("proxy images: 20 of arrays, (3, 8, 8) converted to (1, 8, 8)",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data.max_train=203"], r"has 3 proxy images \(heldout\), fewer than .* or raise partition.unlabelled_share"),
        (["refiner.proxy.name=folder"], "'folder' needs refiner.proxy.root: .* or with refiner.proxy.test_share; got"),
        (["refiner.proxy.name=cifar9"], "unknown data set 'cifar9'; did you mean 'cifar10'"),
        (["refiner.proxy.nam=cifar10"], "did you mean 'refiner.proxy.name'"),
        (["partition.law=file", "partition.file=x.json", "partition.unlabelled_share=0.1"], "leave the rows out of"),
    ],
)
def test_one_line_for_what_is_wrong(given: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        build.build(from_mapping(apply({}, [*DIGITS, *given])))
    assert "\n" not in str(error.value)


def test_the_normalisation_must_be_known() -> None:
    with pytest.raises(InputError, match="pass the strategy mean and std"):
        FedDFConfig().build(replace(context(), mean=(), std=()))
