"""`refine`: the core for anyone's classifiers, without a federation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedftg.distill.config import DistillConfig, preset
from fedftg.distill.distiller import Progress, distil, trainable
from fedftg.distill.generator import Generator
from fedftg.distill.images import GeneratorImages
from fedftg.distill.labels import check_class_counts, class_probabilities, sample_labels
from fedftg.distill.pool import PooledImages
from fedftg.distill.teachers import Classifier, ListedTeachers, frozen
from fedftg.errors import InputError, first_line
from fedftg.params import copied, first_non_finite
from fedftg.seeds import SERVER, forked, seed_for, torch_rng


@dataclass(frozen=True)
class DistillMetrics:
    """What happened in each iteration, mean over its steps: ``(I,)`` float32 tensors on the CPU."""

    discrepancy: Tensor
    """``sum_k a_k L_md``; with a mask, what the mask leaves of it."""
    fidelity: Tensor
    """``sum_k a_k L_cls``."""
    diversity: Tensor
    """``L_dis``; 1 is a generator that makes one image."""
    batchnorm: Tensor
    """``L_bn``; 0 where ``lambda_bn`` is."""
    student: Tensor
    """The student's loss; 0 where it takes no step."""
    teacher_agreement: Tensor
    """The share of the student's images for which the weighted ensemble predicts the label they were drawn for."""

    def means(self) -> dict[str, float]:
        """Returns the mean of each metric over the iterations."""
        return {item.name: float(getattr(self, item.name).mean()) for item in fields(self)}


@dataclass(frozen=True)
class RefineResult:
    """What `refine` returns."""

    model: nn.Module
    """The refined copy of the student, in the student's mode."""
    generator: Generator
    metrics: DistillMetrics
    rolled_back: str | None
    """Why ``model`` and ``generator`` are as they were given, or None where all went well."""
    class_probabilities: Float[Tensor, " C"]
    """``p_t(y)``, from the class counts."""
    _rng: torch.Generator = field(repr=False)

    @torch.no_grad()
    def sample(
        self, n: int, labels: int | Sequence[int] | Int[Tensor, " N"] | None = None
    ) -> tuple[Float[Tensor, "N D H W"], Int[Tensor, " N"]]:
        """Returns ``n`` new synthetic images and their labels, on the generator's device.

        ``labels`` is one for all, one for each, or None: drawn from ``p_t(y)``.
        """
        if n < 1:
            raise InputError(f"n must be >= 1, got {n}; it is the number of images")
        if labels is None:
            chosen = sample_labels(self.class_probabilities[None], 1, n, rng=self._rng)[0]
        else:
            chosen = torch.as_tensor(labels).cpu()
            chosen = chosen.expand(n) if chosen.ndim == 0 else chosen
        allowed = torch.arange(self.generator.num_classes)
        if chosen.shape != (n,) or not bool(torch.isin(chosen, allowed).all()):
            raise InputError(f"labels must be one or {n} whole numbers from 0 to {len(allowed) - 1}, got {labels}")
        noise = torch.randn(n, self.generator.noise_dim, generator=self._rng)
        parameter = next(self.generator.parameters())
        chosen = chosen.to(parameter.device, torch.int64)
        images: Tensor = self.generator(noise.to(parameter.device, parameter.dtype), chosen)
        return images, chosen


@torch.inference_mode(False)  # gradients are on in here
def refine(
    student: nn.Module,
    teachers: Iterable[Classifier],
    class_counts: Num[Tensor, "K C"] | Sequence[Sequence[float] | Tensor],
    *,
    config: str | DistillConfig = "fedftg",
    generator: Generator | None = None,
    image_shape: Sequence[int] = (3, 32, 32),
    seed: int = 0,
    progress: Progress | None = None,
) -> RefineResult:
    """Returns a better copy of ``student``, distilled from ``teachers`` with no data.

    Nothing that is given is changed, nor torch's global random state. The same seed gives the same result on the same
    machine. An `InputError` says which inputs do not fit together.

    Args:
        student: a classifier from images ``(B, D, H, W)`` to logits ``(B, C)``, such as the average of the teachers.
            The work is done on its device and in its type.
        teachers: at least one classifier on the same device with the same classes; architectures may differ. Modules
            evaluate whatever their mode; a function is called as it is.
        class_counts: ``(K, C)``: how many training samples of each class each teacher has seen.
        config: the name of a preset (``fedftg``, ``paper``, ``official``), or `preset` with changes.
        generator: where to start from, such as ``result.generator`` of an earlier call; None: a new one. Its noise
            length and image shape go before ``config.noise_dim`` and ``image_shape``.
        image_shape: ``(D, H, W)`` of the classifiers' images: 1 or 3 channels, 8 to 224 pixels a side.
        progress: called as ``progress(iterations done, iterations in all)``.
    """
    settings = preset(config) if isinstance(config, str) else config
    if not isinstance(settings, DistillConfig):
        raise InputError(f"config must be a preset's name or fedftg.preset(...), got {type(settings).__name__}")
    several = isinstance(teachers, Iterable) and not isinstance(teachers, Mapping | nn.Module)
    if not several and not isinstance(teachers, nn.ModuleList):
        raise InputError(f"teachers must be a list, got {type(teachers).__name__}; pass [teacher] or list(x.values())")
    models: dict[str, Classifier] = {"student": student}
    models |= {f"teacher {k}": teacher for k, teacher in enumerate(teachers)}
    for name, model in models.items():
        if not (isinstance(model, nn.Module) if model is student else callable(model)):
            raise InputError(f"{name} must be a classifier, got {type(model).__name__}; load weights into a module")
    if isinstance(student, torch.jit.ScriptModule) or any(map(is_lazy, student.parameters())):
        raise InputError("student is a ScriptModule or has lazy layers; pass a plain nn.Module that was called once")
    if len(models) == 1:
        raise InputError("got no teacher, at least 1 is needed; pass the models to distil from")
    place = trainable(student)[0]
    counts = _counts(class_counts, len(models) - 1)
    if generator is None:
        with forked(seed_for(seed, 0, SERVER, "generator"), torch.device("cpu")):
            new = Generator(settings.noise_dim, counts.shape[1], image_shape, settings.generator_width)
    else:
        new = copy.deepcopy(generator)
    new = new.to(place)
    _check(models, torch.zeros(2, *new.image_shape).to(place), counts.shape[1])
    ensemble = ListedTeachers(list(models.values())[1:])
    start, refined = copy.deepcopy(new).eval(), copied(student)
    rng = torch_rng(seed, 0, SERVER, "refine")
    images = PooledImages(settings, GeneratorImages(settings, new))
    metrics = distil(settings, images, refined, ensemble, counts, rng=rng, progress=progress)
    broken = first_non_finite(refined.state_dict()) or first_non_finite(new.state_dict())
    return RefineResult(
        model=copied(student) if broken else refined,
        generator=start if broken else new.eval(),
        metrics=DistillMetrics(**{"batchnorm": torch.zeros_like(metrics["student"]), **metrics}),
        rolled_back=f"{broken} is not finite; lower student_lr or generator_lr" if broken else None,
        class_probabilities=class_probabilities(counts),
        _rng=torch_rng(seed, 0, SERVER, "sample"),
    )


def _counts(class_counts: Tensor | Sequence[Sequence[float] | Tensor], num_teachers: int) -> Float[Tensor, "K C"]:
    try:
        if not isinstance(class_counts, Tensor):
            class_counts = torch.stack([torch.as_tensor(row) for row in class_counts])
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"class_counts must be a table (teachers, classes) of numbers, got {error}") from None
    return check_class_counts(class_counts, num_teachers=num_teachers)


@torch.no_grad()
def _check(models: Mapping[str, Classifier], images: Tensor, num_classes: int) -> None:
    for name, model in models.items():
        try:
            broken = first_non_finite(model.state_dict()) if isinstance(model, nn.Module) else None
            logits = frozen(model)(images)
        except Exception as error:
            raise InputError(
                f"{name} does not take images of shape {tuple(images.shape)} on {images.device}: {first_line(error)}; "
                "pass the image_shape that it was trained with, and give all models one device and one type"
            ) from error
        if broken:
            raise InputError(f"{name} has values in {broken} that are not finite; leave it out, or train it anew")
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if got != (len(images), num_classes):
            raise InputError(f"{name} must return logits {(2, num_classes)}, the classes of class_counts, got {got}")
