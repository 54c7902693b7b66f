"""Which node is which client."""

from __future__ import annotations

from collections.abc import Callable, Collection

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedftg.errors import InputError
from fedftg.flower import mail, records
from fedftg.flower.remote import ClientFacts

Say = Callable[[str], None]
Judge = Callable[[ClientFacts], str | None]

_QUERY_SECONDS = 3600.0
"""How long a SuperLink keeps a question for its node; nothing waits for it so long."""


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
        """Nodes whose client another node has taken over, and that client."""
        self._rounds_started = False

    def refresh(self) -> None:
        """Looks who came and went, asks those who came, and takes the answers that are there; waits for nothing."""
        there = set(self._grid.get_node_ids())
        for client, node in list(self.nodes.items()):
            if node not in there:
                self._say(f"client {client} went away (node {node})")
                del self.nodes[client]
                self._asked.difference_update(old for old, lost in self._replaced.items() if lost == client)
                self._replaced = {old: lost for old, lost in self._replaced.items() if lost != client}
        self._asked &= there
        self._sent = {name: node for name, node in self._sent.items() if node in there}
        new = sorted(there - self._asked)
        self._asked.update(new)
        self._sent |= mail.post(self._grid, "query", {node: RecordDict() for node in new}, "query", _QUERY_SECONDS)
        for node, reply in sorted(mail.collect(self._grid, self._sent).items()):
            problem = mail.trouble(reply)
            if problem is None:
                try:
                    self._admit(node, ClientFacts.of(reply.content.config_records[records.CONFIG]))
                    continue
                except InputError as error:
                    if not self._rounds_started and isinstance(error, _Duplicate):
                        raise
                    problem = str(error)
                except KeyError:
                    problem = "its answer holds no facts"
            self._refuse(node, problem)

    def start(self) -> None:
        """From now on a second node for a client is one that was started again; before, it is a mistake."""
        self._rounds_started = True

    def ask_again(self) -> None:
        """Has nodes asked anew that could not answer; call it once a round."""
        self._asked -= self.refused.keys()
        self.refused.clear()

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Looks who is there until ``done()``, for at most ``seconds``; says whether it is."""

        def look() -> bool:
            self.refresh()
            return done()

        return mail.until(look, seconds)

    def present(self, clients: Collection[int]) -> int:
        """How many of some clients are there."""
        return len(self.nodes.keys() & set(clients))

    def first_refusal(self) -> str:
        """What a line about missing nodes ends with: the first node that cannot take part, if any."""
        node, problem = next(iter(self.refused.items()), (None, ""))
        return "" if node is None else f"; node {node} cannot take part: {problem}"

    def why_missing(self, client: int) -> str:
        """A reason for the record of a round."""
        return f"no node with partition-id={client} is there{self.first_refusal()}"

    def _admit(self, node: int, facts: ClientFacts) -> None:
        problem = self._judge(facts)
        if problem is not None:
            raise InputError(problem)
        before = self.nodes.get(facts.client)
        if before is not None and before != node:
            if not self._rounds_started:
                raise _Duplicate(
                    f"nodes {before} and {node} both say partition-id={facts.client}; give each SuperNode another one "
                    "by --node-config 'partition-id=N'"
                )
            # A node that was started again has a new id, and its old one may be listed for another minute.
            self._say(f"client {facts.client} came back as node {node}, in place of {before}")
            self._replaced[before] = facts.client
        else:
            self._say(f"client {facts.client} is there (node {node}): {facts.num_samples} samples")
        self.nodes[facts.client] = node

    def _refuse(self, node: int, problem: str) -> None:
        self._say(f"node {node} cannot take part: {problem}")
        self.refused[node] = problem


class _Duplicate(InputError):
    """Two nodes for one client before the first round: a mistake in starting them."""
