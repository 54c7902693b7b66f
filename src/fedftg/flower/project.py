"""``fedftg flower new``: a Flower app for a recipe, ready for ``flwr run``."""

from __future__ import annotations

import re
import textwrap
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


def new(folder: Path, recipe: str | None, overrides: Sequence[str]) -> list[Path]:
    """Writes an app into a new folder; returns its files.

    Args:
        folder: must not exist yet, or be empty.
        recipe: path or name of a recipe; None: the default one.
        overrides: ``"key=value"`` strings; the app's recipe holds the result.

    Raises:
        InputError: the folder is taken or cannot be written, or the recipe is wrong.
    """
    config = configs.load(recipes.find(recipe or recipes.DEFAULT), overrides)
    if config.data.name == TENSORS:
        raise InputError("data set 'tensors' cannot be sent to nodes; take data.name = 'arrays'")
    counted = config.partition.law not in ("natural", "file")
    if counted and config.cohort.size is not None and config.cohort.size > config.partition.num_clients:
        most = config.partition.num_clients
        raise InputError(f"cohort.size must be <= partition.num_clients, {most}, got {config.cohort.size}; set both")
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")
    files = _files(name or "app", config)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists already; give a new or an empty folder")
    try:
        (folder / PACKAGE).mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; give another folder") from None
    return [folder / path for path in files]


def _files(name: str, config: RunConfig) -> dict[str, str]:
    """Returns the text of each file, by path; the recipe's paths hold wherever the app runs."""
    saved: dict[str, str] = {}
    data, partition = config.data, config.partition
    if data.root is not None:
        data = data.model_copy(update={"root": data.root.resolve()})
    if partition.law == "file" and partition.file is not None:
        try:
            saved[f"{PACKAGE}/{PARTITION_FILE}"] = partition.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read partition.file {partition.file} ({type(error).__name__})") from None
        partition = partition.model_copy(update={"file": Path(PARTITION_FILE)})
    config = config.model_copy(update={"data": data, "partition": partition})
    return saved | {
        "pyproject.toml": _pyproject(name, config),
        "README.md": _readme(name, config),
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
    lines = []
    for field in AppSettings.model_fields.values():
        value = field.default
        shown = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else value
        lines += [f"# {line}" for line in textwrap.wrap(str(field.description), 100)]
        lines.append(f"{field.alias} = {shown}")
    settings = "\n".join(lines)
    return f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = "{config.algorithm.name} with refiner {config.refiner.name} on {config.data.name}"
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = ["fedftg[flower]=={__version__}"]

[tool.hatch.build.targets.wheel]
packages = ["{PACKAGE}"]

[tool.flwr.app]
publisher = "local"

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

Install `fedftg[flower]` {__version__} on the server and on every node, and `fedftg[simulation]` where you simulate.
In Flower's simulation, in this folder, all {count} clients on one machine (`pkill -f flower-superlink` ends the
SuperLink that it starts):

    flwr run . --stream -c "out=\\"$PWD/runs/first\\"" \\
        --federation-config 'num-supernodes={count} client-resources-num-cpus=1'

On machines: a SuperLink, and one SuperNode for each client with its number from 0 to {count - 1}:

    flower-superlink --insecure --host 0.0.0.0 --port 8000
    flower-supernode --insecure --superlink SERVER:8000 --port 8001 --node-config 'partition-id=0'
    flwr run . NAME --stream -c 'out="/folder/on/the/server"'

`NAME` is the SuperLink in Flower's own `config.toml`:

    [superlink.NAME]
    address = "SERVER:8000"
    insecure = true

The same command with `resume=true` resumes a run that was stopped. Another number of clients needs a new app.
`docs/flower.md` of fedftg describes TLS, authentication of nodes, machines without a network, and every setting.
"""
