"""Keeps what is measured of runs of the paper's protocol, finished or not, and fills benchmarks/results/headline.md.

    python benchmarks/accuracy/headline.py RUN_FOLDER ... --commit COMMIT

A line of each run is appended to ``benchmarks/results/headline.jsonl``; table and figure are made of all lines there.
Without folders only these are made anew. The runs themselves are ``fedftg run paper`` and ``fedftg run paper_base``,
with data set, partition law, algorithm, preset and seed set as wanted. A run may have a shortened schedule: fewer
rounds, in which both rates, the clients' and the refiner's, fall as far as in all of the recipe's. It is compared with
others of as many rounds.
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path
from typing import Any

from figures import FOLDER as FIGURES
from figures import OF_PRESET, save
from matplotlib.figure import Figure
from tables import KINDS, RESULTS, last

from fedftg import config as configs
from fedftg import recipes
from fedftg.errors import InputError
from fedftg.rundir import records
from fedftg.rundir.folder import RunFolder

HEADLINE = RESULTS / "headline.jsonl"
PAGE = RESULTS / "headline.md"
EVALUATIONS = 5
"""Whose mean is in the table: these curves still climb, so ten of them would reach far back."""

_BLOCK = re.compile(r"(<!-- headline: [^>]*-->\n)(.*?)(<!-- end of headline -->)", re.DOTALL)
_COLOUR = {"base": "black", **OF_PRESET}

Result = dict[str, Any]


def main() -> None:
    """Keeps the given runs, then makes table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs, finished or not")
    parser.add_argument("--commit", help="of the code that ran; needed with folders")
    arguments = parser.parse_args()
    if arguments.runs and not arguments.commit:
        parser.error("--commit is missing: which code made these runs?")
    try:
        found = [kept(folder, arguments.commit) for folder in arguments.runs]
    except InputError as error:
        parser.error(str(error))
    for result in found:
        records.append(HEADLINE, result)
    results = load(HEADLINE)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    draw(results, FIGURES / "headline_rounds.png")


def kept(folder: Path, commit: str) -> Result:
    """Returns what is kept of a run.

    Raises:
        InputError: the folder holds no run of the paper's protocol, or one with too few evaluations.
    """
    run = RunFolder(folder)
    config = configs.from_mapping(run.read_config())
    rows = records.read(run.rounds_file)
    evaluated = [row for row in rows if row["accuracy"]]
    changed, shortened = differences(config, folder)
    if len(evaluated) < EVALUATIONS:
        raise InputError(
            f"{folder} has {len(evaluated)} evaluations in {len(rows)} rounds, a row needs {EVALUATIONS}; "
            "continue it with fedftg run --resume"
        )
    session = records.read_json(folder / "environment.json")["sessions"][-1]
    measured = dict.fromkeys(name for row in evaluated for name in row["refine"])
    law = "iid" if config.partition.law == "iid" else f"dir{round(10 * config.partition.alpha):02}"
    refined = "_fedftg" if config.refiner.name == "fedftg" else ""
    result: Result = {
        "recipe": f"paper/{config.data.name}_{law}_{config.algorithm.name}{refined}",
        "preset": getattr(config.refiner, "preset", "base"),
        "seed": config.seed,
        "settings": changed,
        "machine": {
            name: session[name] for name in ("device", "processor", "cores", "threads", "executor", "packages")
        },
        "commit": commit,
        "rounds_done": rows[-1]["round"],
        "rounds_planned": config.rounds,
        "rounds": [row["round"] for row in evaluated],
        "accuracy": {kind: [row["accuracy"][kind] for row in evaluated] for kind in KINDS},
        "refine": {name: [row["refine"].get(name) for row in evaluated] for name in measured},
        "seconds": {
            phase: round(statistics.mean(row["seconds"][phase] for row in rows), 3) for phase in rows[0]["seconds"]
        },
        "rolled_back": [row["round"] for row in rows if "rolled_back" in row],
    }
    if shortened:
        result["shortened_to"] = config.rounds
    return result


_MAY_DIFFER = (*configs.RESUME_MAY_CHANGE, "executor", "evaluation.batch_size")
"""From the recipe, in a run of the paper's protocol."""
_DECAYS = ("local.lr_decay", "refiner.lr_decay")
_ALIKE = 0.01
"""By how much a rate's fall, decay to the power of the rounds, may miss the recipe's: decays are given in digits."""


def differences(config: configs.RunConfig, folder: Path) -> tuple[dict[str, Any], bool]:
    """Returns what a run sets otherwise than its recipe, and whether its schedule is a shortened one.

    The recipe is ``paper`` or ``paper_base`` with the run's data set, partition law, algorithm, preset and seed.

    Raises:
        InputError: it differs in more than how it ran, or a rate falls otherwise than in a shortened schedule.
    """
    refined = config.refiner.name == "fedftg"
    given = [f"seed={config.seed}", f"data.name={config.data.name}", f"algorithm.name={config.algorithm.name}"]
    given += [f"partition.law={config.partition.law}", f"partition.alpha={config.partition.alpha}"]
    given += [f"refiner.preset={getattr(config.refiner, 'preset', None)}"] if refined else []
    recipe = configs.load(recipes.find("paper" if refined else "paper_base"), given)
    as_recipe, as_run = (configs.flat(of.model_dump(mode="json")) for of in (recipe, config))
    found = {key: as_run.get(key) for key in sorted({*as_recipe, *as_run}) if as_run.get(key) != as_recipe.get(key)}
    decays = [key for key in _DECAYS if key in as_recipe]
    shortened = config.rounds < recipe.rounds and any(key in found for key in decays)
    for key in decays if shortened else []:
        wanted, got = as_recipe[key] ** recipe.rounds, as_run[key] ** config.rounds
        if abs(got - wanted) > _ALIKE * wanted:
            raise InputError(
                f"{folder} is not the recipe paper in {config.rounds} rounds: for the same fall of the rate "
                f"{key} must be {wanted ** (1 / config.rounds):.5f}, got {as_run[key]}"
            )
    for key in found:
        alike = any(key == may or key.startswith(f"{may}.") for may in _MAY_DIFFER)
        if not alike and not (shortened and key in decays):
            raise InputError(f"{folder} is not the recipe paper: {key} is {found[key]!r}, not {as_recipe.get(key)!r}")
    return {key: value for key, value in found.items() if key not in ("name", "data.root", "data.cache")}, shortened


def load(path: Path) -> list[Result]:
    """Returns all kept runs, each federation's base first; of two lines of one run, the one with more rounds."""
    lines = sorted(records.read(path), key=lambda of: of["rounds_done"])
    runs = {(federation(of), of["preset"], of["seed"]): of for of in lines}
    return sorted(
        runs.values(),
        key=lambda of: ("shortened_to" in of, federation(of), list(_COLOUR).index(of["preset"]), of["seed"]),
    )


def federation(result: Result) -> str:
    """What a run shares with its base: data, partition, algorithm and schedule."""
    name = str(result["recipe"]).removeprefix("paper/").removesuffix("_fedftg")
    return f"{name}, shortened to {result['shortened_to']}" if "shortened_to" in result else name


def table(results: list[Result]) -> list[str]:
    """Its lines: every run up to the last round that all of its federation have evaluated."""
    ends: dict[str, int] = {}
    for result in results:
        ends[federation(result)] = min(result["rounds"][-1], ends.get(federation(result), result["rounds"][-1]))

    def mean(result: Result, kind: str) -> float:
        return 100 * last(result, kind, until=ends[federation(result)], evaluations=EVALUATIONS)

    bases = {(federation(result), result["seed"]): result for result in results if result["preset"] == "base"}
    titles = (
        "recipe", "preset", "seed", "rounds done", "up to round", *(f"`{kind}`" for kind in KINDS),
        "over its base", "`all` over its base's", "right after", "its last `all`, `refined`", "s",
    )  # fmt: skip
    lines = [titles, ("---",) * len(titles)]
    for result in results:
        means = {kind: mean(result, kind) for kind in KINDS}
        refines, base = result["preset"] != "base", bases.get((federation(result), result["seed"]))
        over = {kind: f"{means[kind] - mean(base, kind):+.1f}" if refines and base else "" for kind in KINDS}
        lines.append((
            f"`{result['recipe']}`", result["preset"] if refines else "", str(result["seed"]),
            f"{result['rounds_done']} of {result['rounds_planned']}", str(ends[federation(result)]),
            *(f"{means[kind]:.1f}" for kind in KINDS),
            over["refined"], over["all"], f"{means['refined'] - means['selected']:+.1f}" if refines else "",
            ", ".join(f"{100 * result['accuracy'][kind][-1]:.1f}" for kind in ("all", "refined")),
            f"{sum(result['seconds'].values()):.1f}",
        ))  # fmt: skip
    return [
        f"Mean of the last {EVALUATIONS} evaluations up to that round, and the last of the run, in %; s: seconds a\n"
        "round, in the mean of all that were done.",
        "",
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


def fill(text: str, results: list[Result]) -> str:
    """The page's text with the table made anew."""
    return _BLOCK.sub(lambda block: block[1] + "\n".join(table(results)) + "\n" + block[3], text)


def draw(results: list[Result], path: Path) -> None:
    """Accuracy by round, a panel for each federation, two in a row."""
    names = list(dict.fromkeys(federation(result) for result in results))
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.6 * columns, 1 + 4 * lines), dpi=100, layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
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
    for axes in panels[::columns]:
        axes.set_ylabel("test accuracy in %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main()
