"""Rows to batches, and an error for each way in which that can fail."""

from __future__ import annotations

import pytest
import torch

from ebft_trainer.config import EBFTOptions
from ebft_trainer.data import EBFTCollator, rows_without_anchor, unpadded

OPTIONS = EBFTOptions(context=3, stride=2, horizon=2, samples=2)


def rows_of(*lengths: int) -> list[dict]:
    return [{"input_ids": torch.arange(1, length + 1)} for length in lengths]


def test_the_collator_pads_on_the_right_and_strides():
    batch = EBFTCollator(OPTIONS, pad_token_id=9)(
        [{"input_ids": [1, 2, 3, 4, 5, 6, 7]}, {"input_ids": [1, 2, 3, 4, 5]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    assert set(batch) == {"input_ids", "attention_mask", "layout"}
    layout = batch["layout"]
    assert layout.anchors.tolist() == [[3, 5], [3, 5]]
    assert layout.valid.tolist() == [[True, True], [True, False]]
    assert layout.lengths.tolist() == [7, 5]
    assert (layout.horizon, layout.samples) == (2, 2)


def assert_same_batch(batch, expected):
    assert set(batch) == set(expected)
    for name in set(expected) - {"layout"}:
        assert torch.equal(batch[name], expected[name]), name
    for name in ("anchors", "valid", "lengths", "position_ids"):
        assert torch.equal(getattr(batch["layout"], name), getattr(expected["layout"], name)), name


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 2)])
def test_a_padded_row_is_the_row_without_its_padding(left, right):
    """On either side, as lists or tensors, with all its other columns."""
    row = {
        "input_ids": torch.arange(1, 10),
        "completion_mask": torch.tensor([0, 0, 0, 1, 1, 0, 1, 1, 1]),
        "document_ids": torch.tensor([4, 4, 4, 4, 4, 4, 9, 9, 9]),
    }
    padding = {"input_ids": 0, "completion_mask": 1, "document_ids": 9, "attention_mask": 0}
    padded = {
        name: [padding[name]] * left + column.tolist() + [padding[name]] * right
        for name, column in {**row, "attention_mask": torch.ones(9, dtype=torch.long)}.items()
    }
    collate = EBFTCollator(OPTIONS, pad_token_id=60)
    for others in ([], rows_of(12)):
        assert_same_batch(collate([padded, *others]), collate([row, *others]))


def test_anchors_stand_only_inside_completions():
    row = {"input_ids": list(range(9)), "completion_mask": [0, 0, 0, 0, 1, 1, 1, 1, 1]}
    batch = EBFTCollator(OPTIONS)([row, {"input_ids": list(range(6))}])
    assert batch["completion_mask"].tolist() == [[False] * 4 + [True] * 5, [True] * 6 + [False] * 3]
    layout = batch["layout"]
    assert layout.anchors.tolist() == [[4, 6], [3, -1]]
    assert layout.valid.tolist() == [[True, True], [True, False]]


def test_no_rollout_crosses_from_one_document_into_the_next():
    row = {"input_ids": list(range(12)), "document_ids": [5] * 6 + [6] * 6}
    layout = EBFTCollator(OPTIONS)([row])["layout"]
    assert layout.anchors.tolist() == [[3, 9]] and layout.valid.all()
    assert layout.position_ids[0, :12].tolist() == [*range(6), *range(6)]


@pytest.mark.parametrize("masked", [False, True])
def test_anchors_do_not_depend_on_what_a_document_is_packed_with(masked):
    lengths = (5, 9, 4, 17, 6)
    rows = rows_of(*lengths)
    if masked:
        for row in rows[1:]:  # The first has none: all of its tokens count.
            row["completion_mask"] = torch.arange(len(row["input_ids"])) % 7 > 2
    alone = EBFTCollator(OPTIONS)(rows)["layout"]
    packed = {
        "input_ids": torch.cat([row["input_ids"] for row in rows]),
        "document_ids": torch.repeat_interleave(torch.arange(5), torch.tensor(lengths)),
    }
    if masked:
        rows[0]["completion_mask"] = torch.arange(5) >= OPTIONS.context
        packed["completion_mask"] = torch.cat([row["completion_mask"] for row in rows])
    together = EBFTCollator(OPTIONS)([packed])["layout"]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    expected = [int(starts[b] + alone.anchors[b, a]) for b, a in alone.valid.nonzero().tolist()]
    assert together.anchors[0].tolist() == expected and together.valid.all()
    assert len(expected) >= 8


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2, 3, 4]}, r"input_ids: expected at least context \+ horizon = 3 \+ 2 tokens, got 4"),
        (
            {"input_ids": [1] * 6, "document_ids": [0, 0, 1, 1, 2, 2]},
            "document_ids: no room for an anchor: expected 3 tokens before a counted one and a window of 2",
        ),
        ({"input_ids": [1] * 6, "completion_mask": [0] * 6}, "completion_mask: no room for an anchor"),
        (
            {"input_ids": [1] * 6, "completion_mask": [1] * 5},
            r"completion_mask: expected 6 numbers as in input_ids, got shape \[5\]",
        ),
        ({"input_ids": [1] * 6, "document_ids": [[1] * 6]}, r"document_ids: expected 6 numbers .* got shape \[1, 6\]"),
        (
            {"input_ids": [1] * 6, "attention_mask": [0, 1, 1, 0, 1, 1]},
            r"attention_mask: expected zeros \(padding\) only before or behind the tokens, got \[0, 1, 1, 0, 1, 1\]",
        ),
        ({"input_ids": [1] * 6, "attention_mask": [0] * 6}, r"input_ids: expected at least context .* tokens, got 0"),
        ({"input_ids": [1] * 6, "attention_mask": [1] * 5}, r"attention_mask: expected 6 numbers .* got shape \[5\]"),
        ({"input_ids": [[1] * 6]}, r"input_ids: expected 1 numbers as in input_ids, got shape \[1, 6\]"),
        ({"input_ids": [1, 2, 3, -1, 5, 6]}, "input_ids: expected token ids from 0, got -1"),
    ],
)
def test_errors_of_the_collator(row, message):
    with pytest.raises(ValueError, match=message):
        EBFTCollator(OPTIONS)([row])


def test_token_ids_that_the_model_does_not_know_are_refused():
    collate = EBFTCollator(OPTIONS, vocabulary=7)
    assert collate(rows_of(6))["input_ids"].max() == 6
    with pytest.raises(ValueError, match="input_ids: expected token ids from 0 to 6, got 7"):
        collate(rows_of(6, 7))


def test_rows_without_room_are_found_among_many():
    rows = rows_of(*[8] * 100)
    rows[70] = rows_of(4)[0]
    rows[3] = {"input_ids": [1] * 8, "completion_mask": [0] * 8}
    found = list(rows_without_anchor(rows, EBFTCollator(OPTIONS)))
    assert [number for number, _ in found] == [3, 70]
    assert "completion_mask" in found[0][1] and "input_ids" in found[1][1]


# What counts, as other trainers say it: ignored, the prompt would be trained on.


def test_labels_and_assistant_masks_say_what_counts():
    ids, mask = [5, 6, 7, 8], [False, False, True, True]
    for columns in (
        {"labels": [-100, -100, 7, 8]},
        {"assistant_masks": [0, 0, 1, 1]},
        {"labels": [-100, -100, 7, 8], "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 0, 1, 1]},
    ):
        row = unpadded({"input_ids": ids, **columns})
        assert set(row) == {"input_ids", "completion_mask"} and row["completion_mask"].bool().tolist() == mask
    padded = unpadded({"input_ids": [0, *ids], "attention_mask": [0, 1, 1, 1, 1], "labels": [-100, -100, -100, 7, 8]})
    assert padded["input_ids"].tolist() == ids and padded["completion_mask"].bool().tolist() == mask
    # Copies of the tokens, with the padding left out, are what a row without a mask means.
    assert set(unpadded({"input_ids": [0, *ids], "attention_mask": [0, 1, 1, 1, 1], "labels": [-100, *ids]})) == {
        "input_ids"
    }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"labels": [-100, 7, 8, 9]}, "labels: expected the token itself, 6, or -100, got 7 at token 1"),
        ({"labels": [5, 6]}, "labels: expected 4 numbers as in input_ids"),
        (
            {"labels": [-100, -100, 7, 8], "completion_mask": [0, 1, 1, 1]},
            "labels: expected the tokens that completion_mask counts, got another at token 1",
        ),
        (
            {"completion_mask": [0, 0, 0, 1], "assistant_masks": [0, 0, 1, 1]},
            "assistant_masks: expected the tokens that completion_mask counts, got another at token 2",
        ),
    ],
)
def test_columns_that_contradict_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        unpadded({"input_ids": [5, 6, 7, 8], **columns})
