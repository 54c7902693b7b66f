"""A client's memory moves on only with rounds that counted, whatever was killed when."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict

import fedftg
from fedftg.flower.client_memory import ClientMemory, ContextMemory, DiskMemory, take

INITIAL = {"c": torch.zeros(2), "count": torch.tensor(0)}


def after(round: int) -> dict[str, torch.Tensor]:
    return {"c": torch.full((2,), float(round)), "count": torch.tensor(round)}


@pytest.fixture(params=["disk", "context"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> ClientMemory:
    return DiskMemory(tmp_path / "run" / "client") if request.param == "disk" else ContextMemory(RecordDict(), "run/1")


def trained(kept: ClientMemory, round: int, last: int, floor: int) -> float:
    memory = take(kept, last, floor, INITIAL, reset=False)
    kept.write(round, after(round))
    return float(memory["c"][0])


def test_a_client_that_never_took_part_has_the_initial_memory(kept: ClientMemory) -> None:
    assert take(kept, 0, 0, INITIAL, reset=False) is INITIAL
    assert take(kept, 5, 5, {}, reset=False) == {}


def test_rounds_that_counted_go_on_and_the_last_two_are_kept(kept: ClientMemory) -> None:
    assert [trained(kept, round, last=round - 1, floor=round - 1) for round in (1, 2, 3)] == [0, 1, 2]
    assert kept.rounds() == [2, 3]


def test_a_round_that_did_not_count_is_forgotten(kept: ClientMemory) -> None:
    trained(kept, 1, last=0, floor=0)
    trained(kept, 2, last=1, floor=1)
    assert trained(kept, 3, last=1, floor=2) == 1
    assert kept.rounds() == [1, 3]


def test_what_the_servers_checkpoint_may_need_is_kept(kept: ClientMemory) -> None:
    """A checkpoint every four rounds: the server may go back to round 4 until that of round 8 is there."""
    for round in (1, 3, 5, 6, 7):
        last = {1: 0, 3: 1, 5: 3, 6: 5, 7: 6}[round]
        trained(kept, round, last=last, floor=(round - 1) // 4 * 4)
    assert kept.rounds() == [3, 5, 6, 7]
    assert trained(kept, 5, last=3, floor=4) == 3
    assert kept.rounds() == [3, 5]


def test_what_is_gone_is_an_error_or_a_new_start(kept: ClientMemory) -> None:
    trained(kept, 1, last=0, floor=0)
    with pytest.raises(fedftg.InputError, match="no memory of round 7"):
        take(kept, 7, 6, INITIAL, reset=False)
    assert take(kept, 7, 6, INITIAL, reset=True) is INITIAL


def test_what_does_not_fit_is_refused(kept: ClientMemory) -> None:
    kept.write(1, {"c": torch.zeros(3)})
    with pytest.raises(fedftg.InputError, match="round 1"):
        take(kept, 1, 1, INITIAL, reset=False)
    assert take(kept, 1, 1, INITIAL, reset=True) is INITIAL


def test_a_torn_file_is_refused(tmp_path: Path, federation: Callable[..., object]) -> None:
    kept = DiskMemory(tmp_path / "m")
    kept.write(1, after(1))
    path = next((tmp_path / "m").iterdir())
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(fedftg.InputError, match="damaged"):
        take(kept, 1, 1, INITIAL, reset=False)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fedftg.InputError, match="give a folder by --node-config state-dir"):
        DiskMemory(tmp_path / "file" / "m").write(1, after(1))
