"""The examples run as they are, on a tiny model; the FSDP2 one in `test_ranks.py`."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_lora(model_folder, tmp_path):
    peft = pytest.importorskip("peft")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(40)), encoding="utf-8")
    before = AutoModelForCausalLM.from_pretrained(model_folder)
    runpy.run_path(str(EXAMPLES / "lora.py"))["main"](str(model_folder), str(text), str(tmp_path / "run"), 2)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged").double()
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before.parameters(), strict=True))
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapters").double()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected, found, plain = (model(ids).logits for model in (adapted, merged, before.double()))
    # The merged weights were rounded to float32 once.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-4
