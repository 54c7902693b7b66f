"""Messages to nodes and their replies, with a bound on every wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
"""Seconds between two looks: short at first, for small models; longer the longer it takes."""
_MEANWHILE_SECONDS = 5.0


def until(done: Callable[[], bool], seconds: float) -> bool:
    """Looks again and again whether something is so, for at most ``seconds``; says whether it is."""
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while not done():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(pause * 1.3, _LONGEST_PAUSE)
    return True


def post(grid: Grid, kind: str, contents: Mapping[int, RecordDict], group: str, ttl: float) -> dict[str, int]:
    """Sends one message a node; returns the node of each message's id. What the SuperLink did not take is left out."""
    messages = [Message(content, node, kind, ttl=ttl, group_id=group) for node, content in contents.items()]
    taken = set(grid.push_messages(messages)) if messages else set()
    # Grids differ in whether they leave out what was not taken, so ids are those that messages got, not places in it.
    sent = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    return {name: node for name, node in sent.items() if name in taken}


def collect(grid: Grid, sent: dict[str, int]) -> dict[int, Message]:
    """The replies that are there, by node; their ids are taken out of ``sent``."""
    found: dict[int, Message] = {}
    if not sent:
        return found
    for reply in grid.pull_messages(list(sent)):
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
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[int, Message | str]:
    """One message a node, and its reply or the reason why there is none after ``seconds``.

    ``meanwhile`` is called every few seconds of a longer wait.
    """
    sent = post(grid, kind, contents, group, ttl=max(seconds, 1.0) + 60)
    taken = set(sent.values())
    replies: dict[int, Message | str] = {}

    called = time.monotonic()

    def all_there() -> bool:
        nonlocal called
        replies.update(collect(grid, sent))
        if sent and time.monotonic() - called > _MEANWHILE_SECONDS:
            meanwhile()
            called = time.monotonic()
        return not sent

    until(all_there, seconds)
    for node in contents:
        if node not in replies:
            late = f"no reply within {seconds:g} s" if node in taken else "the SuperLink did not take the message"
            replies[node] = late
    return replies


def trouble(reply: Message) -> str | None:
    """The text of an error reply in one line, or None where the reply has content."""
    if reply.has_content():
        return None
    code, reason = (reply.error.code, reply.error.reason) if reply.has_error() else (0, "an empty reply")
    return f"error {code} of its node: {' '.join(str(reason or 'no reason given').split())[:300]}"
