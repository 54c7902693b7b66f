"""The nodes of a grid: messages with bounded waits, what nodes say of their clients, and which node is which client."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Self

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedftg import __version__
from fedftg.config import RunConfig, parse
from fedftg.data.dataset import Channels, ImageDataset
from fedftg.data.federated import FederatedData
from fedftg.errors import InputError
from fedftg.flower.settings import agreement
from fedftg.flower.wire import CONFIG, error_of
from fedftg.rundir.records import Record

Log = Callable[[str], None]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
"""Seconds between two polls, which become longer during a wait."""
_MEANWHILE_SECONDS = 5.0
_QUERY_SECONDS = 3600.0
"""How long a SuperLink keeps a query for its node; nothing waits for it that long."""
_REASK_SECONDS = 15.0
"""How often, during a wait, nodes that could not take part are asked again."""


def until(done: Callable[[], bool], seconds: float) -> bool:
    """Polls ``done`` for at most ``seconds``; returns whether it became true."""
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while not done():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(pause * 1.3, _LONGEST_PAUSE)
    return True


def post(grid: Grid, kind: str, contents: Mapping[int, RecordDict], group: str, ttl: float) -> dict[str, int]:
    """Sends one message a node; returns the node of each message id that the SuperLink accepted."""
    messages = [Message(content, node, kind, ttl=ttl, group_id=group) for node, content in contents.items()]
    accepted = set(grid.push_messages(messages)) if messages else set()
    # Grids differ in whether they leave out ids of messages that were not accepted.
    sent = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    return {name: node for name, node in sent.items() if name in accepted}


def collect(grid: Grid, sent: dict[str, int]) -> dict[int, Message]:
    """Returns the replies that have arrived, by node, and removes their ids from ``sent``."""
    found: dict[int, Message] = {}
    for reply in grid.pull_messages(list(sent)) if sent else ():
        node = sent.pop(reply.metadata.reply_to_message_id, None)
        if node is not None:
            found[node] = reply
    return found


def exchange(
    grid: Grid,
    kind: str,
    contents: Mapping[int, RecordDict],
    group: str,
    seconds: float,
    meanwhile: Callable[[], None],
) -> dict[int, Message | str]:
    """Sends one message a node; returns its reply, or the reason why there is none after ``seconds``.

    ``meanwhile`` is called every few seconds of a longer wait.
    """
    sent = post(grid, kind, contents, group, ttl=max(seconds, 1.0) + 60)
    replies: dict[int, Message | str] = dict.fromkeys(contents, "the SuperLink did not take the message")
    replies |= dict.fromkeys(sent.values(), f"no reply within {seconds:g} s")
    called = time.monotonic()

    def complete() -> bool:
        nonlocal called
        replies.update(collect(grid, sent))
        if sent and time.monotonic() - called > _MEANWHILE_SECONDS:
            meanwhile()
            called = time.monotonic()
        return not sent

    until(complete, seconds)
    return replies


class ClientFacts(BaseModel):
    """What a node says of its client: a ``ConfigRecord`` whose keys are these names with hyphens."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    partition_id: int = Field(ge=0)
    num_clients: int
    class_counts: tuple[Annotated[int, Field(ge=0)], ...]
    held_back: int = Field(ge=0)
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: Channels
    std: tuple[Annotated[float, Field(gt=0)], ...]
    data_digest: str
    """SHA-256 of the client's data (`FederatedData.digest`)."""
    settings_digest: str
    version: str

    @property
    def num_samples(self) -> int:
        """The number of training samples."""
        return sum(self.class_counts)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.partition_id >= self.num_clients:
            raise InputError(f"its partition-id {self.partition_id} must be below its {self.num_clients} clients")
        if (
            len(self.class_counts) != len(self.class_names)
            or not len(self.mean) == len(self.std) == self.image_shape[0]
        ):
            raise InputError("its class counts, class names, image shape and normalisation do not fit together")
        return self

    @classmethod
    def of(cls, reply: Message) -> ClientFacts:
        """Returns the facts in a node's answer.

        Raises:
            InputError: the node failed, or its answer is not what it should be.
        """
        problem = error_of(reply)
        if problem is not None:
            raise InputError(problem)
        given: dict[str, Any] = dict(reply.content.config_records.get(CONFIG, {}))
        version = given.get("version")
        if version != __version__:
            raise InputError(f"it runs fedftg {version}, the server {__version__}; install the same version")
        return parse(cls, given, "its answer")


class NodeFederation(FederatedData):
    """Sizes of clients on nodes, and the server's test data; no training data.

    Args:
        known: the facts of every client whose node took part; grows when nodes join.
        normalisation: means and deviations ``(D,)`` of all clients' images.
        test: a data set whose test images are the server's; None: the server measures no accuracy.
        device: where the server computes.
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
        """Returns how many training samples a client holds; 0 where its node never took part."""
        return self.known[client].num_samples if client in self.known else 0

    def num_held_back(self, client: int) -> int:
        """Returns how many samples a client keeps for testing."""
        return self.known[client].held_back if client in self.known else 0

    def may_train(self, client: int) -> bool:
        """Returns whether a client can be drawn: all but those that are known to hold nothing."""
        return client not in self.known or self.known[client].num_samples > 0

    @property
    def mean_samples(self) -> float:
        """Mean number of training samples of the clients that are known."""
        return sum(facts.num_samples for facts in self.known.values()) / len(self.known)

    def relative_size(self, client: int) -> float:
        """Returns a client's number of samples over `mean_samples`."""
        return self.num_samples(client) / self.mean_samples

    def record(self, run: str) -> Record:
        """Returns the content of ``partition.json``, which `facts_of` reads.

        A client whose node never took part has counts of 0 and no digest.
        """
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


def facts_of(record: Mapping[str, Any], settings: str) -> dict[int, ClientFacts]:
    """Returns the facts of the clients that a ``partition.json`` knows.

    Raises:
        InputError: the file was not written by a Flower server.
    """
    if "digests" not in record:
        raise InputError(
            "the run was not made by a Flower server (see its partition.json); resume it by 'fedftg run --resume'"
        )
    count = len(record["digests"])
    common = {name: record[name] for name in ("class_names", "image_shape", "mean", "std")}
    return {
        client: ClientFacts(
            partition_id=client,
            num_clients=count,
            class_counts=record["class_counts"][client],
            held_back=record.get("held_back", [0] * count)[client],
            data_digest=digest,
            settings_digest=settings,
            version=__version__,
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

    def mean_of(values: list[float]) -> float:
        return sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)

    means, deviations = [], []
    for channel in range(len(facts[0].mean)):
        mean = mean_of([one.mean[channel] for one in facts])
        square = mean_of([one.std[channel] ** 2 + one.mean[channel] ** 2 for one in facts])
        means.append(mean)
        deviations.append(math.sqrt(max(square - mean**2, 1e-12)))
    return tuple(means), tuple(deviations)


class Nodes:
    """Maps clients to connected nodes; a node is asked once, and again after it could not take part.

    Args:
        grid: Flower's.
        config: the recipe as the server has it.
        test: a data set whose classes and image shape the clients must have; None: those of the first client.
        before: the facts of the clients of a run that is resumed.
        log: receives lines for the operator.
    """

    def __init__(
        self, grid: Grid, config: RunConfig, test: ImageDataset | None, before: dict[int, ClientFacts], log: Log
    ) -> None:
        self.grid, self._config, self._test, self._log = grid, config, test, log
        self._settings = agreement(config)
        self.known = before
        """The facts of every client whose node took part."""
        self._remembered = frozenset(before)
        self.by_client: dict[int, int] = {}
        """The node of each connected client."""
        self.refused: dict[int, str] = {}
        """Nodes that cannot take part, and why."""
        self._asked: set[int] = set()
        self._queries: dict[str, int] = {}
        self._replaced: dict[int, int] = {}
        """Nodes whose client another node has taken over, and that client, until it is known whether they live."""
        self._rival: dict[int, int] = {}
        """Nodes that claim the client of a living node, and that node."""
        self.rounds_started = False
        """From then on a client that two living nodes claim stays with the first; before, it ends the run."""

    @property
    def num_clients(self) -> int:
        """How many clients are expected, whether their nodes are connected or not."""
        return next((facts.num_clients for facts in self.known.values()), self._config.partition.num_clients)

    def check(self, facts: ClientFacts) -> str | None:
        """Returns why a client cannot take part, or None."""
        if facts.settings_digest != self._settings:
            return "its recipe's settings differ from the server's; install the same app and fedftg on both"
        expected: dict[str, Any] = {}
        if self._config.partition.law not in ("natural", "file"):
            expected["num_clients"] = self._config.partition.num_clients
        if self._test is not None:
            expected |= {"image_shape": self._test.image_shape, "class_names": tuple(self._test.class_names)}
        for like in list(self.known.values())[:1]:
            expected = {name: getattr(like, name) for name in ("num_clients", "image_shape", "class_names")} | expected
        for name, wanted in expected.items():
            got = getattr(facts, name)
            if got != wanted:
                if name == "class_names":
                    got, wanted = next(pair for pair in itertools.zip_longest(got, wanted) if pair[0] != pair[1])
                return f"its {name.replace('_', ' ')} differ: {str(got)[:40]} where {str(wanted)[:40]} is expected"
        before = self.known.get(facts.partition_id)
        if before is not None and before.data_digest != facts.data_digest:
            return f"its data is not what client {facts.partition_id} had before (see partition.json)"
        return None

    def refresh(self) -> None:
        """Notes who came and went, asks those who came, and reads the answers that have arrived; never waits."""
        connected = set(self.grid.get_node_ids())
        for client, node in list(self.by_client.items()):
            if node not in connected:
                self._log(f"client {client} went away (node {node})")
                del self.by_client[client]
        self._replaced = {old: client for old, client in self._replaced.items() if old in connected}
        self.refused = {node: problem for node, problem in self.refused.items() if node in connected}
        self._asked &= connected
        self._queries = {name: node for name, node in self._queries.items() if node in connected}
        self._ask(sorted(connected - self._asked))
        for node, reply in sorted(collect(self.grid, self._queries).items()):
            problem = self._answered(node, reply)
            # A node whose client another one has taken over is expected to be dead.
            if problem is not None and self._replaced.pop(node, None) is None:
                self._refuse(node, problem)

    @property
    def undecided(self) -> bool:
        """Whether a node whose client another one has taken over may still live."""
        return bool(self._replaced)

    def ask_again(self) -> None:
        """Has the nodes that could not take part asked again by the next `refresh`."""
        living = set(self.by_client.values())
        self._asked -= {node for node in self.refused if self._rival.get(node) not in living}

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Refreshes until ``done()``, for at most ``seconds``; returns whether it became true."""
        asked = time.monotonic()

        def look() -> bool:
            nonlocal asked
            if time.monotonic() - asked > _REASK_SECONDS:
                self.ask_again()
                asked = time.monotonic()
            self.refresh()
            return done()

        return until(look, seconds)

    def connected(self, clients: Collection[int]) -> int:
        """Returns how many of some clients are connected."""
        return sum(client in clients for client in self.by_client)

    def first_refusal(self) -> str:
        """Returns the end of a line about missing nodes: the first node that cannot take part, if any."""
        node, problem = next(iter(self.refused.items()), (None, ""))
        return "" if node is None else f"; node {node} cannot take part: {problem}"

    def why_missing(self, client: int) -> str:
        """Returns why a client is not connected, for the record of a round."""
        return f"no node with partition-id={client} is there{self.first_refusal()}"

    def _ask(self, nodes: list[int]) -> None:
        """Sends the query; a node whose SuperLink did not accept it is asked at the next refresh."""
        sent = post(self.grid, "query", {node: RecordDict() for node in nodes}, "query", _QUERY_SECONDS)
        self._queries |= sent
        self._asked.update(sent.values())

    def _answered(self, node: int, reply: Message) -> str | None:
        """Takes in a node's answer; returns why it cannot take part, or None."""
        try:
            facts = ClientFacts.of(reply)
        except InputError as error:
            return str(error)
        if not self.rounds_started:  # nothing depends yet on what nodes said that have left
            for client in self.known.keys() - self.by_client.keys() - self._remembered:
                del self.known[client]
        problem = self.check(facts)
        if problem is None:
            self.refused.pop(node, None)
            self.known[facts.partition_id] = facts
            self._admit(node, facts)
        return problem

    def _admit(self, node: int, facts: ClientFacts) -> None:
        client, before = facts.partition_id, self.by_client.get(facts.partition_id)
        if self._replaced.pop(node, None) == client and before is not None:
            self._both_live(client, node, before)
            return
        if before is None:
            self._log(f"client {client} is there (node {node}): {facts.num_samples} samples")
        elif before != node:
            # A node that was started again has a new id, and its old one may be listed for another minute: the new one
            # takes over, and the old one is asked whether it still lives.
            self._log(f"client {client} came back as node {node}, in place of {before}")
            self._replaced[before] = client
            self._ask([before])
        self.by_client[client] = node

    def _both_live(self, client: int, first: int, second: int) -> None:
        problem = (
            f"nodes {first} and {second} both say partition-id={client}; give each SuperNode another one by "
            "--node-config 'partition-id=N'"
        )
        if not self.rounds_started:
            raise InputError(problem)
        self._rival[second] = first
        self.by_client[client] = first
        self._refuse(second, problem)

    def _refuse(self, node: int, problem: str) -> None:
        if self.refused.get(node) != problem:
            self._log(f"node {node} cannot take part: {problem}")
        self.refused[node] = problem
