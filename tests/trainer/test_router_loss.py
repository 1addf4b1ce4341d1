"""The load-balancing loss of mixtures of experts: added as the model itself adds it, over the prompts' tokens.

The kind: a term that a model computes beside its logits, and that is lost where the loss is made from the logits alone.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from ebft_kernels import StridedLayout
from ebft_kernels.integrations.transformers import router_loss_coefficient
from ebft_trainer.config import EBFTConfig, EBFTOptions
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.step import ebft_step
from ebft_trainer.trainer import EBFTTrainer

from ..model_checks import assert_gradients_within_budget

COEFFICIENT = 0.7
EXPERTS = {
    **{"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT, "sliding_window": None},
}
MODELS = {"mixtral": {}, "qwen3_moe": {}, "olmoe": {}, "gpt_oss": {"sliding_window": 6}}


def build(plain, name="mixtral", **changes):
    return plain.build(name, **(EXPERTS | MODELS[name] | changes))


def batch(plain):
    """Prompts with padding behind them, and their attention mask."""
    layout = StridedLayout.strided(2, 24, context=6, stride=4, horizon=4, samples=3, lengths=torch.tensor([24, 17]))
    prompt = plain.prompt_of(layout)
    mask = torch.arange(layout.length) < layout.lengths[:, None]
    return prompt, layout, mask.long()


def own_loss(model, prompt, mask):
    """The load-balancing loss of an ordinary forward over the prompts."""
    return model(input_ids=prompt, attention_mask=mask, use_cache=False).aux_loss


def loss_by_definition(model, prompt, mask):
    """The same from the logits of the experts' gates (Fedus et al., arXiv:2101.03961), in the precision of the model:
    experts times the sum over experts of the share of choices and the mean probability."""
    logits = model(input_ids=prompt, attention_mask=mask, use_cache=False).router_logits
    probability = torch.stack([x.view(*mask.shape, -1).softmax(-1) for x in logits])  # [layers, B, P, experts]
    chosen = torch.zeros_like(probability).scatter(-1, probability.topk(2, -1).indices, 1.0)
    share, mean = (x[:, mask.bool()].flatten(0, 1).mean(0) for x in (chosen, probability))
    return probability.shape[-1] * (share * mean).sum()


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """Of all parameters in one: how rounding is spread over the few numbers of a gate is a matter of luck."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {"all": torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None and x.grad.any()])}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("objective", ("ebft", "sft"))
def test_it_is_the_models_own_over_the_prompts_and_so_is_its_gradient(plain, name, objective):
    model, (prompt, layout, mask) = build(plain, name), batch(plain)
    network = FeatureNetwork(model)
    generator = torch.Generator().manual_seed(0)
    result = ebft_step(model, network, prompt, layout, EBFTOptions(objective=objective), generator=generator)
    exact = plain.double(model)
    actual = gradients(model, result.terms["router"])
    # The model's own is computed in float32, whatever the dtype of its weights.
    eager, truth = COEFFICIENT * own_loss(model, prompt, mask), COEFFICIENT * loss_by_definition(exact, prompt, mask)
    assert_gradients_within_budget(actual, eager=gradients(model, eager), truth=gradients(exact, truth))
    assert result.metrics["loss/router"] == pytest.approx(truth.item() / COEFFICIENT, rel=1e-6)
    others = sum(term for name, term in result.terms.items() if name != "router")
    assert result.loss.item() == pytest.approx((others + result.terms["router"]).item(), rel=1e-6)


def test_cross_entropy_training_has_the_models_own_loss(plain, tmp_path):
    """As transformers adds it to the loss of a batch with labels: the trainer's step has the same loss and gradient."""
    rows = [{"input_ids": ids} for ids in torch.randint(0, 40, (4, 24), generator=torch.Generator().manual_seed(1))]
    ids = torch.stack([row["input_ids"] for row in rows])
    model = build(plain)
    loss = model(ids, labels=ids).loss
    model.zero_grad()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([x.grad for x in model.parameters() if x.grad is not None])
    config = EBFTConfig(
        **{"output_dir": str(tmp_path), "objective": "sft", "max_steps": 1, "per_device_train_batch_size": 4},
        **{"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True},
        dataloader_pin_memory=False,
    )
    trainer = EBFTTrainer(build(plain), config, train_dataset=rows)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["loss"] == pytest.approx(line["loss/ce"] + COEFFICIENT * line["loss/router"], rel=1e-6)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    with torch.no_grad():
        expected = F.cross_entropy(build(plain)(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert line["loss/ce"] == pytest.approx(expected.item(), rel=1e-5)


def test_once_for_each_optimizer_step(plain, tmp_path):
    """Micro-batches with equal rows: four of them add up to the loss of one."""
    (row,) = torch.randint(0, 40, (1, 24), generator=torch.Generator().manual_seed(1))
    lines = []
    for number in (1, 4):
        config = EBFTConfig(
            **{"output_dir": str(tmp_path), "objective": "sft", "max_steps": 1, "per_device_train_batch_size": 1},
            **{"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True},
            **{"dataloader_pin_memory": False, "gradient_accumulation_steps": number},
        )
        trainer = EBFTTrainer(build(plain), config, train_dataset=[{"input_ids": row}] * 4)
        trainer.train()
        lines.append(trainer.state.log_history[0])
    for name in ("loss", "loss/router", "grad_norm"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-5), name


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing_keeps_it_or_is_refused(plain, reentrant):
    """Reentrant checkpointing runs the layers without gradient: the loss would be added and train nothing."""
    model, (prompt, layout, _) = build(plain).train(), batch(plain)
    network, options = FeatureNetwork(model), EBFTOptions(objective="sft")
    expected = ebft_step(model, network, prompt, layout, options)
    expected.loss.backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
        with pytest.raises(ValueError, match="model: its load-balancing loss has no gradient; .*use_reentrant=False"):
            ebft_step(model, network, prompt, layout, options)
        return
    result = ebft_step(model, network, prompt, layout, options)
    result.loss.backward()
    assert torch.equal(result.loss, expected.loss)
    for name, x in model.named_parameters():
        torch.testing.assert_close(x.grad, gradients[name], msg=lambda text, name=name: f"{name}: {text}")


def test_without_the_setting_there_is_none_and_without_a_loss_it_is_refused(plain, tmp_path):
    model = build(plain, output_router_logits=False)
    prompt, layout, _ = batch(plain)
    result = ebft_step(model, None, prompt, layout, EBFTOptions(objective="sft"))
    assert router_loss_coefficient(model) == 0 and set(result.terms) == {"ce"}
    config = EBFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    rows = [{"input_ids": torch.arange(24)}]
    model = plain.build("llama")
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="llama: output_router_logits is set, but no coefficient of a load-bal"):
        EBFTTrainer(model, config, train_dataset=rows)
    model.config.router_aux_loss_coef = 0.1
    with pytest.raises(ValueError, match="llama: output_router_logits is set, but the model gives no load-balancing"):
        EBFTTrainer(model, config, train_dataset=rows)
