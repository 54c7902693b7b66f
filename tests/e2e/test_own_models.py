"""Models that people bring: frozen parts, shared weights, booleans; or one line that says what to do."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import fedftg
from fedftg import export

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

class Embedded(nn.Module):  # a frozen embedding, a frozen BatchNorm that always evaluates, a frozen shared weight
    def __init__(self, num_classes, image_shape):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.randn(257, 2), freeze=True)
        self.norm = nn.BatchNorm1d(128).requires_grad_(False)
        self.one = nn.Linear(128, 128, bias=False).requires_grad_(False)
        self.two = nn.Linear(128, 128, bias=False)
        self.two.weight = self.one.weight
        self.head = nn.Linear(128, num_classes)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, images):
        found = self.embedding((images.flatten(1) * 50).long().clamp(0, 256)).flatten(1)
        return self.head(self.two(self.one(self.norm(found)).relu()))

class Shared(nn.Module):  # one layer and one BatchNorm in two places, and a buffer under two names
    def __init__(self, num_classes, image_shape):
        super().__init__()
        self.layer, self.norm = nn.Linear(64, 64), nn.BatchNorm1d(64)
        self.stack = nn.ModuleList([nn.Sequential(self.layer, self.norm), nn.Sequential(self.layer, self.norm)])
        self.register_buffer("scale", torch.linspace(0.5, 1, 64))
        self.layer.register_buffer("scale", self.scale)
        self.head = nn.Linear(64, num_classes)

    def forward(self, images):
        hidden = images.flatten(1)
        for layer in self.stack:
            hidden = layer(hidden).relu()
        return self.head(hidden * self.scale * self.layer.scale)

class Window(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("window", torch.linspace(0.5, 1, 64), persistent=False)

    def forward(self, images):
        return images * self.window

def nested(num_classes, image_shape):
    blocks = nn.Sequential(Window(), nn.Sequential(nn.Linear(64, 64), nn.ModuleDict({"a": Window()})["a"]))
    return nn.Sequential(nn.Flatten(), blocks, nn.Linear(64, num_classes))

class Buffers(Auxiliary):
    def __init__(self, num_classes, image_shape):
        super().__init__(num_classes, image_shape)
        for kind in (torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64):
            self.register_buffer("as_" + str(kind)[6:], (torch.arange(64) % 3 + 1).to(kind))
        self.register_buffer("nothing", None)
        self.register_buffer("empty", torch.empty(0))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        return self.head(images.flatten(1) * self.as_uint8 * self.as_float16.float() * self.as_int64) * self.scale

def lazy(num_classes, image_shape):
    return nn.Sequential(nn.LazyConv2d(2, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(num_classes))

def normed(num_classes, image_shape):
    from torch.nn.utils import parametrizations as of
    first = of.spectral_norm(nn.Linear(64, 16))
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), of.weight_norm(nn.Linear(16, num_classes)))

class Half(Auxiliary):
    def __init__(self, num_classes, image_shape):
        super().__init__(num_classes, image_shape)
        self.bfloat16()

    def forward(self, images):
        return self.head(images.bfloat16().flatten(1))

class Keeps(Auxiliary):  # features in an attribute, a list and a hook's dictionary; called once, and in evaluation mode
    def __init__(self, num_classes, image_shape):
        super().__init__(num_classes, image_shape)
        self.seen, self.all = {}, []
        self.head.register_forward_hook(lambda layer, given, output: self.seen.__setitem__("head", output))
        with torch.enable_grad():
            self(torch.rand(2, *image_shape))
        self.eval()

    def forward(self, images):
        self.all = [self.head(images.flatten(1))]
        self.last = self.all[0]
        return self.last

class Dictionary(Auxiliary):
    def forward(self, images):
        return {"logits": self.head(images.flatten(1))}

class Named(Auxiliary):  # as GoogLeNet's outputs
    def forward(self, images):
        from collections import namedtuple
        logits = self.head(images.flatten(1))
        return namedtuple("GoogLeNetOutputs", "logits aux")(logits, logits) if self.training else logits

class Masked(Buffers):
    def __init__(self, num_classes, image_shape):
        super().__init__(num_classes, image_shape)
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))

class Sparse(Buffers):
    def __init__(self, num_classes, image_shape):
        super().__init__(num_classes, image_shape)
        self.register_buffer("graph", torch.eye(4).to_sparse())

class Viewed(nn.Module):
    def __init__(self, num_classes, image_shape):
        super().__init__()
        self.conv, self.head = nn.Conv2d(image_shape[0], 2, 3), nn.Linear(72, num_classes)
    def forward(self, images):
        return self.head(self.conv(images).view(len(images), -1))


class Detached(Auxiliary):
    def forward(self, images):
        return self.head(images.flatten(1)).detach()

class Checkpointed(Auxiliary):
    def forward(self, images):
        from torch.utils.checkpoint import checkpoint
        return checkpoint(self.head, images.flatten(1), use_reentrant=False)

class Unused(Buffers):
    def __init__(self, num_classes, image_shape):
        super().__init__(num_classes, image_shape)
        self.projection = nn.Linear(4, 4)

class Extra(Buffers):
    def get_extra_state(self):
        return {"version": 2}

    def set_extra_state(self, state):
        pass

def compiled(num_classes, image_shape):
    return torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)), backend="eager")

def double(num_classes, image_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)).double()
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


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((name, "rounds=2") for name in ("Shared", "nested", "Buffers", "lazy", "normed", "Half", "Keeps")),
        *(("Embedded", f"algorithm.name={rule}") for rule in ("scaffold", "feddyn", "moon", "fedprox")),
        *((name, "executor.name=workers") for name in ("Embedded", "Buffers")),
    ],
)
def test_models_of_many_kinds_run_and_their_export_loads(nets, tiny_settings, name, setting):
    settings = [*tiny_settings, f"model.name=own_nets.{name}", setting, "rounds=2"]
    run = fedftg.run("default", overrides=settings, out=nets / "run")
    import own_nets

    records = (nets / "run" / "rounds.jsonl").read_text()
    assert "rejected" not in records
    assert "rolled_back" not in records
    export.write_model(nets / "run", nets / "model.safetensors")
    net = getattr(own_nets, name)(10, (1, 8, 8))
    images = torch.randn(4, 1, 8, 8)
    net.eval()(images)  # lazy layers
    net.load_state_dict(load_file(nets / "model.safetensors"))
    assert torch.equal(net(images), run.model(images))
    start = fedftg.run("default", overrides=[*settings, "rounds=1", "local.lr=1e-30"], out=nets / "still").model
    before, frozen = start.state_dict(), [key for key, value in run.model.named_parameters() if not value.requires_grad]
    assert all(torch.equal(run.model.get_parameter(key), before[key]) for key in frozen)
    assert frozen == (["embedding.weight", "norm.weight", "norm.bias", "one.weight"] if name == "Embedded" else [])
    assert any(not torch.equal(value, before[key]) for key, value in run.model.named_parameters())


def test_a_state_that_is_no_tensor_is_not_exported(nets, tiny_settings):
    fedftg.run("default", overrides=[*tiny_settings, "model.name=own_nets.Extra", "rounds=1"], out=nets / "run")
    with pytest.raises(fedftg.InputError, match="_extra_state is no tensor, so the file cannot hold it"):
        export.write_model(nets / "run", nets / "model.safetensors")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_of_the_caller_do_not_matter(nets, tiny_settings, mode):
    settings = [*tiny_settings, "rounds=1"]
    with mode():
        found = fedftg.run("default", overrides=settings, out=nets / "run").state.params
        assert not torch.is_grad_enabled()
    expected = fedftg.run("default", overrides=settings, out=nets / "again").state.params
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Dictionary", "gives a dict in evaluation mode; it must give logits (2, 10)"),
        ("Named", "gives a GoogLeNetOutputs in training mode; it must give logits (2, 10)"),
        ("Masked", "has values in mask that are not finite; a mask may be boolean"),
        ("Sparse", "fails on images (1, 8, 8): NotImplementedError"),
        ("Detached", "cannot be trained (RuntimeError: element 0 of tensors does not require grad"),
        ("Viewed", "cannot be trained (RuntimeError: view size is not compatible"),
        ("Checkpointed", "cannot be trained (CheckpointError: torch.utils.checkpoint"),
        ("compiled", "is a OptimizedModule; give the plain nn.Module"),
        ("double", "fails on images (1, 8, 8): RuntimeError: mat1 and mat2 must have the same dtype"),
        ("Auxiliary", "gives a tuple in training mode; it must give logits (2, 10)"),
        ("Complex", "has complex values in wave"),
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


def test_moon_needs_the_layer_it_looks_at(nets, tiny_settings):
    settings = [*tiny_settings, "model.name=own_nets.Unused", "algorithm.name=moon"]
    with pytest.raises(fedftg.InputError, match=r"Unused does not use its last nn\.Linear; register"):
        fedftg.run("default", overrides=settings, out=nets / "run")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_of_schedulers_end_a_run_as_ctrl_c_does(nets, fedftg_command, tiny_settings, name):
    if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        pytest.skip(f"the tests were started with {name} ignored, which a run respects (nohup)")
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


def started(nets, settings, *before, **options):
    """Starts a long run by an interpreter, in a group of its own, and waits until its second round is done."""
    command = [*before, sys.executable, "-m", "fedftg.cli", "run", "default", "--out", str(nets / "run")]
    command += [part for item in [*settings, "rounds=5000"] for part in ("--set", item)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)
    rounds, end = nets / "run" / "rounds.jsonl", time.monotonic() + 60
    while not rounds.exists() or len(rounds.read_text().splitlines()) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    return process


def alive(group):
    """Whether any process of a group is left, given a few seconds to end."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True


def test_a_signal_to_the_whole_group_ends_the_workers_too_and_the_run_resumes(nets, tiny_settings):
    """As scancel sends it."""
    settings = [*tiny_settings, "executor.name=workers", "executor.workers=2"]
    process = started(nets, settings, start_new_session=True)
    os.killpg(process.pid, signal.SIGTERM)
    errors = process.communicate(timeout=30)[1]
    assert (process.returncode, len(errors.strip().splitlines())) == (130, 1), errors
    assert "interrupted" in errors
    assert not alive(process.pid)
    done = len((nets / "run" / "rounds.jsonl").read_text().splitlines())
    fedftg.run("default", overrides=[*settings, f"rounds={done + 1}"], out=nets / "run", resume=True)
    assert len((nets / "run" / "rounds.jsonl").read_text().splitlines()) == done + 1


def test_nohup_is_respected(nets, tiny_settings):
    process = started(nets, tiny_settings, "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.terminate()
    assert "interrupted" in process.communicate(timeout=30)[1]
    assert process.returncode == 130


@pytest.mark.parametrize("command", [("partition", "default"), ("compare", "default_base", "default")])
def test_signals_while_images_are_read(nets, fedftg_command, command):
    """Nothing is written yet: other commands end the same way."""
    (nets / "stopper.py").write_text(
        "import os, signal\n"
        "from fedftg.data import sources\n"
        "def load(*arguments, **options):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "sources.load = load\n"
    )
    done = fedftg_command(*command, "--set", 'plugins=["stopper"]', path=nets)
    assert (done.returncode, done.stderr.strip()) == (130, "fedftg: interrupted; run the same command again")
