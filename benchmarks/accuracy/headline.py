"""Keeps what is measured of runs of the paper's protocol, finished or not, and puts it on docs/results.md.

    python benchmarks/accuracy/headline.py RUN_FOLDER ... --commit COMMIT

Of each run folder a small file goes to ``benchmarks/results/headline``; table and figure are made of all files there.
Without folders only these are made anew. The runs themselves are ``fedftg run paper/RECIPE``, as the page says.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from figures import FOLDER as FIGURES
from figures import OF_PRESET, save
from matplotlib.figure import Figure
from tables import KINDS, PAGE, last, read

from fedftg.rundir.folder import RunFolder

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "headline"
EVALUATIONS = 5
"""Whose mean stands in the table: these curves still climb, so ten of them would reach far back."""

_BLOCK = re.compile(r"(<!-- headline: [^>]*-->\n)(.*?)(<!-- end of headline -->)", re.DOTALL)
_COLOUR = {"base": "black", **OF_PRESET}

Result = dict[str, Any]


def main() -> None:
    """Keeps the runs that are given, then makes table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs, finished or not")
    parser.add_argument("--commit", help="of the code that ran; needed with folders")
    arguments = parser.parse_args()
    if arguments.runs and not arguments.commit:
        parser.error("--commit is missing: which code made these runs?")
    for folder in arguments.runs:
        if not (folder / "rounds.jsonl").is_file():
            parser.error(f"{folder} is no folder of a run: it has no rounds.jsonl")
        print(keep(folder, arguments.commit, RESULTS))
    results = load(RESULTS)
    if results:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
        draw(results, FIGURES / "headline_rounds.png")


def keep(folder: Path, commit: str, results: Path) -> Path:
    """Writes the small file of a run; returns its path."""
    config = RunFolder(folder).read_config()
    session = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["sessions"][-1]
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluated = [row for row in rows if row["accuracy"]]
    measured = dict.fromkeys(name for row in evaluated for name in row["refine"])
    preset = config["refiner"].get("preset", "base")
    result: Result = {
        "recipe": f"paper/{config['name']}",
        "preset": preset,
        "seed": config["seed"],
        "machine": {
            name: session[name] for name in ("device", "processor", "cores", "threads", "executor", "packages")
        },
        "commit": commit,
        "rounds_done": rows[-1]["round"],
        "rounds_planned": config["rounds"],
        "rounds": [row["round"] for row in evaluated],
        "accuracy": {kind: [row["accuracy"][kind] for row in evaluated] for kind in KINDS},
        "refine": {name: [row["refine"].get(name) for row in evaluated] for name in measured},
        "seconds": {
            phase: round(statistics.median(row["seconds"][phase] for row in rows), 3) for phase in rows[0]["seconds"]
        },
        "rolled_back": [row["round"] for row in rows if "rolled_back" in row],
    }
    path = results / f"{config['name']}-{preset}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def load(results: Path) -> list[Result]:
    """All kept runs, each federation's base first."""
    found = [result for path in sorted(results.glob("*.json")) if (result := read(path)) is not None]
    return sorted(found, key=lambda result: (federation(result), list(_COLOUR).index(result["preset"])))


def federation(result: Result) -> str:
    """What a run shares with its base: data, partition and algorithm."""
    return str(result["recipe"]).removeprefix("paper/").removesuffix("_fedftg")


def table(results: list[Result]) -> list[str]:
    """Its lines: every run up to the last round that all of them have evaluated."""
    end = min(result["rounds"][-1] for result in results)

    def mean(result: Result, kind: str) -> float:
        return 100 * last(result, kind, until=end, evaluations=EVALUATIONS)

    bases = {federation(result): result for result in results if result["preset"] == "base"}
    titles = ("recipe", "preset", "rounds done", *(f"`{kind}`" for kind in KINDS), "over its base", "right after", "s")
    lines = [titles, ("---",) * len(titles)]
    for result in results:
        means = {kind: mean(result, kind) for kind in KINDS}
        refines, base = result["preset"] != "base", bases.get(federation(result))
        lines.append((
            f"`{result['recipe']}`", result["preset"] if refines else "", str(result["rounds_done"]),
            *(f"{means[kind]:.1f}" for kind in KINDS),
            f"{means['refined'] - mean(base, 'refined'):+.1f}" if refines and base else "",
            f"{means['refined'] - means['selected']:+.1f}" if refines else "",
            f"{sum(result['seconds'].values()):.1f}",
        ))  # fmt: skip
    return [
        f"Mean of the last {EVALUATIONS} evaluations up to round {end}, in %:",
        "",
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


def fill(text: str, results: list[Result]) -> str:
    """The page's text with the table made anew."""
    return _BLOCK.sub(lambda block: block[1] + "\n".join(table(results)) + "\n" + block[3], text)


def draw(results: list[Result], path: Path) -> None:
    """Accuracy by round, a panel for each federation."""
    names = list(dict.fromkeys(federation(result) for result in results))
    figure = Figure(figsize=(4.6 * len(names), 5), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for result in (result for result in results if federation(result) == name):
            colour = _COLOUR[result["preset"]]
            styles = {"refined": "-", "all": ":"} if result["preset"] == "base" else {"refined": "-", "selected": "--"}
            for kind, style in styles.items():
                values = [100 * value for value in result["accuracy"][kind]]
                shown = "aggregate, deployed" if result["preset"] == "base" and kind == "refined" else kind
                label = f"{result['preset']}: {shown}"
                axes.plot(result["rounds"], values, style, color=colour, label=label, linewidth=1.6)
        axes.set(title=name, xlabel="round")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy in %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main()
