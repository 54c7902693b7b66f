"""`refine`: one model from several classifiers, without a federation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedftg.algorithms.adi import AdiConfig
from fedftg.algorithms.averages import HeadPriorConfig, head_bias, shifted
from fedftg.algorithms.base import RefinerContext
from fedftg.algorithms.coboosting import CoBoostingConfig
from fedftg.algorithms.dafl import DaflConfig
from fedftg.algorithms.dense import DenseConfig
from fedftg.algorithms.distilled import DistilledConfig
from fedftg.algorithms.leaves import LeavesConfig
from fedftg.distill import losses
from fedftg.distill.config import PRESETS, DistillConfig, StudentConfig
from fedftg.distill.distiller import Progress, distil, trainable
from fedftg.distill.generator import Generator, new_generator
from fedftg.distill.images import GeneratorImages
from fedftg.distill.labels import check_class_counts, class_probabilities, label_log_prior, sample_labels
from fedftg.distill.leaves import dead_leaves
from fedftg.distill.pool import pooled
from fedftg.distill.teachers import Classifier, Ensemble, ListedTeachers, frozen
from fedftg.errors import InputError, first_line, unknown
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params, copied, first_non_finite, weighted_mean
from fedftg.progress import iterations
from fedftg.seeds import SERVER, seed_for, torch_rng

METHODS: dict[str, type[DistilledConfig]] = {
    "leaves": LeavesConfig,
    "dafl": DaflConfig,
    "adi": AdiConfig,
    "dense": DenseConfig,
    "coboosting": CoBoostingConfig,
}
"""Refiners that need neither rounds nor real images."""
COMPARED_ON = 512  # images, to choose the start


@dataclass(frozen=True)
class RefineResult:
    """What `refine` returns."""

    model: nn.Module
    """The refined copy of the student, in the student's mode; in evaluation mode where there was none."""
    start: str
    """What it started from: ``given``, ``average``, ``average without priors`` or ``teacher 2``."""
    before: nn.Module = field(repr=False)
    """That model itself, to compare with."""
    generator: Generator | None
    """FedFTG's; None with another method."""
    metrics: dict[str, Float[Tensor, " batches"]]
    """What happened on each batch, float32 on the CPU; the names are those of ``refine`` in ``rounds.jsonl``."""
    rolled_back: str | None
    """Why ``model`` and ``generator`` are as they were at the start, or None where all went well."""
    class_probabilities: Float[Tensor, " C"]
    """``p_t(y)``, from the class counts."""
    _pool: Params = field(repr=False)
    _rng: torch.Generator = field(repr=False)

    @torch.no_grad()
    def sample(
        self, n: int, labels: int | Sequence[int] | Int[Tensor, " N"] | None = None
    ) -> tuple[Float[Tensor, "N D H W"], Int[Tensor, " N"] | None]:
        """Returns ``n`` synthetic images and their labels, on the student's device.

        They are new ones of FedFTG's generator, or, with another method, of those that the call kept: no image twice
        before all are shown, and no labels where the method's images have none.

        ``labels`` is one for all, one for each, or None: drawn from ``p_t(y)``, or whatever the kept images have.
        """
        if n < 1:
            raise InputError(f"n must be >= 1, got {n}; it is the number of images")
        classes = len(self.class_probabilities)
        chosen = torch.zeros(n, dtype=torch.int64) if labels is None else torch.as_tensor(labels).cpu()
        chosen = chosen.expand(n) if chosen.ndim == 0 else chosen
        if chosen.shape != (n,) or not bool(torch.isin(chosen, torch.arange(classes)).all()):
            raise InputError(f"labels must be one or {n} whole numbers from 0 to {classes - 1}, got {labels}")
        if self.generator is None:
            return self._kept(chosen, labels is not None)
        if labels is None:
            chosen = sample_labels(self.class_probabilities[None], 1, n, rng=self._rng)[0]
        noise = torch.randn(n, self.generator.noise_dim, generator=self._rng)
        parameter = next(self.generator.parameters())
        chosen = chosen.to(parameter.device, torch.int64)
        images: Tensor = self.generator(noise.to(parameter.device, parameter.dtype), chosen)
        return images.contiguous(), chosen

    def _kept(self, chosen: Int[Tensor, " N"], by_class: bool) -> tuple[Tensor, Tensor | None]:
        if not self._pool:
            raise InputError("the call kept no images, as its pool_size was 0; set it to 1 or more")
        images, known = self._pool["images"], self._pool.get("labels")
        if by_class and known is None:
            raise InputError("labels must be None, as this method's images have none")
        of = known.cpu() if by_class and known is not None else torch.zeros(len(images), dtype=torch.int64)
        order, rows = torch.randperm(len(images), generator=self._rng), torch.empty(len(chosen), dtype=torch.int64)
        for label in set(chosen.tolist()):
            found, wanted = order[of[order] == label], chosen == label
            if not len(found):
                raise InputError(f"labels must be classes of images that the call kept, {sorted(set(of.tolist()))}")
            rows[wanted] = found[torch.arange(int(wanted.sum())) % len(found)]
        rows = rows.to(images.device)
        return images[rows].float(), None if known is None else known[rows]


@torch.inference_mode(False)  # gradients are on in here
def refine(
    student: nn.Module | None,
    teachers: Iterable[Classifier],
    class_counts: Num[Tensor, "K C"] | Sequence[Sequence[float] | Tensor],
    *,
    method: str | StudentConfig = "leaves",
    generator: Generator | None = None,
    image_shape: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> RefineResult:
    """Returns one model, distilled from ``teachers`` with no data.

    Nothing that is given is changed, nor torch's global random state. The same seed gives the same result on the same
    machine. An `InputError` says which inputs do not fit together.

    Args:
        student: a classifier from images ``(B, D, H, W)`` to logits ``(B, C)``, of which a copy is refined. None: the
            average of the teachers' weights, with or without their label priors, or one of the teachers: whose
            predictions on random shapes are closest to the ensemble's. The work is done on its device.
        teachers: at least one classifier on the same device with the same classes; architectures may differ. Modules
            evaluate whatever their mode; a function is called as it is.
        class_counts: ``(K, C)``: how many training samples of each class each teacher has seen.
        method: a refiner that needs no rounds (``leaves``, ``dafl``, ``adi``, ``dense``, ``coboosting``), or a preset
            of FedFTG (``fedftg``, ``paper``, ``official``), by name or as settings: ``LeavesConfig(iterations=50)``,
            `preset` with changes. Settings of a federation (``broadcast``, ``when``, ``lr_decay``) have no effect.
        generator: FedFTG only: where to start from, such as ``result.generator`` of an earlier call; None: a new one.
            Its noise length and image shape go before ``noise_dim`` and ``image_shape``.
        image_shape: ``(D, H, W)`` of the classifiers' images: 1 or 3 channels, 8 to 224 pixels a side. Needed unless a
            ``generator`` is given.
        progress: called as ``progress(batches done, batches in all)``; True shows a bar, None does where it is watched
            (on a terminal or in a notebook), False is silent.
    """
    settings, shape = _settings(method), tuple((image_shape if generator is None else generator.image_shape) or ())
    if generator is not None and not isinstance(settings, DistillConfig):
        raise InputError(f"generator goes with FedFTG's presets ({', '.join(PRESETS)}), got {type(settings).__name__}")
    if len(shape) != 3:
        raise InputError(f"image_shape must be (D, H, W), such as (3, 32, 32), got {shape or None}")
    several = isinstance(teachers, Iterable) and not isinstance(teachers, Mapping | nn.Module)
    if not several and not isinstance(teachers, nn.ModuleList):
        raise InputError(f"teachers must be a list, got {type(teachers).__name__}; pass [teacher] or list(x.values())")
    models: dict[str, Classifier] = {} if student is None else {"student": student}
    models |= {f"teacher {k}": teacher for k, teacher in enumerate(teachers)}
    for name, model in models.items():
        if not (isinstance(model, nn.Module) if model is student else callable(model)):
            raise InputError(f"{name} must be a classifier, got {type(model).__name__}; load weights into a module")
    if isinstance(student, torch.jit.ScriptModule) or (student and any(map(is_lazy, student.parameters()))):
        raise InputError("student is a ScriptModule or has lazy layers; pass a plain nn.Module that was called once")
    of_teachers = [model for name, model in models.items() if name != "student"]
    if not of_teachers:
        raise InputError("got no teacher, at least 1 is needed; pass the models to distil from")
    counts = _counts(class_counts, len(of_teachers))
    modules = [model for model in of_teachers if _has_values(model)]
    if student is None and not modules:
        raise InputError("no teacher is a module that refine could start from; pass a student")
    if student is None and getattr(settings, "start", "") == "fresh":
        raise InputError("start = 'fresh' needs a student; pass one with initial weights, or leave start out")
    place = next(modules[0].parameters()) if student is None else trainable(student)[0]
    new: Generator | None = None
    if isinstance(settings, DistillConfig):
        first = seed_for(seed, 0, SERVER, "generator")
        new = copy.deepcopy(generator or new_generator(settings, counts.shape[1], shape, first)).to(place)
        new.memory_format = settings.memory_format
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(place if new else place.device)
    if settings.memory_format == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    _check(models, images, counts.shape[1])
    ensemble, start = ListedTeachers(of_teachers), "given"
    if student is None:
        images = dead_leaves(COMPARED_ON, shape, torch_rng(seed, 0, SERVER, "start")).to(place)
        predicted = Ensemble(ensemble, counts, settings, place).probabilities(images, None)
        candidates = _candidates(of_teachers, counts, shape)
        start = min(candidates, key=lambda name: _distance(candidates[name], images, predicted, settings.temperature))
        student = _fresh(candidates[start])
    before, refined = copy.deepcopy(new), copied(student)
    rng = torch_rng(seed, 0, SERVER, "refine")
    if isinstance(settings, DistillConfig):
        assert new is not None
        source = pooled(settings, GeneratorImages(settings, new))
    else:
        context = RefinerContext(FunctionalModel(student), counts.shape[1], shape, place.device)
        source = pooled(settings, settings.images(context, rng))
    with iterations(progress) as report:
        metrics = distil(settings, source, refined, ensemble, counts, rng=rng, progress=report)
    broken = first_non_finite(refined.state_dict()) or (new and first_non_finite(new.state_dict()))
    return RefineResult(
        model=copied(student) if broken else refined,
        start=start,
        before=student,
        generator=before and before.eval() if broken else new and new.eval(),
        metrics=metrics,
        rolled_back=f"{broken} is not finite; lower student_lr{' or generator_lr' if new else ''}" if broken else None,
        class_probabilities=class_probabilities(counts),
        _pool={} if new else source.pool,
        _rng=torch_rng(seed, 0, SERVER, "sample"),
    )


def _settings(method: str | StudentConfig) -> DistillConfig | DistilledConfig:
    allowed = (*METHODS, *PRESETS)
    if isinstance(method, str):
        if method not in allowed:
            raise unknown("method", method, allowed)
        return PRESETS[method] if method in PRESETS else METHODS[method](name=method)
    if isinstance(method, DistillConfig | DistilledConfig) and isinstance(method, (DistillConfig, *METHODS.values())):
        return method
    names = ", ".join([*allowed, "fedftg.preset(...)", *(kind.__name__ for kind in METHODS.values())])
    raise InputError(f"method must be one of {names}, got {type(method).__name__}")


def _has_values(model: object) -> TypeGuard[nn.Module]:
    """Whether a model can be a start."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        return False
    return next(model.parameters(), None) is not None


def _candidates(
    teachers: Sequence[Classifier], counts: Float[Tensor, "K C"], shape: Sequence[int]
) -> dict[str, nn.Module]:
    """Returns the models that a student may start from, by name."""
    found = {f"teacher {k}": teacher for k, teacher in enumerate(teachers) if _has_values(teacher)}
    states = [model.state_dict() for model in found.values()]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if len(found) < len(teachers) or any(one != shapes[0] for one in shapes):
        return found
    average, sizes = _fresh(found["teacher 0"]), counts.sum(dim=1)
    floats = [{name: value for name, value in state.items() if value.is_floating_point()} for state in states]
    average.load_state_dict(weighted_mean(floats, sizes.tolist()), strict=False)
    found["average"] = average
    with suppress(InputError):  # without a bias that is added to the logits there is one candidate less
        bias, corrected = head_bias(FunctionalModel(average), shape), copied(average)
        priors = sizes @ label_log_prior(counts) / sizes.sum()
        corrected.load_state_dict(shifted(dict(average.state_dict()), bias, -HeadPriorConfig().prior_tau * priors))
        found["average without priors"] = corrected
    return found


def _fresh(model: nn.Module) -> nn.Module:
    """Returns a copy in evaluation mode, trainable where nothing of the model was."""
    fresh = copied(model).eval()
    return fresh if any(parameter.requires_grad for parameter in fresh.parameters()) else fresh.requires_grad_(True)


@torch.no_grad()
def _distance(model: nn.Module, images: Tensor, ensemble: Float[Tensor, "B C"], temperature: float) -> float:
    return float(losses.student_loss(frozen(model)(images), ensemble, temperature=temperature))


def _counts(class_counts: Tensor | Sequence[Sequence[float] | Tensor], num_teachers: int) -> Float[Tensor, "K C"]:
    try:
        if not isinstance(class_counts, Tensor):
            class_counts = torch.stack([torch.as_tensor(row) for row in class_counts])
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"class_counts must be a table (teachers, classes) of numbers, got {error}") from None
    counts = check_class_counts(class_counts, num_teachers=num_teachers)
    if bool((counts % 1 != 0).any()) and bool((counts.sum(dim=1) < 1.001).all()):
        raise InputError(
            "class_counts must be numbers of samples, got shares; multiply each row by its teacher's samples"
        )
    return counts


@torch.no_grad()
def _check(models: Mapping[str, Classifier], images: Tensor, num_classes: int) -> None:
    for name, model in models.items():
        try:
            broken = first_non_finite(model.state_dict()) if isinstance(model, nn.Module) else None
            logits = frozen(model)(images)
        except Exception as error:
            raise InputError(
                f"{name} does not take images {tuple(images.shape)}, {images.dtype}, on {images.device}: "
                f"{first_line(error)}; pass the image_shape that it was trained with, and give all models one device "
                "and one type (only FedFTG's presets take another than float32)"
            ) from error
        if broken:
            raise InputError(f"{name} has values in {broken} that are not finite; leave it out, or train it anew")
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if got != (len(images), num_classes):
            raise InputError(f"{name} must return logits {(2, num_classes)}, the classes of class_counts, got {got}")
        probabilities = bool((logits >= 0).all()) and bool(((logits.sum(dim=1) - 1).abs() < 1e-4).all())
        if probabilities and not torch.equal(*logits):
            raise InputError(f"{name} returns probabilities, logits are needed; pass it without its softmax")
