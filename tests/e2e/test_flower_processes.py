"""Real processes on this machine: a SuperLink, three SuperNodes and `flwr run`, in plain text and with TLS and keys."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fedftg import config as configs
from fedftg.rundir import records

BOUND = 420.0
"""Seconds for anything to happen; only a machine that hangs takes so long."""
CLIENTS = 3
EXAMPLE = Path(__file__).parents[2] / "examples" / "flower_app"
SETTINGS = [
    f"partition.num_clients={CLIENTS}", "cohort.size=2", "seed=0", "model.name=lenet_gn", "rounds=3", "threads=1",
    "local.epochs=2", "local.batch_size=20", "local.lr=0.05", "refiner.iterations=2", "refiner.batch_size=8",
    "refiner.generator_width=4", "algorithm.name=fedavg", "refiner.name=fedftg",
]  # fmt: skip


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
    }


class Loopback:
    """Processes in groups of their own, so that nothing of them is left."""

    def __init__(self, folder: Path, tls: bool) -> None:
        self.folder, self.tls = folder, tls
        self.link, *self.ports = free_ports(CLIENTS + 2)
        self._running: list[subprocess.Popen[bytes]] = []
        self._environment = environment(folder)
        (folder / "flwr").mkdir()
        trust = f'root-certificates = "{folder / "ca.crt"}"' if tls else "insecure = true"
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.link}"\n{trust}\n'
        )

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=self.folder,
                start_new_session=True,
            )
        self._running.append(process)
        return process

    def certificates(self) -> list[str]:
        if not self.tls:
            return ["--insecure"]
        return [
            f"--ssl-certfile={self.folder / 'server.pem'}", f"--ssl-keyfile={self.folder / 'server.key'}",
            f"--ssl-ca-certfile={self.folder / 'ca.crt'}",
        ]  # fmt: skip

    def superlink(self) -> None:
        keys = ["--enable-supernode-auth"] if self.tls else []
        address = ["--host", "127.0.0.1", "--port", str(self.link)]
        self.start("superlink", "flower-superlink", *address, *self.certificates(), *keys)
        self.wait_until(lambda: reachable(self.link), "superlink")

    def supernode(self, client: int, name: str, key: Path | None = None) -> subprocess.Popen[bytes]:
        trust = ["--insecure"]
        if self.tls:
            trust = [f"--root-certificates={self.folder / 'ca.crt'}", *self.certificates()]
            trust += [f"--auth-supernode-private-key={key}"] if key is not None else []
        state = self.folder / f"state-{client}"
        return self.start(
            name, "flower-supernode", "--superlink", f"127.0.0.1:{self.link}", "--host", "127.0.0.1",
            "--port", str(self.ports.pop()), *trust, "--node-config", f'partition-id={client} state-dir="{state}"',
        )  # fmt: skip

    def flwr(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["flwr", *arguments], env=self._environment, cwd=self.folder, capture_output=True, text=True, timeout=BOUND
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done

    def wait_until(self, done: Any, what: str) -> None:
        end = time.monotonic() + BOUND
        while not done():
            assert time.monotonic() < end, f"{what}: {self.log(what)}"
            time.sleep(0.3)

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def stop(self) -> None:
        for process in reversed(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._running:
            process.wait(BOUND)


def reachable(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def written_app(folder: Path, machines: Loopback, *more: str) -> Path:
    chosen = [*SETTINGS, *more]
    # The same digits from a file: two seconds less of imports in each of a dozen processes.
    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    split = {"train_images": images[:1400], "train_labels": labels[:1400]}
    np.savez(folder / "digits.npz", test_images=images[1400:], test_labels=labels[1400:], **split)
    chosen += ["data.name=arrays", f"data.root={folder / 'digits.npz'}"]
    settings = [item for setting in chosen for item in ("--set", setting)]
    command = [sys.executable, "-m", "fedftg.cli", "flower", "new", str(folder / "app"), *settings]
    subprocess.run(command, check=True, capture_output=True, timeout=BOUND, env=machines._environment)
    return folder / "app"


takes_minutes = pytest.mark.skipif("FEDFTG_TEST_ALL" not in os.environ, reason="takes minutes; make test-all")


@pytest.fixture
def loopback(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Loopback]:
    machines = Loopback(tmp_path, request.param)
    try:
        yield machines
    finally:
        machines.stop()


@takes_minutes
@pytest.mark.skipif(not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="makes keys by them")
@pytest.mark.parametrize("loopback", [True], ids=["tls"], indirect=True)
def test_three_nodes_train_as_in_the_simulator(loopback: Loopback, tmp_path: Path) -> None:
    certify(tmp_path)
    app = written_app(tmp_path, loopback)
    loopback.superlink()
    keys = [key_pair(tmp_path, f"node{client}") for client in range(CLIENTS)]
    for key in keys:
        loopback.flwr("supernode", "register", f"{key}.pub", "here")
    stranger = loopback.supernode(0, "stranger", key_pair(tmp_path, "stranger"))
    # Nodes come up while the run waits for them.
    for client, key in enumerate(keys):
        loopback.supernode(client, f"node{client}", key)
    out = tmp_path / "served"
    told = loopback.flwr("run", str(app), "here", "--stream", "-c", f'out="{out}" wait-seconds={BOUND}')
    assert (out / "summary.json").exists(), told.stdout + told.stderr
    rows = rows_of(out)
    assert rows == simulated(app / "fedftg_app" / "recipe.toml", tmp_path / "simulated")
    assert [row["clients"] for row in rows] == [[1, 2], [0, 2], [1, 2]]
    assert not any("rejected" in row for row in rows)
    # The stranger was refused and ended by itself; the three that are registered were not disturbed.
    assert stranger.wait(BOUND) != 0, loopback.log("stranger")
    listed = json.loads(loopback.flwr("supernode", "list", "here", "--format", "json").stdout)
    assert len(listed["nodes"]) == CLIENTS


@takes_minutes
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill in /proc")
@pytest.mark.parametrize("loopback", [False], ids=["plain"], indirect=True)
def test_a_killed_server_and_a_killed_node_go_on_from_what_is_on_disk(loopback: Loopback, tmp_path: Path) -> None:
    """SCAFFOLD, whose clients keep a control variate: kill -9 of ServerApp and of a node in mid-run; both again."""
    app = written_app(tmp_path, loopback, "algorithm.name=scaffold", "rounds=4")
    loopback.superlink()
    nodes = [loopback.supernode(client, f"node{client}") for client in range(CLIENTS)]
    out = tmp_path / "served"
    run = ["run", str(app), "here", "--stream", "-c"]
    loopback.start("first", "flwr", *run, f'out="{out}" wait-seconds={BOUND}')
    loopback.wait_until(lambda: len(rows_of(out)) >= 1, "first")
    servers = processes_of(loopback.folder, "serverapp")
    assert servers
    for process in servers:
        os.kill(process, signal.SIGKILL)
    os.killpg(nodes[0].pid, signal.SIGKILL)
    done = len(rows_of(out))
    assert 1 <= done < 4
    assert not (out / "summary.json").exists()
    loopback.ports += free_ports(1)
    loopback.supernode(0, "node0-again")
    told = loopback.flwr(*run, f'out="{out}" resume=true wait-seconds={BOUND}')
    assert (out / "summary.json").exists(), told.stdout + told.stderr
    rows = rows_of(out)
    assert rows == simulated(app / "fedftg_app" / "recipe.toml", tmp_path / "simulated")
    assert not any("rejected" in row for row in rows)


def processes_of(folder: Path, name: str = "") -> list[int]:
    """Those that have this folder's FLWR_HOME, with ``name`` in their command."""
    mark = f"FLWR_HOME={folder / 'flwr'}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            command = path.with_name("cmdline").read_bytes()
            if mark in path.read_bytes().split(b"\0") and name.encode() in command:
                found.append(int(path.parent.name))
    return found


def rows_of(out: Path) -> list[dict[str, Any]]:
    path = out / "rounds.jsonl"
    return [{key: row[key] for key in row if key != "seconds"} for row in records.read(path)] if path.exists() else []


def simulated(recipe: Path, out: Path) -> list[dict[str, Any]]:
    import fedftg

    fedftg.run(configs.load(recipe), out=out)
    return rows_of(out)


def key_pair(folder: Path, name: str) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", folder / name], check=True)
    return folder / name


def certify(folder: Path) -> None:
    """A certificate authority, and a certificate for 127.0.0.1 that it signed, by the commands of docs/flower.md."""
    curve = "-newkey ec -pkeyopt ec_paramgen_curve:secp384r1 -nodes"
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for command in (
        f"req -x509 {curve} -days 365 -subj /CN=CA -keyout ca.key -out ca.crt",
        f"req {curve} -subj /CN=localhost -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -extfile names -out server.pem",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs flwr[simulation]")
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes to end in /proc")
@pytest.mark.parametrize(("strategy", "at_least"), [("fedadam", 0.4), ("krum", 0.3)])
def test_the_example_in_flower_s_simulation(strategy: str, at_least: float, tmp_path: Path) -> None:
    """Three rounds on four clients: the refined model classifies; 0.1 is chance. Krum takes one client's a round."""
    app = tmp_path / "app"
    shutil.copytree(EXAMPLE, app)
    port = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_ports(1)[0])}
    command = ["flwr", "run", ".", "--stream", "--federation-config", "num-supernodes=4 client-resources-num-cpus=1"]
    command += ["-c", f'strategy="{strategy}" num-clients=4 alpha=0.5 checkpoint="{tmp_path / "state"}"']
    given: dict[str, Any] = {"cwd": app, "env": environment(tmp_path) | port, "timeout": BOUND}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **given)
    finally:  # `flwr run` leaves a SuperLink behind, and Ray its own
        while left := processes_of(tmp_path):
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("refined with 4 teachers") == 3, output
    accuracies = dict(re.findall(r"^round (\d): accuracy ([01]\.\d+)", output, re.MULTILINE))
    assert sorted(accuracies) == ["0", "1", "2", "3"], output
    assert float(accuracies["3"]) > max(at_least, float(accuracies["0"])), output
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["refined.safetensors"]
    assert (app / "pyproject.toml").read_text() == (EXAMPLE / "pyproject.toml").read_text()
