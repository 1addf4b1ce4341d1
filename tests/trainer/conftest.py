"""Tiny random models, and the oracle: an ordinary forward over each prefix and rollout alone."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ebft_kernels import StridedLayout

logging.getLogger("transformers").setLevel(logging.ERROR)

VOCABULARY = 61
BLOCKS = 4
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOW = {"sliding_window": 6}
#: Grouped heads; biases; soft caps of attention and logits with alternating sliding windows; sinks and experts;
#: other mixtures of experts.
MODELS = {
    "llama": {},
    "qwen2": {},
    "gemma2": WINDOW | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gpt_oss": WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {},
    "qwen3_moe": {},
    "olmoe": {},
}


def build(name: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object):
    """A model with weights so large that every token, position and layer matters."""
    config = AutoConfig.for_model(name, **(COMMON | MODELS[name] | changes))
    config._experts_implementation = "eager"  # the default does not exist in float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(noise * 0.3)
    return model.to(dtype)


def double(model):
    """The same model in float64."""
    return copy.deepcopy(model).double()


def strided_layout() -> StridedLayout:
    """Two rows of 24 tokens, four anchors with three rollouts of four tokens each."""
    return StridedLayout.strided(2, 24, context=6, stride=4, horizon=4, samples=3)


def uneven_layout() -> StridedLayout:
    """Documents, padding, anchors anywhere, a window across the edge of a document, missing anchors."""
    documents = torch.tensor([[0] * 17, [0] * 5 + [1] * 9 + [2] * 3, [0] * 3 + [1] * 14])
    return StridedLayout.from_anchors(
        torch.tensor([[1, 6, 7, 13], [2, 4, 9, -1], [5, 9, -1, -1]]),
        17,
        horizon=3,
        samples=2,
        lengths=torch.tensor([17, 16, 11]),
        document_ids=documents,
    )


LAYOUTS = {"strided": strided_layout, "uneven": uneven_layout}


def prompt_of(layout: StridedLayout, seed: int = 0) -> torch.Tensor:
    """[B, P] random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (layout.batch_size, layout.length), generator=generator)


def rollouts_of(layout: StridedLayout, seed: int = 1) -> torch.Tensor:
    """[B, A, n, G] random tokens."""
    shape = (layout.batch_size, layout.num_anchors, layout.samples, layout.horizon)
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def prefixes(prompt: torch.Tensor, layout: StridedLayout):
    """Row, anchor number and prefix [1, T] (the document up to the anchor) of every valid anchor."""
    for b, a in layout.valid.nonzero().tolist():
        anchor = int(layout.anchors[b, a])
        yield b, a, prompt[b : b + 1, int(layout.prompt_start[b, anchor - 1]) : anchor]


def plain_rollout_log_probs(model, prompt, rollouts, layout, temperature=1.0) -> torch.Tensor:
    """[B, A, n, G] from one forward per anchor; 0 where the anchor is not valid. Differentiable."""
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    parts = {}
    for b, a, prefix in prefixes(prompt, layout):
        tokens = torch.cat([prefix.expand(layout.samples, -1), rollouts[b, a]], 1)
        logits = model(input_ids=tokens, use_cache=False).logits[:, -layout.horizon - 1 : -1]
        log_probs = (logits.to(dtype) / temperature).log_softmax(-1)
        parts[b, a] = log_probs.gather(-1, rollouts[b, a][..., None])[..., 0]
    nothing = torch.zeros(layout.samples, layout.horizon, dtype=dtype)
    rows = [
        torch.stack([parts.get((b, a), nothing) for a in range(layout.num_anchors)]) for b in range(layout.batch_size)
    ]
    return torch.stack(rows)


def plain_prompt_log_probs(model, prompt, layout) -> torch.Tensor:
    """[B, P-1] from one forward per document; 0 for padding and where a document starts. Differentiable."""
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    rows = []
    for b, length in enumerate(layout.lengths.tolist()):
        starts = layout.prompt_start[b, :length].unique().tolist()
        parts = []
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            tokens = prompt[b : b + 1, start:end]
            log_probs = model(input_ids=tokens, use_cache=False).logits[0].to(dtype).log_softmax(-1)
            parts += [torch.zeros(1, dtype=dtype), log_probs[:-1].gather(1, tokens[0, 1:, None])[:, 0]]
        rows.append(torch.cat([*parts, torch.zeros(layout.length - length, dtype=dtype)])[1:])
    return torch.stack(rows)


@torch.no_grad()
def plain_features(model, prompt, rollouts, layout, layers, pooling="last_token", normalize="joint", token_mask=None):
    """[B, A, n, F] and [B, A, F] (G before F for "token") from ``output_hidden_states``; NaN where not valid."""
    model = copy.deepcopy(model).eval()
    found = {}
    for b, a, prefix in prefixes(prompt, layout):
        anchor = int(layout.anchors[b, a])
        window = slice(anchor, anchor + layout.horizon)
        counted = torch.ones(layout.horizon, dtype=torch.bool) if token_mask is None else token_mask[b, window]
        tails = torch.cat([rollouts[b, a], prompt[b : b + 1, window]])  # [n + 1, G]
        tokens = torch.cat([prefix.expand(len(tails), -1), tails], 1)
        states = model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
        tokens = torch.stack([states[layer][:, -layout.horizon :] for layer in layers], 2)  # [n + 1, G, L, C]
        found[b, a] = torch.stack([_pool(x, counted, pooling, normalize) for x in tokens])
    undefined = torch.full_like(next(iter(found.values())), float("nan"))
    grid = torch.stack(
        [
            torch.stack([found.get((b, a), undefined) for a in range(layout.num_anchors)])
            for b in range(layout.batch_size)
        ]
    )
    return grid[:, :, :-1], grid[:, :, -1]


def _pool(tokens: torch.Tensor, counted: torch.Tensor, pooling: str, normalize: str) -> torch.Tensor:
    """Hidden states [G, L, C] of one rollout -> [F] or [G, F]."""
    if normalize == "joint":
        tokens = F.normalize(tokens.flatten(1), dim=-1).view_as(tokens)
    elif normalize == "per_layer":
        tokens = F.normalize(tokens, dim=-1)
    tokens = tokens * counted[:, None, None]
    if pooling == "token":
        return tokens.flatten(1)
    if pooling == "concat":
        return tokens.transpose(0, 1).flatten()
    if pooling == "mean":
        return tokens.mean(0).flatten()
    return tokens[counted][-1].flatten() if counted.any() else torch.zeros_like(tokens[0]).flatten()


@pytest.fixture(scope="session")
def plain() -> SimpleNamespace:
    """The helpers of this file."""
    return SimpleNamespace(
        build=build,
        double=double,
        features=plain_features,
        layouts=LAYOUTS,
        prefixes=prefixes,
        prompt_log_probs=plain_prompt_log_probs,
        prompt_of=prompt_of,
        rollout_log_probs=plain_rollout_log_probs,
        rollouts_of=rollouts_of,
        vocabulary=VOCABULARY,
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and an end-of-text token, 257 in all."""
    vocabulary = {name: i for i, name in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


@pytest.fixture
def model_folder(tmp_path, byte_tokenizer):
    """A saved tiny model with `byte_tokenizer`."""
    folder = tmp_path / "tiny-model"
    build(vocab_size=len(byte_tokenizer)).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder
