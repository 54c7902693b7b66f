"""``make bench``: one table of where the time of a round goes, and how far from the machine's limit it is.

    python benchmarks/speed/bench.py [--tables local,refine,layouts] [--steps 10] [--json FILE]

Times are noisy on a shared machine: what is compared is alternated in one run, and medians are shown. FLOP are torch's
own count (`torch.utils.flop_counter`), and the peak is a matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from machine import describe, matmul_peak
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from workload import BATCH, Refining, bare_loop, bare_loops, client_steps, images, model, round_config, step_flops

import fedftg
from fedftg.engine.machine import keep_freed_memory, peak_memory_mb, resolve_device
from fedftg.precision import MemoryFormat, Precision, has_bfloat16
from fedftg.progress import Progress

Row = dict[str, Any]


def main() -> None:
    """Measures what is asked for, shows it, and writes it where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default="round,local,refine,teachers,clients,layouts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=10, help="training steps, and teachers' passes, per measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # so that bare loops have what runs have
    bench = Bench(arguments)
    console = Console()
    console.print(describe(bench.device), highlight=False)
    for dtype in [torch.float32] + [torch.bfloat16] * has_bfloat16(bench.device):
        peak = matmul_peak(dtype, bench.device)
        console.print(f"matrix product {str(dtype).removeprefix('torch.')}: {peak / 1e9:.0f} GFLOP/s", highlight=False)
    rows = []
    for name in arguments.tables.split(","):
        for row in getattr(bench, name)():
            rows.append({"table": name, **row})
            console.print(_line(rows[-1]), highlight=False)
    console.print(_table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": describe(bench.device), "rows": rows}, indent=2) + "\n")


class Bench:
    """One method per table; each yields its rows as they are measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(resolve_device(arguments.device))
        self.steps, self.repeats, self.model = arguments.steps, arguments.repeats, arguments.model
        self.executor, self.threads = arguments.executor, arguments.threads
        if self.executor == "auto" and self.device.type == "cpu" and self.threads > 1:
            self.executor = "workers"  # as auto takes it in runs of more rounds than are timed here

    def _peak(self) -> float:
        return matmul_peak(torch.float32, self.device)

    def round(self) -> Iterator[Row]:
        """Every phase of one round of the paper's protocol, shortened to ``steps`` steps a client."""
        clients, samples = 10, BATCH * self.steps
        config, memory = self._config(local__epochs=1, refiner__iterations=2), PeakByPhase()
        _, seconds = self._run(config, clients * samples, memory)
        whole = sum(seconds.values())
        flops = step_flops(model(self.model), BATCH) * self.steps * clients
        peak = self._peak()
        for phase, taken in seconds.items():
            row: Row = {"what": phase, "seconds": taken, "share": taken / whole}
            if phase in memory.peaks:
                row |= {"memory MB": memory.peaks[phase]}
            if phase == "local":
                row |= {"samples/s": clients * samples / taken, "of peak": flops / taken / peak}
            yield row
        peaks = {"memory MB": max(memory.peaks.values())} if memory.peaks else {}
        yield {"what": "whole round", "seconds": whole, **peaks}

    def local(self) -> Iterator[Row]:
        """Local training and bare loops, alternated: one with this process's threads, and processes of one each.

        A run's second round counts: the first one starts worker processes.
        """
        module, clients = model(self.model).to(self.device), 2 * max(self.threads, 1)
        flops, peak = step_flops(model(self.model), BATCH), self._peak()
        count = clients * self.steps
        held_by = max(10, clients)
        config = self._config(
            rounds=2, local__epochs=1, refiner__name="none", partition__num_clients=held_by, cohort__size=clients
        )
        ways: dict[str, Callable[[], float]] = {
            f"bare loop, {self.threads} threads": lambda: bare_loop(module, BATCH, count, self.device)
        }
        if self.threads > 1 and self.device.type == "cpu":
            ways[f"bare loops, {self.threads} processes"] = lambda: bare_loops(
                self.model, count // self.threads, self.threads
            )
        for executor in dict.fromkeys((self.executor, "sequential")):
            chosen = config.model_copy(update={"executor": config.executor.model_copy(update={"name": executor})})
            ways[f"local training, {executor}"] = lambda chosen=chosen: self._last_round(
                chosen, held_by * BATCH * self.steps
            )
        bare_loop(module, BATCH, 2, self.device)
        times: dict[str, list[float]] = {what: [] for what in ways}
        for _ in range(self.repeats):
            for what, measure in ways.items():
                times[what].append(measure())
        medians = {what: statistics.median(taken) for what, taken in times.items()}
        best = min(taken for what, taken in medians.items() if what.startswith("bare"))
        for what, taken in medians.items():
            yield {
                "what": what, "seconds": taken, "samples/s": count * BATCH / taken,
                "of peak": flops * count / taken / peak, "ratio": best / taken,
            }  # fmt: skip

    def refine(self) -> Iterator[Row]:
        """Each preset compared with its necessary passes measured alone, alternated, with 10 teachers."""
        for preset in ("paper", "official", "fedftg"):
            yield self._refining(preset, 10)

    def teachers(self) -> Iterator[Row]:
        """The paper's preset with more and more teachers."""
        for count in (5, 10, 20, 50, 100):
            yield self._refining("paper", count)

    def clients(self) -> Iterator[Row]:
        """Rounds of a small model with 100 active of more and more clients; memory must not follow their number."""
        for count in (100, 1_000, 10_000):
            config = self._config(
                rounds=3, model__name="lenet", partition__num_clients=count, cohort__size=100, local__steps=2,
                local__batch_size=10, refiner__name="none",
            )  # fmt: skip
            summary, seconds = self._run(config, 20_000)
            yield {
                "what": f"{count} clients", "seconds": sum(seconds.values()) / 3,
                "share": seconds["aggregate"] / sum(seconds.values()), "memory MB": summary["peak_memory_mb"],
            }  # fmt: skip

    def layouts(self) -> Iterator[Row]:
        """Steps of a client and a generator, and a preset's iteration, in each layout and precision, alternated.

        ratio: float32 and contiguous over this.
        """
        for name in ("lenet_gn", "cnn", "convnet", "resnet18"):
            yield from self._layouts(f"local, {name}", client_steps(name, self.steps, self.device))
        yield from self._layouts("generator", partial(Refining("paper", 1, "lenet", self.device).generate, self.steps))
        for preset in ("paper", "official", "fedftg"):
            work = Refining(preset, 10, self.model, self.device)
            yield from self._layouts(f"{preset}, 10 teachers", partial(work.refine, 1))

    def _layouts(self, what: str, seconds: Callable[[Precision, MemoryFormat], float]) -> Iterator[Row]:
        precisions: tuple[Precision, ...] = ("float32", "bfloat16")
        formats: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")
        ways = [*product(precisions[: 1 + has_bfloat16(self.device)], formats)]
        times: dict[tuple[Precision, MemoryFormat], list[float]] = {way: [] for way in ways}
        counters = {way: FlopCounterMode(display=False) for way in ways}
        for way, counter in counters.items():  # a warm-up, too
            with counter:
                seconds(*way)
        for _ in range(self.repeats):
            for way in ways:
                times[way].append(seconds(*way))
        medians = {way: statistics.median(taken) for way, taken in times.items()}
        for way, taken in medians.items():
            flops = counters[way].get_total_flops()
            row: Row = {"what": f"{what}: {', '.join(way)}", "seconds": taken, "ratio": medians[ways[0]] / taken}
            yield row | {"of peak": flops / taken / matmul_peak(getattr(torch, way[0]), self.device)}

    def _refining(self, preset: str, teachers: int) -> Row:
        work, iterations = Refining(preset, teachers, self.model, self.device), 1
        needed, flops = work.necessary(iterations)
        work.refine(iterations)
        pairs = [(work.refine(iterations), work.necessary(iterations)[0]) for _ in range(self.repeats)]
        taken = statistics.median(ours for ours, _ in pairs)
        needed = statistics.median(alone for _, alone in pairs)
        return {
            "what": f"{preset}, {teachers} teachers, 1 iteration", "seconds": taken, "ratio": taken / needed,
            "of peak": flops / taken / self._peak(), "memory MB": peak_memory_mb(),
        }  # fmt: skip

    def _config(self, **changes: Any) -> fedftg.RunConfig:
        base = {"model__name": self.model, "threads": self.threads, "device": str(self.device)}
        return round_config(**{**base, "executor__name": self.executor, **changes})

    def _last_round(self, config: fedftg.RunConfig, samples: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            fedftg.run(config, out=Path(folder) / "run", dataset=images(samples))
            lines = (Path(folder) / "run" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        return float(json.loads(lines[-1])["seconds"]["local"])

    def _run(
        self, config: fedftg.RunConfig, samples: int, progress: Progress | None = None
    ) -> tuple[dict[str, Any], dict[str, float]]:
        with tempfile.TemporaryDirectory() as folder:
            given = images(samples)
            summary = fedftg.run(config, out=Path(folder) / "run", dataset=given, progress=progress).summary
        seconds = dict(summary["seconds"])
        del seconds["total"]
        return summary, seconds


class PeakByPhase(Progress):
    """Notes this process's peak memory in each phase, freed blocks that it keeps included; Linux only."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self._phase = ""

    def phase(self, round: int, name: str, done: int, total: int) -> None:
        """Ends the phase before, where this is another."""
        if name != self._phase:
            self._end(name)

    def finish(self) -> None:
        """Ends the last phase."""
        self._end("")

    def _end(self, following: str) -> None:
        if self._phase:
            self.peaks[self._phase] = max(peak_memory_mb(), self.peaks.get(self._phase, 0.0))
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        self._phase = following


FORMATS: dict[str, Callable[[Any], str]] = {
    "seconds": lambda value: f"{value:.3g}",
    "samples/s": lambda value: f"{value:.0f}",
    "of peak": lambda value: f"{value:.0%}",
    "ratio": lambda value: f"{value:.2f}",
    "share": lambda value: f"{value:.1%}",
    "memory MB": lambda value: f"{value:.0f}",
}


def _line(row: Row) -> str:
    cells = [f"{name} {show(row[name])}" for name, show in FORMATS.items() if name in row]
    return f"  {row['table']}: {row['what']}: {', '.join(cells)}"


def _table(rows: list[Row]) -> Table:
    caption = (
        "of peak: FLOP/s over those of a matrix product in that precision. ratio: local: throughput over the best bare "
        "loop's; refine: time over that of the necessary passes; layouts: time in float32 and contiguous over this."
    )
    table = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    for name in ("table", "what", *FORMATS):
        table.add_column(name, justify="left" if name in ("table", "what") else "right")
    for row in rows:
        table.add_row(
            row["table"], row["what"], *(show(row[name]) if name in row else "" for name, show in FORMATS.items())
        )
    return table


if __name__ == "__main__":
    main()
