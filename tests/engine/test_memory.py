import torch

from fedftg import params as tree
from fedftg.algorithms.base import ClientResult
from fedftg.engine.memory import ClientStore, rejection
from fedftg.params import Params

INITIAL = {"w": torch.tensor([1.0]), "n": torch.tensor(2)}


def store(track: bool = True) -> ClientStore:
    return ClientStore(lambda: {"m": torch.zeros(1)}, INITIAL, [1, 1, 2], track)


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
    assert kept.records == {}
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
