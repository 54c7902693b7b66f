"""Keeps what is measured of runs of the paper's protocol, finished or not, and puts it on docs/results.md.

    python benchmarks/accuracy/headline.py RUN_FOLDER ... --commit COMMIT

Of each run folder a small file goes to ``benchmarks/results/headline``; table and figure are made of all files there.
Without folders only these are made anew. The runs themselves are ``fedftg run paper/RECIPE``, as the page says. A run
may have a shortened schedule: fewer rounds, in which both rates, the clients' and the refiner's, fall as far as in all
of the recipe's. It is compared with others of as many rounds.
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
from tables import KINDS, PAGE, last, read

from fedftg import config as configs
from fedftg import recipes
from fedftg.errors import InputError
from fedftg.rundir import records
from fedftg.rundir.folder import RunFolder

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "headline"
RECIPES = recipes.folder() / "paper"
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
    try:
        found = [kept(folder, arguments.commit) for folder in arguments.runs]
    except InputError as error:
        parser.error(str(error))
    for result in found:  # all are sound
        RESULTS.mkdir(parents=True, exist_ok=True)
        records.write_json(file_of(result), result)
        print(file_of(result))
    results = load(RESULTS)
    if results:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
        draw(results, FIGURES / "headline_rounds.png")


def file_of(result: Result) -> Path:
    """Where it is kept."""
    recipe = result["recipe"].removeprefix("paper/")
    schedule = f"-in{result['shortened_to']}" if "shortened_to" in result else ""
    return RESULTS / f"{recipe}-{result['preset']}-seed{result['seed']}{schedule}.json"


def kept(folder: Path, commit: str) -> Result:
    """What is kept of a run.

    Raises:
        InputError: the folder holds no run of a recipe of the paper's protocol, one with too few evaluations, or fewer
            rounds than are kept of the same already.
    """
    run = RunFolder(folder)
    config = configs.from_mapping(run.read_config())
    preset = getattr(config.refiner, "preset", "base")
    rows = records.read(run.rounds_file)
    evaluated = [row for row in rows if row["accuracy"]]
    changed, shortened = _changed(config, folder)
    if len(evaluated) < EVALUATIONS:
        raise InputError(
            f"{folder} has {len(evaluated)} evaluations in {len(rows)} rounds, a row needs {EVALUATIONS}; "
            "go on with it by fedftg run --resume"
        )
    session = records.read_json(folder / "environment.json")["sessions"][-1]
    measured = dict.fromkeys(name for row in evaluated for name in row["refine"])
    result: Result = {
        "recipe": f"paper/{config.name}",
        "preset": preset,
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
    before = read(file_of(result))
    if before and before["rounds_done"] > result["rounds_done"]:
        raise InputError(
            f"{folder} has {result['rounds_done']} rounds, of {file_of(result).name} {before['rounds_done']} are kept; "
            "delete that file to put this run in its place"
        )
    return result


_MAY_DIFFER = (*configs.RESUME_MAY_CHANGE, "executor", "evaluation.batch_size")
"""From the recipe, in a run that stands under its name."""


_DECAYS = ("local.lr_decay", "refiner.lr_decay")
_ALIKE = 0.01
"""By how much a rate's fall, decay to the power of the rounds, may miss the recipe's: decays are given in digits."""


def _changed(config: configs.RunConfig, folder: Path) -> tuple[dict[str, Any], bool]:
    """In what a run differs from its recipe with its preset and seed, and whether its schedule is a shortened one.

    Raises:
        InputError: it differs in more than how it ran, or a rate falls otherwise than in a shortened schedule.
    """
    path = RECIPES / f"{config.name}.toml"
    if not path.is_file():
        raise InputError(f"{folder} is a run named {config.name!r}; only those of recipes/paper are kept")
    given = [f"seed={config.seed}"]
    if config.refiner.name == "fedftg":
        given.append(f"refiner.preset={config.refiner.preset}")
    recipe = configs.load(path, given)
    as_recipe, as_run = (configs.flat(of.model_dump(mode="json")) for of in (recipe, config))
    found = {key: as_run.get(key) for key in sorted({*as_recipe, *as_run}) if as_run.get(key) != as_recipe.get(key)}
    decays = [key for key in _DECAYS if key in as_recipe]
    shortened = config.rounds < recipe.rounds and any(key in found for key in decays)
    if shortened:
        falls = {key: (as_recipe[key] ** recipe.rounds, as_run[key] ** config.rounds) for key in decays}
        for key, (wanted, got) in falls.items():
            if abs(got - wanted) > _ALIKE * wanted:
                raise InputError(
                    f"{folder} is not paper/{config.name} in {config.rounds} rounds: for the same fall of the rate "
                    f"{key} must be {wanted ** (1 / config.rounds):.5f}, got {as_run[key]}"
                )
    for key in found:
        alike = any(key == may or key.startswith(f"{may}.") for may in _MAY_DIFFER)
        if not alike and not (shortened and key in decays):
            raise InputError(
                f"{folder} is not paper/{config.name}: {key} is {found[key]!r}, not {as_recipe.get(key)!r}"
            )
    return {key: value for key, value in found.items() if key not in ("data.root", "data.cache")}, shortened


def load(results: Path) -> list[Result]:
    """All kept runs, each federation's base first."""
    found = [result for path in sorted(results.glob("*.json")) if (result := read(path)) is not None]
    return sorted(
        found, key=lambda of: ("shortened_to" in of, federation(of), list(_COLOUR).index(of["preset"]), of["seed"])
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
