"""Measures what can be deployed: every free variant on one base trajectory, and the default preset on its own.

    python benchmarks/deployed/deployed.py --data-root FOLDER [--cells fedavg-b0.1,digits] [--seeds 10,11] [--jobs 2]
    python benchmarks/deployed/deployed.py --paper --data-root FOLDER --minutes 9     (one GPU; call again to go on)

A finished run is a line of ``benchmarks/results/deployed.jsonl``, of which the tables in ``deployed.md`` are made;
``--minutes 0`` only makes the tables. An interrupted run is resumed by the same call. One thread a run on the CPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from _thread import interrupt_main
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from cells import CELLS, DRY, PAPER, Cell
from figure import write_figure
from tables import RESULTS, load, write_page
from torch import Tensor

from fedftg import config as configs
from fedftg import recipes
from fedftg.algorithms.base import ClientResult, Memory, Metrics, NoRefiner, Refiner, RefinerContext, ServerState
from fedftg.algorithms.registry import REFINERS
from fedftg.build import build
from fedftg.experiment import Experiment
from fedftg.loop import execute
from fedftg.params import Params, prefixed, unprefixed
from fedftg.progress import Progress
from fedftg.rundir import records

RUNS = Path("runs") / "deployed"

VARIANTS: dict[str, dict[str, Any]] = {
    "aggregate": {"name": "none"},
    "ema": {"name": "ema", "ema_decay": 0.8},
    "wima": {"name": "wima", "window": 8},
    "all": {"name": "all"},
    "head_prior": {"name": "head_prior", "prior_tau": 0.75},
    "all + prior": {"name": "all", "prior_tau": 0.75},
}
"""What is deployed at each evaluation, by the name of its column."""
_NARROW = {"generator_width": 16}
RIVALS: dict[str, dict[str, Any]] = {
    "aggregate": VARIANTS["aggregate"],
    "all": VARIANTS["all"],
    "all + prior": VARIANTS["all + prior"],
    "FedDF": {"name": "feddf", "iterations": 125},
    "DAFL": {"name": "dafl", "iterations": 75, **_NARROW},
    "ADI": {"name": "adi", "iterations": 5},
    "DENSE": {"name": "dense", "iterations": 12, **_NARROW},
    "Co-Boosting": {"name": "coboosting", "iterations": 12, **_NARROW},
    "DFRD": {"name": "dfrd", "iterations": 75, **_NARROW},
    "leaves": {"name": "leaves", "iterations": 50},
}
"""Instead, in the cell of the rivals: each distils once, from the base's clients of that round, with a quarter of the
iterations that it has in one-shot learning."""

TAIL = 10.0
"""How many times rarer the last class of the imbalanced test set is than the first."""


@dataclass
class Measured(NoRefiner):
    """Leaves the model as it is, and returns the test accuracy of each variant as metrics."""

    experiment: Experiment
    evaluations: Sequence[int]
    ceilings: Sequence[int]
    """Rounds after which the clients' last uploads are evaluated as an ensemble."""
    own: Refiner
    """That of the cell. Where it does more than nothing it alone is measured, as ``fedftg``: deployed and sent."""
    variants: dict[str, dict[str, Any]]
    refiners: dict[str, Refiner] = field(default_factory=dict)
    reads_previous = True

    def __post_init__(self) -> None:
        if type(self.own) is not NoRefiner:
            return
        data = self.experiment.data
        shape, normalisation = (data.num_classes, data.image_shape), (data.dataset.mean, data.dataset.std)
        context = RefinerContext(self.experiment.model, *shape, data.device, *normalisation)
        for name, settings in self.variants.items():
            self.refiners[name] = configs.parse(REFINERS[settings["name"]], settings).build(context)

    def init(self, params: Params, rng: torch.Generator) -> Memory:
        """Returns the memory of the cell's refiner."""
        return self.own.init(params, rng)

    def observe(self, state: ServerState, results: Sequence[ClientResult]) -> Memory:
        """Lets each variant observe the round."""
        if not self.refiners:
            return self.own.observe(state, results)
        memory: Memory = {}
        for name, refiner in self.refiners.items():
            own = replace(state, refiner=unprefixed(state.refiner, name + "/"))
            memory |= prefixed(refiner.observe(own, results), name + "/")
        return memory

    def refine(
        self, state: ServerState, results: Sequence[ClientResult], rng: torch.Generator
    ) -> tuple[ServerState, Metrics]:
        """Evaluates each variant where it is due."""
        number, metrics = state.round + 1, {}
        if not self.refiners:
            state, metrics = self.own.refine(state, results, rng)
            if number in self.evaluations:
                metrics |= self._accuracies("fedftg", self._logits(*state.model))
                metrics |= self._accuracies("sent", self._logits(state.params, state.buffers))
            return state, metrics
        if number in self.evaluations:
            for name, refiner in self.refiners.items():
                drawn = torch.Generator().manual_seed(number)  # whatever the rows before it drew
                memory = unprefixed(state.refiner, name + "/") or refiner.init(state.params, drawn)
                own = replace(state, refiner=memory)
                params, buffers = refiner.refine(own, results, drawn)[0].model
                metrics |= self._accuracies(name, self._logits(params, buffers))
        if number in self.ceilings:
            metrics |= self._ceilings(state, results)
        return state, metrics

    def _logits(self, params: Params, buffers: Params) -> Tensor:
        with torch.no_grad():
            batches = self.experiment.data.test_batches(500)
            return torch.cat([self.experiment.model(params, buffers, images, train=False) for images, _ in batches])

    def _accuracies(self, name: str, logits: Tensor) -> Metrics:
        data = self.experiment.data
        labels = torch.cat([labels for _, labels in data.test_batches(500)])
        right = (logits.argmax(dim=1) == labels).double()
        recall = torch.stack([right[labels == c].mean() for c in range(data.num_classes)])
        share = TAIL ** -torch.linspace(0, 1, data.num_classes, dtype=torch.float64).to(recall)
        return {name: float(right.mean()), f"{name}, imbalanced": float(share @ recall / share.sum())}

    def _ceilings(self, state: ServerState, results: Sequence[ClientResult]) -> Metrics:
        """Returns the accuracy of the ensemble of all last uploads, by softmax and by prior-corrected logits."""
        data, sums = self.experiment.data, {"ensemble": 0.0, "ensemble + prior": 0.0}
        new = {result.client: {**result.params, **result.buffers} for result in results}
        for client in range(data.num_clients):
            upload = new.get(client) or self.experiment.clients.upload(client)
            values = {name: tensor.to(data.device) for name, tensor in upload.items()}
            logits = self._logits(*({name: values[name] for name in of} for of in (state.params, state.buffers)))
            counts = data.class_counts[client].double().to(logits.device)
            prior = ((counts + 0.5) / (counts + 0.5).sum()).log()
            sums["ensemble"] += counts.sum() * logits.softmax(dim=1)
            sums["ensemble + prior"] += counts.sum() * (logits - 0.5 * prior)
        return {key: value for name, each in sums.items() for key, value in self._accuracies(name, each).items()}


def main() -> None:
    """Runs what is missing, then makes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="folder that holds cifar10, ...; without it the hub is asked")
    parser.add_argument("--cells", default="", help="of cells.py, by comma; the start of names takes all that have it")
    parser.add_argument("--seeds", default="10,11,12,13,14")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this many minutes")
    parser.add_argument("--paper", action="store_true", help="the paper's protocol instead, in this process")
    parser.add_argument("--rounds", type=int, help="for a trial: fewer rounds, and no result is kept")
    parser.add_argument("--dry", action="store_true", help="with --paper, on the CPU: few rounds, clients and images")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    wanted = PAPER if given.paper else CELLS
    cells = [c for c in wanted.values() if c.name.startswith(tuple(given.cells.split(",")))]
    jobs = [(cell, int(seed)) for seed in ("0" if given.paper else given.seeds).split(",") for cell in cells]
    done = {(line["cell"], line["seed"]) for line in load()}
    trial = given.rounds or given.dry
    missing = [job for job in jobs if trial or (job[0].name, job[1]) not in done]
    if given.one or given.paper:
        for cell, seed in missing:
            run(cell, seed, given.data_root, given.rounds, until, DRY if given.dry else ())
    else:
        print(f"{len(jobs)} runs, {len(missing)} of them to do", flush=True)

        def work(job: tuple[Cell, int]) -> None:
            if time.monotonic() < until:
                options = ["--cells", job[0].name, "--seeds", str(job[1]), "--one"]
                options += [f"--data-root={given.data_root}"] if given.data_root else []
                options += [f"--rounds={given.rounds}"] if given.rounds else []
                subprocess.run([sys.executable, __file__, *options], check=False)

        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(work, missing))
    if not given.one and not trial:
        write_page()
        write_figure()


def run(
    cell: Cell, seed: int, data_root: Path | None, rounds: int | None, until: float, dry: Sequence[str] = ()
) -> None:
    """Runs one cell to its end, or until the time is up, and keeps the result of a whole run."""
    settings = [*cell.settings, *dry, f"seed={seed}", f"name={cell.name}"]
    settings += [f"data.root={data_root / cell.folder}"] if data_root and cell.folder else []
    settings += [f"rounds={rounds}"] if rounds else []
    if data_root and "refiner.name=feddf" in cell.settings:
        settings += [f"refiner.proxy.root={data_root / 'cifar100-part'}"]
    config = configs.load(recipes.find(cell.recipe), settings)
    config = configs.from_mapping(configs.apply(config.model_dump(mode="json", exclude_none=True), [
        f"evaluation.every={config.rounds}", "evaluation.track_all=true",
    ]))  # fmt: skip
    folder = RUNS / (f"trial-{rounds or dry[0]}" if rounds or dry else "whole") / cell.name / f"seed{seed}"
    variants = VARIANTS
    if cell.rivals:
        proxy = {"name": "cifar100"} | ({"root": data_root / "cifar100-part"} if data_root else {})
        variants = RIVALS | {"FedDF": {**RIVALS["FedDF"], "proxy": proxy}}
    timer = Timer(max(until - time.monotonic(), 0.1), interrupt_main) if until < float("inf") else None

    def prepare() -> Experiment:
        experiment = build(config, progress=progress)
        evaluations = cell.evaluations(config.rounds)
        experiment.refiner = Measured(experiment, evaluations, evaluations[-1:], experiment.refiner, variants)
        return experiment

    progress = Progress()
    if timer:
        timer.start()
    start = time.monotonic()
    try:
        execute(config, folder, prepare, resume=folder.exists(), progress=progress)
    except KeyboardInterrupt:
        print(f"{cell.name}: stopped in time; the same call goes on", flush=True)
        return
    finally:
        if timer:
            timer.cancel()
    rows = records.read(folder / "rounds.jsonl")
    names = [*variants, "fedftg"]
    measured = [row for row in rows if any(name in row["refine"] for name in names)]
    session = records.read_json(folder / "environment.json")["sessions"][-1]
    result = {
        "cell": cell.name,
        "seed": seed,
        "settings": settings[: len(cell.settings)],
        "variants": RIVALS if cell.rivals else VARIANTS,
        "machine": {name: session.get(name) for name in ("device", "processor", "cores", "threads", "packages")},
        "commit": commit(),
        "rounds": [row["round"] for row in measured],
        "accuracy": {
            name: [row["refine"].get(name) for row in measured]
            for name in measured[-1]["refine"]
            if name.removesuffix(", imbalanced") in (*names, "sent", "ensemble", "ensemble + prior")
        },
        "seconds": {phase: round(sum(row["seconds"][phase] for row in rows), 1) for phase in rows[0]["seconds"]},
    }
    print(f"{cell.name} seed {seed}: {time.monotonic() - start:.0f} s", flush=True)
    if not (rounds or dry):
        records.append(RESULTS, result)


def commit() -> str:
    """Returns the short hash of what is checked out, and whether src/ differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../../src"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


if __name__ == "__main__":
    main()
