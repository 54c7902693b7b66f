"""Image classifiers, and a module as a function of its parameters. See docs/models.md."""

from fedftg.registry import lazy

_MODULES = {"FunctionalModel": "functional", "MODELS": "registry", "ModelConfig": "registry", "build": "registry"}
__getattr__ = lazy(__name__, _MODULES)
