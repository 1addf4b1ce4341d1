"""Run in a process of its own: what steps really hold and how long they take, for `test_plan.py`.

Prints the most memory that one EBFT step took above the loaded models, in bytes, and seconds per objective. The C
library must be told to give freed memory back (MALLOC_MMAP_THRESHOLD_), or the process holds more than its tensors.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.measure import reset_peak_resident, resident_bytes
from ebft_kernels import StridedLayout
from ebft_trainer.config import EBFTOptions
from ebft_trainer.dry_run import Job
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.rollout import sample_rollouts
from ebft_trainer.scoring import policy_log_probs
from ebft_trainer.step import ebft_step


def main(setting: dict) -> dict:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**setting["config"])).train()
    if setting.get("checkpointing"):
        model.gradient_checkpointing_enable()
    options = EBFTOptions(**setting.get("options", {}))
    batch, length = setting["batch"], setting["length"]
    job = Job(objective="ebft", batch=batch, length=length, options=options, prompt_tokens=length // 2)
    prompt = torch.randint(model.config.vocab_size, (batch, length))
    run = Run(model, FeatureNetwork(model, options.feature_layers), options, job, prompt)
    short = StridedLayout.strided(1, 24, context=8, stride=8, horizon=2, samples=2)
    ebft_step(model, run.network, prompt[:1, :24], short, options).loss.backward()  # libraries, threads
    model.zero_grad()
    loaded = resident_bytes("VmRSS")
    run.ebft()  # the optimizer's states
    reset_peak_resident()
    run.ebft()
    peak = resident_bytes("VmHWM") - loaded
    return {"peak": peak, "seconds": {name: min(timed(getattr(run, name)) for _ in range(2)) for name in OBJECTIVES}}


OBJECTIVES = ("ebft", "sft", "whole_response")


class Run:
    """One model, its optimizer, and a step of each objective."""

    def __init__(self, model, network, options, job, prompt):
        self.model, self.network, self.options, self.job, self.prompt = model, network, options, job, prompt
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def ebft(self):
        self.update(ebft_step(self.model, self.network, self.prompt, self.job.layout(), self.options).loss)

    def sft(self):
        options = EBFTOptions(rl_coef=0.0, ce_coef=1.0)
        self.update(ebft_step(self.model, None, self.prompt, self.job.layout(), options).loss)

    def whole_response(self):
        layout = Job(**{**vars(self.job), "objective": "whole_response"}).layout()
        prompt = self.prompt[:, : layout.length]
        rollouts, _ = sample_rollouts(self.model, prompt, layout, temperature=1.0)
        self.update(policy_log_probs(self.model, prompt, rollouts, layout)[0].mean())

    def update(self, loss):
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
