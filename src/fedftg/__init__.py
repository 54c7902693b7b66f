"""Data-free fine-tuning of the global model in federated learning (FedFTG).

The public names are those in ``__all__``; everything else may change.
"""

from fedftg.algorithms.registry import register_algorithm, register_refiner
from fedftg.commands import run
from fedftg.config import RunConfig
from fedftg.data.dataset import ImageDataset
from fedftg.distill.api import RefineResult, refine
from fedftg.distill.config import DistillConfig, preset
from fedftg.errors import ClientError, InputError
from fedftg.experiment import Run

__version__ = "0.1.0"

__all__ = [
    "ClientError",
    "DistillConfig",
    "ImageDataset",
    "InputError",
    "RefineResult",
    "Run",
    "RunConfig",
    "__version__",
    "preset",
    "refine",
    "register_algorithm",
    "register_refiner",
    "run",
]
