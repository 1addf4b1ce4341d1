"""Sampling: the tokens are drawn from the plain model's distribution, and their log-probabilities are its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from ebft_kernels import StridedLayout, _native
from ebft_kernels.integrations.transformers import OutputHead, decoder_layers, output_head
from ebft_kernels.logprob._draw import _draw_by_blocks as draw_by_blocks
from ebft_kernels.logprob._draw import draw_from as draw
from ebft_kernels.testing import assert_within_budget, randn
from ebft_trainer import rollout
from ebft_trainer.rollout import sample_rollouts

WHY_NOT_BY_BLOCKS = _native.why_not("cpu")
needs_compiled_code = pytest.mark.skipif(bool(WHY_NOT_BY_BLOCKS), reason=WHY_NOT_BY_BLOCKS)
ARCHITECTURES = ("llama", "qwen2", "gemma2", "gpt_oss")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(count: int, rows: int = 1) -> torch.Tensor:
    """[rows, count] midpoints of ``count`` equal parts of [0, 1): drawing with them counts out a distribution."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) / count).expand(rows, -1)


def counted_out(drawn: Callable[[torch.Tensor], torch.Tensor], probability: torch.Tensor) -> torch.Tensor:
    """[R, V]: how often each token comes among equally spaced draws, over their number."""
    count = 20000
    ids = drawn(grid(count, len(probability)))
    return torch.stack([torch.bincount(x, minlength=probability.shape[1]) for x in ids]) / count


def cut_off(probability: torch.Tensor, *, top_p: float = 1.0, top_k: int = 0) -> torch.Tensor:
    """The distribution after top-k, then top-p, one token at a time."""
    rows = []
    for row in probability.double().tolist():
        order = sorted(range(len(row)), key=lambda i: -row[i])[: top_k or len(row)]
        total, kept, mass = sum(row[i] for i in order), set(), 0.0
        for i in order:
            if mass < top_p * total:
                kept.add(i)
                mass += row[i]
        rows.append([row[i] / mass if i in kept else 0.0 for i in range(len(row))])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("layout", ("strided", "uneven"))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_are_those_of_the_plain_model(plain, name, layout):
    model, layout = plain.build(name), plain.layouts[layout]()
    prompt = plain.prompt_of(layout)
    tokens, log_probs = sample_rollouts(model, prompt, layout, temperature=0.7, generator=generator())
    assert tokens.shape == log_probs.shape == (layout.batch_size, layout.num_anchors, layout.samples, layout.horizon)
    assert tokens.dtype == torch.int64 and log_probs.dtype == torch.float32
    with torch.no_grad():
        eager, truth = (plain.rollout_log_probs(m, prompt, tokens, layout, 0.7) for m in (model, plain.double(model)))
    assert_within_budget(log_probs[layout.valid], eager[layout.valid], truth[layout.valid])
    assert log_probs.isfinite().all()


@pytest.mark.parametrize("options", ({"top_k": 1}, {"top_p": 1e-6}, {"top_k": 5, "top_p": 0.5}))
def test_log_probs_are_before_the_cut_off(plain, options):
    model, layout = plain.build(), plain.layouts["strided"]()
    prompt = plain.prompt_of(layout)
    tokens, log_probs = sample_rollouts(model, prompt, layout, temperature=0.7, generator=generator(), **options)
    with torch.no_grad():
        eager, truth = (plain.rollout_log_probs(m, prompt, tokens, layout, 0.7) for m in (model, plain.double(model)))
    assert_within_budget(log_probs, eager, truth)
    greedy, _ = sample_rollouts(model, prompt, layout, temperature=0)
    assert torch.equal(tokens, greedy) == ("top_k" not in options or options["top_k"] == 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_rollouts_are_those_of_generate(plain, name):
    model, layout = plain.build(name), plain.layouts["uneven"]()
    prompt = plain.prompt_of(layout)
    tokens, log_probs = sample_rollouts(model, prompt, layout, temperature=0)
    for b, a, prefix in plain.prefixes(prompt, layout):
        expected = model.generate(
            prefix,
            attention_mask=torch.ones_like(prefix),
            do_sample=False,
            max_new_tokens=layout.horizon,
            pad_token_id=0,
        )[0, prefix.shape[1] :]
        assert (tokens[b, a] == expected).all()
    with torch.no_grad():
        eager, truth = (plain.rollout_log_probs(m, prompt, tokens, layout) for m in (model, plain.double(model)))
    assert_within_budget(log_probs[layout.valid], eager[layout.valid], truth[layout.valid], "at temperature 1")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("vocabulary", (5, 61, 1024, 1025, 5000))
@pytest.mark.parametrize("options", ({}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.6}))
def test_every_token_is_drawn_in_proportion(options, vocabulary, dtype):
    spread = torch.tensor([[0.01], [1.0], [4.0]])  # from flat to almost all on one token
    probability = (randn(3, vocabulary, seed=vocabulary) * spread).softmax(-1).to(dtype)
    # Equally spaced draws hit an interval of length p at most once too often or too seldom at either end.
    draws = [lambda uniform: draw(probability, uniform, **options)]
    if not options and not WHY_NOT_BY_BLOCKS:
        draws.append(lambda uniform: draw_by_blocks(probability.log(), uniform)[0])
    for drawn in draws:
        difference = counted_out(drawn, probability) - cut_off(probability, **options)
        assert difference.abs().max() <= 1 / 20000 + 4 * torch.finfo(dtype).eps


def test_numbers_at_the_edges_never_draw_an_impossible_token():
    edges = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64)  # 1 is what rounding makes of the number below it
    for vocabulary in (4, 3000):
        probability = torch.zeros(1, vocabulary)
        probability[0, 1] = probability[0, vocabulary // 2 + 1] = 0.5
        assert draw(probability, edges).tolist() == [[1, vocabulary // 2 + 1, vocabulary // 2 + 1]]
        # Rounded probabilities do not sum to 1.
        assert draw(probability * (1 - 1e-6), edges)[0, 2] == vocabulary // 2 + 1
        assert set(draw(probability, edges, top_k=4)[0].tolist()) == {1, vocabulary // 2 + 1}
    one = torch.zeros(2, 3000).index_fill_(1, torch.tensor([2999]), 1.0)
    assert (draw(one, edges.expand(2, 3)) == 2999).all()
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}):
        ids = draw(torch.full((1, 3000), float("nan")), edges, **options)
        assert (ids >= 0).all() and (ids < 3000).all(), "a model that gives NaN must not index out of range"


@needs_compiled_code
def test_numbers_at_the_edges_never_draw_an_impossible_token_by_blocks():
    edges = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64)
    for vocabulary in (4, 3000):
        logits = torch.full((1, vocabulary), -math.inf)  # most blocks are nothing else
        logits[0, 1] = logits[0, vocabulary // 2 + 1] = 3.0
        ids, log_probs, _ = draw_by_blocks(logits, edges)
        assert ids.tolist() == [[1, vocabulary // 2 + 1, vocabulary // 2 + 1]]
        assert (log_probs + math.log(2)).abs().max() <= 2 * torch.finfo(torch.float32).eps
    logits[0, 1] = -math.inf
    logits = logits.expand(2, 3000)  # rows that share memory
    ids, log_probs, _ = draw_by_blocks(logits, edges.expand(2, 3))
    assert (ids == 1501).all() and (log_probs == 0).all()
    ids, log_probs, _ = draw_by_blocks(torch.full((1, 3000), math.nan), edges)
    assert (ids >= 0).all() and (ids < 3000).all() and log_probs.isnan().all()


@needs_compiled_code
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("vocabulary", (1, 129, 3000))
def test_drawing_by_blocks_scores_what_it_draws(vocabulary, dtype):
    logits = randn(40, vocabulary, seed=vocabulary, dtype=dtype).mul_(4)
    ids, log_probs, _ = draw_by_blocks(logits.clone(), grid(7, 40))
    eager, truth = (x.log_softmax(-1).gather(1, ids) for x in (logits.to(log_probs.dtype), logits.double()))
    if dtype == torch.float64:
        assert (log_probs - truth).abs().max() <= 100 * torch.finfo(dtype).eps
    else:
        assert_within_budget(log_probs, eager, truth)


@pytest.mark.parametrize(
    ("options", "by_blocks"), (({}, True), ({}, False), ({"top_k": 20, "top_p": 0.9}, False)), ids=str
)
def test_first_tokens_follow_the_models_distribution(options, by_blocks, plain, monkeypatch):
    """The numbers come from the generator, one for each sample: chi-square of 4000 samples of one anchor."""
    model = plain.build(seed=3)
    layout = StridedLayout.from_anchors(torch.tensor([[5]]), 6, horizon=1, samples=4000)
    prompt = plain.prompt_of(layout)
    if not by_blocks:
        monkeypatch.setattr(rollout, "draws_by", lambda *_: "torch")
    tokens, _ = sample_rollouts(model, prompt, layout, temperature=1.3, generator=generator(), **options)
    with torch.no_grad():
        logits = model(input_ids=prompt[:, :5]).logits[:, -1]
    expected = 4000 * cut_off((logits / 1.3).softmax(-1), **options)[0]
    observed = torch.bincount(tokens.flatten(), minlength=plain.vocabulary)
    assert not observed[expected == 0].any()
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    # The statistic has mean f and variance 2 f.
    assert freedom >= 5 and (observed - expected).square().div(expected).sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_the_same_seed_gives_the_same_rollouts(plain, monkeypatch):
    model, layout = plain.build(), plain.layouts["strided"]()
    prompt = plain.prompt_of(layout)

    def sample(numbers):
        return sample_rollouts(model, prompt, layout, temperature=1.0, generator=numbers)

    first, first_log_probs = sample(generator(5))
    again, again_log_probs = sample(generator(5))
    assert torch.equal(first, again) and torch.equal(first_log_probs, again_log_probs)
    assert not torch.equal(first, sample(generator(6))[0])
    assert len(first[0, 0].unique(dim=0)) > 1, "the samples of an anchor are drawn apart"
    torch.manual_seed(5)
    assert torch.equal(first, sample(None)[0]), "without a generator torch's own is used"
    monkeypatch.setattr(rollout, "_CHUNK_NUMEL", 2 * plain.vocabulary)
    assert torch.equal(first, sample(generator(5))[0]), "the chunk size changes no rollout"


@pytest.mark.parametrize(
    "options", ({"temperature": 0.7}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9}), ids=str
)
def test_kernels_draw_the_same_rollouts(options, plain, monkeypatch):
    """The same numbers, by the kernels in Triton's interpreter, in tiles of a few rows: the same tokens."""
    pytest.importorskip("triton")
    model, layout = plain.build(), StridedLayout.strided(2, 9, context=4, stride=3, horizon=2, samples=2)
    prompt = plain.prompt_of(layout)
    expected, expected_log_probs = sample_rollouts(model, prompt, layout, generator=generator(), **options)
    monkeypatch.setattr(rollout, "draws_by", lambda *_: "triton")
    monkeypatch.setattr(rollout, "rows_at_once", lambda _vocabulary: 3)
    tokens, log_probs = sample_rollouts(model, prompt, layout, generator=generator(), **options)
    assert torch.equal(tokens, expected)
    with torch.no_grad():
        truth = plain.rollout_log_probs(plain.double(model), prompt, tokens, layout, options["temperature"] or 1.0)
    assert_within_budget(log_probs, expected_log_probs, truth)


def test_a_weight_is_read_few_times_on_an_accelerator():
    """4064 rows, V = 151936: as many rows at a time as 512 MB hold, all tiles about as large."""
    assert rollout.tile_rows(4064, 151936, "triton", 2, "cuda") == 1355  # 3 tiles, of at most 1766 rows
    assert rollout.tile_rows(4064, 151936, "triton", 4, "cuda") == 813  # 5, of at most 883
    assert rollout.tile_rows(4064, 151936, "torch", 2, "cuda") == 110  # of at most 110
    assert rollout.tile_rows(4064, 151936, "native", 4, "cpu") == 110
    assert rollout.tile_rows(16, 100, "triton", 2, "cuda") == 16
    assert rollout.tile_rows(0, 100, "triton", 2, "cuda") == rollout.tile_rows(1, 1 << 40, "triton", 2, "cuda") == 1


def test_end_tokens_need_no_tensor_on_the_device():
    tokens = torch.tensor([[4, 7, 1, 7], [1, 2, 3, 9]])
    assert rollout.is_end(tokens, (7, 9)).tolist() == [[False, True, False, True], [False, False, False, True]]
    assert not rollout.is_end(tokens, ()).any()
    with torch.device("meta"):  # where whatever reads a value fails
        assert rollout.before_end(torch.empty(2, 4, dtype=torch.int64), (7, 9)).shape == (2, 4)


def test_modes_come_back_and_checkpointing_is_no_obstacle(plain):
    model, layout = plain.build(), plain.layouts["strided"]()
    prompt = plain.prompt_of(layout)
    expected, _ = sample_rollouts(model.eval(), prompt, layout, temperature=1.0, generator=generator())
    model.train()
    decoder_layers(model)[1].eval()
    model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    tokens, log_probs = sample_rollouts(model, prompt, layout, temperature=1.0, generator=generator())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(tokens, expected) and not log_probs.requires_grad


def test_modes_come_back_after_an_error(plain):
    model, layout = plain.build().train(), plain.layouts["strided"]()
    with pytest.raises(IndexError):
        sample_rollouts(model, plain.prompt_of(layout) + plain.vocabulary, layout, temperature=1.0)
    assert all(module.training for module in model.modules())


def test_no_row_is_computed_twice(plain, monkeypatch):
    """P prompt rows, then A*n rows for each of G-1 tokens; the head on A rows, then on A*n."""
    model, layout = plain.build(), plain.layouts["strided"]()
    block_rows, head_rows = [], []
    decoder_layers(model)[0].register_forward_hook(lambda _m, args, _out: block_rows.append(args[0].shape[:2].numel()))
    logits = OutputHead.logits
    output_head(model)
    block_rows.clear()  # it looked at the model's own logits
    monkeypatch.setattr(
        OutputHead, "logits", lambda head, hidden, *rest: head_rows.append(len(hidden)) or logits(head, hidden, *rest)
    )
    sample_rollouts(model, plain.prompt_of(layout), layout, temperature=1.0)
    batch, rollouts = layout.batch_size, layout.num_anchors * layout.samples
    assert block_rows == [batch * layout.length] + [batch * rollouts] * (layout.horizon - 1)
    assert head_rows == [batch * layout.num_anchors] + [batch * rollouts] * (layout.horizon - 1)


@pytest.mark.parametrize("horizon", (1, 2))
def test_short_horizons(plain, horizon):
    model = plain.build()
    layout = StridedLayout.strided(2, 9, context=3, stride=3, horizon=horizon, samples=1)
    prompt = plain.prompt_of(layout)
    tokens, log_probs = sample_rollouts(model, prompt, layout, temperature=1.0, generator=generator())
    with torch.no_grad():
        eager, truth = (plain.rollout_log_probs(m, prompt, tokens, layout) for m in (model, plain.double(model)))
    assert_within_budget(log_probs, eager, truth)


def test_float64_models_are_sampled_in_float64(plain):
    model, layout = plain.build(dtype=torch.float64), plain.layouts["strided"]()
    _, log_probs = sample_rollouts(model, plain.prompt_of(layout), layout, temperature=1.0)
    assert log_probs.dtype == torch.float64


def test_autocast_leaves_float64_alone(plain):
    model, layout = plain.build(dtype=torch.float64), plain.layouts["strided"]()
    with torch.autocast("cpu", torch.bfloat16):
        _, log_probs = sample_rollouts(model, plain.prompt_of(layout), layout, temperature=0.7)
    assert log_probs.dtype == torch.float64


def test_a_low_temperature_does_not_overflow_float16():
    head = OutputHead(torch.tensor([[60.0], [59.0], [0.0]]).half(), None, 1.0, None)
    uniform = torch.rand(5, 2, dtype=torch.float64)
    ids, log_probs = rollout.Sampler(1e-4, 1.0, 0).draw_rows(torch.ones(5, 1, dtype=torch.float16), head, uniform)
    assert (ids == 0).all() and (log_probs == 0).all()


def test_autocast(plain):
    model, layout = plain.build(), plain.layouts["strided"]()
    prompt = plain.prompt_of(layout)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        tokens, log_probs = sample_rollouts(model, prompt, layout, temperature=1.0, generator=generator())
        eager = plain.rollout_log_probs(model, prompt, tokens, layout)
    with torch.no_grad():
        truth = plain.rollout_log_probs(plain.double(model), prompt, tokens, layout)
    assert log_probs.dtype == torch.float32
    assert_within_budget(log_probs, eager, truth)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        ({"temperature": -0.5}, ValueError, "temperature: expected a finite number of at least 0, got -0.5"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number"),
        ({"temperature": "warm"}, TypeError, "temperature: expected a number, got 'warm'"),
        ({"top_p": 0.0}, ValueError, "top_p: expected a number above 0, at most 1, got 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p: expected a number above 0, at most 1, got 1.5"),
        ({"top_k": -1}, ValueError, "top_k: expected at least 0, got -1"),
        ({"top_k": 2**31}, ValueError, r"top_k: expected less than 2\^31, got 2147483648"),
        ({"temperature": 1e-40}, ValueError, "temperature: expected what float32 can hold"),
        ({"top_k": 2.5}, TypeError, "top_k: expected an int, got float"),
        ({"layout": None}, TypeError, "layout: expected a StridedLayout, got NoneType"),
        (
            {"prompt": torch.zeros(2, 23, dtype=torch.int64)},
            ValueError,
            r"prompt: expected shape \[B=2, P=24\], got \[2, 23\]",
        ),
        ({"prompt": torch.zeros(2, 24)}, TypeError, "prompt: expected dtype int64, got float32"),
        (
            {"prompt": torch.zeros(2, 24, dtype=torch.int64, device="meta")},
            ValueError,
            "prompt: expected a tensor on cpu",
        ),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model: expected a transformers model"),
    ),
)
def test_bad_input(plain, changes, error, message):
    layout = plain.layouts["strided"]()
    arguments = {"model": plain.build(), "prompt": plain.prompt_of(layout), "layout": layout, "temperature": 1.0}
    with pytest.raises(error, match=message):
        sample_rollouts(**(arguments | changes))
