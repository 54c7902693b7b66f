"""What ``flwr run -c`` and ``flower-supernode --node-config`` may set, and what server and nodes must agree on."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedftg import __version__
from fedftg import config as configs
from fedftg.config import RunConfig

PARTITION_FILE = "partition.json"
"""A saved partition that an app carries beside its recipe."""
LOCAL_KEYS: dict[str, Any] = {"data": {"root", "cache"}, "partition": {"file"}} | dict.fromkeys(
    ("name", "rounds", "device", "threads", "checkpoint", "evaluation", "executor", "track"), True
)
"""Settings of a recipe that may differ between server and nodes."""


class AppSettings(BaseModel):
    """The keys of ``[tool.flwr.app.config]``, the same for server and nodes; ``flwr run -c`` overrides them."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=lambda name: name.replace("_", "-"))

    set: str = Field("", description="overrides of the recipe, separated by blanks, such as 'rounds=50 local.lr=0.05'")
    out: str = Field("", description="the run folder, on the server; empty: runs/NAME in the server's working folder")
    resume: bool = Field(False, description="resume the run in 'out' from its last checkpoint")
    min_clients: int = Field(1, ge=1, description="usable updates that a round needs to change the global model")
    wait_seconds: float = Field(300.0, ge=0, description="the longest wait for nodes, before the first round and later")
    round_seconds: float = Field(3600.0, gt=0, description="the longest wait for a round's replies")
    server_data: str = Field("recipe", description="test data on the server: recipe, none, or a folder of its own")
    lost_memory: Literal["refuse", "reset"] = Field(
        "refuse", description="a node that lost its client's memory: refuse to train, or reset it to a new client's"
    )


class NodeSettings(BaseModel):
    """The keys of ``--node-config`` that concern this package (see docs/flower.md); others are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=lambda name: name.replace("_", "-"))

    partition_id: int = Field(ge=0)
    data_root: str = ""
    own_data: bool = False
    state_dir: str = ""
    cache: str = ""
    device: str = ""
    threads: int = Field(-1, ge=-1)
    """-1: the recipe's."""


def on_server(recipe: Path, settings: AppSettings) -> RunConfig:
    """Returns the recipe with the run's overrides, and the server's own place of the data."""
    root = "" if settings.server_data in ("recipe", "none") else settings.server_data
    return _config(recipe, settings, {"data.root": root})


def on_node(recipe: Path, settings: AppSettings, node: NodeSettings) -> RunConfig:
    """Returns the recipe with the run's overrides, and the node's own places and device."""
    own: dict[str, Any] = {"data.root": node.data_root, "data.cache": node.cache, "device": node.device}
    if node.threads >= 0:
        own["threads"] = node.threads
    return _config(recipe, settings, own)


def _config(recipe: Path, settings: AppSettings, own: Mapping[str, Any]) -> RunConfig:
    pairs = [f"{key}={json.dumps(value)}" for key, value in own.items() if value != ""]
    config = configs.load(recipe, [*shlex.split(settings.set), *pairs])
    if config.partition.file != Path(PARTITION_FILE):
        return config
    # A partition that is named without a folder lies beside the recipe, wherever that was unpacked.
    beside = config.partition.model_copy(update={"file": recipe.parent / PARTITION_FILE})
    return config.model_copy(update={"partition": beside})


def agreement(config: RunConfig) -> str:
    """Returns the SHA-256 of what server and nodes must have in common: settings and version of fedftg."""
    common = [__version__, config.model_dump(mode="json", exclude=LOCAL_KEYS)]
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()
