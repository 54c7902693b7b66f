"""The errors that a user sees as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails


class InputError(ValueError):
    """Wrong input from the user: the message says what was got, what is allowed and what to do. Exit status 2."""


class ClientError(RuntimeError):
    """A client's training failed for a reason other than the user's input; names round, client and stage."""

    def __init__(self, round: int, client: int, stage: str, cause: BaseException) -> None:
        super().__init__(f"round {round}, client {client}, {stage}: {type(cause).__name__}: {cause}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _client_error, self.args


def _client_error(message: str) -> ClientError:
    """Returns the error that another process raised."""
    error = ClientError.__new__(ClientError)
    error.args = (message,)
    return error


def first_line(error: BaseException) -> str:
    """Returns the class and the first line of an error's message: ``KeyError: 'head'``."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings as ``{"local.lr": 0.1, ...}``."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def unknown(kind: str, got: str, allowed: Iterable[str]) -> InputError:
    """Returns an error such as ``unknown model 'restnet18'; did you mean 'resnet18'? allowed: cnn, lenet, ...``."""
    names = sorted(allowed)
    # Only what comes after the last point is compared: 'algorithm.mu' is not like 'algorithm.name'.
    leaves = {name.rpartition(".")[2]: name for name in names} if "." in got else {name: name for name in names}
    near = difflib.get_close_matches(got.rpartition(".")[2], leaves, n=1, cutoff=0.5)
    hint = f"did you mean {leaves[near[0]]!r}? " if near else ""
    return InputError(f"unknown {kind} {got!r}; {hint}allowed: {', '.join(names)}")


def explain(error: ValidationError, cls: type[BaseModel], prefix: str = "") -> InputError:
    """Returns the first problem that pydantic found, as one line with got, allowed and what to do."""
    problems = error.errors(include_url=False)
    first = problems[0]
    cause = first.get("ctx", {}).get("error")
    path = ".".join(str(part) for part in (prefix, *first["loc"]) if part != "")
    if isinstance(cause, InputError):
        return cause
    if isinstance(cause, Exception):
        return InputError(str(cause) if not first["loc"] else f"{path}: {cause}")
    owner, field = _owner(cls, first["loc"])
    if first["type"] == "extra_forbidden":
        parent = path.rpartition(".")[0]
        keys = [f"{parent}.{key}" if parent else key for key in owner.model_fields]
        return unknown("key", path, keys)
    description = field.description if field is not None else None
    if first["type"] == "string_pattern_mismatch" and description:
        return InputError(f"{path} must be {description}; got {first['input']!r}")
    hint = f"; {description}" if description else ""
    return InputError(f"{path} must be {_allowed(first)}, got {first['input']!r}{hint}")


_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a string",
    "tuple": "a list",
    "dict": "a section of keys",
    "model": "a section of keys",
    "path": "a path",
}


def _allowed(problem: ErrorDetails) -> str:
    """Returns what pydantic would have accepted, in words that need no Python."""
    plain = problem["msg"].removeprefix("Input should be ")
    plain = plain.replace("greater than", ">").replace("less than", "<").replace(" or equal to", "=")
    return next((word for kind, word in _TYPES.items() if problem["type"].startswith(f"{kind}_")), plain)


def _owner(cls: type[BaseModel], location: tuple[int | str, ...]) -> tuple[type[BaseModel], FieldInfo | None]:
    """Returns the settings class that holds the last part of a location, and its field, where it has one."""
    owner = cls
    for part in location[:-1]:
        field = owner.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return owner, field
        owner = field.annotation
    return owner, owner.model_fields.get(str(location[-1])) if location else None
