"""Client steps recorded once as a CUDA graph and replayed: one launch a step instead of some thousand.

A step (forward, backward, the rule's correction, clipping, SGD) is `fedftg.engine.local_train.client_step`, unchanged,
on tensors with fixed addresses (`fedftg.engine.client_slots`): values are copied in before a client and out after it,
images and labels before each step. Order and augmentation are drawn outside. A smaller last batch has a recording of
its own. With ``executor.group`` above 1 the steps of all clients with full batches are recorded side by side, each
on its own stream.

Recordings serve all rounds, unless the rule reads the round (`fedftg.algorithms.base.LocalRule`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fedftg import params as tree
from fedftg.algorithms.base import ClientResult, LocalRule, LocalTask
from fedftg.data.federated import FederatedData
from fedftg.engine.client_slots import ClientSlot, RoundInputs, groups
from fedftg.engine.executors import SequentialExecutor
from fedftg.engine.local_train import LocalConfig, client_batches, result_of
from fedftg.errors import ClientError, InputError, first_line
from fedftg.models.functional import FunctionalModel
from fedftg.seeds import forked, seed_for

Part = Callable[[], None]
Key = tuple[tuple[int, torch.Size], ...]
"""Which slots step together, and the shapes of their images."""

MOST_RECORDINGS = 128
"""The least recently used are dropped beyond this: every size of a last batch adds one for each slot."""


class CannotRecord(RuntimeError):
    """A step cannot be recorded, or its recording computes something else."""


class Recorder(Protocol):
    """Makes recordings; tests have one that needs no GPU."""

    def record(self, parts: Sequence[Part]) -> Part:
        """Returns a function that repeats what the parts do, all at once; may run them before that."""
        ...


class CudaRecorder:
    """CUDA graphs; those of one recorder share memory, for they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._streams: list[torch.cuda.Stream] = []

    def record(self, parts: Sequence[Part]) -> Part:
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


class CudaGraphExecutor:
    """Recorded steps on a GPU, ``group`` clients at a time.

    Args:
        may_fall_back: runs clients one after the other where a step cannot be recorded; False makes that an error.
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
        may_fall_back: bool = False,
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
        self._may_fall_back = may_fall_back
        self._recorder = recorder or CudaRecorder(data.device)
        self._sequential: SequentialExecutor | None = None
        """Takes over where a step cannot be recorded."""
        self.close()

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:
        """Yields the results of a group at a time, in the order of the tasks.

        Raises:
            InputError: the step cannot be recorded, and the executor may not fall back.
            ClientError: names the first client of the group that failed.
        """
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
        """Fills the slots; they are made anew for another rule, other names or shapes."""
        if self._inputs is None or not self._inputs.fits(tasks[0], rule):
            self.close()
            self._inputs = RoundInputs(tasks[0], rule)
        before = self._inputs.numbers
        self._inputs.fill(tasks[0])
        if self._inputs.numbers != before:
            self._recordings.clear()
        for task in tasks[len(self._slots) :]:
            self._slots.append(ClientSlot(task, self._inputs, self._settings))
        for slot, task in zip(self._slots, tasks, strict=False):
            slot.load(task, self._inputs)

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
            partial(slot.step, self._model, rule, shape, self._settings.max_grad_norm)
            for slot, (_, shape) in zip(slots, key, strict=True)
        ]
        tensors = [tensor for slot in slots for tensor in slot.state()]
        before = [tensor.detach().clone() for tensor in tensors]
        for part in parts:
            part()
        expected = [tensor.detach().clone() for tensor in tensors]
        _restore(tensors, before)
        try:
            replay = self._recorder.record(parts)
            _restore(tensors, before)
            replay()
        except RuntimeError as error:
            raise CannotRecord(f"a step cannot be recorded ({first_line(error)})") from error
        length, error_length = _distance(expected, before), _distance(expected, tensors)
        _restore(tensors, before)
        # Other kernels may be chosen, so it need not be equal to the bit. NaN compares as false: it shows nothing.
        if error_length > 1e-2 * length:
            off = error_length / length if length else error_length
            raise CannotRecord(f"a recorded step is off by {off:.1g} of its length")
        return replay


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    return tree.norm({str(index): (a - b).detach() for index, (a, b) in enumerate(pairs)})
