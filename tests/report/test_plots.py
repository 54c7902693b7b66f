"""PNG files are written for every kind of run and partition, at the promised width and without a warning."""

import struct
import sys
from pathlib import Path

import pytest

from fedftg.errors import InputError
from fedftg.report.load import RunRecord
from fedftg.report.plots import accuracy_plot, partition_heatmap


def run_of(name: str, values: list[float], refiner: str = "none", every: int = 1) -> RunRecord:
    rounds = [
        {
            "round": index * every,
            "accuracy": {"selected": value, "refined": value, "all": value / 2},
        }
        for index, value in enumerate(values, start=1)
    ]
    config = {"rounds": 10, "algorithm": {"name": "fedavg"}, "refiner": {"name": refiner}}
    return RunRecord(Path("/runs") / name, config, rounds, None)


def size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.parametrize(
    "runs",
    [
        [run_of("a", [0.1, 0.5])],
        [run_of("a", [0.1, 0.5], "fedftg")],
        [run_of("a", []), run_of("_b $x$ [c]", [0.2, 0.3], "fedftg", every=5)],
        [run_of("a", [0.5] * 400, "fedftg"), run_of("b", [0.4] * 1000)],
        [run_of(f"run-{index}", [0.1, 0.2], "fedftg") for index in range(15)],
        [run_of("n" * 200, [0.1]), run_of("m" * 200, [0.1])],
    ],
    ids=["base", "refined", "odd-name", "long", "many", "long-names"],
)
def test_accuracy_plot_is_1200_wide(runs: list[RunRecord], tmp_path: Path) -> None:
    path = accuracy_plot(runs, tmp_path / "new" / "plot.png")
    assert path == tmp_path / "new" / "plot.png"
    assert size(path)[0] == 1200


def test_pdf_and_svg_are_for_a_papers_column_and_keep_text(tmp_path: Path) -> None:
    """3.3 inches are 237.6 points; Type 3 fonts are what publishers refuse; the same run gives the same bytes."""
    runs = [run_of("base", [0.1, 0.5]), run_of("_b $x$", [0.2, 0.3], "fedftg")]
    svg, pdf = (accuracy_plot(runs, tmp_path / f"plot.{end}").read_bytes() for end in ("svg", "pdf"))
    assert b'width="237.6pt"' in svg
    assert b">test accuracy (%)</text>" in svg
    assert b"_b $x$</text>" in svg
    assert b"/MediaBox [ 0 0 237.6 " in pdf
    assert b"/Type3" not in pdf
    assert accuracy_plot(runs, tmp_path / "again.pdf").read_bytes() == pdf


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (20, 10), (100, 100), (401, 3), (1000, 200)])
def test_heatmap_sizes(clients: int, classes: int, tmp_path: Path) -> None:
    counts = [[(client * 7 + klass * 3) % 11 for klass in range(classes)] for client in range(clients)]
    path = partition_heatmap(counts, [f"class {index}" for index in range(classes)], tmp_path / "h.png", "title")
    width, height = size(path)
    assert width == 1200
    assert 400 <= height <= 1300


@pytest.mark.parametrize("counts", [[[0, 0], [0, 0]], [[1, 0], [0, 0], [5000, 3]]], ids=["empty", "uneven"])
def test_heatmap_of_extreme_counts(counts: list[list[int]], tmp_path: Path) -> None:
    width, height = size(partition_heatmap(counts, ["$a", "b"], tmp_path / "h.png", title="odd $ title"))
    assert width == 1200
    assert 300 <= height <= 1300


def test_unwritable_path_and_no_pyplot(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    path = accuracy_plot([run_of("a", [0.1])], tmp_path / "plot.png")
    with pytest.raises(InputError, match="cannot write"):
        accuracy_plot([run_of("a", [0.1])], path / "plot.png")
    assert ("matplotlib.pyplot" in sys.modules) == before
