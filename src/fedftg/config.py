"""The settings of a run: TOML in and out, ``--set``, and one line for whatever is wrong with them."""

from __future__ import annotations

import copy
import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from fedftg.algorithms.base import AlgorithmConfig, RefinerConfig
from fedftg.algorithms.registry import ALGORITHMS, REFINERS
from fedftg.data.config import DataConfig, PartitionConfig
from fedftg.data.sources import SOURCES
from fedftg.engine.evaluate import EvaluationConfig
from fedftg.engine.executors import INTERCHANGEABLE, ExecutorConfig
from fedftg.engine.local_train import LocalConfig
from fedftg.engine.sampling import CohortConfig
from fedftg.errors import InputError, explain, first_line, flat, unknown
from fedftg.models.registry import ModelConfig
from fedftg.registry import import_user_module
from fedftg.track import TrackConfig

Section = TypeVar("Section", bound=BaseModel)


class CheckpointConfig(BaseModel):
    """How often a checkpoint is written."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    every: int = Field(default=1, ge=1, description="write a checkpoint every N rounds and after the last one")


def _named(key: str, table: Mapping[str, type[Section]], default: str, given: Any) -> Any:
    """Parses ``{name = "fedprox", mu = 0.1}`` by the settings class registered under the name, or the default's."""
    if not isinstance(given, Mapping):
        return given
    name = str(given.get("name", default))
    if name not in table:
        raise unknown(f"{key}.name", name, table)
    return parse(table[name], given, key)


def _refiner(given: Any, info: ValidationInfo) -> Any:
    data, algorithm = info.data.get("data"), info.data.get("algorithm")  # validated before; missing where wrong
    name = given.get("name", "fedftg") if isinstance(given, Mapping) else None
    if data is not None and algorithm is not None and isinstance(name, str) and name in REFINERS:
        source = SOURCES.get(data.name)
        known = {"num_classes": source.num_classes if source else None, "algorithm": algorithm.name}
        given = {**REFINERS[name].defaults(given, **known), **given}
    return _named("refiner", REFINERS, "fedftg", given)


class RunConfig(BaseModel):
    """One experiment. The defaults are those of a run without recipe, apart from the recipe's own values."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(
        default="run",
        pattern=r"^\w[\w.+=-]*$",
        description="letters, digits and . _ + = -; the first is a letter, a digit or _",
    )
    seed: int = Field(default=0, ge=0, description="the only source of randomness")
    rounds: int = Field(default=20, ge=1)
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0 leaves it to torch and OMP_NUM_THREADS")
    plugins: tuple[str, ...] = Field(default=(), description="modules to import first: algorithms, refiners")
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    cohort: CohortConfig = CohortConfig()
    model: ModelConfig = ModelConfig()
    algorithm: Annotated[
        SerializeAsAny[AlgorithmConfig], BeforeValidator(partial(_named, "algorithm", ALGORITHMS, "fedavg"))
    ] = Field(default={}, validate_default=True)
    refiner: Annotated[SerializeAsAny[RefinerConfig], BeforeValidator(_refiner)] = Field(
        default={}, validate_default=True
    )
    local: LocalConfig = LocalConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    executor: ExecutorConfig = ExecutorConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _check_own_models(self) -> RunConfig:
        got = self.rounds, self.algorithm.name, getattr(self.refiner, "start", None)
        if self.model.clients and got != (1, "fedavg", "fresh"):
            raise ValueError(
                "model.clients cannot be averaged: they need rounds = 1, algorithm.name = fedavg and refiner.start = "
                f"fresh (leaves, feddf, dafl, adi, dense, coboosting, dfrd have it), got {got[0]}, {got[1]}, {got[2]}"
            )
        return self

    def to_toml(self) -> str:
        """Returns every setting, also those left at their default, as TOML; what has no value is left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def parse(cls: type[Section], given: Mapping[str, Any], prefix: str = "") -> Section:
    """Validates settings; raises `InputError` with the first thing that is wrong, in one line."""
    try:
        return cls.model_validate(given)
    except ValidationError as error:
        raise explain(error, cls, prefix) from None


def load(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns a recipe with ``key=value`` overrides applied.

    Choosing another ``algorithm.name`` or ``refiner.name`` drops the recipe's other settings of that section, because
    they belong to the one that it named.

    Raises:
        InputError: missing file, no TOML, unknown key, wrong type, impossible value.
    """
    given = read_recipe(path) if path is not None else {}
    return from_mapping(apply(given, overrides))


def from_mapping(given: Mapping[str, Any]) -> RunConfig:
    """Imports the plugins of nested settings and returns their config."""
    plugins = given.get("plugins", ())
    for module in plugins if isinstance(plugins, list | tuple) else ():
        try:
            import_user_module(module)
        except Exception as error:
            raise InputError(
                f"plugin {module!r} cannot be imported ({first_line(error)}); start in its folder, or install it"
            ) from error
    return parse(RunConfig, given)


def read_recipe(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns the settings of a recipe; ``extends = "other.toml"`` lays them over those of a recipe beside it.

    The run's ``name`` is that of the file, unless the recipe gives one.
    """
    if path.resolve() in seen:
        raise InputError(f"recipe {path}: extends leads in a circle; name another recipe")
    layer = {"name": path.stem, **read_toml(path)}
    if "extends" not in layer:
        return layer
    base = read_recipe(path.parent / str(layer.pop("extends")), (*seen, path.resolve()))
    pairs = [
        (f"{key}.{leaf}", value) for key in layer if isinstance(layer[key], dict) for leaf, value in layer[key].items()
    ]
    return _lay_over(base, pairs + [(key, value) for key, value in layer.items() if not isinstance(value, dict)])


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the content of a TOML file; raises `InputError` where there is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read recipe {path}: {error.strerror}; 'fedftg list' has the names") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is not valid TOML: {error}") from None


def apply(given: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns nested settings with ``a.b=value`` applied; values are TOML where they parse, else plain strings."""
    return _lay_over(given, [_split(override) for override in overrides])


def _lay_over(given: Mapping[str, Any], pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = copy.deepcopy(dict(given))
    named = result.get("algorithm")
    algorithm = named.get("name") if isinstance(named, dict) else None
    for key, value in pairs:
        section = key.removesuffix(".name")
        if section in ("algorithm", "refiner") and section != key:
            current = result.get(section)
            if isinstance(current, dict) and current.get("name", value) != value:
                result[section] = {}
        refiner = result.get("refiner")
        if isinstance(refiner, dict) and (key.startswith("refiner.") or key == "algorithm.name"):
            chosen = REFINERS.get(str(refiner.get("name", "fedftg")), RefinerConfig)
            old = chosen.defaults(refiner, algorithm=algorithm)
            algorithm = value if key == "algorithm.name" else algorithm
            changed = {**refiner, key.removeprefix("refiner."): value} if key != "algorithm.name" else refiner
            if chosen.defaults(changed, algorithm=algorithm) != old:
                result["refiner"] = {k: v for k, v in refiner.items() if k not in old or old[k] != v}
        other = {"cohort.size": "probability", "cohort.probability": "size"}.get(key)
        if other and isinstance(result.get("cohort"), dict):
            result["cohort"].pop(other, None)
    for key, value in pairs:
        target = result
        *parents, leaf = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise InputError(f"cannot set {key}: {parent!r} is a single value and has no keys below it")
        target[leaf] = value
    return result


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set needs key=value, got {override!r}; for example --set rounds=50")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    return key.strip(), value


def sweep(overrides: Sequence[str], seeds: Sequence[int] = ()) -> list[tuple[str, list[str]]]:
    """Returns the product of ``a.b=value,value`` and of seeds: for each the end of a run's name, and its overrides.

    A value with a comma that is TOML (a quoted string, a list) or starts like a list is one value.
    """
    choices: list[list[tuple[str, str]]] = []
    for override in overrides:
        key, value = _split(override)
        text = override.partition("=")[2].strip()
        if isinstance(value, str) and "," in text and text[0] not in "\"'[{":
            *_, leaf = key.split(".")
            leaf = "" if leaf == "name" else leaf
            choices.append([(f"-{leaf}{part.strip()}", f"{key}={part.strip()}") for part in value.split(",")])
        else:
            choices.append([("", override)])
    choices.append([(f"-s{seed}", f"seed={seed}") for seed in seeds] or [("", "")])
    found = itertools.product(*choices)
    return [
        (re.sub(r"[^\w.+=-]", "_", "".join(end for end, _ in one)), [override for _, override in one if override])
        for one in found
    ]


RESUME_MAY_CHANGE = (
    "name", "rounds", "device", "data.root", "data.cache", "checkpoint", "evaluation.targets", "threads", "track",
)  # fmt: skip
"""What may differ when a run is resumed, besides executors with the same numbers.

Another device or number of threads rounds differently: the resumed run then differs in the last bits.
"""


def check_resumable(before: RunConfig, now: RunConfig) -> None:
    """Raises InputError where resuming with ``now`` would make another experiment of the run."""
    key = first_difference(before, now)
    if key is not None:
        may = ", ".join(RESUME_MAY_CHANGE)
        raise InputError(f"--resume cannot change {key}; only {may} may change; start a new run for the rest")


def first_difference(before: RunConfig, now: RunConfig) -> str | None:
    """Returns the first setting that makes two configs different experiments, or None."""
    left, right = (flat(config.model_dump(mode="json")) for config in (before, now))
    same_numbers = {before.executor.name, now.executor.name} <= set(INTERCHANGEABLE)
    may_change = (*RESUME_MAY_CHANGE, "executor") if same_numbers else RESUME_MAY_CHANGE
    for key in sorted({*left, *right}):
        allowed = any(key == may or key.startswith(may + ".") for may in may_change)
        if not allowed and left.get(key) != right.get(key):
            return key
    return None
