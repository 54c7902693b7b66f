import json
from pathlib import Path

import pytest
import torch

from fedftg.algorithms.base import ClientResult, ServerState
from fedftg.engine.memory import ClientStore
from fedftg.errors import InputError
from fedftg.rundir import checkpoint
from fedftg.rundir.packs import ClientRecord, Packs

PARAMS = {"z.weight": torch.arange(3.0), "a.bias": torch.ones(2)}
BUFFERS = {"n": torch.tensor(5)}


def make(round: int) -> tuple[ServerState, ClientStore]:
    state = ServerState(round, PARAMS, BUFFERS, {"c": torch.zeros(1)}, {"generator.w": torch.full((2,), 7.0)})
    clients = ClientStore(dict, {**PARAMS, **BUFFERS}, [1, 1, 1], track_uploads=True)
    return state, clients


def upload(client: int, value: float) -> ClientResult:
    params = {name: tensor + value for name, tensor in PARAMS.items()}
    return ClientResult(client, 1, torch.ones(2), params, BUFFERS, {}, {"m": torch.full((1,), value)}, 0.0)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_round_trip_keeps_values_types_and_order(tmp_path: Path) -> None:
    state, clients = make(3)
    clients = clients.updated([upload(1, 0.1)])
    checkpoint.save(tmp_path, state, clients)
    back = checkpoint.load(tmp_path)
    assert back is not None
    assert back.state.round == 3
    assert list(back.state.params) == ["z.weight", "a.bias"]
    for part in ("params", "buffers", "server", "refiner"):
        for name, tensor in getattr(state, part).items():
            assert torch.equal(getattr(back.state, part)[name], tensor)
            assert getattr(back.state, part)[name].dtype == tensor.dtype
    record = Packs(tmp_path).read(back.places[1], 1)
    assert torch.equal(record.memory["m"], torch.full((1,), 0.1))
    assert list(record.upload) == ["z.weight", "a.bias", "n"]
    assert back.change_sum["z.weight"].dtype == torch.float64
    assert torch.equal(back.change_sum["z.weight"], clients.change_sum["z.weight"])


def test_only_changed_clients_are_written_and_old_files_go(tmp_path: Path) -> None:
    state, clients = make(1)
    clients = clients.updated([upload(0, 1.0), upload(2, 2.0)])
    checkpoint.save(tmp_path, state, clients)
    first = tmp_path / "clients-000001-2.safetensors"
    untouched = first.stat().st_mtime_ns
    clients = clients.updated([upload(2, 3.0)])
    checkpoint.save(tmp_path, make(2)[0], clients)
    assert names(tmp_path) == {
        "checkpoint.json",
        "state-000002.safetensors",
        "clients-000001-2.safetensors",
        "clients-000002-1.safetensors",
    }
    assert first.stat().st_mtime_ns == untouched
    clients = clients.updated([upload(0, 4.0)])
    checkpoint.save(tmp_path, make(3)[0], clients)
    assert names(tmp_path) == {
        "checkpoint.json",
        "state-000003.safetensors",
        "clients-000002-1.safetensors",
        "clients-000003-1.safetensors",
    }


def test_files_of_the_last_checkpoint_stay_until_the_next(tmp_path: Path) -> None:
    """Also when every record in them has been replaced by one that was written between the two."""
    state, clients = make(1)
    clients = ClientStore(dict, {**PARAMS, **BUFFERS}, [1, 1, 1], True, bound=0, packs=Packs(tmp_path))
    clients = clients.updated([upload(0, 1.0)])
    clients.settle(clients)
    checkpoint.save(tmp_path, state, clients)
    for value in (2.0, 3.0):
        clients = clients.updated([upload(0, value)])
        clients.settle(clients)
    assert names(tmp_path) >= {"clients-000001-1.safetensors", "clients-000003-1.safetensors"}
    back = checkpoint.load(tmp_path)
    assert back is not None
    assert Packs(tmp_path).read(back.places[0], 0).memory["m"].item() == 1.0
    # What a process that dies here leaves behind is removed when the run goes on.
    (tmp_path / "clients-000004-1.safetensors.part").touch()
    (tmp_path / "state-000002.safetensors").touch()
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == {"checkpoint.json", "state-000001.safetensors", "clients-000001-1.safetensors"}


def test_without_a_checkpoint_all_is_swept(tmp_path: Path) -> None:
    Packs(tmp_path).write([(0, ClientRecord({"m": torch.zeros(1)}, {}))])
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == set()
    checkpoint.sweep(tmp_path / "nowhere")


def test_format_1_is_read_and_leaves(tmp_path: Path) -> None:
    """One file per client, as written by the version before."""
    state, clients = make(1)
    checkpoint.save(tmp_path, state, clients)
    (tmp_path / "clients").mkdir()
    kept = {"memory/m": torch.full((1,), 4.0), "upload/z.weight": torch.ones(3), "upload/a.bias": torch.ones(2)}
    for client in (0, 2):
        checkpoint.write_tensors(
            tmp_path / f"clients/00000{client}-000001.safetensors", {**kept, "upload/n": torch.tensor(1)}
        )
    index = json.loads((tmp_path / "checkpoint.json").read_text())
    index |= {"format": 1, "clients": {str(c): f"clients/00000{c}-000001.safetensors" for c in (0, 2)}}
    (tmp_path / "checkpoint.json").write_text(json.dumps(index))
    back = checkpoint.load(tmp_path)
    assert back is not None
    clients = ClientStore(dict, {**PARAMS, **BUFFERS}, [1, 1, 1], True, packs=Packs(tmp_path))
    clients.restore(back.places, back.change_sum)
    assert clients.memory(2)["m"].item() == 4.0
    clients = clients.updated([upload(0, 5.0)])
    checkpoint.save(tmp_path, make(2)[0], clients)
    assert {name for name in names(tmp_path) if "clients" in name} == {
        "clients/000002-000001.safetensors",
        "clients-000001-1.safetensors",
    }
    assert (clients.memory(0)["m"].item(), clients.memory(2)["m"].item()) == (5.0, 4.0)


def test_a_crash_before_the_index_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, clients = make(1)
    clients = clients.updated([upload(0, 1.0)])
    checkpoint.save(tmp_path, state, clients)
    clients = clients.updated([upload(0, 2.0)])

    def die(*_: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", die)
        with pytest.raises(RuntimeError, match="power cut"):
            checkpoint.save(tmp_path, make(2)[0], clients)
    back = checkpoint.load(tmp_path)
    assert back is not None
    assert back.state.round == 1
    assert Packs(tmp_path).read(back.places[0], 0).memory["m"].item() == 1.0
    checkpoint.save(tmp_path, make(2)[0], clients)
    assert len(names(tmp_path)) == 3


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None


@pytest.mark.parametrize("damage", ["torn", "missing", "no json", "format", "torn clients", "missing clients"])
def test_damage_is_one_line(tmp_path: Path, damage: str) -> None:
    state, clients = make(1)
    checkpoint.save(tmp_path, state, clients.updated([upload(0, 1.0)]))
    records = tmp_path / "clients-000001-1.safetensors"
    state_file, index = tmp_path / "state-000001.safetensors", tmp_path / "checkpoint.json"
    if damage == "torn":
        state_file.write_bytes(state_file.read_bytes()[:-5])
    elif damage == "torn clients":
        records.write_bytes(records.read_bytes()[:-5])
    elif damage == "missing clients":
        records.unlink()
    elif damage == "missing":
        state_file.unlink()
    elif damage == "no json":
        index.write_text("{")
    else:
        index.write_text(json.dumps({**json.loads(index.read_text()), "format": 99}))
    with pytest.raises(InputError, match=r"cannot be read|has format 99"):
        checkpoint.load(tmp_path)
