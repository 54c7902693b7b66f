"""The page in a browser: everything is drawn, toggles and themes work, nothing overflows; and its numbers by hand."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedftg
from fedftg.report.load import RunRecord, load_run
from fedftg.report.page import KINDS, html_page
from fedftg.rundir import pictures
from fedftg.rundir.records import ACCURACIES

TINY = [
    "data.name=digits", "data.max_train=200", "data.max_test=60", "partition.num_clients=5", "cohort.size=3",
    "partition.test_share=0.2", "rounds=2", "local.epochs=1", "threads=1",
]  # fmt: skip
SMALL_REFINER = ["refiner.iterations=2", "refiner.batch_size=16", "refiner.generator_width=4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    """A base, and two seeds of a recipe with a refiner, whose name is HTML."""
    folder = tmp_path_factory.mktemp("runs")
    made = {"base": ["refiner.name=none"], "<b>&amp;-s0": SMALL_REFINER, "<b>&amp;-s1": [*SMALL_REFINER, "seed=1"]}
    for name, settings in made.items():
        fedftg.run("default_base" if name == "base" else "default", overrides=[*TINY, *settings], out=folder / name)
    return [load_run(folder / name) for name in made]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright, chromium = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, runs: list[RunRecord], tmp_path: Path) -> Iterator[Any]:
    """The page of a comparison, opened 1400 wide; a message on the console or a request fails the test."""
    file = tmp_path / "report.html"
    file.write_text(html_page(runs), encoding="utf-8")
    opened, wrong = browser.new_page(viewport={"width": 1400, "height": 900}), []
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
    opened.goto(file.as_uri())
    yield opened
    opened.close()
    assert wrong == []


DRAWN = ".scatterlayer .trace, .barlayer .point, .heatmaplayer image"


def test_every_figure_is_drawn_and_said(page: Any) -> None:
    plots = page.locator(".plot")
    captions = page.locator("figure:has(.plot) figcaption").all_inner_texts()
    for caption in (
        "Test accuracy in %", "Test loss", "refine: discrepancy", "Accuracy of each class after round 2 in %",
        "Samples of each class", "Accuracy of each client on what it holds back after round 2 in %",
        "Seconds of a round", "base, deployed", "<b>&amp;, deployed",
    ):  # fmt: skip
        assert any(text.startswith(caption) for text in captions), caption
    for place in range(plots.count()):
        plot, label = plots.nth(place), plots.nth(place).get_attribute("aria-label")
        assert plot.locator(DRAWN).count() > 0, label
        assert plot.get_attribute("role") == "img"
        assert label.endswith("the numbers are below")
        assert plot.locator("xpath=../details//td").count() > 0, label
    assert page.locator(".mosaic img").count() == 2
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth == 64 && image.alt)")
    assert page.locator("h1").inner_text() == "base and <b>&amp;"
    assert "refiner.name" in page.locator("main").inner_text()


def test_toggles_by_keyboard(page: Any) -> None:
    """Two runs, of which one has a line before refining, and two seeds, so that its two lines have a band each."""
    lines = page.locator(".plot").first.locator(".scatterlayer .trace")
    assert lines.count() == 5
    for label, number in (("± deviation", 3), ("each seed", 7), ("selected", 4), ("base", 3), ("all (last", 6)):
        box = page.get_by_role("checkbox", name=label)
        box.focus()
        page.keyboard.press("Space")
        assert lines.count() == number, label


def test_a_cell_says_what_it_is(page: Any) -> None:
    """The first cell of the base's confusion matrix, by its centre."""
    plot = page.locator(".plot:has(.heatmaplayer image)").first
    plot.evaluate("plot => plot.scrollIntoView({block: 'center'})")
    box = plot.locator(".heatmaplayer image").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 20, box["y"] + box["height"] / 20)
    page.wait_for_selector(".hoverlayer .hovertext")
    assert plot.locator(".hoverlayer").text_content().startswith("true class 0, predicted class 0: ")


def test_narrow_dark_and_printed(page: Any) -> None:
    def background() -> str:
        return str(page.locator(".plot .main-svg").first.evaluate("svg => getComputedStyle(svg).backgroundColor"))

    light = background()
    page.set_viewport_size({"width": 400, "height": 800})
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.querySelector('.main-svg').clientWidth < 400")
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    dark = background()
    assert light == "rgb(255, 255, 255)" != dark
    assert len(page.pdf(format="A4")) > 50_000
    assert background() == dark
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert background() == light


def test_numbers_by_hand(tmp_path: Path) -> None:
    """Of four and five images of two classes 3 and 1 are right, after refining 2 and 5: 75 and 20 %, 50 and 100 %."""
    confusion = {"selected": [[3, 1], [4, 1]], "refined": [[2, 2], [0, 5]]}
    (tmp_path / "evaluation.json").write_text(json.dumps({"round": 1, "confusion": confusion, "clients": {}}))
    partition = {"class_names": ["cat", "</script>"], "digest": "", "class_counts": [[7, 0]], "image_shape": [1, 8, 8]}
    (tmp_path / "partition.json").write_text(json.dumps(partition))
    for number in (1, 2):
        pictures.write(tmp_path / "images", number, np.zeros((4, 8, 1), dtype=np.uint8), labelled=number == 2)
    row = {"round": 1, "seconds": {"local": 2.0}, "accuracy": {"selected": 4 / 9, "refined": 7 / 9}, "refine": {}}
    config = {"rounds": 1, "algorithm": {"name": "fedavg"}, "refiner": {"name": "fedftg"}}
    text = html_page([RunRecord(tmp_path, config, [row], None)])
    assert "in round 1, without labels" in text
    assert "in round 2, a row a class, from cat to &lt;/script&gt;" in text
    assert "<th scope=row>cat<td>75.0<td>50.0</tr><tr><th scope=row>&lt;/script&gt;<td>20.0<td>100.0</tr>" in text
    assert "+80.0 points for class &lt;/script&gt;, the largest gain, and -25.0 for class cat" in text
    assert "Accuracy of each class after round 1 in %" in text
    assert "<th scope=row>0<td>7<td>0</tr>" in text
    assert "&lt;/script&gt;&lt;/script&gt;" not in text


def test_a_run_without_details(tmp_path: Path) -> None:
    config = {"rounds": 1, "algorithm": {"name": "fedavg"}, "refiner": {"name": "none"}}
    text = html_page([RunRecord(tmp_path, config, [], None)])
    assert "To see what a refiner gives" in text
    assert "Which classes gain?" not in text


def test_data_sets_and_groups_of_one_name_stay_apart(tmp_path: Path) -> None:
    """Run `a` and group `a` of seeds 0 and 1, extended since round 5, have two classes; run `b` has others."""
    rights = {"a": (2, 1, 9), "a-s0": (2, 2, 5), "a-s1": (4, 2, 9), "b": (1, 2, 9)}
    runs = []
    for name, (first, second, number) in rights.items():
        (folder := tmp_path / name).mkdir()
        confusion = {"refined": [[first, 4 - first], [4 - second, second]]}
        (folder / "evaluation.json").write_text(json.dumps({"round": number, "confusion": confusion}))
        classes = ["cat", "dog"] if name < "b" else ["car", "bus"]
        partition = {"class_names": classes, "digest": name, "class_counts": [[7, 0]]}
        (folder / "partition.json").write_text(json.dumps(partition))
        config = {"rounds": 9, "algorithm": {"name": "fedavg"}, "refiner": {"name": "none"}, "x": {"y": len(name)}}
        row = {"round": 1, "seconds": {}, "accuracy": {}, "refine": {}}
        runs.append(RunRecord(folder, {**config, "seed": int(name == "a-s1"), "data": name[:1]}, [row], None))
    text = html_page(runs)
    assert "Accuracy of each class after round 5 or 9 in %" in text
    assert "<th scope=row>cat<td>50.0<td>75.0</tr><tr><th scope=row>dog<td>25.0<td>50.0</tr>" in text
    assert "Accuracy of each class after round 9 in %" in text
    assert "<th scope=row>car<td>25.0</tr><tr><th scope=row>bus<td>50.0</tr>" in text
    assert "Confusion after round 5 or 9, sum over seeds" in text


def test_each_kind_of_accuracy_has_a_label() -> None:
    assert set(KINDS) == set(ACCURACIES)
