import sys

import pytest
import torch
from torch import nn

from fedftg.errors import InputError
from fedftg.models.functional import FunctionalModel
from fedftg.models.registry import MODELS, ModelConfig, build

CIFAR = (3, 32, 32)


def make(name, num_classes=10, image_shape=CIFAR, seed=0, **args):
    return build(ModelConfig(name=name, args=args), num_classes, image_shape, seed)


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lenet", 62_006),
        ("lenet_gn", 62_050),
        ("lenet_bn", 62_050),
        ("convnet", 94_762),
        ("cnn", 797_962),
        ("resnet18", 11_181_642),
        ("resnet18_gn", 11_181_642),
        ("resnet18_cifar", 11_173_962),
    ],
)
def test_parameter_counts_on_cifar10(name, parameters):
    assert size(make(name)) == parameters


@pytest.mark.parametrize("name", sorted(MODELS))
def test_any_image_size(name):
    for shape in [(1, 8, 8), (3, 11, 17), *(() if name.startswith("resnet") else ((1, 28, 28), (3, 64, 64)))]:
        model = make(name, 7, shape)
        logits = model(torch.randn(2, *shape))
        assert logits.shape == (2, 7)
        logits.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_initial_values_depend_on_the_seed_alone(name):
    shape = (1, 8, 8)
    state = torch.get_rng_state()
    first = make(name, image_shape=shape, seed=5).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    again = make(name, image_shape=shape, seed=5).state_dict()
    other = make(name, image_shape=shape, seed=6).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "args", "kind"),
    [
        ("lenet_gn", {"channels": [4, 8], "groups": 2}, nn.GroupNorm),
        ("resnet18_gn", {}, nn.GroupNorm),
        ("convnet", {"normalisation": "batch"}, nn.BatchNorm2d),
    ],
)
def test_normalisation(name, args, kind):
    norms = (nn.GroupNorm, nn.BatchNorm2d)
    layers = [layer for layer in make(name, image_shape=(1, 8, 8), **args).modules() if isinstance(layer, norms)]
    assert {type(layer) for layer in layers} == {kind}
    assert all(layer.num_groups == 2 for layer in layers if isinstance(layer, nn.GroupNorm))


@pytest.mark.parametrize("name", ["lenet_gn", "convnet", "resnet18"])
def test_teachers_can_be_stacked(name):
    model = FunctionalModel(make(name, image_shape=(1, 8, 8)))
    params, buffers = model.init()
    both = {key: torch.stack([value, value + 0.01]) for key, value in params.items()}
    images = torch.randn(2, 3, 1, 8, 8)
    logits = torch.func.vmap(lambda values, batch: model(values, buffers, batch, train=False))(both, images)
    alone = model({key: value[1] for key, value in both.items()}, buffers, images[1], train=False)
    torch.testing.assert_close(logits[1], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("restnet18", {}, "unknown model 'restnet18'; did you mean 'resnet18'"),
        ("lenet", {"width": 3}, "model 'lenet' takes no 'width'; allowed in model.args: channels, hidden"),
        ("cnn", {"normalisation": "layer"}, "must be 'none', 'group' or 'batch', got 'layer'"),
        ("nowhere.Net", {}, "model 'nowhere.Net' cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
        ("torch.nn.Linaer", {}, "has no attribute 'Linaer'); check the spelling"),
        ("torch.nn", {}, "is not a callable object); check the spelling"),
        ("torch.nn.Linear", {"in_features": 4}, "fails on images (3, 32, 32): TypeError"),
        ("torch.nn.Flatten", {}, "has no parameter that requires a gradient"),
    ],
)
def test_errors_are_one_line(name, args, expected):
    with pytest.raises(InputError) as caught:
        make(name, **args)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


MODULE = """
from torch import nn

class Own(nn.Sequential):
    def __init__(self, num_classes, width=4):
        super().__init__(nn.Flatten(), nn.Linear(3072, width), nn.Linear(width, num_classes))

def make(image_shape, num_classes, **rest):
    return Own(num_classes, **rest)
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_model_for_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("own_model_for_test", None)


@pytest.mark.parametrize("path", [".Own", ":make"])
def test_dotted_path_in_the_current_folder(own_module, path):
    model = make(f"own_model_for_test{path}", num_classes=3, width=6)
    assert size(model) == 3072 * 6 + 6 + 6 * 3 + 3
