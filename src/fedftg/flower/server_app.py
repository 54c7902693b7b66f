"""The ServerApp: the simulator's rounds, run folder and checkpoints, with nodes of a Flower grid as clients."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedftg import build, loop
from fedftg.config import RunConfig
from fedftg.data import sources
from fedftg.data.dataset import ImageDataset
from fedftg.engine import sampling
from fedftg.engine.evaluate import Measured
from fedftg.engine.machine import resolve_device
from fedftg.errors import InputError
from fedftg.experiment import Experiment, Models
from fedftg.flower.grid_executor import GridExecutor, no_memory
from fedftg.flower.node_evaluation import evaluate_on_nodes
from fedftg.flower.remote import ClientFacts, RemoteFederation, facts_of, joint_normalisation, other_data
from fedftg.flower.roster import Roster, Say
from fedftg.flower.settings import AppSettings, agreement, app_settings, on_server
from fedftg.loop import Run
from fedftg.progress import PlainLines, Progress
from fedftg.rundir import records
from fedftg.rundir.clients import ClientStore
from fedftg.rundir.folder import RunFolder
from fedftg.rundir.records import Record

RUNS = Path("runs")
_TELL_SECONDS = 20.0
"""How often a server that waits says how many are there."""


def server_app(recipe: str | Path) -> ServerApp:
    """The app that a SuperLink runs; its nodes run `fedftg.flower.client_app` on the same recipe.

    Args:
        recipe: a TOML recipe. What ``flwr run -c`` may set is in `fedftg.flower.settings.AppSettings`.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        console = Console(soft_wrap=True)
        try:
            run = serve(grid, Path(recipe), context.run_config, PlainLines(console))
        except InputError as error:
            told = " ".join(str(error).replace("--resume", "resume=true").replace("--out", "out").split())
            console.print(f"fedftg: {told}", highlight=False, markup=False)
            raise InputError(told) from None  # Flower shows where it was raised: a few lines, not the whole way
        console.print(f"run folder: {run.folder.resolve()}", highlight=False, markup=False)

    return app


def serve(grid: Grid, recipe: Path, run_config: Mapping[str, Any], progress: Progress) -> Run:
    """Runs a recipe on the nodes of a grid, or goes on with a run that was stopped.

    Raises:
        InputError: wrong settings, too few nodes within the bound, nodes that do not fit together, or other data than
            the resumed run had. A run that had started can be resumed.
    """
    settings = app_settings(run_config)
    config = on_server(recipe, settings)
    folder = Path(settings.out) if settings.out else RUNS / config.name
    console = Console(soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    say(f"run folder: {folder.resolve()}")
    return loop.execute(
        config,
        folder,
        lambda: prepare(grid, config, settings, RunFolder(folder), say),
        resume=settings.resume,
        progress=progress,
    )


@dataclass(kw_only=True)
class RemoteExperiment(Experiment):
    """An experiment whose clients are nodes, which come and go between rounds."""

    grid: Grid
    roster: Roster
    remote: RemoteFederation
    folder: RunFolder
    run_key: str
    wait_seconds: float
    evaluate_seconds: float
    say: Say
    weighed: frozenset[int]
    """The clients whose sizes the weights of the average of all uploads stand on."""

    def run_round(self, progress: Progress) -> Record:
        """One round with the nodes that are there.

        Raises:
            InputError: no client at all is there within the bound.
        """
        number = self.state.round + 1
        self.roster.ask_again()
        self.roster.refresh()
        cohort = self._cohort(number)
        enough = min(self.min_results, len(cohort))
        if not self.roster.wait(lambda: self.roster.present(cohort) >= enough, self.wait_seconds):
            there = self.roster.present(cohort)
            told = f"round {number}: {there} of the {len(cohort)} clients drawn are there after {self.wait_seconds:g} s"
            if not self.roster.nodes:
                raise InputError(f"{told}, and no other; start SuperNodes, and run again with resume=true")
            self.say(f"{told}, min-clients is {self.min_results}: nothing is trained in this round")
        self._take_in_newcomers()
        return super().run_round(progress)

    def _cohort(self, number: int) -> list[int]:
        """Smaller than ``cohort.size`` where newcomers turned out to hold nothing."""
        given, candidates = self.config.cohort, self._candidates
        if given.size is not None and given.size > len(candidates):
            given = given.model_copy(update={"size": len(candidates)})
        return sampling.cohort(given, candidates, self.config.seed, number)

    @property
    def _candidates(self) -> list[int]:
        """A client whose node was never there may hold something, and is drawn too."""
        return [client for client in range(self.remote.num_clients) if self.remote.may_train(client)]

    def _evaluate_clients(self, number: int, models: Models, into: Measured) -> None:
        if any(self.remote.num_held_back(client) for client in range(self.remote.num_clients)):
            evaluate_on_nodes(self.grid, self.roster, self.remote, models, number, self.evaluate_seconds, into)

    def _take_in_newcomers(self) -> None:
        known = frozenset(self.remote.known)
        if known == self.weighed:
            return
        sizes = [self.remote.num_samples(client) for client in range(self.remote.num_clients)]
        self.partition_record = self.remote.record(self.run_key) | {"joined_late": True}
        records.write_json(self.folder.path / "partition.json", self.partition_record)
        self.clients = self.clients.reweighed(sizes)
        self.weighed = known


def prepare(grid: Grid, config: RunConfig, settings: AppSettings, folder: RunFolder, say: Say) -> RemoteExperiment:
    """Waits for the nodes, and makes every object of a run; nothing is written.

    Raises:
        InputError: see `serve`.
    """
    before = folder.read_partition() if settings.resume else None
    mine = agreement(config)
    remembered = facts_of(before, mine) if before is not None else []
    found: dict[int, ClientFacts] = {facts.client: facts for facts in remembered}
    known_before = frozenset(found)
    test = _test_data(config, settings)

    def judge(facts: ClientFacts) -> str | None:
        """Before the first round every node is compared with the first; later with the federation."""
        if facts.settings != mine:
            return "its recipe's settings differ from the server's; install the same app and fedftg on both"
        counted = config.partition.law not in ("natural", "file")
        if counted and facts.num_clients != config.partition.num_clients:
            return f"it says {facts.num_clients} clients, the recipe {config.partition.num_clients}"
        problem = None if test is None else other_data(facts, test)
        if problem is not None:
            return f"{problem}; give the same data, or server-data=none"
        if not roster.rounds_started:
            for client in found.keys() - roster.nodes.keys() - known_before:
                del found[client]  # its node left before anything stood on it
        like = RemoteFederation(next(iter(found.values()), facts), facts.mean, facts.std, torch.device("cpu"), None)
        like.known = found
        problem = like.mismatch(facts)
        if problem is None:
            found[facts.client] = facts
        return problem

    roster = Roster(grid, judge, say)
    _gather(roster, found, config, settings, say)
    roster.rounds_started = True
    facts = [found[client] for client in sorted(found)]
    mean, std = joint_normalisation(facts) if before is None else (tuple(before["mean"]), tuple(before["std"]))
    remote = RemoteFederation(facts[0], mean, std, torch.device(resolve_device(config.device)), test)
    remote.known = found
    return _assemble(grid, config, settings, folder, roster, remote, say, before, known_before)


def _gather(roster: Roster, found: dict[int, ClientFacts], config: RunConfig, settings: AppSettings, say: Say) -> None:
    """Waits for all nodes, and goes on with fewer when the time is over and there are enough."""
    say(f"waiting for nodes, at most {settings.wait_seconds:g} s")
    expected = config.partition.num_clients

    def clients() -> range:
        return range(next(iter(found.values())).num_clients if found else expected)

    told = time.monotonic()

    def complete() -> bool:
        nonlocal told
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            say(f"{roster.present(clients())} of {len(clients())} clients are there{roster.first_refusal()}")
        return roster.present(clients()) == len(clients()) and not roster.undecided

    roster.wait(complete, settings.wait_seconds)
    count = len(clients())
    if len(roster.nodes) < min(settings.min_clients, count):
        starting = "" if roster.nodes else " (they may still be starting: a node needs some seconds)"
        raise InputError(
            f"{len(roster.nodes)} of {count} clients are there after {settings.wait_seconds:g} s, min-clients is "
            f"{settings.min_clients}; start more SuperNodes, or raise wait-seconds{starting}{roster.first_refusal()}"
        )
    if not sum(facts.num_samples for facts in found.values()):
        raise InputError("no client that is there holds training data; look at the nodes' data-root and partition-id")
    missing = [client for client in clients() if client not in roster.nodes]
    if missing:
        shown = ", ".join(map(str, missing[:20]))
        say(f"{len(missing)} of {count} clients are not there: {shown}; the run starts without them")


def _assemble(
    grid: Grid,
    config: RunConfig,
    settings: AppSettings,
    folder: RunFolder,
    roster: Roster,
    remote: RemoteFederation,
    say: Say,
    before: Record | None,
    remembered: frozenset[int],
) -> RemoteExperiment:
    run_key = str(before["run"]) if before is not None else secrets.token_hex(8)
    known = remote.known
    if before is not None and before.get("joined_late"):
        # The sum that the checkpoint holds may stand on sizes that were known earlier: it is made anew.
        weighed: frozenset[int] = frozenset()
    else:
        weighed = remembered if before is not None else frozenset(known)
    # A run that goes on was possible when it began, whatever has joined since.
    may_train = [client for client in range(remote.num_clients) if before is not None or remote.may_train(client)]
    made = build.parts(config, remote, len(may_train))
    params, buffers = made.state.params, made.state.buffers
    clients = ClientStore(
        no_memory,
        {**params, **buffers},
        [remote.num_samples(client) for client in range(remote.num_clients)],
        config.evaluation.track_all,
    )
    executor = GridExecutor(
        grid,
        roster,
        remote,
        made.algorithm,
        params,
        buffers,
        run=run_key,
        enough=settings.min_clients,
        checkpoint_every=config.checkpoint.every,
        seconds=settings.round_seconds,
    )
    return RemoteExperiment(
        config,
        remote,
        made.model,
        made.algorithm,
        made.refiner,
        executor,
        made.state,
        clients,
        before if before is not None else remote.record(run_key),
        min_results=settings.min_clients,
        grid=grid,
        roster=roster,
        remote=remote,
        folder=folder,
        run_key=run_key,
        wait_seconds=settings.wait_seconds,
        evaluate_seconds=settings.evaluate_seconds,
        say=say,
        weighed=weighed,
    )


def _test_data(config: RunConfig, settings: AppSettings) -> ImageDataset | None:
    return None if settings.server_data == "none" else sources.load(config.data)
