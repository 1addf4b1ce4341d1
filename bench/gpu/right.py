"""Whether every kernel computes the right numbers on this GPU, in the same order twice, in a graph, without waiting.

Parts run beside each other, each in a process of its own: most of their time is the compiler's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ebft_kernels
from ebft_kernels import StridedLayout, _self_test, diagnostics, strided_attention, strided_attention_step
from ebft_kernels._dispatch import OPS, why_not
from ebft_kernels.testing import attention_inputs, eager_attention, error_budget, randn

from ..measure import side_stream, synchronize
from . import kernels, large
from .job import Job, Task, run_beside

ROOT = Path(__file__).resolve().parents[2]
#: Folders and files of tests that are run on CUDA tensors.
TESTS = (
    "tests/attention",
    "tests/pooling",
    "tests/matching",
    "tests/logprob",
    "tests/native/test_cuda_module.py",
    "tests/test_layout.py",
)
#: Query and key heads and their size, of real models.
HEADS = ((12, 2, 128), (32, 8, 64), (32, 8, 128), (24, 8, 128))
#: Of attention: what is special, the sizes of its heads, its options; see `_attention_layout` for the geometries.
VARIANTS: dict[str, dict[str, Any]] = {
    "documents": {"geometry": "documents"},
    "ragged rows": {"geometry": "ragged"},
    "window": {"geometry": "documents", "window": 100},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "full blocks": {"block": "full"},
    "all options": {"geometry": "ragged", "window": 37, "softcap": 1.5, "sinks": True, "block": "full"},
    "heads of 192 and 128": {"heads": (4, 4, 192, 128)},
    "heads of 64 and 128": {"heads": (8, 2, 64, 128)},
    "heads of 256": {"heads": (4, 1, 256)},
    "heads of 80": {"heads": (6, 2, 80)},
    "one head": {"heads": (1, 1, 40)},
    "n = 1": {"samples": 1},
    "n = 17": {"samples": 17},
}
_ATTENTION_OPTIONS = ("window", "softcap", "block")

Results = dict[str, Tensor]


def run(job: Job) -> None:
    """All parts, the longest first; so many at once as the GPU has memory for."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with such a setting
    run_beside(job, tasks(job), at_once=max(2, min(6, (os.cpu_count() or 2) // 2)))


def tasks(job: Job) -> list[Task]:
    """The parts; in a rehearsal one of each kind, since the interpreter takes seconds for each."""
    found = [
        Task("CUDA extension", _native),
        Task("compile what is timed later", kernels.compile_all),
        Task("self-test", _self_test_passes),
        *(Task(path, functools.partial(_pytest, path=path)) for path in (TESTS[2:4] if job.rehearsal else TESTS)),
    ]
    dtypes = _dtypes(job)
    for heads in HEADS[:1] if job.rehearsal else HEADS:
        for dtype in dtypes:
            name = f"attention {heads[0]}/{heads[1]}x{heads[2]} {_name(dtype)}"
            found.append(Task(name, functools.partial(_attention, variants={"": {"heads": heads}}, dtypes=[dtype])))
    names = ["all options"] if job.rehearsal else [*VARIANTS]
    for index in range(0, len(names), 4):
        some = {name: VARIANTS[name] for name in names[index : index + 4]}
        name = f"attention options {index // 4 + 1}"
        found.append(Task(name, functools.partial(_attention, variants=some, dtypes=dtypes[:1])))
    if not job.rehearsal:
        some = {name: VARIANTS[name] for name in ("documents", "all options")}
        name, float32 = "attention options float32", [torch.float32]
        found.append(Task(name, functools.partial(_attention, variants=some, dtypes=float32)))
        found.append(Task("matching n > 8", functools.partial(_matching, samples=range(9, 18))))
    return [
        *found,
        Task("matching", functools.partial(_matching, samples=range(1, 9))),
        Task("pooling", _pooling),
        Task("loss and log-probabilities", _loss_and_log_probs),
        Task("CUDA graphs", _graphs),
        Task("no waiting", _no_waiting),
        Task("second device", _second_device),
        Task("offsets beyond 2^31", large.run),
    ]


def _dtypes(job: Job) -> list[torch.dtype]:
    """The interpreter's bfloat16 products are wrong."""
    if job.on_gpu("kernels in bfloat16"):
        return [torch.bfloat16, torch.float16, torch.float32]
    return [torch.float16, torch.float32]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Parts that run what is there already.


def _self_test_passes(job: Job) -> None:
    some = diagnostics.cases
    if job.rehearsal:  # one case will do: there it takes the interpreter a minute
        some = lambda large: _self_test.cases(large=large)[8:10]  # noqa: E731
    with mock.patch.object(diagnostics, "cases", some):
        passed = ebft_kernels.self_test(device=job.device)
    job.write("check", case="ebft_kernels.self_test()", passed=passed, detail="see the log")


class _Recorder:
    """A plugin of pytest that writes down how each test ended."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One of the three phases of a test."""
        if report.when == "call" or report.outcome != "passed":
            if report.skipped:
                self.job.write("skipped", what=self.job.part, why=str(report.longrepr[-1]))
            else:
                detail = "" if report.passed else str(report.longrepr)[-1500:]
                self.job.write("check", case=report.nodeid, passed=report.passed, detail=detail)

    def pytest_collectreport(self, report: Any) -> None:
        """A file."""
        if report.failed:
            self.job.write("check", case=report.nodeid, passed=False, detail=str(report.longrepr)[-1500:])


def _pytest(job: Job, *, path: str) -> None:
    if importlib.util.find_spec("pytest") is None:
        job.write("skipped", what=path, why="pytest is not installed")
        return
    import pytest

    arguments = [path, "--device", job.device.type, "-q", "--tb=short", "-p", "no:xdist", "-p", "no:cacheprovider"]
    if not job.on_gpu(f"{path} on CUDA tensors"):
        arguments += ["-k", "mean_embedding_loss and repeat"] if "matching" in path else ["--collect-only"]
        for other in TESTS:
            job.on_gpu(f"{other} on CUDA tensors")
    os.chdir(ROOT)
    code = pytest.main(arguments, plugins=[_Recorder(job)])
    done = code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    if not done:
        job.write("check", case=path, passed=False, detail=f"pytest ended with {code!r}")


def _native(job: Job) -> None:
    """Compiled for this GPU alone into a folder, and there held to the cases that Triton's kernels are held to."""
    source, target = job.folder / "build" / "source", (job.folder / "build" / "target").resolve()
    shutil.rmtree(job.folder / "build", ignore_errors=True)
    for name in ("csrc", "ebft_kernels", "python"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wanted = {"EBFT_KERNELS_BUILD": "cuda", "EBFT_KERNELS_CUDA_ARCHITECTURES": "native"}
    if not job.on_gpu("the CUDA extension, compiled for the GPU at hand"):
        wanted = {"EBFT_KERNELS_BUILD": "none"}
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run(
        [*command, "--target", str(target), "."],
        cwd=source,
        env={**os.environ, **wanted},
        capture_output=True,
        text=True,
        timeout=max(job.left(), 1),
    )
    print(done.stdout, done.stderr)
    built = done.returncode == 0
    job.write("check", case="pip install", passed=built, detail="" if built else (done.stderr or done.stdout)[-1500:])
    if not built:
        return
    ebft_kernels.__path__.insert(0, str(target / "ebft_kernels"))
    if not job.rehearsal:
        reason = why_not("pool_features", "native", job.device)
        job.write("check", case="the module loads", passed=not reason, detail=reason)
    _pytest(job, path="tests/native/test_cuda_module.py")
    for part in (_self_test_passes, _pooling, _loss_and_log_probs, functools.partial(_matching, samples=(1, 4, 16))):
        if not job.rehearsal:  # it has nothing that is not rehearsed elsewhere
            part(job)


# Attention against plain PyTorch in float64, one key head after the other: all at once would not fit.


def _attention(job: Job, *, variants: dict[str, dict[str, Any]], dtypes: Sequence[torch.dtype]) -> None:
    for name, variant in variants.items():
        layout = _attention_layout(job, variant).to(job.device)
        for dtype in dtypes:
            case = ", ".join(x for x in (name, _name(dtype), f"S={layout.packed_length}") if x)
            with job.attempt(f"attention, {case}", needs=5) as enough:
                if enough:
                    _check_attention(job, case, layout, dtype, variant)


def _attention_layout(job: Job, variant: dict[str, Any]) -> StridedLayout:
    """At real shapes what a step of the method has, rows of 1024 tokens; else rows of a size that divides nothing."""
    geometry, samples = variant.get("geometry"), variant.get("samples", 4)
    real = len(variant) == 1 and "heads" in variant and tuple(variant["heads"]) in HEADS
    if job.rehearsal:
        sizes: dict[str, int] = {"length": 14, "context": 4, "stride": 5, "horizon": 3, "samples": min(samples, 2)}
    elif real:
        sizes = {"length": 1024, "context": 8, "stride": 8, "horizon": 8, "samples": 4}
    else:
        sizes = {"length": 523, "context": 5, "stride": 17, "horizon": 6, "samples": samples}
    length, extra = sizes["length"], {}
    if geometry == "ragged":
        extra["lengths"] = torch.tensor([length, length // 2, 0])
    if geometry == "documents":
        index = torch.arange(length)
        extra["document_ids"] = torch.stack([index * 0, index // 11 * 11 // 37, index // (length // 2 + 1)])
    return StridedLayout.strided(3 if geometry else 1, **sizes, **extra)


def _check_attention(job: Job, case: str, layout: StridedLayout, dtype: torch.dtype, variant: dict[str, Any]) -> None:
    heads, kv_heads, size, *value_size = variant.get("heads", (8, 2, 64))
    if job.rehearsal:
        heads, kv_heads, size, value_size = heads // kv_heads, 1, 16, [24] * len(value_size)
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": size, "value_dim": (value_size or [size])[0]}
    tensors = list(attention_inputs(layout, dtype=dtype, **sizes))
    if variant.get("sinks"):
        tensors.append(randn(heads, seed=3, dtype=dtype, device=job.device))
    options = {name: variant[name] for name in _ATTENTION_OPTIONS if name in variant}
    upstream = randn(*tensors[0].shape[:3], sizes["value_dim"], seed=4, dtype=dtype, device=job.device)

    def actual() -> Results:
        leaves = [x.detach().requires_grad_() for x in tensors]
        q, k, v, *sinks = leaves
        out = strided_attention(q, k, v, layout, sinks=sinks[0] if sinks else None, impl="triton", **options)
        return _named(out, torch.autograd.grad(out, leaves, upstream))

    ways = ["normalize first", "normalize last", "recomputed"]
    ways += ["fused"] * ("softcap" not in options and "sinks" not in variant)
    plain = functools.partial(_plain_attention, tensors, upstream, layout, kv_heads, options)
    truth = plain(torch.float64, "normalize first")
    eager = [plain(dtype, how) for how in ways]
    eager[2]["output"] = eager[0]["output"]  # of kernels that keep no weights only the gradients may round like this
    _compare(job, f"{case}: forward, backward", actual, truth, eager)
    if options.get("block") != "full":
        for step in sorted({0, layout.horizon - 1}):
            _check_step(job, f"{case}: step {step}", layout, step, tensors, options, truth, eager)


def _plain_attention(
    tensors: Sequence[Tensor],
    upstream: Tensor,
    layout: StridedLayout,
    kv_heads: int,
    options: dict[str, Any],
    dtype: torch.dtype,
    how: str,
) -> Results:
    mask = layout.dense_mask(options.get("window"), block=options.get("block", "causal"))
    scoring = {"scale": tensors[0].shape[3] ** -0.5, "softcap": options.get("softcap"), "how": how}
    parts = []
    for group in range(kv_heads):
        some = [x.chunk(kv_heads, 1)[group] for x in tensors[:3]] + [x.chunk(kv_heads)[group] for x in tensors[3:]]
        leaves = [x.detach().to(dtype).requires_grad_() for x in some]
        q, k, v, *sinks = leaves
        out = eager_attention(q, k, v, mask, sinks=sinks[0] if sinks else None, **scoring)
        grads = torch.autograd.grad(out, leaves, upstream.chunk(kv_heads, 1)[group].to(dtype))
        parts.append(_named(out, grads))
    return {name: torch.cat([part[name] for part in parts], int(parts[0][name].ndim > 1)) for name in parts[0]}


def _check_step(
    job: Job,
    case: str,
    layout: StridedLayout,
    step: int,
    tensors: Sequence[Tensor],
    options: dict[str, Any],
    truth: Results,
    eager: Sequence[Results],
) -> None:
    """Its rows are some of those of the whole attention; what later steps will write is NaN."""

    def rows(x: Tensor) -> Tensor:
        return layout.step_rows(x.transpose(1, 2), step).transpose(1, 2)

    q, k, v, *sinks = tensors
    k, v = (x.clone() for x in (k, v))
    for x in (k, v):
        for later in range(step + 1, layout.horizon):
            layout.step_rows(x.transpose(1, 2), later).fill_(float("nan"))
    given = {name: value for name, value in options.items() if name != "block"}
    given |= {"sinks": sinks[0] if sinks else None, "impl": "triton"}

    def actual() -> Results:
        return {"output": strided_attention_step(rows(q).contiguous(), k, v, layout, step, **given)}

    _compare(job, case, actual, {"output": rows(truth["output"])}, [{"output": rows(x["output"])} for x in eager])


def _named(out: Tensor, grads: Sequence[Tensor]) -> Results:
    names = ("gradient of q", "gradient of k", "gradient of v", "gradient of sinks")
    return {"output": out.detach()} | dict(zip(names, grads, strict=False))


def _compare(job: Job, case: str, actual: Callable[[], Results], truth: Results, eager: Sequence[Results]) -> None:
    """The result that comes closest to its budget, or furthest beyond; and that a second run gives the same bits."""
    first = actual()
    worst = ("", 0.0, 0.0, -1.0)
    for name, x in first.items():
        if x.shape != truth[name].shape:
            job.write("check", case=case, passed=False, detail=f"{name}: {x.shape}, expected {truth[name].shape}")
            return
        error = float((x.double() - truth[name].double()).abs().max()) if x.numel() else 0.0
        budget = max(error_budget(way[name], truth[name], x.dtype) for way in eager)
        share = float("inf") if not error <= budget else error / budget if budget else 0.0
        worst = max(worst, (name, error, budget, share), key=lambda row: row[3])
    second = actual()
    same = all(torch.equal(first[name], second[name]) for name in first)
    name, error, budget, share = worst
    finite = share <= 1
    detail = name + ("" if same or not finite else ": another run gives other bits")
    job.write("check", case=case, passed=finite and same, error=error, budget=budget, detail=detail)


# The other ops: the reference in float64, on this device, and in the same dtype.


def _check_case(job: Job, case: _self_test.Case, dtype: torch.dtype, about: str = "") -> None:
    op = case.op if case.op in OPS else "pool_features"
    for impl in ("triton", "native"):
        if why_not(op, impl, job.device, dtype, case.sizes):
            continue
        name = ", ".join(x for x in (case.op, case.name, about, _name(dtype), impl) if x)
        with job.attempt(name, needs=3) as enough:
            if not enough:
                continue
            inputs = {name: x.to(job.device, dtype) for name, x in case.inputs().items()}

            def at(wanted: torch.dtype, impl: str, inputs: dict[str, Tensor] = inputs) -> Results:
                return case.run({name: x.to(wanted, copy=True).requires_grad_() for name, x in inputs.items()}, impl)

            if case.eager is None:
                eager = [at(dtype, "reference")]
            else:
                eager = [way({name: x.clone().requires_grad_() for name, x in inputs.items()}) for way in case.eager]
            _compare(job, name, functools.partial(at, dtype, impl), at(torch.float64, "reference"), eager)


def _pooling(job: Job) -> None:
    ways = [
        ("mean", "joint", True),
        ("last_token", "joint", False),
        ("last_token", "per_layer", True),
        ("concat", "per_layer", False),
        ("token", "none", True),
    ]
    lengths = torch.tensor([523, 260])
    layout = StridedLayout.strided(2, 523, context=5, stride=17, horizon=6, samples=4, lengths=lengths)
    channels, dtypes = (1536, 2048, 4096, 1000), _dtypes(job)
    if job.rehearsal:
        layout = StridedLayout.strided(1, 9, context=4, stride=5, horizon=3, samples=2)
        channels, dtypes, ways = (24,), dtypes[-1:], ways[:1]
    layout = layout.to(job.device)
    for size in channels:
        for mode, normalize, masked in ways:
            case = _self_test._pooling_case(layout, size, mode, normalize, masked)
            for dtype in dtypes:
                _check_case(job, case, dtype, f"C={size}")


def _matching(job: Job, *, samples: Sequence[int]) -> None:
    width = 96 if job.rehearsal else 4608
    for n in [*samples][: 1 if job.rehearsal else None]:
        for whitening in ("none", "sample", "feature"):
            case = _self_test._matching_case(width, whitening, n)
            for dtype in [torch.float32] if job.rehearsal else _dtypes(job):
                _check_case(job, case, dtype)


def _loss_and_log_probs(job: Job) -> None:
    dtypes = _dtypes(job)[:1] if job.rehearsal else _dtypes(job)
    for unbiased in (False, True):
        case = _self_test._loss_case(24 if job.rehearsal else 4608, unbiased)
        for dtype in dtypes:
            _check_case(job, case, dtype)
    vocabulary = 31 if job.rehearsal else 50257
    for case in (
        _self_test._log_probs_case("", vocabulary),
        _self_test._log_probs_case("several targets of a row", vocabulary, several=True),
        _self_test._log_probs_case("softcap", vocabulary, softcap=5.0, scale=0.5),
    ):
        for dtype in dtypes:
            _check_case(job, case, dtype)


# What else kernels on a GPU have to be: fit for a graph, never waiting, and at home on every device.


def _calls(job: Job, device: torch.device) -> Iterator[tuple[str, Callable[[], Results]]]:
    """Every op, forward and backward, on ``device``; the layout is made before.

    For more rollouts than 16 matching takes an eigen-solver, which waits, so there are none here.
    """
    length, width, vocabulary = (9, 24, 31) if job.rehearsal else (131, 96, 301)
    layout = StridedLayout.strided(1, length, context=4, stride=5, horizon=3, samples=2).to(device)
    dtype = _dtypes(job)[0]
    cases = [
        *_self_test._attention_cases(layout, ""),
        *_self_test._attention_cases(layout, "all options", softcap=1.5, window=6, sinks=True, block="full"),
        _self_test._pooling_case(layout, width, "last_token", "joint", masked=False),
        _self_test._pooling_case(layout, width, "mean", "per_layer", masked=True),
        _self_test._loss_case(width, unbiased=False),
        _self_test._matching_case(width, "none", 4),
        _self_test._matching_case(width, "sample", 4),
        _self_test._matching_case(width, "feature", 16),
        _self_test._log_probs_case("", vocabulary, several=True),
    ]
    for case in [cases[0], cases[4], cases[6]] if job.rehearsal else cases:
        inputs = {name: x.to(device, dtype).requires_grad_() for name, x in case.inputs().items()}
        yield f"{case.op} {case.name}".strip(), _on_device(case, inputs, device)
    yield "layout", lambda: {"mask": layout.dense_mask(), "positions": layout.without_last_step().position_ids}


def _on_device(case: _self_test.Case, inputs: dict[str, Tensor], device: torch.device) -> Callable[[], Results]:
    """The case with its random numbers kept: drawing them on the host would wait for the device."""
    drawn: dict[tuple, Tensor] = {}

    def random(*shape: int, seed: int) -> Tensor:
        if (shape, seed) not in drawn:
            drawn[shape, seed] = randn(*shape, seed=seed, dtype=torch.float32, device=device)
        return drawn[shape, seed]

    def call() -> Results:
        before, _self_test._random = _self_test._random, random
        try:
            return case.run(inputs, "triton")
        finally:
            _self_test._random = before

    return call


def _graphs(job: Job) -> None:
    with side_stream(job.device):
        for name, call in _calls(job, job.device):
            with job.attempt(f"graph of {name}"):
                for _ in range(2):
                    expected = call()
                if not job.on_gpu("capture and replay of every op as a CUDA graph"):
                    replayed = call()
                else:
                    synchronize(job.device)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                        replayed = call()
                    for x in replayed.values():
                        x.zero_()
                    graph.replay()
                    synchronize(job.device)
                same = all(torch.equal(expected[key], replayed[key]) for key in expected)
                job.write("check", case=name, passed=same, detail="" if same else "the replay gives other bits")


@contextlib.contextmanager
def _waiting_is_an_error(job: Job) -> Iterator[None]:
    """Inside, whatever makes the host wait for the device raises."""
    if not job.on_gpu("ops and the step under torch.cuda.set_sync_debug_mode('error')"):
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _no_waiting(job: Job) -> None:
    for name, call in _calls(job, job.device):
        with job.attempt(f"no waiting in {name}"):
            call()
            with _waiting_is_an_error(job):
                call()
            job.write("check", case=name, passed=True)
    with job.attempt("no waiting in ebft_step"):
        step = _tiny_step(job)
        step()
        with _waiting_is_an_error(job):
            step()
        job.write("check", case="ebft_step and its backward pass", passed=True)


def _tiny_step(job: Job) -> Callable[[], None]:
    from ebft_trainer.config import EBFTOptions
    from ebft_trainer.features import FeatureNetwork
    from ebft_trainer.step import ebft_step

    from ..shapes import MODELS, Geometry
    from ..step import Setup
    from .job import small

    geometry = Geometry(batch=1, length=12, context=4, stride=4, horizon=3, samples=2)
    setup = Setup(small(MODELS["Qwen2.5-1.5B"]), geometry, torch.float32, device=job.device)
    features, options = FeatureNetwork(setup.model), EBFTOptions(eos_token_ids=[], ce_coef=0.1)

    def step() -> None:
        ebft_step(setup.model, features, setup.prompt, setup.layout, options).loss.backward()

    return step


def _second_device(job: Job) -> None:
    """With the first one as the current device."""
    if job.on_gpu("tensors on a second GPU"):
        if torch.cuda.device_count() < 2:
            job.write("fact", name="second device", value="there is one GPU")
            return
        first, second = (torch.device("cuda", index) for index in range(2))
    else:
        first = second = job.device
    for (name, here), (_, there) in zip(_calls(job, first), _calls(job, second), strict=True):
        with job.attempt(f"second device: {name}"):
            results, others = here(), there()
            same = all(x.device == second and torch.equal(results[key].cpu(), x.cpu()) for key, x in others.items())
            job.write("check", case=name, passed=same, detail="" if same else "other bits than on the first")
