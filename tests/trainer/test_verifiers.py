"""What text a verifier is given, the shipped verifiers, and what a reward may be."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ebft_kernels import StridedLayout
from ebft_trainer.texts import anchor_texts, load_object
from ebft_trainer.verifiers import (
    VERIFIERS,
    TextVerifier,
    VerifierError,
    char_f_score,
    exact_match,
    load_verifier,
    parses_as_python,
)


def packed(tokenizer, text: str, completions: list[str], *, anchor: int, horizon: int):
    """One row and one anchor; rollouts are shorter texts filled up with the end token, and the mask of their tokens."""
    prompt = torch.tensor([tokenizer(text)["input_ids"]])
    layout = StridedLayout.from_anchors(
        torch.tensor([[anchor]]), prompt.shape[1], horizon=horizon, samples=len(completions)
    )
    rollouts = torch.full((1, 1, len(completions), horizon), tokenizer.eos_token_id)
    mask = torch.zeros(rollouts.shape, dtype=torch.bool)
    for j, completion in enumerate(completions):
        ids = torch.tensor(tokenizer(completion)["input_ids"])
        rollouts[0, 0, j, : len(ids)] = ids
        mask[0, 0, j, : len(ids) + 1] = True
    return prompt, rollouts, layout, mask


def test_texts_of_an_anchor(byte_tokenizer):
    prompt, rollouts, layout, mask = packed(byte_tokenizer, "x = 1 + 2", ["3\n", "1 + 3"], anchor=4, horizon=5)
    (texts,) = anchor_texts(byte_tokenizer, prompt, rollouts, layout, rollout_mask=mask)
    assert texts == (0, 0, "x = ", "1 + 2", ["3\n", "1 + 3"])
    token_mask = torch.arange(9)[None] < 7
    (texts,) = anchor_texts(byte_tokenizer, prompt, rollouts, layout, token_mask=token_mask)
    assert (texts.prompt, texts.target, texts.completions) == ("x = ", "1 +"[:3], ["3\n", "1 +"])


def test_characters_of_several_tokens_and_documents(byte_tokenizer):
    """Two documents in a row, an anchor inside a character, a missing anchor."""
    ids = torch.tensor([byte_tokenizer("ab")["input_ids"] + byte_tokenizer("cé€d")["input_ids"]])
    documents = torch.tensor([[0] * 2 + [1] * 7])
    anchors = torch.tensor([[2, 4, 6]])  # none in a document of its own; after the first byte of é; inside €
    layout = StridedLayout.from_anchors(anchors, 9, horizon=2, samples=1, document_ids=documents)
    assert layout.valid.tolist() == [[False, True, True]]
    rollouts = layout.windows(ids)[:, :, None]
    first, second = anchor_texts(byte_tokenizer, ids, rollouts, layout)
    assert (first.anchor, first.prompt, first.target[0]) == (1, "c", "é")
    assert second.prompt == "cé" and second.target == "€"
    assert first.completions == [first.target] and second.completions == [second.target]


def test_words_keep_the_space_before_them():
    """A tokenizer that decodes without the first space, as many do."""
    vocabulary = {"▁the": 0, "▁cat": 1, "▁sat": 2, "s": 3, "<end>": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.Prepend("▁")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    assert tokenizer.decode([1]) == "cat"
    layout = StridedLayout.from_anchors(torch.tensor([[1]]), 3, horizon=2, samples=2)
    prompt, rollouts = torch.tensor([[0, 1, 2]]), torch.tensor([[[[1, 3], [3, 4]]]])
    (texts,) = anchor_texts(tokenizer, prompt, rollouts, layout)
    assert texts.prompt == "the" and texts.target == " cat sat"
    assert texts.completions == [" cats", "s"]


def test_rewards_stand_where_their_rollouts_do(byte_tokenizer):
    layout = StridedLayout.strided(2, 12, context=3, stride=4, horizon=3, samples=2, lengths=torch.tensor([12, 8]))
    prompt = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    rollouts = torch.randint(0, 250, (2, 3, 2, 3)[:1] + (layout.num_anchors, 2, 3))
    seen = []

    def reward(prompt_text, completion_text, target_text):
        seen.append((prompt_text, completion_text, target_text))
        return len(seen)

    rewards = TextVerifier(reward, byte_tokenizer)(prompt, rollouts, layout)
    assert rewards.shape == (2, layout.num_anchors, 2) and rewards.dtype == torch.float32
    assert torch.equal(rewards != 0, layout.valid[..., None].expand_as(rewards))
    expected = [text for x in anchor_texts(byte_tokenizer, prompt, rollouts, layout) for text in x.completions]
    assert [completion for _, completion, _ in seen] == expected
    assert rewards[layout.valid].flatten().tolist() == list(range(1, len(seen) + 1))


def test_exact_match():
    assert exact_match("", " a", " a") == 1.0
    assert exact_match("", "a", " a") == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    (
        ("x = 1\n", 1.0),
        ("    def f():\n        return 1\n", 1.0),
        ("'\\d'", 1.0),  # a warning of the compiler, no error
        ("def f(:", 0.0),
        ("", 0.0),
        ("# nothing\n", 0.0),
        ("x = '\0'", 0.0),
        ("(" * 5000, 0.0),
        ("-" * 100000 + "1", 0.0),
    ),
)
def test_parses_as_python(text, expected):
    assert parses_as_python("", text, "") == expected


@pytest.mark.parametrize(
    ("completion", "target", "expected"),
    (
        ("the cat", "the cat", 1.0),
        ("thecat", "the cat", 1.0),
        ("", "", 0.0),
        ("abc", "xyz", 0.0),
        ("abc", "", 0.0),
        # n = 1: 2 of 2 found, of 3 wanted; n = 2: 1 of 1, of 2. P = 1, R = (2/3 + 1/2) / 2 = 7/12.
        ("ab", "abc", 5 * 7 / 12 / (4 + 7 / 12)),
        # a repeated character is found once: P = (1/2 + 0) / 2, R = (1/2 + 0) / 2.
        ("aa", "ab", 0.25),
    ),
)
def test_char_f_score(completion, target, expected):
    assert char_f_score("", completion, target) == pytest.approx(expected, abs=1e-12)


def test_shipped_and_own_verifiers_are_found_by_name(byte_tokenizer, tmp_path, monkeypatch):
    for name, function in VERIFIERS.items():
        assert load_verifier(name, byte_tokenizer).reward is function
    (tmp_path / "my_rewards.py").write_text("def length(prompt, completion, target):\n    return len(completion)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_verifier("my_rewards:length", byte_tokenizer).reward("", "abc", "") == 3


def test_the_current_folder_is_on_the_path_for_one_import_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "beside_it.py").write_text("value = 4")
    (tmp_path / "imports_it.py").write_text("import beside_it\nfound = beside_it.value")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    with caplog.at_level(logging.INFO):
        assert load_object("imports_it:found", "verifier") == 4
    assert f"verifier: imports_it:found is from {tmp_path / 'imports_it.py'}" in caplog.text
    for name, content, reason in (
        ("raises_at_once", "1 / 0", "ZeroDivisionError: division by zero"),
        ("ends_at_once", "raise SystemExit(3)", "SystemExit: 3"),
        ("is_no_python", "def", "SyntaxError: invalid syntax"),
    ):
        (tmp_path / f"{name}.py").write_text(content)
        with pytest.raises(ValueError, match=f"feature_map: cannot load '{name}:f': {reason}"):
            load_object(f"{name}:f", "feature_map")
    assert sys.path == before
    monkeypatch.setattr(sys, "path", [str(tmp_path), *before])
    load_object("math:pi", "verifier")
    assert sys.path == [str(tmp_path), *before]


@pytest.mark.parametrize("error", (ZeroDivisionError("no"), RecursionError("deep"), KeyError("x")))
def test_a_reward_that_fails_says_for_which_completion(byte_tokenizer, error):
    def fail(*_texts):
        raise error

    prompt, rollouts, layout, mask = packed(byte_tokenizer, "abcdef", ["x"], anchor=2, horizon=3)
    message = f"verifier: expected a number, got {type(error).__name__}: .* for the completion 'x'"
    with pytest.raises(VerifierError, match=message):
        TextVerifier(fail, byte_tokenizer)(prompt, rollouts, layout, rollout_mask=mask)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), None, "1", torch.tensor(1.0)))
def test_a_reward_must_be_a_finite_number(byte_tokenizer, value):
    prompt, rollouts, layout, mask = packed(byte_tokenizer, "abcdef", ["x"], anchor=2, horizon=3)
    verifier = TextVerifier(lambda *_: value, byte_tokenizer)
    with pytest.raises(ValueError, match="verifier: expected a finite number, got .* for the completion 'x'"):
        verifier(prompt, rollouts, layout, rollout_mask=mask)


@pytest.mark.parametrize("value", (True, 1, 1.0, np.float32(1), np.float64(1)))
def test_any_kind_of_number_is_a_reward(byte_tokenizer, value):
    prompt, rollouts, layout, mask = packed(byte_tokenizer, "abcdef", ["x"], anchor=2, horizon=3)
    assert TextVerifier(lambda *_: value, byte_tokenizer)(prompt, rollouts, layout).tolist() == [[[1.0]]]


def test_bad_names_and_arguments(byte_tokenizer):
    with pytest.raises(ValueError, match="verifier: expected 'exact_match', .* or 'module:function', got 'bleu'"):
        load_verifier("bleu", byte_tokenizer)
    with pytest.raises(ValueError, match="verifier: cannot load 'no_such_module:f': No module named"):
        load_verifier("no_such_module:f", byte_tokenizer)
    with pytest.raises(ValueError, match="verifier: cannot load 'math:no_such_thing': module 'math' has no"):
        load_verifier("math:no_such_thing", byte_tokenizer)
    with pytest.raises(ValueError, match="feature_map: expected 'module:name', got 'math:'"):
        load_object("math:", "feature_map")
    with pytest.raises(TypeError, match="reward: expected a function of three texts, got float"):
        load_verifier("math:pi", byte_tokenizer)
    with pytest.raises(TypeError, match="tokenizer: expected one of transformers, got NoneType"):
        load_verifier("exact_match", None)
