"""Training runs that give the same numbers on one rank as on two; `test_ranks.py` runs them on both.

`python -m torch.distributed.run --nproc-per-node=2 on_ranks.py FOLDER` runs every case and leaves its record in FOLDER.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ebft_trainer import EBFTConfig, EBFTTrainer, cli

RANKS = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

GEOMETRY = {"context": 4, "stride": 6, "horizon": 3, "samples": 3}
# Greedy rollouts, so that the division of the random numbers among ranks does not matter.
GREEDY = {"temperature": 0.0, "estimator": "reinforce", "ce_coef": 0.5}
FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


SGD = {"optim": "sgd", "learning_rate": 0.1}


def rows() -> list[dict[str, Any]]:
    """Rows with one to three anchors and four to twenty counted tokens each."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for number in range(16):
        length, start = (24, 11, 17, 8, 24, 12, 9, 20)[number % 8], 5 if number % 3 else 4
        ids = torch.randint(0, 40, (length,), generator=generator)
        out.append({"input_ids": ids, "completion_mask": [False] * start + [True] * (length - start)})
    return out


class Recorder(TrainerCallback):
    """Whole gradients before each optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, _args: Any, _state: Any, _control: Any, **others: Any) -> None:
        parameters = others["model"].named_parameters()
        self.gradients.append({plain_name(name): whole(p.grad).clone() for name, p in parameters if p.grad is not None})


def plain_name(name: str) -> str:
    return name.removeprefix("module.")


def whole(x: torch.Tensor) -> torch.Tensor:
    """Of what FSDP2 or ZeRO-3 has spread over the ranks."""
    if hasattr(x, "ds_shape"):
        with importlib.import_module("deepspeed").zero.GatheredParameters(x):
            return x.detach().clone()
    return x.full_tensor() if isinstance(x, DTensor) else x


def config(folder: Path, rows_per_step: int = 4, accumulate: int = 1, **options: Any) -> EBFTConfig:
    usual = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": rows_per_step // (accumulate * RANKS),
        "gradient_accumulation_steps": accumulate,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    AcceleratorState._reset_state()
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(name, None)
    made = EBFTConfig(**(GEOMETRY | GREEDY | usual | options))
    assert made.device.type == "cpu"
    if RANKS > 1:
        pretend(DistributedType.MULTI_GPU if made.fsdp else DistributedType.MULTI_CPU)
    return made


def pretend(kind: DistributedType) -> None:
    """accelerate shards on accelerators only; what follows from this type runs with gloo on the CPU just as well."""
    PartialState._shared_state["distributed_type"] = kind


def record(trainer: EBFTTrainer, recorder: Recorder) -> dict[str, Any]:
    weights = {plain_name(name): whole(p).detach().clone() for name, p in trainer.model.named_parameters()}
    return {
        "gradients": recorder.gradients,
        "weights": weights,
        "log": trainer.state.log_history,
        "kind": f"{type(trainer.model_wrapped).__mro__[0].__name__}",
    }


def train(folder: Path, model: str = "model", adapters: bool = False, **options: Any) -> dict[str, Any]:
    policy = AutoModelForCausalLM.from_pretrained(folder / model)
    if adapters:
        torch.manual_seed(3)
        lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        policy = get_peft_model(policy, lora)
    recorder = Recorder()
    trainer = EBFTTrainer(policy, config(folder, **options), train_dataset=rows(), callbacks=[recorder])
    trainer.train()
    return record(trainer, recorder)


def zero(folder: Path, stage: int, **options: Any) -> dict[str, Any]:
    """The DeepSpeed example, with an optimizer whose steps are no larger than its gradients."""
    # While settings of ZeRO-3 are about, transformers spreads every model that it loads.
    unset_hf_deepspeed_config()
    settings = json.loads((EXAMPLES / "deepspeed_zero3.json").read_text())
    # The tiny model's weights would all be kept whole.
    settings["zero_optimization"] |= {"stage": stage, "stage3_param_persistence_threshold": 0}
    return train(folder, deepspeed=settings, **SGD, **options)


def evaluated(folder: Path) -> dict[str, Any]:
    policy, recorder = AutoModelForCausalLM.from_pretrained(folder / "model"), Recorder()
    trainer = EBFTTrainer(policy, config(folder), train_dataset=rows(), eval_dataset=rows()[:7], callbacks=[recorder])
    before = trainer.evaluate()
    trainer.train()
    return record(trainer, recorder) | {"evaluations": [before, trainer.evaluate()]}


def poisoned(folder: Path, **options: Any) -> dict[str, Any]:
    """The last rank's gradient is not finite in the second of three steps."""
    policy, recorder = AutoModelForCausalLM.from_pretrained(folder / "model"), Recorder()
    trainer = EBFTTrainer(policy, config(folder, max_steps=3, **options), train_dataset=rows(), callbacks=[recorder])
    compute_loss = trainer.compute_loss

    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute_loss(*args, **kwargs)
        return loss * math.inf if trainer.state.global_step == 1 and RANK == RANKS - 1 else loss

    trainer.compute_loss = poison
    trainer.train()
    return record(trainer, recorder)


def resumed(folder: Path, **options: Any) -> dict[str, Any]:
    """Four steps, then again from the checkpoint after the second."""
    logs = []
    run = folder / f"resumed-{RANKS}-{bool(options)}"
    for checkpoint in (None, str(run / "checkpoint-2")):
        policy, recorder = AutoModelForCausalLM.from_pretrained(folder / "model"), Recorder()
        saving = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(run), "max_steps": 4}
        trainer = EBFTTrainer(
            policy, config(folder, **saving, temperature=1.0, **options), train_dataset=rows(), callbacks=[recorder]
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        logs.append(record(trainer, recorder))
    return {"whole": logs[0], "resumed": logs[1]}


def stopped(folder: Path) -> dict[str, Any]:
    """The last rank alone is asked to stop in the second of four steps, and no step is to be saved."""

    class Ask(TrainerCallback):
        def on_step_begin(self, _args: Any, state: Any, _control: Any, **_others: Any) -> None:
            if state.global_step == 1 and RANK == RANKS - 1:
                trainer.request_stop()

    policy, run = AutoModelForCausalLM.from_pretrained(folder / "model"), folder / f"stopped-{RANKS}"
    saving = {"save_strategy": "steps", "save_steps": 100, "output_dir": str(run), "max_steps": 4}
    trainer = EBFTTrainer(policy, config(folder, **saving), train_dataset=rows(), callbacks=[Ask()])
    trainer.train()
    trainer.accelerator.wait_for_everyone()
    files = sorted(path.name for path in run.iterdir())
    return {"step": trainer.state.global_step, "stopped": trainer.stopped, "files": files}


def launched(folder: Path) -> dict[str, Any]:
    """`ebft-train` under the settings that `accelerate launch` makes of the example."""
    parser = launch_command_parser()
    arguments = parser.parse_args(
        ["--config_file", str(EXAMPLES / "fsdp2.yaml"), f"--num_processes={RANKS}", "ebft-train"]
    )
    settings = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    AcceleratorState._reset_state()
    os.environ.update({name: value for name, value in settings.items() if name.startswith(("ACCELERATE", "FSDP"))})

    def trainer(*arguments: Any, **options: Any) -> EBFTTrainer:
        pretend(DistributedType.MULTI_GPU)
        return EBFTTrainer(*arguments, **options)

    options = "--length 48 --context 4 --stride 6 --horizon 3 --samples 2 --eval-rows 4 --max-steps 2 --save-steps 2"
    options += " --per-device-train-batch-size 1 --logging-steps 1 --eval-fraction 0.2 --shard-feature-network"
    inputs = ["--model", folder / "launched", "--data", folder / "text.txt", "--output", folder / "launched-run"]
    with mock.patch.object(cli, "EBFTTrainer", trainer):
        cli.main(["train", *map(str, inputs), *options.split()])
    return {"kind": AcceleratorState().distributed_type.value, "precision": AcceleratorState().mixed_precision}


def refused(folder: Path) -> dict[str, Any]:
    """What is said where accelerate would not shard and say nothing."""
    policy = AutoModelForCausalLM.from_pretrained(folder / "model")
    settings = config(folder, **FSDP)
    pretend(DistributedType.MULTI_CPU)
    try:
        EBFTTrainer(policy, settings, train_dataset=rows())
    except ValueError as error:
        return {"error": str(error)}
    return {"error": ""}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "plain": train,
    "sgd": lambda folder: train(folder, **SGD),
    "sgd_lora": lambda folder: train(folder, adapters=True, **SGD),
    "evaluated": evaluated,
    "accumulated": lambda folder: train(folder, accumulate=2),
    "cross_entropy": lambda folder: train(folder, rl_coef=0.0),
    "lora": lambda folder: train(folder, adapters=True),
    "tied": lambda folder: train(folder, model="tied"),
    "poisoned": poisoned,
    "resumed": resumed,
    "stopped": stopped,
    "sharded_features": lambda folder: train(folder, shard_feature_network=RANKS > 1),
}
# With one rank there is nothing to shard: the same runs without it.
FSDP_CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "fsdp": lambda folder: train(folder, **FSDP),
    "fsdp_accumulated": lambda folder: train(folder, accumulate=2, **FSDP),
    "fsdp_lora": lambda folder: train(folder, adapters=True, **FSDP),
    "fsdp_tied": lambda folder: train(folder, model="tied", **FSDP),
    "fsdp_poisoned": lambda folder: poisoned(folder, **FSDP),
    "fsdp_resumed": lambda folder: resumed(folder, **FSDP),
    "fsdp_sharded_features": lambda folder: train(folder, shard_feature_network=True, **FSDP),
    "launched": launched,
    "refused": refused,
}


ZERO_CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "zero2": lambda folder: zero(folder, 2),
    "zero3": lambda folder: zero(folder, 3),
    "zero3_lora": lambda folder: zero(folder, 3, adapters=True),
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    cases = CASES | FSDP_CASES
    if importlib.util.find_spec("deepspeed") is not None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        cases |= ZERO_CASES
    for name, case in cases.items():
        torch.save(case(folder), folder / f"{name}-{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
