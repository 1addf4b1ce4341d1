"""One whole training step beside the published algorithm and beside the matrix products that it cannot avoid.

    python -m bench.step [--model llama-256] [--length 1024] [--vocab 32768] [--threads 2] [--rounds 3]
                         [--device cuda] [--against nobody] [--computed] [--peer ebft_openrlhf=DIR]

Both run on the same random weights with the same random numbers, and their losses are compared before anything is
reported; peers (bench/peers), which draw numbers of their own, are compared with the library before. Times are medians
of rounds in which everyone runs in turn in one process; on a GPU the clock waits for it at the end of each phase. Peak
memory is taken in a process of its own for each, above what the loaded models hold.

The floor (bench/floors.py): the products of the linear layers over every row that a phase must run, the vocabulary head
on the rows that are sampled or scored, queries times keys and probabilities times values at exactly the visible
lengths, and the features read once. Decoding is counted step by step. A backward pass counts two products for each of
the forward pass (attention: five for two). It holds no softmax, norm, activation, copy or optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import ebft_trainer.step
from ebft_trainer.config import EBFTOptions
from ebft_trainer.features import FeatureNetwork, layer_numbers
from ebft_trainer.step import ebft_step

from . import floors, peers
from .baselines import published
from .baselines.published import published_step
from .floors import Pairs, Work
from .measure import first_run, machine_line, reset_peak_resident, resident_bytes, synchronize
from .peers.agreement import disagreements
from .shapes import MODELS, Geometry, ModelShape

PHASES = ("rollout", "features", "matching", "policy", "backward")
OURS, PUBLISHED, FLOOR = "ebft-kernels", "published algorithm", "floor"
#: The library with a policy forward that is computed, not replayed from decoding.
COMPUTED = f"{OURS}, policy computed"
#: Contestants and the attention that the published algorithm's model runs with.
PUBLISHED_ATTENTION = {PUBLISHED: "eager", f"{PUBLISHED}, SDPA": "sdpa"}

#: Anchors, but for one, of the prompt on which peers are checked.
CHECKED_ANCHORS = 7

#: Seconds by contestant (and of the floor) and phase.
Seconds = dict[str, dict[str, float]]


def main() -> None:
    """Parse the command line, measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="llama-256")
    parser.add_argument("--vocab", type=int, default=0, help="instead of the model's own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024, help="prompt tokens P")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds")
    parser.add_argument("--against", action="append", choices=["nobody", *PUBLISHED_ATTENTION], help="default: all")
    parser.add_argument("--computed", action="store_true", help="the library without replay_rollouts beside itself")
    parser.add_argument("--peer", action="append", metavar="NAME=DIR", type=_peer, help=f"one of {peers.NAMES}")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = MODELS[arguments.model]
    shape = shape._replace(vocab=arguments.vocab or shape.vocab)
    geometry, checkouts = Geometry(batch=arguments.batch, length=arguments.length), dict(arguments.peer or [])
    setup = Setup(shape, geometry, getattr(torch, arguments.dtype), checkouts, device=torch.device(arguments.device))
    if arguments.memory_of:
        print(json.dumps(setup.peak_bytes(arguments.memory_of)))
        return
    others = [name for name in arguments.against or PUBLISHED_ATTENTION if name != "nobody"]
    names = [OURS, *([COMPUTED] if arguments.computed else []), *others, *checkouts]
    setup.check_peers()
    about = f"{shape.name}, V={shape.vocab}, {setup.geometry}, S={setup.layout.packed_length}, {arguments.dtype}"
    print(f"{about}. {machine_line(setup.device)}")
    seconds = setup.time(names, arguments.rounds)
    peaks = {name: peak_in_own_process(name, sys.argv[1:]) for name in names}
    print("\n" + table(seconds, peaks))


def _peer(argument: str) -> tuple[str, Path]:
    try:
        return peers.parse(argument)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def model_config(shape: ModelShape, length: int) -> Any:
    """The configuration of a model of this shape for prompts of ``length`` tokens."""
    return AutoConfig.for_model(
        shape.kind,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2 * length,
        tie_word_embeddings=shape.tied,
    )


@contextlib.contextmanager
def clocks_that_wait(device: torch.device) -> Iterator[None]:
    """Inside, the clocks of the phases wait for the device before they are read."""

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    with contextlib.ExitStack() as patches:
        for module in (ebft_trainer.step, published, sys.modules[__name__]):
            patches.enter_context(mock.patch.object(module, "perf_counter", now))
        yield


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call, by a clock that may wait for the device (:func:`clocks_that_wait`)."""
    start = perf_counter()
    work()
    return perf_counter() - start


class Setup:
    """Random weights, a prompt, and everyone who makes a step from them.

    Args:
        shape: of the model.
        geometry: of the batch.
        dtype: of the weights.
        checkouts: folders of other implementations by name, see `bench.peers`.
        device: where all of it is.
    """

    def __init__(
        self,
        shape: ModelShape,
        geometry: Geometry,
        dtype: torch.dtype,
        checkouts: Mapping[str, Path] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        with self.device:  # on a GPU drawn there, which takes a second instead of minutes
            self.model = AutoModelForCausalLM.from_config(model_config(shape, geometry.length), dtype=dtype).eval()
        self.options = EBFTOptions(
            context=geometry.context,
            stride=geometry.stride,
            horizon=geometry.horizon,
            samples=geometry.samples,
            eos_token_ids=[],  # the published algorithm goes on after an end
        )
        self._place(geometry)
        self._features: FeatureNetwork | None = None
        self._checkouts, self._peers = dict(checkouts or {}), {}

    def _place(self, geometry: Geometry) -> None:
        self.geometry, self.layout = geometry, geometry.layout().to(self.device)
        vocabulary = self.model.config.vocab_size
        self.prompt = torch.randint(vocabulary, (geometry.batch, geometry.length)).to(self.device)

    def at(self, geometry: Geometry) -> Setup:
        """The same models with prompts of another geometry."""
        other = copy.copy(self)
        other._place(geometry)
        return other

    @property
    def features(self) -> FeatureNetwork:
        """The library's feature network; the published algorithm takes the model itself."""
        if self._features is None:
            self._features = FeatureNetwork(self.model, self.options.feature_layers)
        return self._features

    def peer(self, name: str) -> Any:
        """The peer of that name, with a copy of the model."""
        if name not in self._peers:
            made = peers.adapter(name).Peer(self._checkouts[name], self.model, self.layout, self.options)
            self._peers[name] = made
        return self._peers[name]

    def check_peers(self) -> None:
        """Compare every peer with the library at a short length.

        Raises:
            RuntimeError: they differ; says in what.
        """
        geometry = self.geometry
        short = geometry._replace(length=geometry.context + geometry.horizon + CHECKED_ANCHORS * geometry.stride)
        for name, directory in self._checkouts.items():
            make = functools.partial(peers.adapter(name).Peer, directory)
            prompt = self.prompt[:, : short.length]
            if found := disagreements(make, self.model, prompt, short.layout(), self.options):
                raise RuntimeError(f"{name}: {'; '.join(found)}")

    def run(self, name: str) -> tuple[Tensor | None, dict[str, float]]:
        """One step and its backward pass, the gradients left in the model: loss and seconds by phase.

        Peers draw other rollouts, so their loss is another one, and None here.
        """
        if name in self._checkouts:
            return None, self.peer(name).step(self.prompt).seconds
        self.model.zero_grad(set_to_none=True)
        generator = torch.Generator(self.device).manual_seed(0)
        if name in (OURS, COMPUTED):
            options = replace(self.options, replay_rollouts=name == OURS)
            step = ebft_step(self.model, self.features, self.prompt, self.layout, options, generator=generator)
            seconds = {phase: step.metrics[f"seconds/{phase}"] for phase in PHASES[:-1]}
        else:
            before = self.model.config._attn_implementation
            self.model.set_attn_implementation(PUBLISHED_ATTENTION[name])
            try:
                arguments = (self.model, self.model, self.prompt, self.layout, self.options)
                step = published_step(*arguments, generator=generator)
            finally:  # it may need more memory than there is
                self.model.set_attn_implementation(before)
            seconds = step.seconds
        return step.loss.detach(), seconds | {"backward": timed(step.loss.backward)}

    def time(self, names: Sequence[str], rounds: int) -> Seconds:
        """Medians of everyone and of the floor, in turn.

        The library, in each of its ways, and the floor run thrice in each round, after one warm-up. The others run
        once: their steps take minutes, so that they spread less and need no warm-up.

        Raises:
            RuntimeError: the contestants' losses differ by more than rounding can explain.
        """
        works = self._floor()
        seconds: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in [*names, FLOOR]}
        own = [name for name in names if name in (OURS, COMPUTED)]
        turns = [own, *(own, names, own) * rounds]
        with clocks_that_wait(self.device):
            for count, turn in enumerate(turns):
                losses = {}
                for name in turn:
                    losses[name], phases = self.run(name)
                    for phase, value in phases.items():
                        seconds[name][phase] += [value] * (count > 0)
                self._compare(losses)
                for phase, parts in works.items():
                    seconds[FLOOR][phase] += [sum(timed(work) for work in parts)] * (count > 0)
        return {name: {p: statistics.median(x) for p, x in phases.items()} for name, phases in seconds.items()}

    def _compare(self, losses: dict[str, Tensor]) -> None:
        """The step's loss is a mean over rollouts of advantage times log-probability: both of order 1, so it is right
        to about the rounding of the model's features, whatever its own size."""
        allowed = math.sqrt(torch.finfo(self.model.dtype).eps)
        for name, loss in losses.items():
            if loss is not None and not abs(float(loss - losses[OURS])) <= allowed:
                raise RuntimeError(f"{name}: loss {float(loss):.6g}, but {OURS} has {float(losses[OURS]):.6g}")

    def peak_bytes(self, name: str) -> int:
        """Peak memory of one step above the loaded models; to be called first in a process."""
        if name in (OURS, COMPUTED):
            _ = self.features
        elif name in self._checkouts:
            self.peer(name)
        if self.device.type != "cpu":
            return first_run(lambda: self.run(name), self.device).peak_bytes
        loaded = resident_bytes("VmRSS")
        reset_peak_resident()
        self.run(name)
        return resident_bytes("VmHWM") - loaded

    def _floor(self) -> dict[str, tuple[Work, ...]]:
        """The unavoidable work by phase."""
        layout, short = self.layout, self.layout.without_last_step()
        decoder, head = self.model.model, self.model.lm_head.weight
        weights = [[m.weight for m in layer.modules() if isinstance(m, nn.Linear)] for layer in decoder.layers]
        deepest = max(layer_numbers(self.options.feature_layers, len(weights)))
        batch, anchors = layout.batch_size, layout.batch_size * layout.num_anchors
        decoded = range(layout.horizon - 1)

        def linear(rows: int, head_rows: int, depth: int = len(weights)) -> list[tuple[Tensor, int]]:
            calls = [(weight, rows) for layer in weights[:depth] for weight in layer]
            return calls + [(head, head_rows)] * (head_rows > 0)

        def attention(pairs: list[Pairs], depth: int = len(weights), **options: bool) -> Work:
            config = self.model.config
            return floors.attention(
                pairs * depth,
                heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                dtype=self.model.dtype,
                device=self.device,
                **options,
            )

        rollouts = anchors * layout.samples
        sampling = linear(batch * layout.length, anchors) + [x for _ in decoded for x in linear(rollouts, rollouts)]
        sampling_pairs = [Pairs.of(layout.prompt_only()), *(Pairs.of_step(layout, step) for step in decoded)]
        scored = linear(batch * short.packed_length, anchors + rollouts * len(decoded))
        feature_bytes = 4 * (anchors + rollouts) * len(self.options.feature_layers) * self.model.config.hidden_size
        return {
            "rollout": (floors.linear(sampling), attention(sampling_pairs)),
            "features": (
                floors.linear(linear(batch * layout.packed_length, 0, deepest)),
                attention([Pairs.of(layout)], deepest),
            ),
            "matching": (floors.copied(feature_bytes, 0, self.device),),
            "policy": (floors.linear(scored), attention([Pairs.of(short)])),
            "backward": (
                floors.linear(scored, forward=False, backward=True),
                attention([Pairs.of(short)], forward=False, backward=True),
            ),
        }


def peak_in_own_process(name: str, options: Sequence[str]) -> int:
    """Peak bytes of one contestant's step above the loaded models; ``options`` of this module's command line."""
    command = [sys.executable, "-m", "bench.step", *options, "--memory-of", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def table(seconds: Seconds, peaks: dict[str, int]) -> str:
    """Markdown: seconds by phase of everyone, then how many times ours the others take, then how many floors we do.

    Without any ``peaks`` there is no column for them.
    """

    def row(name: str, cells: Sequence[str], peak: str = "") -> str:
        return "| " + " | ".join([name, *cells, *([peak] if peaks else [])]) + " |"

    columns = [*PHASES, "policy + backward", "step"]
    lines = [row("", columns, "peak memory"), row("---", ["---:"] * len(columns), "---:")]
    for name, phases in seconds.items():
        peak = f"{peaks[name] / 2**20:.0f} MiB" if name in peaks else ""
        lines.append(row(name, [f"{x:.4f} s" for x in _columns(phases)], peak))
    for name, phases in seconds.items():
        if name not in (OURS, FLOOR):
            peak = f"{peaks[name] / peaks[OURS]:.1f}" if name in peaks else ""
            lines.append(row(f"{name} / {OURS}", _ratios(phases, seconds[OURS]), peak))
    lines.append(row(f"{OURS} / {FLOOR}", _ratios(seconds[OURS], seconds[FLOOR])))
    return "\n".join(lines)


def _columns(phases: dict[str, float]) -> list[float]:
    return [*(phases[p] for p in PHASES), phases["policy"] + phases["backward"], sum(phases.values())]


def _ratios(phases: dict[str, float], others: dict[str, float]) -> list[str]:
    return [f"{x / y:.2f}" for x, y in zip(_columns(phases), _columns(others), strict=True)]


if __name__ == "__main__":
    main()
