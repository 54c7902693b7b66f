"""The executor whose clients are nodes of a Flower grid: one message a client, one reply, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedftg.algorithms.base import Algorithm, ClientResult, LocalRule, LocalTask, rejection
from fedftg.engine.executors import Rejected
from fedftg.flower import mail, records
from fedftg.flower.client_app import message_template
from fedftg.flower.records import RecordError
from fedftg.flower.remote import RemoteFederation
from fedftg.flower.roster import Roster
from fedftg.params import Params, to_device

LAST_COUNTED = "round"
"""The server's memory of a client: its last round that counted. What the client itself keeps stays on its node."""


def no_memory() -> Params:
    """The server's memory of a client that never took part."""
    return {LAST_COUNTED: torch.tensor(0)}


class GridExecutor:
    """Sends the tasks of a round at once, and yields results in the order of the tasks.

    Args:
        grid: the messages' way.
        roster: which node is which client.
        data: what is known of the clients.
        algorithm: its rules say what is sent and uploaded besides the model.
        params: names, shapes and types of the parameters.
        buffers: likewise.
        enough: where fewer of a round's clients are there, none is asked: the round cannot count.
        run: the key under which clients keep their memory of this run.
        checkpoint_every: rounds between two checkpoints of the server.
        seconds: the longest wait for a round's replies.
    """

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        data: RemoteFederation,
        algorithm: Algorithm,
        params: Params,
        buffers: Params,
        *,
        enough: int,
        run: str,
        checkpoint_every: int,
        seconds: float,
    ) -> None:
        self._grid, self._roster, self._data = grid, roster, data
        self._model, self._params, self._buffers = {**params, **buffers}, list(params), list(buffers)
        task = LocalTask(
            round=1,
            client=0,
            params=params,
            buffers=buffers,
            memory=algorithm.local.init_memory(params, buffers),
            message=message_template(algorithm, params, buffers),
            num_samples=1,
            relative_size=1.0,
            lr=1.0,
            seed=0,
        )
        self._extra, _ = algorithm.local.finish(params, buffers, task, 1)
        self._enough = enough
        self._run, self._every, self._seconds = run, checkpoint_every, seconds
        self._resumed: int | None = None
        self.description = "flower"

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult | Rejected]:  # noqa: ARG002
        """One result or reason a task; an update that does not fit the model is a reason."""
        given = list(tasks)
        if not given:
            return
        if self._resumed is None:
            self._resumed = given[0].round - 1
        nodes = dict(self._roster.nodes)
        there = sum(task.client in nodes for task in given)
        if there < self._enough:
            few = f"not asked: {there} of the round's clients are there, at least {self._enough} are needed"
            for task in given:
                reason = few if task.client in nodes else self._roster.why_missing(task.client)
                yield Rejected(task.client, reason)
            return
        arrays = records.encode({**given[0].params, **given[0].buffers})
        message = records.encode(given[0].message) if given[0].message else None
        contents = {nodes[task.client]: self._content(task, arrays, message) for task in given if task.client in nodes}
        # Who comes while the others train is asked at once, and takes part from the next round.
        replies = mail.exchange(self._grid, "train", contents, str(given[0].round), self._seconds, self._roster.refresh)
        for task in given:
            if task.client not in nodes:
                yield Rejected(task.client, self._roster.why_missing(task.client))
                continue
            # Taken out, so that what was decoded goes when its result does.
            yield self._result(task, replies.pop(nodes[task.client]))

    def close(self) -> None:
        """Nothing is held: the grid is Flower's."""

    def _content(self, task: LocalTask, arrays: ArrayRecord, message: ArrayRecord | None) -> RecordDict:
        floor = max(self._resumed or 0, (task.round - 1) // self._every * self._every)
        config = ConfigRecord(
            {
                "run": self._run,
                "round": task.round,
                "client": task.client,
                "num-clients": self._data.num_clients,
                "lr": task.lr,
                "seed": task.seed,
                "relative-size": task.relative_size,
                "memory-round": int(task.memory[LAST_COUNTED]),
                "memory-floor": floor,
                "mean": list(self._data.mean),
                "std": list(self._data.std),
            }
        )
        content = RecordDict({records.ARRAYS: arrays, records.CONFIG: config})
        if message is not None:
            content[records.MESSAGE] = message
        return content

    def _result(self, task: LocalTask, reply: Message | str) -> ClientResult | Rejected:
        if isinstance(reply, str):
            return Rejected(task.client, reply)
        problem = mail.trouble(reply)
        if problem is None:
            try:
                return self._checked(task, reply.content)
            except RecordError as error:
                problem = str(error)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                problem = f"its reply lacks what it must hold ({type(error).__name__}: {str(error)[:100]})"
        return Rejected(task.client, problem)

    def _checked(self, task: LocalTask, content: RecordDict) -> ClientResult | Rejected:
        metrics = content.metric_records[records.METRICS]
        told = {name: metrics[name] for name in ("round", records.PARTITION_ID, records.NUM_EXAMPLES)}
        if told != {"round": task.round, records.PARTITION_ID: task.client, records.NUM_EXAMPLES: task.num_samples}:
            return Rejected(task.client, f"its reply is for another task: {told}")
        counts = self._data.known[task.client].class_counts
        if tuple(metrics[records.CLASS_COUNTS]) != counts:  # type: ignore[arg-type]
            return Rejected(task.client, "its class counts are not those that it gave before")
        model = records.decode(content.array_records[records.ARRAYS], self._model)
        extra: Params = {}
        if self._extra:
            extra = records.decode(content.array_records[records.EXTRA], self._extra)
        device = self._data.device
        result = ClientResult(
            client=task.client,
            num_samples=task.num_samples,
            class_counts=torch.tensor(counts, dtype=torch.int64),
            params=to_device({name: model[name] for name in self._params}, device),
            buffers=to_device({name: model[name] for name in self._buffers}, device),
            extra=to_device(extra, device),
            memory={LAST_COUNTED: torch.tensor(task.round)},
            loss=float(metrics[records.LOSS]),  # type: ignore[arg-type]
        )
        told_by_node = content.config_records.get(records.CONFIG)
        if told_by_node is not None and "problem" in told_by_node:
            return Rejected(task.client, rejection(result) or str(told_by_node["problem"])[:200])
        return result
