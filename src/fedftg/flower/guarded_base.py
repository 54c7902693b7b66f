"""A round's aggregation by the base strategy: what goes wrong in it costs a client or the round, and is told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import Strategy

from fedftg.flower import base_strategies as bases
from fedftg.flower.model_layout import ModelLayout
from fedftg.flower.strategy_snapshot import snapshot
from fedftg.flower.train_replies import ReplyReader, TrainReply
from fedftg.params import Params, first_non_finite

_log = logging.getLogger("flwr")

AggregateFunction = Callable[[list[Message]], tuple[ArrayRecord | None, MetricRecord | None]]


@dataclass(frozen=True)
class Aggregated:
    """What came of a round."""

    read: list[TrainReply]
    """The replies, those refused that the base was not given."""
    arrays: Params | None = None
    """The aggregate; None where there is none that can be used."""
    metrics: MetricRecord | None = None
    taken: list[RecordDict] | None = None
    """The contents that the base has averaged, where it was watched."""
    problem: str | None = None
    """Why there is no aggregate."""
    error: Exception | None = None
    """What the base raised, where that is why."""


def aggregate(
    strategy: Strategy,
    function: AggregateFunction,
    layout: ModelLayout,
    reader: ReplyReader,
    read: list[TrainReply],
    *,
    watch: bool,
) -> Aggregated:
    """Has a strategy aggregate; where it fails or the result is not finite, it stands where it stood before.

    A strategy that fails on replies of several kinds is given one kind alone, the most frequent first.

    Args:
        strategy: the base.
        function: its aggregation.
        layout: of the arrays that were sent.
        reader: what has read the replies.
        read: the replies.
        watch: find out which of them the strategy takes.

    Raises:
        AppExitException: the strategy has ended the run on purpose, for its privacy budget is spent.
    """
    undo = snapshot(bases.chain(strategy))
    spoilt_before = bases.not_finite(strategy)
    errors: list[Exception] = []
    named = read
    for number, given in enumerate(_attempts(reader, read)):
        named = given if number == 1 else named
        try:
            with bases.watched_selection(strategy) if watch else nullcontext(None) as taken:
                record, metrics = function([reply.for_base for reply in given])
            arrays = None if record is None else layout.accept(record)
        except Exception as error:
            undo()
            if isinstance(error, AppExitException) and not isinstance(
                error, InconsistentMessageReplies | AggregationError
            ):
                raise
            errors.append(error)
            _log.warning("FedFTG: %s failed to aggregate", type(strategy).__name__, exc_info=True)
            continue
        if arrays is None:
            return Aggregated(given, None, metrics, problem="the base strategy gave no aggregate")
        spoilt = first_non_finite(arrays)
        if spoilt is None:
            spoilt = next(iter(sorted(bases.not_finite(strategy) - spoilt_before)), None)
        if spoilt is None:
            return Aggregated(given, arrays, metrics, taken)
        undo()
        return Aggregated(given, problem=f"the aggregate is not finite ({spoilt})")
    first = errors[0]
    reason = f"{type(first).__name__}: {str(first).partition(chr(10))[0]}"
    return Aggregated(named, problem=f"the base strategy failed ({reason})", error=first)


def _attempts(reader: ReplyReader, read: list[TrainReply]) -> Iterator[list[TrainReply]]:
    yield read
    for left_out in reader.odd_ones(read):
        yield reader.again(read, left_out)


def evaluated(function: Callable[[], MetricRecord | None]) -> MetricRecord | None:
    """The metrics that a strategy makes of the replies to an evaluation; None, told, where they cannot be averaged."""
    try:
        return function()
    except (InconsistentMessageReplies, ZeroDivisionError) as error:
        _log.warning("FedFTG: the clients' evaluation is left out: %s: %s", type(error).__name__, error)
        return None
