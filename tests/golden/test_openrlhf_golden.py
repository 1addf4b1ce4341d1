"""`integrations.openrlhf` on the recorded tokens, models and features: what it replaces gave these numbers.

Masks and positions are equal. Hidden states and log-probabilities are within the error budget of float32 around the
plain model in float64, as the recorded ones are; rewards and advantages within the recorded sensitivities. Anchors that
are not valid in a layout are left out, and of the advantages those that the recorded code writes to wrong tokens
(``embed_method="token"``) or divides by the spread over anchors (``group_norm``).
"""

from __future__ import annotations

import pytest
import torch

from ebft_kernels.integrations import openrlhf
from ebft_kernels.testing import assert_within_budget

from .loader import case_parameters
from .test_model_golden import (
    CASES,
    assert_as_sensitive,
    load,
    per_anchor,
    plain_features,
    plain_log_probs,
    rollout_part,
)


def sizes(case) -> dict[str, int]:
    config = case.config
    return {
        "prompt_length": config["P"],
        "context_length": config["context_length"],
        "stride": config["stride"],
        "num_blocks": config["num_blocks"],
    }


def valid_rows(case) -> torch.Tensor:
    """[B, S] bool: prompts, and the tokens of valid anchors, of one sample in the recorded order."""
    config = case.config
    tokens = case.valid[:, None].expand(-1, config["generate_length"], -1).flatten(1)
    return torch.cat([torch.ones(config["B"], config["P"], dtype=torch.bool), tokens], 1)


@CASES
def test_masks_and_positions_of_every_step(name):
    case = load(name)
    config, arrays = case.config, case.arrays
    for step in range(config["generate_length"] + 1):
        length = config["P"] + config["num_blocks"] * step
        mask, positions = openrlhf.build_strided_attention_mask_and_positions(
            length,
            **sizes(case),
            generation_step=step,
            max_generation_length=config["generate_length"],
            device=torch.device("cpu"),
            doc_ids=arrays["doc_ids"],
            document_masking=config["document_masking"],
        )
        assert mask.shape == (config["B"], 1, length, length) and mask.dtype == torch.bfloat16
        assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.bfloat16).min}
        rows = valid_rows(case)[:, :length]
        assert torch.equal((mask[:, 0] == 0)[rows], arrays["mask_allowed"][:, :length, :length][rows])
        assert torch.equal(positions[rows], arrays["position_ids"][:, :length][rows])


@CASES
def test_hidden_states(name):
    case = load(name)
    config, arrays = case.config, case.arrays
    found = openrlhf.strided_hidden_states(
        case.model,
        arrays["full_sequences"],
        **sizes(case),
        generate_max_len=config["generate_length"],
        hidden_state_method=config["hidden_state_method"],
        doc_ids=arrays["doc_ids_full"],
        document_masking=config["document_masking"],
        qa_masks=arrays["qa_masks_full"],
        qa_masking=config["qa_masking"],
        n_samples_per_prompt=config["n"],
    )
    with torch.no_grad():
        eager, truth = (plain_features(case, model) for model in (case.model, case.exact))
    if config["qa_masking"]:
        eager, truth = (x * arrays["qa_masks_full"][:, :, None, None] for x in (eager, truth))
    rows = valid_rows(case).repeat_interleave(config["n"], 0)
    assert found.dtype == torch.float32
    assert_within_budget(found[rows], eager[rows], truth[rows], "hidden states")


@CASES
def test_log_probs(name):
    case = load(name)
    config, arrays = case.config, case.arrays
    with torch.no_grad():
        found = openrlhf.strided_log_probs(
            case.model,
            arrays["full_sequences"],
            config["P"],
            config["context_length"],
            config["num_blocks"],
            config["stride"],
            temperature=case.temperature,
            n_samples_per_prompt=config["n"],
            doc_ids=arrays["doc_ids_full"],
            document_masking=config["document_masking"],
        )
        eager, truth = (plain_log_probs(case, model) for model in (case.model, case.exact))
    rows = valid_rows(case).repeat_interleave(config["n"], 0)[:, 1:]
    assert_within_budget(found[rows], eager[rows], truth[rows], "ours")
    assert_within_budget(found[rows], arrays["log_probs"][rows], truth[rows], "ours, beside the recorded")


def pooled(case) -> tuple[torch.Tensor, torch.Tensor]:
    """The recorded features [1, B, n, A, T, NF, D] of rollouts and windows, pooled as the recorded code pools them."""
    config, arrays = case.config, case.arrays
    masks = case.layout.windows(arrays["qa_masks"]) if config["qa_masking"] else None  # [B, A, G]
    out = []
    for name in ("gen_hidden", "gt_hidden"):
        x = arrays[name].unflatten(0, (config["B"], config["n"]))[None]  # [1, B, n, A, G, NF, H]
        if config["embed_method"] == "mean_pooling":
            x = x.mean(4, keepdim=True)
        elif config["embed_method"] == "concat":
            x = x.transpose(4, 5).flatten(5)[:, :, :, :, None]
        elif config["embed_method"] == "last_token":
            steps = torch.arange(1, x.shape[4] + 1)
            last = (
                (masks * steps).amax(-1) if masks is not None else torch.full(x.shape[1:2] + x.shape[3:4], len(steps))
            )
            index = (last - 1).clamp_min(0)[None, :, None, :, None, None, None].expand(*x.shape[:4], 1, *x.shape[5:])
            x = x.gather(4, index) * (last > 0)[None, :, None, :, None, None, None]
        out.append(x)
    return out[0], out[1]


@CASES
def test_rewards(name):
    case = load(name)
    config = case.config
    match = openrlhf.compute_rewards(
        *pooled(case),
        use_whitening=config["use_whitening"],
        alignment_rew_coef=config["alignment_coef"],
        diversity_rew_coef=config["diversity_coef"],
        advantage_estimator=config["advantage_estimator"],
    )
    for recorded, found in {
        "alignment": match.gt_rewards,
        "diversity": match.diversity_rewards,
        "reward": match.rewards,
    }.items():
        expected, sensitivity = (per_anchor(case, case.arrays[recorded + end]) for end in ("", "_sens"))
        assert_as_sensitive(per_anchor(case, found[0]), expected, sensitivity, case.valid, recorded)
    if config["advantage_estimator"] == "group_norm" or config["embed_method"] == "token":
        return
    full = openrlhf.token_advantages(match.shaped_rewards[0], config["generate_length"], config["S"])
    assert (full[:, : config["P"] - 1] == 0).all() and full.shape == case.arrays["advantages"].shape
    expected, sensitivity = (rollout_part(case, case.arrays["advantages" + end]) for end in ("", "_sens"))
    assert_as_sensitive(rollout_part(case, full), expected, sensitivity, case.valid, "advantages")


@pytest.mark.parametrize("name", case_parameters(lambda config: config["use_whitening"]))
def test_whitening(name):
    """The Gram matrices of whitened rollouts are projections, of the rank that is recorded; windows go the same way."""
    case = load(name)
    x, y = pooled(case)
    found, windows = openrlhf.whiten_embeddings_batched(x, y)
    values = case.arrays["whiten_sv"]  # [B, A, T, NF, n]
    rank = (values > 1e-5 * values.amax(-1, keepdim=True)).sum(-1)
    rows = found[0].permute(0, 2, 3, 4, 1, 5).double()  # [B, A, T, NF, n, D]
    gram = rows @ rows.mT
    torch.testing.assert_close(gram @ gram, gram, rtol=0, atol=1e-4)
    assert torch.equal(gram.diagonal(dim1=-2, dim2=-1).sum(-1).round().long(), rank)
    sums = case.arrays["whiten_rowsum"].permute(0, 1, 2, 3, 4)[None, ..., None]  # [1, B, n, A, T, NF, 1]
    scale = case.arrays["whiten_rowsum"].abs().max()
    torch.testing.assert_close(windows.double(), sums * y.double(), rtol=1e-3, atol=1e-4 * float(scale))
