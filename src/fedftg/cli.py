"""The command line: parse, call one function, print, exit status. 0 done; 2 wrong input; 130 interrupted, resumable."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import click
from rich.console import Console

from fedftg import __version__, commands, progress
from fedftg.engine.machine import keep_freed_memory
from fedftg.errors import ClientError, InputError
from fedftg.report import table

_set = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fedftg")
def cli() -> None:
    """Data-free fine-tuning of the global model in federated learning (FedFTG)."""


@cli.command()
@click.argument("recipe", required=False)
@_set
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. Default: runs/NAME.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
def run(recipe: str | None, overrides: Sequence[str], out: Path | None, resume: bool) -> None:
    """Run one experiment; RECIPE is a file or a name (default: FedAvg + FedFTG on built-in data)."""
    console = _console()
    keep_freed_memory()
    done = commands.run(recipe, overrides=overrides, out=out, resume=resume, progress=progress.for_console(console))
    _show(console, commands.report(done.folder))
    _say(console, f"run folder: {done.folder}")


@cli.command()
@click.argument("items", nargs=-1, required=True, metavar="RECIPE|RUN...")
@_set
@click.option("--out", type=click.Path(path_type=Path), default=commands.RUNS, help="Folder of run folders.")
def compare(items: Sequence[str], overrides: Sequence[str], out: Path) -> None:
    """Run what is missing; one table and one plot of all."""
    console = _console()
    keep_freed_memory()
    written = commands.compare(items, overrides, out, progress.for_console(console))
    _show(console, written)
    for record in written.runs:
        _say(console, f"run folder: {record.folder}")


@cli.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Table and plot of a run."""
    _show(_console(), commands.report(folder))


@cli.command()
@click.argument("recipe", required=False)
@_set
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the files. Default: runs/partitions/NAME.")
def partition(recipe: str | None, overrides: Sequence[str], out: Path | None) -> None:
    """Table and heatmap of who holds what; nothing is trained."""
    console = _console()
    found = commands.partition(recipe, overrides, out, progress.for_console(console))
    _say(console, found.title)
    console.print(
        table.partition_table(found.class_counts, found.class_names, found.skew, found.held_back, found.groups)
    )
    if found.converted:
        modes = ", ".join(f"{count} {mode}" for mode, count in found.converted.items())
        _say(console, f"images that were not RGB and were converted: {modes}")
    _say(console, f"heatmap: {found.plot}")
    _say(console, f"sizes: {found.sizes}")
    _say(console, f"division: {found.data}")


@cli.command(name="list")
def list_names() -> None:
    """Every data set, partition law, model, algorithm, refiner, preset and recipe."""
    console = _console()
    for kind, names in commands.listing().items():
        console.print(f"[bold]{kind}[/bold]", highlight=False)
        for name in names:
            _say(console, f"  {name}")


@cli.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), required=True, help="The .safetensors file to write.")
def export(folder: Path, to: Path) -> None:
    """Write the refined global model of a run."""
    number = commands.export(folder, to)
    _say(_console(), f"model after round {number}: {to}")


@cli.group()
def flower() -> None:
    """FedFTG on real machines, by Flower."""


@flower.command(name="new")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--recipe", help="A file or a name. Default: FedAvg + FedFTG on built-in data.")
@_set
def flower_new(folder: Path, recipe: str | None, overrides: Sequence[str]) -> None:
    """Write a Flower app for a recipe into a new folder."""
    console = _console()
    for path in _flower_project().new(folder, recipe, overrides):
        _say(console, f"wrote {path}")
    _say(console, f"next: cd {folder}, and see its README.md")


def main() -> None:
    """The entry point; every foreseeable error is one line on standard error."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(0)
    except click.ClickException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "fedftg")
        _fail(f"{error.format_message().rstrip('.')}; see '{command} --help'", 2)
    except InputError as error:
        _fail(str(error), 2)
    except ClientError as error:
        _fail(f"{error}; the run can go on from its last checkpoint by --resume", 1)
    except (KeyboardInterrupt, click.Abort):
        resumes = ", with --resume once its folder is there" if "run" in sys.argv[1:2] else ""
        _fail(f"interrupted; go on by the same command{resumes}", 130)


def _flower_project() -> ModuleType:
    """An app is of use only where Flower is, which is an extra; no other command needs it."""
    if importlib.util.find_spec("flwr") is None:
        raise InputError("Flower is not installed; pip install 'fedftg[flower]'")
    return importlib.import_module("fedftg.flower.project")


def _console() -> Console:
    return Console()


def _show(console: Console, written: commands.Report) -> None:
    console.print(table.terminal_table(written.runs))
    _say(console, f"table: {written.table}")
    _say(console, f"plot: {written.plot}")


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def _fail(message: str, status: int) -> None:
    click.echo(f"fedftg: {' '.join(message.split())}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
