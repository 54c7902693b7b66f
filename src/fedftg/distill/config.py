"""`DistillConfig` and its presets: ``paper``, ``official`` (the public code), ``fedftg`` (ours). Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedftg.errors import explain, unknown
from fedftg.precision import MemoryFormat, Precision

Discrepancy = Literal["kl", "l1_logits"]
FidelityWeighting = Literal["sample", "batch_mean"]
StudentLoss = Literal["kl", "soft_cross_entropy"]
LabelSampling = Annotated[
    Literal["iid", "proportional", "uniform"],
    Field(description="iid: from p_t(y); proportional: laid out by proportion, shuffled; uniform: over held classes"),
]
EnsembleWeighting = Literal["class", "samples", "uniform"]


class StudentConfig(BaseModel):
    """How a student learns from its teachers, on images of any source."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    iterations: int = Field(default=10, ge=1, description="I: batches of new images in one call")
    batch_size: int = Field(default=50, ge=2, description="images in a batch; 2 or more, to have pairs")
    student_steps: int = Field(default=5, ge=0, description="I_d: student steps on each batch; 0: the generator only")
    student_loss: StudentLoss = Field(
        default="kl",
        description="kl: mean over the batch; soft_cross_entropy: mean over batch and classes, C times weaker",
    )
    student_optimizer: Literal["sgd", "adam"] = Field(
        default="sgd", description="of the student, rebuilt in every call; adam takes no momentum"
    )
    student_lr: float = Field(default=0.1, ge=0, description="rate of the student before decay; 0 leaves it as it is")
    student_schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="of the student's rate in a call: cosine falls to 0 over its iterations"
    )
    student_weight_decay: float = Field(default=1e-3, ge=0, description="weight decay of the student")
    student_momentum: float = Field(default=0.0, ge=0, lt=1, description="momentum of the student's SGD")
    student_mode: Literal["train", "eval"] = Field(
        default="train", description="eval: BatchNorm of the student uses and keeps its real statistics, dropout is off"
    )
    lr_decay: float = Field(default=0.998, gt=0, le=1, description="factor on both rates per round; 1 keeps them")

    ensemble: EnsembleWeighting = Field(
        default="class", description="weights of the teachers: class is a_k(y), samples by their data, uniform 1/K"
    )
    ensemble_epsilon: float = Field(
        default=0.0, ge=0, description="added to a class's total in a_k(y); 1e-6 in the public code: the last bit only"
    )
    ensemble_mean: Literal["probabilities", "logits"] = Field(
        default="probabilities", description="what of the teachers is averaged; logits: the softmax of their mean"
    )
    teacher_prior_tau: float = Field(
        default=0.0,
        ge=0,
        description="share of its log label prior that is taken out of each teacher's logits; 0 is off",
    )
    temperature: float = Field(default=1.0, gt=0, description="divides logits in L_md (kl), ensemble and student loss")
    teacher_chunk: int = Field(
        default=0,
        ge=0,
        description="teachers whose graphs are in memory at a time, same numbers up to rounding; 0 means all up to 32",
    )
    precision: Precision = Field(
        default="float32",
        description="bfloat16: mixed precision of teachers, student and generator (weights and losses stay float32), "
        "on hardware that has it; auto takes it where available",
    )
    memory_format: MemoryFormat = Field(
        default="contiguous",
        description="layout of images and feature maps; channels_last is faster on many CPUs, a generator above all",
    )

    pool_size: int = Field(
        default=0, ge=0, description="images kept (fedftg: over rounds) and shown again after each new batch; 0 is off"
    )
    pool_refresh: float = Field(
        default=0.1, ge=0, le=1, description="share of a full pool, the oldest, that the images of a call replace"
    )
    pool_batches: int = Field(
        default=1, ge=1, description="batches of the pool after each new one; student_steps are taken on each"
    )
    pool_augment: Literal["none", "flip", "crop", "flip_crop"] = Field(
        default="flip_crop", description="random changes of a batch of the pool, those of data.augment"
    )


class GeneratorConfig(StudentConfig):
    """How a generator is built and trained, whose images the student sees."""

    generator_steps: int = Field(default=1, ge=1, description="I_g: generator steps on each batch")
    generator_lr: float = Field(default=0.01, ge=0, description="rate of the generator's Adam before decay")
    generator_width: int = Field(default=64, ge=1, description="channels of the generator after its second upsampling")
    noise_dim: int = Field(default=100, ge=1, description="length of the noise z; FedFTG's code: 256 for 100 classes")


class DistillConfig(GeneratorConfig):
    """Every choice of the fine-tuning. Defaults: the paper; where it is silent (rates, widths) its public code."""

    discrepancy: Discrepancy = Field(
        default="kl",
        description="L_md: kl is KL(teacher || student), l1_logits the mean absolute difference of the logits",
    )
    discrepancy_mask: Literal["none", "transferable"] = Field(
        default="none",
        description="transferable: L_md counts only samples on which the weighted ensemble predicts the drawn label "
        "and the student does not (DFRD, NeurIPS 2023)",
    )
    teacher_gradient: Literal["full", "detached"] = Field(
        default="full", description="detached: the gradient of L_md reaches the generator through the student only"
    )
    fidelity_weighting: FidelityWeighting = Field(
        default="sample",
        description="L_cls: sample weights each sample by a_k(y), batch_mean weights a teacher's batch mean",
    )
    generator_update: Literal["joint", "per_client"] = Field(
        default="joint",
        description="joint: one step on the sum over teachers; per_client: one Adam step per teacher in turn",
    )
    label_sampling: LabelSampling = "iid"

    lambda_md: float = Field(default=1.0, ge=0, description="weight of L_md; 0 switches hard sample mining off")
    lambda_cls: float = Field(default=1.0, ge=0, description="weight of L_cls; 0 lets images look like no class")
    lambda_dis: float = Field(
        default=1.0, ge=0, description="weight of L_dis; 0 lets images of a class collapse into one"
    )
    lambda_bn: float = Field(
        default=0.0, ge=0, description="weight of L_bn: images with the teachers' BatchNorm statistics (DeepInversion)"
    )

    generator_optimizer_state: Literal["reset", "kept"] = Field(
        default="reset", description="kept: Adam's moments survive from call to call"
    )


_OFFICIAL: dict[str, Any] = {
    "discrepancy": "l1_logits",
    "teacher_gradient": "detached",
    "fidelity_weighting": "batch_mean",
    "generator_update": "per_client",
    "student_loss": "soft_cross_entropy",
    "label_sampling": "proportional",
    "ensemble_epsilon": 1e-6,
}

# Chosen by pilots on CIFAR-10, docs/results.md; in a federation, more goes with it: fedftg.algorithms.fedftg.
_FEDFTG: dict[str, Any] = {
    "generator_steps": 2,
    "generator_lr": 0.003,
    "generator_optimizer_state": "kept",
    "student_lr": 0.03,
    "student_mode": "eval",
    "label_sampling": "uniform",
}

PRESETS: dict[str, DistillConfig] = {
    "paper": DistillConfig(),
    "official": DistillConfig(**_OFFICIAL),
    "fedftg": DistillConfig(**_FEDFTG),
}
ABOUT = {  # what fedftg list says
    "paper": "the losses and settings of the paper (Zhang et al., CVPR 2022)",
    "official": "the authors' public code, operation by operation",
    "fedftg": "ours, the default: fewer generator steps, a lower rate, a generator that keeps its moments",
}


def preset(name: str, **overrides: Any) -> DistillConfig:
    """Returns the preset called ``name``, with some fields changed; an `InputError` names a wrong one."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    try:
        return DistillConfig(**{**PRESETS[name].model_dump(), **overrides})
    except ValidationError as error:
        raise explain(error, DistillConfig) from None
