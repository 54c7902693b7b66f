"""Where images come from and who holds them. See docs/data.md."""

from fedftg.registry import lazy

_MODULES = {
    "DataConfig": "config",
    "FederatedData": "federated",
    "ImageDataset": "dataset",
    "PartitionConfig": "config",
    "SOURCES": "sources",
    "load": "sources",
    "skew": "partition",
}
__getattr__ = lazy(__name__, _MODULES)
