"""A long run costs no more memory than a short one, and its batches have few shapes."""

from __future__ import annotations

import functools
import gc
import sys

import pytest
import torch
from transformers import TrainerCallback

from ebft_trainer.config import EBFTConfig
from ebft_trainer.data import EBFTCollator
from ebft_trainer.trainer import EBFTTrainer


class Census(TrainerCallback):
    """Live tensors, all objects that Python tracks, and entries of the packages' caches, after some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.found = steps, []

    def on_step_end(self, _args, state, _control, **_others):
        if state.global_step in self.steps:
            gc.collect()
            objects = gc.get_objects()
            tensors = sum(type(x) in (torch.Tensor, torch.nn.Parameter) for x in objects)
            self.found.append((tensors, len(objects), cache_entries()))


def cache_entries() -> int:
    modules = [module for name, module in sys.modules.items() if name.startswith(("ebft_kernels", "ebft_trainer"))]
    values = {id(value): value for module in modules for value in vars(module).values()}.values()
    caches = [value for value in values if isinstance(value, functools._lru_cache_wrapper)]
    assert caches
    return sum(cache.cache_info().currsize for cache in caches)


@pytest.mark.heavy
def test_nothing_grows_over_200_steps_of_ever_other_shapes(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer_callback.PrinterCallback.on_log", lambda *_args, **_kwargs: None)
    config = EBFTConfig(
        output_dir=str(tmp_path), context=4, stride=6, horizon=3, samples=3, max_steps=200, logging_steps=20,
        per_device_train_batch_size=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, ce_coef=0.1,
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(n) % 61} for n in range(8, 40)]
    model = plain.build(num_hidden_layers=2)
    census = Census(60, 200)
    EBFTTrainer(model, config, train_dataset=rows, callbacks=[census]).train()
    (tensors, objects, entries), after = census.found
    assert after[0] == tensors and after[2] == entries
    # Seven lines of the log, of some twenty numbers each.
    assert after[1] - objects < 400


def test_padding_to_a_multiple_gives_few_shapes_and_the_same_anchors(tmp_path):
    config = EBFTConfig(output_dir=str(tmp_path), context=4, stride=6, horizon=3, samples=3, use_cpu=True)
    rows = [{"input_ids": torch.arange(n) % 61} for n in range(8, 40)]
    exact, padded = EBFTCollator(config), EBFTCollator(config, pad_to_multiple_of=16)
    shapes = set()
    for row in rows:
        expected, found = exact([row])["layout"], padded([row])["layout"]
        assert found.num_valid == expected.num_valid
        assert torch.equal(found.anchors[found.valid], expected.anchors[expected.valid])
        shapes.add((found.length, found.num_anchors))
    assert shapes == {(16, 2), (32, 5), (48, 7)}
