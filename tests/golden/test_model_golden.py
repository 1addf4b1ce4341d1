"""The whole method on the recorded models and tokens, against what the authors' code computed there.

The recorded numbers are float32. What that precision is worth on these models is measured with the plain transformers
model, run in float32 (eager) and float64 (truth) under the recorded mask and positions: recorded numbers and ours must
both be within the error budget around the truth. Rewards have recorded sensitivities to noise in the features, which
give their tolerance. Anchors that are not valid in our layout are left out.
"""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from ebft_kernels import StridedLayout, feature_matching
from ebft_kernels.integrations.transformers import hidden_states, output_head
from ebft_kernels.testing import assert_within_budget
from ebft_trainer import step
from ebft_trainer.config import EBFTOptions
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.rollout import sample_rollouts
from ebft_trainer.scoring import policy_log_probs
from ebft_trainer.step import ebft_step

from ..model_checks import assert_gradients_within_budget, gradient_budget
from .loader import GOLDEN_DIR, case_parameters, load_case

CASES = pytest.mark.parametrize("name", case_parameters())
#: Everything but the weights of a loss agrees with ours only where every anchor is valid and every token counts.
WHOLE = pytest.mark.parametrize(
    "name", [x for x in case_parameters() if x in ("pub01_code_whiten", "pub02_translation", "pub03_odd_n2")]
)
DEPTHS = (0.25, 0.5, 0.75)
ROUNDING = 4 * torch.finfo(torch.float32).eps  # of a float32 result of a few operations, relative
NOISE = 3e-7  # of the features, at which the recorded sensitivities were taken


@functools.lru_cache(maxsize=1)
def load(name: str) -> SimpleNamespace:
    """A case as our inputs: model, layout, prompt, rollouts, token mask, options of features and matching."""
    config, arrays = load_case(name)
    arrays = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
    model = AutoModelForCausalLM.from_pretrained(GOLDEN_DIR / config["model"], attn_implementation="eager").eval()
    layout = StridedLayout.strided(
        config["B"],
        config["P"],
        context=config["context_length"],
        stride=config["stride"],
        horizon=config["generate_length"],
        samples=config["n"],
        document_ids=arrays["doc_ids"] if config["document_masking"] else None,
    )
    packed = layout.from_reference_order(arrays["full_sequences"])
    half = model.config.num_hidden_layers // 2
    layers = {
        "concat": DEPTHS,
        "stack": DEPTHS,
        "last_only": (1.0,),
        "layer_2": (2,),
        "middle_concat": (half, half + 1),
    }
    return SimpleNamespace(
        config=config,
        arrays=arrays,
        model=model,
        exact=copy.deepcopy(model).double(),
        layout=layout,
        valid=layout.valid,
        packed=packed,
        prompt=packed[:, : layout.length],
        rollouts=layout.rollouts(packed),
        mask=arrays["qa_masks"].bool() if config["qa_masking"] else None,
        temperature=config["loss_temperature"],
        features={
            "layers": layers[config["hidden_state_method"]],
            "pooling": "mean" if config["embed_method"] == "mean_pooling" else config["embed_method"],
            "normalize": "per_layer" if config["hidden_state_method"] == "stack" else "joint",
        },
        matching={
            "whitening": "sample" if config["use_whitening"] else "none",
            "alignment_coef": config["alignment_coef"],
            "diversity_coef": config["diversity_coef"],
            "estimator": config["advantage_estimator"],
            "groups": config["NF"],
        },
    )


def rollout_part(case, x: torch.Tensor) -> torch.Tensor:
    """[B*n, S-1] with token t + 1 at t, tokens ordered (step, anchor) -> [B, A, n, G]."""
    layout = case.layout
    tokens = x[:, layout.length - 1 :].unflatten(1, (layout.horizon, layout.num_anchors))
    return tokens.unflatten(0, (layout.batch_size, layout.samples)).permute(0, 3, 1, 2)


def per_anchor(case, x: torch.Tensor) -> torch.Tensor:
    """[B*n, A, ...] or [B, n, A, ...] -> [B, A, n, ...]."""
    x = x if x.shape[:2] == (case.config["B"], case.config["n"]) else x.unflatten(0, (-1, case.config["n"]))
    return x.transpose(1, 2)


def plain_forward(case, model, tokens=None):
    """The plain model on the authors' rows [B*n, S] under the recorded mask and positions."""
    tokens = case.arrays["full_sequences"] if tokens is None else tokens
    repeat = len(tokens) // case.config["B"]
    allowed = case.arrays["mask_allowed"].repeat_interleave(repeat, 0)[:, None]
    lowest = torch.finfo(model.dtype).min
    return model(
        input_ids=tokens,
        attention_mask=torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(~allowed, lowest),
        position_ids=case.arrays["position_ids"].repeat_interleave(repeat, 0),
        output_hidden_states=True,
        use_cache=False,
    )


def plain_log_probs(case, model) -> torch.Tensor:
    """[B*n, S-1] as recorded. Differentiable."""
    layout = case.layout
    rows = torch.cat(
        [
            torch.arange(layout.length - 1),
            layout.anchors[0] - 1,
            torch.arange(layout.length, case.config["S"] - layout.num_anchors),
        ]
    )
    logits = plain_forward(case, model).logits[:, rows]
    temperature = torch.ones(len(rows), 1, dtype=logits.dtype)
    temperature[layout.length - 1 :] = case.temperature
    targets = case.arrays["full_sequences"][:, 1:, None]
    return (logits / temperature).log_softmax(-1).gather(-1, targets)[..., 0]


def plain_features(case, model) -> torch.Tensor:
    """[B*n, S, NF, H]: every token's normalised feature, as the authors order it."""
    states = plain_forward(case, model).hidden_states
    network = FeatureNetwork(case.model, **case.features)
    taken = torch.stack([states[layer] for layer in network.layers], 2)  # [B*n, S, L, C]
    return F.normalize(taken.unflatten(2, (case.config["NF"], -1)).flatten(3), dim=-1)


def authors_weights(case, advantages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B*n, S-1] float64: the weights that the authors' policy loss and cross-entropy give to each log-probability."""
    action = case.arrays["action_mask"]
    counted = case.arrays["qa_masks_full"][:, 1:].bool() if case.mask is not None else torch.ones_like(action)

    def row_mean(mask):
        mask = torch.where(mask.any(1, keepdim=True), mask, True)  # a row without any counted token: all of its tokens
        return mask.double() / mask.sum(1, keepdim=True) / len(mask)

    return row_mean(action & counted) * advantages, row_mean(~action & counted)


def assert_as_sensitive(ours, recorded, sensitivity, valid, kind) -> None:
    """[B, A, n, ...]: off by no more than noise in the features explains.

    The largest of the recorded eight draws is about 1.7 standard deviations, taken here over the samples of an anchor,
    which are whitened together; among a thousand numbers some are off by three or four. Four times it is plenty.
    """
    tolerance = 4 * sensitivity.amax(2, keepdim=True) + ROUNDING * recorded.abs().clamp_min(1)
    error = (ours - recorded).abs()
    assert (error <= tolerance)[valid].all(), f"{kind}: off by up to {error[valid].max():.2e}"


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def plain_gradients(case, weights) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of ``- weights * log-probabilities``, in float32 and float64."""
    models = case.model, case.exact
    return tuple(gradients(model, -(weights * plain_log_probs(case, model)).sum()) for model in models)


@CASES
@torch.no_grad()
def test_log_probs(name):
    case = load(name)
    eager, truth = (plain_log_probs(case, model) for model in (case.model, case.exact))
    assert_within_budget(case.arrays["log_probs"], eager, truth, "recorded")
    rollouts, prompt = policy_log_probs(
        case.model, case.prompt, case.rollouts, case.layout, temperature=case.temperature, score_prompt=True
    )
    eager_part, truth_part = (rollout_part(case, x)[case.valid] for x in (eager, truth))
    assert_within_budget(rollouts[case.valid], eager_part, truth_part, "rollouts")
    for sample in range(case.config["n"]):
        rows = slice(sample, None, case.config["n"])
        end = case.layout.length - 1
        assert_within_budget(prompt, eager[rows, :end], truth[rows, :end], "prompt")


@CASES
@torch.no_grad()
def test_greedy_rollouts(name):
    case = load(name)
    layout = case.layout._replace(samples=1)
    greedy, valid = case.arrays["greedy_full_sequences"], layout.valid
    eager, truth = (
        layout.predictors(layout.from_reference_order(plain_forward(case, model, greedy).logits))[valid]
        for model in (case.model, case.exact)
    )
    margin = case.arrays["greedy_margin"].transpose(1, 2)[valid]
    assert margin.min() > 10 * (eager - truth).abs().max(), "else rounding may choose another token"
    tokens, _ = sample_rollouts(case.model, case.prompt, layout, temperature=0)
    packed = layout.from_reference_order(greedy)
    assert torch.equal(tokens[valid], layout.rollouts(packed)[valid])
    logits = output_head(case.model).logits(layout.predictors(hidden_states(case.model, packed, layout)))
    assert_within_budget(logits[valid], eager, truth)
    if "greedy_logits" in case.arrays:
        recorded = case.arrays["greedy_logits"].transpose(1, 2)[:, :, None]
        assert_within_budget(recorded[valid], eager, truth, "recorded")


@CASES
@torch.no_grad()
def test_features(name):
    case = load(name)
    layout, config = case.layout, case.config
    network = FeatureNetwork(case.model, **case.features)
    mask = torch.ones_like(case.prompt) if case.mask is None else case.mask
    mask = layout.windows(mask)[:, :, None, :, None]  # [B, A, 1, G, 1]
    runs = []
    for model in (case.model, case.exact):
        features = layout.from_reference_order(plain_features(case, model)).flatten(2)
        runs.append((layout.rollouts(features) * mask, layout.windows(features) * mask[:, :, 0]))
    recorded = (
        per_anchor(case, case.arrays["gen_hidden"]).flatten(-2),
        per_anchor(case, case.arrays["gt_hidden"])[:, :, 0].flatten(-2),
    )
    ours = network(case.packed, layout, case.mask, pooling="token")
    assert ours[0].shape == (config["B"], layout.num_anchors, config["n"], layout.horizon, config["NF"] * config["H"])
    for kind, theirs, our, eager, truth in zip(("rollouts", "targets"), recorded, ours, *runs, strict=True):
        valid = case.valid
        assert_within_budget(theirs[valid], eager[valid], truth[valid], f"recorded {kind}")
        assert_within_budget(our[valid], eager[valid], truth[valid], kind)


@CASES
@torch.no_grad()
def test_rewards(name):
    case = load(name)
    network = FeatureNetwork(case.model, **case.features)
    assert network.groups == case.config["NF"]
    per_token = network(case.packed, case.layout, case.mask, pooling="token")[0].unflatten(-1, (case.config["NF"], -1))
    difference = (per_token - per_anchor(case, case.arrays["gen_hidden"]))[case.valid]
    assert difference.square().mean().sqrt() <= NOISE, "our features differ by no more than the noise of the record"
    match = feature_matching(*network(case.packed, case.layout, case.mask), **case.matching, valid=case.valid)
    for kind in ("alignment", "diversity", "reward"):
        recorded, sensitivity = (per_anchor(case, case.arrays[kind + suffix]) for suffix in ("", "_sens"))
        assert_as_sensitive(getattr(match, kind), recorded, sensitivity, case.valid, kind)
    if case.config["advantage_estimator"] != "group_norm" and case.features["pooling"] != "token":
        recorded, sensitivity = (rollout_part(case, case.arrays["advantages" + s])[..., 0] for s in ("", "_sens"))
        assert_as_sensitive(match.advantage, recorded, sensitivity, case.valid, "advantage")


@CASES
@torch.no_grad()
def test_losses(name):
    """The recorded weights on our log-probabilities; the policy loss is minus a mean advantage in the record."""
    case = load(name)
    config, arrays, length = case.config, case.arrays, case.layout.length
    gains, shares = authors_weights(case, arrays["advantages"])
    rl_loss, ce_loss, total = (float(arrays[kind]) for kind in ("rl_loss", "ce_loss", "total_loss"))
    assert -float(gains.sum()) == pytest.approx(rl_loss, abs=ROUNDING * float(gains.abs().sum()))
    expected = config["rl_coef"] * rl_loss + config["ce_coef"] * ce_loss
    assert total == pytest.approx(expected, abs=ROUNDING * (abs(rl_loss) + ce_loss))
    rollouts, prompt = policy_log_probs(
        case.model, case.prompt, case.rollouts, case.layout, temperature=case.temperature, score_prompt=True
    )
    # A row without any counted token scores its rollouts as if they were text; they weigh nothing elsewhere.
    found = -(rollout_part(case, shares) * rollouts)[case.valid].sum()
    found -= (rollout_part(case, shares) * rollout_part(case, plain_log_probs(case, case.model)))[~case.valid].sum()
    found -= (shares[:, : length - 1].unflatten(0, (config["B"], -1)).sum(1) * prompt).sum()
    truth = -(shares * plain_log_probs(case, case.exact)).sum().item()
    assert found.item() == pytest.approx(truth, rel=ROUNDING)
    assert ce_loss == pytest.approx(truth, rel=ROUNDING)


@CASES
def test_gradients(name):
    """The recorded weights on our log-probabilities. Those of anchors that we do not compare are the plain model's."""
    case = load(name)
    config, arrays, layout = case.config, case.arrays, case.layout
    gains, shares = authors_weights(case, arrays["advantages"])
    weights = config["rl_coef"] * gains + config["ce_coef"] * shares
    eager, truth = plain_gradients(case, weights)
    rollouts, prompt = policy_log_probs(
        case.model, case.prompt, case.rollouts, layout, temperature=case.temperature, score_prompt=True
    )
    loss = -(rollout_part(case, weights) * rollouts)[case.valid].sum()
    loss = loss - (weights[:, : layout.length - 1].unflatten(0, (config["B"], -1)).sum(1) * prompt).sum()
    if not case.valid.all():
        loss = loss - rollout_part(case, weights * plain_log_probs(case, case.model))[~case.valid].sum()
    found = gradients(case.model, loss)
    assert_gradients_within_budget(found, eager, truth)
    for parameter, true in truth.items():
        at = arrays.get(f"gidx__{parameter}", slice(None))
        recorded = arrays[f"grad__{parameter}"].flatten() if isinstance(at, slice) else arrays[f"gval__{parameter}"]
        assert_within_budget(recorded, eager[parameter].flatten()[at], true.flatten()[at], f"recorded {parameter}")
        norm, budget = float(arrays[f"gnorm__{parameter}"]), gradient_budget(eager[parameter], true)
        assert abs(found[parameter].double().norm() - norm) <= 2 * budget, parameter


@WHOLE
def test_one_step(name, monkeypatch):
    """`ebft_step` with the recorded rollouts, where its loss is the authors': their formula with our advantages."""
    case = load(name)
    config, layout = case.config, case.layout
    recorded = case.rollouts, torch.zeros(case.rollouts.shape)
    monkeypatch.setattr(step, "sample_rollouts", lambda *_args, **_options: recorded)
    coefficients = {key: config[key] for key in ("rl_coef", "ce_coef")}
    options = EBFTOptions(
        temperature=case.temperature,
        eos_token_ids=[],
        **coefficients,
        **{key: value for key, value in case.matching.items() if key != "groups"},
    )
    network = FeatureNetwork(case.model, **case.features)
    result = ebft_step(case.model, network, case.prompt, layout, options)
    ours = gradients(case.model, result.loss)
    if config["ce_coef"]:
        tolerance = ROUNDING * float(case.arrays["ce_loss"])
        assert result.metrics["loss/ce"] == pytest.approx(float(case.arrays["ce_loss"]), abs=tolerance)
    per_token = result.match.advantage[..., None].expand(case.rollouts.shape)
    advantages = layout.to_reference_order(layout.pack(torch.zeros(case.prompt.shape), per_token))[:, 1:]
    gains, shares = authors_weights(case, advantages)
    eager, truth = plain_gradients(case, config["rl_coef"] * gains + config["ce_coef"] * shares)
    assert_gradients_within_budget(ours, eager, truth)
