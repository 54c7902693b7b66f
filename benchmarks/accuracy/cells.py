"""The cells of each table: a name, and what it sets on top of ``protocol.toml``.

A cell that appears in several tables is run once. Results are kept by name, so a changed cell needs a new name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fedftg import config as configs
from fedftg.algorithms.fedftg import FedFTGConfig

PROTOCOL = Path(__file__).parent / "protocol.toml"
SEEDS = (0, 1, 2)
ALGORITHMS = ("fedavg", "fedprox", "feddyn", "scaffold", "moon")
PRESETS = ("paper", "official", "fedftg")

RETIRED = ("generator_ema", "generator_warmup", "fresh_batches", "compile_teachers", "vectorized", "restore_buffers")
"""Settings that the package no longer has: cells that use one keep their results and are not run again."""

# A generator of width 64 would take twenty times the time of local training of these small networks.
_WIDTH = "refiner.generator_width=8"
# The preset `fedftg` before an average was deployed beside it: tables A to S are about the fine-tuned model itself.
_ALONE = ("refiner.average=aggregate", "refiner.prior_tau=0", "refiner.lacking=0", "refiner.last_round=0")

_SKEWS = {"b0.1": (), "b0.3": ("partition.alpha=0.3",), "iid": ("partition.law=iid",)}
_MODELS = {"gn": (), "bn": ("model.name=lenet_bn",), "plain": ("model.name=lenet", "local.lr=0.05")}


@dataclass(frozen=True)
class Cell:
    """One experiment, run with every seed."""

    name: str
    settings: tuple[str, ...]
    """What follows ``--set``."""
    base: str | None = None
    """The cell without a refiner that it is compared with, seed by seed, over the rounds that both have."""
    unchanged: str | None = None
    """The cell whose refiner this one changes in one thing, compared in the same way."""

    @property
    def retired(self) -> bool:
        """Whether it needs a setting that the package no longer has."""
        return any(word in setting for word in RETIRED for setting in self.settings)


@cache
def settings(cell: Cell) -> dict[str, Any]:
    """Returns every setting of the cell's runs as ``{"local.lr": 0.1, ...}``, defaults included."""
    config = configs.load(PROTOCOL, cell.settings)
    return configs.flat(config.model_dump(mode="json", exclude={"name", "plugins", "checkpoint"}))


@cache
def _off() -> dict[str, Any]:
    """Settings that change nothing: the defaults, and the preset ``paper``."""
    paper = {"refiner": FedFTGConfig(preset="paper").model_dump(mode="json")}
    return configs.flat(configs.RunConfig().model_dump(mode="json")) | configs.flat(paper)


def fits(made_with: dict[str, Any], cell: Cell) -> bool:
    """Returns whether a result made with these settings belongs to the cell.

    Settings that both have must be equal. One that was added since must be off; one that was dropped since does not
    count, because a cell that used it is retired.
    """
    return cell.retired or all(made_with.get(key, _off().get(key)) == value for key, value in settings(cell).items())


def fingerprint(cell: Cell) -> str:
    """Returns a digest of `settings`, for the name of a folder."""
    return hashlib.sha256(json.dumps(settings(cell), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Rows:
    """A table: its title and its cells in order."""

    title: str
    cells: tuple[Cell, ...]
    until: int | None = None
    """The round after which evaluations are left out, in every row; None for none."""


def cell(
    algorithm: str = "fedavg",
    refiner: str = "base",
    *,
    skew: str = "b0.1",
    model: str = "gn",
    change: str = "",
    settings: tuple[str, ...] = (),
    unchanged: str = "",
) -> Cell:
    """A cell by what it is made of; ``change`` names what ``settings`` alter of the refiner.

    ``unchanged`` is the change of the cell that it is compared with: none, the preset as it is, unless given.
    """
    base = "-".join((algorithm, "base", skew, model))
    shared = (f"algorithm.name={algorithm}", *_SKEWS[skew], *_MODELS[model])
    if refiner == "base":
        return Cell(base, shared)
    preset = "-".join((algorithm, refiner, skew, model))
    alone = _ALONE if refiner == "fedftg" else ()
    refined = (*shared, "refiner.name=fedftg", f"refiner.preset={refiner}", _WIDTH, *alone)
    if not change:
        return Cell(preset, refined, base)
    return Cell(f"{preset}-{change}", (*refined, *settings), base, f"{preset}-{unchanged}" if unchanged else preset)


_SHORT = 24
"""Rounds of table S, those of the climb: with the mask they are no worse, and by round 50 it is 2 points behind."""


def _changed(
    refiner: str, changes: dict[str, tuple[str, ...]], model: str = "gn", rounds: int | None = None
) -> tuple[Cell, ...]:
    """The base, the preset as it is, and with each change."""
    shortened = () if rounds is None else (f"rounds={rounds}",)
    variants = tuple(
        cell(
            refiner=refiner,
            model=model,
            change=name,
            settings=(*shortened, *(f"refiner.{key}" for key in settings)),
        )
        for name, settings in changes.items()
    )
    return cell(model=model), cell(refiner=refiner, model=model), *variants


_PARTS: dict[str, tuple[str, ...]] = {
    "no_cls": ("lambda_cls=0",),
    "no_dis": ("lambda_dis=0",),
    "no_md": ("lambda_md=0",),
    "samples_ensemble": ("ensemble=samples",),
    "no_absent": ("absent_weight=0",),
}

_PAPER_LABELS = cell(
    refiner="fedftg",
    change="no_absent-paper_labels",
    settings=("refiner.absent_weight=0", "refiner.label_sampling=iid"),
    unchanged="no_absent",
)
"""Labels from p_t(y) against all classes alike; without the absent, as with them p_t(y) is nearly even itself."""

_AMOUNTS: dict[str, tuple[str, ...]] = {
    "md3": ("lambda_md=3",),
    "cls0.3": ("lambda_cls=0.3",),
    "dis10": ("lambda_dis=10",),
    "absent0.3": ("absent_weight=0.3",),
    "I5": ("iterations=5",),
    "I20": ("iterations=20",),
    "Ig1": ("generator_steps=1",),
    "Ig5": ("generator_steps=5",),
    "Id1": ("student_steps=1",),
    "Id10": ("student_steps=10",),
    "student_lr0.01": ("student_lr=0.01",),
    "student_lr0.1": ("student_lr=0.1",),
    "generator_lr0.01": ("generator_lr=0.01",),
    "generator_lr0.001": ("generator_lr=0.001",),
    "warmup20": ("generator_warmup=20",),
    "fresh": ("fresh_batches=true",),
    "temperature3": ("temperature=3",),
}
_STATISTICS: dict[str, tuple[str, ...]] = {
    "eval": ("student_mode=eval",),
    "restored": ("restore_buffers=true",),
}
_RATES: dict[str, tuple[str, ...]] = {
    "student_lr0.03": ("student_lr=0.03",),
    "student_lr0.01": ("student_lr=0.01",),
}
"""``paper`` with the rate that ``fedftg`` was given by its pilots, and a smaller one."""

_CANDIDATES: dict[str, tuple[str, ...]] = {
    "reset_optimiser": ("generator_optimizer_state=reset",),
    "ema": ("generator_ema=0.5",),
    "warmup20-to_end": ("generator_warmup=20",),
    "I5-to_end": ("iterations=5",),
}
"""The last two are in table S as well, for its few rounds: the highest row of it, and the cheapest."""
_CANDIDATES_BN: dict[str, tuple[str, ...]] = {
    "train_mode": ("student_mode=train",),
    "train_mode-restored": ("student_mode=train", "restore_buffers=true"),
    "no_absent": ("absent_weight=0",),
}


def _masked(skew: str) -> tuple[Cell, ...]:
    """With hard samples only where the ensemble is right, which shows its price in long runs only."""
    changed = cell(refiner="fedftg", skew=skew, change="masked", settings=("refiner.discrepancy_mask=transferable",))
    return cell(skew=skew), cell(refiner="fedftg", skew=skew), changed


def _small_steps() -> tuple[Cell, ...]:
    """For SCAFFOLD, whose gain is the smallest: a third of the student's rate. Chosen after table A was seen."""
    changed = cell("scaffold", "fedftg", change="student_lr0.01", settings=("refiner.student_lr=0.01",))
    return cell("scaffold"), cell("scaffold", "fedftg"), changed


def _interpolation(model: str) -> Cell:
    """Halfway between the aggregate and the model before: what smoothing over rounds gives without distillation."""
    base = cell(model=model)
    settings = (*base.settings, 'plugins=["controls"]', "refiner.name=interpolation")
    return Cell(f"fedavg-interpolation-b0.1-{model}", settings, base.name)


def _once(*cells: Cell) -> tuple[Cell, ...]:
    """Returns each cell once, in order."""
    return tuple(dict.fromkeys(cells))


_EXECUTION = (
    "model.name=cnn", "rounds=20", "local.epochs=1", "evaluation.every=4", "data.max_test=2000",
    "refiner.preset=paper", "refiner.iterations=3", _WIDTH,
)  # fmt: skip
"""Twenty rounds of FedDyn's CNN: what only changes how it is computed must change accuracy by less than a seed does."""


def _executed(name: str, *settings: str) -> Cell:
    return Cell(f"execution-{name}", ("refiner.name=fedftg", *_EXECUTION, *settings))


TABLES: dict[str, Rows] = {
    "A": Rows(
        "The claim",
        (
            *(cell(name, kind) for name in ALGORITHMS for kind in ("base", *PRESETS)),
            *(cell(refiner=kind, skew=skew) for skew in ("b0.3", "iid") for kind in ("base", *PRESETS)),
            *(cell(refiner=kind, model="bn") for kind in ("base", *PRESETS)),
            *(cell(refiner=kind, model="plain") for kind in ("base", "fedftg")),
        ),
    ),
    "B": Rows("What each part of the preset fedftg does", (*_changed("fedftg", _PARTS), _PAPER_LABELS)),
    "S": Rows("Amounts, and candidates, in the first 24 rounds", _changed("fedftg", _AMOUNTS, rounds=_SHORT), _SHORT),
    "C": Rows(
        "Accuracy right after fine-tuning, and what may mend it",
        _once(
            *_changed("paper", _RATES),
            *_changed("fedftg", _CANDIDATES),
            _interpolation("gn"),
            *(cell for skew in _SKEWS for cell in _masked(skew)),
            *_small_steps(),
            *_changed("paper", _STATISTICS, model="bn"),
            *_changed("fedftg", _CANDIDATES_BN, model="bn"),
            _interpolation("bn"),
        ),
    ),
    "D": Rows(
        "Ways of computing the same",
        (
            _executed("sequential"),
            _executed("compiled_teachers", "refiner.compile_teachers=true"),
        ),
    ),
}
