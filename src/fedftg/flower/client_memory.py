"""What a client keeps between rounds, on its node: SCAFFOLD's control variate, FedDyn's drift, MOON's last model.

A memory is filed under the round after which it holds. The server's message names the last round of this client that
counted, and a floor: the round of the server's last checkpoint, which it might go back to. What is newer than the round
named belongs to rounds that did not count, and goes; what is older than the floor needs goes too. So server and client
move on together whatever is killed when, without asking each other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from flwr.app import RecordDict

from fedftg.algorithms.base import Memory
from fedftg.errors import InputError
from fedftg.flower.records import RecordError, decode, encode
from fedftg.rundir.tensors import read_tensors, write_tensors

NEW_START = "allow a new start by lost-memory=reset (in local_train: lost_memory='reset')"
"""What to do where a client's memory is gone for good."""


class ClientMemory(Protocol):
    """One client's memories of one run, by round."""

    def rounds(self) -> list[int]:
        """The rounds whose memory is there, ascending."""
        ...

    def read(self, round: int, template: Memory) -> Memory:
        """The memory after a round that is there; raises `InputError` where it does not fit ``template``."""
        ...

    def write(self, round: int, memory: Memory) -> None:
        """Keeps the memory after a round, as a whole or not at all."""
        ...

    def drop(self, round: int) -> None:
        """Forgets that of one round."""
        ...


class DiskMemory:
    """Files ``memory-<round>.safetensors`` in a folder, written aside and renamed.

    Args:
        folder: of one client in one run; made when the first memory is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rounds(self) -> list[int]:
        """The rounds that have a file."""
        names = (re.fullmatch(r"memory-(\d+)\.safetensors", path.name) for path in self._folder.glob("memory-*"))
        return sorted(int(name[1]) for name in names if name)

    def read(self, round: int, template: Memory) -> Memory:
        """The content of a round's file."""
        try:
            memory = read_tensors(self._path(round))
        except InputError:
            memory = {}
        if {name: (t.shape, t.dtype) for name, t in memory.items()} != {
            name: (t.shape, t.dtype) for name, t in template.items()
        }:
            raise InputError(
                f"the client's memory of round {round} is damaged or of another model; put the node's old state-dir "
                f"back, or {NEW_START}"
            )
        return {name: memory[name].clone() for name in template}

    def write(self, round: int, memory: Memory) -> None:
        """Writes a file; raises `InputError` where the folder cannot be written to."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path(round), memory)
        except OSError as error:
            raise InputError(
                f"the client's memory cannot be written ({error.strerror}); give a folder by --node-config state-dir"
            ) from None

    def drop(self, round: int) -> None:
        """Removes a file."""
        self._path(round).unlink(missing_ok=True)

    def _path(self, round: int) -> Path:
        return self._folder / f"memory-{round:06d}.safetensors"


class ContextMemory:
    """Records in Flower's ``Context.state``: gone when the node restarts or the run ends.

    Args:
        state: of the context.
        key: names client and run.
    """

    def __init__(self, state: RecordDict, key: str) -> None:
        self._state = state
        self._prefix = f"fedftg/{key}/"

    def rounds(self) -> list[int]:
        """The rounds that have a record."""
        return sorted(int(name.removeprefix(self._prefix)) for name in self._state if name.startswith(self._prefix))

    def read(self, round: int, template: Memory) -> Memory:
        """The content of a round's record."""
        try:
            return decode(self._state.array_records[f"{self._prefix}{round}"], template)
        except RecordError as error:
            raise InputError(f"the client's memory of round {round} does not fit: {error}") from None

    def write(self, round: int, memory: Memory) -> None:
        """Adds a record."""
        self._state[f"{self._prefix}{round}"] = encode(memory)

    def drop(self, round: int) -> None:
        """Removes a record."""
        self._state.pop(f"{self._prefix}{round}", None)


def take(kept: ClientMemory, last: int, floor: int, initial: Memory, *, reset: bool) -> Memory:
    """The memory that a client starts a round from, after what is of no more use was dropped.

    Args:
        kept: what the node has.
        last: the last round of this client that counted; 0: none did.
        floor: the round of the server's last checkpoint.
        initial: the memory of a client that never took part.
        reset: start from ``initial`` where that of ``last`` is gone; otherwise it is an error.

    Raises:
        InputError: the memory of ``last`` is not there, or is damaged.
    """
    if not initial:
        return {}
    there = kept.rounds()
    needed = max((round for round in there if round <= min(floor, last)), default=0)
    for round in there:
        if round > last or round < needed:
            kept.drop(round)
    if last == 0:
        return initial
    if last in there:
        try:
            return kept.read(last, initial)
        except InputError:
            if not reset:
                raise
    if reset:
        return initial
    raise InputError(
        f"this node has no memory of round {last}, the client's last; put the node's old state-dir back, or {NEW_START}"
    )
