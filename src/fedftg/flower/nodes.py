"""The nodes of a grid: messages with bounded waits, what nodes say of their clients, and which node is which client."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from pydantic import BaseModel, ConfigDict

from fedftg.config import RunConfig, parse
from fedftg.data.dataset import Channels, ImageDataset
from fedftg.data.federated import FederatedData
from fedftg.errors import InputError
from fedftg.flower.settings import agreement
from fedftg.flower.wire import CONFIG, error_of
from fedftg.rundir.records import Record

Log = Callable[[str], None]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0  # seconds between two polls, which become longer during a wait
_QUERY_SECONDS = 3600.0  # how long a SuperLink keeps a query for its node; nothing waits for it that long
_RETRY_SECONDS = 15.0  # how often nodes that could not take part are asked again


class ClientFacts(BaseModel):
    """What a node reports about its client, in a ``ConfigRecord``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    partition_id: int
    num_clients: int
    class_counts: tuple[int, ...]
    held_back: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: Channels
    std: Channels
    data_digest: str
    agreement: str = ""
    """Empty where they come from ``partition.json``."""

    @property
    def num_samples(self) -> int:
        """Of training."""
        return sum(self.class_counts)

    @classmethod
    def of(cls, reply: Message) -> ClientFacts:
        """Returns the facts in a node's reply; `InputError` where there are none."""
        problem = error_of(reply)
        if problem is not None:
            raise InputError(problem)
        return parse(cls, dict(reply.content.config_records.get(CONFIG, {})), "its answer")


class NodeFederation(FederatedData):
    """Sizes of clients on nodes, and the test data of the server, if any; no training data.

    ``known`` has the facts of every client whose node took part; it grows when nodes join.
    """

    def __init__(
        self,
        known: dict[int, ClientFacts],
        normalisation: tuple[Channels, Channels],
        test: ImageDataset | None,
        device: str,
    ) -> None:
        self.known, self._any = known, next(iter(known.values()))
        nothing = torch.empty(0, *self._any.image_shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        tests = nothing if test is None else (test.test_images, test.test_labels)
        dataset = ImageDataset(*nothing, *tests, self._any.class_names, *normalisation)
        super().__init__(dataset, [np.empty(0, dtype=np.int64)] * self._any.num_clients, device)

    def num_samples(self, client: int) -> int:
        """Returns a client's number of training samples; 0 where its node never took part."""
        return self.known[client].num_samples if client in self.known else 0

    @property
    def candidates(self) -> list[int]:
        """The clients that can be drawn: all but those that are known to hold nothing."""
        return [k for k in range(self.num_clients) if k not in self.known or self.known[k].num_samples > 0]

    @property
    def mean_samples(self) -> float:
        """Of the clients that are known."""
        return sum(facts.num_samples for facts in self.known.values()) / len(self.known)

    def relative_size(self, client: int) -> float:
        """Returns a client's number of samples over `mean_samples`."""
        return self.num_samples(client) / self.mean_samples if self.mean_samples else 0.0

    def record(self, run: str) -> Record:
        """Returns the content of ``partition.json``; an unknown client has counts of 0 and no digest."""
        facts = [self.known.get(client) for client in range(self.num_clients)]
        digests = [one.data_digest if one else None for one in facts]
        record: Record = {
            "class_names": list(self._any.class_names),
            "class_counts": [list(one.class_counts) if one else [0] * self.num_classes for one in facts],
            "digest": hashlib.sha256(",".join(map(str, digests)).encode()).hexdigest(),
            "digests": digests,
            "image_shape": list(self.image_shape),
            "mean": list(self.dataset.mean),
            "std": list(self.dataset.std),
            "run": run,
        }
        if any(one and one.held_back for one in facts):
            record["held_back"] = [one.held_back if one else 0 for one in facts]
        return record


def facts_of(record: Mapping[str, Any]) -> dict[int, ClientFacts]:
    """Returns the facts of the clients that a ``partition.json`` knows; `InputError` for one of the simulator."""
    if "digests" not in record:
        raise InputError("the run was not made by a Flower server; resume it by 'fedftg run --resume'")
    count = len(record["digests"])
    common = {name: record[name] for name in ("class_names", "image_shape", "mean", "std")}
    return {
        client: ClientFacts(
            partition_id=client,
            num_clients=count,
            class_counts=record["class_counts"][client],
            held_back=record.get("held_back", [0] * count)[client],
            data_digest=digest,
            **common,
        )
        for client, digest in enumerate(record["digests"])
        if digest is not None
    }


def joint_normalisation(facts: list[ClientFacts]) -> tuple[Channels, Channels]:
    """Returns means and deviations ``(D,)`` of all clients' images, from each client's own, weighted by size.

    Where all are equal, as with one data set and the recipe's partition, they are returned to the last bit.
    """
    sizes = [float(one.num_samples) for one in facts]
    if len({(one.mean, one.std) for one in facts}) == 1 or not sum(sizes):
        return facts[0].mean, facts[0].std
    means = np.array([one.mean for one in facts])
    squares = np.array([one.std for one in facts]) ** 2 + means**2
    mean = np.average(means, axis=0, weights=sizes)
    std = np.sqrt(np.maximum(np.average(squares, axis=0, weights=sizes) - mean**2, 1e-12))
    return tuple(mean.tolist()), tuple(std.tolist())


class Nodes:
    """Maps clients to connected nodes; a node is asked once, and again where it could not take part.

    ``before`` has the facts of the clients of a run that is resumed.
    """

    def __init__(
        self, grid: Grid, config: RunConfig, test: ImageDataset | None, before: dict[int, ClientFacts], log: Log
    ) -> None:
        self.known = before
        self.by_client: dict[int, int] = {}
        """The node of each connected client."""
        self._grid, self._config, self._log = grid, config, log
        self._agreement = agreement(config)
        self._expected: dict[str, Any] = {}
        """What the facts of all clients must be."""
        if config.partition.law not in ("natural", "file"):
            self._expected["num_clients"] = config.partition.num_clients
        if test is not None:
            self._expected |= {"image_shape": test.image_shape, "class_names": tuple(test.class_names)}
        for facts in before.values():
            self._expect_same(facts)
        self._refused: dict[int, str] = {}
        """Nodes that cannot take part, and why."""
        self._asked: set[int] = set()
        self._queries: dict[str, int] = {}
        self._retried = time.monotonic()

    @property
    def num_clients(self) -> int:
        """Connected or not."""
        return int(self._expected.get("num_clients", self._config.partition.num_clients))

    def refresh(self) -> None:
        """Handles nodes that came and went, and replies that have arrived; never waits."""
        connected = set(self._grid.get_node_ids())
        for client, node in list(self.by_client.items()):
            if node not in connected:
                self._log(f"client {client} disconnected (node {node})")
                del self.by_client[client]
        self._refused = {node: problem for node, problem in self._refused.items() if node in connected}
        if time.monotonic() - self._retried >= _RETRY_SECONDS:
            self._retried = time.monotonic()
            self._asked -= self._refused.keys()
        self._asked &= connected
        self._queries = {name: node for name, node in self._queries.items() if node in connected}
        contents = {node: RecordDict() for node in sorted(connected - self._asked)}
        sent = self._post("query", contents, "query", _QUERY_SECONDS)
        self._queries |= sent
        self._asked.update(sent.values())
        for node, reply in sorted(self._collect(self._queries).items()):
            try:
                self._admit(node, ClientFacts.of(reply))
            except InputError as error:
                if self._refused.get(node) != str(error):
                    self._log(f"node {node} cannot take part: {error}")
                self._refused[node] = str(error)

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Refreshes until ``done()``, for at most ``seconds``; returns whether it became true."""
        deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE
        while True:
            self.refresh()
            if done():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(pause * 1.3, _LONGEST_PAUSE)

    def exchange(
        self, kind: str, contents: Mapping[int, RecordDict], group: str, seconds: float
    ) -> dict[int, Message | str]:
        """Sends one message a node; returns its reply, or the reason why there is no usable one after ``seconds``."""
        sent = self._post(kind, contents, group, ttl=max(seconds, 1.0) + 60)
        replies: dict[int, Message | str] = dict.fromkeys(contents, "the SuperLink did not take the message")
        replies |= dict.fromkeys(sent.values(), f"no reply within {seconds:g} s")

        def complete() -> bool:
            replies.update({node: error_of(reply) or reply for node, reply in self._collect(sent).items()})
            return not sent

        self.wait(complete, seconds)  # a node that joins meanwhile takes part from the next round
        return replies

    def first_refusal(self) -> str:
        """Returns the end of a line about missing nodes: the first node that cannot take part, if any."""
        return next((f"; node {node} cannot take part: {why}" for node, why in self._refused.items()), "")

    def why_missing(self, client: int) -> str:
        """Returns why a client is not connected."""
        return f"no node with partition-id={client} is connected{self.first_refusal()}"

    def _post(self, kind: str, contents: Mapping[int, RecordDict], group: str, ttl: float) -> dict[str, int]:
        """Sends one message a node; returns the node of each message id that the SuperLink accepted."""
        messages = [Message(content, node, kind, ttl=ttl, group_id=group) for node, content in contents.items()]
        accepted = set(self._grid.push_messages(messages)) if messages else set()
        # Grids differ in whether they leave out ids of messages that were not accepted.
        sent = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        return {name: node for name, node in sent.items() if name in accepted}

    def _collect(self, sent: dict[str, int]) -> dict[int, Message]:
        """Returns the replies that have arrived, by node, and removes their ids from ``sent``."""
        replies = self._grid.pull_messages(list(sent)) if sent else ()
        return {sent.pop(reply.metadata.reply_to_message_id): reply for reply in replies}

    def _admit(self, node: int, facts: ClientFacts) -> None:
        """Takes a node's client into the run; `InputError` where it cannot take part."""
        client = facts.partition_id
        if facts.agreement != self._agreement:
            raise InputError("its recipe or version of fedftg differs from the server's; install the same on both")
        for name, wanted in self._expected.items():
            got = getattr(facts, name)
            if got != wanted:
                raise InputError(f"its {name.replace('_', ' ')} must be {str(wanted)[:100]}, got {str(got)[:100]}")
        if client in self.known and self.known[client].data_digest != facts.data_digest:
            raise InputError(f"its data is not what client {client} had before (see partition.json)")
        holder = self.by_client.get(client, node)
        if holder != node:
            # The node of a client that was restarted stays listed for about a minute.
            raise InputError(f"node {holder} has partition-id={client} already; give each node its own")
        self._expect_same(facts)
        self._refused.pop(node, None)
        self.known[client], self.by_client[client] = facts, node
        self._log(f"client {client} connected (node {node}): {facts.num_samples} samples")

    def _expect_same(self, facts: ClientFacts) -> None:
        self._expected |= {name: getattr(facts, name) for name in ("num_clients", "image_shape", "class_names")}
