"""Numbers of comparison tables by hand, bases, notes, and width."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from fedftg.errors import InputError
from fedftg.report.load import RunRecord, load_run
from fedftg.report.table import (
    chosen_columns,
    comparison_rows,
    csv_table,
    interval,
    latex_table,
    markdown_table,
    partition_table,
    terminal_table,
)


def run_of(
    folder: Path,
    selected: Sequence[float],
    refined: Sequence[float] | None = None,
    *,
    algorithm: str = "fedavg",
    every: int = 1,
    planned: int | None = None,
    all_: bool = True,
    finished: bool = True,
    settings: str = "",
    preset: str = "paper",
) -> RunRecord:
    """A run that evaluates ``selected`` (and ``refined``, with a refiner) each ``every`` rounds; 0.5 s a round."""
    folder.mkdir(parents=True)
    refiner = "none" if refined is None else "fedftg"
    extra = "" if refined is None else f'preset = "{preset}"\n'
    rounds = len(selected) * every
    (folder / "config.toml").write_text(
        f'name = "{folder.name}"\nrounds = {planned or rounds}\n[algorithm]\nname = "{algorithm}"\n'
        f'[refiner]\nname = "{refiner}"\n{extra}{settings}'
    )
    lines = []
    for number in range(1, rounds + 1):
        record: dict[str, object] = {"round": number, "seconds": {"local": 0.4, "evaluate": 0.1}}
        record["refine"] = {} if refined is None else {"student": 0.5}
        if number % every == 0:
            at = number // every - 1
            accuracy = {"selected": selected[at], "refined": selected[at] if refined is None else refined[at]}
            record["accuracy"] = accuracy | ({"all": 0.1} if all_ else {})
        lines.append(json.dumps(record) + "\n")
    (folder / "rounds.jsonl").write_text("".join(lines))
    if finished:
        (folder / "summary.json").write_text("{}")
    return load_run(folder)


def rendered(table: Table, width: int = 80) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def test_gain_over_the_base(tmp_path: Path) -> None:
    """Base .50 .60, deployed .52 .66: gains .02 and .06, mean .04."""
    base = run_of(tmp_path / "base", [0.5, 0.6])
    ours = run_of(tmp_path / "ours", [0.51, 0.61], [0.52, 0.66])
    first, second = comparison_rows([base, ours])
    assert first.is_base
    assert first.gain is None
    assert second.gain is not None
    assert second.gain.base == "base"
    assert second.gain.scores[0]["final"] == pytest.approx(0.06)
    assert second.gain.means == pytest.approx([0.04])
    assert (second.gain.until, second.gain.differs) == (None, [])
    assert (second.runs[0].refiner, second.runs[0].seconds) == ("fedftg (paper)", 1.0)


def test_each_algorithm_has_its_own_base(tmp_path: Path) -> None:
    runs = [
        run_of(tmp_path / "moon-ours", [0.1], [0.8], algorithm="moon"),
        run_of(tmp_path / "avg-base", [0.5]),
        run_of(tmp_path / "moon-base", [0.6], algorithm="moon"),
        run_of(tmp_path / "avg-ours", [0.1], [0.7]),
        run_of(tmp_path / "alone", [0.1], [0.7], algorithm="feddyn"),
    ]
    rows = comparison_rows(runs)
    assert [row.gain and round(row.gain.means[0], 6) for row in rows] == [0.2, None, None, 0.2, None]
    assert [row.is_base for row in rows] == [False, True, True, False, False]


def test_of_several_bases_the_nearest_settings_count(tmp_path: Path) -> None:
    far = run_of(tmp_path / "far", [0.1], settings="[partition]\nalpha = 0.6\n")
    near = run_of(tmp_path / "near", [0.2], settings="[partition]\nalpha = 0.3\n")
    ours = run_of(tmp_path / "ours", [0.3], [0.5], settings="[partition]\nalpha = 0.3\n")
    gain = comparison_rows([far, near, ours])[2].gain
    assert gain is not None
    assert (gain.base, gain.differs) == ("near", [])
    gain = comparison_rows([far, ours])[1].gain
    assert gain is not None
    assert gain.differs == ["partition.alpha"]
    assert "ours and its base far differ also in partition.alpha." in markdown_table([far, ours])


def test_unfinished_run_is_compared_where_both_were_evaluated(tmp_path: Path) -> None:
    base = run_of(tmp_path / "base", [0.1, 0.2, 0.3, 0.9])
    ours = run_of(tmp_path / "ours", [0.1, 0.1], [0.2, 0.3], planned=4, finished=False)
    gain = comparison_rows([base, ours])[1].gain
    assert gain is not None
    assert gain.means == pytest.approx([0.1])
    assert gain.until == 2
    text = markdown_table([base, ours])
    assert "ours vs base: up to round 2, the last that both evaluated." in text
    assert "Unfinished: ours." in text
    assert "| 2/4 |" in text


def test_no_evaluation_at_all(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / "a", []), run_of(tmp_path / "b", [], [])]
    assert all(row.deployed == [] for row in comparison_rows(runs))
    assert "| a | fedavg | none | 0 | base | 0.0 |" in markdown_table(runs)
    assert rendered(terminal_table(runs))


def test_markdown_by_hand(tmp_path: Path) -> None:
    base = run_of(tmp_path / "base", [0.5, 0.6])
    ours = run_of(tmp_path / "ours", [0.51, 0.61], [0.52, 0.66])
    lines = markdown_table([base, ours]).splitlines()
    assert lines[2] == "| base | fedavg | none | 2 | 55.00 (60.00) | 10.00 (10.00) | - | base | 60.00 @2 | 1.0 |"
    assert lines[3] == (
        "| ours | fedavg | fedftg (paper) | 2 | 56.00 (61.00) | 10.00 (10.00) | **59.00** (66.00) "
        "| +4.00 (+6.00) | 66.00 @2 | 1.0 |"
    )
    assert lines[5].startswith("Test accuracy in %: mean of the last 10 evaluations (of all 2 where fewer)")


def test_latex_and_csv_by_hand(tmp_path: Path) -> None:
    base = run_of(tmp_path / "a_base", [0.5, 0.6], settings="[partition]\nalpha = 0.3\n")
    ours = run_of(tmp_path / "ours", [0.51, 0.61], [0.52, 0.66], settings="[partition]\nalpha = 0.6\n")
    lines = latex_table([base, ours]).splitlines()
    assert lines[-8:-6] == [r"\begin{tabular}{lllrrrrrrr}", r"\toprule"]
    assert lines[-2] == r"\bottomrule"
    assert lines[-3] == (
        r"ours & fedavg & fedftg (paper) & 2 & 56.00 (61.00) & 10.00 (10.00) & \textbf{59.00} (66.00) "
        r"& +4.00 (+6.00) & 66.00 @2 & 1.0 \\"
    )
    assert lines[-4].startswith(r"a\_base & fedavg & none & 2 & ")
    first, second = csv.DictReader(csv_table([base, ours]).splitlines())
    assert (first["run"], second["refiner"], second["partition.alpha"]) == ("a_base", "fedftg (paper)", "0.6")
    assert [float(second[f"refined_{part}"]) for part in ("mean_last", "final", "best")] == pytest.approx(
        [0.59, 0.66, 0.66]
    )
    assert set(second) - set(first) == set()
    assert (first["gain_final"], float(second["gain_final"])) == ("", pytest.approx(0.06))
    assert "refiner.preset" not in second


def test_trackers_do_not_tell_runs_apart(tmp_path: Path) -> None:
    """Two seeds of one setting, one of them tracked."""
    pandas = pytest.importorskip("pandas")
    one = run_of(tmp_path / "a-s0", [0.5], settings="[track]\nto = []\n")
    other = run_of(tmp_path / "a-s1", [0.7], settings='[track]\nto = ["wandb"]\n')
    other.config["seed"] = 1
    (row,) = comparison_rows([one, other])
    assert len(row.runs) == 2
    read = pandas.read_csv(io.StringIO(csv_table([one, other])))
    assert list(read["refined_final"]) == [0.5, 0.7]
    assert not [column for column in read.columns if "track" in column]
    refined = run_of(tmp_path / "b", [0.5], [0.6], settings='[track]\nto = ["wandb"]\n')
    assert "differ also" not in markdown_table([one, refined])


def test_columns_by_name(tmp_path: Path) -> None:
    """Any kind of accuracy is one, and `gain` is that of ``vs base``."""
    base = run_of(tmp_path / "base", [0.5, 0.6])
    ours = run_of(tmp_path / "ours", [0.51, 0.61], [0.52, 0.66])
    for record in ours.rounds:
        record["accuracy"]["sent"] = 0.25
    header, _, _, row = markdown_table([base, ours], ["gain", "sent"]).splitlines()[:4]
    assert header == "| run | algorithm | refiner | vs base | sent |"
    assert row.endswith("| +4.00 (+6.00) | 25.00 (25.00) |")
    assert "& +4.00 (+6.00) \\\\" in latex_table([base, ours], ["gain"])
    line = list(csv.DictReader(csv_table([base, ours], ["sent", "rounds"]).splitlines()))[1]
    assert list(line)[4:] == ["sent_mean_last", "sent_final", "sent_best", "sent_best_round", "rounds"]
    line = list(csv.DictReader(csv_table([base, ours], ["best"]).splitlines()))[1]
    assert (float(line["best"]), line["best_round"]) == (pytest.approx(0.66), "2")
    header, _, first, second = markdown_table([base, ours], ["deployed", "local.lr"]).splitlines()[:4]
    assert header.endswith("| deployed | local.lr |")
    assert (first.split("|")[4].strip(), second.split("|")[4].strip()) == ("55.00 (60.00)", "**59.00** (66.00)")
    assert chosen_columns("gain, sent,gain,") == ["gain", "sent"]
    with pytest.raises(InputError, match="unknown column 'gian'; did you mean 'gain'"):
        chosen_columns("gian")


def test_terminal_table_fits_80_columns_and_cuts_nothing(tmp_path: Path) -> None:
    base = run_of(tmp_path / "cifar10_cnn_dir03_scaffold", [0.5] * 1000, algorithm="scaffold")
    name = "cifar10_cnn_dir03_scaffold_fedftg_official"
    ours = run_of(tmp_path / name, [0.61] * 900, [0.62] * 900, algorithm="scaffold", planned=1000, preset="official")
    for row in ours.rounds:
        row["accuracy"] |= {"ensemble": 0.7, "ensemble_prior": 0.75, "best_client": 0.3}
    lines = rendered(terminal_table([base, ours]))
    assert max(len(line.rstrip()) for line in lines) <= 80
    text = "\n".join(lines)
    assert "…" not in text
    headers = ["rounds", "selected", "all", "refined", "ensemble", "best", "seconds"]
    for part in (*headers, "vs base", "+12.00", "of 1000", "75.00", "500", "alone:", "30.00"):
        assert part in text, part
    assert name in "".join(line[:10].strip() for line in lines)


def test_rounds_that_were_not_fine_tuned_are_told(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name, [0.5] * 3, [0.6] * 3) for name in ("some", "all")]
    runs[0].rounds[1]["refine"] = {"least_share": 1.0}
    text = " ".join(rendered(terminal_table(runs)))
    assert "some: fine-tuned in 2 of 3 rounds." in " ".join(text.split())
    assert "all: fine-tuned" not in text


def test_names_are_not_read_as_markup(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a[bold]|b", [0.5])
    assert "a[bold]|b" in rendered(terminal_table([run]))[3]
    assert "a[bold]\\|b" in markdown_table([run])


def test_partition_table_by_hand() -> None:
    measures = {"total_variation": 0.25, "size_max": 12345.0}
    table = partition_table([[3, 1], [0, 0], [0, 5]], ["cat", "[dog]"], measures, [1, 0, 2])
    text = "\n".join(rendered(table, 120))
    rows = [line.split() for line in text.splitlines()[2:]]
    assert rows[0] == ["0", "4", "1", "2", "cat", "75%"]
    assert rows[1] == ["1", "0", "0", "0", "-", "-"]
    assert rows[2] == ["2", "5", "2", "1", "[dog]", "100%"]
    assert "3 clients, 9 samples, 2 classes" in text
    assert "mean total variation, 0 if IID: 0.25" in text
    assert "most samples of a client: 12345" in text


def test_partition_table_of_many_clients() -> None:
    """Clients 20 to 99 hold 20 to 99 samples."""
    lines = rendered(partition_table([[client] for client in range(100)], ["a"], {}))
    assert sum(line.rstrip().endswith("%") for line in lines) == 19
    assert any("20 to 99" in line and "80 more clients" in line for line in lines)


def test_accuracy_over_clients_is_a_note(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", [0.5, 0.6])
    run.rounds[0]["client_accuracy"] = {"refined": {"mean": 0.5, "worst_10": 0.25, "std": 0.1}}
    note = "a, per client (round 1): mean 50.00, worst 10 % 25.00, standard deviation 10.00."
    assert note in markdown_table([run])


def test_seeds_are_one_row_and_gains_are_paired(tmp_path: Path) -> None:
    """Bases .5 and .6, deployed .54 and .68: gains .04 and .08; t(.975, 1) = 12.706, so half the interval is .2541."""
    runs = []
    for seed, (base, ours) in enumerate([(0.5, 0.54), (0.6, 0.68)]):
        folder = tmp_path / str(seed)
        runs += [run_of(folder / f"base-s{seed}", [base]), run_of(folder / f"ours-s{seed}", [0.1], [ours])]
        for run in runs[-2:]:
            run.config["seed"] = seed
    base_row, row = comparison_rows(runs)
    assert (base_row.name, row.name, len(row.runs)) == ("base", "ours", 2)
    assert row.gain is not None
    assert row.gain.means == pytest.approx([0.04, 0.08])
    assert interval(row.gain.means) == pytest.approx((-0.19412, 0.31412), abs=1e-5)
    text = markdown_table(runs)
    assert "| **61.00** (± 9.90) | +6.00 (± 2.83) |" in text
    assert "ours vs base: 95 % interval -19.41 to +31.41 (t, 2 seeds)." in text
    assert "fedavg + fedftg" in "\n".join(rendered(terminal_table(runs)))


def test_csv_pairs_no_other_seeds(tmp_path: Path) -> None:
    """The base has seed 0 only, so .9 of seed 1 has no gain; nor is the seed a setting in which the two differ."""
    runs = [run_of(tmp_path / name, [value], *more) for name, value, *more in (
        ("base-s0", 0.5), ("ours-s0", 0.1, [0.6]), ("ours-s1", 0.1, [0.9])
    )]  # fmt: skip
    runs[2].config["seed"] = 1
    lines = list(csv.DictReader(csv_table(runs).splitlines()))
    assert [line["seed"] for line in lines] == ["0", "0", "1"]
    assert [line["gain_final"] and round(float(line["gain_final"]), 6) for line in lines] == ["", 0.1, ""]
    assert lines[2]["gain_mean_last"] == ""
    other = run_of(tmp_path / "base-s1", [0.7])
    other.config["seed"] = 1
    assert "differ also" not in markdown_table([runs[0], other, runs[2]])
    gain = comparison_rows([runs[0], runs[2]])[1].gain
    assert gain is not None
    assert (gain.scores[1]["final"], gain.differs) == (pytest.approx(0.4), ["seed"])
