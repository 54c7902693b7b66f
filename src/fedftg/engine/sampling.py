"""Which clients take part in a round."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedftg.seeds import SERVER, numpy_rng


class CohortConfig(BaseModel):
    """Either a fixed ``size`` or a ``probability``; neither means that all clients take part."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: int | None = Field(default=None, ge=1, description="clients a round, drawn without replacement")
    probability: float | None = Field(default=None, gt=0, le=1, description="chance of each client to join a round")

    @model_validator(mode="after")
    def _only_one(self) -> CohortConfig:
        if self.size is not None and self.probability is not None:
            raise ValueError("size and probability exclude each other; give one of them")
        return self


def cohort(config: CohortConfig, candidates: list[int], seed: int, round: int) -> list[int]:
    """Draws the ids of the clients of a round, ascending; at least one.

    ``probability`` is the FedFTG paper's Bernoulli sampling: each candidate joins independently, and an empty draw is
    repeated; 100 clients at 0.1 give 5 to 15 most of the time.
    """
    rng = numpy_rng(seed, round, SERVER, "cohort")
    if config.size is not None:
        chosen = rng.choice(len(candidates), size=config.size, replace=False)
        return sorted(candidates[index] for index in chosen)
    if config.probability is not None:
        while True:
            joined = rng.random(len(candidates)) < config.probability
            if joined.any():
                return [candidates[index] for index in joined.nonzero()[0]]
    return list(candidates)
