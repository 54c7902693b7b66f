"""Arrays of a Flower app and parameters of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor, nn

from fedftg.errors import InputError
from fedftg.flower.wire import Layout, decode, encode


class Odd(nn.Module):
    """A weight under two names, a buffer that does not travel, a counter, and half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2).half()
        self.register_buffer("scale", torch.full((4,), 3.0), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head((self.norm(self.tied(self.embed(images))) * self.scale).half())


def test_split_and_join_are_inverse_and_keep_names_order_and_types() -> None:
    model = Odd()
    model.norm.num_batches_tracked += 7
    record = ArrayRecord(model.state_dict())
    layout = Layout(model, record)
    params, buffers = layout.split(decode(record, layout.template))
    assert list(params) == [name for name, _ in model.named_parameters()]
    assert list(buffers) == [name for name, _ in model.named_buffers()]
    assert params["head.weight"].dtype == torch.float32
    assert torch.equal(buffers["scale"], torch.full((4,), 3.0))
    back = encode(layout.join(params, buffers))
    assert list(back) == list(record)
    for name, value in model.state_dict().items():
        there = back[name].numpy()
        assert there.dtype == record[name].numpy().dtype
        assert (there == value.numpy()).all()


def test_arrays_given_as_a_list_are_in_the_order_of_the_state_dict() -> None:
    model = nn.Linear(3, 2)
    record = ArrayRecord([value.numpy() for value in model.state_dict().values()])
    layout = Layout(model, record)
    params, _ = layout.split(decode(record, layout.template))
    assert torch.equal(params["weight"], model.weight.detach())
    assert list(layout.join(params, {})) == ["0", "1"]


def test_an_aggregate_comes_back_in_the_types_that_were_sent() -> None:
    model = nn.BatchNorm1d(2)
    layout = Layout(model, ArrayRecord(model.state_dict()))
    wide = ArrayRecord({n: Array(np.asarray(v.numpy() + 0.6, np.float64)) for n, v in model.state_dict().items()})
    back = layout.accept(wide)
    assert {n: v.dtype for n, v in back.items()} == {n: v.dtype for n, v in model.state_dict().items()}
    assert int(back["num_batches_tracked"]) == 1  # 0.6 rounded
    assert torch.equal(back["weight"], torch.full((2,), 1.6))


def test_arrays_that_are_not_the_model_s_are_refused() -> None:
    model, other, short = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(3, 2, bias=False)
    layout, records = (
        Layout(model, ArrayRecord(model.state_dict())),
        [ArrayRecord(one.state_dict()) for one in (other, short)],
    )
    for call, message in (
        (lambda: Layout(model, records[0]), r"^array 'weight' must be \(2, 3\).*$"),
        (lambda: Layout(model, records[1]), "^the deployment's 1 arrays lack 'bias'; they must be the 2.*$"),
        (lambda: layout.accept(records[1]), "^the base strategy returned arrays of other names or shapes.*$"),
    ):
        with pytest.raises(InputError, match=message):
            call()
