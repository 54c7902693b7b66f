"""What FedFTG did in a round of a Flower deployment, for people and for Flower's metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from flwr.app import MetricRecord
from flwr.serverapp.strategy import Result


@dataclass(frozen=True)
class RefineReport:
    """What FedFTG did in a round."""

    round: int
    teachers: list[int] = field(default_factory=list)
    """The clients whose models were distilled: partition ids, or the low 63 bits of node ids."""
    left_out: dict[int, str] = field(default_factory=dict)
    """Per client that was no teacher, why."""
    metrics: dict[str, float] = field(default_factory=dict)
    """``discrepancy``, ``fidelity``, ``diversity``, ``student``, ``teacher_agreement``: means over the iterations."""
    seconds: float = 0.0
    """Of refining."""
    rolled_back: str | None = None
    """Why the round's result is the base strategy's, or the model before, where it is."""


def with_metrics(metrics: MetricRecord | None, report: RefineReport) -> MetricRecord:
    """The base's metrics, with those of the refining; none of them depends on the machine's speed."""
    merged = MetricRecord(dict(metrics or {}))
    merged["fedftg-teachers"] = len(report.teachers)
    merged["fedftg-rolled-back"] = int(report.rolled_back is not None)
    for name, value in report.metrics.items():
        merged[f"fedftg-{name.replace('_', '-')}"] = value
    return merged


def shifted(result: Result, offset: int) -> Result:
    """A result with the true numbers of its rounds, ``offset`` of which were done in earlier sessions."""
    for name in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
        setattr(result, name, {number + offset: value for number, value in getattr(result, name).items()})
    return result
