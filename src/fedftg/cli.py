"""The command line: parse, call, print. Exit status 0 done; 2 wrong input; 130 interrupted, resumable.

Commands import what they need when they are called: torch alone takes longer than ``fedftg --help`` may.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fedftg import __version__, recipes
from fedftg.errors import ClientError, InputError

if TYPE_CHECKING:
    from fedftg.config import RunConfig
    from fedftg.progress import Progress
    from fedftg.report.load import RunRecord

RUNS = Path("runs")
Key = tuple[str, str]  # a recipe as it was given, and the end of its run's name

KINDS = {  # what `fedftg list` shows, and where each name goes
    "data": "data.name", "laws": "partition.law", "models": "model.name", "algorithms": "algorithm.name",
    "refiners": "refiner.name", "presets": "refiner.preset of fedftg", "recipes": "fedftg run NAME",
}  # fmt: skip

_format = click.option(
    "--format", "form", type=click.Choice(["text", "markdown", "csv", "latex"]), default="text",
    help="Of the printed table; all but text print it alone on standard output.",
)  # fmt: skip


def _chosen(_context: click.Context, _option: click.Parameter, text: str) -> list[str]:
    from fedftg.report.table import chosen_columns

    return chosen_columns(text)


_columns = click.option("--columns", default="", callback=_chosen, metavar="NAME,NAME...", help="Columns to print.")
_set = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fedftg")
def cli() -> None:
    """Data-free fine-tuning of the global model in federated learning (FedFTG)."""


@cli.command()
@click.argument("recipe", required=False)
@_set
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. Default: runs/NAME.")
@click.option("--resume", is_flag=True, help="Resume an interrupted run.")
def run(recipe: str | None, overrides: Sequence[str], out: Path | None, resume: bool) -> None:
    """Run one experiment; RECIPE is a file or a name (default: FedAvg + FedFTG on built-in data)."""
    if recipe is not None:
        recipes.find(recipe)
    from fedftg import loop
    from fedftg.engine.machine import keep_freed_memory

    keep_freed_memory()
    console = Console()
    done = loop.run(recipe, overrides=overrides, out=out, resume=resume, progress=_progress(console))
    _report(console, [done.folder], done.folder / "report", "text", ())
    _print(console, f"an interactive page: fedftg report {done.folder}")
    _print(console, f"run folder: {done.folder}")


@cli.command()
@click.argument("items", nargs=-1, required=True, metavar="RECIPE|RUN...")
@_set
@click.option("--seeds", default="", metavar="N,N...", help="Run each with each seed; tables show the mean.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    help="Runs at a time, in processes of one thread each.",
)
@click.option("--missing", is_flag=True, help="Only list the runs and which of them are missing.")
@click.option("--out", type=click.Path(path_type=Path), default=RUNS, help="Folder of run folders.")
@_format
@_columns
def compare(
    items: Sequence[str], overrides: Sequence[str], seeds: str, jobs: int, missing: bool, out: Path, **printed: Any
) -> None:
    """Run what is missing; one table and one plot of all.

    --set KEY=A,B runs each recipe with each value, --seeds with each seed.
    """
    own = ("comparisons", "partitions")  # folders of this command's and of `partition`'s files, as in RUNS/*
    items = [item for item in dict.fromkeys(items) if not (Path(item).is_dir() and Path(item).name in own)]
    given = [item for item in items if (Path(item) / "config.toml").is_file()]
    files = {item: recipes.find(item) for item in items if item not in given}
    if (overrides or seeds) and not files:
        raise InputError("--set and --seeds change recipes, but only folders of runs were given; name recipes")
    console = Console(stderr=printed["form"] != "text")
    # All recipes are checked before the first is run, so that a typo in the last one costs no time.
    made = _to_compare(console, files, overrides, _numbers(seeds), jobs) if files else {}
    if len(given) + len(made) < 2:
        raise InputError(f"compare needs two or more different recipes or run folders, got {len(given) + len(made)}")
    finished = {label: _finished(config, out) for label, config in made.items()}
    if missing:
        for label, folder in finished.items():
            _print(console, f"{'finished' if folder else 'missing'}: {made[label].name}")
        return
    todo = {label: made[label] for label, folder in finished.items() if folder is None}
    done = {label: folder for label, folder in finished.items() if folder} | _run(console, todo, out, jobs)
    folders: list[Path] = []
    for item in items:
        folders += [Path(item)] if item in given else [done[key] for key in made if key[0] == item]
    found = [folder.resolve() for folder in folders]
    if len(set(found)) < len(found):
        raise InputError(f"{', '.join(items)}: two of these are the same run; compare different ones")
    name = "+".join(dict.fromkeys(re.sub(r"-s\d+$", "", path.name) for path in found))
    if name != (whole := "+".join(path.name for path in found)) or len(name) > 120:  # other seeds, another folder
        name = f"{name[:110]}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"
    records = _report(console, folders, out / "comparisons" / name, page=True, **printed)
    if len(records) > 6:
        _print(console, f"{len(records)} run folders in {out}")
        return
    for record in records:
        _print(console, f"run folder: {record.folder}")


@cli.command(name="track")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--to", "names", required=True, multiple=True, help="tensorboard, mlflow, wandb or trackio; again for more."
)
def track_run(folder: Path, names: Sequence[str]) -> None:
    """Send the rounds of a run to trackers, each round once."""
    from fedftg import config as configs
    from fedftg import track

    to = configs.parse(track.TrackConfig, {"to": names}, "track").to
    track.check(to)
    failed: list[str] = []
    track.Sink(folder, to, failed.append).close()
    if failed:
        raise InputError("; ".join(failed))
    _print(Console(), f"{folder}: sent to {', '.join(to)}")


@cli.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
def watch(folder: Path) -> None:
    """Watch a run from another terminal, until it is finished."""
    from fedftg.report.watch import watch

    with contextlib.suppress(KeyboardInterrupt):
        watch(folder, Console())


@cli.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@_format
@_columns
def report(folder: Path, **printed: Any) -> None:
    """Table, plot and interactive page of a run."""
    _report(Console(stderr=printed["form"] != "text"), [folder], folder / "report", page=True, **printed)


@cli.command()
@click.argument("recipe", required=False)
@_set
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the files. Default: runs/partitions/NAME.")
def partition(recipe: str | None, overrides: Sequence[str], out: Path | None) -> None:
    """Table and heatmap of who holds what; nothing is trained."""
    path = recipes.find(recipe or recipes.DEFAULT)
    from fedftg import config as configs

    write_partition(Console(), configs.load(path, overrides), out)


@cli.command(name="list")
@click.argument("kind", required=False, type=click.Choice(list(KINDS)))
def list_names(kind: str | None) -> None:
    """Every data set, partition law, model, algorithm, refiner, preset and recipe; KIND: one of these only."""
    table = Table(Column(no_wrap=True), Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
    for found, names in listing().items():
        if kind in (None, found):
            table.add_row(Text(found, "bold"), Text(KINDS[found], "dim"))
            for name in names:
                table.add_row(f"  {name}", Text(names[name]))
    Console().print(table)


@cli.command()
def doctor() -> None:
    """What a bug report needs: versions, processor, threads, GPU, cache, extras."""
    import torch

    from fedftg.data import cache
    from fedftg.engine.machine import environment, resolve_device

    found = environment(torch.get_num_threads(), resolve_device("auto"))
    packages = ", ".join(f"{name} {version}" for name, version in found.pop("packages").items())
    kept = cache.folder("auto")
    size = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file()) if kept else 0
    extras = {"data": "datasets", "flower": "flwr", "simulation": "ray"}
    extras |= {name: name for name in ("tensorboard", "mlflow", "wandb", "trackio")}
    has = {name: "installed" if importlib.util.find_spec(module) else "missing" for name, module in extras.items()}
    lines = {
        "versions": packages,
        **{name: found[name] for name in ("python", "platform", "processor", "cores", "threads", "device")},
        "cache": f"{kept}, {size / 1e6:.0f} MB of decoded images",
        "extras": ", ".join(f"{name} {state}" for name, state in has.items()),
    }
    for name, value in lines.items():
        _print(Console(), f"{name:10}{value}")


@cli.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), help="The .safetensors file to write.")
@click.option("--hub-folder", type=click.Path(path_type=Path), help="New folder for weights, settings and model card.")
def export(folder: Path, to: Path | None, hub_folder: Path | None) -> None:
    """Write the refined global model of a run."""
    if (target := to or hub_folder) is None or (to and hub_folder):
        raise InputError("export needs either --to FILE.safetensors or --hub-folder DIR")
    from fedftg import export as files

    written = files.write_model(folder, target) if to else files.write_hub_folder(folder, target)
    _print(Console(), f"model after round {written}: {target}")


@cli.group()
def flower() -> None:
    """FedFTG on real machines, by Flower."""


@flower.command(name="new")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--recipe", help="A file or a name. Default: FedAvg + FedFTG on built-in data.")
@_set
def flower_new(folder: Path, recipe: str | None, overrides: Sequence[str]) -> None:
    """Write a Flower app for a recipe into a new folder."""
    if importlib.util.find_spec("flwr") is None:
        raise InputError("Flower is not installed; pip install 'fedftg[flower]'")
    from fedftg.flower import project

    console = Console()
    for path in project.new(folder, recipe, overrides):
        _print(console, f"wrote {path}")
    _print(console, f"next: cd {folder}, and see its README.md")


def main() -> None:
    """Runs the command line; every foreseeable error is one line on standard error."""
    # What schedulers and closed terminals send ends a run as Ctrl-C does.
    for name in ("SIGTERM", "SIGHUP"):
        # nohup has SIGHUP ignored.
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        cli(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "fedftg")
        _fail(f"{error.format_message().rstrip('.')}; see '{command} --help'", 2)
    except InputError as error:
        _fail(str(error), 2)
    except ClientError as error:
        _fail(f"{error}; the run can be resumed from its last checkpoint by --resume", 1)
    except (KeyboardInterrupt, click.Abort):
        _fail(f"interrupted; run the same command{' with --resume' if 'run' in sys.argv[1:2] else ' again'}", 130)


def listing() -> dict[str, dict[str, str]]:
    """Returns every name that a recipe or command may use, by kind, with one line about it; imports no torch."""
    from fedftg.algorithms.registry import ALGORITHMS, REFINERS
    from fedftg.data.partition import LAWS
    from fedftg.data.sources import SOURCES
    from fedftg.distill.config import ABOUT
    from fedftg.models.registry import MODELS
    from fedftg.registry import summary

    return {
        "data": {name: SOURCES[name].about for name in sorted(SOURCES)},
        "laws": {name: summary(law.__doc__) for name, law in LAWS.items()},
        "models": {name: MODELS.about(name) for name in sorted(MODELS)} | {"package.module.Class": "any nn.Module"},
        "algorithms": {name: ALGORITHMS.about(name) for name in ALGORITHMS},
        "refiners": {name: REFINERS.about(name) for name in REFINERS},
        "presets": ABOUT,
        "recipes": {name: recipes.about(name) for name in recipes.names()},
    }


def write_partition(console: Console, config: RunConfig, out: Path | None) -> None:
    """Partitions the data as a run would; prints a table and writes a heatmap and the partition itself.

    Raises:
        InputError: an impossible partition, or ``out`` holds another one.
    """
    from fedftg.data import sources
    from fedftg.data.federated import partition_dataset
    from fedftg.data.partition import class_counts, describe, needed_columns, skew, to_json
    from fedftg.report import plots, table

    law = config.partition
    progress = _progress(console)
    try:
        dataset = sources.load(config.data, columns=needed_columns(law), progress=progress.loading)
    finally:
        progress.finish()
    labels = dataset.train_labels.numpy()
    parts, _, tests = partition_dataset(dataset, law, config.seed)
    held_back = [len(test) for test in tests] if law.test_share > 0 else None
    counts, names = class_counts(parts, labels, dataset.num_classes), list(dataset.class_names)
    dumped = config.model_dump(mode="json", exclude_none=True)
    about = {key: dumped[key] for key in ("data", "partition", "seed")}
    optional = {"held_back": held_back, "converted": dict(dataset.converted) or None}
    about |= {key: value for key, value in optional.items() if value is not None}
    text = to_json(parts, labels, law=law.law, class_names=names, about=about)
    # Never over another partition, which a run may be using.
    file, number = (out or RUNS / "partitions" / config.name) / "partition.json", 1
    while file.exists() and file.read_text("utf-8") != text:
        if out is not None:
            raise InputError(f"{out} holds another partition already; choose another folder by --out")
        number += 1
        file = RUNS / "partitions" / f"{config.name}-{number}" / "partition.json"
    _write(file, text)
    title = f"{config.data.name}, {describe(law)}, seed {config.seed}"
    _print(console, title)
    console.print(table.partition_table(counts.tolist(), names, skew(counts), held_back))
    for note in dataset.notes:
        _print(console, note)
    _print(
        console, f"heatmap: {plots.partition_heatmap(counts.tolist(), names, file.with_name('partition.png'), title)}"
    )
    _print(console, f"partition: {file}")


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--seeds must be whole numbers by comma, got {text!r}; for example --seeds 0,1,2")
    return list(dict.fromkeys(map(int, parts)))


def _to_compare(
    console: Console, files: dict[str, Path], overrides: Sequence[str], seeds: Sequence[int], jobs: int
) -> dict[Key, RunConfig]:
    """Returns the config of each recipe with each choice of overrides and seeds, by recipe and end of name."""
    from fedftg import config as configs
    from fedftg import loop

    bases = {item for item, path in files.items() if configs.load(path).refiner.name == "none"}
    if bases == set(files) and any(re.match(r"\s*refiner(\.name)?\s*=", override) for override in overrides):
        bases = set()
    others = [override for override in overrides if not re.match(r"\s*refiner\s*[.=]", override)]
    choices = {
        (item, end): chosen
        for item in files
        for end, chosen in configs.sweep(others if item in bases else overrides, seeds)
    }
    keys: dict[Key, set[str]] = {}
    for label, chosen in choices.items():
        name = [override for override in chosen if re.match(r"\s*(refiner\.name|plugins)\s*=", override)]
        keys[label] = {"", *type(configs.load(files[label[0]], name).refiner).model_fields}
    left_out: dict[str, list[str]] = {}
    made: dict[Key, RunConfig] = {}
    for (item, end), chosen in choices.items():
        # A setting that the refiner of another run has is for that one; of a key that none has, load says so.
        foreign = set().union(*keys.values()) - keys[item, end]
        config = configs.load(files[item], [override for override in chosen if _refiner_key(override) not in foreign])
        for key in foreign & {*map(_refiner_key, chosen)}:
            left_out.setdefault(f"refiner.{key}", []).append(config.name + end)
        changed: dict[str, object] = {"name": config.name + end}
        if jobs > 1:
            changed |= {"threads": 1, "executor": config.executor.model_copy(update={"name": "sequential"})}
        if (item, end) in made or (jobs > 1 and any(one.name == changed["name"] for one in made.values())):
            raise InputError(f"two runs would be named {changed['name']}; give recipes and values different names")
        made[item, end] = config.model_copy(update=changed)
    if bases and bases != set(files) and len(others) < len(overrides):
        _print(console, f"--set refiner.* is not applied to {', '.join(sorted(bases))}, which has no refiner")
    for key, runs in left_out.items():
        _print(console, f"--set {key} is not applied to {', '.join(runs)}, whose refiner has no such setting")
    for one, other in itertools.combinations(made, 2):
        if loop.same_run(made[one], made[other]):
            names = f"{''.join(one)} and {''.join(other)}"
            raise InputError(f"{names} are the same run with these settings, rounds aside; compare different ones")
    return made


def _refiner_key(override: str) -> str:
    """Returns the field of a ``refiner.FIELD=`` override, or an empty string."""
    found = re.match(r"\s*refiner\.(\w+)", override)
    return found[1] if found else ""


def _finished(config: RunConfig, out: Path) -> Path | None:
    """Returns the folder of a config's finished run, the newest one."""
    from fedftg import loop
    from fedftg.report.load import load_run

    folder = loop.newest(config, out)
    return folder if folder and (load_run(folder).summary or {}).get("rounds") == config.rounds else None


def _run(console: Console, configs: dict[Key, RunConfig], out: Path, jobs: int) -> dict[Key, Path]:
    """Runs all, ``jobs`` at a time; returns their folders."""
    if jobs == 1 or not configs:
        return {label: run_or_resume(config, out, _progress(console)) for label, config in configs.items()}
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    _print(console, f"{len(configs)} runs to do, {jobs} at a time")
    folders = {}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        started = {pool.submit(run_or_resume, config, out): label for label, config in configs.items()}
        try:
            for number, future in enumerate(as_completed(started), start=1):
                label = started[future]
                folders[label] = future.result()
                _print(console, f"{number}/{len(configs)} {configs[label].name}")
        except BaseException:
            for child in multiprocessing.active_children():  # what they did up to their last checkpoint is kept
                child.kill()
            raise
    return folders


def run_or_resume(config: RunConfig, out: Path, progress: Progress | None = None) -> Path:
    """Resumes a config's newest unfinished run, or runs it anew; returns its folder."""
    from fedftg import loop
    from fedftg.engine.machine import keep_freed_memory

    keep_freed_memory()
    folder = loop.newest(config, out)
    resume = folder is not None
    return loop.run(config, out=folder or loop.unused(out, config.name), resume=resume, progress=progress).folder


def _report(
    console: Console, folders: Sequence[Path], out: Path, form: str, columns: Sequence[str], page: bool = False
) -> list[RunRecord]:
    """Prints a table of runs and writes it, with all columns, a plot and maybe a page to ``out``; returns the runs."""
    from fedftg.report import plots, table
    from fedftg.report.load import load_run

    runs = [load_run(folder) for folder in folders]
    made = {"markdown": table.markdown_table, "latex": table.latex_table, "csv": table.csv_table}
    if form == "text":
        console.print(table.terminal_table(runs, columns))
    else:
        click.echo(made[form](runs, columns), nl=False)
    for name, end in (("markdown", "md"), ("latex", "tex"), ("csv", "csv")):
        _write(out / f"table.{end}", made[name](runs))
    _print(console, f"table: {out / 'table.md'} (also .tex and .csv)")
    for end in ("pdf", "svg", "png"):
        plot = plots.accuracy_plot(runs, out / f"accuracy.{end}")
    _print(console, f"plot: {plot} (also .pdf and .svg)")
    if page:
        from fedftg.report.page import html_page

        _write(out / "report.html", html_page(runs))
        _print(console, f"page: {out / 'report.html'}")
    return runs


def _progress(console: Console) -> Progress:
    from fedftg import progress

    return progress.for_console(console)


def _write(file: Path, text: str) -> None:
    from fedftg.rundir import records

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        records.write_atomically(file, text.encode())
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}; choose another folder by --out") from None


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def _fail(message: str, status: int) -> None:
    click.echo(f"fedftg: {' '.join(message.split())}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
