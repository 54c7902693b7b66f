"""Client steps recorded once as a CUDA graph and replayed: one launch a step in place of some thousand.

A step (forward, backward, the rule's correction, clipping, SGD) is `fedftg.engine.local_train.client_step`, as it is,
on tensors that stay where they are: values are copied in before a client and out after it, images and labels before
each step. Order and augmentation are drawn outside. A smaller last batch has a recording of its own. With
``executor.group`` above 1 the steps of several clients are recorded side by side, each on a stream of its own: those
that have a full batch in a step.

Recordings serve all rounds: the received model, the message, the rate and the round are tensors that a round fills.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from fedftg import params as tree
from fedftg.algorithms.base import Batch, ClientResult, LocalRule, LocalTask
from fedftg.data.federated import FederatedData
from fedftg.engine.batches import client_batches, groups, shapes
from fedftg.engine.local_train import LocalConfig, Sgd, client_step
from fedftg.errors import ClientError, InputError
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params
from fedftg.seeds import forked, seed_for

Part = Callable[[], None]
Key = tuple[tuple[int, torch.Size], ...]
"""Which lanes step together, and the shapes of their images."""

MOST_RECORDINGS = 128
"""How many are kept, those used last; else every size that a last batch has would add one for each lane."""

_OWN = {"client": torch.int64, "num_samples": torch.int64, "relative_size": torch.float64, "seed": torch.int64}
"""Fields of a task in which clients differ. A rule sees them, the rate and the round as tensors, or the numbers of the
first step would be recorded."""


class CannotRecord(RuntimeError):
    """A step that cannot be recorded, or whose recording does something else."""


class Recorder(Protocol):
    """What makes a recording; a test gives one that needs no GPU."""

    def record(self, parts: Sequence[Part]) -> Part:
        """A function that does again what the parts do, all of them at once; may run them before that."""
        ...


class CudaRecorder:
    """CUDA graphs; those of one recorder share memory, for they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._streams: list[torch.cuda.Stream] = []

    def record(self, parts: Sequence[Part]) -> Part:
        """Runs the parts once, so that libraries are set up, then records them, each on a stream of its own."""
        with torch.cuda.device(self._device):
            while len(self._streams) < len(parts):
                self._streams.append(torch.cuda.Stream())  # type: ignore[no-untyped-call]
            self._fork(parts, torch.cuda.current_stream())
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._fork(parts, torch.cuda.current_stream())
        return graph.replay

    def _fork(self, parts: Sequence[Part], main: torch.cuda.Stream) -> None:
        for part, stream in zip(parts, self._streams, strict=False):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                part()
        for stream in self._streams[: len(parts)]:
            main.wait_stream(stream)


class _Sent:
    """What all clients of a round are given, in tensors that stay where they are from round to round."""

    def __init__(self, task: LocalTask, rule: LocalRule) -> None:
        like = next(iter(task.params.values()))
        self.rule = rule
        self.params, self.buffers = tree.clone(task.params), tree.clone(task.buffers)
        self.message = tree.clone(task.message)
        # In the parameters' type, or a step of all of them at once would take a slow path.
        self.lr = torch.tensor(task.lr, dtype=like.dtype, device=like.device)
        self.round = torch.tensor(task.round, device=like.device)
        self._filled_from = (task.round, task.params, task.buffers, task.message)

    def fits(self, task: LocalTask, rule: LocalRule) -> bool:
        """Whether this rule is the one recorded, and what is sent now has the names and shapes of what was."""
        pairs = ((self.params, task.params), (self.buffers, task.buffers), (self.message, task.message))
        return rule is self.rule and all(shapes(own) == shapes(new) for own, new in pairs)

    @torch.no_grad()
    def fill(self, task: LocalTask) -> None:
        """Another round's values; nothing where they are there."""
        given = (task.round, task.params, task.buffers, task.message)
        if given[0] == self._filled_from[0] and all(
            new is old for new, old in zip(given[1:], self._filled_from[1:], strict=True)
        ):
            return
        _copy(self.params, task.params)
        _copy(self.buffers, task.buffers)
        _copy(self.message, task.message)
        self.lr.fill_(task.lr)
        self.round.fill_(task.round)
        self._filled_from = given


class _Lane:
    """The tensors that one client at a time is trained in."""

    def __init__(self, task: LocalTask, sent: _Sent, settings: LocalConfig) -> None:
        self.params = {name: tensor.detach().clone().requires_grad_() for name, tensor in task.params.items()}
        self.buffers = tree.clone(task.buffers)
        self.memory = tree.clone(task.memory)
        self.velocity = tree.zeros_like(task.params) if settings.momentum else {}
        device = next(iter(self.params.values())).device
        self.own = {name: torch.tensor(getattr(task, name), dtype=kind, device=device) for name, kind in _OWN.items()}
        numbers: dict[str, Any] = {**self.own, "lr": sent.lr, "round": sent.round}
        self.task = LocalTask(
            params=sent.params, buffers=sent.buffers, message=sent.message, memory=self.memory, **numbers
        )
        self.sgd = Sgd(self.params, sent.lr, settings, list(self.velocity.values()) or None)
        self.loss = torch.zeros((), device=device)
        self.inputs: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def fits(self, task: LocalTask) -> bool:
        """Whether the client's memory has the names and shapes of this lane's."""
        return shapes(self.memory) == shapes(task.memory)

    @torch.no_grad()
    def load(self, task: LocalTask) -> None:
        """Starts a client: the received model, its memory, no momentum."""
        _copy(self.params, task.params)
        _copy(self.buffers, task.buffers)
        _copy(self.memory, task.memory)
        for tensor in self.velocity.values():
            tensor.zero_()
        for name, tensor in self.own.items():
            tensor.fill_(getattr(task, name))

    def feed(self, images: Tensor, labels: Tensor) -> None:
        """The next batch."""
        kept = self.inputs.setdefault(images.shape, (torch.empty_like(images), torch.empty_like(labels)))
        kept[0].copy_(images)
        kept[1].copy_(labels)

    def state(self) -> list[Tensor]:
        """All that a step changes."""
        return [*self.params.values(), *self.buffers.values(), *self.velocity.values()]

    def step(self, model: FunctionalModel, rule: LocalRule, shape: torch.Size, max_grad_norm: float) -> None:
        """One step on the batch that was fed."""
        batch = Batch(*self.inputs[shape])
        loss = client_step(model, rule, self.params, self.buffers, batch, self.task, self.sgd, max_grad_norm)
        self.loss.copy_(loss)


@dataclass
class _Recorded:
    """Recordings, and the tensors that they are tied to."""

    sent: _Sent
    lanes: list[_Lane] = field(default_factory=list)
    recordings: OrderedDict[Key, Part] = field(default_factory=OrderedDict)


class CudaGraphExecutor:
    """Recorded steps on a GPU, ``group`` clients at a time.

    Args:
        fallback: runs the clients where a step cannot be recorded; None makes that an error.
        recorder: None takes CUDA graphs.

    Raises:
        InputError: no GPU, or a model with dropout.
    """

    def __init__(
        self,
        model: FunctionalModel,
        data: FederatedData,
        settings: LocalConfig,
        group: int,
        *,
        fallback: _Runner | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        if recorder is None and data.device.type != "cuda":
            raise InputError(
                f"executor.name=cuda_graph needs an NVIDIA GPU and device is {str(data.device)!r}; take device=cuda, "
                "or executor.name=auto"
            )
        if model.has_dropout:
            raise InputError(
                "executor.name=cuda_graph cannot give each client its own dropout masks; take "
                "executor.name=sequential, or a model without dropout"
            )
        self.description = f"cuda_graph: {group} clients a recorded step" if group > 1 else "cuda_graph"
        self._model = model
        self._data = data
        self._settings = settings
        self._group = group
        self._fallback = fallback
        self._recorder = recorder
        self._unfit = False
        self._recorded: _Recorded | None = None

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:
        """The results of a group at a time, in the order of the tasks.

        Raises:
            InputError: the step cannot be recorded, and there is no fallback.
            ClientError: names the first client of the group that failed.
        """
        if self._unfit and self._fallback is not None:
            yield from self._fallback.run(rule, tasks)
            return
        waiting = groups(tasks, self._group)
        for group in waiting:
            try:
                results = self._train(rule, group)
            except CannotRecord as error:
                fallback = self._give_up(error)
                yield from fallback.run(rule, chain(group, chain.from_iterable(waiting)))
                return
            except InputError:
                raise
            except Exception as error:
                raise ClientError(group[0].round, group[0].client, "local training", error) from error
            yield from results

    def close(self) -> None:
        """Gives the recordings and their memory up."""
        self._recorded = None

    def _give_up(self, error: CannotRecord) -> _Runner:
        self.close()
        if self._fallback is None:
            raise InputError(f"executor.name=cuda_graph: {error}; take executor.name=sequential") from error
        self._unfit = True
        self.description = f"sequential (cuda_graph: {error})"
        return self._fallback

    def _train(self, rule: LocalRule, tasks: list[LocalTask]) -> list[ClientResult]:
        # Those with the most steps first: clients that still step are then the first lanes, whatever their sizes are,
        # and have few recordings.
        places = sorted(range(len(tasks)), key=lambda place: -self._data.num_samples(tasks[place].client))
        ordered = [tasks[place] for place in places]
        state = self._ready(rule, ordered)
        lanes = state.lanes[: len(ordered)]
        for lane, task in zip(lanes, ordered, strict=True):
            lane.load(task)
        batches = [client_batches(self._model, self._data, self._settings, task) for task in ordered]
        losses: list[list[Tensor]] = [[] for _ in ordered]
        first = tasks[0]
        with forked(seed_for(first.seed, first.round, first.client, "model"), self._data.device):
            while True:
                current: list[tuple[int, torch.Size]] = []
                for index, source in enumerate(batches):
                    batch = next(source, None)
                    if batch is not None:
                        lanes[index].feed(*batch)
                        current.append((index, batch[0].shape))
                if not current:
                    break
                full = tuple(one for one in current if one[1][0] == self._settings.batch_size)
                for key in (full, *((one,) for one in current if one not in full)):
                    if key:
                        self._replay(state, rule, key)
                for index, _ in current:
                    losses[index].append(lanes[index].loss.clone())
        results = [self._result(rule, *one) for one in zip(lanes, ordered, losses, strict=True)]
        return [result for _, result in sorted(zip(places, results, strict=True), key=lambda pair: pair[0])]

    def _ready(self, rule: LocalRule, tasks: list[LocalTask]) -> _Recorded:
        """The lanes for these clients; another rule, or other names in what it sends or keeps, makes them anew."""
        first = tasks[0]
        state = self._recorded
        if state is None or not state.sent.fits(first, rule):
            state = self._recorded = _Recorded(_Sent(first, rule))
        state.sent.fill(first)
        for index, task in enumerate(tasks):
            if index == len(state.lanes):
                state.lanes.append(_Lane(task, state.sent, self._settings))
            elif not state.lanes[index].fits(task):
                state.lanes[index] = _Lane(task, state.sent, self._settings)
                for key in [key for key in state.recordings if index in dict(key)]:
                    del state.recordings[key]
        return state

    def _replay(self, state: _Recorded, rule: LocalRule, key: Key) -> None:
        if key not in state.recordings:
            norm = self._settings.max_grad_norm
            parts: list[Part] = [
                partial(state.lanes[index].step, self._model, rule, shape, norm) for index, shape in key
            ]
            state.recordings[key] = self._record([state.lanes[index] for index, _ in key], parts)
            if len(state.recordings) > MOST_RECORDINGS:
                state.recordings.popitem(last=False)
        state.recordings.move_to_end(key)
        state.recordings[key]()

    def _record(self, lanes: list[_Lane], parts: list[Part]) -> Part:
        """A recording that was compared with the step itself; the lanes are as before."""
        if self._recorder is None:
            self._recorder = CudaRecorder(self._data.device)
        tensors = [tensor for lane in lanes for tensor in lane.state()]
        before = [tensor.detach().clone() for tensor in tensors]
        for part in parts:
            part()
        wanted = [tensor.detach().clone() for tensor in tensors]
        _restore(tensors, before)
        try:
            replay = self._recorder.record(parts)
            _restore(tensors, before)
            replay()
        except RuntimeError as error:
            _restore(tensors, before)
            lines = str(error).splitlines() or [""]
            raise CannotRecord(f"a step cannot be recorded ({type(error).__name__}: {lines[0]})") from error
        moved, apart = _distance(wanted, before), _distance(wanted, tensors)
        _restore(tensors, before)
        # Kernels may be chosen differently, so not to the bit; a step that is not finite says nothing.
        if apart > 1e-2 * moved:
            raise CannotRecord(f"a recorded step is off by {apart / moved if moved else apart:.1g} of its length")
        return replay

    def _result(self, rule: LocalRule, lane: _Lane, task: LocalTask, losses: list[Tensor]) -> ClientResult:
        params, buffers = tree.clone(lane.params), tree.clone(lane.buffers)
        extra, memory = rule.finish(params, buffers, task, len(losses))
        loss = float(torch.stack(losses).double().mean()) if losses else float("nan")
        counts = self._data.class_counts[task.client]
        return ClientResult(task.client, task.num_samples, counts, params, buffers, extra, memory, loss)


class _Runner(Protocol):
    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]: ...


def _copy(into: Params, values: Params) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    return tree.norm({str(index): (a - b).detach() for index, (a, b) in enumerate(pairs)})
