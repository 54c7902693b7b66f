"""A Flower grid in this process: the same ServerApp and ClientApp without Ray, SuperLink or network, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """Nodes with a ClientApp each, in this process.

    Messages are handled when they are pushed, in the order of node ids, so runs are deterministic. A client that raises
    gives the error reply that a SuperNode sends; a missing node gives that of a SuperLink.

    Args:
        node_configs: per node id (from 1), what ``flower-supernode --node-config`` would give it.
    """

    def __init__(
        self, app: ClientApp, node_configs: Mapping[int, Mapping[str, Any]], run_config: Mapping[str, Any] | None = None
    ) -> None:
        self._app = app
        self._run_config = dict(run_config or {})
        self._contexts: dict[int, Context] = {}
        self._replies: dict[str, Message] = {}
        self._pushed = 0
        for node, config in node_configs.items():
            self.join(node, config)
        # A SuperLink would have set the identity that messages carry.
        if TaskIdentity._run_id is None:
            TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    @classmethod
    def of(cls, app: ClientApp, num_clients: int, run_config: Mapping[str, Any] | None = None) -> LocalGrid:
        """Returns a grid whose node ``i + 1`` has partition ``i``."""
        configs = {i + 1: {"partition-id": i, "num-partitions": num_clients} for i in range(num_clients)}
        return cls(app, configs, run_config)

    def join(self, node: int, config: Mapping[str, Any]) -> None:
        """Connects a node, with an empty state."""
        self._contexts[node] = Context(1, node, dict(config), RecordDict(), dict(self._run_config))

    def leave(self, node: int) -> None:
        """Disconnects a node, whose state is lost."""
        del self._contexts[node]

    def run_server(self, app: ServerApp) -> Context:
        """Runs a ServerApp to its end; returns its context."""
        context = Context(1, 0, {}, RecordDict(), dict(self._run_config))
        app(self, context)
        return context

    def set_run(self, run: Run) -> None:
        """Does nothing: there is only one run."""

    @property
    def run(self) -> Run:
        """Raises `NotImplementedError`: only a SuperLink knows the run."""
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Returns ``Message(...)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Returns the connected nodes, ascending."""
        return sorted(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Handles every message; returns their ids in the given order."""
        given = list(messages)
        for message in given:
            self._pushed += 1
            message.metadata.__dict__["_message_id"] = f"message-{self._pushed}"
        for message in sorted(given, key=lambda message: message.metadata.dst_node_id):
            reply = self.answer(message)
            if reply is not None:
                reply.metadata.__dict__["_reply_to_message_id"] = message.metadata.message_id
                self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in given]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Returns the replies that have arrived, each once, in the order of node ids."""
        found = [self._replies.pop(name) for name in message_ids if name in self._replies]
        return sorted(found, key=lambda reply: reply.metadata.src_node_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:  # noqa: ARG002
        """Pushes, and pulls without waiting, since nothing arrives later."""
        return self.pull_messages(self.push_messages(messages))

    def answer(self, message: Message) -> Message | None:
        """Returns a node's reply; None: nothing ever arrives (override it to try faults)."""
        context = self._contexts.get(message.metadata.dst_node_id)
        if context is None:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "the node is not connected"), reply_to=message)
        try:
            return self._app(message, context)
        except Exception as error:
            reason = f"{type(error)}:<'{error}'>"  # the words of a SuperNode
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
