"""Runs command lines in forks of a process that has imported what they need: a fork starts in 0.1 s and not in 7.

A fork is a process of its own, and the interpreter ends there as it does anywhere: signals, exit status, output and
files are those of ``python -m fedftg.cli``. Before the fork no tensor is computed, and no thread started but that of
Arrow's allocator, which knows of forks. One JSON line a command on standard input; for each, one line with its exit
status, as `subprocess` has it, on standard output.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import warnings
from typing import Any

TIMEOUT = 300
"""Seconds; SIGALRM ends a command that takes longer."""

# What a run imports, most of it where it is used first: scikit-learn for digits, Dynamo in every optimizer.
IMPORTS = (
    "fedftg.loop", "fedftg.report.plots", "fedftg.report.table", "fedftg.progress",
    "matplotlib.backends.backend_agg", "sklearn.datasets", "torch._dynamo",
)  # fmt: skip


def serve() -> dict[str, Any]:
    """Forks for every command; returns in the fork, with the command."""
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            command: dict[str, Any] = json.loads(line)
            return command
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    sys.exit()


def become(command: dict[str, Any]) -> None:
    """Makes this process what a new one would be, with the command's arguments, folder, environment and output."""
    signal.alarm(TIMEOUT)
    os.chdir(command["folder"])
    os.environ.clear()
    os.environ.update(command["environment"])
    # ``python -m`` puts the folder first, and then what PYTHONPATH says.
    sys.path[:1] = [command["folder"], *command["path"]]
    importlib.invalidate_caches()
    sys.argv = ["fedftg", *command["arguments"]]
    for descriptor, name in enumerate((os.devnull, command["stdout"], command["stderr"])):
        file = os.open(name, os.O_RDWR)
        os.dup2(file, descriptor)
        os.close(file)


if __name__ == "__main__":
    # Other libraries' warnings at import are not what is tested, and would be shown here only.
    with warnings.catch_warnings(action="ignore"):
        for name in IMPORTS:
            importlib.import_module(name)
    # Else every fork looks through all that was imported when it ends, which takes more than a second.
    gc.collect()
    gc.freeze()
    become(serve())
    runpy.run_module("fedftg.cli", run_name="__main__", alter_sys=True)
