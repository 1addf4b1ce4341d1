"""Decoding steps of rollouts as CUDA graphs: what a step launches, hundreds of short kernels, becomes one launch.

A graph holds addresses, sizes and the step's number, so there is one for each step, and everything that changes from
batch to batch lies in memory that stays: the layout's tensors, keys and values, tokens, uniform numbers. The first
batch of some sizes runs as always, and is looked at for what a graph cannot hold; the second one is recorded; the
others are replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ebft_kernels import StridedLayout, select_impl

logger = logging.getLogger(__name__)


class Graph(Protocol):
    """What is recorded once and replayed."""

    def record(self, run: Callable[[], None]) -> None:
        """Call ``run``, whose work on the device is recorded, not done."""

    def replay(self) -> None:
        """Do it."""


class _CudaGraph:
    """Graphs of one :class:`StepGraphs` are replayed in the order in which they were recorded, so that they may share
    the memory of what lives within a step."""

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def record(self, run: Callable[[], None]) -> None:
        # A data loader's threads may go on pinning memory meanwhile.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            run()

    def replay(self) -> None:
        self._graph.replay()


def _cuda_graphs() -> Callable[[], Graph]:
    pool = torch.cuda.graph_pool_handle()
    return lambda: _CudaGraph(pool)


#: Device type -> makes what makes graphs that share memory.
BACKENDS: dict[str, Callable[[], Callable[[], Graph]]] = {"cuda": _cuda_graphs}


class StepGraphs:
    """Graphs of the steps of one decoder, which keeps its memory; of no use once :attr:`refused` says why."""

    def __init__(self, device: torch.device) -> None:
        self.refused = ""
        self._new = BACKENDS[device.type]()
        self._steps: list[Graph] | None = None
        self._batches = 0

    def run(self, model: nn.Module, steps: list[Callable[[], None]]) -> None:
        """Do ``steps``, one after the other, in whatever way this batch's turn is."""
        self._batches += 1
        if self._batches == 2 and not self.refused:
            self._record(model, steps)
        if self._steps is not None:
            for graph in self._steps:
                graph.replay()
            return
        for step in steps:
            if self._batches > 1 or self.refused:
                step()
                continue
            with _modules_of(model) as running, _Watch(running) as watch:
                step()
            if watch.found:
                self._refuse(watch.found)

    def _record(self, model: nn.Module, steps: list[Callable[[], None]]) -> None:
        graphs = []
        with _modules_of(model) as running:
            try:
                for step in steps:
                    graphs.append(self._new())
                    with _without_autocast_cache():
                        graphs[-1].record(step)
            except Exception as error:  # noqa: BLE001 (whatever a module does that a graph cannot hold)
                message = str(error).split("\n", 1)[0]
                self._refuse(f"{running.name} cannot be recorded: {type(error).__name__}: {message}")
                return
        self._steps = graphs

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        logger.warning("rollouts are decoded without CUDA graphs: %s", reason)


# Model -> why it cannot be recorded, so that it is said once.
_said: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def is_recordable(model: nn.Module, device: torch.device) -> bool:
    """Whether to try; says why not, by name, the first time."""
    reason = why_not(model, device)
    if reason and _said.get(model) != reason:
        _said[model] = reason
        logger.warning("rollouts are decoded without CUDA graphs: %s", reason)
    return not reason


def why_not(model: nn.Module, device: torch.device) -> str:
    """What of a model no graph can hold, as far as its modules and parameters tell; "" if nothing."""
    if device.type not in BACKENDS:
        return f"there are none on {device.type}"
    if select_impl("strided_attention_step", device, next(model.parameters()).dtype) in ("torch", "reference"):
        return "attention in PyTorch reads the layout on the host"
    for name, module in model.named_modules():
        if isinstance(module, (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)):
            return f"{name or 'the model'} is {type(module).__name__}, which talks to other ranks in its forward pass"
        if hasattr(module, "_hf_hook"):
            return f"{name or 'the model'} has a hook that moves its weights"
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            return f"{name} is divided among ranks"
        if parameter.device != device:
            return f"{name} is on {parameter.device}, the rollouts on {device}"
    return ""


def fingerprint(model: nn.Module, layout: StridedLayout) -> tuple[object, ...]:
    """What must be as it was when a step was recorded: sizes, addresses of the weights, autocast, adapters."""
    device_type = layout.device.type
    sizes = (layout.batch_size, layout.length, layout.num_anchors, layout.samples, layout.horizon, layout.device)
    weights = tuple(x.data_ptr() for x in (*model.parameters(), *model.buffers()))
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    adapters = tuple(
        (module.disable_adapters, tuple(module.active_adapters))
        for module in model.modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)  # of PEFT; transformers has such a method
    )
    return sizes, weights, autocast, adapters


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Casts of weights that autocast keeps would be left out of a graph, or be gone when it is replayed."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _Running:
    """The innermost module whose forward is running, by name; after an error the one in which it was raised."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name or "the model" for name, module in model.named_modules()}
        self._stack: list[str] = []

    @property
    def name(self) -> str:
        return self._stack[-1] if self._stack else "the sampler"

    def enter(self, module: nn.Module, _args: object) -> None:
        self._stack.append(self._names.get(module, type(module).__name__))

    def leave(self, _module: nn.Module, _args: object, _output: object) -> None:
        self._stack.pop()


@contextmanager
def _modules_of(model: nn.Module) -> Iterator[_Running]:
    running = _Running(model)
    handles = (register_module_forward_pre_hook(running.enter), register_module_forward_hook(running.leave))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


# Ops whose results the host needs, or whose output has a size that only the device knows.
_WAITING = frozenset(
    f"aten::{name}"
    for name in ("_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "_unique2")
    + ("unique_dim", "unique_consecutive", "bincount", "histc", "repeat_interleave")
)


class _Watch(TorchDispatchMode):
    """Notes the first op that the host waits for, and in which module."""

    def __init__(self, running: _Running) -> None:
        super().__init__()
        self._running, self.found = running, ""

    def __torch_dispatch__(
        self, op: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one op."""
        out = op(*args, **(kwargs or {}))
        if not self.found and _waits(op, args, out):
            self.found = f"{self._running.name} waits for the device ({op.name()})"
        return out


def _waits(op: Any, args: tuple[Any, ...], out: Any) -> bool:
    name = op._schema.name
    if name in _WAITING:
        return name != "aten::repeat_interleave" or op._overloadname == "Tensor"
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name in ("aten::_to_copy", "aten::copy_"):
        return len({x.device.type for x in (*tree_leaves(args), out) if isinstance(x, Tensor)}) > 1
    return False
