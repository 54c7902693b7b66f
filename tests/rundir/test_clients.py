import json
from pathlib import Path

import pytest
import torch

from fedftg.algorithms.base import ClientResult
from fedftg.errors import InputError
from fedftg.params import Params
from fedftg.rundir.clients import ClientStore

INITIAL = {"w": torch.tensor([1.0]), "n": torch.tensor(2)}


def store(folder: Path, track: bool = True) -> ClientStore:
    made = ClientStore(lambda: {"m": torch.zeros(1)}, INITIAL, [1, 1, 2], track)
    made.keep_in(folder)
    return made


def result(client: int, value: float, **other: Params) -> ClientResult:
    fields = {"buffers": {"n": torch.tensor(4)}, "memory": {"m": torch.tensor([value])}, **other}
    return ClientResult(client, 1, torch.ones(2), {"w": torch.tensor([value])}, extra={}, loss=0.0, **fields)


def memories(kept: ClientStore) -> list[float]:
    return [kept.memory(client)["m"].item() for client in range(3)]


def test_average_of_last_uploads_by_hand() -> None:
    """Sizes 1, 1, 2, all at 1 at first. Client 2 uploads 5: (1 + 1 + 2*5) / 4 = 3. Then client 0 uploads 9 and client 2
    uploads 2: (9 + 1 + 2*2) / 4 = 3.5. The integer: (2 + 2 + 2*4) / 4 = 3, then (4 + 2 + 2*4) / 4 = 3.5, even: 4."""
    kept = ClientStore(dict, INITIAL, [1, 1, 2], True)
    temporary = kept.folder
    assert kept.average()["w"].item() == 1.0
    kept = kept.updated([result(2, 5.0)])
    assert (kept.average()["w"].item(), kept.average()["n"].item()) == (3.0, 3)
    kept = kept.updated([result(2, 2.0), result(0, 9.0)])
    assert (kept.average()["w"].item(), kept.average()["n"].item()) == (3.5, 4)
    assert kept.average()["n"].dtype == torch.int64
    assert (temporary / "clients.bin").exists()
    del kept
    assert not temporary.exists()


def test_nothing_to_keep_writes_nothing(tmp_path: Path) -> None:
    kept = store(tmp_path / "checkpoint", track=False).updated([result(1, 7.0, memory={})])
    assert kept.change_sum == {}
    assert memories(kept) == [0.0, 0.0, 0.0]
    assert not (tmp_path / "checkpoint").exists()


def test_rows_of_the_last_checkpoint_stay_until_the_next(tmp_path: Path) -> None:
    """At a checkpoint every third round, which another process reads in each round of 30; each round is undone once."""
    rng = torch.Generator().manual_seed(0)
    kept, expected = store(tmp_path), [0.0, 0.0, 0.0]
    saved, then = kept.flush(), list(expected)
    for round in range(30):
        kept.updated([result(client, -1.0) for client in range(3)])
        assert memories(kept) == expected
        before, start = kept, list(expected)
        for client in torch.randperm(3, generator=rng)[:2].tolist():
            expected[client] = float(10 * round + client)
        cohort = [result(client, value) for client, value in enumerate(expected) if value != start[client]]
        kept = kept.updated(cohort)
        assert (memories(before), memories(kept)) == (start, expected)
        if round % 3 == 2:
            saved, then = kept.flush(), list(expected)
            kept.commit()
        other = store(tmp_path)
        other.restore(json.loads(json.dumps(saved)), kept.change_sum)
        assert memories(other) == then
    # 3 clients, 2 in a cohort: at most 3 rows of the checkpoint, 3 of the state and 3 of a round; 16 bytes each.
    assert (tmp_path / "clients.bin").stat().st_size <= 9 * 16


def test_any_tensors_but_the_same_for_every_client(tmp_path: Path) -> None:
    """Odd sizes, views, a scalar, an empty tensor, one with a gradient."""
    kinds = (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64)
    given: Params = {str(kind): torch.tensor([0, 1, 1]).to(kind) for kind in kinds}
    given |= {"view": torch.arange(6.0).view(2, 3).t(), "scalar": torch.tensor(3), "none": torch.ones(0, 2)}
    given |= {"grad": torch.ones(2, requires_grad=True)}
    kept = store(tmp_path).updated([result(client, 1.0, memory=given) for client in range(2)])
    back = kept.memory(1)
    assert list(back) == list(given)
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in given.items())
    with pytest.raises(InputError, match="must keep tensors of the same names, types and shapes"):
        kept.updated([result(2, 1.0, memory={"m": torch.ones(3)})])


def test_damage_is_one_line(tmp_path: Path) -> None:
    kept = store(tmp_path).updated([result(0, 1.0), result(1, 2.0)])
    file = tmp_path / "clients.bin"
    file.write_bytes(file.read_bytes()[:-1])
    saved = kept.flush()
    with pytest.raises(InputError, match=r"clients.bin is missing or cut off; put the file back"):
        store(tmp_path).restore(saved, {})
