"""Where images come from and who holds them. See docs/data.md."""

from typing import Any

_MODULES = {
    "DataConfig": "config",
    "FederatedData": "federated",
    "ImageDataset": "dataset",
    "PartitionConfig": "config",
    "SOURCES": "sources",
    "load": "sources",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: listing data sets must not wait for torch."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module 'fedftg.data' has no attribute {name!r}")
    return getattr(import_module(f"fedftg.data.{_MODULES[name]}"), name)
