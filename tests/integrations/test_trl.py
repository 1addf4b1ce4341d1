"""TRL's trainers with token log-probabilities of `linear_log_probs`: the same loss, gradients, metrics and training."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ebft_kernels.integrations import trl as adapter
from ebft_kernels.integrations.trl import patch_trl
from ebft_kernels.testing import assert_within_budget

from ..model_checks import assert_gradients_within_budget

trl = pytest.importorskip("trl", reason="of the dev extra where Python is 3.11 or newer, as trl needs it to be")

WORDS = [f"w{i}" for i in range(64)]
ARCHITECTURES = ("llama", "gemma2", "granite", "cohere", "phi", "gpt2")  # plain, soft cap, two scales, bias, tied
TEXTS = ["w1 w2 w3 w4 w5 w6", "w7 w8", "w9 w10 w11 w12", "w13 w14 w15 w16 w17"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture
def make(tiny, tokenizer, tmp_path):
    """A trainer of TRL on a tiny random model, always the same."""

    def build(kind: str, architecture: str = "llama", *, changes=None, more=None, **options):
        model = tiny.build(
            architecture, **({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | (changes or {}))
        )
        common = {
            "output_dir": str(tmp_path / kind),
            "per_device_train_batch_size": 4,
            "optim": "sgd",  # Adam would divide the smallest gradients by their own rounding errors
            "learning_rate": 0.1,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "seed": 3,
        } | options
        # A reference that differs from the policy: else the loss of DPO is log 2 for any log-probabilities.
        reference = tiny.build(architecture, seed=1, **(changes or {})) if kind == "dpo" and not more else None
        if kind == "sft":
            rows = [{"prompt": text, "completion": " w3 w4 w5"[: 3 * (1 + i % 3)]} for i, text in enumerate(TEXTS * 4)]
            return trl.SFTTrainer(
                model, trl.SFTConfig(**common), train_dataset=table(rows), processing_class=tokenizer, **(more or {})
            )
        if kind == "dpo":
            rows = [{"prompt": text, "chosen": " w3 w4", "rejected": " w8 w9 w5"} for text in TEXTS * 4]
            return trl.DPOTrainer(
                model,
                reference,
                trl.DPOConfig(**common),
                train_dataset=table(rows),
                processing_class=tokenizer,
                **(more or {}),
            )
        common = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "temperature": 0.7} | common
        # TRL loads the reference model once more by the name of the policy.
        model.save_pretrained(tmp_path / "policy")
        model.config._name_or_path = str(tmp_path / "policy")
        rows = [{"prompt": text} for text in TEXTS * 4]
        trainer = trl.GRPOTrainer(
            model,
            reward,
            trl.GRPOConfig(**common),
            train_dataset=table(rows),
            processing_class=tokenizer,
            **(more or {}),
        )
        if trainer.ref_model is not None:
            trainer.ref_model.load_state_dict(tiny.build(architecture, seed=1).state_dict())
        return trainer

    return build


def table(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def reward(completions, **_rest) -> list[float]:
    return [float(text.count("1")) + len(text) / 100 for text in completions]


def one_loss(trainer, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict]:
    """Loss, gradients and metrics of a trainer on inputs that it has prepared."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    return loss.detach(), gradients, metrics


def prepared(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer._metrics["train"].clear()
    return inputs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shifted", (False, True))
def test_log_probs_and_statistics(make, architecture, shifted):
    """Against the logits of the model's own forward in float64, and nearly as near as those in float32."""
    trainer = make("dpo", architecture, use_weighting=True)
    model = trainer.model.eval()
    patch_trl(trainer)
    tokens = torch.randint(3, 67, (2, 7), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.tensor([[0, 0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1, 0]]) == 0, -100)
    given = {"shift_labels": labels.roll(-1, 1)} if shifted else {"labels": labels}
    output = model(input_ids=tokens, fused_lm_head=True, **given)
    targets = labels.roll(-1, 1) if shifted else labels[:, 1:]
    counted = targets != -100
    assert torch.equal(output.label_mask, counted) and torch.equal(output.log_probs == 0, ~counted)
    upstream = torch.randn(counted.shape, generator=torch.Generator().manual_seed(1))
    (output.log_probs * upstream).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    truths = []
    for dtype in (torch.float32, torch.float64):
        plain = make("dpo", architecture).model.eval().to(dtype)
        logits = plain(input_ids=tokens).logits[:, : counted.shape[1]]
        every = logits.log_softmax(-1)
        log_probs = every.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
        (log_probs * upstream * counted).sum().backward()
        statistics = {
            "log_probs": log_probs,
            "entropy": -(every.exp() * every).sum(-1),
            "mean_logits": logits.mean(-1),
            "log_sum_sq_probs": every.mul(2).exp().sum(-1).log(),
        }
        truths.append(
            (statistics, {name: p.grad for name, p in plain.named_parameters()}, logits.argmax(-1) == targets)
        )
    (eager, eager_grads, _), (truth, truth_grads, top) = truths
    for name, true in truth.items():
        assert_within_budget(getattr(output, name)[counted], eager[name][counted], true[counted], name)
    assert torch.equal(output.is_top1, top & counted)
    assert output.loss.item() == pytest.approx(-truth["log_probs"][counted].mean().item(), rel=1e-5)
    assert_gradients_within_budget(found, eager_grads, truth_grads)


@pytest.mark.parametrize(
    ("kind", "options"),
    (
        ("sft", {}),
        ("sft", {"loss_type": "dft", "completion_only_loss": False}),
        ("dpo", {}),
        ("dpo", {"loss_type": ["ipo", "sigmoid"], "loss_weights": [1.0, 0.5], "use_weighting": True}),
        ("dpo", {"loss_type": "robust", "label_smoothing": 0.1, "ld_alpha": 0.5}),
        ("grpo", {}),
        ("grpo", {"loss_type": "cispo", "top_entropy_quantile": 0.5}),
        ("grpo", {"importance_sampling_level": "sequence", "beta": 0.0}),
    ),
)
def test_loss_gradients_and_metrics_are_those_of_trl(make, kind, options):
    trainer = make(kind, **options)
    inputs = prepared(trainer)
    torch.manual_seed(0)
    loss, gradients, metrics = one_loss(trainer, inputs)
    with patch_trl(trainer):
        torch.manual_seed(0)
        found = one_loss(trainer, inputs)
    torch.testing.assert_close(found[0], loss)
    torch.testing.assert_close(found[1], gradients)
    assert found[2].keys() == metrics.keys()
    for name, values in metrics.items():
        assert found[2][name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
    undone = one_loss(trainer, inputs)
    assert torch.equal(undone[0], loss), "undone, it is TRL's own arithmetic again, bit for bit"
    assert all(torch.equal(undone[1][name], x) for name, x in gradients.items())


@pytest.mark.parametrize("kind", ("sft", "dpo", "grpo"))
@pytest.mark.parametrize("precision", ({}, {"bf16": True}))
def test_training(make, kind, precision):
    """Two steps end at the same weights, under accelerate's autocast too, and go on after the patch is undone."""
    weights = []
    for patched in (False, True):
        trainer = make(kind, **precision)
        patch = patch_trl(trainer) if patched else None
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        if patched:
            patch.undo()
            patch.undo()
            assert trainer.model(input_ids=torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, 67)
            labels = torch.tensor([[3, 4, 5]])
            assert trainer.model(input_ids=labels, labels=labels, fused_lm_head=True).log_probs.shape == (1, 2)
    start = dict(make(kind).model.named_parameters())
    for name, expected in weights[0].items():
        moved = (expected - start[name]).norm()
        assert moved > 0 and (weights[1][name] - expected).norm() <= (0.05 if precision else 1e-3) * moved, name


def test_lora(make):
    adapted = make("dpo", more={"peft_config": LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"])})
    inputs = prepared(adapted)
    loss, gradients, _ = one_loss(adapted, inputs)
    patch_trl(adapted)
    found = one_loss(adapted, inputs)
    assert gradients and all("lora" in name for name in gradients)
    torch.testing.assert_close(found[:2], (loss, gradients))


def test_router_loss(make):
    """The model's own load-balancing loss of a mixture of experts, with the coefficient that TRL gives it."""
    trainer = make("sft", "mixtral", changes={"router_aux_loss_coef": 0.5})
    inputs = prepared(trainer)
    loss, gradients, metrics = one_loss(trainer, inputs)
    patch_trl(trainer)
    found = one_loss(trainer, inputs)
    assert metrics["aux_loss"][0] > 0
    torch.testing.assert_close(found[:2], (loss, gradients))
    assert found[2]["aux_loss"] == pytest.approx(metrics["aux_loss"], rel=1e-5)


def test_a_head_in_float32(make):
    """`cast_lm_head_to_fp32`: the product of the head is not in bfloat16, autocast or not."""
    trainer = make("grpo", cast_lm_head_to_fp32=True, bf16=True)
    inputs = prepared(trainer)
    loss, gradients, _ = one_loss(trainer, inputs)
    patch_trl(trainer)
    found = one_loss(trainer, inputs)
    torch.testing.assert_close(found[0], loss)
    torch.testing.assert_close(found[1]["lm_head.weight"], gradients["lm_head.weight"])


def test_no_label_counts(make):
    trainer = make("sft")
    patch_trl(trainer)
    tokens = torch.tensor([[3, 4, 5]])
    output = trainer.model(input_ids=tokens, labels=torch.full_like(tokens, -100), fused_lm_head=True)
    output.loss.backward()
    assert output.loss == 0 and all((p.grad == 0).all() for p in trainer.model.parameters())


def test_only_this_trainer_is_changed(make):
    one, other = make("sft"), make("sft")
    before = other.model.forward
    patch_trl(one)
    assert other.model.forward == before and one.model.forward != before
    with pytest.raises(ValueError, match="labels: expected the labels"):
        one.model(input_ids=torch.tensor([[3, 4]]), fused_lm_head=True)
    with pytest.raises(ValueError, match="it is patched already"):
        patch_trl(one)


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    (
        ("sft", "label_smoothing_factor", 0.1),
        ("sft", "torch_compile", True),
        ("grpo", "entropy_coef", 0.01),
        ("grpo", "use_adaptive_entropy", True),
        ("dpo", "use_liger_kernel", True),
    ),
)
def test_options_that_cannot_be_honoured(make, kind, option, value):
    trainer = make(kind)
    setattr(trainer.args, option, value)
    forward = trainer.model.forward
    with pytest.raises(ValueError, match=rf"{option}: expected it to be off, got {value}"):
        patch_trl(trainer)
    assert trainer.model.forward == forward


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated")
def test_other_refusals(make, monkeypatch):
    trainer = make("sft", more={"compute_loss_func": lambda *_args, **_options: None})
    with pytest.raises(ValueError, match="compute_loss_func: expected None"):
        patch_trl(trainer)
    trainer = make("sft")
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        monkeypatch.setattr(trainer, name, True)
        with pytest.raises(ValueError, match=f"{name}: expected a model that is whole on every rank"):
            patch_trl(trainer)
        monkeypatch.setattr(trainer, name, False)
    parallel = SimpleNamespace(cp_enabled=True, sp_enabled=False, tp_enabled=False)
    with monkeypatch.context() as patched:
        patched.setattr(type(trainer.accelerator), "parallelism_config", parallel)
        with pytest.raises(ValueError, match="parallelism_config: expected no context"):
            patch_trl(trainer)
    del trainer.model.forward
    with pytest.raises(ValueError, match="trainer: expected models that TRL has set up"):
        patch_trl(trainer)
    with pytest.raises(TypeError, match="trainer: expected a GRPOTrainer, SFTTrainer or DPOTrainer, got object"):
        patch_trl(object())


def test_a_training_that_has_started(make):
    trainer = make("sft", bf16=True)
    trainer.train()
    with pytest.raises(ValueError, match="call patch_trl before"):
        patch_trl(trainer)


@pytest.mark.parametrize("version", ("1.14.2", "1.17.0.dev0", "2.0.0", "0.29.1", "unknown"))
def test_releases_that_are_not_known(monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=f"trl: expected a release from 1.15 on and before 1.17, got {version}"):
        patch_trl(None)


def test_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match="patch_trl needs trl"):
        adapter.patch_trl(None)
