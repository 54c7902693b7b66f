"""Runs the cells of the accuracy tables and writes tables and figures; an interrupted call is resumed by the same one.

    python benchmarks/accuracy/accuracy.py --data-root FOLDER [--tables A,B,S,C] [--seeds 0,1,2] [--jobs 2]

Runs are in ``runs/accuracy``. Of each finished one a line is appended to ``benchmarks/results/accuracy.jsonl``, from
which the tables are made. A run whose line was made with the same settings is skipped, and a run folder that other
code made is started anew. One thread a run; ``--jobs`` runs at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from cells import PROTOCOL, SEEDS, TABLES, Cell, fingerprint, settings
from figures import write_figures
from tables import ACCURACY, PAGES, RESULTS, fill_page, load, write_tables

import fedftg
from fedftg.rundir import records

HERE = Path(__file__).parent
RUNS = Path("runs") / "accuracy"
_FILE = Lock()
ONE_CPU = {
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}  # fmt: skip
"""One thread on a CPU, also where there is a GPU, and AVX2 also where there is AVX-512: the kept runs' numbers."""


def main() -> None:
    """Runs what is missing, then writes the tables of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="CIFAR-10 as parquet; without it, it comes from the hub")
    parser.add_argument("--tables", default="A,B,S,C", help=f"of {','.join(TABLES)}")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this many minutes")
    parser.add_argument("--only", default="", help="only cells whose names contain this")
    parser.add_argument("--rounds", type=int, help="for a trial: fewer rounds, and no result is kept")
    arguments = parser.parse_args()
    names = arguments.tables.split(",")
    if unknown := [name for name in names if name not in TABLES]:
        parser.error(f"no table {unknown[0]!r}; there are {', '.join(TABLES)}, such as A,B")
    until = time.monotonic() + 60 * arguments.minutes
    cells = {cell.name: cell for name in names for cell in TABLES[name].cells if arguments.only in cell.name}
    if not cells:
        parser.error(f"no cell of tables {arguments.tables} has {arguments.only!r} in its name")
    jobs = [(cell, int(seed)) for seed in arguments.seeds.split(",") for cell in cells.values()]
    kept = load(ACCURACY)
    missing = [
        (cell, seed)
        for cell, seed in jobs
        if not cell.retired and (arguments.rounds or seed not in kept[cell.name])
    ]  # fmt: skip
    print(f"{len(jobs)} runs, {len(missing)} of them to do", flush=True)

    def work(job: tuple[Cell, int]) -> bool:
        return time.monotonic() > until or run(*job, arguments.data_root, arguments.rounds)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        went_well = list(pool.map(work, missing))
    if not arguments.rounds:
        kept = load(ACCURACY)
        write_tables(kept, RESULTS / "accuracy_tables.md")
        write_figures(kept)
        for page in PAGES:
            page.write_text(fill_page(page.read_text(encoding="utf-8"), kept), encoding="utf-8")
    sys.exit(0 if all(went_well) else 1)


def run(cell: Cell, seed: int, data_root: Path | None, rounds: int | None) -> bool:
    """Runs a cell with a seed to its end and keeps the result; returns whether that went well, else prints why."""
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
    environment = {**os.environ, **ONE_CPU, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"FAILED {cell.name} seed {seed}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return False
    result = collect(folder, cell, seed) | made_of
    accuracy = result["summary"]["accuracy"]
    means = ", ".join(f"{kind} {values['mean_last_10']:.4f}" for kind, values in accuracy.items())
    print(f"{cell.name} seed {seed}: {means}; {time.monotonic() - start:.0f} s", flush=True)
    if not rounds:
        with _FILE:
            records.append(ACCURACY, result)
    return True


def collect(folder: Path, cell: Cell, seed: int) -> dict[str, Any]:
    """Returns what is kept of a run: summary, accuracies and refiner metrics by round, and the machine."""
    session = records.read_json(folder / "environment.json")["sessions"][-1]
    rows = records.read(folder / "rounds.jsonl")
    evaluated = [row for row in rows if row["accuracy"]]
    kinds = list(evaluated[-1]["accuracy"])
    measured = dict.fromkeys(name for row in evaluated for name in row.get("refine", {}))
    return {
        "cell": cell.name,
        "seed": seed,
        "settings": list(cell.settings),
        "machine": {name: session[name] for name in ("processor", "cores", "threads", "packages")},
        "summary": records.read_json(folder / "summary.json"),
        "rounds": [row["round"] for row in evaluated],
        "accuracy": {kind: [row["accuracy"][kind] for row in evaluated] for kind in kinds},
        "refine": {name: [row.get("refine", {}).get(name) for row in evaluated] for name in measured},
        "rolled_back": [row["round"] for row in rows if "rolled_back" in row],
    }


def code() -> str:
    """Returns a digest of the code of a run: all modules of the package, and the plugin of the controls."""
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
