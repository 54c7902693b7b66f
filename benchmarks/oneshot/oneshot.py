"""Measures one-shot federated learning: every method refines the same trained clients of one round.

    python benchmarks/oneshot/oneshot.py --data-root FOLDER [--data cifar10] [--alphas 0.1,0.3] [--seeds 10] [--jobs 2]

A method on a federation is a line of ``benchmarks/results/oneshot.jsonl``, of which the tables and the figure of
docs/oneshot.md are made; ``--minutes 0`` only makes these. An interrupted run is resumed method by method by the same
call, which trains the clients again. One thread a run on the CPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent / "deployed"))

from deployed import commit
from methods import BESIDE, METHODS, OF_DATA, PROTOCOL, PROXY, Cell
from pages import DRY, RESULTS, load, tables, write_figure, write_page

from fedftg import config as configs
from fedftg.algorithms.base import (
    ClientResult,
    Metrics,
    NoRefiner,
    Refiner,
    RefinerContext,
    ServerState,
)
from fedftg.build import build
from fedftg.engine.evaluate import evaluate, evaluate_ensemble
from fedftg.engine.machine import cpu_threads, environment, peak_memory_mb
from fedftg.experiment import Experiment
from fedftg.progress import Progress
from fedftg.rundir import records
from fedftg.seeds import SERVER, torch_rng


@dataclass
class Measured(NoRefiner):
    """Leaves the average as it is, and hands on the accuracy of what each method makes of it."""

    experiment: Experiment
    refiners: dict[str, Refiner]
    keep: Callable[[str, float, float | None], None]
    """Called with row, test accuracy and seconds."""

    def refine(
        self,
        state: ServerState,
        results: Sequence[ClientResult],
        rng: torch.Generator,
    ) -> tuple[ServerState, Metrics]:
        """Gives each method the state and the random numbers that it has in a run of its own."""
        one, seed = self.experiment, self.experiment.config.seed
        beside = evaluate_ensemble((one.model,), results, one.data, 500)
        for name, kind in BESIDE.items():
            self.keep(name, beside[kind][0], None)
        for name, refiner in self.refiners.items():
            own = replace(state, refiner=refiner.init(state.params, torch_rng(seed, 0, SERVER, "refiner")))
            own = replace(own, refiner=refiner.observe(own, results))
            start = time.perf_counter()
            refined = refiner.refine(own, results, torch_rng(seed, 1, SERVER, "refine"))[0]
            seconds = time.perf_counter() - start
            self.keep(name, evaluate(one.model, {name: refined.model}, one.data, 500)[name][0], seconds)
        return state, {}


def missing_rows(cell: Cell, names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the settings of the rows that are not measured yet, or with others."""
    where = (cell.data, cell.alpha, cell.seed)
    lines = load(DRY if cell.dry else RESULTS)
    kept = {line["method"]: line["settings"] for line in lines if (line["data"], line["alpha"], line["seed"]) == where}
    of = {name: cell.settings + (cell.method(name) if name in METHODS else []) for name in names}
    return {name: settings for name, settings in of.items() if kept.get(name) != settings}


def run(cell: Cell, names: Sequence[str], root: Path | None) -> None:
    """Trains the clients of a federation and measures every row that is missing."""
    wanted = missing_rows(cell, names)
    if not wanted:
        return
    places = [f"data.root={root / cell.data}"] if root and cell.data in PROXY else []
    proxy = [f"refiner.proxy.root={root / 'cifar100-part'}"] if places else []
    config = configs.load(PROTOCOL, [*cell.settings, *places])
    with cpu_threads(config.threads) as threads:
        experiment = build(config)
        data = experiment.data
        context = RefinerContext(
            experiment.model, data.num_classes, data.image_shape, data.device, data.dataset.mean, data.dataset.std,
            unlabelled=data.unlabelled_images,
        )  # fmt: skip
        refiners = {
            name: configs.load(PROTOCOL, [*settings, *(proxy if name == "FedDF" else [])]).refiner.build(context)
            for name, settings in wanted.items() if name in METHODS
        }  # fmt: skip
        session = environment(threads, str(data.device))
        start, local = time.perf_counter(), 0.0

        def keep(name: str, accuracy: float, seconds: float | None) -> None:
            nonlocal local
            local = local or time.perf_counter() - start  # called first when the clients are trained
            print(f"{cell.data} {cell.alpha} {cell.seed} {name}: {accuracy:.4f}, {seconds or 0:.0f} s", flush=True)
            if name not in wanted:
                return
            records.append(DRY if cell.dry else RESULTS, {
                "data": cell.data, "alpha": cell.alpha, "seed": cell.seed, "method": name, "accuracy": accuracy,
                "seconds": seconds and round(seconds, 2), "local_seconds": round(local, 2),
                "peak_memory_mb": peak_memory_mb(), "settings": wanted[name], "commit": commit(),
                "machine": {k: session[k] for k in ("device", "processor", "cores", "threads", "packages")},
            })  # fmt: skip

        experiment.refiner = Measured(experiment, refiners, keep)
        experiment.run_round(Progress())


def main() -> None:
    """Measures what is missing, then makes the tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="holds cifar10 and cifar100-part; without it the hub is asked")
    parser.add_argument("--data", default=",".join(OF_DATA))
    parser.add_argument("--alphas", default="0.1,0.3,0.5")
    parser.add_argument("--seeds", default="10,11,12")
    parser.add_argument("--methods", default=",".join(METHODS), help="rows, by comma")
    parser.add_argument("--jobs", type=int, default=2, help="federations at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start none after this many minutes")
    parser.add_argument("--dry", action="store_true", help="few epochs and iterations; no result is kept")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.methods.split(",")
    for got, known in ((names, METHODS), (given.data.split(","), OF_DATA)):
        if unknown := set(got) - set(known):
            parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    rows = [*BESIDE, *names]
    until = time.monotonic() + 60 * given.minutes
    parts = given.data.split(","), given.alphas.split(","), given.seeds.split(",")
    cells = [Cell(data, float(alpha), int(seed), given.dry) for seed, data, alpha in product(parts[2], *parts[:2])]
    if given.one:
        run(cells[0], rows, given.data_root)
        return
    DRY.parent.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if missing_rows(cell, rows)]
    print(f"{len(cells)} federations, {len(missing)} of them to do", flush=True)

    def work(cell: Cell) -> int:
        if time.monotonic() > until:
            return 0
        options = ["--one", f"--methods={given.methods}", f"--data={cell.data}", f"--alphas={cell.alpha}"]
        options += [f"--seeds={cell.seed}", *(["--dry"] if cell.dry else [])]
        options += [f"--data-root={given.data_root}"] if given.data_root else []
        return subprocess.run([sys.executable, __file__, *options], check=False).returncode

    with ThreadPoolExecutor(given.jobs) as pool:
        failed = sum(map(bool, pool.map(work, missing)))
    if given.dry:
        print(tables(load(DRY), parts[0][0]))
    else:
        write_page()
        write_figure()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
