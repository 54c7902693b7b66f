from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedftg.distill.config import DistillConfig
from fedftg.distill.distiller import Distiller, DistillMetrics
from fedftg.distill.generator import Generator
from fedftg.distill.teachers import ListedTeachers
from fedftg.errors import InputError
from fedftg.params import Params, clone


class Bench:
    """A distiller, a student and three teachers, the same in every test."""

    def __init__(
        self, classifier: Callable[..., nn.Module], generator: Callable[..., Generator], config: DistillConfig
    ) -> None:
        self.teachers = [classifier(seed) for seed in (1, 2, 3)]
        self.student = classifier(4)
        self.generator = generator()
        self.distiller = Distiller(config, self.generator)

    def refine(self, counts: Tensor, seed: int = 0, **arguments: Any) -> DistillMetrics:
        rng = torch.Generator().manual_seed(seed)
        return self.distiller.refine(self.student, ListedTeachers(self.teachers), counts, rng=rng, **arguments)

    def state(self) -> Params:
        return {
            **clone(self.student.state_dict()),
            **{f"g.{n}": t for n, t in clone(self.generator.state_dict()).items()},
        }


@pytest.fixture
def bench(
    classifier: Callable[..., nn.Module], generator: Callable[..., Generator], config: Callable[..., DistillConfig]
) -> Callable[..., Bench]:
    def make(name: str = "fedftg", **overrides: Any) -> Bench:
        return Bench(classifier, generator, config(name, **overrides))

    return make


def same(left: Params, right: Params) -> bool:
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def close(left: Params, right: Params) -> None:
    assert set(left) == set(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["paper", "official", "fedftg"])
def test_same_seed_same_bits(bench: Callable[..., Bench], counts: Tensor, name: str) -> None:
    states, global_state = [], torch.get_rng_state()
    for seed in (0, 0, 1):
        one = bench(name)
        before = one.state()
        metrics = one.refine(counts, seed)
        states.append(one.state())
        assert not same(before, states[-1])
        assert all(len(values) == 2 for values in vars(metrics).values())
        assert all(torch.isfinite(torch.tensor(value)) for value in metrics.means().values())
    assert same(states[0], states[1])
    assert not same(states[0], states[2])
    assert torch.equal(global_state, torch.get_rng_state())


def test_dropout_comes_from_the_generator_too(
    classifier: Callable[..., nn.Module],
    generator: Callable[..., Generator],
    config: Callable[..., Any],
    counts: Tensor,
) -> None:
    teachers, states = ListedTeachers([classifier(seed) for seed in (1, 2, 3)]), []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        student = classifier(4, dropout=0.5)
        Distiller(config("paper"), generator()).refine(student, teachers, counts, rng=torch.Generator().manual_seed(0))
        states.append(student.state_dict())
    assert same(*states)


def test_metrics_by_hand(bench: Callable[..., Bench]) -> None:
    """One teacher that is certain and right or certain and wrong, a student that knows nothing, three classes.

    The teacher's logits (20, 0, 0) say class 0. KL(teacher || uniform) = log 3 and the student's loss is the same.
    """
    one = bench("paper", iterations=1, student_steps=1, student_lr=0.0)
    one.teachers = [lambda images: images.mean((1, 2, 3))[:, None] * 0 + torch.tensor([20.0, 0.0, 0.0])]
    nn.init.zeros_(one.student[-1].weight)
    nn.init.zeros_(one.student[-1].bias)
    labels = torch.tensor([[0, 0, 0, 1, 1, 2]])
    means = one.refine(torch.ones(1, 3), labels=labels).means()
    log_3 = float(torch.tensor(3.0).log())
    assert means["discrepancy"] == pytest.approx(log_3, rel=1e-4)
    assert means["student"] == pytest.approx(log_3, rel=1e-4)
    assert means["teacher_agreement"] == pytest.approx(0.5)
    assert means["fidelity"] == pytest.approx(10.0, rel=1e-4)
    assert 0 < means["diversity"] < 1


def test_the_mask_counts_only_transferable_samples(bench: Callable[..., Bench]) -> None:
    """As above: the ensemble is right on three of six samples; the student, whose ties go to class 0, on the same."""
    found = []
    for bias in (torch.zeros(3), torch.tensor([0.0, 1e-4, 0.0])):
        one = bench("paper", iterations=1, student_steps=0, discrepancy_mask="transferable")
        one.teachers = [lambda images: images.mean((1, 2, 3))[:, None] * 0 + torch.tensor([20.0, 0.0, 0.0])]
        nn.init.zeros_(one.student[-1].weight)
        one.student[-1].bias.data.copy_(bias)
        metrics = one.refine(torch.ones(1, 3), labels=torch.tensor([[0, 0, 0, 1, 1, 2]]))
        found.append(float(metrics.discrepancy[0]))
    assert found[0] == 0
    assert found[1] == pytest.approx(0.5 * float(torch.tensor(3.0).log()), rel=1e-3)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["paper", "official", "fedftg"])
def test_teacher_chunks_give_the_same_numbers(
    bench: Callable[..., Bench], counts: Tensor, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    """One generator step by plain descent: Adam would make full steps of what rounding leaves of zero gradients."""
    monkeypatch.setattr(
        Distiller,
        "_new_optimizer",
        lambda self: torch.optim.SGD(self.generator.parameters(), lr=self.config.generator_lr),
    )
    states, means = [], []
    for teacher_chunk in (0, chunk):
        one = bench(name, teacher_chunk=teacher_chunk, generator_steps=2)
        means.append(one.refine(counts).means())
        states.append(one.state())
    close(*states)
    assert means[0] == pytest.approx(means[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("chunk", [0, 1])
def test_gradient_reaches_the_generator_only(bench: Callable[..., Bench], counts: Tensor, chunk: int) -> None:
    """With no student step, nothing but the generator moves, and nobody is left with a gradient."""
    one = bench("fedftg", student_steps=0, teacher_chunk=chunk, discrepancy_mask="none")
    student, generator = clone(one.student.state_dict()), clone(one.generator.state_dict())
    teachers = [clone(teacher.state_dict()) for teacher in one.teachers]
    one.refine(counts)
    assert same(student, one.student.state_dict())
    assert all(same(state, teacher.state_dict()) for state, teacher in zip(teachers, one.teachers, strict=True))
    assert not same(generator, one.generator.state_dict())
    for module in (one.student, *one.teachers, one.generator):
        assert all(parameter.grad is None for parameter in module.parameters())


def generator_gradient_exists(one: Bench, counts: Tensor) -> bool:
    before = clone(dict(one.generator.named_parameters()))
    one.refine(counts)
    return not same(before, dict(one.generator.named_parameters()))


def test_each_term_alone_moves_the_generator(bench: Callable[..., Bench], counts: Tensor) -> None:
    off = {"lambda_md": 0.0, "lambda_cls": 0.0, "lambda_dis": 0.0, "student_steps": 0}
    for chunk in (0, 2):
        for term in ("lambda_md", "lambda_cls", "lambda_dis"):
            assert generator_gradient_exists(bench("paper", **{**off, term: 1.0, "teacher_chunk": chunk}), counts)


def test_signs(bench: Callable[..., Bench], counts: Tensor) -> None:
    """The generator raises the discrepancy, and lowers the cross-entropy and the diversity term; the student learns."""
    off = {"lambda_md": 0.0, "lambda_cls": 0.0, "lambda_dis": 0.0, "student_steps": 0, "generator_steps": 30}
    off |= {"iterations": 2, "batch_size": 32}
    for term, metric, sign in (
        ("lambda_md", "discrepancy", 1),
        ("lambda_cls", "fidelity", -1),
        ("lambda_dis", "diversity", -1),
    ):
        one = bench("paper", **{**off, term: 1.0})
        noise, labels = torch.randn(1, 32, 6, generator=torch.Generator().manual_seed(3)), torch.arange(32)[None] % 3
        values = getattr(one.refine(counts, noise=noise.repeat(2, 1, 1), labels=labels.repeat(2, 1)), metric)
        assert sign * float(values[1] - values[0]) > 0, term
    learning = bench("paper", iterations=1, student_steps=1, batch_size=32)
    first = float(learning.refine(counts, noise=noise, labels=labels, lr_scale=1e-9).student)
    trained = bench("paper", iterations=1, student_steps=20, batch_size=32, generator_lr=0.0)
    assert float(trained.refine(counts, noise=noise, labels=labels).student) < first


def test_detached_teachers_change_the_generators_step(bench: Callable[..., Bench], counts: Tensor) -> None:
    states = []
    for teacher_gradient in ("full", "detached"):
        one = bench("paper", teacher_gradient=teacher_gradient, student_steps=0, iterations=1)
        one.refine(counts)
        states.append(one.state())
    assert not same(*states)


@pytest.mark.parametrize(
    ("mode", "restore", "moved"), [("eval", False, False), ("train", False, True), ("train", True, False)]
)
def test_buffers_of_the_student(
    bench: Callable[..., Bench], counts: Tensor, mode: str, restore: bool, moved: bool
) -> None:
    one = bench("paper", student_mode=mode, restore_buffers=restore)
    before, weights = clone(dict(one.student.named_buffers())), clone(dict(one.student.named_parameters()))
    one.refine(counts)
    assert same(before, dict(one.student.named_buffers())) != moved
    assert not same(weights, dict(one.student.named_parameters()))


def test_modes_and_flags_are_put_back_also_after_an_error(bench: Callable[..., Bench], counts: Tensor) -> None:
    one = bench("paper")
    one.student.train()
    one.student[1].eval()
    one.student[0].bias.requires_grad_(False)
    fixed = one.student[0].bias.clone()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for progress in (None, stop):
        try:
            one.refine(counts, progress=progress)
        except KeyboardInterrupt:
            assert progress is stop
        assert [layer.training for layer in one.student] == [True, False, True, True, True, True]
        assert [p.requires_grad for p in one.student.parameters()] == [True, False, True, True, True, True]
    assert torch.equal(fixed, one.student[0].bias)


def test_progress_and_given_batches(bench: Callable[..., Bench], counts: Tensor) -> None:
    calls: list[tuple[int, int]] = []
    noise, labels = torch.ones(2, 6, 6), torch.zeros(2, 6, dtype=torch.int64)
    noise[:, ::2] = -1
    states = []
    for seed in (0, 1):
        one = bench("paper")
        one.refine(counts, seed, noise=noise, labels=labels, progress=lambda done, total: calls.append((done, total)))
        states.append(one.state())
    assert calls == [(1, 2), (2, 2)] * 2
    assert same(*states)


@pytest.mark.parametrize("state", ["kept", "reset"])
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_memory_continues_bit_for_bit(bench: Callable[..., Bench], counts: Tensor, state: str, ema: float) -> None:
    overrides = {"generator_optimizer_state": state, "generator_ema": ema, "generator_warmup": 1}
    through = bench("paper", **overrides)
    through.refine(counts, 0)
    memory, student = through.distiller.memory(), copy.deepcopy(through.student)
    through.refine(counts, 1)
    resumed = bench("paper", **overrides)
    resumed.student = student
    resumed.distiller.load_memory(clone(memory))
    assert same(resumed.distiller.memory(), memory)
    resumed.refine(counts, 1)
    assert same(through.state(), resumed.state())
    assert same(through.distiller.memory(), resumed.distiller.memory())
    assert any(name.endswith("exp_avg") for name in memory) == (state == "kept")
    assert any(name.startswith("averaged.") for name in memory) == (ema > 0)


def test_memory_is_a_copy_and_matters(bench: Callable[..., Bench], counts: Tensor) -> None:
    one = bench("paper", generator_optimizer_state="kept")
    one.refine(counts)
    memory = one.distiller.memory()
    before = clone(memory)
    one.distiller.load_memory(memory)
    one.refine(counts, 1)
    assert same(memory, before)
    kept = one.state()
    fresh = bench("paper", generator_optimizer_state="kept")
    fresh.refine(counts)
    fresh.distiller.load_memory({n: t for n, t in before.items() if not n.startswith("optimizer.")})
    fresh.refine(counts, 1)
    assert not same(kept, fresh.state())


def test_memory_of_another_generator(bench: Callable[..., Bench], generator: Callable[..., Generator]) -> None:
    one = bench()
    other = Distiller(one.distiller.config, generator(width=5)).memory()
    for memory in (other, {}, {n: t for n, t in one.distiller.memory().items() if n != "calls"}):
        with pytest.raises(InputError, match="saved generator does not fit"):
            one.distiller.load_memory(memory)


def test_warmup_is_in_the_first_call_only(bench: Callable[..., Bench], counts: Tensor) -> None:
    one = bench("paper", generator_warmup=3)
    steps = [0]
    for _ in range(2):
        one.refine(counts)
        steps.append(int(one.generator.base_norm.num_batches_tracked))
    assert [after - before for before, after in itertools.pairwise(steps)] == [3 + 2, 2]


def test_averaged_generator_by_hand(bench: Callable[..., Bench], counts: Tensor) -> None:
    """After two calls: 3/4 of the first's weights, 1/4 of the second's; the second call's student saw twice as many."""
    one = bench("paper", generator_ema=0.75)
    sizes: list[int] = []
    one.student.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    states = []
    for seed in (0, 1):
        one.refine(counts, seed)
        states.append(clone(one.generator.state_dict()))
    name = "to_image.weight"
    expected = 0.75 * states[0][name] + 0.25 * states[1][name]
    torch.testing.assert_close(one.distiller.memory()[f"averaged.{name}"], expected)
    per_iteration = [6] + [6] * 2 + [6] + [6] * 2
    assert sizes == per_iteration + [6, 12, 12] * 2


def test_fresh_batches(bench: Callable[..., Bench], counts: Tensor) -> None:
    seen: dict[bool, list[Tensor]] = {}
    for fresh in (False, True):
        one = bench("paper", fresh_batches=fresh, iterations=1, student_steps=3)
        images = seen.setdefault(fresh, [])
        one.student.register_forward_pre_hook(lambda module, inputs, images=images: images.append(inputs[0].detach()))
        one.refine(counts)
    assert torch.equal(seen[False][1], seen[False][3])
    assert not torch.equal(seen[True][1], seen[True][2])
    assert not torch.equal(seen[True][2], seen[True][3])


def test_rates_scale(bench: Callable[..., Bench], counts: Tensor) -> None:
    states = []
    for overrides, scale in (({}, 0.5), ({"student_lr": 0.05, "generator_lr": 0.005}, 1.0)):
        one = bench("paper", **overrides)
        one.refine(counts, lr_scale=scale)
        states.append(one.state())
    assert same(*states)


def test_momentum_and_weight_decay_matter(bench: Callable[..., Bench], counts: Tensor) -> None:
    states = []
    for overrides in ({}, {"student_momentum": 0.9}, {"student_weight_decay": 0.1}, {"temperature": 3.0}):
        one = bench("paper", **overrides)
        one.refine(counts)
        states.append(one.state())
    assert all(not same(states[0], other) for other in states[1:])


def test_one_teacher_and_an_absent_class(bench: Callable[..., Bench]) -> None:
    for name in ("paper", "official", "fedftg"):
        one = bench(name)
        one.teachers = one.teachers[:1]
        means = one.refine(torch.tensor([[5, 0, 7]])).means()
        assert all(abs(value) < 1e6 for value in means.values())
        assert all(bool(torch.isfinite(tensor).all()) for tensor in one.state().values())


def test_a_label_that_no_teacher_holds_does_no_harm(bench: Callable[..., Bench]) -> None:
    """Weights 0: such a sample adds nothing to any loss but diversity, and no NaN."""
    one = bench("paper", lambda_dis=0.0)
    before = clone(dict(one.student.named_parameters()))
    labels = torch.ones(2, 6, dtype=torch.int64)
    means = one.refine(torch.tensor([[5, 0, 7]] * 3), labels=labels).means()
    assert means["discrepancy"] == means["fidelity"] == means["student"] == 0
    for name, parameter in one.student.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * 1e-3) ** 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": torch.zeros(2, 6, 7)}, r"noise must have shape.*\(2, 6, 6\).*got \(2, 6, 7\)"),
        ({"labels": torch.zeros(2, 5, dtype=torch.int64)}, r"labels \(2, 6\), got"),
        ({"labels": torch.full((2, 6), 3)}, "whole numbers from 0 to 2"),
        ({"labels": torch.zeros(2, 6)}, "whole numbers from 0 to 2"),
    ],
)
def test_wrong_batches(bench: Callable[..., Bench], counts: Tensor, arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench().refine(counts, **arguments)


def test_wrong_inputs(
    bench: Callable[..., Bench],
    classifier: Callable[..., nn.Module],
    generator: Callable[..., Generator],
    config: Callable[..., DistillConfig],
    counts: Tensor,
) -> None:
    with pytest.raises(InputError, match="noise_dim must be the generator's, 6, got 7"):
        Distiller(config(noise_dim=7), generator())
    with pytest.raises(InputError, match="all 0"):
        bench().refine(torch.zeros(3, 3))
    with pytest.raises(InputError, match=r"\(3, 3\), got \(2, 3\)"):
        bench().refine(counts[:2])
    for attribute, value, message in (
        ("student", classifier(0, classes=4), r"student's logits.*\(6, 3\), got \(6, 4\)"),
        ("student", classifier(0).requires_grad_(False), "requires a gradient"),
        ("teachers", [classifier(0, classes=4)] * 3, r"teachers' logits.*\(3, 6, 3\), got \(3, 6, 4\)"),
    ):
        one = bench()
        setattr(one, attribute, value)
        with pytest.raises(InputError, match=message):
            one.refine(counts)
