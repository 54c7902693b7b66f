"""Where a strategy stands after a round, on disk: one safetensors file of values and one JSON file that names it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedftg.errors import InputError
from fedftg.params import Params, prefixed, unprefixed
from fedftg.rundir.records import finite, write_json
from fedftg.rundir.tensors import read_tensors, write_tensors

_FORMAT = 2
_INDEX = "fedftg.json"
_PARTS = ("arrays", "refiner", "base")


@dataclass(frozen=True)
class StrategyState:
    """All that a resumed run needs on the server."""

    round: int
    """How many rounds are done."""
    arrays: Params
    """The global model under the names of the deployment's arrays."""
    refiner: Params
    """The generator, and Adam's moments where they are kept."""
    base: Params
    """What the base strategy keeps from round to round."""
    went_well: bool
    """Whether a round had an aggregate and a teacher yet."""


def save(folder: Path, state: StrategyState, settings: dict[str, Any]) -> None:
    """Writes a state and makes it the one to resume from; on return it is on disk and the one before is gone.

    Whenever the process dies, the JSON file names a whole state.

    Args:
        folder: made where it is not there; of one run.
        state: what to keep.
        settings: a run with others is not resumed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"fedftg-{state.round:06d}.safetensors"
    tensors: Params = {}
    for part in _PARTS:
        tensors |= prefixed(getattr(state, part), part + "/")
    write_tensors(folder / name, tensors)
    index = {"format": _FORMAT, "round": state.round, "went_well": state.went_well, "state": name}
    write_json(folder / _INDEX, {**index, "settings": settings})
    for path in folder.glob("fedftg-*.safetensors*"):
        if path.name != name:
            path.unlink()


def load(folder: Path, settings: dict[str, Any]) -> StrategyState | None:
    """The last whole state, or None where none was written yet.

    Raises:
        InputError: a file is missing or torn, or the state is of a run with other settings.
    """
    path = folder / _INDEX
    if not path.exists():
        return None
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = index.get("format")
        if version != _FORMAT:
            raise InputError(f"{path} has format {version}, this version reads {_FORMAT}; use its version")
        number, name, saved = int(index["round"]), str(index["state"]), dict(index["settings"])
        went_well = bool(index["went_well"])
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); empty the folder to start anew") from error
    saved, here = _flat(saved), _flat(json.loads(json.dumps(finite(settings))))
    for key in (*here, *saved):
        if saved.get(key) != here.get(key):
            raise InputError(
                f"{path} is of a run with {key} = {saved.get(key)}, this one has {here.get(key)}; use the same, or "
                "another folder"
            )
    tensors = read_tensors(folder / Path(name).name)
    arrays, refiner, base = (unprefixed(tensors, part + "/") for part in _PARTS)
    return StrategyState(number, arrays, refiner, base, went_well)


def check_settings(settings: dict[str, Any]) -> None:
    """Refuses settings that cannot be kept, which only a strategy of someone else's gives.

    Raises:
        InputError: they are not what JSON takes.
    """
    try:
        json.dumps(finite(settings))
    except (TypeError, ValueError) as error:
        raise InputError(f"resume_settings() must give what JSON takes: {error}") from None


def _flat(nested: Any, name: str = "") -> dict[str, Any]:
    """Each value under the way to it, such as ``base strategy.0.eta``."""
    if not isinstance(nested, dict | list):
        return {name: nested}
    items = nested.items() if isinstance(nested, dict) else enumerate(nested)
    found: dict[str, Any] = {}
    for key, value in items:
        found |= _flat(value, f"{name}.{key}" if name else str(key))
    return found
