"""The federations and the methods: what each sets on top of ``benchmarks/accuracy/protocol.toml``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedftg import config as configs

PROTOCOL = Path(__file__).parent.parent / "accuracy" / "protocol.toml"

SETTINGS = (
    "rounds=1", "partition.law=class_dirichlet", "partition.num_clients=5", "partition.min_samples=20", "cohort.size=5",
    "local.epochs=40", "local.lr=0.05", "evaluation.track_all=false",
)  # fmt: skip
"""Those of every federation."""

OF_DATA: dict[str, tuple[str, ...]] = {
    "cifar10": ("data.image_size=16", "model.name=lenet_bn"),
    "digits": ("data.name=digits", "model.name=lenet_gn", "partition.unlabelled_share=0.1"),
}

_WIDTH = {"generator_width": 16}
METHODS: dict[str, dict[str, Any]] = {
    "average": {"name": "none"},
    "average + prior": {"name": "head_prior", "prior_tau": 0.75},
    "FedDF": {"name": "feddf"},
    "DAFL": {"name": "dafl", **_WIDTH},
    "ADI": {"name": "adi"},
    "DENSE": {"name": "dense", **_WIDTH},
    "Co-Boosting": {"name": "coboosting", **_WIDTH},
    "DFRD": {"name": "dfrd", **_WIDTH},
    "FedFTG paper": {"name": "fedftg", "preset": "paper", **_WIDTH},
    "fedftg": {"name": "fedftg", "preset": "fedftg", **_WIDTH},
    "fedftg lacking=0": {"name": "fedftg", "preset": "fedftg", "lacking": 0, **_WIDTH},
    "leaves": {"name": "leaves"},
}
"""Settings of the refiner by the name of the row. ``fedftg`` itself does not fine-tune where all clients are there."""

BESIDE = {"best client": "best_client", "ensemble": "ensemble", "ensemble + prior": "ensemble_prior"}
"""Rows that are no method, the clients alone and together, and their names in a run's records."""

PROXY = {"cifar10": {"proxy.name": "cifar100"}}
"""What FedDF is shown; the images that no client holds where there is nothing."""

SMALL = ("local.epochs=2", "data.max_test=200", "data.max_train=1400")
SMALL_METHOD = {"iterations": 1, "image_steps": 1, "pool_batches": 1, "generator_steps": 1}


@dataclass(frozen=True)
class Cell:
    """A federation; trained once, refined by every method that is missing."""

    data: str
    alpha: float
    seed: int
    dry: bool = False
    """Few epochs, images and iterations, for a test."""

    @property
    def settings(self) -> list[str]:
        """What follows ``--set``, apart from where the data are."""
        given = [*SETTINGS, *OF_DATA[self.data], f"partition.alpha={self.alpha:g}", f"seed={self.seed}"]
        return given + list(SMALL if self.dry else ())

    def method(self, name: str) -> list[str]:
        """Returns the settings of a method, likewise."""
        given = METHODS[name] | (PROXY.get(self.data, {}) if name == "FedDF" else {})
        if self.dry:
            fields = configs.load(PROTOCOL, [f"refiner.name={given['name']}"]).refiner.model_dump()
            given = given | {key: value for key, value in SMALL_METHOD.items() if key in fields}
        return [f"refiner.{key}={value}" for key, value in given.items()]
