"""The trainer: what it logs, saves, resumes and refuses, and that what transformers adds keeps its meaning."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from ebft_kernels import StridedLayout
from ebft_trainer.config import EBFTConfig, checkpointing_field
from ebft_trainer.data import EBFTCollator
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.trainer import EBFTTrainer

STEP_METRICS = {
    *("loss", "grad_norm", "learning_rate", "epoch", "step"),
    *("loss/rl", "loss/ce", "feature_matching_loss", "alignment", "diversity", "reward"),
    *("reward_std", "advantage_std"),
    *("duplicate_rate", "entropy", "log_prob_gap", "valid_anchors", "tokens", "tokens_per_second", "nonfinite_steps"),
    *("seconds/rollout", "seconds/features", "seconds/matching", "seconds/policy", "seconds/step"),
}
CHECKPOINTING = checkpointing_field()
NOT_REPRODUCIBLE = ("seconds", "tokens_per_second", "runtime", "per_second", "flos")


def rows_of(*lengths: int, seed: int = 1, **columns) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 40, (n,), generator=generator), **columns} for n in lengths]


ROWS = rows_of(*[24] * 16)


@pytest.fixture
def config(tmp_path):
    def make(**options) -> EBFTConfig:
        geometry = {"context": 4, "stride": 6, "horizon": 3, "samples": 3}
        usual = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        }
        return EBFTConfig(**(geometry | usual | options))

    return make


@pytest.fixture(autouse=True)
def quiet_and_separate(monkeypatch):
    """Log lines go to the history only; bf16 does not stay on, as it does in older versions of transformers."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("transformers.trainer_callback.PrinterCallback.on_log", lambda *_args, **_kwargs: None)


def history(trainer: EBFTTrainer) -> list[dict]:
    """The log without what the clock decides."""
    return [
        {name: value for name, value in line.items() if not any(part in name for part in NOT_REPRODUCIBLE)}
        for line in trainer.state.log_history
    ]


def gradients(trainer: EBFTTrainer) -> dict[str, torch.Tensor]:
    """Gradients of one optimizer step, before anything is done with them."""
    seen: dict[str, torch.Tensor] = {}

    def keep(*_args, **_kwargs):
        parameters = trainer.model.named_parameters()
        seen.update({name: p.grad.clone() for name, p in parameters if p.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return seen


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# What is logged


def test_a_run_logs_every_metric_and_changes_the_model_alone(plain, config):
    model = plain.build()
    before = copy.deepcopy(model.state_dict())
    trainer = EBFTTrainer(model, config(ce_coef=0.5), train_dataset=ROWS)
    frozen = copy.deepcopy(trainer.feature_network.state_dict())
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert set(line) == STEP_METRICS | ({"weights_moved"} if line is lines[0] else set())
        assert all(torch.isfinite(torch.tensor(float(value))) for value in line.values())
        assert line["valid_anchors"] == 6 and line["tokens"] == 2 * (24 + 3 * 3 * 3)
        assert line["loss"] == pytest.approx(line["loss/rl"] + 0.5 * line["loss/ce"], rel=1e-5)
        phases = sum(line[f"seconds/{phase}"] for phase in ("rollout", "features", "matching", "policy"))
        assert 0 < phases < line["seconds/step"]
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert_same(frozen, trainer.feature_network.state_dict(), rtol=0, atol=0)


def test_a_log_line_is_the_mean_over_steps_rollouts_and_micro_batches(plain, config):
    def lines(logging_steps):
        trainer = EBFTTrainer(
            plain.build(),
            config(logging_steps=logging_steps, gradient_accumulation_steps=2, max_steps=4),
            train_dataset=rows_of(24, 11, 17, 8, 24, 18, 9, 20) * 2,
        )
        trainer.train()
        return [line for line in trainer.state.log_history if "loss" in line]

    single, pairs = lines(1), lines(2)
    assert len(single) == 4 and len(pairs) == 2
    assert len({line["valid_anchors"] for line in single}) > 1
    for name in ("loss", "loss/rl", "alignment", "reward", "valid_anchors", "tokens", "entropy"):
        for number, line in enumerate(pairs):
            a, b = single[2 * number], single[2 * number + 1]
            of_rollouts = name not in ("loss", "valid_anchors", "tokens")
            weights = (a["valid_anchors"], b["valid_anchors"]) if of_rollouts else (1, 1)
            expected = (a[name] * weights[0] + b[name] * weights[1]) / sum(weights)
            assert line[name] == pytest.approx(expected, rel=1e-5), name


def test_without_rollouts_it_is_cross_entropy_training(plain, config):
    options = {"rl_coef": 0.0, "ce_coef": 1.0, "per_device_train_batch_size": 4, "max_steps": 1}
    trainer = EBFTTrainer(plain.build(), config(**options), train_dataset=ROWS[:4])
    assert trainer.feature_network is None
    actual = gradients(trainer)
    (line,) = (line for line in trainer.state.log_history if "loss" in line)
    assert "loss/ce" in line and "alignment" not in line
    model, ids = plain.build(), torch.stack([row["input_ids"] for row in ROWS[:4]])
    loss = model(ids, labels=ids).loss
    loss.backward()
    # transformers clips to norm 1 before the optimizer sees the gradient.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert_same(actual, {name: p.grad for name, p in model.named_parameters()}, rtol=1e-4, atol=1e-6)


# Objectives


def last_token_is_even(_prompt, rollouts, _layout, **_masks):
    return (rollouts[..., -1] % 2 == 0).float()


def test_objectives_run_on_the_same_data_and_are_measured_alike(plain, config, byte_tokenizer):
    """Coefficients of their own, the same rows, evaluation and kind of log; only what is trained differs."""
    found = {}
    for objective in ("ebft", "sft", "rlvr"):
        model = plain.build(vocab_size=257)
        options = config(
            objective=objective, temperature=1.0, verifier="char_f_score", eval_strategy="steps", eval_steps=1
        )
        trainer = EBFTTrainer(
            model, options, train_dataset=ROWS, eval_dataset=ROWS[:4], processing_class=byte_tokenizer
        )
        first = trainer.evaluate()
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        assert len(lines) == 2
        found[objective] = first, set(lines[0])
    evaluations = [
        {k: v for k, v in first.items() if "per_second" not in k and "time" not in k} for first, *_ in found.values()
    ]
    assert evaluations[0] == evaluations[1] == evaluations[2]
    assert 0 <= evaluations[0]["eval_verifier_reward"] <= 1
    assert {"loss/rl", "alignment", "eos_rate"} < found["ebft"][1] and "loss/ce" not in found["ebft"][1]
    assert "loss/ce" in found["sft"][1] and "duplicate_rate" not in found["sft"][1]
    assert {"loss/verifier", "verifier_reward", "verifier_reward_std", "eos_rate"} < found["rlvr"][1]
    assert "alignment" not in found["rlvr"][1]


def test_a_verifier_of_tokens_raises_its_reward(plain, config):
    """End to end: rewarded for even last tokens, the model learns to write them."""
    options = {"objective": "rlvr", "temperature": 1.0, "max_steps": 30, "learning_rate": 3e-2, "logging_steps": 10}
    trainer = EBFTTrainer(
        plain.build(), config(**options), train_dataset=ROWS, eval_dataset=ROWS[:8], verifier=last_token_is_even
    )
    before = trainer.evaluate()["eval_verifier_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_verifier_reward"]
    assert before < 0.7 and after > before + 0.2
    rewards = [line["verifier_reward"] for line in trainer.state.log_history if "verifier_reward" in line]
    assert rewards[-1] > rewards[0]


@pytest.mark.parametrize("bf16", [False, True])
def test_the_divergence_from_the_model_as_it_was_given(plain, config, bf16):
    # A replayed forward rounds as decoding did, not as the reference's forward does.
    options = config(kl_coef=0.5, bf16=bf16, learning_rate=1e-1, replay_rollouts=False)
    model = plain.build()
    trainer = EBFTTrainer(model, options, train_dataset=ROWS)
    assert not list(trainer.feature_network.parameters()), "it shares the reference's weights"
    frozen = copy.deepcopy(trainer.reference_model.state_dict())
    trainer.train()
    first, second = (line for line in trainer.state.log_history if "loss" in line)
    assert first["loss/kl"] == 0, "the policy is its reference, in the same precision"
    assert second["loss/kl"] > 1e-4
    assert_same(frozen, trainer.reference_model.state_dict(), rtol=0, atol=0)
    assert not any(p.requires_grad for p in trainer.reference_model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    plain_features = EBFTTrainer(plain.build(), config(), train_dataset=ROWS).feature_network
    layout = StridedLayout.strided(1, 24, context=4, stride=6, horizon=3, samples=3)
    packed = torch.randint(0, 40, (1, layout.packed_length))
    for x, y in zip(trainer.feature_network(packed, layout), plain_features(packed, layout), strict=True):
        assert torch.equal(x, y)


def test_a_given_reference_is_used(plain, config):
    trainer = EBFTTrainer(plain.build(), config(kl_coef=0.5), train_dataset=ROWS, reference_model=plain.build(seed=5))
    trainer.train()
    assert trainer.state.log_history[0]["loss/kl"] > 1e-2
    both = {"kl_coef": 0.5, "kl_reference": "base"}
    with pytest.raises(ValueError, match="kl_reference: expected 'start' with a reference_model, got 'base'"):
        EBFTTrainer(plain.build(), config(**both), train_dataset=ROWS, reference_model=plain.build())
    with pytest.raises(
        ValueError, match="kl_reference: expected 'start' for a model without PEFT adapters, got 'base'"
    ):
        EBFTTrainer(plain.build(), config(**both), train_dataset=ROWS)
    with pytest.raises(ValueError, match="kl_reference: expected one of 'start', 'base'; got 'first'"):
        config(kl_reference="first")


def test_a_feature_map_that_is_no_module(plain, config):
    def features(packed, layout, **_masks):
        one_hot = torch.nn.functional.one_hot(packed, 61).float()
        return layout.rollouts(one_hot).sum(3), layout.windows(one_hot).sum(2)

    trainer = EBFTTrainer(plain.build(), config(), train_dataset=ROWS, eval_dataset=ROWS[:2], feature_network=features)
    trainer.train()
    assert trainer.state.log_history[0]["feature_matching_loss"] > 0
    assert trainer.evaluate()["eval_feature_matching_loss_h1"] > 0


def test_a_verifier_must_be_given_and_needs_a_tokenizer(plain, config):
    with pytest.raises(ValueError, match="verifier: expected one with verifier_coef = 1.0, got None"):
        EBFTTrainer(plain.build(), config(objective="rlvr"), train_dataset=ROWS)
    with pytest.raises(TypeError, match="tokenizer: expected one of transformers, got NoneType"):
        EBFTTrainer(plain.build(), config(verifier="exact_match"), train_dataset=ROWS)


# Randomness


def test_the_same_seed_gives_the_same_run_and_another_seed_another(plain, config):
    def run(seed):
        trainer = EBFTTrainer(plain.build(), config(seed=seed), train_dataset=ROWS, eval_dataset=ROWS[:4])
        trainer.train()
        trainer.evaluate()
        return history(trainer)

    first = run(3)
    assert run(3) == first
    assert run(4) != first


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(plain, config, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}

    def trainer(folder, **more):
        run = config(**options, output_dir=str(tmp_path / folder), **more)
        return EBFTTrainer(plain.build(), run, train_dataset=ROWS)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 6
    assert history(resumed)[:-1] == history(whole)[:-1]  # the last line is a mean over the steps of this process
    assert_same(whole.model.state_dict(), resumed.model.state_dict(), rtol=0, atol=0)


def test_every_micro_batch_and_step_draws_other_rollouts(plain, config, monkeypatch):
    keys = []
    original = EBFTTrainer._generator
    monkeypatch.setattr(EBFTTrainer, "_generator", lambda self, *key: keys.append(key) or original(self, *key))
    EBFTTrainer(plain.build(), config(gradient_accumulation_steps=2), train_dataset=ROWS).train()
    assert keys == [(42, "train", 0, 0), (42, "train", 0, 1), (42, "train", 1, 0), (42, "train", 1, 1)]


# The loss under transformers' features


@pytest.mark.parametrize("rl_coef", [1.0, 0.0])
@pytest.mark.parametrize("lengths", [(24, 24, 24, 24), (24, 8, 17, 11)])
def test_accumulation_of_four_rows_is_one_batch_of_four(plain, config, lengths, rl_coef):
    """Whatever the number of anchors and of tokens in each."""
    # Greedy rollouts, so that the division of the random numbers among micro-batches does not matter.
    options = {"temperature": 0.0, "estimator": "reinforce", "ce_coef": 0.3, "max_steps": 1, "max_grad_norm": 0.0}
    sizes = {"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    rows = rows_of(*lengths)
    one, four = (
        EBFTTrainer(plain.build(), config(**options, **size, rl_coef=rl_coef), train_dataset=rows) for size in sizes
    )
    assert_same(gradients(one), gradients(four), rtol=1e-4, atol=1e-6)
    a, b = one.state.log_history[0], four.state.log_history[0]
    for name in ("loss", "loss/ce", *(("feature_matching_loss", "loss/rl", "entropy") if rl_coef else ())):
        assert a[name] == pytest.approx(b[name], rel=1e-5), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(plain, config, use_reentrant):
    usual = EBFTTrainer(plain.build(), config(max_steps=1), train_dataset=ROWS)
    recomputed = EBFTTrainer(
        plain.build(),
        config(
            max_steps=1,
            **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}},
        ),
        train_dataset=ROWS,
    )
    calls = []
    attention = recomputed.model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = gradients(recomputed)
    # The prompt, two decoding steps, the policy's forward and its recomputation.
    assert calls == [False, False, False, not use_reentrant, True]
    assert_same(gradients(usual), actual, rtol=1e-5, atol=1e-7)


def test_bfloat16_autocast_is_close_and_keeps_float32_weights(plain, config, monkeypatch):
    options = {"temperature": 0.0, "estimator": "reinforce", "whitening": "none", "ce_coef": 1.0, "max_steps": 1}
    exact = EBFTTrainer(plain.build(), config(**options), train_dataset=ROWS)
    rounded = EBFTTrainer(plain.build(), config(**options, bf16=True), train_dataset=ROWS)
    dtypes = []
    rounded.model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: dtypes.append(out.dtype))
    exact.train()
    rounded.train()
    assert set(dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())
    a, b = exact.state.log_history[0], rounded.state.log_history[0]
    assert a["loss/ce"] != b["loss/ce"]
    assert a["loss/ce"] == pytest.approx(b["loss/ce"], rel=2**-7)
    # The same model in another trainer is no longer under autocast.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    dtypes.clear()
    EBFTTrainer(rounded.model, config(max_steps=1), train_dataset=ROWS).train()
    assert set(dtypes) == {torch.float32}


def test_padding_does_not_matter(plain, config):
    lengths = (24, 11, 17, 8)
    rows = rows_of(*lengths)
    junk = [
        {
            "input_ids": torch.cat([row["input_ids"], torch.full((5,), 39)]),
            "attention_mask": [1] * len(row["input_ids"]) + [0] * 5,
        }
        for row in rows
    ]
    options = {"per_device_train_batch_size": 4, "max_steps": 1, "ce_coef": 1.0, "temperature": 0.0}
    options |= {"estimator": "reinforce", "max_grad_norm": 0.0}

    def run(dataset, pad_token_id):
        run_config = config(**options)
        collator = EBFTCollator(run_config, pad_token_id=pad_token_id)
        return EBFTTrainer(plain.build(), run_config, train_dataset=dataset, data_collator=collator)

    first, second = run(rows, 0), run(junk, 7)
    assert_same(gradients(first), gradients(second), rtol=1e-5, atol=1e-7)
    assert first.state.log_history[0]["valid_anchors"] == sum((n - 3 - 4) // 6 + 1 for n in lengths)


def test_prompt_completion_rows_train_on_completions_only(plain, config):
    rows = rows_of(20, 20, completion_mask=[False] * 9 + [True] * 9 + [False] * 2)
    model = plain.build()
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        log_probs = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    trainer = EBFTTrainer(model, config(ce_coef=1.0, max_steps=1), train_dataset=rows)
    layouts = []
    original = trainer.data_collator
    trainer.data_collator = lambda batch: layouts.append(original(batch)["layout"]) or original(batch)
    trainer.train()
    assert layouts[0].anchors.tolist() == [[9, 15], [9, 15]]
    assert trainer.state.log_history[0]["valid_anchors"] == 4
    assert trainer.state.log_history[0]["loss/ce"] == pytest.approx(-log_probs[:, 8:17].mean().item(), rel=1e-5)


def test_lora_trains_adapters_only_and_compares_in_the_model_without_them(plain, config):
    peft = pytest.importorskip("peft")
    base = plain.build()
    weights = {name: p.clone() for name, p in base.named_parameters()}
    network = FeatureNetwork(plain.build())
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    trainer = EBFTTrainer(model, config(), train_dataset=ROWS, eval_dataset=ROWS[:2])
    layout = StridedLayout.strided(1, 24, context=4, stride=6, horizon=3, samples=3)
    packed = torch.randint(0, 40, (1, layout.packed_length))
    trained = gradients(trainer)
    assert trained and all("lora_" in name for name in trained)
    assert all(gradient.abs().sum() > 0 for gradient in trained.values())
    for name, p in model.get_base_model().named_parameters():
        if "lora_" not in name:
            torch.testing.assert_close(p, weights[name.replace(".base_layer", "")], rtol=0, atol=0)
    for actual, expected in zip(trainer.feature_network(packed, layout), network(packed, layout), strict=True):
        torch.testing.assert_close(actual, expected)
    assert trainer.evaluate()["eval_alignment"] <= 2


# Evaluation


def test_evaluation_uses_a_fixed_subset_and_fixed_random_numbers(plain, config):
    rows = rows_of(24, 18, 21, 12, 24, 18, 21, 12)
    asked = []

    class Rows(list):
        def __getitem__(self, number):
            asked.append(number)
            return super().__getitem__(number)

    trainer = EBFTTrainer(plain.build(), config(eval_rows=5), train_dataset=ROWS, eval_dataset=Rows(rows))
    asked.clear()
    first = trainer.evaluate()
    chosen = list(asked)
    torch.rand(7)
    second = trainer.evaluate()
    assert len(set(chosen)) == 5 and chosen == sorted(chosen) and asked == chosen * 2
    for name, value in first.items():
        assert second[name] == value or "per_second" in name or "runtime" in name
    assert first["eval_loss"] == first["eval_cross_entropy"]
    expected = {"eval_perplexity", "eval_feature_matching_loss", "eval_alignment"}
    expected |= {f"eval_{name}_h{g}" for name in ("feature_matching_loss", "alignment") for g in (1, 2, 3)}
    assert expected <= set(first)


def test_evaluation_does_not_depend_on_the_batch_size_but_for_the_rollouts(plain, config):
    def evaluate(**options):
        model = plain.build()
        return EBFTTrainer(model, config(temperature=0.0, **options), eval_dataset=rows_of(24, 18, 21)).evaluate()

    together, one_by_one = evaluate(), evaluate(per_device_eval_batch_size=1)
    for name in ("eval_cross_entropy", "eval_feature_matching_loss_h2", "eval_alignment"):
        assert together[name] == pytest.approx(one_by_one[name], rel=1e-4)


def test_a_long_evaluation_says_how_long_and_what_makes_it_shorter(plain, config, caplog, monkeypatch):
    trainer = EBFTTrainer(plain.build(), config(per_device_eval_batch_size=2), eval_dataset=ROWS[:6])
    with caplog.at_level("INFO", logger="ebft_trainer.trainer"):
        trainer.evaluate()
        assert caplog.messages == ["rollouts end with the tokens (none)", "evaluation: 6 of 6 rows (eval_rows)"]
        monkeypatch.setattr("ebft_trainer.trainer.LONG_EVALUATION", 0.0)
        trainer.evaluate()
    assert re.fullmatch(
        r"evaluation: 6 rows in 3 batches of 0 seconds, about 0\.\d minutes in all; eval_rows \(--eval-rows\) makes it "
        "shorter",
        caplog.messages[-1],
    )
    assert len(caplog.messages) == 4


def test_evaluation_during_training_is_logged_and_changes_no_step(plain, config):
    quiet = EBFTTrainer(plain.build(), config(), train_dataset=ROWS)
    quiet.train()
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": False}
    evaluated = EBFTTrainer(
        plain.build(), config(**options), train_dataset=ROWS, eval_dataset={"a": ROWS[:2], "b": ROWS[2:5]}
    )
    evaluated.train()
    assert [line for line in history(evaluated) if "loss" in line] == [
        line for line in history(quiet) if "loss" in line
    ]
    assert sum("eval_a_alignment" in line for line in evaluated.state.log_history) == 2
    assert sum("eval_b_loss" in line for line in evaluated.state.log_history) == 2


def test_a_given_feature_network_is_used(plain, config):
    model, other = plain.build(), plain.build(seed=9)
    own = EBFTTrainer(model, config(), eval_dataset=ROWS[:2]).evaluate()
    network = FeatureNetwork(other)
    given = EBFTTrainer(model, config(), eval_dataset=ROWS[:2], feature_network=network).evaluate()
    assert own["eval_cross_entropy"] == given["eval_cross_entropy"]
    assert own["eval_feature_matching_loss"] != given["eval_feature_matching_loss"]


# Bad input


class Endless(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_dataset": []}, "train_dataset: expected at least one row, got none"),
        (
            {"train_dataset": rows_of(24, 6)},
            r"train_dataset: row 1: input_ids: expected at least context \+ horizon = 4 \+ 3 tokens, got 6",
        ),
        ({"eval_dataset": rows_of(3)}, "eval_dataset: row 0: input_ids: expected at least"),
        ({"eval_dataset": {"news": rows_of(24, 3)}}, "news: row 1: input_ids: expected at least"),
        (
            {"train_dataset": rows_of(12, completion_mask=[True] * 3 + [False] * 9)},
            "train_dataset: row 0: completion_mask: no room for an anchor",
        ),
        (
            {"train_dataset": rows_of(12, document_ids=[0] * 6 + [1] * 6)},
            "train_dataset: row 0: document_ids: no room for an anchor",
        ),
    ],
)
def test_rows_without_room_for_a_rollout_are_refused_at_set_up(plain, config, arguments, message):
    with pytest.raises(ValueError, match=message):
        EBFTTrainer(plain.build(), config(), **arguments)


def test_a_stream_of_rows_is_checked_batch_by_batch(plain, config):
    EBFTTrainer(plain.build(), config(), train_dataset=Endless(ROWS)).train()
    with pytest.raises(ValueError, match="input_ids: expected at least"):
        EBFTTrainer(plain.build(), config(), train_dataset=Endless(rows_of(5, 6))).train()


def test_a_batch_without_a_valid_anchor_is_refused(plain, config):
    trainer = EBFTTrainer(plain.build(), config(), train_dataset=ROWS)
    layout = StridedLayout.from_anchors(torch.tensor([[23]]), 24, horizon=3, samples=3)
    with pytest.raises(ValueError, match="layout: expected at least one valid anchor in the batch, got none"):
        trainer.compute_loss(trainer.model, {"input_ids": ROWS[0]["input_ids"][None], "layout": layout})


def test_a_model_that_cannot_be_run_strided_is_refused(plain, config):
    model = plain.build(attention_dropout=0.1)
    with pytest.raises(ValueError, match="llama: .*dropout"):
        EBFTTrainer(model, config(), train_dataset=ROWS)


class AfterManyTokens(torch.nn.Module):
    """A layer that mixes the rows of a call, beyond what the check of a model looks at before there are rows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 0.1 * (x * (torch.arange(x.shape[1])[:, None] >= 30)).cumsum(1)


def test_the_model_is_checked_at_the_length_that_is_trained(plain, config):
    """At set-up; with a stream, whose rows nobody has read by then, at the first batch."""
    model = plain.build()
    model.model.layers[0].mlp = AfterManyTokens(model.model.layers[0].mlp)
    EBFTTrainer(model, config(), train_dataset=ROWS).train()
    message = "llama: cannot be run strided: the logits of a packed forward over 48 tokens differ"
    for datasets in ({"train_dataset": rows_of(24, 48)}, {"train_dataset": ROWS, "eval_dataset": {"a": rows_of(48)}}):
        with pytest.raises(ValueError, match=message):
            EBFTTrainer(model, config(), **datasets)
    with pytest.raises(ValueError, match=message):
        EBFTTrainer(
            plain.build(), config(kl_coef=0.5), train_dataset=rows_of(24, 48), reference_model=copy.deepcopy(model)
        )
    trainer = EBFTTrainer(model, config(), train_dataset=Endless(rows_of(24, 48) * 2))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_model_that_is_spread_already_is_refused(plain, config):
    model = plain.build()
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="model: expected whole weights, got some that ZeRO-3 has spread"):
        EBFTTrainer(model, config(), train_dataset=ROWS)


def test_other_arguments_are_refused(plain, config, tmp_path):
    with pytest.raises(TypeError, match="args: expected an EBFTConfig, got TrainingArguments"):
        EBFTTrainer(plain.build(), TrainingArguments(output_dir=str(tmp_path)), train_dataset=ROWS)
    many = config()
    many._n_gpu = 2
    with pytest.raises(ValueError, match="args: expected one device per process, got 2"):
        EBFTTrainer(plain.build(), many, train_dataset=ROWS)


def test_evaluation_needs_rows_and_a_feature_network(plain, config):
    trainer = EBFTTrainer(plain.build(), config(rl_coef=0.0, ce_coef=1.0), train_dataset=ROWS)
    with pytest.raises(ValueError, match="feature_network: expected one, got None"):
        trainer.evaluate(ROWS)
    for dataset, name in ((None, "NoneType"), ([], "list"), (Endless(ROWS), "Endless")):
        with pytest.raises(ValueError, match=f"eval_dataset: expected rows with a length above 0, got {name}"):
            trainer.evaluate(dataset)
