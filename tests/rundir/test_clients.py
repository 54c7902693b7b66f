import json
from pathlib import Path

import pytest
import torch

from fedftg import params as tree
from fedftg.algorithms.base import ClientResult
from fedftg.errors import InputError
from fedftg.params import Params
from fedftg.rundir.clients import ClientStore

INITIAL = {"w": torch.tensor([1.0]), "n": torch.tensor(2)}


def store(track: bool = True, folder: Path | None = None) -> ClientStore:
    return ClientStore(lambda: {"m": torch.zeros(1)}, INITIAL, [1, 1, 2], track, folder)


def result(client: int, value: float, **other: Params) -> ClientResult:
    fields = {"buffers": {"n": torch.tensor(4)}, "memory": {"m": torch.tensor([value])}, **other}
    return ClientResult(client, 1, torch.ones(2), {"w": torch.tensor([value])}, extra={}, loss=0.0, **fields)


def memories(kept: ClientStore) -> list[float]:
    return [kept.memory(client)["m"].item() for client in range(3)]


def again(kept: ClientStore) -> ClientStore:
    """The store of a process that reads the last checkpoint's values from the folder."""
    other = store(kept.tracks_uploads, kept.folder)
    other.restore(json.loads(json.dumps(kept.flush())), kept.change_sum)
    return other


def test_average_of_last_uploads_by_hand() -> None:
    """Sizes 1, 1, 2, all at 1 at first. Client 2 uploads 5: (1 + 1 + 2*5) / 4 = 3. Then client 0 uploads 9 and client 2
    uploads 2: (9 + 1 + 2*2) / 4 = 3.5. The integer: (2 + 2 + 2*4) / 4 = 3, then (4 + 2 + 2*4) / 4 = 3.5, even: 4.
    With sizes 2, 0, 2 it is (2*9 + 2*2) / 4 = 5.5."""
    kept = store()
    assert kept.average()["w"].item() == 1.0
    kept = kept.updated([result(2, 5.0)])
    assert (kept.average()["w"].item(), kept.average()["n"].item()) == (3.0, 3)
    kept = kept.updated([result(2, 2.0), result(0, 9.0)])
    assert (kept.average()["w"].item(), kept.average()["n"].item()) == (3.5, 4)
    assert kept.average()["n"].dtype == torch.int64
    assert kept.reweighed([2, 0, 2]).average()["w"].item() == 5.5
    assert kept.average()["w"].item() == 3.5


def test_running_sum_equals_the_average_from_scratch() -> None:
    rng = torch.Generator().manual_seed(0)
    kept, last = store(), dict.fromkeys(range(3), INITIAL)
    for _ in range(50):
        for client in range(3):
            if torch.rand(1, generator=rng).item() < 0.5:
                upload = result(client, torch.randn(1, generator=rng).item())
                kept = kept.updated([upload])
                last[client] = {**upload.params, **upload.buffers}
    scratch = tree.weighted_mean([last[0], last[1], last[2]], [1, 1, 2])
    torch.testing.assert_close(kept.average(), scratch)


def test_a_client_that_never_took_part_has_the_initial_memory(tmp_path: Path) -> None:
    kept = store(folder=tmp_path).updated([result(1, 7.0)])
    assert memories(kept) == [0.0, 7.0, 0.0]
    assert torch.equal(kept.upload(1)["w"], torch.tensor([7.0]))
    assert kept.upload(0)["w"].item() == 1.0


def test_nothing_to_keep_writes_nothing(tmp_path: Path) -> None:
    kept = store(track=False, folder=tmp_path / "checkpoint").updated([result(1, 7.0, memory={})])
    assert kept.change_sum == {}
    assert memories(kept) == [0.0, 0.0, 0.0]
    assert not (tmp_path / "checkpoint").exists()


def test_a_round_that_is_dropped_changes_nothing(tmp_path: Path) -> None:
    before = store(folder=tmp_path).updated([result(0, 5.0)])
    average = before.average()
    for value in (6.0, 7.0):
        before.updated([result(0, value), result(1, value)])
        assert memories(before) == [5.0, 0.0, 0.0]
        assert torch.equal(before.average()["w"], average["w"])
    after = before.updated([result(0, 8.0)])
    assert memories(after) == [8.0, 0.0, 0.0]
    assert memories(before) == [5.0, 0.0, 0.0]


def test_rows_of_the_last_checkpoint_stay_until_the_next(tmp_path: Path) -> None:
    """At a checkpoint every third round each one is read back by another process in each round of 30."""
    rng = torch.Generator().manual_seed(0)
    kept, expected = store(folder=tmp_path), [0.0, 0.0, 0.0]
    saved, then = kept.flush(), list(expected)
    for round in range(30):
        cohort = torch.randperm(3, generator=rng)[:2].tolist()
        for client in cohort:
            expected[client] = float(10 * round + client)
        kept = kept.updated([result(client, expected[client]) for client in cohort])
        kept.updated([result(client, -1.0) for client in range(3)])  # broken off
        assert memories(kept) == expected
        if round % 3 == 2:
            saved, then = kept.flush(), list(expected)
            kept.commit()
        other = store(folder=tmp_path)
        other.restore(saved, kept.change_sum)
        assert memories(other) == then
    # 3 clients, 2 in a cohort: at most 3 rows of the checkpoint, 3 of the state and 3 of a round.
    assert (tmp_path / "clients-0.bin").stat().st_size <= 9 * 3 * 64


def test_a_resumed_store_goes_on(tmp_path: Path) -> None:
    kept = again(store(folder=tmp_path).updated([result(0, 5.0), result(2, 6.0)]))
    saved = kept.flush()
    assert memories(kept.updated([result(0, 9.0)])) == [9.0, 0.0, 6.0]
    kept.restore(saved, kept.change_sum)
    assert memories(kept) == [5.0, 0.0, 6.0]


def test_any_tensors_in_any_rows(tmp_path: Path) -> None:
    """Types, shapes, views, an empty tensor; clients of one run may keep different ones."""
    base = torch.arange(6.0).view(2, 3)
    kinds = (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64)
    first: Params = {str(kind): torch.tensor([0, 1, 1]).to(kind) for kind in kinds}
    first |= {"z": base.t(), "a": torch.tensor(3), "none": torch.ones(0, 2), "grad": torch.ones(2, requires_grad=True)}
    given = {0: first, 1: {"w": torch.tensor([4.0])}, 2: {}}
    kept = store(folder=tmp_path).updated([result(client, 1.0, memory=value) for client, value in given.items()])
    for reader in (kept, again(kept)):
        for client, memory in given.items():
            back = reader.memory(client)
            assert list(back) == list(memory)
            assert all(torch.equal(back[name], value) for name, value in memory.items())
            assert all(back[name].dtype == value.dtype for name, value in memory.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"clients-{number}.bin" for number in range(3)]


@pytest.mark.parametrize(("zero", "size"), [(0.0, 4032), (-0.0, 8064)], ids=["the same bits", "an equal value"])
def test_memory_that_is_the_upload_is_kept_once(tmp_path: Path, zero: float, size: int) -> None:
    """As MOON's: 1000 floats take 63 * 64 bytes once. 0 and -0 are equal, but not the same bits."""
    value = torch.zeros(1000)
    kept = ClientStore(dict, {"w": value}, [1], True, tmp_path)
    memory = {"params/w": torch.full((1000,), zero)}
    kept = kept.updated([ClientResult(0, 1, torch.ones(2), {"w": value}, {}, {}, memory, 0.0)])
    assert (tmp_path / "clients-0.bin").stat().st_size == size
    assert torch.signbit(kept.memory(0)["params/w"]).all() == (size == 8064)


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_damage_is_one_line(tmp_path: Path, damage: str) -> None:
    kept = store(folder=tmp_path).updated([result(0, 1.0), result(1, 2.0)])
    file = tmp_path / "clients-0.bin"
    content = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"clients-0.bin is missing or cut off; put the file back"):
        store(folder=tmp_path).restore({"layouts": kept._rows.layouts, "clients": {"1": [0, 1]}}, {})
