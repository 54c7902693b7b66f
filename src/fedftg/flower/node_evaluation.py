"""Accuracy on what clients hold back, measured where it lies: one message a client, with every model to measure."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedftg.data.federated import FederatedData
from fedftg.engine.evaluate import Measured, correct_held_back, over_clients
from fedftg.errors import InputError
from fedftg.experiment import Models
from fedftg.flower import mail, records
from fedftg.flower.remote import RemoteFederation
from fedftg.flower.roster import Roster
from fedftg.models.functional import FunctionalModel
from fedftg.params import to_device


def evaluate_on_nodes(
    grid: Grid, roster: Roster, data: RemoteFederation, models: Models, round: int, seconds: float, into: Measured
) -> None:
    """Fills ``into.clients`` for each kind of model, over the clients that answer; the others go to ``not_measured``.

    Args:
        grid: the messages' way.
        roster: which node is which client.
        data: what is known of the clients; those that hold samples back are asked.
        models: what is measured, by kind.
        round: that has just been computed.
        seconds: the longest wait for replies.
        into: what the round's evaluation has found so far.
    """
    asked = [client for client in range(data.num_clients) if data.num_held_back(client) > 0]
    nodes = {client: node for client, node in roster.nodes.items() if client in asked}
    arrays = {kind: records.encode({**params, **buffers}) for kind, (params, buffers) in models.items()}
    contents = {
        node: RecordDict({records.CONFIG: _task(round, client, data), **arrays}) for client, node in nodes.items()
    }
    replies = mail.exchange(grid, "evaluate", contents, str(round), seconds, roster.refresh)
    correct: dict[str, list[int]] = {kind: [] for kind in models}
    sizes = []
    for client in asked:
        there = client in nodes
        size = data.num_held_back(client)
        found = _counts(replies[nodes[client]], round, client, size, models) if there else roster.why_missing(client)
        if isinstance(found, str):
            into.not_measured.append({"client": client, "reason": found})
            continue
        sizes.append(size)
        for kind in models:
            correct[kind].append(found[kind])
    if sizes:
        into.clients.update({kind: over_clients(torch.tensor(correct[kind]), torch.tensor(sizes)) for kind in models})


def answer(message: Message, data: FederatedData, model: FunctionalModel, client: int, batch_size: int) -> RecordDict:
    """On the node: how many of the samples that its client holds back each model of a message classifies rightly."""
    ask = message.content.config_records[records.CONFIG]
    params, buffers = model.init()
    counts: dict[str, int] = {}
    for kind, arrays in message.content.array_records.items():
        sent = to_device(records.decode(arrays, {**params, **buffers}, finite=True), data.device)
        values = {name: sent[name] for name in params}, {name: sent[name] for name in buffers}
        counts[kind] = int(correct_held_back(model, *values, data, batch_size)[client])
    told = {"round": ask["round"], records.PARTITION_ID: client, records.NUM_EXAMPLES: data.num_held_back(client)}
    return RecordDict({records.METRICS: MetricRecord({**told, **counts})})  # type: ignore[dict-item]


def _task(round: int, client: int, data: RemoteFederation) -> ConfigRecord:
    return ConfigRecord({"round": round, "client": client, "mean": list(data.mean), "std": list(data.std)})


def _counts(reply: Message | str, round: int, client: int, size: int, models: Models) -> dict[str, int] | str:
    """What a node counted for each kind of model, or why that cannot be used."""
    problem = reply if isinstance(reply, str) else mail.trouble(reply)
    if problem is not None:
        return problem
    try:
        metrics: Any = reply.content.metric_records[records.METRICS]  # type: ignore[union-attr]
        told = [metrics[name] for name in ("round", records.PARTITION_ID, records.NUM_EXAMPLES)]
        counts = {kind: metrics[kind] for kind in models}
    except (KeyError, InputError) as error:
        return f"its reply lacks {error}"
    if told != [round, client, size]:
        return f"its reply is for another task: round, client and samples are {told}, not {[round, client, size]}"
    if not all(isinstance(count, int) and 0 <= count <= size for count in counts.values()):
        return f"its counts must be whole numbers from 0 to {size}, got {counts}"
    return counts
