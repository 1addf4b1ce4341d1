"""A whole training step on the Triton kernels: what runs on GPU tensors with no change to user code, interpreted."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ebft_kernels import StridedLayout, _dispatch, _triton
from ebft_kernels.testing import assert_within_budget
from ebft_trainer.config import EBFTOptions
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.step import ebft_step

KERNELS = {
    "strided_attention_fwd_kernel",
    "strided_attention_dq_kernel",
    "strided_attention_step_kernel",
    "pool_fwd_kernel",
    "match_fwd_kernel",
}


def as_on_a_gpu(op: str, _device: torch.device, _dtype: torch.dtype, **_sizes: object) -> str:
    return "triton" if "triton" in _dispatch.OPS[op][1] else "torch"


def test_a_step_is_the_same_on_the_kernels(monkeypatch):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    layout = StridedLayout.strided(1, 20, context=4, stride=5, horizon=3, samples=2)
    prompt = torch.randint(53, (1, 20))
    options = EBFTOptions(samples=2, ce_coef=0.5)

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        rng = torch.Generator().manual_seed(0)
        step = ebft_step(model, FeatureNetwork(model), prompt, layout, options, generator=rng)
        step.loss.backward()
        results = {"reward": step.match.reward, "log_probs": step.log_probs}
        return step.rollouts, results | {name: p.grad.clone() for name, p in model.named_parameters()}

    launched = set()

    def launcher(kernel, grid, args, options):
        launched.add(kernel.__name__)
        kernel[grid](*args, **options)

    rollouts, plain = run()
    with monkeypatch.context() as patch, _triton.assume(_triton.Target("interpreter", 4, 64 << 10), launcher):
        patch.setattr(_dispatch, "select_impl", as_on_a_gpu)
        same_rollouts, actual = run()
    model.double()
    true_rollouts, truth = run()
    assert launched >= KERNELS
    assert torch.equal(same_rollouts, rollouts) and torch.equal(true_rollouts, rollouts)
    for name, tensor in actual.items():
        assert_within_budget(tensor, plain[name], truth[name], name)
