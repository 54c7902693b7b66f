"""A client's memory moves on only with rounds that counted, whatever was killed when."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict

import fedftg
from fedftg.flower.client import ClientMemory, memory_of, take

INITIAL = {"c": torch.zeros(2), "count": torch.tensor(0)}


def memory(folder: Path | None) -> ClientMemory:
    return memory_of(Context(1, 1, {}, RecordDict(), {}), "run", 1, folder)


@pytest.fixture(params=["disk", "context"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> ClientMemory:
    return memory(tmp_path if request.param == "disk" else None)


def trained(kept: ClientMemory, round: int, last: int, floor: int) -> float:
    """Takes the memory of ``last`` and keeps one after ``round``; returns what was taken."""
    taken = take(kept, last, floor, INITIAL, reset=False)
    kept.write(round, {"c": torch.full((2,), float(round)), "count": torch.tensor(round)})
    return float(taken["c"][0])


def test_a_client_that_never_took_part_has_the_initial_memory(kept: ClientMemory) -> None:
    assert take(kept, 0, 0, INITIAL, reset=False) is INITIAL
    assert take(kept, 5, 5, {}, reset=False) == {}


@pytest.mark.parametrize(
    ("steps", "taken", "left"),
    [
        ([(1, 0, 0), (2, 1, 1), (3, 2, 2)], [0, 1, 2], [2, 3]),  # the last two are kept
        ([(1, 0, 0), (2, 1, 1), (3, 1, 2)], [0, 1, 1], [1, 3]),  # round 2 did not count
        # A checkpoint every four rounds: the server may go back to round 4 until that of round 8 is written.
        ([(1, 0, 0), (3, 1, 0), (5, 3, 4), (6, 5, 4), (7, 6, 4)], [0, 1, 3, 5, 6], [3, 5, 6, 7]),
        ([(1, 0, 0), (3, 1, 0), (5, 3, 4), (6, 5, 4), (7, 6, 4), (5, 3, 4)], [0, 1, 3, 5, 6, 3], [3, 5]),
    ],
)
def test_memories_follow_the_rounds_that_counted(
    kept: ClientMemory, steps: list[tuple[int, int, int]], taken: list[float], left: list[int]
) -> None:
    assert [trained(kept, *step) for step in steps] == taken
    assert kept.rounds() == left


def test_what_is_gone_or_does_not_fit_is_an_error_or_a_new_start(kept: ClientMemory) -> None:
    kept.write(1, {"c": torch.zeros(3)})
    for last, problem in ((1, "memory of round 1 is damaged or of another model"), (7, "no memory of round 7")):
        with pytest.raises(fedftg.InputError, match=problem):
            take(kept, last, last, INITIAL, reset=False)
        assert take(kept, last, last, INITIAL, reset=True) is INITIAL


def test_a_torn_file_and_a_folder_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    kept: Any = memory(tmp_path)
    trained(kept, 1, 0, 0)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(fedftg.InputError, match="damaged"):
        take(kept, 1, 1, INITIAL, reset=False)
    with pytest.raises(fedftg.InputError, match="give a folder by --node-config state-dir"):
        memory(path).write(1, INITIAL)
