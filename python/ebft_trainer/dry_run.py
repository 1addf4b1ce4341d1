"""One optimizer step on the meta device: what it holds and does, found by running the step's own code without data.

A tensor on torch's meta device has a shape, a dtype and a storage with a size, but no memory. Running the model there
keeps exactly the tensors that a real step keeps, for as long, whatever the architecture; a dispatch mode adds them up,
and the formulas of torch's FlopCounterMode count the products. (Not that mode itself: its hooks on modules keep tensors
alive, half as many again under checkpointing.) What the project's own ops compute and hold inside them is not seen,
since they are one op each: `_OPERATIONS` and `_WORKSPACE` have it.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ebft_kernels import StridedLayout, feature_matching, linear_log_probs, select_impl
from ebft_kernels.integrations.transformers import StridedCache, hidden_states
from ebft_kernels.logprob._tiled import tile_shape

from .config import EBFTOptions
from .features import FeatureNetwork
from .rollout import draws_by, tile_rows

#: "whole_response": reinforcement learning on whole responses, not the trainer's objective "rlvr" of strided rollouts.
OBJECTIVES = ("ebft", "sft", "whole_response")
WEIGHTS, FEATURE_NETWORK, GRADIENTS, OPTIMIZER = "weights", "feature network", "gradients", "optimizer states"
CACHE, ACTIVATIONS, WORKSPACE = "rollouts' keys and values", "activations", "workspace"
PARTS = (WEIGHTS, FEATURE_NETWORK, OPTIMIZER, GRADIENTS, CACHE, ACTIVATIONS, WORKSPACE)
#: Kind -> what is counted as it.
OPERATIONS = {
    "linear": "2 x rows x columns x depth of every product of the model, as torch's FlopCounterMode counts them",
    "head": "2 x head rows x V x C x passes",
    "attention": "2 x heads x (D + Dv) x visible pairs of a query and a key, 5/2 of it in the backward pass",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does in one optimizer step.

    Attributes:
        objective: "ebft"; "sft": cross-entropy on the rows; "whole_response": ``samples`` whole responses to each row's
            first ``prompt_tokens`` tokens, as long as the rest of the row, scored in one pass; the verifier is free.
        batch: rows.
        length: tokens per row.
        options: the method's.
        prompt_tokens: of the rows with whole responses.
        checkpointing: whether only the blocks' inputs are kept for the backward pass.
    """

    objective: str = "ebft"
    batch: int
    length: int
    options: EBFTOptions
    prompt_tokens: int
    checkpointing: bool = False

    def layout(self) -> StridedLayout:
        """The packed rows, on the CPU."""
        options = self.options
        if self.objective == "whole_response":
            anchors = torch.full((self.batch, 1), self.prompt_tokens)
            horizon = self.length - self.prompt_tokens
            return StridedLayout.from_anchors(anchors, self.prompt_tokens, horizon=horizon, samples=options.samples)
        geometry = {name: getattr(options, name) for name in ("context", "stride", "horizon", "samples")}
        layout = StridedLayout.strided(self.batch, self.length, **geometry)
        return layout.prompt_only() if self.objective == "sft" else layout


@dataclass
class Phase:
    """One phase of a step.

    Attributes:
        times: how often it runs in a step.
        rows: token rows that run through the model's blocks, all times together.
        operations: kind -> floating-point operations, all times together, by `OPERATIONS`.
        peak: part -> bytes at the moment when most is held.
        ops: that read or write memory, once.
        traffic: bytes of their inputs and outputs, once.
    """

    times: int = 1
    rows: int = 0
    operations: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(OPERATIONS, 0)))
    peak: Counter[str] = field(default_factory=Counter)
    ops: int = 0
    traffic: int = 0

    @property
    def bytes(self) -> int:
        """Held at the peak."""
        return self.peak.total()


@dataclass
class DryRun:
    """What one step of a job holds and does.

    Attributes:
        phases: in their order, by name.
        saved: bytes that the policy's forward pass keeps for the backward pass.
    """

    phases: dict[str, Phase]
    saved: int


def dry_run(model: nn.Module, feature_network: FeatureNetwork | None, job: Job, *, on_cpu: bool) -> DryRun:
    """Run one step of ``job`` with AdamW, whose states exist already.

    Args:
        model: a transformers causal language model on the meta device, or a PEFT model around one.
        feature_network: made from it; None unless the objective is "ebft".
        job: what to do.
        on_cpu: whether the ops' workspace is that of their CPU implementations or of those on a GPU.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fixed = {
        WEIGHTS: sum(x.nbytes for x in (*model.parameters(), *model.buffers())),
        OPTIMIZER: 2 * sum(x.nbytes for x in trained),
    }
    ledger = _Ledger(job.batch, on_cpu)
    ledger.keep(model)
    if feature_network is not None:
        ledger.keep(feature_network)
        own = (*feature_network.parameters(), *feature_network.buffers())
        fixed[FEATURE_NETWORK] = sum(x.nbytes for x in own)
    rows = _rows_of(job)
    with ledger:
        kept: list[object] = []
        if job.objective != "sft":
            cache = _run_rollouts(ledger, model, rows, job.options)
            if job.options.cuda_graphs and rows.meta.horizon > 1 and not on_cpu:
                # What recorded steps read and write stays.
                kept.append(cache)
                count = rows.meta.batch_size * rows.meta.num_anchors * rows.meta.samples
                head = model.get_output_embeddings().weight
                fixed[WORKSPACE] = _sampling_workspace(on_cpu, count, head, job.options)
            del cache
        if feature_network is not None:
            with ledger.phase("features", rows.whole.visible_pairs):
                features = feature_network(ledger.tokens(rows.meta.packed_length), rows.meta)
                kept += feature_matching(*features, whitening=job.options.whitening, groups=feature_network.groups)
                del features
        saved = _run_policy(ledger, model, rows, job, trained)
    for phase in ledger.phases.values():
        phase.peak.update(fixed)
    return DryRun(ledger.phases, saved)


class _Rows(NamedTuple):
    """Packed rows on the meta device, to be run; on the CPU, to count pairs: whole, without rollouts, as scored."""

    meta: StridedLayout
    whole: StridedLayout
    prompt: StridedLayout
    scored: StridedLayout


def _rows_of(job: Job) -> _Rows:
    layout = job.layout()
    return _Rows(layout.to("meta"), layout, layout.prompt_only(), _scored(layout, job))


def _scored(layout: StridedLayout, job: Job) -> StridedLayout:
    return layout if job.objective == "sft" else layout.without_last_step()


@torch.no_grad()
def _run_rollouts(ledger: _Ledger, model: nn.Module, rows: _Rows, options: EBFTOptions) -> StridedCache:
    """As `sample_rollouts`, with one decoding step for all: each needs the same memory."""
    model.eval()
    layout, steps = rows.meta, rows.meta.horizon - 1
    with ledger.phase("rollout: prompt", rows.prompt.visible_pairs):
        cache = StridedCache(layout)
        hidden = layout.anchor_rows(hidden_states(model, ledger.tokens(layout.length), layout, cache=cache))
        ledger.tag(CACHE, *(x for layer in cache.layers for x in (layer.keys, layer.values)))
        _sample(ledger, hidden, model.get_output_embeddings().weight, options)
    if not steps:
        return cache
    pairs = lambda window: rows.scored.visible_pairs(window) - rows.prompt.visible_pairs(window)  # noqa: E731
    with ledger.phase("rollout: steps", pairs, times=steps):
        tokens = ledger.tokens(layout.num_anchors * layout.samples)
        hidden = hidden_states(model, tokens, layout, cache=cache, step=steps - 1)
        _sample(ledger, hidden, model.get_output_embeddings().weight, options)
    return cache


def _sample(ledger: _Ledger, hidden: Tensor, head: Tensor, options: EBFTOptions) -> None:
    """The head's products for a tile of rows, and their logits."""
    count = hidden[..., 0].numel()
    ledger.now.operations["head"] += 2 * ledger.now.times * count * head.numel()
    ledger.transient(_sampling_workspace(ledger.on_cpu, count, head, options))


def _sampling_workspace(on_cpu: bool, rows: int, head: Tensor, options: EBFTOptions) -> int:
    """Bytes for the logits of a tile of rows; kernels need none beside them but statistics of blocks of tokens. In
    PyTorch they become their probabilities, and greedy rollouts have all log-probabilities beside them."""
    vocabulary, narrow, wide = head.shape[0], head.dtype.itemsize, max(4, head.dtype.itemsize)
    if on_cpu:
        impl = draws_by(options, "cpu", head.dtype)
    else:
        impl = "torch" if head.dtype == torch.float64 else "triton"
    numbers = min(rows, tile_rows(rows, vocabulary, impl, narrow, "cpu" if on_cpu else "cuda")) * vocabulary
    if impl == "triton" or (impl == "native" and head.dtype != torch.float16):
        return numbers * narrow
    return numbers * (wide + (narrow if narrow < wide else 0) + (0 if options.temperature else wide))


def _run_policy(ledger: _Ledger, model: nn.Module, rows: _Rows, job: Job, trained: list[nn.Parameter]) -> int:
    """The policy's forward pass, its log-probabilities and the backward pass; returns the bytes that are saved."""
    model.train()
    head = model.get_output_embeddings().weight
    before = ledger.held
    with ledger.phase("policy", rows.scored.visible_pairs) as forward:
        short = _scored(rows.meta, job)
        hidden = hidden_states(model, ledger.tokens(short.packed_length), short)
        scored = []
        if job.objective != "sft":
            scored.append(rows.meta.distinct_predictors(hidden))
        if job.objective == "sft" or (job.objective == "ebft" and job.options.ce_coef > 0):
            scored.append((hidden[:, : short.length - 1], None))
        del hidden
        loss = sum(_score(x, head, index, _softcap(model)).mean() for x, index in scored)
        del scored
    saved = ledger.held - before
    hooks = [x.register_post_accumulate_grad_hook(lambda x: ledger.tag(GRADIENTS, x.grad)) for x in trained]
    with ledger.phase("backward", rows.scored.visible_pairs) as phase:
        phase.rows = forward.rows * job.checkpointing
        loss.backward()
    with ledger.phase("optimizer") as phase:  # one fused op: reads weights, gradients, states, writes all but gradients
        phase.ops, phase.traffic = 1, 7 * sum(x.nbytes for x in trained)
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    return saved


def _score(hidden: Tensor, head: Tensor, index: Tensor | None, softcap: float | None) -> Tensor:
    targets = torch.zeros_like(hidden[..., 0] if index is None else index, dtype=torch.int64)
    return linear_log_probs(hidden, head, targets, rows=index, softcap=softcap)


def _softcap(model: nn.Module) -> float | None:
    """Bound of the logits; `output_head` checks it against the model's own logits, which have no values here."""
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    return next((value for value in found if value), None)


class _Ledger(TorchDispatchMode):
    """Bytes of every storage that is alive, by part, and their highest sum in each phase."""

    def __init__(self, batch: int, on_cpu: bool) -> None:
        super().__init__()
        self.phases: dict[str, Phase] = {}
        self.batch, self.on_cpu = batch, on_cpu
        self.now = Phase()
        self._parts: Counter[str] = Counter()
        self._storages: dict[int, tuple[str, int]] = {}
        self._known: set[int] = set()

    @property
    def held(self) -> int:
        """Bytes now, without what was there before the step."""
        return self._parts.total()

    def keep(self, module: nn.Module) -> None:
        """Leave out what is there before the step."""
        self._known.update(_storage(x)._cdata for x in (*module.parameters(), *module.buffers()))

    @contextmanager
    def phase(
        self, name: str, pairs: Callable[[int | None], int] = lambda _window: 0, *, times: int = 1
    ) -> Iterator[Phase]:
        """What follows is this phase, in which attention sees so many pairs, all ``times`` together."""
        phase = self.now = self.phases[name] = Phase(times, peak=+self._parts)
        self._pairs = functools.cache(pairs)
        yield phase

    def tokens(self, count: int) -> Tensor:
        """[B, count], to be run through the model."""
        self.now.rows += self.batch * count * self.now.times
        return torch.zeros(self.batch, count, dtype=torch.int64, device="meta")

    def tag(self, part: str, *tensors: Tensor) -> None:
        """Count the storages of ``tensors`` to ``part`` from now on, and in the peak of the current phase."""
        for x in tensors:
            before, size = self._storages[_storage(x)._cdata]
            self._storages[_storage(x)._cdata] = part, size
            for parts in (self._parts, self.now.peak):
                parts[before] -= size
                parts[part] += size

    def transient(self, size: int) -> None:
        """``size`` bytes are held for a moment."""
        if self.held + size > self.now.bytes:
            self.now.peak = self._parts + Counter({WORKSPACE: size})

    def __torch_dispatch__(
        self, op: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one op and enter its outputs."""
        out = op(*args, **(kwargs or {}))
        name = op.name().removeprefix("ebft_kernels::")
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in outputs:
            self._enter(_storage(x))
        if not op.is_view:
            self.now.ops += 1
            tensors = (*outputs, *(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)))
            self.now.traffic += sum(min(x.nbytes, _storage(x).nbytes()) for x in tensors)
            self._count(op, name, out, args, kwargs or {})
        self.transient(_WORKSPACE[name](self.on_cpu, *args) if name in _WORKSPACE else 0)
        return out

    def _count(self, op: Any, name: str, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the operations of one op."""
        operations, times = self.now.operations, self.now.times
        if name in _OPERATIONS:
            operations["head"] += times * _OPERATIONS[name](*args)
        elif name in _WINDOW:
            q, v = (args[1], args[3]) if name.endswith("backward") else (args[0], args[2])
            once = 2 * q.shape[1] * (q.shape[3] + v.shape[3]) * self._pairs(args[_WINDOW[name]])
            operations["attention"] += once * 5 // 2 if name.endswith("backward") else once
        elif name == "aten::_grouped_mm":  # each row with one expert, in the weights' gradient each column
            operations["linear"] += times * 2 * args[0].numel() * args[1].shape[-1]
        elif op.overloadpacket in flop_registry:
            operations["linear"] += times * flop_registry[op.overloadpacket](*args, **kwargs, out_val=out)

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._storages[key] = ACTIVATIONS, size
            self._parts[ACTIVATIONS] += size
            weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self._known.discard(key)
        self._parts[part] -= size


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()


def _log_probs(on_cpu: bool, hidden: Tensor, weight: Tensor, *rest: Any) -> int:
    """A tile of the logits in the model's dtype and, where PyTorch does the softmax, in that of sums."""
    rows, columns, sum_bytes = _tile(on_cpu, hidden, weight, rest[-2])
    widened = 0 if _fused(on_cpu, hidden) or hidden.dtype.itemsize >= 4 else sum_bytes
    return rows * columns * (hidden.dtype.itemsize + widened)


def _log_probs_backward(
    on_cpu: bool, _grad: Tensor, _statistics: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> int:
    """A tile, and the gradients that are summed in another dtype than they are returned in.

    With a soft cap in PyTorch, its derivative at the tile beside the square of its value.
    """
    rows, columns, sum_bytes = _tile(on_cpu, hidden, weight, rest[-2])
    total = _log_probs(on_cpu, hidden, weight, *rest)
    if rest[5] is not None and not _fused(on_cpu, hidden):
        total += 2 * rows * columns * sum_bytes
    if hidden.dtype.itemsize < 4:
        needs_hidden, needs_weight = rest[3][:2]
        total += sum_bytes * hidden.numel() * (needs_hidden and columns < weight.shape[0])
        total += sum_bytes * weight.numel() * (needs_weight and rows < hidden.shape[0])
    return total


def _fused(on_cpu: bool, hidden: Tensor) -> bool:
    """Whether kernels do the softmax of log-probabilities, in place: on a GPU Triton's, which are not for float64."""
    return _native("linear_log_probs", hidden) if on_cpu else hidden.dtype != torch.float64


def _tile(on_cpu: bool, hidden: Tensor, weight: Tensor, chunk_size: int | None) -> tuple[int, int, int]:
    """Rows and columns of a tile of the logits, and the bytes of a number in sums over it."""
    sum_bytes = max(4, hidden.dtype.itemsize)
    shape = tile_shape(hidden.shape[0], weight.shape[0], sum_bytes, chunk_size, "cpu" if on_cpu else "cuda")
    return *shape, sum_bytes


def _attention(on_cpu: bool, q: Tensor, k: Tensor, v: Tensor, _sinks: Any, *ranges_and_options: Any) -> int:
    """On the CPU the prompt's keys and values, laid out for products."""
    if not on_cpu:
        return 0
    if not _native("strided_attention", q):
        return 4 * q.numel()  # queries with the heads that share keys side by side
    length = ranges_and_options[3]
    return 4 * math.prod(k.shape[:2]) * _padded(length) * (_padded(k.shape[3]) + _padded(v.shape[3]))


def _attention_backward(
    on_cpu: bool, _grad: Tensor, q: Tensor, k: Tensor, v: Tensor, _sinks: Any, _out: Tensor, _lse: Tensor, *rest: Any
) -> int:
    """The same with the keys twice, and their gradients by parts; on a GPU one float32 per row and head."""
    if not on_cpu:
        return 4 * math.prod(q.shape[:3])
    if not _native("strided_attention", q):
        return 4 * 4 * q.numel()  # of queries, outputs and their gradients
    length, heads, keys, values = rest[3], math.prod(k.shape[:2]), _padded(k.shape[3]), _padded(v.shape[3])
    parts = max(1, _PARTS // heads)
    return 4 * heads * (_padded(length) * (2 * keys + values) + parts * length * (keys + values))


def _native(op: str, x: Tensor) -> bool:
    """Whether the compiled code runs ``op`` on tensors like this on a CPU."""
    return select_impl(op, "cpu", x.dtype) == "native"


def _padded(size: int) -> int:
    return -(-size // _PANEL) * _PANEL


# Of the compiled attention: sizes are multiples of the first, the prompt's keys have about so many sums of gradients.
_PANEL, _PARTS = 32, 16
# Op -> its products: of the logits, which the backward pass computes again, and of the gradients that are needed.
_OPERATIONS: dict[str, Callable[..., int]] = {
    "linear_log_probs": lambda hidden, weight, *_: 2 * hidden.shape[0] * weight.numel(),
    "linear_log_probs_backward": lambda _grad, _statistics, hidden, weight, _targets, _rows, _bias, needs, *_: (
        2 * hidden.shape[0] * weight.numel() * (1 + sum(needs[:2]))
    ),
}
# Op -> the place of its sliding window.
_WINDOW = {"strided_attention": 12, "strided_attention_step": 13, "strided_attention_backward": 15}
# Op -> what it holds besides its inputs and outputs, in bytes, from whether it runs on a CPU and its arguments.
_WORKSPACE: dict[str, Callable[..., int]] = {
    "linear_log_probs": _log_probs,
    "linear_log_probs_backward": _log_probs_backward,
    "strided_attention": _attention,
    "strided_attention_step": _attention,
    "strided_attention_backward": _attention_backward,
}
