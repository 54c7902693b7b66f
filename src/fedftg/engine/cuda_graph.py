"""Client steps recorded once as a CUDA graph and replayed: one launch a step instead of some thousand.

A step (forward, backward, the rule's correction, clipping, SGD) is `fedftg.engine.local_train.client_step`, unchanged,
on tensors with fixed addresses (`fedftg.engine.client_slots`): values are copied in before a client and out after it,
images and labels before each step. Order and augmentation are drawn outside. A smaller last batch has a recording of
its own. With ``executor.group`` above 1 the steps of several clients with full batches are recorded side by side, each
on its own stream.

Recordings serve all rounds, unless the rule reads the round (`fedftg.algorithms.base.LocalRule`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from fedftg import params as tree
from fedftg.algorithms.base import ClientResult, LocalRule, LocalTask
from fedftg.data.federated import FederatedData
from fedftg.engine.client_slots import ClientSlot, RoundInputs, groups
from fedftg.engine.executors import SequentialExecutor
from fedftg.engine.local_train import LocalConfig, client_batches
from fedftg.errors import ClientError, InputError
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


@dataclass
class _Recorded:
    """Recordings, and the tensors that they use."""

    inputs: RoundInputs
    slots: list[ClientSlot] = field(default_factory=list)
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
        fallback: SequentialExecutor | None = None,
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
        self._cannot_record = False
        self._recorded: _Recorded | None = None

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:
        """Yields the results of a group at a time, in the order of the tasks.

        Raises:
            InputError: the step cannot be recorded, and there is no fallback.
            ClientError: names the first client of the group that failed.
        """
        if self._cannot_record and self._fallback is not None:
            yield from self._fallback.run(rule, tasks)
            return
        waiting = groups(tasks, self._group)
        for group in waiting:
            try:
                results = self._train(rule, group)
            except CannotRecord as error:
                fallback = self._fall_back(error)
                yield from fallback.run(rule, chain(group, chain.from_iterable(waiting)))
                return
            except InputError:
                raise
            except Exception as error:
                raise ClientError(group[0].round, group[0].client, "local training", error) from error
            yield from results

    def close(self) -> None:
        """Frees the recordings and their memory."""
        self._recorded = None

    def _fall_back(self, error: CannotRecord) -> SequentialExecutor:
        self.close()
        if self._fallback is None:
            raise InputError(f"executor.name=cuda_graph: {error}; take executor.name=sequential") from error
        self._cannot_record = True
        self.description = f"sequential (cuda_graph: {error})"
        return self._fallback

    def _train(self, rule: LocalRule, tasks: list[LocalTask]) -> list[ClientResult]:
        # By size: those that still step are then the first ones, and there are few combinations to record.
        order = sorted(range(len(tasks)), key=lambda index: -self._data.num_samples(tasks[index].client))
        ordered = [tasks[index] for index in order]
        state = self._prepare(rule, ordered)
        slots = state.slots[: len(ordered)]
        for slot, task in zip(slots, ordered, strict=True):
            slot.load(task, state.inputs)
        batches = [client_batches(self._model, self._data, self._settings, task) for task in ordered]
        losses: list[list[Tensor]] = [[] for _ in ordered]
        first = tasks[0]
        with forked(seed_for(first.seed, first.round, first.client, "model"), self._data.device):
            while True:
                current: list[tuple[int, torch.Size]] = []
                for index, source in enumerate(batches):
                    batch = next(source, None)
                    if batch is not None:
                        slots[index].feed(*batch)
                        current.append((index, batch[0].shape))
                if not current:
                    break
                for key in _neighbours(current, self._settings.batch_size):
                    self._replay(state, rule, key)
                for index, _ in current:
                    losses[index].append(slots[index].loss.clone())
        results = [self._result(rule, *one) for one in zip(slots, ordered, losses, strict=True)]
        return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]

    def _prepare(self, rule: LocalRule, tasks: list[LocalTask]) -> _Recorded:
        """The slots for these clients, with what they receive; made anew for another rule, other names or shapes."""
        first = tasks[0]
        state = self._recorded
        if state is None or not state.inputs.fits(first, rule):
            state = self._recorded = _Recorded(RoundInputs(first, rule))
        before = state.inputs.numbers
        state.inputs.fill(first)
        if state.inputs.numbers != before:
            state.recordings.clear()
        for task in tasks[len(state.slots) :]:
            state.slots.append(ClientSlot(task, state.inputs, self._settings))
        return state

    def _replay(self, state: _Recorded, rule: LocalRule, key: Key) -> None:
        if key not in state.recordings:
            slots = [state.slots[index] for index, _ in key]
            parts: list[Part] = [
                partial(slot.step, self._model, rule, shape, self._settings.max_grad_norm)
                for slot, (_, shape) in zip(slots, key, strict=True)
            ]
            state.recordings[key] = self._with_room(state, slots, parts)
            if len(state.recordings) > MOST_RECORDINGS:
                state.recordings.popitem(last=False)
        state.recordings.move_to_end(key)
        state.recordings[key]()

    def _with_room(self, state: _Recorded, slots: list[ClientSlot], parts: list[Part]) -> Part:
        """Records; if memory runs out, the other recordings are dropped and it is tried once more."""
        for _ in range(2):
            try:
                return self._record(slots, parts)
            except torch.OutOfMemoryError:
                state.recordings.clear()
        raise CannotRecord(f"the GPU has too little memory for the steps of {len(slots)} clients at a time")

    def _record(self, slots: list[ClientSlot], parts: list[Part]) -> Part:
        """Returns a recording that was compared with the step itself; the slots are unchanged, also after an error."""
        if self._recorder is None:
            self._recorder = CudaRecorder(self._data.device)
        tensors = [tensor for slot in slots for tensor in slot.state()]
        before = [tensor.detach().clone() for tensor in tensors]
        try:
            for part in parts:
                part()
            expected = [tensor.detach().clone() for tensor in tensors]
            _restore(tensors, before)
            try:
                replay = self._recorder.record(parts)
                _restore(tensors, before)
                replay()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                lines = str(error).splitlines() or [""]
                raise CannotRecord(f"a step cannot be recorded ({type(error).__name__}: {lines[0]})") from error
            length, error_length = _distance(expected, before), _distance(expected, tensors)
        finally:
            _restore(tensors, before)
        # Other kernels may be chosen, so it need not be equal to the bit. NaN compares as false: it shows nothing.
        if error_length > 1e-2 * length:
            off = error_length / length if length else error_length
            raise CannotRecord(f"a recorded step is off by {off:.1g} of its length")
        return replay

    def _result(self, rule: LocalRule, slot: ClientSlot, task: LocalTask, losses: list[Tensor]) -> ClientResult:
        params, buffers = tree.clone(slot.params), tree.clone(slot.buffers)
        extra, memory = rule.finish(params, buffers, task, len(losses))
        loss = float(torch.stack(losses).double().mean()) if losses else float("nan")
        counts = self._data.class_counts[task.client]
        return ClientResult(task.client, task.num_samples, counts, params, buffers, extra, memory, loss)


def _neighbours(current: list[tuple[int, torch.Size]], batch_size: int) -> list[Key]:
    """The slots that have a batch: neighbours with full ones together, others alone."""
    keys: list[Key] = []
    for index, shape in current:
        before, size = keys[-1][-1] if keys else (-2, None)
        if before == index - 1 and size == shape and shape[0] == batch_size:
            keys[-1] = (*keys[-1], (index, shape))
        else:
            keys.append(((index, shape),))
    return keys


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    return tree.norm({str(index): (a - b).detach() for index, (a, b) in enumerate(pairs)})
