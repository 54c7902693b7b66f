"""Names of algorithms and refiners, and the settings that each takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedftg.registry import Registry

if TYPE_CHECKING:
    from fedftg.algorithms.base import AlgorithmConfig, RefinerConfig

ALGORITHMS: Registry[type[AlgorithmConfig]] = Registry(
    "algorithm",
    {
        "fedavg": "fedftg.algorithms.fedavg:FedAvgConfig",
        "fedprox": "fedftg.algorithms.fedprox:FedProxConfig",
        "feddyn": "fedftg.algorithms.feddyn:FedDynConfig",
        "scaffold": "fedftg.algorithms.scaffold:ScaffoldConfig",
        "moon": "fedftg.algorithms.moon:MoonConfig",
        "fedavgm": "fedftg.algorithms.fedavgm:FedAvgMConfig",
        "fedacg": "fedftg.algorithms.fedacg:FedACGConfig",
        "fedvarp": "fedftg.algorithms.fedvarp:FedVARPConfig",
        "fedgen": "fedftg.algorithms.fedgen:FedGenConfig",
    },
)
REFINERS: Registry[type[RefinerConfig]] = Registry(
    "refiner",
    {
        "none": "fedftg.algorithms.base:NoRefinerConfig",
        "fedftg": "fedftg.algorithms.fedftg:FedFTGConfig",
        "feddf": "fedftg.algorithms.feddf:FedDFConfig",
        "leaves": "fedftg.algorithms.leaves:LeavesConfig",
        "dafl": "fedftg.algorithms.dafl:DaflConfig",
        "adi": "fedftg.algorithms.adi:AdiConfig",
        "dfrd": "fedftg.algorithms.dfrd:DfrdConfig",
        "dense": "fedftg.algorithms.dense:DenseConfig",
        "coboosting": "fedftg.algorithms.coboosting:CoBoostingConfig",
        "head_prior": "fedftg.algorithms.averages:HeadPriorConfig",
        "all": "fedftg.algorithms.averages:AllConfig",
        "ema": "fedftg.algorithms.averages:EmaConfig",
        "wima": "fedftg.algorithms.averages:WimaConfig",
    },
)


def register_algorithm(name: str, config: type[AlgorithmConfig]) -> None:
    """Registers ``algorithm.name = name``; a recipe's ``plugins`` list names the module that calls this.

    Raises:
        InputError: another class has the name.
    """
    ALGORITHMS[name] = config


def register_refiner(name: str, config: type[RefinerConfig]) -> None:
    """Registers ``refiner.name = name``; a recipe's ``plugins`` list names the module that calls this.

    Raises:
        InputError: another class has the name.
    """
    REFINERS[name] = config
