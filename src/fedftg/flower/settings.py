"""What ``flwr run -c`` and ``flower-supernode --node-config`` may set, and what both sides must agree on."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedftg import config as configs
from fedftg.config import RunConfig
from fedftg.errors import InputError, unknown

PARTITION_FILE = "partition.json"
"""A saved partition that an app carries beside its recipe."""
LOCAL_KEYS = (
    "name",
    "rounds",
    "device",
    "threads",
    "data.root",
    "data.cache",
    "partition.file",
    "checkpoint",
    "evaluation",
    "executor",
)
"""Settings of a recipe that server and nodes may have differently."""


class AppSettings(BaseModel):
    """The keys of ``[tool.flwr.app.config]``, the same for server and nodes; ``flwr run -c`` overrides them."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=lambda name: name.replace("_", "-"))

    set: str = Field(
        default="", description="overrides of the recipe, separated by blanks, such as 'rounds=50 local.lr=0.05'"
    )
    out: str = Field(
        default="", description="folder of the run, on the server; empty: runs/NAME in the server's working folder"
    )
    resume: bool = Field(default=False, description="go on with the run in 'out' from its last checkpoint")
    min_clients: int = Field(
        default=1, ge=1, description="a round needs so many usable updates, or leaves the global model as it was"
    )
    wait_seconds: float = Field(
        default=300.0, ge=0, description="the longest wait for nodes: for all before the first round, later for enough"
    )
    round_seconds: float = Field(
        default=3600.0, gt=0, description="the longest wait for a round's replies; who is later is left out"
    )
    evaluate_seconds: float = Field(
        default=600.0, gt=0, description="the longest wait for nodes that measure models on what they hold back"
    )
    server_data: str = Field(
        default="recipe",
        min_length=1,
        description="test data on the server: recipe (what the recipe names), none (accuracy is not measured), or "
        "the folder that stands for data.root there",
    )
    client_state: Literal["disk", "context"] = Field(
        default="disk",
        description="what clients keep between rounds: disk survives a restart of the node, context (Flower's "
        "Context.state) does not",
    )
    lost_memory: Literal["refuse", "reset"] = Field(
        default="refuse",
        description="a node that lost its client's memory: refuse to train, or reset it to that of a new client",
    )

    def overrides(self) -> list[str]:
        """``set`` as a list of ``key=value``; raises `InputError` where a quotation mark is left open."""
        try:
            return shlex.split(self.set)
        except ValueError as error:
            raise InputError(
                f"app config key 'set' must be key=value pairs separated by blanks, got {self.set!r} ({error}); close "
                "the quotation mark"
            ) from None


class NodeSettings(BaseModel):
    """The keys of ``--node-config`` that concern this package; others are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=lambda name: name.replace("_", "-"))

    partition_id: int = Field(ge=0, description="which client this node is, from 0; each node another one")
    data_root: str = Field(default="", description="folder that stands for data.root on this node")
    own_data: bool = Field(
        default=False, description="all training images in the data set here are this client's; nothing is divided"
    )
    state_dir: str = Field(
        default="", description="folder for the client's memory; empty: fedftg-state in the user's home"
    )
    cache: str = Field(default="", description="folder that stands for data.cache on this node")
    device: str = Field(default="", description="auto, cpu, cuda or cuda:N; empty: the recipe's")
    threads: int = Field(default=-1, ge=-1, description="CPU threads; -1: the recipe's, 0: torch's choice")

    @property
    def state_folder(self) -> Path:
        """Where the client's memory lies."""
        return Path(self.state_dir) if self.state_dir else Path.home() / "fedftg-state"


def app_settings(given: Mapping[str, Any]) -> AppSettings:
    """The settings of a run; raises `InputError` with the first thing that is wrong."""
    known = [field.alias or name for name, field in AppSettings.model_fields.items()]
    for key in given:
        if key not in known:
            raise unknown("key of the app's config", key, known)
    return configs.parse(AppSettings, dict(given), "app config")


def node_settings(given: Mapping[str, Any]) -> NodeSettings:
    """The settings of a node; raises `InputError` with the first thing that is wrong."""
    return configs.parse(NodeSettings, dict(given), "node config")


def on_server(recipe: Path, settings: AppSettings) -> RunConfig:
    """The recipe with the run's overrides, and the server's own place of the data."""
    config = _with_partition_file(configs.load(recipe, settings.overrides()), recipe)
    if settings.server_data in ("recipe", "none"):
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"root": Path(settings.server_data)})})


def on_node(recipe: Path, settings: AppSettings, node: NodeSettings) -> RunConfig:
    """The recipe with the run's overrides, and the node's own places and device."""
    given = configs.apply(configs.read_recipe(recipe), settings.overrides())
    own = {"data.root": node.data_root, "data.cache": node.cache, "device": node.device}
    pairs = [f"{key}={json.dumps(value)}" for key, value in own.items() if value]
    if node.threads >= 0:
        pairs.append(f"threads={node.threads}")
    return _with_partition_file(configs.from_mapping(configs.apply(given, pairs)), recipe)


def _with_partition_file(config: RunConfig, recipe: Path) -> RunConfig:
    """A partition that is named without a folder lies beside the recipe, wherever that was unpacked."""
    file = config.partition.file
    if file is None or file != Path(PARTITION_FILE):
        return config
    return config.model_copy(update={"partition": config.partition.model_copy(update={"file": recipe.parent / file})})


def agreement(config: RunConfig) -> str:
    """SHA-256 of the settings that server and nodes must have in common."""
    nested = config.model_dump(mode="json")
    for key in LOCAL_KEYS:
        *parents, leaf = key.split(".")
        target = nested
        for parent in parents:
            target = target[parent]
        target.pop(leaf, None)
    return hashlib.sha256(json.dumps(nested, sort_keys=True).encode()).hexdigest()
