"""Which token ids there are and which end a rollout: one answer for sampling, scoring, training and evaluation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset

from ebft_kernels.integrations.transformers import apply_head, output_head
from ebft_kernels.testing import assert_within_budget
from ebft_trainer.config import EBFTConfig, EBFTOptions
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.rollout import sample_rollouts
from ebft_trainer.scoring import policy_log_probs, prompt_log_probs
from ebft_trainer.step import ebft_step
from ebft_trainer.tokens import agreed_options
from ebft_trainer.trainer import EBFTTrainer

TOKENS = 43  # of the 61 rows of the head
GEOMETRY = {"context": 4, "stride": 6, "horizon": 3, "samples": 3}
ROWS = [{"input_ids": ids} for ids in torch.randint(0, 40, (8, 24), generator=torch.Generator().manual_seed(1))]


@pytest.fixture
def config(tmp_path):
    def make(**options) -> EBFTConfig:
        usual = {
            **{"output_dir": str(tmp_path / "run"), "max_steps": 1, "per_device_train_batch_size": 2},
            **{"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True},
            "dataloader_pin_memory": False,
        }
        return EBFTConfig(**(GEOMETRY | usual | options))

    return make


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("transformers.trainer_callback.PrinterCallback.on_log", lambda *_args, **_kwargs: None)


# A head with more rows than the tokenizer has tokens (padded vocabularies; public models have hundreds of such rows)


def with_fewer_tokens(plain_log_probs, model, monkeypatch, *args):
    """What the plain helper gives for a model whose logits of the last ids are minus infinity."""
    original = model.forward

    def forward(*inputs, **kwargs):
        out = original(*inputs, **kwargs)
        out.logits = out.logits.masked_fill(torch.arange(out.logits.shape[-1]) >= TOKENS, -torch.inf)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", forward)
        return plain_log_probs(model, *args)


@pytest.mark.parametrize("name", ("llama", "gemma2"))
def test_sampled_and_scored_log_probs_are_those_of_the_tokens_that_there_are(plain, name, monkeypatch):
    model, layout = plain.build(name), plain.layouts["uneven"]()
    prompt = plain.prompt_of(layout) % TOKENS
    generator = torch.Generator().manual_seed(0)
    tokens, sampled = sample_rollouts(model, prompt, layout, temperature=2.0, vocabulary=TOKENS, generator=generator)
    free, _ = sample_rollouts(model, prompt, layout, temperature=2.0, generator=torch.Generator().manual_seed(0))
    assert tokens.max() < TOKENS <= free.max()
    with torch.no_grad():
        scored, text = policy_log_probs(
            model, prompt, tokens, layout, temperature=2.0, score_prompt=True, vocabulary=TOKENS
        )
        alone, counted = prompt_log_probs(model, prompt, layout, vocabulary=TOKENS)
        eager, truth = (
            with_fewer_tokens(plain.rollout_log_probs, m, monkeypatch, prompt, tokens, layout, 2.0)
            for m in (model, plain.double(model))
        )
        for found in (sampled, scored):
            assert_within_budget(found[layout.valid], eager[layout.valid], truth[layout.valid])
        eager, truth = (
            with_fewer_tokens(plain.prompt_log_probs, m, monkeypatch, prompt, layout)
            for m in (model, plain.double(model))
        )
        for found in (text, alone):
            assert_within_budget(found[counted], eager[counted], truth[counted])


def test_the_gradient_is_that_of_a_model_without_the_other_rows(plain):
    """Of the step's whole loss; the rows without a token have none."""
    whole, small = plain.build(vocab_size=61), plain.build(vocab_size=TOKENS)
    small.load_state_dict(
        {name: x[:TOKENS] if "embed" in name or "lm_head" in name else x for name, x in whole.state_dict().items()}
    )
    layout = plain.layouts["strided"]()
    prompt = plain.prompt_of(layout) % TOKENS
    found = []
    for model, vocabulary in ((whole, TOKENS), (small, None)):
        options = EBFTOptions(ce_coef=0.5, entropy_coef=0.1, vocabulary=vocabulary)
        network, generator = FeatureNetwork(model), torch.Generator().manual_seed(0)
        result = ebft_step(model, network, prompt, layout, options, generator=generator)
        result.loss.backward()
        found.append((result, {name: x.grad for name, x in model.named_parameters()}))
    (a, actual), (b, expected) = found
    assert torch.equal(a.rollouts, b.rollouts)
    torch.testing.assert_close(a.loss, b.loss)
    for name, gradient in expected.items():
        own = actual[name]
        if own.shape != gradient.shape:
            assert not own[TOKENS:].any()
            own = own[:TOKENS]
        torch.testing.assert_close(own, gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_a_head_of_the_first_ids_is_a_view(plain):
    head = output_head(plain.build())
    part = head._replace(bias=torch.zeros(61)).first(TOKENS)
    assert part.weight.shape == (TOKENS, 32) and part.bias.shape == (TOKENS,)
    assert part.weight.data_ptr() == head.weight.data_ptr()
    assert head.first(61) is head and head.first(None) is head
    layout = plain.layouts["strided"]()
    with pytest.raises(ValueError, match="vocabulary: expected at least 1, got 0"):
        apply_head(plain.build(), plain.prompt_of(layout), layout.prompt_only(), lambda *_: (), vocabulary=0)


def test_the_trainer_takes_the_ids_from_the_tokenizer(plain, config, byte_tokenizer, caplog):
    model = plain.build(vocab_size=300)
    with torch.no_grad():
        model.lm_head.weight[257:] = 3 * model.lm_head.weight[:43]  # likely ones
    caplog.set_level("INFO", logger="ebft_trainer")
    trainer = EBFTTrainer(
        model, config(temperature=2.0), train_dataset=ROWS, eval_dataset=ROWS, processing_class=byte_tokenizer
    )
    assert trainer.options.vocabulary == 257
    drawn = []
    trainer.feature_network.register_forward_pre_hook(lambda _module, args: drawn.append(args[0]))
    before = trainer.evaluate()
    trainer.train()
    said = ["rollouts end with the tokens [256]", "43 rows of the head, from id 257 on, are neither sampled nor scored"]
    assert all(caplog.text.count(line) == 1 for line in said)
    assert next(line for line in trainer.state.log_history if "loss" in line)["masked_token_ids"] == 43
    assert len(drawn) == 2 and max(int(x.max()) for x in drawn) < 257
    ids = torch.stack([row["input_ids"] for row in ROWS])
    with torch.no_grad():
        logits = plain.build(vocab_size=300)(ids).logits[:, :-1, :257]
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert before["eval_cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)
    # By option: all rows, whatever the tokenizer says; more than there are is an error.
    everything = EBFTTrainer(model, config(vocabulary=300), train_dataset=ROWS, processing_class=byte_tokenizer)
    assert everything.options.vocabulary == 300
    with pytest.raises(ValueError, match="vocabulary: expected at most 300, the rows of the head, got 301"):
        EBFTTrainer(model, config(vocabulary=301), train_dataset=ROWS)
    with pytest.raises(ValueError, match="vocabulary: expected at least 1, got 0"):
        config(vocabulary=0)
    rows = [{"input_ids": [299] * 24}]
    with pytest.raises(ValueError, match="train_dataset: row 0: input_ids: expected token ids from 0 to 256, got 299"):
        EBFTTrainer(model, config(), train_dataset=rows, processing_class=byte_tokenizer)


# The ends of rollouts: the tokenizer's end of text is not the model's


def test_ends_are_fixed_before_training_changes_the_models_configs(plain, config, byte_tokenizer):
    """transformers writes the tokenizer's special tokens into the model when training begins."""
    model = plain.build(vocab_size=257, eos_token_id=7)
    trainer = EBFTTrainer(
        model,
        config(learning_rate=0.0, temperature=2.0),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=byte_tokenizer,
    )
    assert trainer.options.eos_token_ids == [byte_tokenizer.eos_token_id, 7]
    weights = copy.deepcopy(model.state_dict())
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert model.config.eos_token_id == byte_tokenizer.eos_token_id, "it is what this test is about"
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    for name, value in before.items():
        assert after[name] == value or name == "epoch" or "runtime" in name or "per_second" in name, name


def test_which_tokens_end_a_rollout(plain, byte_tokenizer):
    end = byte_tokenizer.eos_token_id

    def ends(tokenizer=byte_tokenizer, given=None, **changes):
        model = plain.build(vocab_size=257, **changes)
        return agreed_options(model, tokenizer, EBFTOptions(eos_token_ids=given)).eos_token_ids

    assert ends() == [end] and ends(eos_token_id=[7, end]) == [end, 7]
    assert ends(None) == [] and ends(None, eos_token_id=7) == [7]
    assert ends(given=[3], eos_token_id=7) == [3] and ends(given=[], eos_token_id=7) == []
    with pytest.raises(
        ValueError, match=r"eos_token_ids: expected token ids below 257, which can be sampled, got \[25"
    ):
        ends(None, eos_token_id=257)


# A padding token without a row in the embedding: the tokenizer got one, the model was not resized


def test_a_padding_token_outside_the_embedding_is_refused(plain, config, byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    message = (
        "processing_class: expected a padding token below 257, the rows of the model's embedding, got 257; .*"
        r"resize_token_embeddings\(258\)"
    )
    with pytest.raises(ValueError, match=message):
        EBFTTrainer(plain.build(vocab_size=257), config(), train_dataset=ROWS, processing_class=tokenizer)
    EBFTTrainer(plain.build(vocab_size=258), config(), train_dataset=ROWS, processing_class=tokenizer)


# Rows with more positions than the model has learned


NO_DROPOUT = {"dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
LEARNED = {
    "gpt2": NO_DROPOUT | {"max_position_embeddings": 20},
    "opt": NO_DROPOUT | {"max_position_embeddings": 20, "word_embed_proj_dim": 32, "ffn_dim": 40},
    "ctrl": NO_DROPOUT | {"max_position_embeddings": 20, "dff": 40},
}


@pytest.mark.parametrize("name", LEARNED)
def test_rows_longer_than_the_learned_positions_are_refused(plain, config, monkeypatch, name):
    monkeypatch.setitem(plain.build.__globals__["MODELS"], name, LEARNED[name])
    model = plain.build(name)
    message = "row 1: input_ids: expected rows of at most 20 positions, which is what the model has learned, got 24"
    rows = [{"input_ids": ROWS[0]["input_ids"][:20]}, ROWS[1]]
    with pytest.raises(ValueError, match=f"train_dataset: {message}"):
        EBFTTrainer(model, config(), train_dataset=rows)
    with pytest.raises(ValueError, match=f"eval_dataset: {message}"):
        EBFTTrainer(model, config(), eval_dataset=rows)
    with pytest.raises(ValueError, match="input_ids: expected rows of at most 20 positions, .*, got 24"):
        EBFTTrainer(model, config(pad_to_multiple_of=8), train_dataset=rows[:1])
    EBFTTrainer(model, config(), train_dataset=rows[:1] * 2).train()
    # Positions are counted from the start of each document.
    documents = [{"input_ids": ROWS[0]["input_ids"], "document_ids": [0] * 10 + [1] * 14}]
    EBFTTrainer(model, config(), train_dataset=documents * 2).train()


def test_a_stream_is_checked_batch_by_batch(plain, config, monkeypatch):
    monkeypatch.setitem(plain.build.__globals__["MODELS"], "gpt2", LEARNED["gpt2"])

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(ROWS)

    with pytest.raises(ValueError, match="input_ids: expected rows of at most 20 positions, .*, got 24"):
        EBFTTrainer(plain.build("gpt2"), config(), train_dataset=Stream()).train()
