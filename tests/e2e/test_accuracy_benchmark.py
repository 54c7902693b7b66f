"""The cells of benchmarks/accuracy are experiments that start, and its tables say what the kept results hold."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fedftg import config as configs
from fedftg.errors import InputError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The scripts, which keep runs and results in ``tmp_path``."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("accuracy", "cells", "tables", "figures", "headline"):  # not controls, which registers itself
        sys.modules.pop(name, None)
    import accuracy  # type: ignore[import-not-found]

    monkeypatch.setattr(accuracy, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "results")
    return accuracy


def test_every_cell_is_a_config_and_every_base_a_cell_without_refiner(bench: Any) -> None:
    from tables import CELLS  # type: ignore[import-not-found]

    settings: dict[str, tuple[str, ...]] = {}
    for rows in bench.TABLES.values():
        for cell in rows.cells:
            assert settings.setdefault(cell.name, cell.settings) == cell.settings, cell.name
            configs.load(FOLDER / "protocol.toml", cell.settings)
    for rows in bench.TABLES.values():
        for cell in rows.cells:
            if cell.base is not None:
                assert settings[cell.base] == cell.settings[: len(settings[cell.base])]
                base = configs.load(FOLDER / "protocol.toml", settings[cell.base])
                own = configs.load(FOLDER / "protocol.toml", cell.settings)
                assert base.refiner.name == "none"
                assert (
                    base.model_copy(update={"refiner": own.refiner, "rounds": own.rounds, "plugins": own.plugins})
                    == own
                )
            if cell.unchanged is not None:
                whole = configs.load(FOLDER / "protocol.toml", settings[cell.unchanged])
                assert whole.rounds >= own.rounds
                assert whole.refiner != own.refiner
                assert whole == own.model_copy(update={"refiner": whole.refiner, "rounds": whole.rounds})
                assert own.rounds >= (rows.until or whole.rounds)
                as_it_was = bench.settings(CELLS[cell.unchanged])
                names = {key for key, value in bench.settings(cell).items() if value != as_it_was[key]} - {"rounds"}
                assert len(names) == 1 or cell.name.endswith("train_mode-restored"), (cell.name, names)


def test_a_cell_is_run_kept_and_not_run_again(
    bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = (
        "data.name=digits", "partition.num_clients=4", "cohort.size=2", "local.epochs=1", "rounds=3",
        "refiner.name=fedftg", "refiner.iterations=1", "refiner.generator_width=4",
    )  # fmt: skip
    cell = bench.Cell("tiny", small)
    assert not bench.is_there(cell, 1)
    assert bench.run(cell, 1, None, None)
    assert "tiny seed 1: selected 0." in capsys.readouterr().out
    assert bench.is_there(cell, 1)
    assert not bench.is_there(cell, 2)
    assert not bench.is_there(bench.Cell("tiny", (*small, "local.lr=0.2")), 1)
    kept = json.loads(bench.result_file(cell, 1).read_text())
    assert kept["rounds"] == [2, 3]
    assert kept["summary"]["seed"] == 1
    assert len(kept["refine"]["discrepancy"]) == 2
    assert all(value > 0 for value in kept["refine"]["discrepancy"])
    assert kept["accuracy"]["selected"][-1] == kept["summary"]["accuracy"]["selected"]["final"]
    bench.result_file(cell, 1).write_text('{"cell"')
    assert not bench.is_there(cell, 1)
    monkeypatch.setattr(bench, "settings", lambda cell: {})
    monkeypatch.setattr(bench, "fingerprint", lambda cell: "0")
    assert not bench.run(bench.Cell("wrong", ("local.lr=-1",)), 1, None, None)
    assert "FAILED wrong seed 1: ['fedftg: " in capsys.readouterr().out


def test_a_result_from_before_a_setting_was_there_fits_where_it_is_off(bench: Any) -> None:
    paper, ours = (bench.Cell("c", ("refiner.name=fedftg", f"refiner.preset={name}")) for name in ("paper", "fedftg"))
    base = bench.Cell("c", ("refiner.name=none",))
    for cell, fits in ((paper, True), (ours, False), (base, True)):
        before = {key: value for key, value in bench.settings(cell).items() if key != "refiner.absent_weight"}
        assert bench.fits(before, cell) is fits
        assert bench.fits(bench.settings(cell), cell)
        assert not bench.fits({**before, "local.of_then": 1}, cell)
        assert not bench.fits({key: value for key, value in before.items() if key != "local.lr"}, cell)


def kept(selected: list[float], refined: list[float]) -> dict[str, Any]:
    return {
        "rounds": [2 * number + 2 for number in range(len(selected))],
        "accuracy": {"selected": selected, "all": selected, "refined": refined},
        "summary": {"seconds": {"total": 61.0}},
    }


def test_tables_pair_seeds(bench: Any, tmp_path: Path) -> None:
    """Base .40 and .50, refined .44 and .50: gains of 4 and 0 points; right after fine-tuning +2 and -1."""
    import tables  # type: ignore[import-not-found]

    written = {
        ("fedavg-base-b0.1-gn", 0): kept([0.4, 0.4], [0.4, 0.4]),
        ("fedavg-base-b0.1-gn", 1): kept([0.5, 0.5], [0.5, 0.5]),
        ("fedavg-paper-b0.1-gn", 0): kept([0.42, 0.42], [0.43, 0.45]),
        ("fedavg-paper-b0.1-gn", 1): kept([0.51, 0.51], [0.5, 0.5]),
        ("fedavg-paper-b0.1-gn", 2): kept([0.5, 0.5], [0.5, 0.5]),  # its base is not there yet
    }
    for (name, seed), result in written.items():
        path = tmp_path / "results" / name / f"seed{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        of_now = {"seed": seed, "commit": f"c{seed}", "made_with": bench.settings(tables.CELLS[name])}
        path.write_text(json.dumps({**of_now, **result}))
    old = tmp_path / "results" / "fedavg-base-b0.1-gn" / "seed2.json"
    before = {**bench.settings(tables.CELLS["fedavg-base-b0.1-gn"]), "local.lr": 1.0}
    old.write_text(json.dumps({"seed": 2, "commit": "old", "made_with": before, **kept([0.1], [0.1])}))
    (tmp_path / "results" / "fedavg-paper-b0.1-gn" / "seed3.json").write_text('{"cell"')  # killed while writing
    text = bench.write_tables(tmp_path / "results").read_text()
    assert "## A. The claim" in text
    (line,) = {line for line in text.splitlines() if line.startswith("| fedavg-paper-b0.1-gn |")}
    cells = [part.strip() for part in line.strip("|").split("|")]
    assert cells[1] == "3"
    assert cells[8] == "+2.00 ± 2.83 (seed 0: +4.0, seed 1: +0.0)"
    assert cells[10].startswith("+0.33 ± 1.5")
    assert cells[11] == "+0.33 ± 0.58"  # a guard would keep .51 instead of .50 with seed 1
    assert cells[-1] == "c0, c1, c2"
    assert "fedprox" not in text
    assert "old" not in text


def test_the_page_shows_what_the_kept_results_say(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import tables  # type: ignore[import-not-found]

    text, results = tables.PAGE.read_text(), FOLDER.parent / "results" / "accuracy"
    assert tables.fill_page(text, results) == text, "run: accuracy.py --minutes 0"
    assert set(re.findall(r"<!-- table (\w):", text)) == {"A", "B", "S", "C"}
    monkeypatch.setattr(tables.Path, "write_text", lambda path, text, **_: written.append(text))
    written: list[str] = []
    tables.write_tables(results)
    assert written == [(results / "tables.md").read_text()], "run: accuracy.py --minutes 0"
    assert all((tables.PAGE.parent / name).is_file() for name in re.findall(r"\]\((figures/[^)]+)\)", text))


def test_the_page_shows_what_the_kept_headline_runs_say(bench: Any) -> None:
    import headline  # type: ignore[import-not-found]

    page, results = headline.PAGE.read_text(), headline.load(headline.RESULTS)
    assert headline.fill(page, results) == page, "run: headline.py"
    assert "| `paper/cifar10_iid_fedavg` |" in page
    assert all(headline.file_of(result).is_file() for result in results)


def test_headline_runs_are_compared_over_the_rounds_that_their_federation_has(bench: Any) -> None:
    """The refined run ends after round 60, so rounds 20 to 60 count: .04 in the mean for the base of seed 0, .05 more
    for the aggregate and .06 more for the refined model. The other federation's three hundred rounds change nothing."""
    import headline  # type: ignore[import-not-found]

    def run(
        recipe: str, preset: str, seed: int, ends: int, selected: float, refined: float, **more: int
    ) -> dict[str, Any]:
        rounds = list(range(10, ends + 1, 10))
        shape = [round_ / 1000 for round_ in rounds]  # .04 in the mean of rounds 20 to 60
        accuracy = {"selected": selected, "all": selected + 0.3, "refined": refined}
        return {
            "recipe": f"paper/{recipe}", "preset": preset, "seed": seed, "rounds_done": ends + 3, "rounds": rounds,
            "accuracy": {kind: [over + value for value in shape] for kind, over in accuracy.items()},
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
    assert rows[2] == [
        "`paper/x_fedavg_fedftg`", "paper", "0", "63 of 500", "60", "9.0", "39.0", "10.0", "+6.0", "+5.0", "+1.0",
        "41.0, 12.0", "2.2",
    ]  # fmt: skip
    assert rows[3][4:6] == ["300", "38.0"]
    assert rows[4][3:6] == ["123 of 130", "120", "50.0"]


def test_headline_runs_are_kept_before_their_end(
    bench: Any,
    fedftg: Any,
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import headline  # type: ignore[import-not-found]

    def given(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["headline.py", *words])
        with pytest.raises(SystemExit, match="2"):
            headline.main()
        told = capsys.readouterr().err.splitlines()[-1]
        assert not list((tmp_path / "kept").glob("*.part"))
        return str(told)

    done = fedftg("run", *tiny, "--set", "name=some_fedftg", "--set", "rounds=6", "--out", "r")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "r"
    (run / "summary.json").unlink()
    lines = (run / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run / "rounds.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # killed while it wrote the sixth
    rows = [json.loads(line) for line in lines[:5]]
    for name, value in (("RESULTS", "kept"), ("FIGURES", "."), ("PAGE", "page.md"), ("RECIPES", "recipes")):
        monkeypatch.setattr(headline, name, tmp_path / value)
    (tmp_path / "page.md").write_text("before\n<!-- headline: made by it -->\n<!-- end of headline -->\nafter\n")
    assert "only those of recipes/paper" in given(str(run), "--commit", "c0")
    (tmp_path / "recipes").mkdir()
    recipe = (run / "config.toml").read_text().replace("threads = 1", "threads = 3")
    (tmp_path / "recipes" / "some_fedftg.toml").write_text(recipe)
    monkeypatch.setattr(sys, "argv", ["headline.py", str(run), "--commit", "c0"])
    headline.main()
    kept_file = tmp_path / "kept" / "some_fedftg-fedftg-seed0.json"
    result = json.loads(kept_file.read_text())
    assert (result["rounds_done"], result["rounds_planned"], result["rounds"]) == (5, 6, [1, 2, 3, 4, 5])
    assert (result["commit"], result["settings"]) == ("c0", {"threads": 1})
    assert result["accuracy"]["refined"] == [row["accuracy"]["refined"] for row in rows]
    assert result["seconds"]["local"] == pytest.approx(sum(row["seconds"]["local"] for row in rows) / 5, abs=1e-3)
    shown = (tmp_path / "page.md").read_text().splitlines()
    assert (shown[0], shown[-1]) == ("before", "after")
    (line,) = [line for line in shown if line.startswith("| `paper/some_fedftg` | fedftg | 0 | 5 of 6 | 5 |")]
    mean = {kind: 20 * sum(row["accuracy"][kind] for row in rows) for kind in headline.KINDS}
    assert line.split(" | ")[5:8] == [f"{mean[kind]:.1f}" for kind in headline.KINDS]
    assert (tmp_path / "headline_rounds.png").read_bytes()[:4] == b"\x89PNG"

    whole = kept_file.read_bytes()
    assert "--commit is missing" in given(str(run))
    assert "holds no run" in given(str(tmp_path), "--commit", "c")
    kept_file.write_text(whole.decode().replace('"rounds_done": 5', '"rounds_done": 7'))
    assert "of some_fedftg-fedftg-seed0.json 7 are kept" in given(str(run), "--commit", "c")
    (run / "rounds.jsonl").write_text("".join(lines[:4]))
    assert "4 evaluations in 4 rounds, a row needs 5" in given(str(run), "--commit", "c")
    (run / "rounds.jsonl").write_text("")
    assert "0 evaluations in 0 rounds" in given(str(run), "--commit", "c")
    (tmp_path / "recipes" / "some_fedftg.toml").write_text(recipe.replace("epochs = 1", "epochs = 2"))
    assert "is not paper/some_fedftg: local.epochs is 1, not 2" in given(str(run), "--commit", "c")


def test_a_shortened_schedule_is_one_in_which_both_rates_fall_as_far(bench: Any) -> None:
    import headline  # type: ignore[import-not-found]

    def changed(recipe: str, *given: str) -> Any:
        path = headline.RECIPES / f"cifar10_iid_{recipe}.toml"
        return headline._changed(configs.load(path, ["rounds=150", *given]), Path("runs/x"))

    local, refiner = "local.lr_decay=0.98674", "refiner.lr_decay=0.98674"
    assert changed("fedavg_fedftg", local, refiner) == (
        {"local.lr_decay": 0.98674, "refiner.lr_decay": 0.98674, "rounds": 150}, True
    )  # fmt: skip
    assert changed("fedavg", local)[1]
    assert changed("fedavg_fedftg") == ({"rounds": 150}, False)
    assert changed("fedavg", "local.lr_decay=0.9868")[1]
    for given, wrong, got in (
        ((local,), "refiner", 0.998),
        ((refiner,), "local", 0.998),
        ((local, "refiner.lr_decay=0.98"), "refiner", 0.98),
        (("local.lr_decay=0.9869", refiner), "local", 0.9869),
    ):
        with pytest.raises(InputError, match=rf"in 150 rounds: .* {wrong}\.lr_decay must be 0.98674, got {got}"):
            changed("fedavg_fedftg", *given)
    with pytest.raises(InputError, match=r"local\.lr_decay is 0\.999, not 0\.998"):
        changed("fedavg", "rounds=2000", "local.lr_decay=0.999")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--tables", "A,Z", "no table 'Z'; there are A, B"),
        ("--seeds", "0;1", "got '0;1'"),
        ("--jobs", "0", "got '0'; give a whole number from 1 on"),
        ("--rounds", "-1", "got '-1'"),
        ("--only", "fedavq", "no cell of tables A,B,S,C has 'fedavq' in its name"),
    ],
)
def test_wrong_input_is_one_line(
    bench: Any, option: str, value: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy.py", option, value])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_accuracy_is_the_mean_of_the_last_ten_evaluations(bench: Any) -> None:
    import tables  # type: ignore[import-not-found]

    values = [number / 100 for number in range(12)]  # .00 to .11, after rounds 2 to 24
    run = kept(values, values[::-1])
    assert tables.last(run, "selected") == pytest.approx(0.065)
    assert tables.last(run, "selected", until=22) == pytest.approx(0.055)
    assert tables.last(run, "selected", until=4) == pytest.approx(0.005)
    # The better of .02 to .11 and of .09 to .00.
    assert tables.last(run, "selected", "refined") == pytest.approx((9 + 8 + 7 + 6 + 6 + 7 + 8 + 9 + 10 + 11) / 1000)


def test_a_run_of_other_code_is_begun_anew(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed after it has written its config: the next one of the same code goes on with it."""
    resumed: list[bool] = []

    def killed(command: list[str], **options: Any) -> Any:
        if command[0] != sys.executable:
            return real(command, **options)
        folder = Path(command[command.index("--out") + 1])
        assert options["env"]["CUDA_VISIBLE_DEVICES"] == ""
        resumed.append("--resume" in command)
        assert resumed[-1] == folder.exists()
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").touch()
        return bench.subprocess.CompletedProcess(command, -9, "", "killed")

    real = bench.subprocess.run
    monkeypatch.setattr(bench.subprocess, "run", killed)
    cell = bench.Cell("tiny", ("refiner.name=none",))
    for _ in range(2):
        assert not bench.run(cell, 0, None, None)
    monkeypatch.setattr(bench, "code", lambda: "other")
    for rounds in (None, None, 1, 1):
        assert not bench.run(cell, 0, None, rounds)
    assert resumed == [False, True, False, True, False, False]  # a trial is always of the code as it is


def test_the_control_is_between_the_aggregate_and_what_it_gave_before(bench: Any) -> None:
    """Weight .25: from nothing the aggregate 4 as it is; then .75 x 8 + .25 x 4 = 7."""
    import torch
    from controls import Interpolation  # type: ignore[import-not-found]

    from fedftg.algorithms.base import ServerState

    def state(value: float, memory: dict[str, torch.Tensor]) -> ServerState:
        params, buffers = {"w": torch.tensor([value])}, {"b": torch.tensor([-value]), "n": torch.tensor(int(value))}
        return ServerState(round=1, params=params, buffers=buffers, server={}, refiner=memory)

    control = Interpolation(0.25)
    first, _ = control.refine(state(4.0, {}), [], torch.Generator())
    assert float(first.params["w"]) == 4.0
    second, _ = control.refine(state(8.0, dict(first.refiner)), [], torch.Generator())
    assert (float(second.params["w"]), float(second.buffers["b"]), int(second.buffers["n"])) == (7.0, -7.0, 8)


def test_a_shorter_run_is_compared_over_the_rounds_that_both_have(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cell ends after round 4: refined (.3 + .5) / 2 = .4 there, beside .2 of the base up to round 4 and .35 of the
    unchanged preset: +20 and +5 points. A base that only has later rounds would give .9."""
    import figures  # type: ignore[import-not-found]
    import tables  # type: ignore[import-not-found]

    short = "fedavg-fedftg-b0.1-gn-I5"
    written = {
        short: kept([0.1, 0.2], [0.3, 0.5]),
        "fedavg-base-b0.1-gn": kept([0.1, 0.3, 0.9], [0.1, 0.3, 0.9]),
        "fedavg-fedftg-b0.1-gn": kept([0.1, 0.3, 0.9], [0.3, 0.4, 0.9]),
    }
    for name, result in written.items():
        path = tmp_path / "results" / name / "seed0.json"
        path.parent.mkdir(parents=True)
        of_now = {"seed": 0, "commit": "c", "made_with": bench.settings(tables.CELLS[name])}
        path.write_text(json.dumps({**of_now, **result}))
    text = bench.write_tables(tmp_path / "results").read_text()
    (line,) = {line for line in text.splitlines() if line.startswith(f"| {short} |")}
    cells = [part.strip() for part in line.strip("|").split("|")]
    assert (cells[2], cells[8], cells[9]) == ("4", "+20.00 (seed 0: +20.0)", "+5.00 (seed 0: +5.0)")
    monkeypatch.setitem(tables.TABLES, "S", tables.Rows("until 4", tables.TABLES["S"].cells, 4))
    part_s = tables.write_tables(tmp_path / "results").read_text().split("## S. ")[1].split("## ")[0]
    (line,) = {line for line in part_s.splitlines() if line.startswith("| fedavg-fedftg-b0.1-gn |")}
    cells = [part.strip() for part in line.strip("|").split("|")]
    assert (cells[2], cells[5], cells[6], cells[8]) == ("4", "35.00", "40.00", "+15.00 (seed 0: +15.0)")
    drawn = figures.write_figures(tmp_path / "results", tmp_path)
    of = ("gains", "rounds", "trends", "after_gn")
    assert [path.name for path in drawn] == [f"accuracy_{what}.png" for what in of]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn)
