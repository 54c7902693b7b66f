"""Client steps recorded once as a CUDA graph and replayed: one launch a step instead of some thousand.

A step is `fedftg.engine.local_train.client_step`, unchanged, on tensors with fixed addresses, which are filled for each
client and batch. A smaller last batch has a recording of its own. With ``executor.group`` above 1 the steps of all
clients with full batches are recorded side by side, each on its own stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedftg import params as tree
from fedftg.algorithms.base import Batch, ClientResult, LocalRule, LocalTask
from fedftg.data.federated import FederatedData
from fedftg.engine.executors import SequentialExecutor
from fedftg.engine.local_train import LocalConfig, Sgd, client_batches, client_step, local_model, result_of
from fedftg.errors import ClientError, InputError, first_line
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params
from fedftg.seeds import forked, seed_for

Part = Callable[[], None]
Recorder = Callable[[Sequence[Part]], Part]
"""Returns a function that repeats what the parts do, all at once; may run them before that."""
Key = tuple[tuple[int, torch.Size], ...]
"""Which slots step together, and the shapes of their images."""

MOST_RECORDINGS = 128
"""The least recently used are dropped beyond this: every size of a last batch adds one for each slot."""

_NUMBERS = {  # of a task that are tensors in a recorded step, which then serves all clients and rounds
    **dict.fromkeys(("round", "client", "num_samples", "seed"), torch.int64),
    **dict.fromkeys(("relative_size", "lr"), torch.float64),
}


class CannotRecord(RuntimeError):
    """A step cannot be recorded, or its recording computes something else."""


class CudaRecorder:
    """CUDA graphs; those of one recorder share memory, for they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._streams: list[torch.cuda.Stream] = []

    def __call__(self, parts: Sequence[Part]) -> Part:
        """Runs the parts once, which sets libraries up, then records them, each on its own stream."""
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


class RoundInputs:
    """What all clients of a round receive."""

    def __init__(self, task: LocalTask, rule: LocalRule) -> None:
        like = next(iter(task.params.values()))
        self.rule = rule
        self.params, self.buffers = tree.clone(task.params), tree.clone(task.buffers)
        self.message = tree.clone(task.message)
        # In the parameters' type: with another one, an update of all parameters in one call is slower.
        self.lr = torch.tensor(task.lr, dtype=like.dtype, device=like.device)
        self._shapes = _shapes(task)
        self.numbers: dict[str, Any] = {}  # round and rate, where the rule may branch on them

    def fits(self, task: LocalTask, rule: LocalRule) -> bool:
        """Returns whether recordings hold for this rule and the names and shapes of this task."""
        return rule is self.rule and _shapes(task) == self._shapes

    def fill(self, task: LocalTask) -> None:
        """Copies another round's values in."""
        _copy((self.params, self.buffers, self.message), (task.params, task.buffers, task.message))
        self.lr.fill_(task.lr)
        self.numbers = {"round": task.round, "lr": task.lr} if getattr(self.rule, "reads_round", True) else {}


class ClientSlot:
    """The tensors that one client at a time is trained in."""

    def __init__(self, task: LocalTask, inputs: RoundInputs, settings: LocalConfig, class_counts: Tensor) -> None:
        self._settings = settings
        self._class_counts = class_counts.to(inputs.lr.device, copy=True)
        self.params = {name: tensor.detach().clone().requires_grad_() for name, tensor in task.params.items()}
        self.buffers = tree.clone(task.buffers)
        self.memory = tree.clone(task.memory)
        device = inputs.lr.device
        self.numbers: dict[str, Any] = {
            name: torch.tensor(getattr(task, name), dtype=kind, device=device) for name, kind in _NUMBERS.items()
        }
        self.task = LocalTask(
            params=inputs.params, buffers=inputs.buffers, message=inputs.message, memory=self.memory, **self.numbers
        )
        self.sgd = Sgd(self.params, inputs.lr, settings)
        self.loss = torch.zeros((), device=device)
        self.images: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def load(self, task: LocalTask, inputs: RoundInputs, class_counts: Tensor) -> None:
        """Starts a client: the received model, its memory, no momentum."""
        self._class_counts.copy_(class_counts)
        _copy((self.params, self.buffers, self.memory), (task.params, task.buffers, task.memory))
        for tensor in self.sgd.velocity:
            tensor.zero_()
        for name, tensor in self.numbers.items():
            tensor.fill_(getattr(task, name))
        self.task = replace(self.task, **inputs.numbers)

    def feed(self, images: Tensor, labels: Tensor) -> None:
        """Copies the next batch in."""
        own = self.images.setdefault(images.shape, (torch.empty_like(images), torch.empty_like(labels)))
        own[0].copy_(images)
        own[1].copy_(labels)

    def state(self) -> Params:
        """Returns all tensors that a step changes."""
        momentum = {f"momentum/{index}": tensor for index, tensor in enumerate(self.sgd.velocity)}
        return {**self.params, **self.buffers, **momentum}

    def step(self, model: FunctionalModel, rule: LocalRule, shape: torch.Size) -> None:
        """Makes one step on the last batch of this shape."""
        own, batch = local_model(model, self._settings, self._class_counts), Batch(*self.images[shape])
        most = self._settings.max_grad_norm
        loss = client_step(own, rule, self.params, self.buffers, batch, self.task, self.sgd, most)
        self.loss.copy_(loss)


class CudaGraphExecutor:
    """Recorded steps on a GPU, ``group`` clients at a time.

    Args:
        may_fall_back: runs clients one after the other where a step cannot be recorded; False makes that an error.
        recorder: None takes CUDA graphs.
    """

    def __init__(
        self,
        model: FunctionalModel,
        data: FederatedData,
        settings: LocalConfig,
        group: int,
        *,
        may_fall_back: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        if recorder is None and data.device.type != "cuda":
            raise InputError(f"executor.name=cuda_graph needs device=cuda, got {data.device}; or take auto")
        if model.has_dropout:
            raise InputError("executor.name=cuda_graph cannot record dropout; take executor.name=sequential")
        self.description = f"cuda_graph: {group} clients a recorded step" if group > 1 else "cuda_graph"
        self._model = model
        self._data = data
        self._settings = settings
        self._group = group
        self._may_fall_back = may_fall_back
        self._recorder = recorder or CudaRecorder(data.device)
        self._sequential: SequentialExecutor | None = None  # takes over where a step cannot be recorded
        self.close()

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:
        """Yields the results of a group at a time; a `ClientError` names the first client of the group that failed."""
        for group in groups(tasks, self._group):
            results: Iterable[ClientResult]
            try:
                results = self._train(rule, group) if self._sequential is None else self._sequential.run(rule, group)
            except CannotRecord as error:
                results = self._fall_back(error).run(rule, group)
            except InputError:
                raise
            except Exception as error:
                raise ClientError(group[0].round, group[0].client, "local training", error) from error
            yield from results

    def close(self) -> None:
        """Frees the recordings and their memory."""
        self._inputs: RoundInputs | None = None
        self._slots: list[ClientSlot] = []
        self._recordings: dict[Key, Part] = {}

    def _fall_back(self, error: CannotRecord) -> SequentialExecutor:
        self.close()
        if not self._may_fall_back:
            raise InputError(f"executor.name=cuda_graph: {error}; take executor.name=sequential") from error
        self.description = f"sequential (cuda_graph: {error})"
        self._sequential = SequentialExecutor(self._model, self._data, self._settings)
        return self._sequential

    def _train(self, rule: LocalRule, tasks: list[LocalTask]) -> list[ClientResult]:
        if getattr(rule, "draws", False):
            raise CannotRecord("the algorithm draws random numbers in its steps")
        # By size: those that still step are then the first ones, and there are few combinations to record.
        ordered = sorted(tasks, key=lambda task: -self._data.num_samples(task.client))
        self._load(rule, ordered)
        batches = [client_batches(self._model, self._data, self._settings, task) for task in ordered]
        losses: list[list[Tensor]] = [[] for _ in ordered]
        first = tasks[0]
        with forked(seed_for(first.seed, first.round, first.client, "model"), self._data.device):
            while True:
                current: list[tuple[int, torch.Size]] = []
                for index, source in enumerate(batches):
                    batch = next(source, None)
                    if batch is not None:
                        self._slots[index].feed(*batch)
                        current.append((index, batch[0].shape))
                if not current:
                    break
                full = tuple(one for one in current if one[1][0] == self._settings.batch_size)
                keys = [full] * bool(full) + [(one,) for one in current if one not in full]
                for key in keys:
                    self._replay(rule, key)
                for index, _ in current:
                    losses[index].append(self._slots[index].loss.clone())
        results = {}
        for task, slot, own in zip(ordered, self._slots, losses, strict=False):
            params, buffers = tree.clone(slot.params), tree.clone(slot.buffers)
            counts = self._data.class_counts[task.client]
            results[task.client] = result_of(rule, task, params, buffers, own, counts)
        return [results[task.client] for task in tasks]

    def _load(self, rule: LocalRule, tasks: list[LocalTask]) -> None:
        if self._inputs is None or not self._inputs.fits(tasks[0], rule):
            self.close()
            self._inputs = RoundInputs(tasks[0], rule)
        before = self._inputs.numbers
        self._inputs.fill(tasks[0])
        if self._inputs.numbers != before:
            self._recordings.clear()
        for task in tasks[len(self._slots) :]:
            counts = self._data.class_counts[task.client]
            self._slots.append(ClientSlot(task, self._inputs, self._settings, counts))
        for slot, task in zip(self._slots, tasks, strict=False):
            slot.load(task, self._inputs, self._data.class_counts[task.client])

    def _replay(self, rule: LocalRule, key: Key) -> None:
        recording = self._recordings.pop(key, None) or self._record(rule, key)
        self._recordings[key] = recording  # the last one is the most recently used
        if len(self._recordings) > MOST_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        recording()

    def _record(self, rule: LocalRule, key: Key) -> Part:
        """Returns a recording that was compared with the step itself; the slots are unchanged."""
        slots = [self._slots[index] for index, _ in key]
        parts: list[Part] = [
            partial(slot.step, self._model, rule, shape) for slot, (_, shape) in zip(slots, key, strict=True)
        ]
        state = {f"{index}/{name}": tensor for index, slot in enumerate(slots) for name, tensor in slot.state().items()}
        before = tree.clone(state)
        for part in parts:
            part()
        expected = tree.clone(state)
        _copy([state], [before])
        try:
            replay = self._recorder(parts)
            _copy([state], [before])
            replay()
        except RuntimeError as error:
            raise CannotRecord(f"a step cannot be recorded ({first_line(error)})") from error
        length, error_length = tree.norm(tree.sub(expected, before)), tree.norm(tree.sub(expected, tree.clone(state)))
        _copy([state], [before])
        # Other kernels may be chosen, so it need not be equal to the bit. NaN compares as false: it shows nothing.
        if error_length > 1e-2 * length:
            raise CannotRecord(f"a recorded step is off by {error_length / (length or 1.0):.1g} of its length")
        return replay


def groups(tasks: Iterable[LocalTask], size: int) -> Iterator[list[LocalTask]]:
    """Yields up to ``size`` tasks at a time, in order, with memories of the same shapes."""
    group: list[LocalTask] = []
    for task in tasks:
        if group and (len(group) == size or _shapes(group[0]) != _shapes(task)):
            yield group
            group = []
        group.append(task)
    if group:
        yield group


def _shapes(task: LocalTask) -> list[dict[str, tuple[torch.Size, torch.dtype]]]:
    received = (task.params, task.buffers, task.message, task.memory)
    return [{name: (tensor.shape, tensor.dtype) for name, tensor in part.items()} for part in received]


@torch.no_grad()
def _copy(into: Sequence[Params], values: Sequence[Params]) -> None:
    for left, right in zip(into, values, strict=True):
        for name, tensor in left.items():
            tensor.copy_(right[name])
