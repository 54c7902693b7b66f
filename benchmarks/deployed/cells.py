"""The cells: what each sets on top of its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

PROTOCOL = Path(__file__).parent.parent / "accuracy" / "protocol.toml"


@dataclass(frozen=True)
class Cell:
    """One experiment, run with every seed."""

    name: str
    settings: tuple[str, ...] = ()
    """What follows ``--set``."""
    recipe: str = str(PROTOCOL)
    folder: str | None = "cifar10"
    """In ``--data-root``; None: the data are built in."""
    long: bool = False
    """Evaluated up to rounds 50, 100 and 200, not only up to the last."""
    rivals: bool = False
    """Measures the published methods of distillation, which take minutes, after few rounds."""

    def evaluations(self, rounds: int) -> Sequence[int]:
        """Returns the rounds after which the variants are evaluated: ten, every second one up to the last."""
        if self.rivals:
            return [number for number in RIVALS_AFTER if number <= rounds] or [rounds]
        ends = [end for end in (50, 100, 200) if end < rounds] if self.long else []
        step = 2
        return sorted({n for end in [*ends, rounds] for n in range(end - 9 * step, end + 1, step) if n > 0})


_SKEWS = {"b0.1": (), "b0.3": ("partition.alpha=0.3",), "iid": ("partition.law=iid",)}
_MODELS = {"gn": (), "bn": ("model.name=lenet_bn",), "plain": ("model.name=lenet", "local.lr=0.05")}
_ALGORITHMS = ("fedavg", "fedprox", "feddyn", "scaffold", "moon")


def _cifar10(algorithm: str, skew: str, model: str) -> Cell:
    return Cell(f"{algorithm}-{skew}-{model}", (f"algorithm.name={algorithm}", *_SKEWS[skew], *_MODELS[model]))


_GRID = [("fedavg", skew, "gn") for skew in _SKEWS]
_GRID += [("fedavg", "b0.1", "bn"), ("fedavg", "b0.1", "plain")]
_GRID += [(algorithm, "b0.1", "gn") for algorithm in _ALGORITHMS[1:]]
_GRID += [("fedavg", skew, model) for model, skew in product(("bn", "plain"), ("b0.3", "iid"))]
_GRID += [(algorithm, "b0.3", "gn") for algorithm in _ALGORITHMS[1:]]

_OTHER = [
    Cell(f"{name}-{skew}", (*settings, *_SKEWS[skew]), folder=folder)
    for (name, folder, settings), skew in product(
        (
            ("tiny20", "tiny-imagenet-20", ("data.name=tiny_imagenet", "data.image_size=32", "data.max_train=10000")),
            ("cifar100", "cifar100-part", ("data.name=cifar100", "data.max_train=10000")),
        ),
        _SKEWS,
    )
]

_BASES = [
    *(_cifar10(*one) for one in _GRID),
    *_OTHER,
    Cell("long-fedavg-b0.1-gn", ("rounds=200",), long=True),
    Cell("digits", recipe="default_base", folder=None),
]
OWN = {"default": "fedftg, own run", "feddf": "FedDF in every round, sent", "dfrd": "DFRD in every round, sent"}
"""Rows of the rivals' table that are runs of their own, by what the names of their cells begin with."""
RIVALS_AFTER = (32, 40, 50)
_RIVALS = Cell("rivals-fedavg-b0.1-gn", ("data.image_size=16",), rivals=True)


def _default(base: Cell) -> Cell:
    # A narrow generator: that of benchmarks/accuracy, and of the default recipe.
    width = f"refiner.generator_width={8 if base.folder else 16}"
    return replace(base, name=f"default-{base.name}", settings=(*base.settings, "refiner.name=fedftg", width))


CELLS = {cell.name: cell for cell in [
    *_BASES,
    *(_default(base) for base in _BASES),
    _RIVALS,
    _default(_RIVALS),
    replace(_RIVALS, name=f"feddf-{_RIVALS.name}", settings=(*_RIVALS.settings, "refiner.name=feddf",
            "refiner.proxy.name=cifar100", "refiner.iterations=50")),
    replace(_RIVALS, name=f"dfrd-{_RIVALS.name}", settings=(*_RIVALS.settings, "refiner.name=dfrd",
            "refiner.iterations=15", "refiner.generator_width=16")),
]}  # fmt: skip

# 400 of 1,000 rounds, in which the rate falls as far: two cells in 15 minutes of a GPU, in pieces of 9.
_GPU = ("rounds=400", "local.lr_decay=0.995", "executor.group=5", "threads=2", "checkpoint.every=20")
DRY = ("rounds=2", "data.max_train=2000", "data.max_test=200", "partition.num_clients=20", "executor.name=sequential")
"""What makes a cell of the paper's protocol short enough for a CPU."""
PAPER = {cell.name: cell for cell in [
    Cell("paper-b0.3", _GPU, "paper_base", long=True),
    Cell("paper-iid", (*_GPU, "partition.law=iid"), "paper_base", long=True),
]}  # fmt: skip
