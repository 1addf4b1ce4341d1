"""`ebft-train plan`: what a step will need, before there is a machine or a weight. Computed, never measured."""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ebft_kernels.integrations.transformers import decoder_layers

from .arguments import given
from .cli_model import DTYPES
from .config import EBFTConfig, EBFTOptions, checkpointing_field, option
from .dry_run import GRADIENTS, OBJECTIVES, OPERATIONS, OPTIMIZER, PARTS, WEIGHTS, DryRun, Job, Phase, dry_run
from .features import FeatureNetwork
from .hardware import FAST, GPUS, SLOW, Device, Efficiency, device
from .plots import table

#: Of a GPU's memory, what a step may fill: the rest is for the driver, the libraries and what the allocator wastes.
USABLE = 0.9
#: Nobody asks for more rows.
_MOST_ROWS = 1 << 16
#: The method's options that change what a step needs.
PLAN_OPTIONS = ("context", "stride", "horizon", "samples", "feature_layers", "pooling", "normalize", "ce_coef")
_TITLES = {"ebft": "EBFT", "sft": "SFT", "whole_response": "whole-response RL"}


@dataclass(frozen=True, kw_only=True)
class Setup(Job):
    """What `plan` is asked about: one process's share of a step, and where it runs.

    Attributes:
        config: the model's, of transformers.
        dtype: of weights, gradients, optimizer states and activations.
        device: one of them.
        count: of devices.
        sharded: whether weights, gradients and optimizer states are divided among them (FSDP2).
        lora_rank: of adapters on all linear layers; 0: all weights are trained.
    """

    config: Any
    dtype: torch.dtype
    device: Device
    count: int = 1
    sharded: bool = False
    lora_rank: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 1 <= self.prompt_tokens < self.length:
            raise ValueError(
                f"prompt_tokens: expected at least 1, fewer than length = {self.length}, got {self.prompt_tokens}"
            )
        if self.sharded and self.count < 2:
            raise ValueError(f"fsdp: expected at least 2 devices to shard over, got {self.count}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank: expected at least 0, got {self.lora_rank}")

    def job(self, objective: str) -> Setup:
        """The same with another objective."""
        return replace(self, objective=objective)


class Planner:
    """Dry runs of one model in one dtype; the model is built once, on the meta device.

    Raises:
        ValueError: the config is not of a causal language model that can be built, a mixture of experts in another
            dtype than bfloat16 (grouped products without data exist in no other), or peft is missing for LoRA.
    """

    def __init__(self, config: Any, options: EBFTOptions, dtype: torch.dtype, lora_rank: int = 0) -> None:
        with torch.device("meta"):
            self.model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
            if dtype != torch.bfloat16 and any(x.ndim == 3 for x in self.model.parameters()):
                raise ValueError(
                    f"dtype: expected bfloat16 for a mixture of experts, whose products need it, got {dtype}"
                )
            if lora_rank:
                self.model = _with_adapters(self.model, lora_rank)
        self.network = FeatureNetwork(
            self.model, options.feature_layers, pooling=options.pooling, normalize=options.normalize
        )

    @property
    def parameters(self) -> int:
        """Of the whole model, adapters included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def largest_gathered(self) -> int:
        """Bytes of the whole weights that FSDP2 holds at most: two blocks, and what is outside of the blocks."""
        blocks = decoder_layers(self.model)
        inside = [sum(x.nbytes for x in block.parameters()) for block in blocks]
        outside = sum(x.nbytes for x in self.model.parameters()) - sum(inside)
        return 2 * max(inside) + outside

    def run(self, job: Job, on_cpu: bool) -> DryRun:
        """The dry run of ``job``."""
        getattr(self.model, _checkpointing_method(job.checkpointing))()
        return dry_run(self.model, self.network if job.objective == "ebft" else None, job, on_cpu=on_cpu)


def _checkpointing_method(on: bool) -> str:
    name = checkpointing_field()
    return f"{name}_enable" if on else f"{name}_disable"


def _with_adapters(model: nn.Module, rank: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("lora_rank: needs peft (pip install peft)") from None
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))


def plan(setup: Setup) -> dict[str, Any]:
    """Everything that `ebft-train plan` prints.

    Returns:
        ``model``, ``step`` (the setting), ``objectives`` (by name: tokens, operations, seconds, memory, phases),
        ``suggestions`` and ``assumptions``; numbers, strings, lists and dicts only. Memory is in bytes per device,
        seconds are [fast, slow].

    Raises:
        ValueError: the model cannot be built or run strided, or its rows have no room for a rollout.
    """
    planner = Planner(setup.config, setup.options, setup.dtype, setup.lora_rank)
    trained = sum(x.numel() for x in planner.model.parameters() if x.requires_grad)
    return {
        "model": {
            "architecture": setup.config.model_type,
            "parameters": planner.parameters,
            "trained": trained,
            "feature_layers": list(planner.network.layers),
        },
        "step": {
            "device": setup.device.name,
            "devices": setup.count,
            "sharded": setup.sharded,
            "checkpointing": setup.checkpointing,
            "dtype": str(setup.dtype).removeprefix("torch."),
            "batch": setup.batch,
            "length": setup.length,
            "prompt_tokens": setup.prompt_tokens,
            "usable_bytes": USABLE * setup.device.memory,
        },
        "objectives": predictions(planner, setup),
        "suggestions": suggestions(planner, setup),
        "assumptions": assumptions(setup),
    }


def predictions(planner: Planner, setup: Setup) -> dict[str, dict[str, Any]]:
    """The ``objectives`` of `plan`."""
    return {name: _prediction(planner, setup, name) for name in OBJECTIVES}


def _prediction(planner: Planner, setup: Setup, name: str) -> dict[str, Any]:
    run = planner.run(setup.job(name), not setup.device.overlaps)
    phases = {
        phase_name: {
            "rows": phase.rows,
            **phase.operations,
            "times": phase.times,
            "peak_bytes": sum(held(planner, setup, phase).values()),
            "seconds": [seconds(phase, setup.device, setup.dtype, reached) for reached in (FAST, SLOW)],
        }
        for phase_name, phase in run.phases.items()
    }
    memory = max((held(planner, setup, phase) for phase in run.phases.values()), key=lambda parts: sum(parts.values()))
    return {
        "tokens": sum(phase.rows for phase in run.phases.values()),
        "operations": sum(phase.operations.total() for phase in run.phases.values()),
        "seconds": [sum(phase["seconds"][end] for phase in phases.values()) for end in (0, 1)],
        "peak_bytes": sum(memory.values()),
        "memory": memory,
        "saved_bytes_per_block": run.saved // len(decoder_layers(planner.model)),
        "phases": phases,
    }


def seconds(phase: Phase, device: Device, dtype: torch.dtype, reached: Efficiency) -> float:
    """Time of one phase, all its repetitions: products, memory traffic, and the start of every op.

    An accelerator computes while the host starts the next ops, so the slower of the two counts; on a CPU both do.
    """
    computing = phase.operations.total() / (device.rates[dtype] * reached.products)
    moving = phase.times * phase.traffic / (device.bandwidth * reached.bandwidth)
    starting = phase.times * phase.ops * device.seconds_per_op * reached.starts
    return max(computing + moving, starting) if device.overlaps else computing + moving + starting


def held(planner: Planner, setup: Setup, phase: Phase) -> dict[str, int]:
    """Part -> bytes on one device at the peak of a phase."""
    parts = {part: phase.peak[part] for part in PARTS}
    if setup.sharded:
        for part in (WEIGHTS, GRADIENTS, OPTIMIZER):
            parts[part] = -(-parts[part] // setup.count)
        parts[WEIGHTS] += planner.largest_gathered
    return parts


def suggestions(planner: Planner, setup: Setup) -> list[dict[str, Any]]:
    """The largest batch per device for EBFT, each way to save memory; the one to take first is ``suggested``."""
    out = []
    for checkpointing in (False, True):

        @functools.cache
        def run(batch: int, checkpointing: bool = checkpointing) -> DryRun:
            job = replace(setup, batch=batch, checkpointing=checkpointing).job("ebft")
            return planner.run(job, not setup.device.overlaps)

        for sharded in (False, True)[: 1 + (setup.count > 1)]:
            way = replace(setup, sharded=sharded)

            def needed(batch: int, run: Callable[[int], DryRun] = run, way: Setup = way) -> int:
                return max(sum(held(planner, way, phase).values()) for phase in run(batch).phases.values())

            batch = largest_batch(needed, USABLE * setup.device.memory)
            out.append({"sharded": sharded, "checkpointing": checkpointing, "batch": batch})
    fitting = [way for way in out if way["batch"]]
    # Sharding costs less than running every block's forward pass twice.
    best = min(fitting, key=lambda way: (way["checkpointing"], way["sharded"]), default=None)
    return [{**way, "suggested": way is best} for way in out]


def largest_batch(needed: Callable[[int], float], room: float) -> int:
    """The largest number of rows whose ``needed``, which grows about linearly, is at most ``room``; 0 if none."""
    if needed(1) > room:
        return 0
    low, high = 1, 2
    while needed(high) <= room and high < _MOST_ROWS:
        slope = (needed(high) - needed(low)) / (high - low)
        low, high = high, min(high + int((room - needed(high)) / slope) + 1 if slope else 2 * high, _MOST_ROWS)
    if needed(high) <= room:
        return high
    while high - low > 1:
        between = low + int((room - needed(low)) * (high - low) / (needed(high) - needed(low)))
        between = min(max(between, low + 1), high - 1)
        low, high = (between, high) if needed(between) <= room else (low, between)
    return low


def assumptions(setup: Setup) -> list[str]:
    """What the numbers take for granted."""
    ends = " and ".join(
        f"{x.products:.0%} of the rate of matrix products, {x.bandwidth:.0%} of the bandwidth and "
        f"{setup.device.seconds_per_op * x.starts * 1e6:.0f} microseconds to start an op"
        for x in (FAST, SLOW)
    )
    rate, bandwidth = setup.device.rates[setup.dtype], setup.device.bandwidth
    out = [
        f"times are computed, not measured: {setup.device.name} at {rate / 1e12:.4g} TFLOP/s and "
        f"{bandwidth / 1e12:.3g} TB/s, of which the two ends of the range reach {ends}",
        "memory is what the step's tensors take on one device; a context, libraries and what an allocator keeps of "
        "freed memory come on top",
        "rows are full: no padding, one document each",
        "AdamW with two states in the weights' dtype; no autocast; no gradient accumulation",
        f"whole-response RL: {setup.options.samples} responses of {setup.length - setup.prompt_tokens} tokens to a "
        f"prompt of {setup.prompt_tokens}, sampled and scored by this package, prompt once; none ends early, free "
        "verifier",
        "features are hidden states; no reference model (kl_coef 0)",
    ]
    if setup.count > 1:
        out.append("each device has a batch of its own; the time for communication is left out")
    if setup.sharded:
        out.append(
            "FSDP2 divides weights, gradients and optimizer states; two gathered blocks, embeddings and head are "
            "whole, and so is the feature network"
        )
    if not setup.device.overlaps:
        out.append(
            "the C library may keep a third more than is in use; MALLOC_MMAP_THRESHOLD_=1048576 makes it give freed "
            "memory back, which takes time"
        )
    return out


@dataclass(kw_only=True)
class PlanArguments:
    """What only the plan is told."""

    model: str = option(MISSING, "model folder, config.json or cached hub name")
    length: int = option(512, "tokens per row")
    gpu: str = option("h100", "data sheet to go by", (*GPUS, "cpu"))
    gpus: int = option(1, "how many, with a batch each")
    fsdp: bool = option(False, "divide weights, gradients and optimizer states (FSDP2)")
    dtype: str = option("float32", "of the weights", DTYPES)
    lora_rank: int = option(0, "adapters on all linear layers; 0: none")
    prompt_tokens: int | None = option(None, "of whole-response RL; default: half of --length")
    json: bool = option(False, "print everything as JSON")


def prepare_plan(parsed: argparse.Namespace) -> Callable[[], None]:
    """Check options and config; the returned function computes and prints."""
    arguments = PlanArguments(**given(PlanArguments, parsed))
    defaults = {x.name: x.default for x in fields(EBFTConfig)}
    setup = Setup(
        config=read_config(arguments.model),
        options=EBFTOptions(**given(EBFTOptions, parsed)),
        dtype=getattr(torch, arguments.dtype),
        batch=getattr(parsed, "per_device_train_batch_size", defaults["per_device_train_batch_size"]),
        length=arguments.length,
        prompt_tokens=arguments.length // 2 if arguments.prompt_tokens is None else arguments.prompt_tokens,
        device=device(arguments.gpu),
        count=arguments.gpus,
        sharded=arguments.fsdp,
        checkpointing=bool(getattr(parsed, checkpointing_field(), False)),
        lora_rank=arguments.lora_rank,
    )
    setup.job("ebft").layout()
    result = plan(setup)
    text = json.dumps(result, indent=1) if arguments.json else plan_text(result)
    return lambda: print(text)


def read_config(name: str) -> Any:
    """The config of a model folder, a config file or a hub name that is in the local cache.

    Raises:
        ValueError: there is none.
    """
    path = Path(name)
    try:
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            return AutoConfig.for_model(content.pop("model_type"), **content)
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model: expected a config of transformers, got {name!r}: {error}") from None


def plan_text(result: dict[str, Any]) -> str:
    """Tables of what `plan` returns."""
    model, step = result["model"], result["step"]
    head = (
        f"{model['architecture']}, {model['parameters'] / 1e9:.4g} billion parameters ({model['trained'] / 1e9:.4g} "
        f"trained), features of layers {' '.join(map(str, model['feature_layers']))}\n"
        f"{step['batch']} rows of {step['length']} tokens per device, {step['dtype']}, {step['devices']} x "
        f"{step['device']}{', FSDP2' * step['sharded']}{', checkpointing' * step['checkpointing']}\n"
        "Computed, not measured; per device and optimizer step."
    )
    usable = step["usable_bytes"]
    return "\n\n".join(
        [
            head,
            _objectives_table(result["objectives"]),
            *(_phases_table(name, objective) for name, objective in result["objectives"].items()),
            "operations:\n" + "\n".join(f"  {name}: {formula}" for name, formula in OPERATIONS.items()),
            _memory_table(result["objectives"]),
            f"EBFT within {_gib(usable)} GiB ({USABLE:.0%} of the memory):\n"
            + _suggestions_text(result["suggestions"]),
            "assumptions:\n" + "\n".join(f"  {line}" for line in result["assumptions"]),
        ]
    )


def _objectives_table(objectives: dict[str, Any]) -> str:
    lines = [
        [
            _TITLES[name],
            f"{objective['tokens']}",
            f"{objective['operations'] / 1e12:.4g}",
            _range(objective["seconds"]),
            _gib(objective["peak_bytes"]),
            f"{objective['saved_bytes_per_block'] / 2**20:.1f}",
        ]
        for name, objective in objectives.items()
    ]
    return table(["", "token rows", "TFLOP", "seconds", "peak GiB", "saved MiB per block"], lines)


def _phases_table(name: str, objective: dict[str, Any]) -> str:
    lines = [
        [
            f"{phase_name}{' x ' + str(phase['times']) if phase['times'] > 1 else ''}",
            f"{phase['rows']}",
            *(f"{phase[kind] / 1e12:.4g}" for kind in OPERATIONS),
            _range(phase["seconds"]),
            _gib(phase["peak_bytes"]),
        ]
        for phase_name, phase in objective["phases"].items()
    ]
    return table([_TITLES[name], "token rows", *(f"{kind} TFLOP" for kind in OPERATIONS), "seconds", "peak GiB"], lines)


def _memory_table(objectives: dict[str, Any]) -> str:
    lines = [[part, *(_gib(objective["memory"][part]) for objective in objectives.values())] for part in PARTS]
    lines.append(["together", *(_gib(objective["peak_bytes"]) for objective in objectives.values())])
    return table(["GiB at the peak", *(_TITLES[name] for name in objectives)], lines)


def _suggestions_text(ways: list[dict[str, Any]]) -> str:
    lines = [
        [
            f"{'FSDP2' if way['sharded'] else 'whole model per device'}{', checkpointing' * way['checkpointing']}",
            str(way["batch"]) if way["batch"] else "does not fit",
            "suggested" if way["suggested"] else "",
        ]
        for way in ways
    ]
    return table(["", "largest batch per device", ""], lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _range(seconds: list[float]) -> str:
    return f"{seconds[0]:.3g} to {seconds[1]:.3g}"
