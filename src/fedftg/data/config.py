"""Settings of data, and of how it is partitioned among clients."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class DataConfig(BaseModel):
    """Which images are used. The defaults need no download and no folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(default="digits", description="data set by name (see 'fedftg list')")
    root: Path | None = Field(
        default=None, description="folder (arrays: file) of the data; unset: download from the hub"
    )
    hub_id: str | None = Field(default=None, description="data.name = 'hub' only: the data set's id, as owner/name")
    subset: str | None = Field(default=None, description="the hub's configuration of a data set, where it has several")
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub; unset: the newest")
    train_split: str | None = Field(default=None, description="the training split; unset: train")
    test_split: str | None = Field(default=None, description="the test split; unset: test, valid, validation or val")
    test_share: float = Field(default=0.0, ge=0, lt=1, description="share held out where there is no test split")
    image_column: str | None = Field(default=None, description="column of the images, where several could be it")
    label_column: str | None = Field(default=None, description="column of the labels, where several could be it")
    renumber_labels: bool = Field(default=False, description="number integer labels from 0, in ascending order")
    image_size: int | None = Field(
        default=None, ge=8, le=1024, description="side in pixels that all images are resized to; unset: as stored"
    )
    resize: Literal["crop", "stretch"] = Field(
        default="crop", description="crop: the shorter side becomes image_size, the middle is kept; stretch: both do"
    )
    max_train: int | None = Field(default=None, ge=1, description="at most N training images, stratified; unset: all")
    max_test: int | None = Field(default=None, ge=1, description="at most N test images, stratified; unset: all")
    augment: Literal["default", "none", "flip", "crop", "flip_crop"] = Field(
        default="default", description="augmentation of training images; default suits the data set (docs/data.md)"
    )
    cache: str = Field(
        default="auto", pattern=r"\S", description="folder of decoded images; auto: FEDFTG_CACHE or the user's; or none"
    )


Law = Literal["iid", "dirichlet", "class_dirichlet", "pathological", "shards", "quantity", "domain", "natural", "file"]


class PartitionConfig(BaseModel):
    """Who holds what. The law and its default are those of the paper's CIFAR experiments (alpha 0.3)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    law: Law = Field(
        default="dirichlet",
        description="who holds what (docs/data.md); linear, square, exponential were removed: take quantity",
    )
    num_clients: int = Field(default=20, ge=1, description="1 is central training; not used by laws natural and file")
    alpha: float = Field(
        default=0.3, gt=0, description="laws dirichlet, class_dirichlet, quantity: 0.1 is very skewed, 100 nearly IID"
    )
    sizes: Literal["equal", "lognormal"] = Field(
        default="equal", description="laws iid and dirichlet: samples per client, all equal or log-normal with sigma"
    )
    sigma: float = Field(
        default=0.0, ge=0, description="standard deviation of log sizes; above 2 a few clients hold nearly all"
    )
    min_samples: int = Field(default=0, ge=0, description="law class_dirichlet: least samples of a client, in 10 draws")
    classes_per_client: int = Field(default=2, ge=1, description="law pathological: classes that each client holds")
    shards_per_client: int = Field(default=2, ge=1, description="law shards: blocks of the data sorted by class")
    column: str | None = Field(default=None, description="laws domain and natural: the data set's column that decides")
    file: Path | None = Field(default=None, description="law file: JSON with one list of training rows a client")
    feature_noise: float = Field(
        default=0.0, ge=0, description="standard deviation of noise on the last client; lower numbers scale linearly"
    )
    test_share: float = Field(
        default=0.0, ge=0, lt=1, description="share of each client's samples held back, for accuracy per client"
    )
    unlabelled_share: float = Field(
        default=0.0, ge=0, lt=1, description="share of the training images that no client gets, for refiner.proxy"
    )

    @model_validator(mode="after")
    def _settings_fit_the_law(self) -> PartitionConfig:
        if self.sigma > 0 and self.sizes == "equal":
            raise ValueError(f"sigma {self.sigma} has no effect with sizes 'equal'; set sizes to 'lognormal'")
        if self.sizes == "lognormal" and self.law not in ("iid", "dirichlet"):
            raise ValueError(f"sizes 'lognormal' goes with law iid or dirichlet, got {self.law}")
        needed = {"domain": "column", "natural": "column", "file": "file"}.get(self.law)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"law {self.law} needs partition.{needed}")
        if self.law == "file" and self.unlabelled_share:
            raise ValueError("unlabelled_share does not go with law file; leave the rows out of the file instead")
        return self
