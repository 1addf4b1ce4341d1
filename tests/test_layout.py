"""StridedLayout against brute force: every index is recomputed here with plain Python loops."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

from ebft_kernels import StridedLayout, pool_features, strided_attention, strided_attention_step
from ebft_kernels.testing import LAYOUTS, randn

pytestmark = pytest.mark.usefixtures("device")
CASES = [name for name in LAYOUTS if name != "empty_batch"]


@pytest.fixture(params=CASES)
def layout(request, device) -> StridedLayout:  # noqa: ARG001
    return LAYOUTS[request.param]()


def rollout_tokens(layout: StridedLayout):
    """Yields (batch, anchor index, anchor, sample, step, packed row) for every rollout token, in packed order."""
    for batch in range(layout.batch_size):
        row = layout.length
        for index, anchor in enumerate(layout.anchors[batch].tolist()):
            for sample in range(layout.samples):
                for step in range(layout.horizon):
                    yield batch, index, max(anchor, 0), sample, step, row
                    row += 1


def brute_force_mask(layout: StridedLayout, window: int | None = None) -> torch.Tensor:
    """[B, S, S]: who sees whom, token by token."""
    near = window if window is not None else layout.packed_length
    shape = (layout.batch_size, layout.packed_length, layout.packed_length)
    seen = torch.zeros(shape, dtype=torch.bool, device="cpu")  # where single elements cost little
    for batch in range(layout.batch_size):
        start = layout.prompt_start[batch].tolist()
        for i in range(layout.length):
            for k in range(start[i], i + 1):
                seen[batch, i, k] = i - k < near
    for batch, _, anchor, _, step, row in rollout_tokens(layout):
        start = int(layout.prompt_start[batch, anchor - 1]) if anchor else 0
        for k in range(start, anchor):
            seen[batch, row, k] = anchor + step - k < near
        for earlier in range(step + 1):
            seen[batch, row, row - step + earlier] = step - earlier < near
    return seen.to(layout.device)


@pytest.mark.parametrize("window", [None, 1, 3, 11])
def test_mask_is_the_brute_force_one(layout, window):
    expected = brute_force_mask(layout, window)
    assert torch.equal(layout.dense_mask(window)[:, 0], expected)
    b, q, k = torch.meshgrid(*(torch.arange(size) for size in expected.shape), indexing="ij")
    assert torch.equal(layout.mask_mod(window)(b, torch.zeros(()), q, k), expected)


def test_every_row_sees_itself(layout):
    assert layout.dense_mask()[:, 0].diagonal(dim1=1, dim2=2).all()


def test_positions_are_those_of_the_sequence_that_a_rollout_continues(layout):
    index = torch.arange(layout.length)
    assert torch.equal(layout.position_ids[:, : layout.length], index - layout.prompt_start)
    for batch, _, anchor, _, step, row in rollout_tokens(layout):
        start = int(layout.prompt_start[batch, anchor - 1]) if anchor else 0
        assert layout.position_ids[batch, row] == anchor + step - start


def test_predictors_windows_and_rollouts_name_the_right_rows(layout):
    row_ids = torch.arange(layout.packed_length).expand(layout.batch_size, -1)
    predictors, rollouts = layout.predictors(row_ids), layout.rollouts(row_ids)
    windows = layout.windows(row_ids[:, : layout.length])
    for batch, index, anchor, sample, step, row in rollout_tokens(layout):
        assert rollouts[batch, index, sample, step] == row
        assert layout.step_rows(row_ids, step)[batch, index * layout.samples + sample] == row
        assert predictors[batch, index, sample, step] == (row - 1 if step else max(anchor - 1, 0))
        assert windows[batch, index, step] == min(anchor + step, layout.length - 1)


def test_distinct_predictors_are_the_predictors_each_once(layout):
    for rows in (layout, layout.without_last_step()):
        x = torch.arange(layout.batch_size * rows.packed_length).view(layout.batch_size, -1, 1)
        distinct, index = layout.distinct_predictors(x)
        assert distinct.shape[0] == layout.anchors.numel() * (1 + layout.samples * (layout.horizon - 1))
        assert index.dtype == torch.int64 and torch.equal(distinct[index], layout.predictors(x))
        assert torch.equal(index.unique(), torch.arange(len(distinct)))


def test_the_policy_pass_needs_no_last_step(layout):
    """Its shorter rows give the same predictors, its mask is the full mask without the last step's rows and columns."""
    short = layout.without_last_step()
    keep = torch.ones(layout.packed_length, dtype=torch.bool)
    keep[layout.length + layout.horizon - 1 :: layout.horizon] = False
    assert short.packed_length == int(keep.sum())
    assert torch.equal(short.dense_mask(), layout.dense_mask()[:, :, keep][:, :, :, keep])
    assert torch.equal(short.position_ids, layout.position_ids[:, keep])
    assert torch.equal(short.valid, layout.valid)
    x = randn(layout.batch_size, layout.packed_length, 3, seed=0)
    assert torch.equal(layout.predictors(x), layout.predictors(x[:, keep]))


def test_valid_means_whole_window_in_one_document_before_the_padding(layout):
    for batch in range(layout.batch_size):
        for index, anchor in enumerate(layout.anchors[batch].tolist()):
            end = anchor + layout.horizon
            start = layout.prompt_start[batch].tolist()
            expected = anchor > 0 and end <= layout.lengths[batch] and start[anchor - 1] == start[end - 1]
            assert bool(layout.valid[batch, index]) == expected
    assert layout.num_valid == int(layout.valid.sum())


def test_pack_and_reference_order_round_trip(layout):
    tokens = torch.arange(layout.batch_size * layout.packed_length).view(layout.batch_size, -1)
    prompt, rollouts = tokens[:, : layout.length], layout.rollouts(tokens)
    assert rollouts.data_ptr() == tokens[:, layout.length :].data_ptr(), "rollouts() copies"
    assert torch.equal(layout.pack(prompt, rollouts), tokens)
    reference = layout.to_reference_order(tokens)
    assert reference.shape == (layout.batch_size * layout.samples, layout.length + layout.num_anchors * layout.horizon)
    for batch, index, _, sample, step, row in rollout_tokens(layout):
        column = layout.length + step * layout.num_anchors + index
        assert reference[batch * layout.samples + sample, column] == tokens[batch, row]
    assert torch.equal(layout.from_reference_order(reference), tokens)
    wide = randn(layout.batch_size, layout.packed_length, 2, 3, seed=0)
    assert torch.equal(layout.from_reference_order(layout.to_reference_order(wide)), wide)


def test_strided_drops_the_remainder():
    for length in range(13, 19):
        layout = StridedLayout.strided(1, length, context=5, stride=3, horizon=8, samples=1)
        anchors = layout.anchors[0].tolist()
        assert anchors == [a for a in range(5, length, 3) if a + 8 <= length]
        assert layout.valid.all()


def test_documents_are_runs_of_equal_ids():
    ids = torch.tensor([[7, 7, 7, 2, 2, 7, 7, 7]])
    layout = StridedLayout.strided(1, 8, context=1, stride=1, horizon=2, samples=1, document_ids=ids)
    assert layout.prompt_start.tolist() == [[0, 0, 0, 3, 3, 5, 5, 5]]
    assert layout.anchors[layout.valid].tolist() == [1, 6]


def test_within_places_anchors_only_in_completions():
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[0, 6:16] = True
    mask[1, 2:5] = mask[1, 9:20] = True
    layout = StridedLayout.within(mask, context=4, stride=3, horizon=4, samples=2)
    # Row 1's first run starts with 2 tokens of context: too few. Row 2 has no completion.
    assert layout.anchors.tolist() == [[6, 9, 12, 15], [9, 12, 15, -1], [-1, -1, -1, -1]]
    assert torch.equal(layout.valid, layout.anchors > 0)
    ids = torch.tensor([[0] * 11 + [1] * 9] * 3)
    layout = StridedLayout.within(mask, context=3, stride=3, horizon=4, samples=2, document_ids=ids)
    # A document's edge at 11 starts a new run there; the windows at 9 would cross it.
    assert layout.anchors.tolist() == [[6, 14], [14, -1], [-1, -1]]
    layout = StridedLayout.within(mask, context=4, stride=3, horizon=4, samples=2, lengths=torch.tensor([13, 20, 0]))
    assert layout.anchors.tolist() == [[6, 9, -1], [9, 12, 15], [-1, -1, -1]]


def test_the_layout_is_immutable_and_moves(layout):
    with pytest.raises(AttributeError, match="immutable"):
        layout.horizon = 3
    assert layout.to(layout.device) is layout
    meta = layout.to("meta")
    assert meta.position_ids.device.type == meta.key_ranges.own_start.device.type == "meta"
    assert meta.num_valid == layout.num_valid and meta.packed_length == layout.packed_length


@pytest.mark.parametrize("dtypes", list(itertools.product((torch.int32, torch.int64), repeat=3)))
def test_the_layout_owns_its_tensors(dtypes):
    """What the caller does later to the tensors that it was built from changes nothing, whatever their dtype."""
    anchors, lengths = torch.tensor([[3, 6], [4, -1]], dtype=dtypes[0]), torch.tensor([12, 9], dtype=dtypes[1])
    documents = torch.arange(12).ge(2).expand(2, 12).to(dtypes[2])
    options = {"horizon": 2, "samples": 2, "lengths": lengths, "document_ids": documents}
    built = StridedLayout.from_anchors(anchors, 12, **options)
    mask = torch.ones(2, 12, dtype=torch.bool)
    within = StridedLayout.within(mask, context=2, stride=3, **options)
    before = [x.clone() for x in _tensors(within)]
    mask.fill_(False)
    for x in (anchors, lengths, documents):
        x.fill_(7)
    expected = StridedLayout.from_anchors(
        torch.tensor([[3, 6], [4, -1]]),
        12,
        horizon=2,
        samples=2,
        lengths=torch.tensor([12, 9]),
        document_ids=torch.arange(12).ge(2).expand(2, 12).long(),
    )
    assert all(map(torch.equal, _tensors(built), _tensors(expected)))
    assert all(map(torch.equal, _tensors(within), before))


def _tensors(layout):
    return [layout.anchors, layout.valid, layout.lengths, layout.prompt_start, layout.position_ids, *layout.key_ranges]


@pytest.mark.parametrize("which", range(8))
def test_a_layout_whose_tensors_were_changed_is_refused(which):
    layout = StridedLayout.strided(1, 12, context=4, stride=2, horizon=2, samples=2)
    rows = torch.zeros(1, layout.packed_length, 4)
    shorter = layout.without_last_step()
    _tensors(layout)[which].zero_()
    uses = [
        layout.dense_mask,
        layout.visible_keys,
        layout.without_last_step,
        lambda: layout.windows(rows),
        lambda: layout.predictors(rows),
        lambda: pool_features([rows], layout),
        lambda: strided_attention(rows[:, None], rows[:, None], rows[:, None], layout),
        lambda: strided_attention_step(
            rows[:, None, : layout.num_anchors * 2], rows[:, None], rows[:, None], layout, 0
        ),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="layout: expected its tensors as they were built, got some that were"):
            use()
    if which < 4:  # those that it shares
        with pytest.raises(ValueError, match="layout: expected its tensors as they were built"):
            shorter.dense_mask()


def test_copies_of_a_layout_can_be_used(layout):
    with torch.inference_mode():
        inside = StridedLayout.strided(1, 12, context=4, stride=2, horizon=2, samples=2)
    for original in (layout, layout.prompt_only(), inside):
        for other in (copy.copy(original), copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert torch.equal(other.dense_mask(), original.dense_mask())


def test_a_window_hides_nothing_if_it_is_as_long_as_the_longest_sequence():
    layout = StridedLayout.from_anchors(torch.tensor([[2, 12]]), 12, horizon=3, samples=1)
    whole = layout.dense_mask()
    for window in (15, 16, 2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, 2**70):
        assert torch.equal(layout.dense_mask(window), whole)
        assert layout.visible_pairs(window) == layout.visible_pairs()
    assert layout.visible_pairs(14) == layout.visible_pairs() - 1


def test_an_empty_batch_has_every_shape():
    layout = LAYOUTS["empty_batch"]()
    assert layout.dense_mask().shape == (0, 1, layout.packed_length, layout.packed_length)
    x = torch.zeros(0, layout.packed_length, 5)
    assert layout.predictors(x).shape == (0, layout.num_anchors, layout.samples, layout.horizon, 5)
    rows, index = layout.distinct_predictors(x)
    assert rows.shape == (0, 5) and index.shape == (0, layout.num_anchors, layout.samples, layout.horizon)
    assert layout.num_valid == 0


def test_dtypes_of_the_geometry(layout):
    assert layout.anchors.dtype == torch.int32
    assert layout.valid.dtype == torch.bool
    assert layout.position_ids.dtype == torch.int64
    assert {r.dtype for r in layout.visible_keys(4)} == {torch.int32}


STRIDED = {"context": 4, "stride": 4, "horizon": 4, "samples": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 7}, r"length: expected at least context \+ horizon = 8 tokens, got 7"),
        ({"context": 0}, "context: expected at least 1, got 0"),
        ({"stride": 0}, "stride: expected at least 1, got 0"),
        ({"horizon": 0}, "horizon: expected at least 1, got 0"),
        ({"samples": -1}, "samples: expected at least 1, got -1"),
        ({"batch_size": -1}, "batch_size: expected at least 0, got -1"),
        ({"stride": 2**32 + 1}, r"stride: expected less than 2\^31, got 4294967297"),
        (
            {"samples": 2**28},
            r"less than 2\^31 tokens, got 24 \+ 5 anchors \* 268435456 samples \* 4",
        ),
        ({"lengths": torch.tensor([1, 2, 3])}, r"lengths: expected shape \[B=2\], got \[3\]"),
        ({"lengths": torch.tensor([1, 30])}, r"lengths: expected 0 <= length <= 24, got \[1, 30\]"),
        ({"document_ids": torch.zeros(2, 23, dtype=torch.int64)}, r"document_ids: expected shape \[B=2, P=24\]"),
    ],
)
def test_strided_refuses_bad_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        StridedLayout.strided(**{"batch_size": 2, "length": 24, **STRIDED, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 4.0}, "horizon: expected an int, got float"),
        ({"samples": True}, "samples: expected an int, got bool"),
        ({"lengths": [24, 24]}, "lengths: expected a tensor"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths: expected dtype int64 or int32, got float32"),
        ({"document_ids": torch.zeros(2, 24)}, "document_ids: expected dtype int64 or int32, got float32"),
    ],
)
def test_strided_refuses_bad_types(changes, message):
    with pytest.raises(TypeError, match=message):
        StridedLayout.strided(**{"batch_size": 2, "length": 24, **STRIDED, **changes})


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        ([[3, 25]], "anchors: expected 1 <= anchor <= length = 24"),
        ([[0, 3]], "anchors: expected 1 <= anchor .* got 0"),
        ([[-2, -2]], "anchors: expected 1 <= anchor .* got -2"),
        ([[3, 5], [5, 5]], r"anchors: expected strictly ascending .* got row 1 = \[5, 5\]"),
        ([[6, 5]], "anchors: expected strictly ascending"),
        ([[-1, 5]], "anchors: expected strictly ascending rows with -1 only at the end"),
        ([[]], "the number of anchors: expected at least 1"),
        ([3, 5], r"anchors: expected shape \[B, A\], got \[2\]"),
    ],
)
def test_from_anchors_refuses_bad_anchors(anchors, message):
    with pytest.raises(ValueError, match=message):
        StridedLayout.from_anchors(torch.tensor(anchors, dtype=torch.int64), 24, horizon=4, samples=2)


def test_from_anchors_refuses_floats():
    with pytest.raises(TypeError, match="anchors: expected dtype int64 or int32, got float32"):
        StridedLayout.from_anchors(torch.tensor([[3.0]]), 24, horizon=4, samples=2)


def test_within_refuses_rows_without_room():
    with pytest.raises(ValueError, match="token_mask: expected a row with room for an anchor"):
        StridedLayout.within(torch.zeros(2, 24, dtype=torch.bool), **STRIDED)
    with pytest.raises(TypeError, match="token_mask: expected dtype bool"):
        StridedLayout.within(torch.zeros(2, 24), **STRIDED)


def test_index_methods_refuse_other_shapes():
    layout = StridedLayout.strided(2, 24, **STRIDED)
    tokens = torch.zeros(2, layout.packed_length, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"prompt: expected shape \[B=2, P=24, \.\.\.\], got \[2, 23\]"):
        layout.pack(tokens[:, :23], layout.rollouts(tokens))
    with pytest.raises(ValueError, match=r"rollouts: expected shape \[B=2, A=5, n=2, G=4, \.\.\.\]"):
        layout.pack(tokens[:, :24], layout.rollouts(tokens)[:, :1])
    for method in (layout.rollouts, layout.predictors, layout.distinct_predictors, layout.to_reference_order):
        with pytest.raises(ValueError, match=r"x: expected shape \[B=2, S=64, \.\.\.\], got \[2, 63\]"):
            method(tokens[:, :63])
    with pytest.raises(ValueError, match=r"x: expected shape \[4, 44, \.\.\.\]"):
        layout.from_reference_order(tokens)
    with pytest.raises(ValueError, match="step: expected less than horizon = 4, got 4"):
        layout.step_rows(tokens, 4)
    with pytest.raises(ValueError, match=r"x: expected at least P = 24 rows"):
        layout.windows(tokens[:, :20])
    with pytest.raises(ValueError, match=r"x: expected at least P = 24 rows"):
        layout.anchor_rows(tokens[:, :20])
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        layout.visible_keys(0)
