"""The errors that a user sees as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong input from the user: the message says what was got, what is allowed and what to do. Exit status 2."""


class ClientError(RuntimeError):
    """A client's work failed for a reason that is not the user's input; names round, client and stage."""

    def __init__(self, round: int, client: int, stage: str, cause: BaseException) -> None:
        super().__init__(f"round {round}, client {client}, {stage}: {type(cause).__name__}: {cause}")


def unknown(kind: str, got: str, allowed: Iterable[str]) -> InputError:
    """``unknown model 'restnet18'; did you mean 'resnet18'? allowed: cnn, lenet, ...``"""
    names = sorted(allowed)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {kind} {got!r}; {hint}allowed: {', '.join(names)}")
