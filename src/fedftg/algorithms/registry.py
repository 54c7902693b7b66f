"""Names of algorithms and refiners, and the settings that each takes."""

from __future__ import annotations

from typing import TypeVar

from fedftg.algorithms.base import AlgorithmConfig, NoRefinerConfig, RefinerConfig
from fedftg.algorithms.fedavg import FedAvgConfig
from fedftg.algorithms.feddyn import FedDynConfig
from fedftg.algorithms.fedftg import FedFTGConfig
from fedftg.algorithms.fedprox import FedProxConfig
from fedftg.algorithms.moon import MoonConfig
from fedftg.algorithms.scaffold import ScaffoldConfig
from fedftg.errors import InputError

Config = TypeVar("Config", AlgorithmConfig, RefinerConfig)

ALGORITHMS: dict[str, type[AlgorithmConfig]] = {
    "fedavg": FedAvgConfig,
    "fedprox": FedProxConfig,
    "feddyn": FedDynConfig,
    "scaffold": ScaffoldConfig,
    "moon": MoonConfig,
}
REFINERS: dict[str, type[RefinerConfig]] = {"none": NoRefinerConfig, "fedftg": FedFTGConfig}


def register_algorithm(name: str, config: type[AlgorithmConfig]) -> None:
    """Makes ``algorithm.name = name`` known; a recipe's ``plugins`` list names the module that calls this."""
    _register(ALGORITHMS, "algorithm", name, config)


def register_refiner(name: str, config: type[RefinerConfig]) -> None:
    """Makes ``refiner.name = name`` known; a recipe's ``plugins`` list names the module that calls this."""
    _register(REFINERS, "refiner", name, config)


def _register(table: dict[str, type[Config]], kind: str, name: str, config: type[Config]) -> None:
    known = table.get(name)
    if known is not None and known is not config:
        raise InputError(f"{kind} {name!r} is taken by {known.__module__}.{known.__name__}; choose another name")
    table[name] = config
