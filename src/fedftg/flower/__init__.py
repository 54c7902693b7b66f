"""FedFTG inside Flower: records, apps and an in-process grid. Needs the extra ``flower``; nothing else imports it.

The public names are those in ``__all__``.
"""

try:
    import flwr  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "flwr":
        raise
    raise ModuleNotFoundError("fedftg.flower needs Flower; pip install 'fedftg[flower]'", name="flwr") from None

from fedftg.flower.client import class_counts, client_app, local_train
from fedftg.flower.rules import FedDyn, Moon, RuleStrategy, Scaffold
from fedftg.flower.server import server_app
from fedftg.flower.strategy import FedFTG, Refined, RefineReport

__all__ = [
    "FedDyn",
    "FedFTG",
    "Moon",
    "RefineReport",
    "Refined",
    "RuleStrategy",
    "Scaffold",
    "class_counts",
    "client_app",
    "local_train",
    "server_app",
]
