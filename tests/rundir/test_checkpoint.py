import json
from pathlib import Path

import pytest
import torch

from fedftg.algorithms.base import ClientResult, ServerState
from fedftg.engine.memory import ClientStore
from fedftg.errors import InputError
from fedftg.rundir import checkpoint

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
    assert torch.equal(back.clients[1].memory["m"], torch.full((1,), 0.1))
    assert list(back.clients[1].upload) == ["z.weight", "a.bias", "n"]
    assert back.change_sum["z.weight"].dtype == torch.float64
    assert torch.equal(back.change_sum["z.weight"], clients.change_sum["z.weight"])


def test_only_changed_clients_are_written_and_old_files_go(tmp_path: Path) -> None:
    state, clients = make(1)
    clients = clients.updated([upload(0, 1.0), upload(2, 2.0)])
    checkpoint.save(tmp_path, state, clients)
    untouched = (tmp_path / "clients" / "000000-000001.safetensors").stat().st_mtime_ns
    clients = clients.updated([upload(2, 3.0)])
    checkpoint.save(tmp_path, make(2)[0], clients)
    assert names(tmp_path) == {
        "checkpoint.json",
        "state-000002.safetensors",
        "clients/000000-000001.safetensors",
        "clients/000002-000002.safetensors",
    }
    assert (tmp_path / "clients" / "000000-000001.safetensors").stat().st_mtime_ns == untouched


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
    assert back.clients[0].memory["m"].item() == 1.0
    checkpoint.save(tmp_path, make(2)[0], clients)
    assert len(names(tmp_path)) == 3


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None


@pytest.mark.parametrize("damage", ["torn", "missing", "no json", "format"])
def test_damage_is_one_line(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, *make(1))
    state_file, index = tmp_path / "state-000001.safetensors", tmp_path / "checkpoint.json"
    if damage == "torn":
        state_file.write_bytes(state_file.read_bytes()[:-5])
    elif damage == "missing":
        state_file.unlink()
    elif damage == "no json":
        index.write_text("{")
    else:
        index.write_text(json.dumps({**json.loads(index.read_text()), "format": 99}))
    with pytest.raises(InputError, match=r"cannot be read|has format 99"):
        checkpoint.load(tmp_path)
