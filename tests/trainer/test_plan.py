"""The plan against what steps really hold, compute and take, on the CPU; no weight is made for it."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from bench import performance_model
from bench.gpu import kernels
from ebft_kernels import available_impls
from ebft_kernels.testing import LAYOUTS
from ebft_trainer import cli
from ebft_trainer.config import EBFTOptions
from ebft_trainer.dry_run import FEATURE_NETWORK, GRADIENTS, OBJECTIVES, OPTIMIZER, PARTS, WEIGHTS
from ebft_trainer.hardware import FAST, GPUS, SLOW, device
from ebft_trainer.plan import USABLE, Planner, Setup, held, largest_batch, plan, predictions, read_config, suggestions

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "llama": {},
    "gemma2": {"sliding_window": 6},
    "gpt_oss": {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
}
COMMON = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "head_dim": 8}
COMMON |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
COMMON |= {"pad_token_id": None, "tie_word_embeddings": False}
SMALL = {"context": 4, "stride": 6, "horizon": 3, "samples": 2}
LLAMA = {"model_type": "llama", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688}
LLAMA |= {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
GEMMA = {"model_type": "gemma2", "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "head_dim": 32}
GEMMA |= {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 64}
#: Small and large, wide head, checkpointing, sliding window with another pooling and a cross-entropy term.
MEASURED = {
    "llama": {"config": LLAMA, "batch": 1, "length": 512},
    "checkpointing": {
        "config": LLAMA | {"hidden_size": 384, "num_hidden_layers": 6},
        "batch": 2,
        "length": 512,
        "checkpointing": True,
        "options": {"samples": 6},
    },
    "wide head": {
        "config": LLAMA | {"vocab_size": 32000, "num_hidden_layers": 4},
        "batch": 4,
        "length": 128,
        "options": {"samples": 2, "horizon": 4, "stride": 16},
    },
    "gemma2": {
        "config": GEMMA,
        "batch": 2,
        "length": 256,
        "options": {"feature_layers": [0.5, 1.0], "pooling": "mean", "ce_coef": 0.1},
    },
}


def predicted(setup: Setup) -> dict:
    return predictions(Planner(setup.config, setup.options, setup.dtype, setup.lora_rank), setup)


def measured_by(script: str, *arguments: str) -> dict:
    """What a script prints, in a process that gives freed memory back at once."""
    command = [sys.executable, str(ROOT / "tests" / "trainer" / script), *arguments]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "PYTHONPATH": paths}
    environment["OMP_WAIT_POLICY"] = "passive"  # threads that wait do not take a busy machine from those that work
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def setup_of(config: dict, *, batch: int = 2, length: int = 24, options: dict | None = None, **changes) -> Setup:
    settings = {"dtype": torch.float32, "prompt_tokens": length // 2, "device": GPUS["h100"]} | changes
    options = EBFTOptions(**(SMALL if options is None else options))
    return Setup(config=AutoConfig.for_model(**config), options=options, batch=batch, length=length, **settings)


def tiny(name: str = "llama") -> dict:
    return {"model_type": name} | COMMON | TINY[name]


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[dict, dict]]:
    """Name -> what was predicted and what was measured."""
    cpu = device("cpu")
    out = {}
    for name, setting in MEASURED.items():
        setup = setup_of(
            setting["config"],
            batch=setting["batch"],
            length=setting["length"],
            options=setting.get("options", {}),
            device=cpu,
            checkpointing=setting.get("checkpointing", False),
        )
        out[name] = predicted(setup), measured_by("measured_step.py", json.dumps(setting))
    return out


@pytest.mark.speed
def test_peak_memory_is_within_15_percent(measured):
    for name, (objectives, real) in measured.items():
        memory = objectives["ebft"]["memory"]
        predicted = objectives["ebft"]["peak_bytes"] - memory[WEIGHTS] - memory[FEATURE_NETWORK]
        assert predicted > 100e6, name  # far more than what libraries take for themselves
        assert abs(real["peak"] / predicted - 1) < 0.15, (name, real["peak"], predicted)


@pytest.mark.speed
def test_times_are_ranked_as_they_are(measured):
    """Whatever is predicted to take twice as long does take longer: of objectives, and of configurations."""
    pairs = 0
    predicted = {
        (name, objective): math.prod(x["seconds"]) ** 0.5
        for name, (objectives, _) in measured.items()
        for objective, x in objectives.items()
    }
    real = {(name, objective): x for name, (_, run) in measured.items() for objective, x in run["seconds"].items()}
    for one, other in itertools.permutations(predicted, 2):
        comparable = one[0] == other[0] or one[1] == other[1]
        if comparable and predicted[other] > 2 * predicted[one]:
            pairs += 1
            assert real[other] > real[one], (one, other, predicted[one], predicted[other], real[one], real[other])
    assert pairs >= 20


@pytest.mark.speed
@pytest.mark.skipif("native" not in available_impls("strided_attention", "cpu"), reason="no compiled attention")
def test_workspace_of_attention_is_what_it_takes():
    for name, (real, predicted) in measured_by("measured_attention.py").items():
        assert predicted > 4e6, name
        assert abs(real / predicted - 1) < 0.15, (name, real, predicted)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("checkpointing", [False, True])
def matrix_weights(model: torch.nn.Module, blocks: int | None = None) -> int:
    """Weights that each row of the first ``blocks`` blocks is multiplied with."""
    chosen = model.model.layers[:blocks]
    return sum(x.weight.numel() for x in chosen.modules() if isinstance(x, torch.nn.Linear))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_linear_operations_are_those_that_the_model_does(name, objective, checkpointing):
    """By FlopCounterMode of the whole dry run, and by hand from rows and weights."""
    setup = setup_of(tiny(name), checkpointing=checkpointing)
    planner = Planner(setup.config, setup.options, setup.dtype)
    with FlopCounterMode(display=False) as counter:
        run = planner.run(setup.job(objective), True)
    linear = {phase: x.operations["linear"] for phase, x in run.phases.items()}
    assert counter.get_total_flops() == sum(x // run.phases[phase].times for phase, x in linear.items())
    # Each forward ends with one row of the head per row of the batch, only to be left out.
    weights = matrix_weights(planner.model)
    head = 2 * setup.batch * planner.model.get_output_embeddings().weight.numel()
    for phase in ("rollout: prompt", "rollout: steps", "policy"):
        if phase in linear:
            assert linear[phase] == 2 * run.phases[phase].rows * weights + head * run.phases[phase].times, phase
    if "features" in linear:
        deepest = max(planner.network.layers)
        assert linear["features"] == 2 * run.phases["features"].rows * matrix_weights(planner.model, deepest)
    # What is recomputed ends where the last saved tensor is found: for a Llama before its block's last matrix.
    skipped = 4 * 40 * 32 if name == "llama" else 0
    again = run.phases["backward"].rows * (weights - skipped)
    assert linear["backward"] == 2 * (2 * run.phases["policy"].rows * weights + again)


def test_experts_count_by_their_use():
    """Two of four experts and the router; neither the experts' biases nor those of others are matrices."""
    config = tiny("gpt_oss")
    for used in (2, 4):
        setup = setup_of(config | {"num_experts_per_tok": used}, dtype=torch.bfloat16)
        planner = Planner(setup.config, setup.options, setup.dtype)
        phases = planner.run(setup.job("sft"), False).phases
        experts = sum(x.numel() for x in planner.model.parameters() if x.ndim == 3) * used // 4
        routers = 4 * 4 * 32
        weights = experts + routers + matrix_weights(planner.model)
        head = 2 * setup.batch * planner.model.get_output_embeddings().weight.numel()
        assert phases["policy"].operations["linear"] == 2 * phases["policy"].rows * weights + head
        assert phases["backward"].operations["linear"] == 4 * phases["policy"].rows * weights


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("window", [None, 3])
def test_visible_pairs_are_those_of_the_mask(name, window):
    layout = LAYOUTS[name]()
    assert layout.visible_pairs(window) == int(layout.dense_mask(window).sum())


def test_a_mixture_of_experts_is_planned_in_bfloat16():
    objectives = predicted(setup_of(tiny("gpt_oss"), dtype=torch.bfloat16))
    assert objectives["ebft"]["phases"]["policy"]["linear"] > 0
    with pytest.raises(ValueError, match="dtype: expected bfloat16 for a mixture of experts"):
        predicted(setup_of(tiny("gpt_oss")))


def test_operations_of_attention_and_head_by_hand():
    setup = setup_of(tiny())
    objectives = predicted(setup)
    layout = setup.job("ebft").layout()
    pairs = int(layout.without_last_step().dense_mask().sum())
    phases = objectives["ebft"]["phases"]
    assert phases["policy"]["attention"] == 4 * 2 * 4 * (8 + 8) * pairs  # blocks, 2 per multiply-add, heads, D + Dv
    assert phases["backward"]["attention"] == 2.5 * phases["policy"]["attention"]
    rollouts = 2 * layout.num_anchors * 2
    first_rows = 2 * layout.num_anchors  # all samples of an anchor have it in common
    assert phases["policy"]["head"] == 2 * (first_rows + rollouts * 2) * 61 * 32
    assert phases["rollout: steps"]["rows"] == rollouts * 2
    assert phases["features"]["attention"] == 3 * 2 * 4 * 16 * int(layout.dense_mask().sum())
    assert phases["backward"]["head"] == 3 * phases["policy"]["head"]
    assert objectives["sft"]["phases"]["policy"]["head"] == 2 * 2 * 23 * 61 * 32
    assert objectives["whole_response"]["phases"]["rollout: steps"]["times"] == 11
    windowed = predicted(setup_of(tiny("gemma2")))["ebft"]["phases"]["policy"]["attention"]
    in_window = int(layout.without_last_step().dense_mask(6).sum())
    assert windowed == 2 * 2 * 4 * 16 * (pairs + in_window)  # every second block slides


def test_fixed_parts_are_exact():
    setup = setup_of(tiny())
    planner = Planner(setup.config, setup.options, setup.dtype)
    memory = predictions(planner, setup)["ebft"]["memory"]
    assert memory[GRADIENTS] == 4 * planner.parameters == memory[OPTIMIZER] / 2
    assert 0 <= memory[WEIGHTS] - 4 * planner.parameters < 1000  # frequencies of the rotary embedding
    assert set(memory) == set(PARTS)


def test_sharding_divides_what_is_trained():
    whole, sharded = (setup_of(tiny(), count=8, sharded=sharded) for sharded in (False, True))
    planner = Planner(whole.config, whole.options, whole.dtype)
    phase = planner.run(whole.job("ebft"), False).phases["optimizer"]
    before, after = held(planner, whole, phase), held(planner, sharded, phase)
    assert after[OPTIMIZER] == before[OPTIMIZER] / 8 and after[GRADIENTS] == before[GRADIENTS] / 8
    assert after[FEATURE_NETWORK] == before[FEATURE_NETWORK]
    blocks = sum(x.numel() for x in planner.model.model.layers[0].parameters())
    outside = planner.parameters - 4 * blocks
    assert after[WEIGHTS] - before[WEIGHTS] / 8 == pytest.approx(4 * (2 * blocks + outside), abs=1)


def test_the_largest_batch_fits_and_one_more_does_not():
    tight = GPUS["h100"]._replace(memory=6e6)
    setup = setup_of(tiny(), device=tight, count=4)
    planner = Planner(setup.config, setup.options, setup.dtype)
    ways = suggestions(planner, setup)
    assert [(way["sharded"], way["checkpointing"]) for way in ways] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]
    assert sum(way["suggested"] for way in ways) == 1 and ways[0]["suggested"]
    assert ways[0]["batch"] < ways[2]["batch"]
    for way in ways:
        fits = []
        for batch in (way["batch"], way["batch"] + 1):
            asked = replace(setup, batch=batch, sharded=way["sharded"], checkpointing=way["checkpointing"])
            phases = planner.run(asked.job("ebft"), False).phases.values()
            fits.append(max(sum(held(planner, asked, x).values()) for x in phases) <= USABLE * tight.memory)
        assert fits == [True, False], way
    nothing = suggestions(planner, replace(setup, device=tight._replace(memory=1e3)))
    assert not any(way["batch"] or way["suggested"] for way in nothing)


def test_adapters_need_less():
    whole, adapters = plan(setup_of(tiny())), plan(setup_of(tiny(), lora_rank=2))
    assert adapters["model"]["trained"] < adapters["model"]["parameters"]
    memory = adapters["objectives"]["ebft"]["memory"]
    assert memory[FEATURE_NETWORK] == 0
    assert memory[OPTIMIZER] == 8 * adapters["model"]["trained"]
    backward = [x["objectives"]["ebft"]["phases"]["backward"]["head"] for x in (whole, adapters)]
    assert backward[0] / backward[1] == pytest.approx(3 / 2)


def test_data_sheets_are_those_of_the_benchmarks():
    assert performance_model.H100 is GPUS["h100"] and kernels.accelerator(torch.device("cpu")) is GPUS["h100"]
    assert all(x.rates[torch.bfloat16] > x.rates[torch.float32] > x.rates.get(torch.float64, 0) for x in GPUS.values())


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny()))
    return path


def test_command(config_file, capsys):
    options = ["plan", "--model", str(config_file), "--length", "48", "--horizon", "4", "--per-device-train-batch-size"]
    cli.main([*options, "2", "--gpus", "8"])
    text = capsys.readouterr().out
    for words in (
        "Computed, not measured",
        "EBFT",
        "SFT",
        "whole-response RL",
        "FSDP2",
        "rollout: steps x 3",
        "assumptions",
        "H100",
    ):
        assert words in text
    cli.main([*options, "2", "--gpu", "cpu", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert set(result["objectives"]) == set(OBJECTIVES)
    assert "CPU" in result["step"]["device"] and result["step"]["batch"] == 2
    assert any("MALLOC_MMAP_THRESHOLD_" in line for line in result["assumptions"])


def test_a_large_model_takes_no_memory():
    """70 billion parameters: no machine for tests could hold them."""
    large = LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    large |= {"num_attention_heads": 64, "num_key_value_heads": 8}
    setup = setup_of(large, batch=1, length=1024, options={}, dtype=torch.bfloat16, count=64, sharded=True)
    planner = Planner(setup.config, setup.options, setup.dtype)
    assert 69e9 < planner.parameters < 71e9
    phase = planner.run(setup.job("sft"), False).phases["backward"]
    assert sum(held(planner, setup, phase).values()) < 80e9 < phase.bytes


@pytest.mark.parametrize("kink", [3, 10, 1000])
@pytest.mark.parametrize("room", [9.9, 10, 57, 100, 12345])
def test_the_largest_batch_of_a_bent_line(kink, room):
    def needed(batch: int) -> float:
        return 10 + max(batch - 1, 3 * (batch - kink))

    found = largest_batch(needed, room)
    assert (found == 0) == (room < 10)
    assert not found or needed(found) <= room < needed(found + 1)


def test_a_batch_without_end_is_cut_off():
    assert largest_batch(lambda _batch: 1.0, 2.0) == 1 << 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"count": 0}, "count: expected at least 1, got 0"),
        ({"prompt_tokens": 24}, "prompt_tokens: expected at least 1, fewer than length = 24, got 24"),
        ({"sharded": True}, "fsdp: expected at least 2 devices to shard over, got 1"),
        ({"lora_rank": -1}, "lora_rank: expected at least 0, got -1"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        setup_of(tiny(), **changes)


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="gpu: expected one of a100, .*, cpu; got 'abacus'"):
        device("abacus")
    with pytest.raises(ValueError, match="model: expected a config of transformers, got 'no/such'"):
        read_config("no/such")
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ValueError, match="model: expected a config of transformers, .*'model_type'"):
        read_config(str(tmp_path / "config.json"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="lora_rank: needs peft"):
        Planner(AutoConfig.for_model(**tiny()), EBFTOptions(), torch.float32, lora_rank=2)


def test_a_row_too_short_for_a_rollout_is_one_line(config_file, capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--model", str(config_file), "--length", "9"])
    assert "length: expected at least context + horizon = 16 tokens, got 9" in capsys.readouterr().err


def test_the_page_has_the_data_sheets_and_what_is_assumed():
    text = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for key, gpu in GPUS.items():
        rates = " | ".join(f"{gpu.rates[x] / 1e12:.4g}" for x in (torch.bfloat16, torch.float32))
        assert f"| `{key}` | {gpu.name} | {gpu.memory / 1e9:.0f} | {rates} | {gpu.bandwidth / 1e12:.3f} |" in text
    assert text.count("\n| `") == 1 + len(GPUS)  # and the header
    products, bandwidth, starts = zip(FAST, SLOW, strict=True)
    host = [x * GPUS["h100"].seconds_per_op * 1e6 for x in starts]
    words = " ".join(text.split())
    assert f"{products[0]:.0%}"[:-1] + f" and {products[1]:.0%}".replace("%", " % of the rate") in words
    assert f"{bandwidth[0]:.0%}"[:-1] + f" and {bandwidth[1]:.0%}".replace("%", " % of the bandwidth") in words
    assert f"{host[0]:.0f} and {host[1]:.0f} microseconds per op" in words
