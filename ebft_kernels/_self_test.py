"""The cases of the self-test: each op on small inputs that reach its kernels' branches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import attention, logprob, matching, pooling
from .layout import StridedLayout
from .testing import attention_inputs, eager_attention, feature_inputs, randn

#: Named results of an op for some inputs, by one of its implementations.
Results = dict[str, Tensor]


class Case(NamedTuple):
    """One way to call an op.

    Attributes:
        op: its public name. What is no op of its own runs where ``pool_features`` does.
        name: what is special about the call; "" if nothing.
        inputs: makes its differentiable inputs, float32 on the CPU.
        run: calls one implementation with these inputs, in whatever dtype and on whatever device they are by then.
        eager: the same in plain PyTorch in the dtype of the inputs, in the ways that there are; where it is None, the
            reference does everything in that dtype that a fast implementation does in it. That of log-probabilities
            does not: its logits are float32.
        short: also run in 16-bit dtypes.
        sizes: for which an implementation may decline, as for :func:`ebft_kernels.select_impl`.
    """

    op: str
    name: str
    inputs: Callable[[], dict[str, Tensor]]
    run: Callable[[dict[str, Tensor], str], Results]
    eager: tuple[Callable[[dict[str, Tensor]], Results], ...] | None = None
    short: bool = True
    sizes: dict[str, int] | None = None


_STEP = 2


def _random(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed, dtype=torch.float32)


def _with_gradients(outputs: Results, inputs: dict[str, Tensor]) -> Results:
    """``outputs`` and the gradients of a fixed random projection of them with respect to ``inputs``."""
    loss = sum((out * _random(*out.shape, seed=9).to(out)).sum() for out in outputs.values())
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {name: out.detach() for name, out in outputs.items()} | {
        f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)
    }


def _attention_cases(
    layout: StridedLayout, name: str, *, head_dim: int = 64, sinks: bool = False, **options: object
) -> tuple[Case, Case]:
    """The attention of whole rows and one decoding step under the same options."""

    def inputs() -> dict[str, Tensor]:
        tensors = dict(zip("qkv", attention_inputs(layout, head_dim=head_dim), strict=True))
        return tensors | ({"sinks": _random(4, seed=5)} if sinks else {})

    def run(tensors: dict[str, Tensor], impl: str) -> Results:
        out = attention.strided_attention(**tensors, layout=layout.to(tensors["q"].device), impl=impl, **options)
        return _with_gradients({"output": out}, tensors)

    def eager(tensors: dict[str, Tensor], how: str) -> Results:
        out = eager_attention(**tensors, mask=mask(), **scoring, how=how)
        return _with_gradients({"output": out}, tensors)

    def step(tensors: dict[str, Tensor], impl: str) -> Results:
        q, k, v = step_inputs(tensors)
        given = {name: value for name, value in options.items() if name != "block"} | {"sinks": tensors.get("sinks")}
        out = attention.strided_attention_step(q, k, v, layout.to(q.device), _STEP, impl=impl, **given)
        return {"output": out.detach()}

    def eager_step(tensors: dict[str, Tensor], how: str) -> Results:
        rows = layout.step_rows(layout.dense_mask(options.get("window")).transpose(1, 2), _STEP).transpose(1, 2)
        out = eager_attention(*step_inputs(tensors), rows, sinks=tensors.get("sinks"), **scoring, how=how)
        return {"output": out.detach()}

    def step_inputs(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q = layout.to(tensors["q"].device).step_rows(tensors["q"].transpose(1, 2), _STEP).transpose(1, 2)
        return q, tensors["k"], tensors["v"]

    def mask() -> Tensor:
        block = {"block": options["block"]} if "block" in options else {}
        return layout.dense_mask(options.get("window"), **block)

    scoring = {"scale": head_dim**-0.5, "softcap": options.get("softcap")}
    ways = ("normalize first", "normalize last", "recomputed", *(() if options.get("softcap") or sinks else ("fused",)))

    def case(op: str, run: Callable, eager: Callable) -> Case:
        return Case(op, name, inputs, run, tuple(functools.partial(eager, how=how) for how in ways))

    return case("strided_attention", run, eager), case("strided_attention_step", step, eager_step)


def _hidden_inputs(layout: StridedLayout, channels: int) -> Callable[[], dict[str, Tensor]]:
    shape = (layout.batch_size, layout.packed_length, channels)
    return lambda: {f"layer {i}": _random(*shape, seed=i) for i in range(2)}


def _pooling_case(layout: StridedLayout, channels: int, mode: str, normalize: str, masked: bool) -> Case:
    def run(tensors: dict[str, Tensor], impl: str) -> Results:
        hidden = list(tensors.values())
        rows = layout.to(hidden[0].device)
        counted = _random(layout.batch_size, layout.length, seed=3).to(rows.device) > 0 if masked else None
        options = {"pooling": mode, "normalize": normalize, "token_mask": counted, "impl": impl}
        rollouts, targets = pooling.pool_features(hidden, rows, **options)
        return _with_gradients({"rollout features": rollouts, "target features": targets}, tensors)

    name = f"{mode}, {normalize}{', masked' if masked else ''}"
    return Case("pool_features", name, _hidden_inputs(layout, channels), run)


def _features(width: int, samples: int, duplicates: bool = False) -> Callable[[], dict[str, Tensor]]:
    def inputs() -> dict[str, Tensor]:
        features = feature_inputs(2, 9, samples, width, duplicates=duplicates)
        return dict(zip(("rollouts", "targets"), features, strict=True))

    return inputs


def _loss_case(width: int, unbiased: bool) -> Case:
    def run(tensors: dict[str, Tensor], impl: str) -> Results:
        loss = matching.mean_embedding_loss(*tensors.values(), unbiased=unbiased, impl=impl)
        return _with_gradients({"loss": loss}, tensors)

    return Case("mean_embedding_loss", "unbiased" if unbiased else "", _features(width, 4), run)


def _matching_case(width: int, whitening: str, samples: int, estimator: str = "rloo") -> Case:
    duplicates = estimator != "group_norm"  # which divides by the spread of the rewards: of equal rollouts, by rounding

    def run(tensors: dict[str, Tensor], impl: str) -> Results:
        options = {"whitening": whitening, "estimator": estimator, "impl": impl}
        return _matching_results(matching.feature_matching(*tensors.values(), **options))

    inputs = _features(width, samples, duplicates)
    return Case("feature_matching", f"{whitening}, {estimator}, n = {samples}", inputs, run, sizes={"n": samples})


def _matching_results(match: matching.FeatureMatching) -> Results:
    # The diversity is a part of the reward; on its own it is 0 but for rounding, which nothing can be measured by.
    return {name: getattr(match, name) for name in ("loss", "alignment", "reward", "advantage")}


def _log_probs_case(name: str, vocabulary: int, *, several: bool = False, **options: object) -> Case:
    def inputs() -> dict[str, Tensor]:
        return {"hidden": _random(50, 32, seed=0), "weight": _random(vocabulary, 32, seed=1)}

    def run(tensors: dict[str, Tensor], impl: str) -> Results:
        number = torch.arange(50, device=tensors["hidden"].device)
        given = {"temperature": 0.6, "chunk_size": 16, "rows": number * number % 11 if several else None, **options}
        log_probs = logprob.linear_log_probs(*tensors.values(), number * 7919 % vocabulary, impl=impl, **given)
        return _with_gradients({"log-probabilities": log_probs}, tensors)

    def eager(tensors: dict[str, Tensor]) -> Results:
        hidden, weight = tensors.values()
        number = torch.arange(50, device=hidden.device)
        logits = (hidden @ weight.T).float() * options.get("scale", 1.0)  # the product rounds, as it does everywhere
        if softcap := options.get("softcap"):
            logits = softcap * torch.tanh(logits / softcap)
        log_probs = torch.log_softmax(logits / 0.6, -1)[number * number % 11 if several else number]
        log_probs = log_probs.gather(1, (number * 7919 % vocabulary)[:, None])[:, 0]
        return _with_gradients({"log-probabilities": log_probs}, tensors)

    return Case("linear_log_probs", name, inputs, run, (eager,))


def cases(*, large: bool) -> tuple[Case, ...]:
    """All cases: ``large`` ones reach the loops over whole tiles and the splits of a GPU, small ones take no time.

    Rows of a thousand prompt tokens are many tiles, in which a pipeline of three stages is in its steady state.
    """
    short = StridedLayout.strided(1, 29, context=5, stride=4, horizon=4, samples=3)
    long = StridedLayout.strided(2, 523, context=5, stride=17, horizon=4, samples=3) if large else short
    channels, width, vocabulary = (1000, 1000, 5003) if large else (24, 96, 301)
    only_large = ()
    if large:
        steady = StridedLayout.strided(1, 1061, context=5, stride=66, horizon=4, samples=3)
        only_large = (
            *_attention_cases(steady, "long prompt, D = 128", head_dim=128),
            *_attention_cases(steady, "the same in a window", head_dim=128, window=300),
            *_attention_cases(short, "short prompt")[1:],  # a step whose keys are not split
        )
    return (
        *_attention_cases(long, ""),
        *_attention_cases(long, "all options", softcap=1.5, window=6, sinks=True, block="full"),
        *only_large,
        _pooling_case(long, channels, "last_token", "joint", masked=False),
        _pooling_case(short, channels, "mean", "per_layer", masked=True),
        _pooling_case(short, channels, "concat", "joint", masked=True),
        _pooling_case(short, channels, "token", "none", masked=False),
        _loss_case(width, unbiased=False),
        _loss_case(width, unbiased=True),
        _matching_case(width, "none", 1, "reinforce"),
        _matching_case(width, "sample", 4),
        _matching_case(width, "feature", 4, "group_norm"),
        _matching_case(width, "sample", 17),
        _log_probs_case("", vocabulary),
        _log_probs_case("several targets of a row", vocabulary, several=True),
        _log_probs_case("softcap", vocabulary, softcap=5.0, scale=0.5),
    )
