"""examples/flower_app in Flower's own simulation, as a user starts it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower_app"
BOUND = 600.0
"""Seconds; it takes 30 on two quiet cores."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs flwr[simulation]"),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes to end in /proc"),
]


def started_with(home: Path) -> list[int]:
    """Processes that have this folder as FLWR_HOME: `flwr run` leaves a SuperLink behind, and Ray its own."""
    mark = f"FLWR_HOME={home}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    home = tmp_path / "flwr"
    home.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    for _ in range(100):
        left = started_with(home)
        if not left:
            break
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.mark.parametrize(("strategy", "at_least"), [("fedadam", 0.4), ("krum", 0.3)])
def test_refined_in_flower_s_simulation(
    strategy: str, at_least: float, environment: dict[str, str], tmp_path: Path
) -> None:
    """Three rounds on four clients: the refined model classifies, which three rounds from random weights alone do not
    guarantee; 0.1 is chance. Krum takes one client's model a round.
    """
    app = tmp_path / "app"
    shutil.copytree(EXAMPLE, app)
    command = ["flwr", "run", ".", "--stream"]
    command += ["--federation-config", "num-supernodes=4 client-resources-num-cpus=1"]
    command += ["-c", f'strategy="{strategy}" num-clients=4 alpha=0.5 checkpoint="{tmp_path / "state"}"']
    done = subprocess.run(command, cwd=app, env=environment, capture_output=True, text=True, timeout=BOUND, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("refined with 4 teachers") == 3, output
    accuracies = dict(re.findall(r"^round (\d): accuracy ([01]\.\d+)", output, re.MULTILINE))
    assert sorted(accuracies) == ["0", "1", "2", "3"], output
    assert float(accuracies["3"]) > max(at_least, float(accuracies["0"])), output
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["refined.safetensors"]
    assert (app / "pyproject.toml").read_text() == (EXAMPLE / "pyproject.toml").read_text()
