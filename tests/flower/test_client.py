"""A client's memory moves on only with rounds that counted, whatever was killed when."""

from pathlib import Path

import pytest
import torch

import fedftg
from fedftg.flower.client import ClientMemory

INITIAL = {"c": torch.zeros(2), "count": torch.tensor(0)}


def trained(kept: ClientMemory, round: int, last: int, floor: int) -> float:
    """Takes the memory of ``last`` and keeps one after ``round``; returns what was taken."""
    taken = kept.take(last, floor, INITIAL, reset=False)
    kept.write(round, {"c": torch.full((2,), float(round)), "count": torch.tensor(round)})
    return float(taken["c"][0])


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
    tmp_path: Path, steps: list[tuple[int, int, int]], taken: list[float], left: list[int]
) -> None:
    kept = ClientMemory(tmp_path, "run", 1)
    assert kept.take(5, 5, {}, reset=False) == {}
    assert [trained(kept, *step) for step in steps] == taken
    assert kept.rounds() == left


def test_what_is_gone_or_damaged_is_an_error_or_a_new_start(tmp_path: Path) -> None:
    kept = ClientMemory(tmp_path, "run", 1)
    trained(kept, 1, 0, 0)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    for last in (1, 7):
        with pytest.raises(fedftg.InputError, match=f"no memory of round {last} of its client, or a damaged one"):
            kept.take(last, last, INITIAL, reset=False)
        assert kept.take(last, last, INITIAL, reset=True) is INITIAL
    with pytest.raises(fedftg.InputError, match="give another state-dir"):
        ClientMemory(path, "run", 1).write(1, INITIAL)
