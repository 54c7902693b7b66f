"""Records what a change must not change, and compares two such records.

    python benchmarks/same_numbers.py record FOLDER [--data DATA]   # once before a change, once after it
    python benchmarks/same_numbers.py compare BEFORE AFTER          # exit status 1 where anything differs

FOLDER then holds the records of small runs (times aside) with digests of their final weights, the partition of every
law, and digests of decoded images of every kind of source. DATA is a folder with the real image sets of the
benchmarks; without it only built-in and made-up images are used. PYTHONPATH chooses the code that is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fedftg
from fedftg.data import sources
from fedftg.data.config import DataConfig

DIGITS: dict[str, Any] = {
    "threads": 1, "rounds": 4, "data": {"name": "digits"}, "model": {"name": "lenet_gn"}, "cohort": {"size": 4},
    "partition": {"law": "dirichlet", "num_clients": 20, "alpha": 0.05},
    "refiner": {"name": "fedftg", "generator_width": 16},
    "local": {"lr": 0.05, "epochs": 3, "batch_size": 50},
}  # fmt: skip
CIFAR: dict[str, Any] = {
    "threads": 1, "rounds": 3, "data": {"name": "cifar10", "max_train": 10000}, "model": {"name": "lenet_gn"},
    "cohort": {"size": 5}, "partition": {"law": "dirichlet", "num_clients": 20, "alpha": 0.1},
    "executor": {"name": "sequential"},
}  # fmt: skip
RUNS: dict[str, list[str]] = {
    "default": ["rounds=20"],
    "official": ["refiner.preset=official", "refiner.generator_width=16", "executor.name=sequential"],
    "paper_bn": ["refiner.preset=paper", "refiner.generator_width=16", "model.name=lenet_bn"],
    "scaffold": ["algorithm.name=scaffold", "executor.name=sequential", "refiner.name=none", "local.steps=20"],
    "scaffold_workers": ["algorithm.name=scaffold", "executor.name=workers", "executor.workers=2",
                         "refiner.name=none", "local.steps=20"],
    "feddyn_fedftg": ["algorithm.name=feddyn", "executor.name=sequential"],
    "feddyn_fedftg_workers": ["algorithm.name=feddyn", "executor.name=workers", "executor.workers=2"],
    "moon": ["algorithm.name=moon", "checkpoint.every=2", "cohort.probability=0.3", "refiner.name=none"],
    "fedprox_held_back": ["algorithm.name=fedprox", "algorithm.mu=0.1", "partition.test_share=0.2",
                          "partition.feature_noise=0.3", "local.momentum=0.9", "evaluation.track_all=false"],
}  # fmt: skip
PARTITIONS: dict[str, list[str]] = {
    f"{law}{seed}": [f"partition.law={law}", f"seed={seed}", *more]
    for seed in (0, 1)
    for law, more in {
        "iid": ["partition.sizes=lognormal", "partition.sigma=0.5"],
        "dirichlet": ["partition.test_share=0.1"],
        "class_dirichlet": ["partition.min_samples=5", "partition.num_clients=10", "partition.alpha=0.3"],
        "pathological": ["partition.classes_per_client=3"],
        "shards": [],
        "quantity": ["partition.alpha=0.5"],
    }.items()
}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Returns the SHA-256 of names, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype};".encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of a run without their times."""
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def run(settings: dict[str, Any], overrides: list[str], out: Path) -> dict[str, Any]:
    """Runs one experiment; returns its records, partition and digests of its final state."""
    done = fedftg.run(settings, overrides=overrides, out=out)
    state = {part: digest(getattr(done.state, part)) for part in ("params", "buffers", "server", "refiner")}
    return {"rounds": rows(out), "partition": json.loads((out / "partition.json").read_text()), "state": state}


def flower(out: Path) -> dict[str, Any]:
    """Runs SCAFFOLD + FedFTG over an in-process Flower grid; returns records and digests of its final state."""
    from fedftg import config
    from fedftg.flower.client import client_app
    from fedftg.flower.server import serve
    from fedftg.flower.testing import LocalGrid
    from fedftg.progress import Progress

    out.mkdir()
    settings = config.apply({**DIGITS, "name": "net"}, ["algorithm.name=scaffold", "local.steps=20", "rounds=3"])
    recipe = out / "recipe.toml"
    recipe.write_text(config.from_mapping(settings).to_toml())
    nodes = {client + 1: {"partition-id": client, "state-dir": str(out / f"node-{client}")} for client in range(20)}
    given = {"wait-seconds": 0.2, "round-seconds": 0.3}
    done = serve(LocalGrid(client_app(recipe), nodes, given), recipe, {**given, "out": str(out / "run")}, Progress())
    state = {part: digest(getattr(done.state, part)) for part in ("params", "buffers", "server", "refiner")}
    return {"rounds": rows(out / "run"), "state": state}


def images(config: DataConfig) -> dict[str, Any]:
    """Returns digests of what a source gives."""
    data = sources.load(config)
    return {
        "train": digest({"images": data.train_images, "labels": data.train_labels}),
        "test": digest({"images": data.test_images, "labels": data.test_labels}),
        "classes": list(data.class_names),
        "normalisation": [list(data.mean), list(data.std), data.augment],
        "converted": dict(data.converted),
    }


def made_up_folder(root: Path) -> None:
    """Writes class folders with the kinds of images that people have."""
    from PIL import Image

    rng = np.random.default_rng(0)
    rgb = lambda: Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))  # noqa: E731
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                rgb().save(folder / f"{number}.png")
                rgb().save(folder / f"{number}j.jpg", quality=90)
                rgb().convert("L").save(folder / f"{number}l.png")
                rgb().convert("CMYK").save(folder / f"{number}c.jpg")
                rgb().quantize(8).save(folder / f"{number}p.png")
                rgb().save(folder / f"{number}w.webp", lossless=True)
                rgb().convert("RGBA").save(folder / f"{number}a.png")
                exif = Image.Exif()
                exif[0x0112] = 6
                rgb().save(folder / f"{number}e.jpg", exif=exif)


def cases(data: Path | None, scratch: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields everything that is recorded: a name, and the call that gives it."""
    cache = str(scratch / "cache")
    for name, overrides in RUNS.items():
        yield f"run/{name}", lambda name=name, o=overrides: run({**DIGITS, "name": "net"}, o, scratch / name)
    for name, overrides in PARTITIONS.items():
        few = ["rounds=1", "refiner.name=none", "local.steps=1", *overrides]
        yield (
            f"partition/{name}",
            lambda name=name, o=few: run({**DIGITS, "name": "net"}, o, scratch / f"law-{name}")["partition"],
        )
    yield "run/flower", lambda: flower(scratch / "flower")
    yield "source/digits", lambda: images(DataConfig(name="digits", cache=cache))
    made_up_folder(scratch / "images")
    for size in (16, 32):
        yield (
            f"source/folder{size}",
            lambda size=size: images(
                DataConfig(name="folder", root=str(scratch / "images"), image_size=size, cache=cache)
            ),
        )
    arrays = np.random.default_rng(1)
    np.savez(
        scratch / "arrays.npz",
        train_images=arrays.integers(0, 256, (40, 9, 11), dtype=np.uint8), train_labels=np.arange(40) % 4,
        test_images=arrays.integers(0, 256, (8, 9, 11), dtype=np.uint8), test_labels=np.arange(8) % 4,
    )  # fmt: skip
    yield "source/arrays", lambda: images(DataConfig(name="arrays", root=str(scratch / "arrays.npz"), cache=cache))
    if data is None:
        return
    sets = {
        "cifar10": ["cifar10", "cifar10"], "cifar100-part": ["cifar100", "cifar100-part"],
        "tiny-imagenet-20": ["parquet", "tiny-imagenet-20"], "food101-64-10": ["parquet", "food101-64-10"],
    }  # fmt: skip
    for name, (source, folder) in sets.items():
        yield f"source/{name}", lambda s=source, f=folder: images(DataConfig(name=s, root=str(data / f), cache=cache))
    cifar = {**CIFAR, "name": "net", "data": {**CIFAR["data"], "root": str(data / "cifar10"), "cache": cache}}
    yield "run/cifar", lambda: run(cifar, [], scratch / "cifar")
    yield "run/cifar_workers", lambda: run(cifar, ["executor.name=workers"], scratch / "cifar_workers")


def record(folder: Path, data: Path | None, only: str) -> None:
    """Writes one JSON file per case; a case that fails is recorded with its error."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for name, call in cases(data, Path(scratch)):
            if only not in name:
                continue
            try:
                value = call()
            except Exception as error:
                traceback.print_exc()
                value = {"failed": f"{type(error).__name__}: {error}".replace(scratch, "SCRATCH")}
            (folder / f"{name.replace('/', '.')}.json").write_text(json.dumps(value, indent=1) + "\n")
            print(name, "failed" if "failed" in value else "recorded", flush=True)


def compare(before: Path, after: Path) -> int:
    """Prints what is equal and what differs; returns how many cases differ."""
    different = 0
    names = sorted({path.name for folder in (before, after) for path in folder.glob("*.json")})
    for name in names:
        both = [folder / name for folder in (before, after)]
        if not all(path.exists() for path in both):
            print(f"{name}: only in {'BEFORE' if both[0].exists() else 'AFTER'}")
            different += 1
            continue
        left, right = (json.loads(path.read_text()) for path in both)
        found = list(differences(left, right))
        different += bool(found)
        print(f"{name}: {'equal' if not found else '; '.join(found[:5])}")
    print(f"{len(names) - different} of {len(names)} equal")
    return different


def differences(left: Any, right: Any, path: str = "") -> Iterator[str]:
    """Yields the places in which two values differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted({*left, *right}):
            yield from differences(left.get(key), right.get(key), f"{path}.{key}")
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for index, pair in enumerate(zip(left, right, strict=True)):
            yield from differences(*pair, f"{path}[{index}]")
    elif left != right:
        yield f"{path}: {str(left)[:60]} / {str(right)[:60]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", default="", help="record only cases whose name contains this")
    given = parser.parse_args()
    if given.what == "compare":
        sys.exit(bool(compare(*given.folders)))
    record(given.folders[0], given.data, given.only)
