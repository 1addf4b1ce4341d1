"""One whole training step beside the published algorithm and beside the matrix products that it cannot avoid.

    python -m bench.step [--model llama-256] [--length 1024] [--threads 2] [--rounds 3] [--skip-published]

Both run on the same random weights with the same random numbers, and their losses are compared before anything is
reported. Times are medians of rounds in which everyone runs in turn in one process. Peak memory is taken in a process
of its own for each, above what the loaded models hold.

The floor: the products of the linear layers over every row that a phase must run, the vocabulary head on the rows that
are sampled or scored, and queries times keys and probabilities times values at exactly the visible lengths. It holds no
softmax, norm, activation, copy or optimizer, and a backward pass counts two products for each of the forward pass
(attention: five for two).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ebft_kernels import StridedLayout
from ebft_trainer.config import EBFTOptions
from ebft_trainer.features import FeatureNetwork, layer_numbers
from ebft_trainer.step import ebft_step

from .baselines.published import published_step
from .measure import machine_line, reset_peak_resident, resident_bytes
from .shapes import MODELS, Geometry, ModelShape

PHASES = ("rollout", "features", "matching", "policy", "backward")
OURS, PUBLISHED = "ebft-kernels", "published algorithm"
#: Contestants and the attention that the published algorithm's model runs with.
PUBLISHED_ATTENTION = {PUBLISHED: "eager", f"{PUBLISHED}, SDPA": "sdpa"}


def main() -> None:
    """Parse the command line, measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="llama-256")
    parser.add_argument("--vocab", type=int, default=0, help="instead of the model's own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024, help="prompt tokens P")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds after one warm-up")
    parser.add_argument("--skip-published", action="store_true", help="the library and the floor alone")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = MODELS[arguments.model]
    shape = shape._replace(vocab=arguments.vocab or shape.vocab)
    setup = Setup(shape, Geometry(batch=arguments.batch, length=arguments.length), getattr(torch, arguments.dtype))
    if arguments.memory_of:
        print(json.dumps(setup.peak_bytes(arguments.memory_of)))
        return
    names = [OURS] if arguments.skip_published else [OURS, *PUBLISHED_ATTENTION]
    print(f"{shape.name}, V={shape.vocab}, {setup.geometry}, S={setup.layout.packed_length}, {arguments.dtype}")
    print(machine_line(torch.device("cpu")))
    seconds, floors = setup.time(names, arguments.rounds)
    peaks = {name: _peak_in_own_process(name) for name in names}
    _report(seconds, floors, peaks)


class Setup:
    """Random weights, a prompt, and everyone who makes a step from them.

    Args:
        shape: of the model, a Llama.
        geometry: of the batch.
        dtype: of the weights.
    """

    def __init__(self, shape: ModelShape, geometry: Geometry, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=2 * geometry.length,
        )
        self.geometry, self.layout = geometry, geometry.layout()
        self.model = LlamaForCausalLM(config).to(dtype).eval()
        self.options = EBFTOptions(
            context=geometry.context,
            stride=geometry.stride,
            horizon=geometry.horizon,
            samples=geometry.samples,
            eos_token_ids=[],  # the published algorithm goes on after an end
        )
        self.prompt = torch.randint(shape.vocab, (geometry.batch, geometry.length))
        self._features: FeatureNetwork | None = None

    @property
    def features(self) -> FeatureNetwork:
        """The library's feature network; the published algorithm takes the model itself."""
        if self._features is None:
            self._features = FeatureNetwork(self.model, self.options.feature_layers)
        return self._features

    def run(self, name: str) -> tuple[Tensor, dict[str, float]]:
        """One step and its backward pass, the gradients left in the model: loss and seconds by phase."""
        self.model.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(0)
        if name == OURS:
            step = ebft_step(self.model, self.features, self.prompt, self.layout, self.options, generator=generator)
            seconds = {phase: step.metrics[f"seconds/{phase}"] for phase in PHASES[:-1]}
        else:
            before = self.model.config._attn_implementation
            self.model.set_attn_implementation(PUBLISHED_ATTENTION[name])
            step = published_step(self.model, self.model, self.prompt, self.layout, self.options, generator=generator)
            self.model.set_attn_implementation(before)
            seconds = step.seconds
        return step.loss.detach(), seconds | {"backward": _timed(step.loss.backward)}

    def time(self, names: list[str], rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Median seconds by phase of each contestant, and of the parts of the floor.

        Raises:
            RuntimeError: the contestants' losses differ by more than rounding can explain.
        """
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        floors: dict[str, list[float]] = {}
        for count in range(rounds + 1):
            losses = {}
            for name in names:
                losses[name], phases = self.run(name)
                if count:
                    for phase, value in phases.items():
                        seconds[name].setdefault(phase, []).append(value)
            self._compare(losses)
            for name, products in self._floor().items():
                value = _timed(products)
                if count:
                    floors.setdefault(name, []).append(value)
        medians = {name: _medians(values) for name, values in seconds.items()}
        return medians, _medians(floors)

    def _compare(self, losses: dict[str, Tensor]) -> None:
        """The step's loss is a mean over rollouts of advantage times log-probability: both of order 1, so it is right
        to about the rounding of the model's features, whatever its own size."""
        allowed = math.sqrt(torch.finfo(self.model.dtype).eps)
        for name, loss in losses.items():
            if not abs(float(loss - losses[OURS])) <= allowed:
                raise RuntimeError(f"{name}: loss {float(loss):.6g}, but {OURS} has {float(losses[OURS]):.6g}")

    def peak_bytes(self, name: str) -> int:
        """Peak memory of one step above the loaded models; to be called first in a process."""
        if name == OURS:
            _ = self.features
        loaded = resident_bytes("VmRSS")
        reset_peak_resident()
        self.run(name)
        return resident_bytes("VmHWM") - loaded

    def _floor(self) -> dict[str, Callable[[], None]]:
        """The unavoidable products by phase."""
        layout, short = self.layout, self.layout.without_last_step()
        layers = self.model.config.num_hidden_layers
        deepest = max(layer_numbers(self.options.feature_layers, layers))
        rollouts = layout.num_anchors * layout.samples
        sampled = layout.batch_size * (layout.num_anchors + rollouts * (layout.horizon - 1))
        rows, short_rows = (layout.batch_size * x.packed_length for x in (layout, short))
        return {
            "rollout, linear layers": lambda: _linear(self.model, layers, short_rows, sampled, 1),
            "features, linear layers": lambda: _linear(self.model, deepest, rows, 0, 1),
            "policy, linear layers": lambda: _linear(self.model, layers, short_rows, sampled, 3),
            "rollout, attention": lambda: _attention(self.model, layers, short, 2),
            "features, attention": lambda: _attention(self.model, deepest, layout, 2),
            "policy, attention": lambda: _attention(self.model, layers, short, 7),
        }


def _medians(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(runs) for name, runs in values.items()}


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _linear(model: Any, layers: int, rows: int, head_rows: int, passes: int) -> None:
    """Every weight matrix of the decoder times ``rows`` rows, the head times ``head_rows``, ``passes`` times."""
    weights = [m.weight for m in model.model.layers[0].modules() if isinstance(m, nn.Linear)]
    work = [(weight, rows) for weight in weights] * layers + [(model.lm_head.weight, head_rows)] * bool(head_rows)
    with torch.no_grad():
        inputs = {weight.shape[1]: weight.new_ones(max(rows, head_rows), weight.shape[1]) for weight, _ in work}
        for weight, count in work * passes:
            nn.functional.linear(inputs[weight.shape[1]][:count], weight)


def _attention(model: Any, layers: int, layout: StridedLayout, products: int) -> None:
    """``products`` matrix products per visible pair: blocks of 64 prompt rows, and each anchor's rollouts."""
    config = model.config
    kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    blocks = [(min(64, layout.length - i), i + min(64, layout.length - i) // 2) for i in range(0, layout.length, 64)]
    own = layout.samples * layout.horizon
    blocks += [(own, anchor + layout.horizon // 2) for anchor in layout.anchors[0].tolist()]
    weight = model.lm_head.weight
    with torch.no_grad():
        heads = layout.batch_size * kv_heads
        queries = weight.new_ones(heads, group * max(rows for rows, _ in blocks), config.head_dim)
        keys = weight.new_ones(heads, config.head_dim, layout.packed_length)
        for _ in range(layers * products):
            for rows, length in blocks:
                torch.bmm(queries[:, : group * rows], keys[:, :, :length])


def _peak_in_own_process(name: str) -> int:
    command = [sys.executable, "-m", "bench.step", *sys.argv[1:], "--memory-of", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _report(seconds: dict[str, dict[str, float]], floors: dict[str, float], peaks: dict[str, int]) -> None:
    floor, ours = sum(floors.values()), sum(seconds[OURS].values())
    print("\n| | " + " | ".join(PHASES) + " | step | x ebft | x floor | peak memory |")
    print("| --- |" + " ---: |" * (len(PHASES) + 4))
    for name, phases in seconds.items():
        total = sum(phases.values())
        cells = [f"{phases[phase]:.3f} s" for phase in PHASES]
        cells += [f"{total:.3f} s", f"{total / ours:.2f}", f"{total / floor:.2f}", f"{peaks[name] / 2**20:.0f} MiB"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| unavoidable products | |\n| --- | ---: |")
    for name, value in floors.items():
        print(f"| {name} | {value:.3f} s |")
    print(f"| all | {floor:.3f} s |")


if __name__ == "__main__":
    main()
