"""Which node is which client."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedftg.errors import InputError
from fedftg.flower import mail, records
from fedftg.flower.remote import ClientFacts

Say = Callable[[str], None]
Judge = Callable[[ClientFacts], str | None]

_QUERY_SECONDS = 3600.0
"""How long a SuperLink keeps a question for its node; nothing waits for it so long."""
_REASK_SECONDS = 15.0
"""While nodes are waited for, those that cannot take part are asked again so often."""


class Roster:
    """The nodes that are there, and their clients; nodes are asked once, and again when they could not answer.

    Args:
        grid: the messages' way.
        judge: says why a client that a node claims to be cannot take part, or None; called once per answer.
        say: tells the operator.
    """

    def __init__(self, grid: Grid, judge: Judge, say: Say) -> None:
        self._grid, self._judge, self._say = grid, judge, say
        self.nodes: dict[int, int] = {}
        """The node of each client that is there."""
        self.refused: dict[int, str] = {}
        """Nodes that cannot take part, and why."""
        self._asked: set[int] = set()
        self._sent: dict[str, int] = {}
        self._replaced: dict[int, int] = {}
        """Nodes whose client another node has taken over, and that client; each is asked whether it still lives."""
        self._rival: dict[int, int] = {}
        """Nodes that claim a client which a living node has, and that node."""
        self._told: dict[int, str] = {}
        self.rounds_started = False
        """From then on a client that two living nodes claim stays with the first; before, it ends the run."""

    def refresh(self) -> None:
        """Looks who came and went, asks those who came, and takes the answers that are there; waits for nothing."""
        there = set(self._grid.get_node_ids())
        for client, node in list(self.nodes.items()):
            if node not in there:
                self._say(f"client {client} went away (node {node})")
                del self.nodes[client]
        self._replaced = {old: client for old, client in self._replaced.items() if old in there}
        self._asked &= there
        self._sent = {name: node for name, node in self._sent.items() if node in there}
        self._ask(sorted(there - self._asked))
        for node, reply in sorted(mail.collect(self._grid, self._sent).items()):
            problem = self._answered(node, reply)
            # A node whose client is on another one by now is expected to be dead.
            if problem is not None and self._replaced.pop(node, None) is None:
                self._refuse(node, problem)

    @property
    def undecided(self) -> bool:
        """Whether a node that another one claims to follow may still live."""
        return bool(self._replaced)

    def ask_again(self) -> None:
        """Has nodes asked anew that could not take part; call it once a round."""
        living = set(self.nodes.values())
        again = {node for node in self.refused if self._rival.get(node) not in living}
        self._asked -= again
        self.refused = {node: problem for node, problem in self.refused.items() if node not in again}

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Looks who is there until ``done()``, for at most ``seconds``; says whether it is."""
        asked = time.monotonic()

        def look() -> bool:
            nonlocal asked
            if time.monotonic() - asked > _REASK_SECONDS:
                self.ask_again()
                asked = time.monotonic()
            self.refresh()
            return done()

        return mail.until(look, seconds)

    def present(self, clients: Collection[int]) -> int:
        """How many of some clients are there."""
        return sum(client in clients for client in self.nodes)

    def first_refusal(self) -> str:
        """What a line about missing nodes ends with: the first node that cannot take part, if any."""
        node, problem = next(iter(self.refused.items()), (None, ""))
        return "" if node is None else f"; node {node} cannot take part: {problem}"

    def why_missing(self, client: int) -> str:
        """A reason for the record of a round."""
        return f"no node with partition-id={client} is there{self.first_refusal()}"

    def _ask(self, nodes: list[int]) -> None:
        """Sends the question; a node whose SuperLink did not take it is asked at the next look."""
        sent = mail.post(self._grid, "query", {node: RecordDict() for node in nodes}, "query", _QUERY_SECONDS)
        self._sent |= sent
        self._asked.update(sent.values())

    def _answered(self, node: int, reply: Message) -> str | None:
        """Takes a node's answer in; returns why it cannot take part, or None."""
        problem = mail.trouble(reply)
        if problem is not None:
            return problem
        try:
            facts = ClientFacts.of(reply.content.config_records[records.CONFIG])
        except KeyError:
            return "its answer holds no facts"
        except InputError as error:
            return str(error)
        problem = self._judge(facts)
        if problem is None:
            self._admit(node, facts)
        return problem

    def _admit(self, node: int, facts: ClientFacts) -> None:
        client, before = facts.client, self.nodes.get(facts.client)
        if self._replaced.pop(node, None) == client and before is not None:
            self._two_live(client, first=node, second=before)
            return
        if before is not None and before != node:
            # A node that was started again has a new id, and its old one may be listed for another minute: the new one
            # goes on, and the old one is asked whether it still lives.
            self._say(f"client {client} came back as node {node}, in place of {before}")
            self._replaced[before] = client
            self._ask([before])
        elif before is None:
            self._say(f"client {client} is there (node {node}): {facts.num_samples} samples")
        self.nodes[client] = node

    def _two_live(self, client: int, first: int, second: int) -> None:
        problem = (
            f"nodes {first} and {second} both say partition-id={client}; give each SuperNode another one by "
            "--node-config 'partition-id=N'"
        )
        if not self.rounds_started:
            raise InputError(problem)
        self._rival[second] = first
        self.nodes[client] = first
        self._refuse(second, problem)

    def _refuse(self, node: int, problem: str) -> None:
        if self._told.get(node) != problem:
            self._say(f"node {node} cannot take part: {problem}")
            self._told[node] = problem
        self.refused[node] = problem
