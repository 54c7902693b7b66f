"""Image classifiers, and a module as a function of its parameters. See docs/models.md."""

from fedftg.models.functional import FunctionalModel
from fedftg.models.registry import MODELS, ModelConfig, build

__all__ = ["MODELS", "FunctionalModel", "ModelConfig", "build"]
