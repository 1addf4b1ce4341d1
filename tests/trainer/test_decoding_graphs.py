"""Recorded decoding steps, rehearsed on the CPU: a stand-in for a CUDA graph that holds the ops of a step and the
tensors that they read and write, and nothing of the Python around them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ebft_kernels import StridedLayout, _native
from ebft_kernels.integrations.transformers import decoder_layers
from ebft_trainer import decoding_graphs, rollout
from ebft_trainer.rollout import sample_rollouts

pytestmark = pytest.mark.skipif(bool(_native.why_not("cpu")), reason=_native.why_not("cpu"))


class Recorded:
    """As a CUDA graph: what ``run`` does is recorded as ops on the very tensors; replayed without any of its Python."""

    made: list[Recorded] = []

    def __init__(self) -> None:
        self.replays = 0
        Recorded.made.append(self)

    def record(self, run: Callable[[], None]) -> None:
        self.graph = make_fx(run)()

    def replay(self) -> None:
        self.replays += 1
        self.graph()


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setitem(decoding_graphs.BACKENDS, "cpu", lambda: Recorded)
    monkeypatch.setattr(Recorded, "made", [])
    # Whoever draws reads tensors through the dispatcher, as on a GPU a stream has all kernels.
    monkeypatch.setattr(rollout, "draws_by", lambda *_: "torch")
    return Recorded


def sampled(model, prompt, layout, seed, **options):
    numbers = torch.Generator().manual_seed(seed)
    return sample_rollouts(model, prompt, layout, generator=numbers, **({"temperature": 0.8} | options))


def batches(plain, count=4):
    """Prompts and layouts of one size, whose anchors stand elsewhere in each."""
    for number in range(count):
        anchors = torch.tensor([[3, 7, 12], [2, 9, 15]]) + number % 3
        layout = StridedLayout.from_anchors(anchors, 24, horizon=4, samples=2)
        yield plain.prompt_of(layout).roll(number, 1), layout


@pytest.mark.parametrize("name", ("llama", "gemma2"))
def test_replayed_steps_draw_the_same_rollouts(plain, name, recording):
    """Run, recorded, replayed: each batch gives what it gives without graphs, weights changed in place between them."""
    model = plain.build(name)
    for number, (prompt, layout) in enumerate(batches(plain)):
        expected = sampled(model, prompt, layout, number)
        found = sampled(model, prompt, layout, number, cuda_graphs=True)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)
        assert [graph.replays for graph in recording.made] == [max(number, 0)] * (3 if number else 0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.99)


def test_results_are_not_overwritten_by_the_next_batch(plain, recording):
    model, layout = plain.build(), StridedLayout.from_anchors(torch.tensor([[5]]), 9, horizon=3, samples=1)
    prompt = plain.prompt_of(layout)
    first = [sampled(model, prompt, layout, seed, cuda_graphs=True) for seed in range(4)]
    for seed, (tokens, log_probs) in enumerate(first):
        expected = sampled(model, prompt, layout, seed)
        assert torch.equal(tokens, expected[0]) and torch.equal(log_probs, expected[1])
    assert [graph.replays for graph in recording.made] == [3, 3]


@pytest.mark.parametrize("change", ("sizes", "temperature", "weights", "autocast"))
def test_what_a_graph_would_not_notice_is_recorded_anew(plain, recording, change):
    model = plain.build()
    (prompt, layout), *_ = batches(plain)
    options = {"cuda_graphs": True}
    for seed in range(3):
        sampled(model, prompt, layout, seed, **options)
    assert [graph.replays for graph in recording.made] == [2, 2, 2]
    if change == "sizes":
        prompt, layout = prompt[:1], StridedLayout.from_anchors(layout.anchors[:1], 24, horizon=4, samples=2)
    elif change == "temperature":
        options["temperature"] = 0.5
    elif change == "weights":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 0.9)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        for seed in range(3):
            expected = sampled(model, prompt, layout, seed, **options | {"cuda_graphs": False})
            found = sampled(model, prompt, layout, seed, **options)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert [graph.replays for graph in recording.made] == [2] * 6, "three of the old ones, three of the new ones"


def test_a_module_that_the_host_waits_for_is_named(plain, recording, caplog):
    model = plain.build()
    (prompt, layout), *_ = batches(plain)
    expected = sampled(model, prompt, layout, 0)
    block = decoder_layers(model)[1].mlp
    block.register_forward_hook(lambda _module, _args, out: out if out.sum().item() else out)
    caplog.set_level(logging.WARNING, decoding_graphs.__name__)
    for _ in range(3):
        found = sampled(model, prompt, layout, 0, cuda_graphs=True)
        assert torch.equal(found[0], expected[0])
    assert not recording.made, "nothing is recorded"
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("rollouts are decoded without CUDA graphs: model.layers.1")
    assert message.endswith("waits for the device (aten::_local_scalar_dense)")


def test_an_error_while_recording_names_the_module_and_costs_no_rollout(plain, monkeypatch, caplog, recording):
    model = plain.build()
    (prompt, layout), *_ = batches(plain)
    now = []

    class Failing(recording):
        def record(self, run):
            now.append(self)
            try:
                run()
            finally:
                now.clear()

    def fail(_module, _args):
        if now:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setitem(decoding_graphs.BACKENDS, "cpu", lambda: Failing)
    decoder_layers(model)[2].self_attn.register_forward_pre_hook(fail)
    caplog.set_level(logging.WARNING, decoding_graphs.__name__)
    for seed in range(4):
        expected = sampled(model, prompt, layout, seed)
        found = sampled(model, prompt, layout, seed, cuda_graphs=True)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    (message,) = (record.getMessage() for record in caplog.records)
    assert "model.layers.2.self_attn cannot be recorded: RuntimeError: operation not permitted" in message
    assert "\n" not in message and len(recording.made) == 1


def test_where_there_are_no_graphs_the_log_says_so_once(plain, caplog):
    model = plain.build()
    (prompt, layout), *_ = batches(plain)
    caplog.set_level(logging.WARNING, decoding_graphs.__name__)
    expected = sampled(model, prompt, layout, 0)
    for _ in range(2):
        assert torch.equal(sampled(model, prompt, layout, 0, cuda_graphs=True)[0], expected[0])
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["rollouts are decoded without CUDA graphs: there are none on cpu"]


@pytest.mark.usefixtures("recording")
def test_wrappers_hooks_and_other_devices_are_refused_by_name(plain):
    device = torch.device("cpu")
    model = plain.build()
    assert decoding_graphs.why_not(model, device) == ""
    model.lm_head._hf_hook = object()
    assert decoding_graphs.why_not(model, device) == "lm_head has a hook that moves its weights"
    del model.lm_head._hf_hook
    model.lm_head.weight.ds_id = 0
    assert decoding_graphs.why_not(model, device) == "lm_head.weight is divided among ranks"
    other = plain.build()
    other.lm_head = other.lm_head.to("meta")
    assert decoding_graphs.why_not(other, device) == "lm_head.weight is on meta, the rollouts on cpu"
    double = plain.build(dtype=torch.float64)
    double.lm_head.__class__ = type("Wrapped", (torch.nn.parallel.DistributedDataParallel,), {})
    assert "lm_head is Wrapped, which talks to other ranks" in decoding_graphs.why_not(double, device)


@pytest.mark.parametrize(
    ("run", "waits"),
    (
        (lambda x: x[x > 0], True),
        (lambda x: x.index_put_((x > 0,), torch.zeros(())), True),
        (lambda x: x.nonzero(), True),
        (lambda x: torch.equal(x, x), True),
        (lambda x: bool(x.sum() > 0), True),
        (lambda x: x.to("meta"), True),
        (lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64)), True),
        (lambda x: x.repeat_interleave(2), False),
        (lambda x: x[torch.tensor([1])], False),
        (lambda x: x.where(x > 0, 0).double(), False),
    ),
)
def test_ops_that_the_host_waits_for(run, waits):
    model = torch.nn.Linear(1, 1)
    with decoding_graphs._modules_of(model) as running, decoding_graphs._Watch(running) as watch:
        run(torch.tensor([1.0, -1.0, 2.0]))
    assert bool(watch.found) == waits
