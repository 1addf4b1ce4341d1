"""Every kernel timed at the shapes of real models, beside others that compute the same and what it needs at least."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import ebft_kernels
from ebft_kernels import StridedLayout, _triton
from ebft_trainer import hardware

from .. import _cases
from ..__main__ import prepared
from .._attention_cost import KernelCost, attention_costs, needed_step_pairs
from .._log_probs_cost import ROWS, log_probs_costs
from .._memory_cost import PASSES
from .._targets import GPUS
from ..baselines import attention as baselines
from ..baselines import features
from ..measure import cache_bytes, side_stream
from ..problems import FLEX, SDPA, SDPA_PER_SAMPLE, Contestant, attention_contestants
from ..shapes import ModelShape
from .job import Job

OURS, FLASH, FULL_LOGITS = "ebft-kernels", "causal flash SDPA, equal pairs", "full logits"
#: Seconds that compiling FlexAttention may take.
_FLEX_SECONDS = 25.0


def run(job: Job, *, once: bool = False) -> None:
    """Time everything; with ``once`` call it once, which leaves what it compiled to the processes that come after."""
    with side_stream(job.device), _flex_as_it_can_run(job):
        for model in job.models():
            for measure in (_attention, _attention_step, _memory_bound, _log_probs):
                with job.attempt(f"{model.name}: {measure.__name__.strip('_')}", needs=3) as enough:
                    if enough:
                        measure(job, model, once)


def compile_all(job: Job) -> None:
    """Compile all that is timed later."""
    run(job, once=True)


def accelerator(device: torch.device) -> hardware.Device | None:
    """The data sheet of the GPU; None: there is none for it. A rehearsal takes some."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "H100"
    known = (x for x in hardware.GPUS.values() if torch.float64 in x.rates)
    return next((x for x in known if x.name.split()[0] in name), None)


def _flex_as_it_can_run(job: Job):
    """Compiled on a GPU; a rehearsal takes it as it is, since it takes minutes to compile on a CPU."""
    if job.on_gpu("FlexAttention, compiled, and its backward pass"):
        return mock.patch.object(baselines, "compiled_flex", baselines.compiled_flex)
    return mock.patch.object(baselines, "compiled_flex", lambda: flex_attention)


def _least(job: Job, *costs: KernelCost) -> float | None:
    """Seconds by the data sheet, one kernel after the other."""
    sheet = accelerator(job.device)
    return sheet and sum(sheet.microseconds(operations=x.operations, moved=x.moved) for x in costs) / 1e6


def _costs(job: Job, model: ModelShape) -> dict[str, KernelCost]:
    arch = _triton.target_of(job.device).arch
    costs = attention_costs(model, job.geometry.layout(), GPUS.get(arch, GPUS["sm_90"]))
    return {cost.name: cost for cost in costs}


def _sets(job: Job, make: Callable[[], object], size: int) -> list:
    """So many inputs of ``size`` bytes, but at most 16, that a cache has forgotten one when it is used again."""
    return [make() for _ in range(min(max(1, -(-2 * cache_bytes(job.device) // size)), 16))]


def _contestants(layout: StridedLayout) -> dict[str, Contestant]:
    others = attention_contestants(layout, torch.bfloat16)
    rows = round(math.sqrt(2 * layout.visible_pairs() / layout.batch_size))  # a triangle of so many has as many pairs

    def shorter(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.randn(*x.shape[:2], rows, x.shape[3], dtype=x.dtype, device=x.device) for x in inputs)

    return {
        OURS: Contestant(lambda q, k, v: ebft_kernels.strided_attention(q, k, v, layout, impl="triton")),
        FLASH: Contestant(baselines.sdpa_causal, prepare=shorter, exact=False),
        **{name: others[name] for name in (FLEX, SDPA, SDPA_PER_SAMPLE)},
    }


def _attention(job: Job, model: ModelShape, once: bool) -> None:
    layout, costs = job.geometry.layout().to(job.device), _costs(job, model)
    size = (layout.packed_length, model.head_dim)
    heads = (model.heads, model.kv_heads, model.kv_heads)

    def make() -> tuple[Tensor, ...]:
        options = {"dtype": torch.bfloat16, "device": job.device}
        return tuple(torch.randn(layout.batch_size, x, *size, **options) for x in heads)

    sets = _sets(job, make, 2 * layout.batch_size * sum(heads) * math.prod(size))
    predicted = {
        "forward": _least(job, costs["strided_attention_fwd_kernel"]),
        "backward": _least(job, *(costs[f"strided_attention_{x}_kernel"] for x in ("dq", "dkdv"))),
    }
    visible = layout.visible_pairs()
    for name, contestant in _contestants(layout).items():
        needs = _FLEX_SECONDS if name == FLEX else 2.0
        for direction in ("forward", "backward") if contestant.differentiable else ("forward",):
            about = {"model": model.name, "op": "strided_attention", "direction": direction, "who": name}
            with job.attempt(f"{model.name} attention {direction}, {name}", needs=needs) as enough:
                if not enough:
                    continue
                runs = [prepared(contestant, x, direction) for x in sets]
                pairs = visible
                if name == FLASH:
                    rows = round(math.sqrt(2 * visible / layout.batch_size))
                    pairs = layout.batch_size * rows * (rows + 1) // 2
                work = pairs * model.heads * 4 * model.head_dim * (1.0 if direction == "forward" else 2.5)
                _write(job, runs, once, **about, work=work, unit="FLOP", predicted=predicted[direction])
                if name == OURS and not once:
                    _by_kernel(job, runs, costs, about)


def _by_kernel(
    job: Job, runs: Sequence[Callable[[], object]], costs: Mapping[str, KernelCost], about: Mapping[str, object]
) -> None:
    """Each kernel of a pass by itself, all launches of one name together."""
    for name, calls in _launches(job, runs).items():
        cost = costs.get(name)
        work = {} if cost is None else {"work": cost.operations, "unit": "FLOP", "predicted": _least(job, cost)}
        job.write("time", **{**about, "kernel": name}, **work, **job.time(calls))


def _launches(job: Job, runs: Sequence[Callable[[], object]]) -> dict[str, list[Callable[[], None]]]:
    """Kernel -> for each run the launches that it makes, ready to be made again. The first run has compiled them."""
    found: dict[str, list[Callable[[], None]]] = {}
    for run_once in runs:
        launches: dict[str, list[Callable[[], None]]] = {}

        def launcher(kernel, grid, args, options, launches=launches):
            def launch() -> None:
                kernel[grid](*args, **options)

            launch()
            launches.setdefault(kernel.__name__, []).append(launch)

        with _triton.assume(_triton.target_of(job.device), launcher=launcher):
            run_once()
        for name, parts in launches.items():
            found.setdefault(name, []).append(lambda parts=parts: [launch() for launch in parts])
    return found


def _attention_step(job: Job, model: ModelShape, once: bool) -> None:
    """The last step, whose rows see the most."""
    rows, step = job.geometry.layout(), job.geometry.horizon - 1
    layout, costs = rows.to(job.device), _costs(job, model)
    cost = costs["strided_attention_step_kernel"]
    calls = _sets(job, lambda: _cases.attention_step(model, layout, torch.bfloat16), cost.moved)
    about = {"model": model.name, "op": "strided_attention_step", "direction": "forward", "who": OURS}
    work = needed_step_pairs(rows, step) * model.heads * 4 * model.head_dim
    predicted = _least(job, cost)
    runs = [call.forward for call in calls]
    _write(job, runs, once, **about, work=work, unit="FLOP", bytes=cost.moved, predicted=predicted)
    if not once:
        _by_kernel(job, runs, costs, about)


def _memory_bound(job: Job, model: ModelShape, once: bool) -> None:
    """The whole op, and its kernels alone: around them it prepares indices, and allocates."""
    rows = job.geometry.layout()
    layout, sheet = rows.to(job.device), accelerator(job.device)
    for name, one in PASSES.items():
        with job.attempt(f"{model.name} {name}", needs=1.5) as enough:
            if not enough:
                continue
            needed, double = one.needed(model, rows), one.double_operations(model, rows)
            predicted = sheet and sheet.microseconds(moved=needed, double_operations=double) / 1e6
            calls = _sets(job, lambda one=one: one.call(model, layout), needed)
            runs = [_backward(call) if one.backward else torch.no_grad()(call.forward) for call in calls]
            about = {"model": model.name, "op": name, "who": OURS, "bytes": needed, "predicted": predicted}
            for run_once in runs if once else ():
                run_once()
            if not once:
                whole = job.time(runs)
                alone = [
                    lambda parts=parts: [launch() for launch in parts]
                    for parts in zip(*_launches(job, runs).values(), strict=True)
                ]
                job.write("time", **about, **whole, kernel_seconds=job.time(alone)["median"])


def _backward(call: _cases.Call) -> Callable[[], object]:
    outputs = call.forward()
    inputs, upstream = _cases.leaves(outputs), [torch.randn_like(out) for out in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


def _log_probs(job: Job, model: ModelShape, once: bool) -> None:
    """As many rows as the rollouts of one prompt have tokens."""
    count = 40 if job.rehearsal else ROWS
    targets = torch.arange(count, device=job.device) * 7919 % model.vocab
    options = {"dtype": torch.bfloat16, "device": job.device}
    hidden = torch.randn(count, model.hidden, **options)
    weight = torch.randn(model.vocab, model.hidden, **options) * model.hidden**-0.5
    cost = next(x for x in log_probs_costs(model, count) if x.how == "large tiles, one kernel per pass")
    for name, contestant in _log_probs_contestants(targets):
        for direction in ("forward", "forward+backward") if contestant.exact else ("forward+backward",):
            with job.attempt(f"{model.name} log-probabilities {direction}, {name}", needs=2.0) as enough:
                if not enough:
                    continue
                about = {"model": model.name, "op": "linear_log_probs", "direction": direction, "who": name}
                runs = [prepared(contestant, (hidden, weight), direction)]
                both = direction != "forward"
                work = 2 * count * model.vocab * model.hidden * (3 if both else 1)
                _write(job, runs, once, **about, work=work, unit="FLOP", predicted=cost.seconds if both else None)


def _log_probs_contestants(targets: Tensor) -> Iterator[tuple[str, Contestant]]:
    """The fused losses of other libraries are taken where they are installed; they differentiate on the way forward."""
    for impl in ("triton", "torch"):
        name = OURS if impl == "triton" else f"{OURS}, impl={impl!r}"
        run_impl = lambda h, w, impl=impl: ebft_kernels.linear_log_probs(h, w, targets, impl=impl)  # noqa: E731
        yield name, Contestant(run_impl)
    yield FULL_LOGITS, Contestant(lambda h, w: features.full_log_probs(h, w, targets))
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        yield "Liger fused linear cross-entropy", Contestant(lambda h, w: loss(w, h, targets), exact=False)
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        run_cce = lambda h, w: linear_cross_entropy(h, w, targets, reduction="none")  # noqa: E731
        yield "cut-cross-entropy", Contestant(run_cce, exact=False)


def _write(job: Job, runs: Sequence[Callable[[], object]], once: bool, **about: object) -> None:
    timing = job.time(runs, once=once)
    if not once:
        job.write("time", **about, **timing)
