import json
from pathlib import Path

import pytest
import torch

from fedftg.algorithms.base import ClientResult, ServerState
from fedftg.errors import InputError
from fedftg.rundir import checkpoint
from fedftg.rundir.clients import ClientStore

PARAMS = {"z.weight": torch.arange(3.0), "a.bias": torch.ones(2)}
BUFFERS = {"n": torch.tensor(5)}


def state(round: int) -> ServerState:
    return ServerState(round, PARAMS, BUFFERS, {"c": torch.zeros(1)}, {"generator.w": torch.full((2,), 7.0)})


def store(folder: Path) -> ClientStore:
    made = ClientStore(dict, {**PARAMS, **BUFFERS}, [1, 1, 1], track_uploads=True)
    made.keep_in(folder)
    return made


def upload(client: int, value: float) -> ClientResult:
    params = {name: tensor + value for name, tensor in PARAMS.items()}
    return ClientResult(client, 1, torch.ones(2), params, BUFFERS, {}, {"m": torch.full((1,), value)}, 0.0)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def loaded(folder: Path) -> tuple[ServerState, ClientStore]:
    clients = store(folder)
    back = checkpoint.load(clients)
    assert back is not None
    return back, clients


def test_round_trip_keeps_values_types_and_order(tmp_path: Path) -> None:
    clients = store(tmp_path).updated([upload(1, 0.1)])
    checkpoint.save(state(3), clients)
    back, again = loaded(tmp_path)
    assert back.round == 3
    assert list(back.params) == ["z.weight", "a.bias"]
    for part in ("params", "buffers", "server", "refiner"):
        for name, tensor in getattr(state(3), part).items():
            assert torch.equal(getattr(back, part)[name], tensor)
            assert getattr(back, part)[name].dtype == tensor.dtype
    assert torch.equal(again.memory(1)["m"], torch.full((1,), 0.1))
    assert list(again.upload(1)) == ["z.weight", "a.bias", "n"]
    assert again.change_sum["z.weight"].dtype == torch.float64
    assert torch.equal(again.change_sum["z.weight"], clients.change_sum["z.weight"])


def test_files_that_no_checkpoint_names_are_removed(tmp_path: Path) -> None:
    for round in (1, 2):
        checkpoint.save(state(round), store(tmp_path).updated([upload(round, 1.0)]))
    kept = {"checkpoint.json", "state-000002.safetensors", "clients.bin"}
    assert names(tmp_path) == kept
    for name in ("state-000003.safetensors", "state-000003.safetensors.part"):
        (tmp_path / name).touch()
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == kept


def test_a_crash_before_the_index_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = store(tmp_path).updated([upload(0, 1.0)])
    checkpoint.save(state(1), clients)
    clients = clients.updated([upload(0, 2.0)])

    def die(*_: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", die)
        with pytest.raises(RuntimeError, match="power cut"):
            checkpoint.save(state(2), clients)
    back, again = loaded(tmp_path)
    assert (back.round, again.memory(0)["m"].item()) == (1, 1.0)
    checkpoint.save(state(2), clients)
    back, again = loaded(tmp_path)
    assert (back.round, again.memory(0)["m"].item()) == (2, 2.0)


def test_another_format_is_not_resumed_but_its_state_is_read(tmp_path: Path) -> None:
    assert checkpoint.load(store(tmp_path)) is None
    assert checkpoint.load_state(tmp_path) is None
    checkpoint.save(state(1), store(tmp_path))
    index = tmp_path / "checkpoint.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "format": 2}))
    with pytest.raises(InputError, match="has format 2, not 3; resume with its own version"):
        checkpoint.load(store(tmp_path))
    read = checkpoint.load_state(tmp_path)
    assert read is not None
    assert torch.equal(read.params["a.bias"], PARAMS["a.bias"])


@pytest.mark.parametrize(("name", "content"), [("state-000001.safetensors", "torn"), ("checkpoint.json", "{")])
def test_damage_is_one_line(tmp_path: Path, name: str, content: str) -> None:
    checkpoint.save(state(1), store(tmp_path))
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"checkpoint file .* cannot be read .*; put the file back"):
        checkpoint.load(store(tmp_path))
