"""Models that people bring: frozen parts, shared weights, booleans; or one line that says what to do."""

import sys

import pytest
import torch
from safetensors.torch import load_file

import fedftg

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, image_shape):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.norm = nn.BatchNorm1d(64).requires_grad_(False)
        self.head = nn.Linear(64, num_classes)
        self.register_buffer("mask", torch.arange(64) % 5 > 0)
        self.register_buffer("window", torch.linspace(0.5, 1, 64), persistent=False)

    def forward(self, images):
        hidden = self.second(self.first(images.flatten(1) * self.mask * self.window).relu())
        return self.head(self.norm(self.frozen(hidden)))

class Auxiliary(nn.Module):
    def __init__(self, num_classes, image_shape):
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, images):
        logits = self.head(images.flatten(1))
        return (logits, logits) if self.training else logits

class Complex(Auxiliary):
    def __init__(self, num_classes, image_shape):
        super().__init__(num_classes, image_shape)
        self.register_buffer("wave", torch.ones(2, dtype=torch.complex64))

def parallel(num_classes, image_shape):
    return nn.DataParallel(nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)))

def scripted(num_classes, image_shape):
    return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)))

def frozen(num_classes, image_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)).requires_grad_(False)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_nets", None)


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "feddyn", "moon"])
@pytest.mark.parametrize("executor", ["sequential", "workers"])
def test_frozen_shared_and_boolean_values(nets, fedftg_command, tiny_settings, algorithm, executor):
    if executor == "workers" and algorithm != "scaffold":
        pytest.skip("one rule in processes is enough")
    settings = [*tiny_settings, "model.name=own_nets.Net", f"algorithm.name={algorithm}", f"executor.name={executor}"]
    run = fedftg.run("default", overrides=[*settings, "rounds=2"], out=nets / "run")
    import own_nets

    start = fedftg.run("default", overrides=[*settings, "rounds=1", "local.lr=1e-30"], out=nets / "still").model
    for name in ("frozen.weight", "frozen.bias", "norm.weight", "norm.bias"):
        assert torch.equal(run.model.get_parameter(name), start.get_parameter(name)), name
    assert not torch.equal(run.model.first.weight, start.first.weight)
    assert [name for name, value in run.model.named_parameters() if not value.requires_grad] == [
        "frozen.weight", "frozen.bias", "norm.weight", "norm.bias",
    ]  # fmt: skip
    done = fedftg_command("export", str(nets / "run"), "--to", str(nets / "model.safetensors"), path=nets)
    assert done.returncode == 0, done.stderr
    net = own_nets.Net(10, (1, 8, 8)).eval()
    net.load_state_dict(load_file(nets / "model.safetensors"))
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(net(images), run.model(images))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Auxiliary", "into a tuple in training mode; it must give logits of shape (2, 10)"),
        ("Complex", "has complex or sparse values in wave"),
        ("parallel", "is a DataParallel; give the plain nn.Module"),
        ("scripted", "ScriptModule; give the plain nn.Module"),
        ("frozen", "has no parameter that requires a gradient"),
    ],
)
def test_what_cannot_be_trained_is_one_line(nets, tiny_settings, name, expected):
    with pytest.raises(fedftg.InputError) as caught:
        fedftg.run("default", overrides=[*tiny_settings, f"model.name=own_nets.{name}"], out=nets / "run")
    assert expected in str(caught.value)
    assert not (nets / "run").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_of_schedulers_end_a_run_as_ctrl_c_does(nets, fedftg_command, tiny_settings, name):
    (nets / "stopper.py").write_text(
        "import os, signal\n"
        "from fedftg import experiment\n"
        "evaluate = experiment.evaluate\n"
        "def watched(*arguments):\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    return evaluate(*arguments)\n"
        "experiment.evaluate = watched\n"
    )
    options = [part for item in [*tiny_settings, 'plugins=["stopper"]'] for part in ("--set", item)]
    done = fedftg_command("run", "default", *options, "--out", str(nets / "run"), path=nets)
    assert done.returncode == 130, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "interrupted" in done.stderr
