"""Whole training steps with random weights: by phase, beside the published algorithm and the plan, and a profile."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import statistics
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ebft_trainer.config import EBFTOptions, checkpointing_field
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.hardware import GPUS, device
from ebft_trainer.plan import Planner, _prediction
from ebft_trainer.plan import Setup as PlanSetup

from ..measure import resident_bytes, synchronize
from ..shapes import MODELS, Geometry, ModelShape
from ..step import OURS, PUBLISHED, Setup, clocks_that_wait, model_config, timed
from .job import SHAPES, Job, finish, small, start

#: The published algorithm on the fastest attention that takes its mask.
AGAINST = f"{PUBLISHED}, SDPA"
#: Of the adapters on all linear layers.
RANK = 16
#: Seconds for the counted rounds of one setting.
_SECONDS, _ROUNDS = 6.0, 3
#: Kernels of this project, by how their names begin; of matrix products, by what is in them.
_OURS = re.compile(
    r"^(strided_attention|pool_(fwd|bwd)|gram|match_fwd|mean_embedding_\w+|softmax_(add|gradient)|draw|dense_mask|geometry)_?\w*kernel"
)
_PRODUCTS = re.compile(r"gemm|gemv|cutlass|nvjet|cublas|xmma|splitk|aten::(mm|addmm|bmm|baddbmm)", re.IGNORECASE)


class Setting(NamedTuple):
    """One way to train."""

    adapters: bool
    checkpointing: bool
    batch: int

    @property
    def about(self) -> dict[str, object]:
        """In a line of results."""
        return self._asdict()


#: The most telling first.
SETTINGS = tuple(
    Setting(adapters, checkpointing, batch)
    for adapters in (False, True)
    for checkpointing, batch in ((False, 8), (True, 8), (False, 1), (False, 4), (True, 1), (True, 4))
)


def run(job: Job) -> None:
    """The settings in turn; the plan is computed beside them, in a process that needs no GPU."""
    plan = start(job, _plan)
    try:
        _measure(job)
        while plan.is_alive() and job.left() > 1:
            time.sleep(0.1)
    finally:
        ended = finish(plan, job, lambda process: process.kill())
        job.write("part", part="plan", seconds=ended.seconds, how=ended.how)


def _shape(job: Job) -> ModelShape:
    shape = MODELS[SHAPES[0]]
    return small(shape) if job.rehearsal else shape


def _geometry(job: Job, batch: int) -> Geometry:
    return job.geometry._replace(batch=batch)


def _measure(job: Job) -> None:
    dtype = torch.float32 if job.rehearsal else torch.bfloat16
    setup = Setup(_shape(job), _geometry(job, 1), dtype, device=job.device)
    _ = setup.features
    with _training(setup.model) as optimizer:
        for setting in SETTINGS[:2]:
            _steps(job, setup, OURS, setting, optimizer)
        largest = _published(job, setup, optimizer)
        if largest not in (1, 4, 8, 0):
            _steps(job, setup, OURS, Setting(False, False, largest), optimizer)
        for setting in SETTINGS[2:4]:
            _steps(job, setup, OURS, setting, optimizer)
        for setting in (Setting(False, True, 8), Setting(False, False, 1)):
            with job.attempt(f"profile of {setting}", needs=6) as enough:
                if enough:
                    _profile(job, setup, setting, optimizer)
        for setting in SETTINGS[4:6]:
            _steps(job, setup, OURS, setting, optimizer)
    if importlib.util.find_spec("peft") is None:
        job.write("skipped", what="adapters (LoRA)", why="peft is not installed")
        return
    from peft import LoraConfig, get_peft_model

    with job.attempt("adapters (LoRA)", needs=5) as enough:
        if enough:
            setup.model = get_peft_model(setup.model, LoraConfig(r=RANK, target_modules="all-linear"))
            setup._features = FeatureNetwork(setup.model)
            with _training(setup.model) as optimizer:
                for setting in SETTINGS[6:]:
                    _steps(job, setup, OURS, setting, optimizer)


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[torch.optim.Optimizer]:
    """AdamW of what is trained, its states in the weights' dtype; afterwards no gradient is left."""
    model.train()
    trained = [x for x in model.parameters() if x.requires_grad]
    yield torch.optim.AdamW(trained, lr=1e-6, fused=trained[0].device.type == "cuda")
    model.zero_grad(set_to_none=True)


def _prepared(job: Job, setup: Setup, setting: Setting) -> Setup:
    name = f"{checkpointing_field()}_{'enable' if setting.checkpointing else 'disable'}"
    getattr(setup.model, name)()
    return setup.at(_geometry(job, setting.batch))


def _one(setup: Setup, who: str, optimizer: torch.optim.Optimizer) -> tuple[float, dict[str, float]]:
    """A step: its loss, and the seconds of its phases by clocks that may not wait for the device."""
    loss, phases = setup.run(who)
    return float(loss), phases | {"optimizer": timed(optimizer.step)}


def _steps(job: Job, setup: Setup, who: str, setting: Setting, optimizer: torch.optim.Optimizer) -> bool:
    """One step to compile, one by phase and some by the whole; whether they fit into memory."""
    fitted = False
    with job.attempt(f"step of {who}", needs=4, who=who, **setting.about) as enough:
        if enough:
            setup = _prepared(job, setup, setting)
            _one(setup, who, optimizer)
            setup.model.zero_grad(set_to_none=True)
            held = _reset_peak(job)
            with clocks_that_wait(job.device):
                loss, phases = _one(setup, who, optimizer)
            peak = _peak(job)
            rounds = [_seconds(setup, who, optimizer)]
            start_ = time.perf_counter()
            while len(rounds) < _ROUNDS and time.perf_counter() - start_ < _SECONDS and job.left() > 2 * rounds[0]:
                rounds.append(_seconds(setup, who, optimizer))
            tokens = setup.layout.batch_size * setup.layout.packed_length
            job.write(
                "step",
                who=who,
                **setting.about,
                seconds=statistics.median(rounds),
                rounds=rounds,
                phases=phases,
                loss=loss,
                tokens=tokens,
                prompt_tokens=setup.prompt.numel(),
                held_bytes=held,
                peak_bytes=peak,
            )
            fitted = True
    setup.model.zero_grad(set_to_none=True)
    return fitted


def _seconds(setup: Setup, who: str, optimizer: torch.optim.Optimizer) -> float:
    synchronize(setup.device)
    begin = time.perf_counter()
    setup.run(who)
    optimizer.step()
    synchronize(setup.device)
    return time.perf_counter() - begin


def _reset_peak(job: Job) -> int:
    """What is held now."""
    if not job.on_gpu("peak memory by torch's allocator"):
        return resident_bytes("VmRSS")
    torch.cuda.reset_peak_memory_stats(job.device)
    return torch.cuda.memory_allocated(job.device)


def _peak(job: Job) -> int:
    return resident_bytes("VmHWM") if job.rehearsal else torch.cuda.max_memory_allocated(job.device)


def _published(job: Job, setup: Setup, optimizer: torch.optim.Optimizer) -> int:
    """The largest batch that the published algorithm has room for; 0: none."""
    for batch in (4, 2, 1):
        if _steps(job, setup, AGAINST, Setting(False, False, batch), optimizer):
            return batch
    return 0


# Where the time goes.


class Event(NamedTuple):
    """One kernel, or copy, on the device: its name, and when it ran, in microseconds."""

    name: str
    start: float
    end: float


def _profile(job: Job, setup: Setup, setting: Setting, optimizer: torch.optim.Optimizer) -> None:
    setup = _prepared(job, setup, setting)
    _seconds(setup, OURS, optimizer)
    kind = torch.profiler.ProfilerActivity
    on_gpu = job.on_gpu("kernels in torch.profiler")
    with torch.profiler.profile(activities=[kind.CUDA if on_gpu else kind.CPU]) as profiler:
        _seconds(setup, OURS, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        found = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    events = [*device_events(found, ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",))]
    for row in largest_kernels(events, 25):
        job.write("kernel", **setting.about, **row)
    job.write("shares", **setting.about, **shares(events))


def device_events(trace: Iterable[dict[str, Any]], categories: tuple[str, ...]) -> Iterator[Event]:
    """Complete events of these categories in a Chrome trace."""
    for event in trace:
        if event.get("ph") == "X" and event.get("cat") in categories:
            yield Event(event["name"], float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0)))


def largest_kernels(events: Iterable[Event], count: int) -> list[dict[str, object]]:
    """Kernels by the time that all their runs took together."""
    seconds: dict[str, float] = defaultdict(float)
    runs: Counter[str] = Counter()
    for event in events:
        seconds[event.name] += (event.end - event.start) / 1e6
        runs[event.name] += 1
    total = sum(seconds.values()) or 1.0
    names = sorted(seconds, key=lambda name: -seconds[name])[:count]
    return [
        {
            "kernel": name,
            "group": group(name),
            "runs": runs[name],
            "seconds": seconds[name],
            "share": seconds[name] / total,
        }
        for name in names
    ]


def group(name: str) -> str:
    """Whose a kernel is, and what it does."""
    if _OURS.match(name):
        return "ebft-kernels"
    return "matrix products" if _PRODUCTS.search(name) else "everything else"


def shares(events: Iterable[Event]) -> dict[str, object]:
    """Parts of the time from the first kernel's start to the last one's end: by group, and with nothing running."""
    ordered = sorted(events, key=lambda event: event.start)
    if not ordered:
        return {"span": 0.0}
    busy, end = 0.0, ordered[0].start
    for event in ordered:
        busy += max(event.end - max(event.start, end), 0.0)
        end = max(end, event.end)
    span = max(end - ordered[0].start, 1e-9)
    by_group: dict[str, float] = defaultdict(float)
    for event in ordered:
        by_group[group(event.name)] += event.end - event.start
    total = sum(by_group.values()) or 1.0
    found = {name: busy / span * part / total for name, part in by_group.items()}
    return {"span": span / 1e6, "shares": {**found, "idle": 1 - busy / span}}


# What the plan says of the same.


def _plan(job: Job) -> None:
    name = _plan_device(job)
    if name is None:
        job.write("skipped", what="the plan's predictions", why="it has no data sheet of this GPU")
        return
    dtype, options = torch.bfloat16, EBFTOptions(eos_token_ids=[])
    geometry, shape = job.geometry, _shape(job)
    if job.rehearsal:
        options = EBFTOptions(
            eos_token_ids=[],
            context=geometry.context,
            stride=geometry.stride,
            horizon=geometry.horizon,
            samples=geometry.samples,
        )
    planners: dict[int, Planner] = {}
    config = model_config(shape, geometry.length)
    for setting in SETTINGS:
        rank = RANK if setting.adapters else 0
        with job.attempt("plan", **setting.about):
            if rank not in planners:
                planners[rank] = Planner(config, options, dtype, rank)
            setup = PlanSetup(
                config=config,
                options=options,
                dtype=dtype,
                batch=setting.batch,
                length=geometry.length,
                prompt_tokens=geometry.length // 2,
                device=device(name),
                checkpointing=setting.checkpointing,
                lora_rank=rank,
            )
            found = _prediction(planners[rank], setup, "ebft")
            head = found["phases"]["policy"]["head"]
            job.write(
                "plan",
                **setting.about,
                device=device(name).name,
                seconds=found["seconds"],
                peak_bytes=found["peak_bytes"],
                # Logits that the backward pass computes once more are no part of the model's own work.
                operations=found["operations"] - head,
            )


def _plan_device(job: Job) -> str | None:
    """Its key among the plan's data sheets, found without touching the GPU: this process is a fork."""
    if job.rehearsal:
        return "h100"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True).stdout.lower()
    return next((key for key in GPUS if key.removeprefix("rtx") in said), None)
