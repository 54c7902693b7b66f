import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn

from fedftg.algorithms.adi import AdiConfig
from fedftg.algorithms.coboosting import CoBoostingConfig
from fedftg.algorithms.dafl import DaflConfig
from fedftg.algorithms.dense import DenseConfig
from fedftg.algorithms.feddf import FedDFConfig
from fedftg.algorithms.leaves import LeavesConfig
from fedftg.errors import InputError
from fedftg.oneshot import refine

SHAPE = (1, 8, 8)


def snapshot(module):
    return (
        {name: tensor.clone() for name, tensor in module.state_dict().items()},
        [layer.training for layer in module.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in module.parameters()],
    )


def unchanged(module, before):
    state, modes, flags = snapshot(module)
    equal = all(torch.equal(tensor, before[0][name]) for name, tensor in state.items())
    return equal and modes == before[1] and str(flags) == str(before[2])


@pytest.fixture
def models(classifier):
    """A student and teachers of three architectures, in mixed modes."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    return [classifier(0), classifier(1).train(), classifier(2, norm=False, width=3), flat]


def test_nothing_that_is_given_changes(models, counts, config, generator):
    models[0].train()
    models[0](torch.ones(2, *SHAPE)).sum().backward()
    models[1].requires_grad_(False)
    given = generator()
    before, global_state = [snapshot(model) for model in [*models, given]], torch.get_rng_state()
    result = refine(models[0], models[1:], counts, method=config("paper"), image_shape=SHAPE, generator=given)
    assert all(unchanged(model, state) for model, state in zip([*models, given], before, strict=True))
    assert torch.equal(global_state, torch.get_rng_state())
    assert result.rolled_back is None
    assert not unchanged(result.model, before[0])
    assert result.model.training
    assert [p.requires_grad for p in result.model.parameters()] == [True] * 6
    assert len(result.metrics["student"]) == 2


def test_deterministic(models, counts, config):
    states, images = [], []
    for seed in (3, 3, 4):
        torch.manual_seed(len(states))
        result = refine(models[0], models[1:], counts, method=config(), image_shape=SHAPE, seed=seed)
        states.append(torch.cat([t.flatten() for t in result.model.state_dict().values()]))
        images.append(result.sample(4))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert torch.equal(images[0][0], images[1][0])


def test_presets_by_name(models, counts):
    """At the presets' own sizes."""
    done: list[tuple[int, int]] = []
    given = {"method": "fedftg", "image_shape": SHAPE, "progress": lambda *pair: done.append(pair)}
    result = refine(models[0], models[1:], counts.tolist(), **given)
    assert done[-1][0] == done[-1][1] == len(done) == len(result.metrics["student"])
    assert result.generator.noise_dim == 100


def test_sample(models, config):
    counts = torch.tensor([[1, 0, 3]] * 3)
    result = refine(models[0], models[1:], counts, method=config(), image_shape=SHAPE)
    images, labels = result.sample(200)
    assert images.shape == (200, *SHAPE)
    assert not images.requires_grad
    assert sorted(set(labels.tolist())) == [0, 2]
    assert not torch.equal(images, result.sample(200)[0])
    assert result.sample(3, 1)[1].tolist() == [1, 1, 1]
    assert result.sample(3, [2, 1, 0])[1].tolist() == [2, 1, 0]
    for n, wrong in ((0, None), (2, [1]), (1, [3]), (1, [0.5]), (1, -1)):
        with pytest.raises(InputError, match="must be"):
            result.sample(n, wrong)


def test_a_generator_is_continued(models, counts, config, generator):
    given = generator(noise_dim=9)
    result = refine(models[0], models[1:], counts, method=config(), image_shape=(3, 32, 32), generator=given)
    assert result.generator is not given
    assert result.generator.noise_dim == 9
    with pytest.raises(InputError, match="generator's 4 classes, got 3"):
        refine(models[0], models[1:], counts, method=config(), generator=generator(classes=4))


@pytest.mark.parametrize("method", ["fedftg", "leaves", "dense", "adi"])
def test_models_and_a_given_generator_have_the_layout_of_the_method(models, counts, config, generator, method):
    few = {"iterations": 1, "batch_size": 4, "memory_format": "channels_last"}
    settings = {
        "fedftg": config(memory_format="channels_last"),
        "leaves": LeavesConfig(**few, image_steps=1),
        "dense": DenseConfig(**few, generator_steps=1, generator_width=2),
        "adi": AdiConfig(**few, image_steps=1),
    }[method]
    given = {"generator": generator()} if method == "fedftg" else {"image_shape": SHAPE}
    seen = []
    for model in models:
        model.register_forward_pre_hook(lambda _, images: seen.append(images[0].stride()))
    result = refine(models[0], models[1:], counts, method=settings, **given)
    assert set(seen) == {(64, 1, 8, 1)}
    assert method != "fedftg" or result.generator.memory_format == "channels_last"


def test_non_finite_result_is_rolled_back(models, counts, config, generator):
    given, before = generator(), snapshot(models[0])
    settings = config("paper", student_lr=1e30, iterations=4)
    result = refine(models[0], models[1:], counts, method=settings, generator=given)
    assert result.rolled_back is not None
    assert "not finite; lower student_lr" in result.rolled_back
    assert unchanged(result.model, before)
    assert all(torch.equal(tensor, given.state_dict()[name]) for name, tensor in result.generator.state_dict().items())


class KeepsFeatures(nn.Module):
    """Keeps its last features, with their graph, as an attribute."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 5), nn.Linear(5, 3)

    def forward(self, images):
        self.features = self.body(images.flatten(1)).relu()
        return self.head(self.features)


def test_what_callers_really_pass(counts, config):
    """Inside ``no_grad``, models that keep their features, teachers as a generator, counts as a list of tensors."""
    models = [KeepsFeatures() for _ in range(4)]
    for model in models:
        model(torch.ones(2, *SHAPE)).sum().backward()
    before = [snapshot(model) for model in models]
    with torch.no_grad():
        result = refine(models[0], (model for model in models[1:]), list(counts), method=config(), image_shape=SHAPE)
        assert not torch.is_grad_enabled()
    assert all(unchanged(model, state) for model, state in zip(models, before, strict=True))
    assert not unchanged(result.model, before[0])
    assert all(parameter.grad is None for parameter in result.model.parameters())


@pytest.mark.parametrize("made_in", [torch.enable_grad, torch.inference_mode])
def test_in_inference_mode(classifier, counts, config, made_in):
    """Also with models that were made or loaded in it, whose values autograd does not take."""
    with made_in():
        models = [classifier(seed) for seed in range(4)]
    plain = [classifier(seed) for seed in range(4)]
    expected = refine(plain[0], plain[1:], counts, method=config(), image_shape=SHAPE)
    with torch.inference_mode():
        found = refine(models[0], models[1:], counts, method=config(), image_shape=SHAPE)
    for value, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(value, other)


class KeepsMore(KeepsFeatures):
    """Keeps them in a list and a dictionary too, and in what a hook writes."""

    def __init__(self):
        super().__init__()
        self.seen, self.all = {}, []
        self.head.register_forward_hook(lambda layer, given, output: self.seen.__setitem__("head", output))

    def forward(self, images):
        logits = super().forward(images)
        self.all = [{"features": (self.features,)}]
        return logits


def test_features_that_are_kept_anywhere(counts, config):
    models = [KeepsMore() for _ in range(4)]
    for model in models:
        model(torch.ones(2, *SHAPE))
    result = refine(models[0], models[1:], counts, method=config(), image_shape=SHAPE)
    assert not torch.equal(result.model.head.weight, models[0].head.weight)
    assert models[0].features.grad_fn is not None


@pytest.mark.parametrize(
    "form",
    [np.array, lambda rows: [np.array(row) for row in rows], lambda rows: tuple(map(tuple, rows)), torch.tensor,
     lambda rows: [torch.tensor(row, dtype=torch.int32) for row in rows], lambda rows: (row for row in rows)],
)  # fmt: skip
def test_every_form_of_class_counts_and_teachers(models, counts, config, form):
    expected = refine(models[0], models[1:], counts, method=config(), image_shape=SHAPE).model
    frozen = [copy.deepcopy(model).requires_grad_(False) for model in models[1:]]
    for teachers in (nn.ModuleList(frozen), tuple(frozen), dict(enumerate(frozen)).values(), map(copy.copy, frozen)):
        found = refine(models[0], teachers, form(counts.tolist()), method=config(), image_shape=SHAPE).model
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_frozen_parts_of_the_student_stay(models, counts, config):
    models[0][0].requires_grad_(False)
    result = refine(models[0], models[1:], counts, method=config(), image_shape=SHAPE)
    assert torch.equal(result.model[0].weight, models[0][0].weight)
    assert not torch.equal(result.model[-1].weight, models[0][-1].weight)
    assert not result.model[0].weight.requires_grad


def test_the_students_type_is_kept(classifier, counts, config):
    teachers = [classifier(seed).double() for seed in (1, 2, 3)]
    result = refine(classifier(4).double(), teachers, counts, method=config(), image_shape=SHAPE)
    assert result.rolled_back is None
    assert {tensor.dtype for tensor in result.model.parameters()} == {torch.float64}
    assert result.sample(3)[0].dtype == torch.float64


SMALL = {"iterations": 2, "batch_size": 6, "pool_batches": 2}
GENERATOR = {**SMALL, "generator_width": 4, "generator_steps": 2, "noise_dim": 6}


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        (LeavesConfig(**SMALL, image_steps=2), {"fidelity", "batchnorm"}),
        (DaflConfig(**GENERATOR), {"one_hot", "activation", "entropy"}),
        (DenseConfig(**GENERATOR), {"fidelity", "discrepancy", "batchnorm"}),
        (CoBoostingConfig(**GENERATOR), {"fidelity", "discrepancy"}),
    ],
)
def test_methods_without_fedftgs_generator(models, counts, settings, terms):
    """One teacher of three has no BatchNorm."""
    before = [snapshot(model) for model in models]
    results = [refine(models[0], models[1:], counts, method=settings, image_shape=SHAPE) for _ in range(2)]
    assert all(unchanged(model, state) for model, state in zip(models, before, strict=True))
    assert all(torch.equal(*pair) for pair in zip(*(r.model.parameters() for r in results), strict=True))
    result = results[0]
    assert not unchanged(result.model, before[0])
    assert (result.start, result.generator, result.rolled_back) == ("given", None, None)
    agreement = set() if isinstance(settings, DaflConfig) else {"teacher_agreement"}
    assert set(result.metrics) == {*terms, "student", *agreement}
    assert {metric.shape for metric in result.metrics.values()} == {(6,)}


def test_batchnorm_counts_where_teachers_have_it(classifier, counts):
    settings, teachers = LeavesConfig(**SMALL, image_steps=2), [classifier(seed) for seed in (1, 2, 3)]
    result = refine(classifier(4, norm=False), teachers, counts, method=settings, image_shape=SHAPE)
    assert result.metrics["batchnorm"].min() > 0


def test_images_that_were_kept(models, counts):
    def result(settings):
        return refine(models[0], models[1:], counts, method=settings, image_shape=SHAPE)

    found = result(LeavesConfig(**SMALL, image_steps=1))
    images, labels = found.sample(12)
    assert images.shape == (12, *SHAPE)
    assert len(images.unique(dim=0)) == 12, "all are shown before one is shown again"
    kept = {tuple(image.flatten().tolist()): int(label) for image, label in zip(images, labels, strict=True)}
    images, labels = found.sample(40, int(labels[0]))
    assert set(labels.tolist()) == {int(labels[0])}
    assert all(kept[tuple(image.flatten().tolist())] == int(labels[0]) for image in images)
    assert result(DaflConfig(**GENERATOR)).sample(2)[1] is None
    with pytest.raises(InputError, match="labels must be None, as this method's images have none"):
        result(DaflConfig(**GENERATOR)).sample(2, 0)
    with pytest.raises(InputError, match="kept no images, as its pool_size was 0"):
        result(LeavesConfig(**SMALL, image_steps=1, pool_size=0)).sample(2)
    counts[:, [0, 2]] = 0
    found = result(LeavesConfig(**SMALL, image_steps=1))
    with pytest.raises(InputError, match=r"labels must be classes of images that the call kept, \[1\]"):
        found.sample(2, [1, 2])


def head(weight, bias):
    """Logits ``weight * (the image's first pixel) + bias``."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        model[1].weight.zero_()[:, 0] = torch.tensor(weight)
        model[1].bias.copy_(torch.tensor(bias))
    return model


@pytest.mark.parametrize(
    ("biases", "tau", "expected"),
    [
        # 300 and 100 samples: the ensemble of logits is the weighted average.
        (([1.0, 0.0, 0.0], [0.0, 0.0, 2.0]), 0.0, "average"),
        (([1.0, 0.0, 0.0], [0.0, 0.0, 2.0]), 0.75, "average without priors"),
    ],
)
def test_the_start_is_the_closest_to_the_ensemble(biases, tau, expected):
    teachers = [head([1.0, 2.0, 3.0], bias).requires_grad_(False) for bias in biases]
    counts = [[200, 50, 50], [10, 10, 80]]
    settings = LeavesConfig(**SMALL, student_lr=0.0, image_steps=1, teacher_prior_tau=tau)
    result = refine(None, teachers, counts, method=settings, image_shape=SHAPE)
    assert result.start == expected
    bias = torch.tensor([0.75, 0.0, 0.5])
    if tau:
        prior = [((torch.tensor(row) + 0.5) / (sum(row) + 1.5)).log() for row in counts]
        shift = 0.75 * (0.75 * prior[0] + 0.25 * prior[1])
        bias = bias - shift + shift.mean()
    assert torch.allclose(result.model[1].bias, bias)
    assert all(parameter.requires_grad for parameter in result.model.parameters())
    assert not result.model.training


def test_a_teacher_is_the_start_where_nothing_can_be_averaged(models, counts):
    counts = torch.tensor([[1, 0, 0], [0, 0, 1], [50, 50, 50]])
    teachers = [models[1], lambda images: images.flatten(1)[:, :3], models[3]]
    result = refine(None, teachers, counts, method="fedftg", image_shape=SHAPE)
    assert result.start == "teacher 2"
    assert isinstance(result.model, nn.Sequential)
    assert len(result.model) == 2


class Pair(KeepsFeatures):
    def forward(self, images):
        return images, super().forward(images)


class Locked(KeepsFeatures):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrong_inputs(models, counts, classifier, generator):
    student, teachers = models[0], models[1:]
    broken = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    nn.init.constant_(broken[1].bias, float("nan"))
    for arguments, changed, message in (
        ((student, teachers, counts), {"method": "papper"}, "unknown method 'papper'; did you mean 'paper'"),
        ((student, [], counts), {}, "at least 1"),
        ((student, teachers[0], counts), {}, "must be a list, got Sequential"),
        ((student, teachers, counts[:2]), {}, r"teachers = 3, .* got \(2, 3\)"),
        ((student, teachers, [[1, 2], [3]]), {}, "class_counts must be a table"),
        ((student, teachers, counts[:, :2]), {}, r"student must return logits \(2, 2\), .* got \(2, 3\)"),
        ((nn.Flatten(), teachers, counts), {}, "requires_grad_"),
        ((student, teachers, counts), {"image_shape": (3, 32, 32)}, "student does not take images"),
        ((student, teachers, counts), {"method": "fedftg", "image_shape": (1, 4, 4)}, r"8 to 224, got \(1, 4, 4\)"),
        ((student, [*teachers[:2], broken], counts), {}, r"teacher 2 has values in 1\.bias that are not finite"),
        ((broken, teachers, counts), {}, r"student has values in 1\.bias that are not finite"),
        ((student, [{}, *teachers[:2]], counts), {}, "teacher 0 must be a classifier, got dict"),
        ((student, dict(enumerate(teachers)), counts), {}, r"teachers must be a list, got dict; pass"),
        ((student, nn.ModuleDict({"a": broken}), counts), {}, r"got ModuleDict; pass \[teacher\] or list\("),
        ((student, 3, counts), {}, "a list, got int"),
        ((student, teachers, None), {}, "class_counts must be a table"),
        ((student, teachers, dict(enumerate(counts.tolist()))), {}, r"class_counts must be .* got \(3,\)"),
        ((student, teachers, [{0: 3}] * 3), {}, "class_counts must be a table .* got Could not infer dtype of dict"),
        ((lambda images: images, teachers, counts), {}, "student must be a classifier, got function"),
        ((torch.jit.script(broken), teachers, counts), {}, "student is a ScriptModule or has lazy layers"),
        ((nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), teachers, counts), {}, "ScriptModule or has lazy"),
        ((student, [*teachers[:2], nn.LazyLinear(3)], counts), {}, "teacher 2 does not take images .* uninitialized"),
        ((student, [*teachers[:2], Locked()], counts), {}, "teacher 2 does not take images .* cannot pickle"),
        (
            (copy.deepcopy(student).double(), teachers, counts),
            {},
            r"student does not take .* \(only FedFTG",
        ),
        ((copy.deepcopy(student).double(), teachers, counts), {"method": "paper"}, "teacher 0 does not .* one type"),
        ((student, teachers, counts), {"method": {"iterations": 2}}, r"one of leaves, .* LeavesConfig, .*, got dict"),
        (
            (student, teachers, counts),
            {"method": "feddf"},
            "unknown method 'feddf'; .*allowed: adi, coboosting, .* paper",
        ),
        ((student, teachers, counts), {"method": FedDFConfig()}, "method must be one of leaves, .*, got FedDFConfig"),
        ((student, teachers, counts), {"generator": generator()}, "goes with FedFTG's presets .* got LeavesConfig"),
        (
            (student, teachers, counts),
            {"image_shape": (64,)},
            r"must be \(D, H, W\), such as .*, got \(64,\)",
        ),
        (
            (student, [*teachers[:2], nn.Sequential(student, nn.Softmax(1))], counts),
            {},
            "teacher 2 returns probabilities",
        ),
        ((student, teachers, counts / counts.sum(dim=1, keepdim=True)), {}, "numbers of samples, got shares"),
        ((None, teachers, counts), {"method": LeavesConfig(start="fresh")}, "'fresh' needs a student"),
        ((None, [lambda images: images.flatten(1)[:, :3]] * 3, counts), {}, "no teacher is a module .* pass a student"),
        ((Pair(), teachers, counts), {}, r"student must return logits .* got tuple"),
        (
            (student, [*teachers[:2], classifier(2, classes=4)], counts),
            {},
            "teacher 2 must return .* classes of class_counts",
        ),
    ):
        with pytest.raises(InputError, match=message) as error:
            refine(*arguments, **{"image_shape": SHAPE, **changed})
        assert "\n" not in str(error.value)
