"""Uses a GPU that is at hand for minutes: checks, seconds a round of each executor, then the paper's runs in pieces.

    python benchmarks/speed/gpu_session.py OUT --data-root CIFAR10 [--minutes 9] [--runs ...] [--set KEY=VALUE ...]
    python benchmarks/speed/gpu_session.py OUT --dry            (the same on a CPU: small runs, built-in data)

OUT gets checks.txt, timings.jsonl and a folder per run, whose curves are rounds.jsonl. A run that does not finish is
saved and stopped; the same call goes on with it, and repeats neither checks nor timings. FedAvg keeps no upload per
client (``all``), so that its checkpoint is one model.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import torch
from against import ROOT, command, phases
from machine import describe

from fedftg.rundir import records

ALONE = ("refiner.name=none", "evaluation.track_all=false")
RUNS: dict[str, tuple[str, ...]] = {
    "fedavg-iid": ("partition.law=iid", *ALONE),
    "fedavg-dir03": ALONE,
    "fedftg-dir03": ("refiner.preset=fedftg",),
    "paper-dir03": ("refiner.preset=paper",),
}
"""What follows ``fedftg run paper --set``, the first first."""
TIMED = ("fedavg-iid", "fedftg-dir03")
EXECUTORS: dict[str, tuple[str, ...]] = {
    "sequential": ("executor.name=sequential",),
    "cuda_graph": ("executor.name=cuda_graph",),
    "cuda_graph, group 5": ("executor.name=cuda_graph", "executor.group=5"),
}
DRY_EXECUTORS = {"sequential": EXECUTORS["sequential"], "workers": ("executor.name=workers",)}
DRY = ("device=cpu", "threads=1", "data.name=digits", "model.name=lenet_gn", "rounds=4", "local.epochs=1")


def main() -> None:
    """Does what is missing in OUT, and stops after the given minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root", type=Path, help="holds CIFAR-10's files; without it the hub is asked")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole call")
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    if not (given.dry or torch.cuda.is_available()):
        sys.exit("no GPU that torch can use; --dry does the same on a CPU")
    until = time.monotonic() + 60 * given.minutes
    device = torch.device("cpu" if given.dry else "cuda")
    common = [*([f"data.root={given.data_root}"] if given.data_root else []), *(DRY if given.dry else [])]
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "checks.txt").exists():
        tests = [sys.executable, "-m", "pytest", "-p", "no:xdist", "tests/e2e/test_gpu.py"]
        checks = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True, check=False).stdout
        (given.out / "checks.txt").write_text(f"{describe(device)}\n{checks}")
    timings = given.out / "timings.jsonl"
    timed = [(row["run"], row["executor"]) for row in records.read(timings)] if timings.exists() else []
    for name, (executor, chosen) in product(TIMED, (DRY_EXECUTORS if given.dry else EXECUTORS).items()):
        if (name, executor) not in timed and time.monotonic() < until:
            few = ["rounds=3", "evaluation.every=3", "checkpoint.every=3"]
            seconds = phases(ROOT, "paper", [*RUNS[name], *common, *few, *chosen])
            row = {"run": name, "executor": executor, "seconds": seconds}
            records.append(timings, row)
            print(row, flush=True)
    for name in given.runs.split(","):
        settings = [*RUNS[name], *([] if given.dry else ["executor.group=5", "checkpoint.every=200"]), *common]
        print(name, piece(given.out / name, [*settings, *given.set], until), flush=True)


def piece(folder: Path, settings: list[str], until: float) -> str:
    """Resumes a run until its end, or until that time, when it is saved; returns how far it is."""
    if not (folder / "summary.json").exists() and time.monotonic() < until:
        resume = ["--resume"] if (folder / "config.toml").exists() else []
        process = subprocess.Popen([*command("paper", settings, folder), *resume])
        try:
            process.wait(until - time.monotonic())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it saves what it has
            process.wait()
    rows = records.read(folder / "rounds.jsonl") if (folder / "rounds.jsonl").exists() else []
    measured = [row for row in rows if row["accuracy"]]
    return f"{len(rows)} rounds" + (f", {measured[-1]['accuracy']}" if measured else "")


if __name__ == "__main__":
    main()
