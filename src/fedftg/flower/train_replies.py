"""The replies of a round of training: which can be used, in which order, and what a base strategy gets to see."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from fedftg.algorithms.base import ClientResult
from fedftg.flower.local_training import client_of
from fedftg.flower.model_layout import ModelLayout
from fedftg.flower.records import CLASS_COUNTS, PARTITION_ID, RecordError, counts_from_list, partition_of, weight_of
from fedftg.flower.reply_kinds import kind_of, odd_ones


@dataclass(frozen=True)
class TrainReply:
    """One client's reply."""

    message: Message
    """As it arrived; nothing in it is changed."""
    for_base: Message
    """A copy for the base strategy, or an error in its place."""
    client: int
    """The partition id where the reply tells it, else from the node id."""
    tells_partition: bool
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
        weight_keys: metrics that the base weighs updates by; one that is no number from 0 to 2**53 spoils them all.
        examples_key: the one that holds the number of examples.
        selects: the base averages some of the updates; one of no weight might then be alone.
        hidden: further metrics that the base strategy is not to see.
        without_integers: give it integers as float64, as which Flower averages them anyway.
    """

    layout: ModelLayout
    num_classes: int
    arrays_key: str
    class_counts_key: str = CLASS_COUNTS
    client_id_key: str = PARTITION_ID
    weight_keys: tuple[str, ...] = ()
    examples_key: str | None = None
    selects: bool = False
    hidden: tuple[str, ...] = ()
    without_integers: bool = False

    def read(self, messages: Iterable[Message]) -> list[TrainReply]:
        """All replies, in the order of client ids, those without a partition id after the others, by node id.

        Replies arrive in the order in which clients finish; sums of floats depend on their order.
        """
        replies = sorted(map(self._read, messages), key=_order)
        nodes = Counter(reply.client for reply in replies if reply.update_is_usable)
        for index, reply in enumerate(replies):
            count = nodes[reply.client]
            if reply.update_is_usable and count > 1:
                reason = f"{count} nodes are client {reply.client}; give each its own {self.client_id_key!r}"
                replies[index] = refused(reply, reason)
        return self._without_empty(replies)

    def again(self, replies: list[TrainReply], left_out: dict[int, str]) -> list[TrainReply]:
        """The same replies with new copies for the base, those whose index is in ``left_out`` refused for a reason."""
        fresh = [
            refused(reply, left_out[index])
            if index in left_out
            else replace(reply, for_base=self._for_base(reply.message))
            if reply.update_is_usable
            else reply
            for index, reply in enumerate(replies)
        ]
        return self._without_empty(fresh)

    def odd_ones(self, replies: list[TrainReply]) -> list[dict[int, str]]:
        """Ways to make replies alike, as indices to leave out and why; see `fedftg.flower.reply_kinds.odd_ones`."""
        hidden = (self.class_counts_key, *self.hidden)
        kinds = {i: kind_of(r.message.content, hidden) for i, r in enumerate(replies) if r.update_is_usable}
        return odd_ones(kinds, self.weight_keys)

    def _without_empty(self, replies: list[TrainReply]) -> list[TrainReply]:
        """Refuses replies of no weight where the base would divide by 0."""
        if self.examples_key is None:
            return replies
        weights = [
            weight_of(_metrics(r.message.content), self.examples_key) if r.update_is_usable else None for r in replies
        ]
        nobody = 0 in weights and not any(weights)
        reason = (
            f"no client has a metric {self.examples_key!r} above 0" if nobody else f"its {self.examples_key!r} is 0"
        )
        return [
            refused(reply, reason) if reply.update_is_usable and (nobody or (self.selects and weight == 0)) else reply
            for reply, weight in zip(replies, weights, strict=True)
        ]

    def _read(self, message: Message) -> TrainReply:
        client = client_of(message.metadata.src_node_id)
        if message.has_error():
            reason = str(message.error.reason).partition("\n")[0] or f"error {message.error.code}"
            return TrainReply(message, message, client, False, None, reason, False, False)
        metrics = _metrics(message.content)
        tells = False
        try:
            partition = partition_of(metrics, self.client_id_key)
            client, tells = (client, False) if partition is None else (partition, True)
            params, buffers = self.layout.split(self.layout.decode(message.content.array_records[self._model(message)]))
            for key in self.weight_keys:
                weight_of(metrics, key)
            for_base = self._for_base(message)
        except RecordError as error:
            return refused(TrainReply(message, message, client, tells, None, None, False, False), str(error))
        counts, problem = self._counts(metrics)
        result = None
        if counts is not None:
            total = int(counts.sum())
            result = ClientResult(client, total, counts, params, buffers, {}, {}, float("nan"))
        lacks = self.class_counts_key not in metrics
        return TrainReply(message, for_base, client, tells, result, problem, True, lacks)

    def _model(self, message: Message) -> str:
        records = list(message.content.array_records)
        if self.arrays_key in records:
            return self.arrays_key
        if len(records) == 1:
            return records[0]
        raise RecordError(
            f"the reply holds {len(records)} ArrayRecords and none is {self.arrays_key!r}; reply with the model as "
            f"content[{self.arrays_key!r}]"
        )

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
        """A message of its own with records of its own, for strategies empty and overwrite them.

        The model's arrays are in the order in which they were sent: some strategies go by their places.
        """
        content, model = RecordDict(), self._model(message)
        for name, record in message.content.items():
            if name == model:
                ordered = ArrayRecord({key: record[key] for key in self.layout.template})
                content[name] = floating(ordered) if self.without_integers else ordered
            elif isinstance(record, ArrayRecord):
                content[name] = ArrayRecord(dict(record.items()))
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


def refused(reply: TrainReply, reason: str) -> TrainReply:
    """The reply of a client whose update is not used; a base strategy knows such as an error."""
    error = copy.copy(reply.message)
    error.__dict__["_content"] = None
    error.error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
    return replace(reply, for_base=error, result=None, problem=reason, update_is_usable=False)


def _order(reply: TrainReply) -> tuple[bool, int, int]:
    return not reply.tells_partition, reply.client, client_of(reply.message.metadata.src_node_id)


def _metrics(content: RecordDict) -> MetricRecord:
    merged = MetricRecord()
    for record in content.metric_records.values():
        for key, value in record.items():
            merged[key] = value
    return merged
