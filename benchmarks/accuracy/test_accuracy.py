"""The cells are experiments that start, and tables and pages say what the kept results hold (`make test-all`)."""

import re
from pathlib import Path
from typing import Any

import accuracy
import headline
import pytest
import tables
import torch
from cells import PROTOCOL, TABLES, Cell, fits, settings
from controls import Interpolation

from fedftg import config as configs
from fedftg import recipes
from fedftg.algorithms.base import ServerState
from fedftg.errors import InputError
from fedftg.rundir import records

BASE, PAPER, FEDFTG = (f"fedavg-{kind}-b0.1-gn" for kind in ("base", "paper", "fedftg"))


def test_every_cell_is_a_config_that_differs_from_its_base_in_the_refiner() -> None:
    for cell in (cell for rows in TABLES.values() for cell in rows.cells if not cell.retired):
        own = configs.load(PROTOCOL, cell.settings)
        if cell.base is not None:
            base = configs.load(PROTOCOL, tables.CELLS[cell.base].settings)
            assert base.refiner.name == "none"
            changed = {"refiner": own.refiner, "rounds": own.rounds, "plugins": own.plugins}
            assert base.model_copy(update=changed) == own
        if cell.unchanged is not None:
            whole, part = settings(tables.CELLS[cell.unchanged]), settings(cell)
            names = {key for key, value in part.items() if value != whole[key]} - {"rounds"}
            assert len(names) == 1 or cell.name.endswith("train_mode-restored"), (cell.name, names)


def test_a_result_fits_its_settings_and_those_added_since_where_they_are_off() -> None:
    cells = (Cell("c", ("refiner.name=fedftg", f"refiner.preset={name}")) for name in ("paper", "fedftg"))
    for cell, was_off in zip((*cells, Cell("c", ("refiner.name=none",))), (True, False, True), strict=True):
        before = {key: value for key, value in settings(cell).items() if key != "refiner.absent_weight"}
        assert fits(before, cell) is was_off
        assert fits({**settings(cell), "local.dropped": 1}, cell)
        assert not fits({**settings(cell), "local.lr": 0.3}, cell)


def kept(name: str, seed: int, selected: list[float], refined: list[float], **more: Any) -> dict[str, Any]:
    return {
        "cell": name, "seed": seed, "commit": f"c{seed}", "made_with": settings(tables.CELLS[name]),
        "rounds": [2 * number + 2 for number in range(len(selected))], "summary": {"seconds": {"total": 61.0}},
        "accuracy": {"selected": selected, "all": selected, "refined": refined}, **more,
    }  # fmt: skip


def written(folder: Path, *runs: dict[str, Any]) -> dict[str, list[str]]:
    """The last row of each cell in the tables of these runs."""
    for run in runs:
        records.append(folder / "kept.jsonl", run)
    tables.write_tables(tables.load(folder / "kept.jsonl"), folder / "tables.md")
    rows = [line.strip("| \n").split(" | ") for line in (folder / "tables.md").read_text().splitlines()]
    return {row[0]: [part.strip() for part in row] for row in rows if len(row) > 1}


def test_accuracy_is_the_mean_of_the_last_ten_evaluations() -> None:
    values = [number / 100 for number in range(12)]  # .00 to .11, after rounds 2 to 24
    run = kept(BASE, 0, values, values[::-1])
    assert tables.last(run, "selected") == pytest.approx(0.065)
    assert tables.last(run, "selected", until=22) == pytest.approx(0.055)
    assert tables.last(run, "selected", until=4) == pytest.approx(0.005)
    # The better of .02 to .11 and of .09 to .00.
    assert tables.last(run, "selected", "refined") == pytest.approx((9 + 8 + 7 + 6 + 6 + 7 + 8 + 9 + 10 + 11) / 1000)


def test_tables_pair_seeds(tmp_path: Path) -> None:
    """Base .40 and .50, refined .44 and .50: gains of 4 and 0 points; right after fine-tuning +2 and -1."""
    row = written(
        tmp_path,
        kept(BASE, 0, [0.9, 0.9], [0.9, 0.9]),  # the later line counts
        kept(BASE, 0, [0.4, 0.4], [0.4, 0.4]),
        kept(BASE, 1, [0.5, 0.5], [0.5, 0.5]),
        kept(BASE, 2, [0.1], [0.1], made_with={**settings(tables.CELLS[BASE]), "local.lr": 1.0}),
        kept(PAPER, 0, [0.42, 0.42], [0.43, 0.45]),
        kept(PAPER, 1, [0.51, 0.51], [0.5, 0.5]),
        kept(PAPER, 2, [0.5, 0.5], [0.5, 0.5]),  # its base is missing
    )[PAPER]
    assert row[1] == "3"
    assert row[8] == "+2.00 ± 2.83 (seed 0: +4.0, seed 1: +0.0)"
    assert row[10].startswith("+0.33 ± 1.5")
    assert row[11] == "+0.33 ± 0.58"  # a guard would keep .51 instead of .50 with seed 1
    assert row[-1] == "c0, c1, c2"


def test_a_shorter_run_is_compared_over_the_rounds_that_both_have(tmp_path: Path) -> None:
    """Refined (.3 + .5) / 2 = .4 up to round 4, .2 for the base and .35 for the preset: +20 and +5 points."""
    short = f"{FEDFTG}-I5"
    row = written(
        tmp_path,
        kept(short, 0, [0.1, 0.2], [0.3, 0.5]),
        kept(BASE, 0, [0.1, 0.3, 0.9], [0.1, 0.3, 0.9]),
        kept(FEDFTG, 0, [0.1, 0.3, 0.9], [0.3, 0.4, 0.9]),
    )[short]
    assert (row[2], row[8], row[9]) == ("4", "+20.00 (seed 0: +20.0)", "+5.00 (seed 0: +5.0)")


def test_pages_show_what_the_kept_results_say(tmp_path: Path) -> None:
    results = tables.load(tables.ACCURACY)
    assert all(len(runs) == 3 for runs in results.values())
    tables.write_tables(results, tmp_path / "tables.md")
    assert (tmp_path / "tables.md").read_text() == (tables.RESULTS / "accuracy_tables.md").read_text()
    pages = [page.read_text() for page in tables.PAGES]
    assert [tables.fill_page(page, results) for page in pages] == pages, "run: accuracy.py --minutes 0"
    assert re.findall(r"<!-- table (\w+):", "".join(pages)) == ["A", "B", "S", "C", "summary"]
    page = headline.PAGE.read_text()
    assert headline.fill(page, headline.load(headline.HEADLINE)) == page, "run: headline.py"
    assert "| `paper/cifar10_iid_fedavg` |" in page


def test_headline_runs_are_compared_over_the_rounds_that_their_federation_has() -> None:
    """The refined run ends after round 60, so rounds 20 to 60 count: .04 in the mean for the base of seed 0, .05 more
    for the aggregate and .06 more for the refined model. The other federation's three hundred rounds change nothing."""

    def run(recipe: str, preset: str, seed: int, ends: int, selected: float, refined: float, **more: int) -> Any:
        rounds = list(range(10, ends + 1, 10))
        accuracy = {"selected": selected, "all": selected + 0.3, "refined": refined}
        return {
            "recipe": f"paper/{recipe}", "preset": preset, "seed": seed, "rounds_done": ends + 3, "rounds": rounds,
            "accuracy": {kind: [over + round_ / 1000 for round_ in rounds] for kind, over in accuracy.items()},
            "seconds": {"local": 2.0, "refine": 0.25}, "rounds_planned": 500, **more,
        }  # fmt: skip

    lines = headline.table([
        run("x_fedavg", "base", 0, 90, 0.0, 0.0), run("x_fedavg", "base", 1, 90, 0.7, 0.7),
        run("x_fedavg_fedftg", "paper", 0, 60, 0.05, 0.06), run("y_fedavg", "base", 0, 300, 0.1, 0.1),
        run("x_fedavg", "base", 0, 120, 0.4, 0.4, rounds_planned=130, shortened_to=130),
    ])  # fmt: skip
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines[4:]]
    assert rows[0][2:] == ["0", "93 of 500", "60", "4.0", "34.0", "4.0", "", "", "", "39.0, 9.0", "2.2"]
    assert rows[1][2:8] == ["1", "93 of 500", "60", "74.0", "104.0", "74.0"]
    assert rows[2][3:11] == ["63 of 500", "60", "9.0", "39.0", "10.0", "+6.0", "+5.0", "+1.0"]
    assert rows[3][4:6] == ["300", "38.0"]
    assert rows[4][3:6] == ["123 of 130", "120", "50.0"]


def test_a_shortened_schedule_is_one_in_which_both_rates_fall_as_far() -> None:
    def changed(recipe: str, *given: str) -> Any:
        config = configs.load(recipes.find(recipe), ["rounds=150", "partition.law=iid", *given])
        return headline.differences(config, Path("runs/x"))

    local, refiner = "local.lr_decay=0.98674", "refiner.lr_decay=0.98674"
    decays = {"local.lr_decay": 0.98674, "refiner.lr_decay": 0.98674, "rounds": 150}
    assert changed("paper", local, refiner) == (decays, True)
    assert changed("paper_base", local)[1]
    assert changed("paper", "refiner.preset=fedftg", "executor.name=sequential")[1] is False
    with pytest.raises(InputError, match=r"in 150 rounds: .* refiner\.lr_decay must be 0.98674, got 0.998"):
        changed("paper", local)
    with pytest.raises(InputError, match=r"local\.epochs is 2, not 5"):
        changed("paper_base", "local.epochs=2")


def test_the_control_is_between_the_aggregate_and_what_it_gave_before() -> None:
    """Weight .25: from nothing the aggregate 4 as it is; then .75 x 8 + .25 x 4 = 7."""

    def state(value: float, memory: dict[str, torch.Tensor]) -> ServerState:
        params, buffers = {"w": torch.tensor([value])}, {"b": torch.tensor([-value]), "n": torch.tensor(int(value))}
        return ServerState(round=1, params=params, buffers=buffers, server={}, refiner=memory)

    first, _ = Interpolation(0.25).refine(state(4.0, {}), [], torch.Generator())
    assert float(first.params["w"]) == 4.0
    second, _ = Interpolation(0.25).refine(state(8.0, dict(first.refiner)), [], torch.Generator())
    assert (float(second.params["w"]), float(second.buffers["b"]), int(second.buffers["n"])) == (7.0, -7.0, 8)


def test_a_run_is_kept_as_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "RUNS", tmp_path)
    monkeypatch.setattr(accuracy, "ACCURACY", tmp_path / "kept.jsonl")
    small = (
        "data.name=digits", "partition.num_clients=4", "cohort.size=2", "local.epochs=1", "rounds=3",
        "refiner.name=fedftg", "refiner.iterations=1", "refiner.generator_width=4",
    )  # fmt: skip
    assert accuracy.run(Cell("tiny", small), 1, None, None)
    (line,) = records.read(tmp_path / "kept.jsonl")
    assert (line["cell"], line["seed"], line["rounds"], len(line["refine"]["discrepancy"])) == ("tiny", 1, [2, 3], 2)
    assert line["accuracy"]["selected"][-1] == line["summary"]["accuracy"]["selected"]["final"]
    assert fits(line["made_with"], Cell("tiny", small))
