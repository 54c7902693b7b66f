from pathlib import Path

import pytest
import torch

from fedftg import params as tree
from fedftg.algorithms.base import ClientResult
from fedftg.engine.memory import ClientStore, rejection
from fedftg.params import Params
from fedftg.rundir.packs import Packs

INITIAL = {"w": torch.tensor([1.0]), "n": torch.tensor(2)}


def store(track: bool = True) -> ClientStore:
    return ClientStore(lambda: {"m": torch.zeros(1)}, INITIAL, [1, 1, 2], track)


def bounded(folder: Path, bound: float, clients: int = 3) -> ClientStore:
    return ClientStore(lambda: {"m": torch.zeros(1)}, INITIAL, [1] * clients, True, bound=bound, packs=Packs(folder))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


RECORD = 16
"""Bytes of a record of `result`: m and w of 4 each, n of 8."""


def result(client: int, value: float, **other: Params) -> ClientResult:
    fields = {"extra": {}, "memory": {"m": torch.tensor([value])}, **other}
    buffers = fields.pop("buffers", {"n": torch.tensor(4)})
    return ClientResult(client, 1, torch.ones(2), {"w": torch.tensor([value])}, buffers, loss=0.0, **fields)


def test_average_of_last_uploads_by_hand() -> None:
    """Sizes 1, 1, 2, all at 1 at first. Client 2 uploads 5: (1 + 1 + 2*5) / 4 = 3. Then client 0 uploads 9 and client 2
    uploads 2: (9 + 1 + 2*2) / 4 = 3.5. The integer: (2 + 2 + 2*4) / 4 = 3, then (4 + 2 + 2*4) / 4 = 3.5, even: 4."""
    kept = store()
    assert kept.average()["w"].item() == 1.0
    kept = kept.updated([result(2, 5.0)])
    assert kept.average()["w"].item() == 3.0
    assert kept.average()["n"].item() == 3
    kept = kept.updated([result(2, 2.0), result(0, 9.0)])
    assert kept.average()["w"].item() == 3.5
    assert kept.average()["n"].item() == 4
    assert kept.average()["n"].dtype == torch.int64


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


def test_memories_and_what_changed() -> None:
    kept = store()
    assert kept.memory(1)["m"].item() == 0.0
    kept = kept.updated([result(1, 7.0)])
    assert kept.memory(1)["m"].item() == 7.0
    assert kept.memory(0)["m"].item() == 0.0
    assert kept.changed == {1}


def test_without_tracking_nothing_is_kept_for_clients_without_memory() -> None:
    kept = store(track=False)
    kept = kept.updated([result(1, 7.0, memory={})])
    assert kept.held == []
    assert kept.change_sum == {}


def test_rejection_names_the_tensor() -> None:
    bad = torch.tensor([float("nan")])
    assert rejection(result(0, 1.0)) is None
    assert rejection(result(0, float("inf"))) == "non-finite parameter w"
    assert rejection(result(0, 1.0, buffers={"n": bad})) == "non-finite buffer n"
    assert rejection(result(0, 1.0, extra={"c": bad})) == "non-finite upload c"
    assert rejection(result(0, 1.0, memory={"m": bad})) == "non-finite memory m"


def test_an_update_leaves_the_old_store_alone() -> None:
    """So that a round that is broken off has changed nothing."""
    before = store().updated([result(0, 5.0)])
    average, changed = before.average(), set(before.changed)
    before.updated([result(0, 6.0), result(1, 7.0)])
    assert before.memory(0)["m"].item() == 5.0
    assert before.memory(1)["m"].item() == 0.0
    assert before.changed == changed
    assert torch.equal(before.average()["w"], average["w"])


def test_the_longest_idle_go_to_disk_first(tmp_path: Path) -> None:
    """Room for two records. Client 0 is active again after 1, so 1 goes when 2 comes, and then 0."""
    kept = bounded(tmp_path, 2 * RECORD)
    for client in (0, 1, 0):
        kept = kept.updated([result(client, float(client))])
        kept.settle(kept)
    assert (kept.held, files(tmp_path)) == ([1, 0], [])
    kept = kept.updated([result(2, 2.0)])
    kept.settle(kept)
    assert kept.held == [0, 2]
    assert files(tmp_path) == ["clients-000001-1.safetensors"]
    assert kept.memory(1)["m"].item() == 1.0
    assert kept.held == [0, 2]
    kept = kept.updated([result(1, 5.0)])
    kept.settle(kept)
    assert kept.held == [2, 1]
    assert files(tmp_path) == ["clients-000002-1.safetensors"], "the old record of client 1 is of no use"
    assert [kept.memory(client)["m"].item() for client in range(3)] == [0.0, 5.0, 2.0]


def test_a_bound_that_is_not_reached_writes_nothing(tmp_path: Path) -> None:
    kept = bounded(tmp_path / "checkpoint", 3 * RECORD)
    kept = kept.updated([result(client, 1.0) for client in range(3)])
    kept.settle(kept)
    assert not (tmp_path / "checkpoint").exists()


def test_the_bound_changes_no_bit(tmp_path: Path) -> None:
    """Against a store without files: memories, average and sum after each of 40 rounds, at three bounds."""
    stores = [bounded(tmp_path / str(bound), bound, clients=8) for bound in (0, 5 * RECORD, 1e9)]
    plain = ClientStore(lambda: {"m": torch.zeros(1)}, INITIAL, [1] * 8, True)
    rng = torch.Generator().manual_seed(0)
    for round in range(1, 41):
        cohort = torch.randperm(8, generator=rng)[:3].tolist()
        results = [result(client, torch.randn(1, generator=rng).item()) for client in cohort]
        plain = plain.updated(results)
        for index, store in enumerate(stores):
            kept = store.updated(results)
            kept.settle(store)
            if round % 7 == 0:
                kept.flush(tmp_path)
            assert all(torch.equal(kept.memory(c)["m"], plain.memory(c)["m"]) for c in range(8))
            assert all(torch.equal(kept.average()[name], value) for name, value in plain.average().items())
            assert all(torch.equal(kept.change_sum[name], value) for name, value in plain.change_sum.items())
            assert (len(kept.held) == 0, len(kept.held) <= 5) >= (index == 0, index <= 1)
            stores[index] = kept


def test_a_round_that_is_dropped_leaves_the_files_of_the_store(tmp_path: Path) -> None:
    before = bounded(tmp_path, 0).updated([result(0, 5.0), result(1, 6.0)])
    before.settle(before)
    dropped = before.updated([result(0, 9.0), result(1, 9.0), result(2, 9.0)])
    dropped.settle(before)
    assert [before.memory(client)["m"].item() for client in range(3)] == [5.0, 6.0, 0.0]
    before.settle(before)
    assert files(tmp_path) == ["clients-000001-2.safetensors"]


def test_files_mostly_out_of_date_are_cleared(tmp_path: Path) -> None:
    """Of four records in one file three are replaced: at the third the last one moves along, and the file goes."""
    kept = bounded(tmp_path, 0, clients=4).updated([result(client, float(client)) for client in range(4)])
    kept.settle(kept)
    for client in range(2):
        kept = kept.updated([result(client, 10.0)])
        kept.settle(kept)
    assert files(tmp_path) == [f"clients-00000{number}.safetensors" for number in ("1-4", "2-1", "3-1")]
    kept = kept.updated([result(2, 10.0)])
    kept.settle(kept)
    assert files(tmp_path) == [f"clients-00000{number}.safetensors" for number in ("2-1", "3-1", "4-2")]
    assert [kept.memory(client)["m"].item() for client in range(4)] == [10.0, 10.0, 10.0, 3.0]


@pytest.mark.parametrize("copied", [False, True], ids=["the same tensor", "an equal tensor"])
def test_memory_that_is_the_upload_is_kept_once(tmp_path: Path, copied: bool) -> None:
    """As MOON's, of a parameter of 1000 floats: 4000 bytes and not 8000, in memory and on disk."""
    value = torch.randn(1000)
    kept = bounded(tmp_path, 4000)
    memory = {"params/w": value.clone() if copied else value}
    sent = ClientResult(0, 1, torch.ones(2), {"w": value}, {}, {}, memory, 0.0)
    kept._initial = {"w": torch.zeros(1000)}
    kept.change_sum = {"w": torch.zeros(1000, dtype=torch.float64)}
    kept = kept.updated([sent])
    kept.settle(kept)
    assert kept.held == [0]
    place = kept.flush(tmp_path)[0]
    assert 4000 < (tmp_path / place).stat().st_size < 4600
    assert torch.equal(Packs(tmp_path).read(place, 0).memory["params/w"], value)


def test_a_zero_is_not_a_negative_zero() -> None:
    """They are equal and differ in a bit, so they are not kept as one."""
    sent = ClientResult(
        0, 1, torch.ones(2), {"w": torch.zeros(1)}, {"n": torch.tensor(2)}, {}, {"w": -torch.zeros(1)}, 0
    )
    assert torch.signbit(store().updated([sent]).memory(0)["w"]).all()


def test_a_part_of_a_stack_does_not_keep_the_stack() -> None:
    stack = torch.randn(10, 1)
    sent = ClientResult(0, 1, torch.ones(2), {"w": stack[3]}, {"n": torch.tensor(2)}, {}, {"m": stack[4]}, 0.0)
    assert store().updated([sent]).memory(0)["m"].untyped_storage().nbytes() == 4


def test_other_sizes_make_the_average_anew() -> None:
    """Uploads 1 and 4 of clients 0 and 1 and none of client 2: with sizes 1, 1, 2 the mean is (1 + 4 + 0) / 4."""
    initial = {"w": torch.zeros(2)}
    store = ClientStore(dict, initial, [1, 0, 1], True)
    for client, value in ((0, 1.0), (1, 4.0)):
        upload = {"w": torch.full((2,), value)}
        store = store.updated([ClientResult(client, 1, torch.ones(1), upload, {}, {}, {}, 0.0)])
    assert torch.equal(store.average()["w"], torch.full((2,), 0.5))
    again = store.reweighed([1, 1, 2])
    assert torch.equal(again.average()["w"], torch.full((2,), 1.25))
    assert torch.equal(store.average()["w"], torch.full((2,), 0.5))
