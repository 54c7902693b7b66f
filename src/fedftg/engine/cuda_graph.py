"""Client steps recorded once as a CUDA graph and replayed: one launch a step in place of some thousand.

A step (forward, backward, the rule's correction, clipping, SGD) is `fedftg.engine.local_train.client_step`, as it is,
on tensors that stay where they are: values are copied in before a client and out after it, images and labels before
each step. Order and augmentation are drawn outside. A smaller last batch has a recording of its own. With
``executor.group`` above 1 the steps of several clients are recorded side by side, each on a stream of its own, where
neighbours have full batches.

Recordings serve all rounds: the received model, the message and the rate of SGD are tensors that a round fills. A rule
that reads ``round`` or ``lr`` gets numbers, which a recording holds, so its steps are recorded anew in each round.
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
from fedftg.engine.batches import client_batches, groups
from fedftg.engine.lanes import Lane, Sent
from fedftg.engine.local_train import LocalConfig
from fedftg.errors import ClientError, InputError
from fedftg.models.functional import FunctionalModel
from fedftg.seeds import forked, seed_for

Part = Callable[[], None]
Key = tuple[tuple[int, torch.Size], ...]
"""Which lanes step together, and the shapes of their images."""

MOST_RECORDINGS = 128
"""How many are kept, those used last; else every size that a last batch has would add one for each lane."""


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


@dataclass
class _Recorded:
    """Recordings, and the tensors that they are tied to."""

    sent: Sent
    lanes: list[Lane] = field(default_factory=list)
    recordings: OrderedDict[Key, Part] = field(default_factory=OrderedDict)

    def drop_unread(self) -> None:
        """Gives up the inputs that no recording reads any more; not while a step is under way."""
        for index, lane in enumerate(self.lanes):
            read = {shape for key in self.recordings for place, shape in key if place == index}
            lane.inputs = {shape: kept for shape, kept in lane.inputs.items() if shape in read}


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
        # By size, so that those which still step are neighbours: there are few ways to choose neighbours.
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
                for key in _neighbours(current, self._settings.batch_size):
                    self._replay(state, rule, key)
                for index, _ in current:
                    losses[index].append(lanes[index].loss.clone())
        results = [self._result(rule, *one) for one in zip(lanes, ordered, losses, strict=True)]
        return [result for _, result in sorted(zip(places, results, strict=True), key=lambda pair: pair[0])]

    def _ready(self, rule: LocalRule, tasks: list[LocalTask]) -> _Recorded:
        """The lanes for these clients, filled with what they are sent.

        All is made anew for another rule or other names in what is sent, a lane for other names in a memory.
        """
        first = tasks[0]
        state = self._recorded
        if state is None or not state.sent.fits(first, rule):
            state = self._recorded = _Recorded(Sent(first, rule))
        if state.sent.fill(first) and state.sent.numbers_read:
            state.recordings.clear()
        state.drop_unread()
        for index, task in enumerate(tasks):
            if index == len(state.lanes):
                state.lanes.append(Lane(task, state.sent, self._settings))
            elif not state.lanes[index].fits(task):
                state.lanes[index] = Lane(task, state.sent, self._settings)
                for key in [key for key in state.recordings if index in dict(key)]:
                    del state.recordings[key]
        return state

    def _replay(self, state: _Recorded, rule: LocalRule, key: Key) -> None:
        if key not in state.recordings:
            lanes = [state.lanes[index] for index, _ in key]
            parts: list[Part] = [
                partial(lane.step, self._model, rule, shape, self._settings.max_grad_norm)
                for lane, (_, shape) in zip(lanes, key, strict=True)
            ]
            state.recordings[key] = self._with_room(state, lanes, parts)
            if len(state.recordings) > MOST_RECORDINGS:
                state.recordings.popitem(last=False)
        state.recordings.move_to_end(key)
        state.recordings[key]()

    def _with_room(self, state: _Recorded, lanes: list[Lane], parts: list[Part]) -> Part:
        """`_record`, which may need the memory of the others."""
        for _ in range(2):
            try:
                return self._record(lanes, parts)
            except torch.OutOfMemoryError:
                state.recordings.clear()
        raise CannotRecord(f"the GPU has too little memory for the steps of {len(lanes)} clients at a time")

    def _record(self, lanes: list[Lane], parts: list[Part]) -> Part:
        """A recording that was compared with the step itself; the lanes are as before, also after an error."""
        if self._recorder is None:
            self._recorder = CudaRecorder(self._data.device)
        tensors = [tensor for lane in lanes for tensor in lane.state()]
        before = [tensor.detach().clone() for tensor in tensors]
        try:
            for part in parts:
                part()
            wanted = [tensor.detach().clone() for tensor in tensors]
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
            moved, apart = _distance(wanted, before), _distance(wanted, tensors)
        finally:
            _restore(tensors, before)
        # Kernels may be chosen differently, so not to the bit; a step that is not finite says nothing.
        if apart > 1e-2 * moved:
            raise CannotRecord(f"a recorded step is off by {apart / moved if moved else apart:.1g} of its length")
        return replay

    def _result(self, rule: LocalRule, lane: Lane, task: LocalTask, losses: list[Tensor]) -> ClientResult:
        params, buffers = tree.clone(lane.params), tree.clone(lane.buffers)
        extra, memory = rule.finish(params, buffers, task, len(losses))
        loss = float(torch.stack(losses).double().mean()) if losses else float("nan")
        counts = self._data.class_counts[task.client]
        return ClientResult(task.client, task.num_samples, counts, params, buffers, extra, memory, loss)


def _neighbours(current: list[tuple[int, torch.Size]], batch_size: int) -> list[Key]:
    """The lanes that have a batch: neighbours with full ones together, others alone."""
    keys: list[Key] = []
    for index, shape in current:
        before, size = keys[-1][-1] if keys else (-2, None)
        if before == index - 1 and size == shape and shape[0] == batch_size:
            keys[-1] = (*keys[-1], (index, shape))
        else:
            keys.append(((index, shape),))
    return keys


class _Runner(Protocol):
    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]: ...


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    return tree.norm({str(index): (a - b).detach() for index, (a, b) in enumerate(pairs)})
