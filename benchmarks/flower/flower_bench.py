"""FedFTG around Flower's FedAvg compared with plain FedAvg: seconds a round, bytes a client, memory of the server.

    OMP_NUM_THREADS=1 python benchmarks/flower/flower_bench.py

Both do the same job on the in-process grid (records are serialised as on a network, nothing is sent), each in a process
of its own. Clients train for a few steps on random images: what is measured is the server. Needs ``fedftg[flower]``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedftg.engine.machine import environment
from fedftg.flower import FedFTG, class_counts
from fedftg.flower.testing import LocalGrid
from fedftg.models.registry import ModelConfig, build

IMAGE_SHAPE, NUM_CLASSES = (3, 32, 32), 10


def client_app(model: torch.nn.Module, steps: int, batch_size: int) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        rng = torch.Generator().manual_seed(client)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model.train()
        labels = torch.zeros(0, dtype=torch.int64)
        for _ in range(steps):
            images = torch.randn(batch_size, *IMAGE_SHAPE, generator=rng)
            labels = torch.randint(NUM_CLASSES, (batch_size,), generator=rng)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        metrics = {
            "num-examples": steps * batch_size,
            "class-counts": class_counts(labels, NUM_CLASSES),
            "partition-id": client,
        }
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    return app


def record_bytes(record: ArrayRecord) -> int:
    return sum(len(array.data) for array in record.values())


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def watched_memory(seen: list[float]) -> Iterator[None]:
    """Adds the highest resident size within, looked at 50 times a second."""
    stop, peak = threading.Event(), [resident_mb()]

    def look() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], resident_mb())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        seen.append(max(peak[0], resident_mb()))


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(options.threads)
    model = build(ModelConfig(name=options.model), NUM_CLASSES, IMAGE_SHAPE, 0)
    grid = LocalGrid.of(client_app(model, options.steps, options.batch_size), options.clients)
    base = FedAvg(min_train_nodes=options.clients, min_available_nodes=options.clients, fraction_evaluate=0.0)
    strategy = base if kind == "FedAvg" else FedFTG(base, model=model, image_shape=IMAGE_SHAPE, config=options.config)
    seconds: dict[str, list[float]] = {"clients": [], "server": [], "server CPU": []}
    before, peaks, down, up = [], [], [], []
    arrays = ArrayRecord(model.state_dict())
    for number in range(1, options.rounds + 1):
        start = time.perf_counter()
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        replies = grid.send_and_receive(messages)
        seconds["clients"].append(time.perf_counter() - start)
        down.append(sum(record_bytes(r) for r in messages[0].content.array_records.values()))
        up.append(sum(record_bytes(r) for r in replies[0].content.array_records.values()))
        del messages
        before.append(resident_mb())
        start, processor = time.perf_counter(), time.process_time()
        with watched_memory(peaks):
            new, _ = strategy.aggregate_train(number, replies)
        seconds["server"].append(time.perf_counter() - start)
        seconds["server CPU"].append(time.process_time() - processor)
        assert new is not None
        arrays = new
        del replies
    refined = [report.rolled_back for report in getattr(strategy, "reports", [])]
    return {
        "strategy": kind,
        "seconds": seconds,
        "refining": [report.seconds for report in getattr(strategy, "reports", [])],
        "rolled_back": refined,
        "bytes_down": down[-1],
        "bytes_up": up[-1],
        "memory_with_replies_mb": before,
        "memory_peak_in_aggregation_mb": peaks,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| strategy | clients, s a round | server, s a round | CPU s of it | MB down, up a client "
        "| MB resident with all replies | MB peak while the server works |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mean = {key: sum(values) / len(values) for key, values in row["seconds"].items()}
        lines.append(
            f"| {row['strategy']} | {mean['clients']:.1f} | {mean['server']:.1f} | {mean['server CPU']:.1f} "
            f"| {row['bytes_down'] / 1e6:.1f}, {row['bytes_up'] / 1e6:.1f} | {max(row['memory_with_replies_mb']):.0f} "
            f"| {max(row['memory_peak_in_aggregation_mb']):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="local SGD steps of a client in a round")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--config", default="fedftg", help="preset of FedFTG")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["FedAvg", "FedFTG(FedAvg)"], help="one of them, as JSON")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return
    rows = []
    for kind in ("FedAvg", "FedFTG(FedAvg)"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", kind]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    machine = environment(options.threads, "cpu")
    print(f"\n{machine['processor']}, {machine['cores']} cores, {options.threads} thread, load {load}")
    print(table(rows))


if __name__ == "__main__":
    main()
