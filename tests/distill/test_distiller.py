"""One call of the distillation on images of a generator."""

import copy
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from fedftg import precision as precisions
from fedftg.distill import teachers
from fedftg.distill.distiller import distil
from fedftg.distill.images import GeneratorImages, NoiseAndLabels
from fedftg.distill.teachers import ListedTeachers
from fedftg.params import clone, prefixed


class Given(GeneratorImages):
    """Takes these draws, where there are any, in place of its own."""

    draws: Sequence[NoiseAndLabels] = ()

    def start(self, call):
        drawn = super().start(call)
        return self.draws or drawn


class Bench:
    """Images, a student and three teachers, the same in every test."""

    def __init__(self, classifier, generator, config):
        self.teachers = [classifier(seed) for seed in (1, 2, 3)]
        self.student = classifier(4)
        self.generator = generator(noise_dim=config.noise_dim)
        self.config, self.images = config, Given(config, self.generator)

    def distil(self, counts, seed=0, **arguments):
        rng = torch.Generator().manual_seed(seed)
        teachers = ListedTeachers(self.teachers)
        return distil(self.config, self.images, self.student, teachers, counts, rng=rng, **arguments)

    def state(self):
        return clone({**self.student.state_dict(), **prefixed(self.generator.state_dict(), "g.")})


def mean(metrics):
    return {name: float(values.mean()) for name, values in metrics.items()}


def same(left, right):
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def bench(classifier, generator, config):
    def make(name="fedftg", **overrides):
        return Bench(classifier, generator, config(name, **overrides))

    return make


@pytest.mark.parametrize("name", ["paper", "official", "fedftg"])
def test_same_seed_same_bits(bench, classifier, counts, name):
    """Dropout included, whatever torch's global state, which stays as it is."""
    states, calls = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        one, global_state = bench(name), torch.get_rng_state()
        one.student = classifier(4, dropout=0.5)
        before = one.state()
        metrics = one.distil(counts, seed, progress=lambda done, total: calls.append((done, total)))
        states.append(one.state())
        assert not same(before, states[-1])
        assert all(values.shape == (2,) and bool(values.isfinite().all()) for values in metrics.values())
        assert torch.equal(global_state, torch.get_rng_state())
    assert calls == [(1, 2), (2, 2)] * 3
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def certain_teacher(images):
    """Logits (20, 0, 0) whatever the image: class 0."""
    return images.mean((1, 2, 3))[:, None] * 0 + torch.tensor([20.0, 0.0, 0.0])


DRAWS = [(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 0, 0, 1, 1, 2]))]
LOG_3 = float(torch.tensor(3.0).log())


def test_metrics_by_hand(bench):
    """A teacher that is certain and right on three of six samples, a student that knows nothing.

    KL(teacher || uniform) = log 3, and the student's loss is the same; the cross-entropy is 0 or 20.
    """
    one = bench("paper", iterations=1, student_steps=1, student_lr=0.0)
    one.teachers = [certain_teacher]
    nn.init.zeros_(one.student[-1].weight)
    nn.init.zeros_(one.student[-1].bias)
    one.images.draws = DRAWS
    means = mean(one.distil(torch.ones(1, 3)))
    assert 0 < means.pop("diversity") < 1
    expected = {"discrepancy": LOG_3, "fidelity": 10.0, "student": LOG_3, "teacher_agreement": 0.5}
    assert means == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("chunk", [0, 1])
def test_the_mask_counts_only_transferable_samples(bench, chunk):
    """As above: the ensemble is right on three of six samples; the student, whose ties go to class 0, on the same."""
    found = []
    for bias in (torch.zeros(3), torch.tensor([0.0, 1e-4, 0.0])):
        one = bench("paper", iterations=1, student_steps=0, discrepancy_mask="transferable", teacher_chunk=chunk)
        one.teachers = [certain_teacher] * 2
        nn.init.zeros_(one.student[-1].weight)
        one.student[-1].bias.data.copy_(bias)
        one.images.draws = DRAWS
        found.append(float(one.distil(torch.ones(2, 3))["discrepancy"][0]))
    assert found == [0, pytest.approx(0.5 * LOG_3, rel=1e-3)]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"discrepancy_mask": "transferable", "generator_steps": 3},
        {"generator_update": "per_client", "fidelity_weighting": "batch_mean", "teacher_gradient": "detached"},
        {"generator_optimizer_state": "kept", "temperature": 2.0, "student_mode": "eval", "lambda_md": 0},
    ],
    ids=["paper", "masked", "per_client", "kept"],
)
def test_teacher_chunks_give_the_same_numbers(bench, counts, overrides):
    """Two calls in float64, where what rounding leaves of zero gradients is far below Adam's epsilon."""
    states = []
    for chunk in (0, 1, 2, 5):
        one = bench("paper", **overrides)
        for module in (one.student, one.generator, *one.teachers):
            module.double()
        one.config = one.config.model_copy(update={"teacher_chunk": chunk})
        one.images = Given(one.config, one.generator)
        metrics = [mean(one.distil(counts, seed)) for seed in (0, 1)]
        numbers = {f"{name}{call}": torch.tensor(m[name]) for call, m in enumerate(metrics) for name in m}
        states.append({**one.state(), **numbers})
    assert states[0]["0.weight"].dtype == torch.float64
    for other, (name, tensor) in itertools.product(states[1:], states[0].items()):
        tolerance = 1e-7 if tensor.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(other[name], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("chunk", "at_once", "most"), [(0, 32, 3), (0, 2, 2), (1, 32, 1), (2, 32, 2)])
def test_at_most_a_chunk_of_teachers_is_called_at_a_time(bench, counts, monkeypatch, chunk, at_once, most):
    sizes: list[int] = []
    call = ListedTeachers.__call__

    def counted(self, images, start, stop):
        sizes.append(stop - start)
        return call(self, images, start, stop)

    monkeypatch.setattr(ListedTeachers, "__call__", counted)
    monkeypatch.setattr(teachers, "MOST_AT_ONCE", at_once)
    bench("paper", discrepancy_mask="transferable", teacher_chunk=chunk).distil(counts)
    assert max(sizes) == most


@pytest.mark.parametrize("chunk", [0, 1])
def test_without_student_steps_only_the_generator_moves(bench, counts, chunk):
    """Nobody is left with a gradient; a hook on a weight, which runs when its gradient is made, never runs."""
    one = bench("fedftg", student_steps=0, teacher_chunk=chunk)
    reached: list[str] = []
    for module in (one.student, *one.teachers):
        for name, parameter in module.named_parameters():
            parameter.register_hook(lambda gradient, name=name: reached.append(name))
    before, generator = [clone(module.state_dict()) for module in (one.student, *one.teachers)], one.state()
    one.distil(counts)
    assert all(same(a, b.state_dict()) for a, b in zip(before, (one.student, *one.teachers), strict=True))
    assert not same(generator, one.state())
    assert all(p.grad is None for module in (one.student, *one.teachers, one.generator) for p in module.parameters())
    assert reached == []


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_modes(bench, counts, mode):
    """One iteration of two generator and two student steps.

    The generator trains in its two steps and evaluates once for the student, whose images are made once; the student
    evaluates in the generator's steps. Only in its own steps is it in ``student_mode``. Teachers evaluate always.
    """
    one, modes = bench("paper", iterations=1, generator_steps=2, student_mode=mode), []
    for name, module in (("generator", one.generator), ("student", one.student), *(("t", t) for t in one.teachers)):
        module.train().register_forward_pre_hook(lambda called, _, name=name: modes.append((name, called.training)))
    one.distil(counts)
    called = {name: [training for who, training in modes if who == name] for name in ("generator", "student", "t")}
    assert called["generator"] == [True, True, False]
    assert called["student"] == [False, False, mode == "train", mode == "train"]
    assert called["t"] == [False] * 3 * 3


OFF = {"lambda_md": 0.0, "lambda_cls": 0.0, "lambda_dis": 0.0, "student_steps": 0}


@pytest.mark.parametrize(
    ("term", "metric", "sign"),
    [("lambda_md", "discrepancy", 1), ("lambda_cls", "fidelity", -1), ("lambda_dis", "diversity", -1)],
)
def test_each_term_moves_the_generator_its_way(bench, counts, term, metric, sign):
    """It raises the discrepancy, and lowers the cross-entropy and the diversity term; with all off it stays."""
    draw = torch.randn(32, 6, generator=torch.Generator().manual_seed(3)), torch.arange(32) % 3
    for chunk, weights in itertools.product((0, 2), ({term: 1.0}, {})):
        one = bench("paper", **{**OFF, "generator_steps": 30, "batch_size": 32, "teacher_chunk": chunk, **weights})
        one.images.draws = [draw, draw]
        before, after = one.distil(counts)[metric].tolist()
        assert sign * (after - before) > 0 if weights else after == pytest.approx(before, rel=1e-3)


def test_fields_that_no_other_test_needs_matter(bench, counts):
    changes = {"teacher_gradient": "detached", "student_momentum": 0.9, "temperature": 3.0, "label_sampling": "uniform"}
    states = []
    for overrides in ({}, *({name: value} for name, value in changes.items())):
        one = bench("paper", **overrides)
        one.distil(counts)
        states.append(one.state())
    assert not any(same(states[0], changed) for changed in states[1:])


def test_modes_and_flags_are_put_back_also_after_an_error(bench, counts):
    one = bench("paper")
    one.student.train()
    one.student[1].eval()
    one.student[0].bias.requires_grad_(False)
    fixed = one.student[0].bias.clone()

    def stop(done, total):
        raise KeyboardInterrupt

    for progress in (None, stop):
        try:
            one.distil(counts, progress=progress)
        except KeyboardInterrupt:
            assert progress is stop
        assert [layer.training for layer in one.student] == [True, False, True, True, True, True]
        assert [p.requires_grad for p in one.student.parameters()] == [True, False, True, True, True, True]
    assert torch.equal(fixed, one.student[0].bias)


@pytest.mark.parametrize("state", ["kept", "reset"])
def test_memory_continues_bit_for_bit(bench, counts, state):
    overrides = {"generator_optimizer_state": state}
    through = bench("paper", **overrides)
    through.distil(counts, 0)
    memory, student = through.images.memory(), copy.deepcopy(through.student)
    before = clone(memory)
    through.distil(counts, 1)
    assert same(memory, before)
    for optimizer in (True, False):
        resumed = bench("paper", **overrides)
        resumed.student = copy.deepcopy(student)
        resumed.images.load_memory({n: t for n, t in memory.items() if optimizer or not n.startswith("optimizer.")})
        assert not optimizer or same(resumed.images.memory(), memory)
        resumed.distil(counts, 1)
        equal = optimizer or state == "reset"
        assert same(through.state(), resumed.state()) == equal
        assert same(through.images.memory(), resumed.images.memory()) == equal
    assert any(name.endswith("exp_avg") for name in memory) == (state == "kept")


def test_rates_scale(bench, counts):
    states = []
    for overrides, scale in (({}, 0.5), ({"student_lr": 0.05, "generator_lr": 0.005}, 1.0)):
        one = bench("paper", **overrides)
        one.distil(counts, lr_scale=scale)
        states.append(one.state())
    assert same(*states)


def test_a_label_that_no_teacher_holds_does_no_harm(bench):
    """Weights 0: such a sample adds nothing to any loss but diversity, and no NaN."""
    one = bench("paper", lambda_dis=0.0)
    before = clone(dict(one.student.named_parameters()))
    one.images.draws = [(torch.randn(6, 6), torch.ones(6, dtype=torch.int64))] * 2
    means = mean(one.distil(torch.tensor([[5, 0, 7]] * 3)))
    assert means["discrepancy"] == means["fidelity"] == means["student"] == 0
    for name, parameter in one.student.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * 1e-3) ** 4)


@pytest.mark.parametrize("name", ["paper", "official"])
def test_bfloat16_moves_the_same_way_and_keeps_types(bench, counts, monkeypatch, name):
    """A bfloat16 has 8 bits of precision: after one iteration the student has moved within some percent of the same."""
    monkeypatch.setattr(precisions, "has_bfloat16", lambda device: True)
    full, half = (
        bench(name, iterations=1, student_steps=1, student_lr=1.0, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    start = clone(full.student.state_dict())
    full.distil(counts)
    half.distil(counts)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in half.state().values())
    moved, differs = 0.0, 0.0
    for key, parameter in full.student.named_parameters():
        moved += float((parameter.detach() - start[key]).square().sum())
        differs += float((parameter - half.student.get_parameter(key)).detach().square().sum())
    assert 0 < differs < 0.05 * moved
