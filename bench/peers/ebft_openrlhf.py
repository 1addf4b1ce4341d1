"""A step by the code of the method's authors, github.com/sjelassi/ebft_openrlhf, from an unmodified checkout.

What runs is theirs: generation of strided blocks, masks and positions, feature network, whitening, rewards, advantages,
policy loss and the training step around it. What is stood in for: ray (a remote call is a call, its result a copy, as
after a trip through ray's object store), deepspeed, vllm and other imports that the step never reaches, their strategy
(backward pass without an optimizer step), and the current CUDA device, which is the CPU. The models are theirs too,
loaded from the weights that everyone else runs with; attention is eager, their default. They draw their own random
numbers, so their rollouts are other rollouts than ours.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ebft_kernels import StridedLayout
from ebft_trainer.config import EBFTOptions

from . import PeerStep

#: Imported by the checkout but not needed by a step.
_STUBBED = ("datatrove", "deepspeed", "flash_attn", "jsonlines", "math_verify", "ray", "torchdata", "vllm")
#: The options that the adapter knows to translate.
_FIXED = {
    "feature_layers": [0.25, 0.5, 0.75],
    "pooling": "last_token",
    "normalize": "joint",
    "whitening": "sample",
    "estimator": "rloo",
    "top_k": 0,
}
_MODULES = {
    "models": "openrlhf.models",
    "actor": "openrlhf.trainer.ray.ebft_actor",
    "critic": "openrlhf.trainer.ray.ebft_critic",
    "experience": "openrlhf.trainer.ppo_utils.ebft_experience_maker",
    "masks": "openrlhf.models.utils",
}


class Peer:
    """The authors' actor, critic and experience maker around copies of ``model``.

    Args:
        directory: the checkout.
        model: a transformers causal language model on the CPU; read only.
        layout: a strided one, rows without padding and in one document.
        options: geometry and coefficients.

    Raises:
        ValueError: ``directory`` holds something else, or an option that cannot be translated.
    """

    def __init__(self, directory: Path, model: nn.Module, layout: StridedLayout, options: EBFTOptions) -> None:
        for name, value in _FIXED.items():
            if getattr(options, name) != value:
                raise ValueError(f"{name}: expected {value!r} with this peer, got {getattr(options, name)!r}")
        if (layout.length - options.horizon - options.context) % options.stride:
            raise ValueError(
                f"layout: expected length - horizon - context to be a multiple of stride = {options.stride} with this "
                f"peer, got {layout.length} - {options.horizon} - {options.context}"
            )
        self._modules = load(directory)
        self._layout, self._options = layout, options
        self._args = _arguments(layout, options)
        self._seconds: dict[str, float] = {}
        wide = {"bf16": model.dtype == torch.bfloat16, "temperature": options.temperature}
        features = {"critic_sequence_level": "last_token", "hidden_state_method": "concat", "gen_len": options.horizon}
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder)
            self.actor = self._modules.models.Actor(folder, **wide)
            self._critic = self._modules.models.Critic(folder, **wide, **features)

    def step(self, prompt: Tensor) -> PeerStep:
        """One step for ``prompt`` [B, P] and its backward pass."""
        batch, anchors, samples = self._layout.batch_size, self._layout.num_anchors, self._layout.samples
        self._seconds = {}
        self.actor.model.zero_grad(set_to_none=True)
        with _cpu_for_cuda():
            generated = self._timed("rollout", lambda: self._generate(prompt))
            matched = self._timed("matching", lambda: self._match(generated))
            self._timed("policy", lambda: self._train(matched))
        self._seconds["matching"] -= self._seconds["features"]
        self._seconds["policy"] -= self._seconds["backward"]
        rollouts = matched[0].full_sequences[:, self._layout.length :]
        rollouts = rollouts.view(batch, samples, self._layout.horizon, anchors).permute(0, 3, 1, 2)
        rewards = matched[0].rewards.view(batch, samples, anchors).transpose(1, 2)
        advantages = matched[0].advantages[:, -anchors:].view(batch, samples, anchors).transpose(1, 2)
        gradient = torch.cat([p.grad.flatten() for p in self.actor.model.parameters()])
        return PeerStep(rollouts, rewards, advantages, gradient, dict(self._seconds))

    def greedy(self, prompt: Tensor) -> Tensor:
        """Its most likely rollouts [B, A, n, G]."""
        with _cpu_for_cuda(), mock.patch.object(self._args, "temperature", 0.0):
            (generated,) = self._generate(prompt)
        tokens = generated.full_sequences[:, self._layout.length :]
        tokens = tokens.view(len(prompt), self._layout.samples, self._layout.horizon, self._layout.num_anchors)
        return tokens.permute(0, 3, 1, 2)

    def mask_and_positions(self) -> tuple[Tensor, Tensor]:
        """What its rows may attend to [P + A*G, P + A*G] bool, and their positions [P + A*G]."""
        layout, options = self._layout, self._options
        size = layout.length + layout.num_anchors * layout.horizon
        mask, positions = self._modules.masks.build_strided_attention_mask_and_positions(
            full_sequence_length=size,
            prompt_length=layout.length,
            context_length=options.context,
            generation_step=layout.horizon,
            max_generation_length=layout.horizon,
            stride=options.stride,
            num_blocks=layout.num_anchors,
            device=torch.device("cpu"),
            doc_ids=torch.zeros(1, layout.length, dtype=torch.long),
        )
        return mask[0, 0] == 0, positions[0]

    def _generate(self, prompt: Tensor) -> list[Any]:
        """Their samples, repeated prompts and all."""
        worker = SimpleNamespace(actor=self.actor, args=self._args)
        generate = self._modules.actor.EBFTPolicyModelActor.generate_strided_blocks
        handler = SimpleNamespace(generate_strided_blocks=_Remote(lambda **options: generate(worker, **options)))
        strategy, group = SimpleNamespace(args=self._args), SimpleNamespace(_actor_handlers=[handler])
        samples = self._modules.experience.SamplesGenerator(group, strategy, tokenizer=None)
        documents, counted = torch.zeros_like(prompt), torch.ones_like(prompt, dtype=torch.bool)
        return samples.generate_samples(list(prompt), list(documents), list(counted))

    def _match(self, generated: list[Any]) -> list[Any]:
        """Features, rewards and advantages by their experience maker."""
        worker = SimpleNamespace(critic=self._critic, ema_model=None)
        forward = self._modules.critic.EBFTCriticModelActor.forward

        def run(method_name: str, **lists: list[Any]) -> list[list[Any]]:
            assert method_name == "forward"
            calls = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
            return [self._timed("features", lambda: [forward(worker, **call) for call in calls])]

        group = SimpleNamespace(async_run_method_batch=run)
        strategy = SimpleNamespace(args=self._args)
        maker = self._modules.experience.RemoteExperienceMaker(None, group, None, None, None, strategy)
        return maker.compute_advantages_and_returns(maker.make_experience(maker.assign_sample_indices(generated)))

    def _train(self, matched: list[Any]) -> None:
        """Their training step; the gradients stay."""
        strategy = SimpleNamespace(
            args=self._args,
            ring_attn_group=None,
            backward=lambda loss, _model, _optimizer: self._timed("backward", loss.backward),
            optimizer_step=lambda *_args, **_options: None,
        )
        trainer = SimpleNamespace(
            strategy=strategy,
            args=self._args,
            actor=self.actor,
            actor_optim=None,
            actor_scheduler=SimpleNamespace(get_last_lr=lambda: [0.0]),
            actor_loss_fn=self._modules.models.EBFTPolicyLoss(policy_loss_type="ppo"),
            aux_loss=False,
        )
        step = self._modules.actor.ActorEBFTTrainer.training_step
        for count, experience in enumerate(matched):
            step(trainer, experience, self._options.rl_coef, self._options.ce_coef, 0.0, count)

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
        return result


def load(directory: Path) -> SimpleNamespace:
    """The checkout's modules, by the names in ``_MODULES``. Nothing of the stand-ins stays importable.

    Raises:
        ValueError: a file that the adapter needs is not there, or the package is imported from elsewhere already.
    """
    for module in _MODULES.values():
        path = directory / Path(*module.split("."))
        if not path.with_suffix(".py").is_file() and not (path / "__init__.py").is_file():
            raise ValueError(
                f"--peer: expected a checkout of sjelassi/ebft_openrlhf in {str(directory)!r}, but it has no {module}"
            )
    known = sys.modules.get("openrlhf")
    if known is not None and Path(known.__path__[0]).resolve() != (directory / "openrlhf").resolve():
        raise ValueError(f"--peer: expected one checkout in a process, but openrlhf is {known.__path__[0]} already")
    import peft  # noqa: F401 (with transformers, it looks for some of what is stood in for: not after this)
    import transformers.integrations.deepspeed  # noqa: F401

    # What is the standard output now is where it will log its progress.
    with _standing_in(directory), contextlib.redirect_stdout(sys.stderr):
        return SimpleNamespace(**{name: importlib.import_module(module) for name, module in _MODULES.items()})


@contextlib.contextmanager
def _standing_in(directory: Path) -> Iterator[None]:
    """Imports come from the checkout, and those of ``_STUBBED`` from nowhere."""
    finder = _Finder()
    sys.path.insert(0, str(directory))
    sys.meta_path.insert(0, finder)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in _STUBBED}
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.path.remove(str(directory))
        for name in [name for name in sys.modules if name.split(".")[0] in _STUBBED]:
            del sys.modules[name]
        sys.modules.update(hidden)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules that are stood in for."""

    def find_spec(self, name: str, _path: Any, _target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in _STUBBED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Ray(spec.name) if spec.name == "ray" else _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class _Stub(ModuleType):
    """Whatever name is asked for is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Ray(_Stub):
    """The part of ray that a step calls: everything is done at once, in this process."""

    @staticmethod
    def remote(*decorated: type, **_options: Any) -> Any:
        return decorated[0] if decorated else lambda cls: cls

    @staticmethod
    def get(result: Any) -> Any:
        return result

    put = get

    @staticmethod
    def wait(pending: list[Any], **_options: Any) -> tuple[list[Any], list[Any]]:
        return pending[:1], pending[1:]


class _Remote:
    """A method of a remote actor."""

    def __init__(self, method: Callable[..., Tensor]) -> None:
        self._method = method

    def remote(self, **options: Any) -> Tensor:
        return self._method(**options).clone()


@contextlib.contextmanager
def _cpu_for_cuda() -> Iterator[None]:
    with mock.patch("torch.cuda.current_device", lambda: torch.device("cpu")):
        yield


def _arguments(layout: StridedLayout, options: EBFTOptions) -> SimpleNamespace:
    """Their command line's settings for the step: one micro-batch, no KL term, no documents, everything counted."""
    return SimpleNamespace(
        context_max_len=options.context,
        stride=options.stride,
        generate_max_len=options.horizon,
        prompt_max_len=layout.length,
        n_samples_per_prompt=options.samples,
        micro_rollout_batch_size=layout.batch_size * options.samples,
        temperature=options.temperature,
        top_p=options.top_p,
        hidden_state_method="concat",
        embed_method="last_token",
        use_whitening=True,
        alignment_rew_coef=options.alignment_coef,
        diversity_rew_coef=options.diversity_coef,
        advantage_estimator=options.estimator,
        gamma=1.0,
        document_masking=False,
        qa_masking=False,
        use_kl_loss=False,
        entropy_loss_coef=None,
        use_dynamic_batch=False,
        colocate_all_models=False,
        colocate_actor_ref=False,
        ring_attn_size=1,
        ds_tensor_parallel_size=1,
        remote_rm_url=None,
    )
