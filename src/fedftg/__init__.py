"""Data-free fine-tuning of the global model in federated learning (FedFTG).

The public names are those in ``__all__``; everything else may change. Each is imported when it is first used, so that
``fedftg --help`` need not wait for torch.
"""

from typing import TYPE_CHECKING

from fedftg.registry import lazy

if TYPE_CHECKING:
    from fedftg.algorithms.registry import register_algorithm as register_algorithm
    from fedftg.algorithms.registry import register_refiner as register_refiner
    from fedftg.config import RunConfig as RunConfig
    from fedftg.data.dataset import ImageDataset as ImageDataset
    from fedftg.distill.config import DistillConfig as DistillConfig
    from fedftg.distill.config import preset as preset
    from fedftg.errors import ClientError as ClientError
    from fedftg.errors import InputError as InputError
    from fedftg.export import load as load
    from fedftg.loop import Run as Run
    from fedftg.loop import run as run
    from fedftg.oneshot import RefineResult as RefineResult
    from fedftg.oneshot import refine as refine
    from fedftg.report.load import load_run as load_run

__version__ = "0.1.0"

_MODULES = {
    "ClientError": "errors",
    "DistillConfig": "distill.config",
    "ImageDataset": "data.dataset",
    "InputError": "errors",
    "RefineResult": "oneshot",
    "Run": "loop",
    "RunConfig": "config",
    "load": "export",
    "load_run": "report.load",
    "preset": "distill.config",
    "refine": "oneshot",
    "register_algorithm": "algorithms.registry",
    "register_refiner": "algorithms.registry",
    "run": "loop",
}
__all__ = ["__version__", *_MODULES]

__getattr__ = lazy(__name__, _MODULES)
