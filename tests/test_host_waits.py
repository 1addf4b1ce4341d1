"""Neither the ops nor the hot part of a step make the host wait for a GPU: on emulated tensors waits raise."""

from __future__ import annotations

import pytest
import torch

from ebft_kernels import (
    StridedLayout,
    feature_matching,
    linear_log_probs,
    mean_embedding_loss,
    pool_features,
    strided_attention,
    strided_attention_step,
)
from ebft_kernels.testing import attention_inputs, feature_inputs, randn

from .emulated_cuda import HostWaits, emulated_cuda, no_waiting


@pytest.fixture
def cuda():
    with emulated_cuda() as device:
        yield device


def layout_on(device: torch.device) -> StridedLayout:
    return StridedLayout.strided(1, 21, context=4, stride=8, horizon=3, samples=2, lengths=torch.tensor([19])).to(
        device
    )


def attention(layout, impl):
    q, k, v = (x.requires_grad_() for x in attention_inputs(layout, heads=2, kv_heads=1))
    return lambda: strided_attention(q, k, v, layout, impl=impl).sum().backward()


def step(layout, impl):
    q, k, v = attention_inputs(layout, heads=2, kv_heads=1)
    q = layout.step_rows(q.transpose(1, 2), 1).transpose(1, 2)
    return lambda: strided_attention_step(q, k, v, layout, 1, impl=impl)


def pooling(layout, impl):
    hidden = [randn(1, layout.packed_length, 8, seed=i, dtype=torch.float32, device=layout.device) for i in range(2)]
    mask = randn(1, layout.length, seed=3, device=layout.device) > 0
    leaves = [x.requires_grad_() for x in hidden]
    return lambda: sum(x.sum() for x in pool_features(leaves, layout, token_mask=mask, impl=impl)).backward()


def loss(layout, impl):
    x, y = (z.requires_grad_() for z in feature_inputs(1, 2, 4, 24, device=layout.device))
    return lambda: mean_embedding_loss(x, y, valid=layout.valid[:, :2], unbiased=True, impl=impl).backward()


def matching(layout, impl):
    x, y = feature_inputs(1, 2, 4, 24, device=layout.device)
    return lambda: feature_matching(x, y, valid=layout.valid[:, :2], whitening="sample", impl=impl)


def log_probs(layout, impl):
    hidden, weight = (randn(n, 8, seed=n, dtype=torch.float32, device=layout.device).requires_grad_() for n in (9, 70))
    rows = torch.arange(12, device=layout.device) % 9
    return lambda: linear_log_probs(hidden, weight, rows * 7, rows=rows, temperature=0.6, impl=impl).sum().backward()


def geometry(layout, _impl):
    def use():
        shorter = layout.without_last_step()
        rows = torch.zeros(1, layout.packed_length, 3, device=layout.device)
        layout.distinct_predictors(rows), layout.windows(rows)
        layout.pack(rows[:, : layout.length], layout.rollouts(rows))
        return shorter.position_ids, layout.prompt_only().position_ids

    return use


OPS = (attention, step, pooling, loss, matching, log_probs, geometry)


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("op", OPS)
def test_ops_do_not_wait(op, impl, cuda):
    """From the second call with a layout on: plain PyTorch reads it once, to plan its tiles."""
    run = op(layout_on(cuda), impl)
    run()
    with no_waiting():
        run()


@pytest.mark.parametrize("eos_token_ids", ([], [2, 5]))
def test_the_hot_part_of_a_step_does_not_wait(eos_token_ids, cuda):
    """Rollouts, features, rewards, policy and backward, from the second step with a layout on."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    from ebft_trainer import EBFTOptions, FeatureNetwork, ebft_step

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    # In train mode a first step finds out, once, whether dropout is drawn, and puts the GPU's random state back.
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=4, head_dim=16, **sizes)).eval()
    phi = FeatureNetwork(model).to(cuda)
    model.to(cuda)
    layout = StridedLayout.strided(2, 17, context=4, stride=4, horizon=3, samples=2).to(cuda)
    prompt = (torch.arange(34, device=cuda) * 7 % 64).view(2, 17)
    options = EBFTOptions(ce_coef=0.5, entropy_coef=0.01, eos_token_ids=eos_token_ids)
    ebft_step(model, phi, prompt, layout, options).loss.backward()
    with no_waiting():
        ebft_step(model, phi, prompt, layout, options).loss.backward()
    assert all(x.grad.inner.isfinite().all() for x in model.parameters())


@pytest.mark.parametrize(
    "wait",
    (
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: torch.zeros(2).copy_(x[:2]),
        lambda x: torch.tensor([2, 5], device=x.device),
        lambda x: x.unique(),
    ),
)
def test_what_waits_is_found(wait, cuda):
    x = torch.ones(3, device=cuda)
    wait(x)
    with no_waiting(), pytest.raises(HostWaits):
        wait(x)


def test_tensors_on_two_devices_do_not_mix(cuda):
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        torch.ones(3, device=cuda) + torch.ones(3)
