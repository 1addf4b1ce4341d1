"""What `integrations.openrlhf` and `integrations.axolotl` put in the place of the trainers' parts, against loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ebft_kernels import StridedLayout
from ebft_kernels.integrations import axolotl, openrlhf
from ebft_kernels.testing import assert_within_budget, randn

from ..model_checks import assert_gradients_within_budget

CPU = torch.device("cpu")
P, C, G, STRIDE, A = 14, 3, 3, 2, 5
SIZES = {"prompt_length": P, "context_length": C, "stride": STRIDE, "num_blocks": A}
N, B = 3, 2
LAYOUT = StridedLayout.strided(B, P, context=C, stride=STRIDE, horizon=G, samples=N)


def drawn_mask(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, T] bool and [T], token by token."""
    length = P + A * steps
    allowed, positions = torch.zeros(length, length, dtype=torch.bool), torch.zeros(length, dtype=torch.long)
    for i in range(P):
        allowed[i, : i + 1], positions[i] = True, i
    for step in range(steps):
        for block in range(A):
            row, end = P + step * A + block, C + block * STRIDE
            allowed[row, :end], positions[row] = True, end + step
            for earlier in range(step + 1):
                allowed[row, P + earlier * A + block] = True
    return allowed, positions


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("steps", range(G + 1))
def test_masks_and_positions(steps, dtype):
    allowed, positions = drawn_mask(steps)
    of_axolotl = axolotl.build_strided_dense_mask_and_positions(
        P + A * steps, **SIZES, generation_step=steps, max_generation_length=G, device=CPU, batch_size=2, dtype=dtype
    )
    documents = torch.zeros(2, P + 1, dtype=torch.long)
    of_openrlhf = openrlhf.build_strided_attention_mask_and_positions(
        P + A * steps,
        **SIZES,
        generation_step=steps,
        max_generation_length=G,
        device=CPU,
        doc_ids=documents,
        dtype=dtype,
    )
    for mask, found in (of_axolotl, of_openrlhf):
        assert mask.dtype == dtype and set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}
        assert torch.equal(mask == 0, allowed.expand(2, 1, -1, -1)) and torch.equal(found, positions.expand(2, -1))
    alone = axolotl.build_strided_position_ids(P + A * steps, **SIZES, generation_step=steps, device=CPU, batch_size=2)
    assert torch.equal(alone, positions.expand(2, -1))


def test_block_mask():
    block_mask = axolotl.create_strided_block_mask(
        **SIZES, max_generation_length=G, full_sequence_length=P + A * G, batch_size=2, num_heads=4, device=CPU
    )
    assert block_mask.shape == (2, 1, P + A * G, P + A * G)
    query, key = torch.arange(P + A * G)[:, None], torch.arange(P + A * G)[None]
    zero = torch.zeros((), dtype=torch.long)
    assert torch.equal(block_mask.mask_mod(zero + 1, zero, query, key), drawn_mask(G)[0])


def test_documents():
    """Every anchor whose window is in one document sees that document alone, with positions in it."""
    documents = torch.tensor([[4] * 9 + [2] * 5])
    mask, positions = openrlhf.build_strided_attention_mask_and_positions(
        P + A * G, **SIZES, generation_step=G, max_generation_length=G, device=CPU, doc_ids=documents,
        document_masking=True,
    )  # fmt: skip
    allowed, plain = drawn_mask(G)
    start = torch.tensor([0] * 9 + [9] * 5)
    for block in range(A):
        anchor = C + block * STRIDE
        window = documents[0, anchor - 1 : anchor + G]
        if (window == window[0]).all():
            for row in range(P + block, P + A * G, A):
                expected = allowed[row].clone()
                expected[: start[anchor - 1]] = False
                assert torch.equal(mask[0, 0, row] == 0, expected)
                assert positions[0, row] == plain[row] - start[anchor - 1]
    with pytest.raises(ValueError, match="doc_ids: expected the tokens of each document side by side"):
        openrlhf.build_strided_attention_mask_and_positions(
            P, **SIZES, generation_step=0, max_generation_length=G, device=CPU, document_masking=True,
            doc_ids=torch.tensor([[1] * 5 + [2] * 5 + [1] * 4]),
        )  # fmt: skip


@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt2"))
def test_log_probs(tiny, name):
    """Each token by the model on its prefix and rollout alone, on all samples' rows; gradients too."""
    packed = tiny.tokens_of(LAYOUT)
    sequences = LAYOUT.to_reference_order(packed)
    upstream = randn(B * N, P + A * G - 1, seed=1, dtype=torch.float64)
    results = []
    for dtype in (torch.float32, torch.float64):
        model = tiny.build(name, dtype=dtype)
        rows, predictors = tiny.plain_logits(model, packed, LAYOUT)
        of_rollouts = (predictors / 0.6).log_softmax(-1).gather(-1, LAYOUT.rollouts(packed)[..., None])[..., 0]
        of_prompt = rows[:, : P - 1].log_softmax(-1).gather(-1, packed[:, 1:P, None])[..., 0]
        first = of_prompt.new_zeros(B, 1)
        expected = LAYOUT.to_reference_order(LAYOUT.pack(torch.cat([first, of_prompt], 1), of_rollouts))[:, 1:]
        (expected * upstream).sum().backward()
        results.append((expected.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (eager, eager_grads), (truth, truth_grads) = results
    calls = {
        "openrlhf": lambda model: openrlhf.strided_log_probs(
            model, sequences, P, C, A, STRIDE, temperature=0.6, n_samples_per_prompt=N
        ),
        "axolotl": lambda model: axolotl.strided_log_probs(
            model, sequences, P, C, STRIDE, A, n_samples=N, temperature=0.6
        ),
    }
    for trainer, call in calls.items():
        model = tiny.build(name)
        found = call(model)
        (found * upstream).sum().backward()
        assert_within_budget(found, eager, truth, trainer)
        found_grads = {name: p.grad for name, p in model.named_parameters()}
        assert_gradients_within_budget(found_grads, eager_grads, truth_grads)


@pytest.mark.parametrize(
    ("method", "layers", "join"),
    (
        ("last_only", (2,), "cat"),
        ("mean", (1, 2), "mean"),
        ("middle", (1, 2), "mean"),
        ("middle_stack", (1, 2), "stack"),
        ("layer_1", (1,), "cat"),
        ("concat_layers_0_2", (0, 2), "cat"),
        ("stack_layers_1_2", (1, 2), "stack"),
    ),
)
def test_hidden_states(tiny, method, layers, join):
    packed = tiny.tokens_of(LAYOUT)
    sequences = LAYOUT.to_reference_order(packed)
    allowed, positions = drawn_mask(G)
    plain = []
    for dtype in (torch.float32, torch.float64):
        model = tiny.build("llama", dtype=dtype)
        mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
        with torch.no_grad():
            states = model(
                input_ids=sequences,
                attention_mask=mask.expand(B * N, 1, -1, -1),
                position_ids=positions.expand(B * N, -1),
                output_hidden_states=True,
            ).hidden_states
        chosen = [states[layer] for layer in layers]
        joined = torch.cat(chosen, -1)[:, :, None] if join == "cat" else torch.stack(chosen, 2)
        plain.append(F.normalize(joined.mean(2, keepdim=True) if join == "mean" else joined, dim=-1))
    sizes = {**SIZES, "generate_max_len": G, "n_samples_per_prompt": N}
    model = tiny.build("llama")
    found = openrlhf.strided_hidden_states(model, sequences, **sizes, hidden_state_method=method)
    assert_within_budget(found, *plain)
    counted = torch.arange(P + A * G).remainder(3).ne(0).expand(B * N, -1)
    masked = openrlhf.strided_hidden_states(
        model, sequences, **sizes, hidden_state_method=method, qa_masks=counted, qa_masking=True
    )
    assert torch.equal(masked, found * counted[:, :, None, None])


def svd_whitened(x: torch.Tensor, y: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    inverse = torch.where(s > 1e-5 * s.amax(-1, keepdim=True), 1 / s, 0)[..., None, :]
    if kind == "sample":
        w = u * inverse @ u.mT
        return w @ x.double(), w @ y.double()
    m = vh.mT * inverse @ vh
    return x.double() @ m, y.double() @ m


@pytest.mark.parametrize("duplicates", (False, True))
@pytest.mark.parametrize("normalize", (False, True))
def test_whitening(duplicates, normalize):
    x, y = randn(2, 2, 4, 3, 16, seed=0, dtype=torch.float32), randn(2, 2, 4, 3, 16, seed=1, dtype=torch.float32)
    if duplicates:
        x[:, :, 1] = x[:, :, 0]
    found = openrlhf.whiten_embeddings_batched(x, y, normalize=normalize)
    expected = [z.movedim(-2, 2) for z in svd_whitened(x.movedim(2, -2), y.movedim(2, -2), "sample")]
    of_axolotl = axolotl.whiten_embeddings_batched(x[0, 0, :, 0], y[0, 0, :, 0], normalize=normalize)
    expected_there = svd_whitened(x[0, 0, :, 0], y[0, 0, :, 0], "feature")
    for z, true in zip((*found, *of_axolotl), (*expected, *expected_there), strict=True):
        assert z.dtype == torch.float32
        torch.testing.assert_close(z.double(), F.normalize(true, dim=-1) if normalize else true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whitening", (False, True))
def test_rewards_and_a_baseline_without_the_sample(whitening):
    """Sample by sample, the baseline from a group in which it is not: no diversity of another sample contains it."""
    n, anchors = 4, 3
    x = randn(B, n, anchors, 12, seed=0, dtype=torch.float32)
    x[0, 1, 0] = x[0, 0, 0]  # a duplicate
    y = randn(B, 1, anchors, 12, seed=1, dtype=torch.float32).expand(-1, n, -1, -1)
    there = axolotl.compute_rewards(x, y, use_whitening=whitening, alignment_coef=0.5, diversity_coef=2.0)
    # One micro-batch of B prompts; pooled features in one part.
    options = {"use_whitening": whitening, "alignment_rew_coef": 0.5, "diversity_rew_coef": 2.0}
    fork = openrlhf.compute_rewards(x[None, :, :, :, None, None], y[None, :, :, :, None, None], **options)
    assert there.advantages.shape == (B * n, anchors) and fork.rewards.shape == (1, B * n, anchors)
    torch.testing.assert_close(there.cfm_loss, (x.mean(1) - y[:, 0]).square().sum(-1).mean())
    for kind, rewards, advantages in (
        ("feature", there.rewards, there.advantages.unflatten(0, (B, n))),
        ("sample", fork.rewards[0].unflatten(0, (B, n)), fork.shaped_rewards[0].unflatten(0, (B, n))),
    ):
        group, windows = x.transpose(1, 2).double(), y.transpose(1, 2).double()  # [B, A, n, D]
        if whitening:
            group, windows = svd_whitened(group, windows, kind)
        alignment = 2 * F.cosine_similarity(group, windows, dim=-1)
        for i in range(n):
            others = [k for k in range(n) if k != i]
            gram = group @ group.mT
            diversity = 2 / (n - 1) * gram[..., i, others].sum(-1)
            reward = 0.5 * alignment[..., i] - 2.0 * diversity
            torch.testing.assert_close(rewards[:, i].double(), reward, rtol=1e-4, atol=1e-4)
            rest = gram[..., others, :][..., others]
            left = 2 / (n - 1) * (rest.sum((-2, -1)) - rest.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n - 2)
            baseline = 0.5 * alignment[..., others].mean(-1) - 2.0 * left
            torch.testing.assert_close(advantages[:, i].double(), reward - baseline, rtol=1e-4, atol=1e-4)


def test_features_per_token():
    """[MB, NG, NS, NB, G, NF, D]: each token a group of its own, parts whitened separately."""
    shape = (2, 1, 3, 2, G, 2, 6)
    x, y = randn(*shape, seed=0, dtype=torch.float32), randn(*shape, seed=1, dtype=torch.float32)
    y = y[:, :, :1].expand(shape)
    match = openrlhf.compute_rewards(x, y, use_whitening=True)
    assert match.rewards.shape == (2, 3, 2, G)
    white, windows = (z.flatten(5) for z in openrlhf.whiten_embeddings_batched(x, y))
    alignment = 2 * F.cosine_similarity(white, windows, dim=-1).flatten(1, 2)
    torch.testing.assert_close(match.gt_rewards, alignment, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_token", (False, True))
def test_advantages_go_to_the_tokens_of_their_anchor(per_token):
    advantages = randn(4, A, *((G,) if per_token else ()), seed=0, dtype=torch.float32)
    full = openrlhf.token_advantages(advantages, G, P + A * G)
    assert full.shape == (4, P + A * G - 1) and (full[:, : P - 1] == 0).all()
    for block in range(A):
        for step in range(G):
            expected = advantages[:, block, step] if per_token else advantages[:, block]
            assert torch.equal(full[:, P + step * A + block - 1], expected)
    assert axolotl.token_advantages is openrlhf.token_advantages
    with pytest.raises(ValueError, match="full_sequence_length: expected more than 15 rollout tokens, got 15"):
        openrlhf.token_advantages(advantages, G, A * G)


def test_each_row_starts_where_its_completion_does():
    labels = torch.full((2, P), -100)
    labels[0, 4:], labels[1, 9:] = 7, 7
    layout = axolotl.completion_layout(labels, context_length=2, stride=3, generate_max_len=2, n_samples=2)
    assert layout.anchors.tolist() == [[4, 7, 10], [9, 12, -1]]


def test_refusals(tiny):
    model, sequences = tiny.build("llama"), LAYOUT.to_reference_order(tiny.tokens_of(LAYOUT))
    states = {**SIZES, "generate_max_len": G, "hidden_state_method": "concat", "n_samples_per_prompt": N}
    mask = {**SIZES, "generation_step": 1, "max_generation_length": G, "device": CPU}
    documents, features = torch.zeros(1, P, dtype=torch.long), torch.zeros(1, 1, 2, 1, 1, 1, 4)
    other = features.clone()
    other[:, :, 1] = 1
    for match, call in {
        "num_blocks: expected .* = 5, got 4": lambda: openrlhf.strided_hidden_states(
            model, sequences[:, : P + 4 * G], **(states | {"num_blocks": 4})
        ),
        "hidden_state_method: expected 'last_only', .* got 'first'": lambda: openrlhf.strided_hidden_states(
            model, sequences, **(states | {"hidden_state_method": "first"})
        ),
        "hidden_state_method: expected layers up to 2, got 'layer_9'": lambda: openrlhf.strided_hidden_states(
            model, sequences, **(states | {"hidden_state_method": "layer_9"})
        ),
        "doc_ids: expected the documents' ids with document_masking": lambda: openrlhf.strided_hidden_states(
            model, sequences, **states, document_masking=True
        ),
        "sequences: expected the 3 samples of a prompt to follow one another": lambda: openrlhf.strided_hidden_states(
            model, sequences.roll(1, 0), **states
        ),
        "sequences: expected a multiple of n_samples_per_prompt = 4 rows, got 6": lambda: (
            openrlhf.strided_hidden_states(model, sequences, **(states | {"n_samples_per_prompt": 4}))
        ),
        r"sequences: expected prompt_len \+ num_blocks": lambda: openrlhf.strided_log_probs(
            model, sequences[:, :-1], P, C, A, STRIDE, n_samples_per_prompt=N
        ),
        "full_sequences: expected a multiple of n_samples = 4 rows": lambda: axolotl.strided_log_probs(
            model, sequences, P, C, STRIDE, A, n_samples=4
        ),
        "full_sequence_length: expected prompt_length .* = 19, got 20": lambda: (
            openrlhf.build_strided_attention_mask_and_positions(20, **mask, doc_ids=documents)
        ),
        "generation_step: expected at most max_generation_length = 3, got 4": lambda: (
            openrlhf.build_strided_attention_mask_and_positions(
                P + 4 * A, **(mask | {"generation_step": 4}), doc_ids=documents
            )
        ),
        r"full_sequence_length: expected .* = 14 \+ 5 \* 1, got 20": lambda: (
            axolotl.build_strided_dense_mask_and_positions(20, **mask)
        ),
        "generation_step: expected at most max_generation_length = 0, got 1": lambda: (
            axolotl.build_strided_dense_mask_and_positions(P + A, **(mask | {"max_generation_length": 0}))
        ),
        "Phi, Phi_gt: expected one shape": lambda: openrlhf.whiten_embeddings_batched(features[0], features[0]),
        "gt_embedding: expected the same windows": lambda: openrlhf.compute_rewards(features, other),
        "gt_emb: expected the same windows": lambda: axolotl.compute_rewards(
            *[x[0, :, :, :, 0, 0] for x in (features, other)]
        ),
        "estimator: expected": lambda: openrlhf.compute_rewards(features, features, advantage_estimator="grpo"),
        "temperature: expected": lambda: openrlhf.strided_log_probs(
            model, sequences, P, C, A, STRIDE, n_samples_per_prompt=N, temperature=0.0
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
