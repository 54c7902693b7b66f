"""Records: nothing is lost on the way, and nothing that does not fit comes in."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedftg.flower import records
from fedftg.flower.records import RecordError, counts_from_list, counts_to_list, decode, encode

PARAMS = {
    "z.weight": torch.randn(3, 4, dtype=torch.float32),
    "a.bias": torch.randn(4, dtype=torch.float64),
    "half": torch.randn(2, 2).to(torch.bfloat16),
    "sixteen": torch.randn(3).half(),
    "count": torch.tensor(2**62 + 1),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
}


def tampered(name: str, **changes: Any) -> ArrayRecord:
    record = encode(PARAMS)
    array = record[name]
    fields = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data} | changes
    record[name] = Array(**fields)
    return record


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_names_order_types_and_bits_are_kept() -> None:
    back = decode(encode(PARAMS), PARAMS)
    assert list(back) == list(PARAMS)
    for name, tensor in PARAMS.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name], tensor)
        back[name].zero_()  # its memory is its own


def test_order_is_that_of_the_template_and_flower_reads_the_record() -> None:
    record = encode(dict(reversed(PARAMS.items())))
    assert list(decode(record, PARAMS)) == list(PARAMS)
    assert torch.equal(record.to_torch_state_dict()["z.weight"], PARAMS["z.weight"])


def test_non_contiguous_tensors_keep_their_values() -> None:
    params = {"w": torch.randn(4, 6).t(), "v": torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)}
    back = decode(encode(params), params)
    assert all(torch.equal(back[name], params[name]) for name in params)


def test_nan_passes_unless_finite_is_asked_for() -> None:
    params = {"w": torch.tensor([1.0, float("nan")])}
    assert torch.isnan(decode(encode(params), params)["w"][1])
    with pytest.raises(RecordError, match="'w' holds NaN"):
        decode(encode(params), params, finite=True)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("z.weight", {"shape": (4, 3)}, r"is float32 \(4, 3\)"),
        ("z.weight", {"dtype": "float64"}, "is float64"),
        ("z.weight", {"stype": "pickle"}, r"\(pickle\)"),
        ("z.weight", {"data": npy(np.zeros((4, 3), np.float32))}, r"holds float32 \(4, 3\)"),
        ("z.weight", {"data": npy(np.zeros((3, 4), np.int32))}, "holds int32"),
        ("z.weight", {"data": npy(np.zeros((3, 4), np.float32).T.copy().T)}, "holds float32"),
        ("z.weight", {"data": encode(PARAMS)["z.weight"].data[:-1]}, "in 47 bytes"),
        ("z.weight", {"data": b"\x80\x04" + bytes(200)}, "is damaged"),
        ("z.weight", {"data": b""}, "takes 0 bytes"),
        ("a.bias", {"data": npy(np.array([{"a": 1}] * 4, dtype=object))}, "holds object|takes"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        decode(tampered(name, **changes), PARAMS)


def test_a_header_that_claims_much_memory_asks_for_none() -> None:
    data = npy(np.zeros((3, 4), np.float32)).replace(b"(3, 4)", b"(9**9,", 1)
    with pytest.raises(RecordError, match="damaged"):
        decode(tampered("z.weight", data=data), PARAMS)
    huge = npy(np.zeros(1, np.float32)).replace(b"(1,), }", b"(99999999999,), }".ljust(7), 1)
    with pytest.raises(RecordError):
        decode(tampered("z.weight", data=huge), PARAMS)


def test_size_and_names_are_checked_before_values() -> None:
    with pytest.raises(RecordError, match="at most 10 are allowed"):
        decode(encode(PARAMS), PARAMS, max_bytes=10)
    record = encode(PARAMS)
    record["more"] = record.pop("count")
    with pytest.raises(RecordError, match="lacks 'count' and has unknown 'more'"):
        decode(record, PARAMS)


def test_a_type_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(RecordError, match=r"'w' is torch\.complex128"):
        encode({"w": torch.zeros(1, dtype=torch.complex128)})


def test_sizes() -> None:
    assert records.encoded_bytes(PARAMS) == 12 * 4 + 4 * 8 + 4 * 4 + 3 * 2 + 8 + 2
    record = encode(PARAMS)
    assert records.encoded_bytes(PARAMS) < records.record_bytes(record) < records.encoded_bytes(PARAMS) + 7 * 200


def test_class_counts_there_and_back() -> None:
    counts = torch.tensor([0, 5, 7])
    assert counts_to_list(counts) == [0, 5, 7]
    assert torch.equal(counts_from_list([0, 5, 7], 3), counts)
    for wrong in ([0, 5], [0, 5, -1], [0, 5, 1.0], [0, 5, True], "057", None, [0, 5, 2**60]):
        with pytest.raises(RecordError, match="class counts"):
            counts_from_list(wrong, 3)
