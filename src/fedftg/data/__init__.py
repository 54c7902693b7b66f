"""Where images come from and who holds them. See docs/data.md."""

from fedftg.data.config import DataConfig, PartitionConfig
from fedftg.data.dataset import ImageDataset
from fedftg.data.federated import FederatedData
from fedftg.data.partition import partition, skew
from fedftg.data.sources import SOURCES, load

__all__ = ["SOURCES", "DataConfig", "FederatedData", "ImageDataset", "PartitionConfig", "load", "partition", "skew"]
