"""Runs the cells of the accuracy tables, and writes the tables: one command, which goes on where it was stopped.

    python benchmarks/accuracy/accuracy.py --data-root FOLDER [--tables A,B,S,C] [--seeds 0,1,2] [--jobs 2]

Runs lie in ``runs/accuracy`` and are resumed after an interruption; of each finished one a small file is kept in
``benchmarks/results/accuracy``, from which the tables are made. A cell whose file is there and was made with the same
settings is not run again; what lies in ``runs`` of other code is not taken up. One thread a run; ``--jobs`` runs are
side by side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cells import PROTOCOL, SEEDS, TABLES, Cell, fingerprint, fits, settings
from figures import write_figures
from tables import PAGE, fill_page, read, write_tables

import fedftg

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "accuracy"
RUNS = Path("runs") / "accuracy"


def main() -> None:
    """Runs what is missing, then writes the tables of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="CIFAR-10 as parquet; without it, it comes from the hub")
    parser.add_argument("--tables", type=_tables, default="A,B,S,C", help=f"of {','.join(TABLES)}")
    parser.add_argument("--seeds", type=_seeds, default=",".join(map(str, SEEDS)))
    parser.add_argument("--jobs", type=_positive, default=2, help="runs side by side, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    parser.add_argument("--only", default="", help="only cells whose names contain this")
    parser.add_argument("--rounds", type=_positive, help="for a trial: fewer rounds, and no result is kept")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    cells = {cell.name: cell for name in arguments.tables for cell in TABLES[name].cells}
    jobs = [(cell, seed) for seed in arguments.seeds for cell in cells.values() if arguments.only in cell.name]
    if not jobs:
        parser.error(f"no cell of tables {','.join(arguments.tables)} has {arguments.only!r} in its name")
    missing = [(cell, seed) for cell, seed in jobs if arguments.rounds or not is_there(cell, seed)]
    print(f"{len(jobs)} runs, {len(missing)} of them to do", flush=True)

    def work(job: tuple[Cell, int]) -> bool:
        if time.monotonic() > until:
            return True
        try:
            return run(*job, arguments.data_root, arguments.rounds)
        except (OSError, ValueError, KeyError) as error:  # one run's files must not stop the others
            print(f"FAILED {job[0].name} seed {job[1]}: {error!r}", flush=True)
            return False

    with ThreadPoolExecutor(arguments.jobs) as pool:
        went_well = list(pool.map(work, missing))
    if not arguments.rounds:
        write_tables(RESULTS)
        write_figures(RESULTS)
        PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
    sys.exit(0 if all(went_well) else 1)


def _tables(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in TABLES:
            raise argparse.ArgumentTypeError(f"no table {name!r}; there are {', '.join(TABLES)}, such as A,B")
    return names


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; give whole numbers with commas, such as 0,1,2") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number from 1 on")
    return int(text)


def result_file(cell: Cell, seed: int) -> Path:
    """Where the result of a run is kept."""
    return RESULTS / cell.name / f"seed{seed}.json"


def is_there(cell: Cell, seed: int) -> bool:
    """Whether the result is there, whole, and of these settings."""
    result = read(result_file(cell, seed))
    return result is not None and fits(result["made_with"], cell)


def run(cell: Cell, seed: int, data_root: Path | None, rounds: int | None) -> bool:
    """One run to its end, and its result kept; whether that went well, else it is told."""
    # Taken before the run: what is changed or committed meanwhile is not what was run.
    made_of = {"made_with": settings(cell), "commit": _commit(), "code": code()}
    folder = RUNS / (f"trial-{rounds}" if rounds else "whole") / fingerprint(cell) / cell.name / f"seed{seed}"
    of_code = folder.parent / f"{folder.name}.code"
    if rounds or not of_code.is_file() or of_code.read_text(encoding="utf-8") != made_of["code"]:
        shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    of_code.write_text(made_of["code"], encoding="utf-8")
    given = [*cell.settings, f"seed={seed}", f"name={cell.name}"]
    given += [f"data.root={data_root}"] if data_root else []
    given += [f"rounds={rounds}"] if rounds else []
    options = [part for setting in given for part in ("--set", setting)]
    resume = ["--resume"] if (folder / "config.toml").is_file() else []
    command = [sys.executable, "-m", "fedftg.cli", "run", str(PROTOCOL), *options, "--out", str(folder), *resume]
    start = time.monotonic()
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]  # where a cell's plugins are
    # The tables are of one thread on a CPU, also where there is a GPU.
    on_cpu = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **on_cpu, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"FAILED {cell.name} seed {seed}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return False
    result = collect(folder, cell, seed) | made_of
    accuracy = result["summary"]["accuracy"]
    told = ", ".join(f"{kind} {values['mean_last_10']:.4f}" for kind, values in accuracy.items())
    print(f"{cell.name} seed {seed}: {told}; {time.monotonic() - start:.0f} s", flush=True)
    if not rounds:
        path = result_file(cell, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
    return True


def collect(folder: Path, cell: Cell, seed: int) -> dict[str, Any]:
    """What is kept of a run: its summary, accuracies and what refining measured by round, and what it was run on."""
    session = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["sessions"][-1]
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluated = [row for row in rows if row["accuracy"]]
    kinds = list(evaluated[-1]["accuracy"])
    measured = dict.fromkeys(name for row in evaluated for name in row.get("refine", {}))
    return {
        "cell": cell.name,
        "seed": seed,
        "settings": list(cell.settings),
        "machine": {name: session[name] for name in ("processor", "cores", "threads", "packages")},
        "summary": json.loads((folder / "summary.json").read_text(encoding="utf-8")),
        "rounds": [row["round"] for row in evaluated],
        "accuracy": {kind: [row["accuracy"][kind] for row in evaluated] for kind in kinds},
        "refine": {name: [row.get("refine", {}).get(name) for row in evaluated] for name in measured},
        "rolled_back": [row["round"] for row in rows if "rolled_back" in row],
    }


def code() -> str:
    """A digest of what a run is made of: all modules of the package, and the plugin of the controls."""
    digest = hashlib.sha256()
    package = Path(fedftg.__file__).parent
    for path in [*sorted(package.rglob("*.py")), HERE / "controls.py"]:
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> str:
    """The commit, and whether the package differs from it; results and pages written meanwhile do not count."""
    git = ["git", "-C", str(HERE)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../../src", "controls.py"], capture_output=True, text=True, check=False
    )
    return commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


if __name__ == "__main__":
    main()
