"""Names and what they stand for, imported when first used: listing names must not wait for torch."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
from collections import UserDict
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fedftg.errors import InputError

Value = TypeVar("Value")


def lazy(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a package's ``__getattr__``: each name is imported from its module when it is first used."""

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return get


def import_user_module(name: str) -> ModuleType:
    """Imports a module that a recipe names, also from the current folder, which is not on a command's path."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0] or os.getcwd() in sys.path:
            raise
    sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    return import_module(name)


def summary(docstring: str | None) -> str:
    """Returns the first line without full stop and backquotes, and without the setting that it begins with."""
    line = re.sub(r"^``[^`]*``: ", "", (docstring or "").strip().split("\n")[0])
    return line.replace("``", "").removesuffix(".")


class Registry(UserDict[str, Value]):
    """A dictionary whose values may be given as ``"module:attribute"``; these are imported when read."""

    def __init__(self, kind: str, built_in: Mapping[str, str]) -> None:
        self._kind = kind
        self.data: dict[str, Any] = dict(built_in)

    def __getitem__(self, name: str) -> Value:
        if isinstance(entry := self.data[name], str):
            module, _, attribute = entry.partition(":")
            self.data[name] = getattr(import_module(module), attribute)
        value: Value = self.data[name]
        return value

    def about(self, name: str) -> str:
        """Returns the first line of the docstring of what a name stands for, read from its file where not imported."""
        entry = self.data[name]
        if not isinstance(entry, str):
            return summary(entry.__doc__)
        module, _, attribute = entry.partition(":")
        file = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        body = ast.parse(file.read_text("utf-8")).body
        found = (one for one in body if isinstance(one, ast.ClassDef | ast.FunctionDef) and one.name == attribute)
        return summary(ast.get_docstring(next(found)))

    def __setitem__(self, name: str, value: Value) -> None:
        """Registers a value; raises `InputError` where another one has the name."""
        if name in self and self[name] is not value:
            known = self[name]
            home = f"{getattr(known, '__module__', '')}.{getattr(known, '__qualname__', known)}"
            raise InputError(f"{self._kind} {name!r} is taken by {home}; choose another name")
        self.data[name] = value
