"""``fedftg flower new``: a Flower app for a recipe, ready for ``flwr run``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from fedftg import __version__, recipes
from fedftg import config as configs
from fedftg.config import RunConfig
from fedftg.data.sources import TENSORS
from fedftg.errors import InputError
from fedftg.flower.settings import PARTITION_FILE, AppSettings

PACKAGE = "fedftg_app"
"""The Python package inside an app."""
LICENSE = """Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
Distributed on an "AS IS" basis, without warranties or conditions of any kind, either express or implied.
"""


def new(folder: Path, recipe: str | None, overrides: Sequence[str]) -> list[Path]:
    """Writes an app into a folder, which must be new or empty; returns its files.

    ``recipe`` is a path or name, None the default one; the app's recipe holds it with the overrides.
    """
    config = configs.load(recipes.find(recipe or recipes.DEFAULT), overrides)
    if config.data.name == TENSORS:
        raise InputError("data set 'tensors' cannot be sent to nodes; take data.name = 'arrays'")
    name = re.sub(r"^[^a-z]+|[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")[:32].rstrip("-")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists already; give a new or an empty folder")
    try:
        files = _files(name or "app", config)
        (folder / PACKAGE).mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; give another path") from None
    return [folder / path for path in files]


def _files(name: str, config: RunConfig) -> dict[str, str]:
    """Returns the text of each file, by path; the recipe's paths work wherever the app runs."""
    saved: dict[str, str] = {}
    data, partition = config.data, config.partition
    if data.root is not None:
        data = data.model_copy(update={"root": data.root.resolve()})
    if partition.law == "file" and partition.file is not None:
        saved[f"{PACKAGE}/{PARTITION_FILE}"] = partition.file.read_text(encoding="utf-8")
        partition = partition.model_copy(update={"file": Path(PARTITION_FILE)})
    config = config.model_copy(update={"data": data, "partition": partition})
    return saved | {
        "pyproject.toml": _pyproject(name, config),
        "README.md": _readme(name, config),
        "LICENSE": LICENSE,
        f"{PACKAGE}/__init__.py": f'"""The Flower app {name}."""\n',
        f"{PACKAGE}/server_app.py": _app("server"),
        f"{PACKAGE}/client_app.py": _app("client"),
        f"{PACKAGE}/recipe.toml": config.to_toml(),
    }


def _app(side: str) -> str:
    where = "the SuperLink" if side == "server" else "every SuperNode"
    return f'''"""What {where} runs."""

from pathlib import Path

from fedftg.flower import {side}_app

app = {side}_app(Path(__file__).with_name("recipe.toml"))
'''


def _pyproject(name: str, config: RunConfig) -> str:
    settings = "\n".join(
        f"# {field.description}\n{field.alias} = {json.dumps(field.default)}"
        for field in AppSettings.model_fields.values()
    )
    return f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = "{config.algorithm.name} with refiner {config.refiner.name} on {config.data.name}"
license = {{ file = "LICENSE" }}
requires-python = ">=3.11"
dependencies = ["fedftg[flower]=={__version__}", "flwr>=1.41,<1.43"]

[tool.hatch.build.targets.wheel]
packages = ["{PACKAGE}"]

[tool.flwr.app]
publisher = "local"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "{PACKAGE}.server_app:app"
clientapp = "{PACKAGE}.client_app:app"

# `flwr run . -c 'KEY=VALUE KEY=VALUE'` overrides these keys. Those of the recipe go into `set`.
[tool.flwr.app.config]
{settings}
"""


def _readme(name: str, config: RunConfig) -> str:
    count = config.partition.num_clients
    plugins = "".join(f" The module `{name}` must be installed on server and nodes." for name in config.plugins)
    return f"""# {name}

A Flower app for {count} clients: {config.algorithm.name} with refiner {config.refiner.name} on data set
{config.data.name}. Every setting is in `{PACKAGE}/recipe.toml`.{plugins}

Install `fedftg[flower]` {__version__} on the server and on every node. In Flower's simulation (with
`fedftg[simulation]`), in this folder, all {count} clients on one machine:

    flwr run . --stream -c "out=\\"$PWD/runs/first\\"" \\
        --federation-config 'num-supernodes={count} client-resources-num-cpus=1'

On machines: `docs/flower.md` of fedftg, with a SuperNode for each client, its number from 0 to {count - 1}.
The same command with `resume=true` resumes a run that was stopped. Another number of clients needs a new app.
"""
