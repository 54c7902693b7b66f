"""The replies of a round of training: which can be used, in which order, and what a base strategy gets to see."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from fedftg.algorithms.base import ClientResult
from fedftg.flower.local_training import client_of
from fedftg.flower.model_layout import ModelLayout
from fedftg.flower.records import CLASS_COUNTS, PARTITION_ID, RecordError, counts_from_list


@dataclass(frozen=True)
class TrainReply:
    """One client's reply."""

    message: Message
    """As it arrived; nothing in it is changed."""
    for_base: Message
    """A copy for the base strategy, or an error in its place."""
    client: int
    """The partition id where the reply tells it, else from the node id."""
    result: ClientResult | None
    """The client's model and class counts; None where it cannot be a teacher."""
    problem: str | None
    """Why it cannot be a teacher, in one line."""
    update_is_usable: bool
    """Whether the base strategy gets the update; an update without class counts is one that it gets."""
    lacks_class_counts: bool


@dataclass(frozen=True)
class ReplyReader:
    """Reads replies.

    Args:
        layout: of the arrays that were sent out.
        num_classes: ``C``.
        arrays_key: the record that holds the model where a reply has several ``ArrayRecord``s.
        class_counts_key: where a reply's metrics have the class counts.
        client_id_key: where they may have a number that stays the same from round to round.
        weight_keys: metrics that the base weighs updates by; one that is no finite number >= 0 spoils them all.
        hidden: further metrics that the base strategy is not to see.
        without_integers: give it integers as float64, as which Flower averages them anyway.
    """

    layout: ModelLayout
    num_classes: int
    arrays_key: str
    class_counts_key: str = CLASS_COUNTS
    client_id_key: str = PARTITION_ID
    weight_keys: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    without_integers: bool = False

    def read(self, messages: Iterable[Message]) -> list[TrainReply]:
        """All replies, in the order of client ids, those without a partition id after the others, by node id.

        Replies arrive in the order in which clients finish; sums of floats depend on their order.
        """
        replies = [(self._order(message), self._read(message)) for message in messages]
        return [reply for _, reply in sorted(replies, key=lambda pair: pair[0])]

    def _order(self, message: Message) -> tuple[bool, int, int]:
        partition = self._partition(message)
        return partition is None, partition or 0, client_of(message.metadata.src_node_id)

    def _partition(self, message: Message) -> int | None:
        if not message.has_content():
            return None
        for metrics in message.content.metric_records.values():
            value = metrics.get(self.client_id_key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    def _read(self, message: Message) -> TrainReply:
        partition = self._partition(message)
        client = client_of(message.metadata.src_node_id) if partition is None else partition
        if message.has_error():
            reason = str(message.error.reason).partition("\n")[0] or f"error {message.error.code}"
            return TrainReply(message, message, client, None, reason, False, False)
        metrics = self._metrics(message.content)
        try:
            params, buffers = self.layout.split(self.layout.decode(self._arrays(message.content)))
            self._check_weights(metrics)
        except RecordError as error:
            reason = str(error)
            return TrainReply(message, _refused(message, reason), client, None, reason, False, False)
        counts, problem = self._counts(metrics)
        result = None
        if counts is not None:
            total = int(counts.sum())
            result = ClientResult(client, total, counts, params, buffers, {}, {}, float("nan"))
        lacks = self.class_counts_key not in metrics
        return TrainReply(message, self._for_base(message), client, result, problem, True, lacks)

    def _arrays(self, content: RecordDict) -> ArrayRecord:
        records: dict[str, ArrayRecord] = dict(content.array_records)
        if self.arrays_key in records:
            return records[self.arrays_key]
        if len(records) == 1:
            return next(iter(records.values()))
        raise RecordError(
            f"the reply holds {len(records)} ArrayRecords and none is {self.arrays_key!r}; reply with the model as "
            f"content[{self.arrays_key!r}]"
        )

    def _metrics(self, content: RecordDict) -> MetricRecord:
        merged = MetricRecord()
        for record in content.metric_records.values():
            for key, value in record.items():
                merged[key] = value
        return merged

    def _check_weights(self, metrics: MetricRecord) -> None:
        for key in self.weight_keys:
            value = metrics.get(key, 0)
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise RecordError(f"metric {key!r} is {value}; updates can be weighed by finite numbers >= 0 only")

    def _counts(self, metrics: MetricRecord) -> tuple[Tensor | None, str | None]:
        if self.class_counts_key not in metrics:
            return None, (
                f"its metrics lack {self.class_counts_key!r}; in the ClientApp, add "
                f"{self.class_counts_key!r}: fedftg.flower.class_counts(labels, {self.num_classes}) to the MetricRecord"
            )
        try:
            counts = counts_from_list(metrics[self.class_counts_key], self.num_classes)
        except RecordError as error:
            return None, str(error)
        return (counts, None) if int(counts.sum()) else (None, "its class counts are all 0, so it taught nothing")

    def _for_base(self, message: Message) -> Message:
        """A message of its own with records of its own, for strategies empty and overwrite them."""
        content = RecordDict()
        for name, record in message.content.items():
            if isinstance(record, ArrayRecord):
                content[name] = floating(record) if self.without_integers else ArrayRecord(dict(record.items()))
            elif isinstance(record, MetricRecord):
                hidden = (self.class_counts_key, *self.hidden)
                content[name] = MetricRecord({key: value for key, value in record.items() if key not in hidden})
            else:
                content[name] = record
        copied = copy.copy(message)
        copied.content = content
        return copied


def floating(record: ArrayRecord) -> ArrayRecord:
    """A record of its own with integers as float64; other arrays are shared."""
    arrays = {}
    for key, array in record.items():
        whole = np.dtype(array.dtype).kind in "iub"
        arrays[key] = Array(np.asarray(array.numpy().astype(np.float64))) if whole else array
    return ArrayRecord(arrays)


def _refused(message: Message, reason: str) -> Message:
    """The reply of a client whose update is not used, as a base strategy knows it: an error."""
    refused = copy.copy(message)
    refused.__dict__["_content"] = None
    refused.error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
    return refused
