"""What a user may choose about data and how it is divided among clients."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class DataConfig(BaseModel):
    """Which images are used. The defaults need no download and no folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(
        default="digits",
        description="data set: digits, mnist5k, cifar10, cifar100, cifar100_coarse, or parquet for any folder",
    )
    root: Path | None = Field(
        default=None,
        description="folder with train-*.parquet and test-*.parquet (or valid-*, validation-*), directly or in data/; "
        "not used by the built-in sets digits and mnist5k",
    )
    image_column: str | None = Field(
        default=None, description="column that holds the images; needed only where several columns could be it"
    )
    label_column: str | None = Field(
        default=None, description="column that holds the integer labels; needed only where several columns could be it"
    )
    max_train: int | None = Field(
        default=None, ge=1, description="use so many training images, the same in every run; none uses all"
    )
    max_test: int | None = Field(
        default=None, ge=1, description="use so many test images, the same in every run; none uses all"
    )
    augment: Literal["default", "none", "flip_crop"] = Field(
        default="default",
        description="random changes of training images; default is flip_crop for CIFAR and none for all others",
    )


class PartitionConfig(BaseModel):
    """Who holds what. The law and its default are those of the paper's CIFAR experiments (alpha 0.3)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    law: Literal["iid", "dirichlet"] = Field(
        default="dirichlet", description="iid: shuffled slices; dirichlet: each client has its own class proportions"
    )
    num_clients: int = Field(default=20, ge=1, description="1 is central training; at most one client per sample")
    alpha: float = Field(
        default=0.3,
        gt=0,
        allow_inf_nan=False,
        description="concentration of the Dirichlet law; 0.1 is very skewed, 100 nearly IID; not used by law iid",
    )
    sizes: Literal["equal", "lognormal"] = Field(
        default="equal", description="how many samples the clients hold: all the same, or log-normal with sigma"
    )
    sigma: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="spread of log-normal sizes; 0 gives equal sizes, 1 about a factor of 7 between "
        "the middle two thirds of the clients, above 2 few clients hold nearly everything",
    )

    @model_validator(mode="after")
    def _sigma_is_used(self) -> PartitionConfig:
        if self.sigma > 0 and self.sizes == "equal":
            raise ValueError(
                f"sigma {self.sigma} has no effect with sizes 'equal'; set sizes to 'lognormal', or sigma to 0"
            )
        return self
