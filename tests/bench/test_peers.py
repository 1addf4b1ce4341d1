"""Peers: the adapter against a small checkout that the test writes, and what is said of a wrong one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from bench import peers, step
from bench.peers import ebft_openrlhf
from bench.peers.agreement import disagreements
from bench.shapes import Geometry, ModelShape

SHAPE = ModelShape("small", 24, 40, 4, 4, 2, 8, 97)

#: A checkout with the names of the authors' and the numbers of the published algorithm as the benchmark has it.
FILES = {
    "openrlhf/__init__.py": "",
    "openrlhf/models/__init__.py": """
        import deepspeed
        import torch
        from transformers import AutoModelForCausalLM

        class Actor:
            def __init__(self, folder, bf16, temperature):
                self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

        class Critic(Actor):
            def __init__(self, folder, bf16, temperature, critic_sequence_level, hidden_state_method, gen_len):
                assert (critic_sequence_level, hidden_state_method) == ("last_token", "concat")
                super().__init__(folder, bf16, temperature)

        class EBFTPolicyLoss:
            def __init__(self, policy_loss_type):
                assert policy_loss_type == "ppo"
    """,
    "openrlhf/models/utils.py": """
        import torch
        from bench.baselines.published import dense_mask

        def build_strided_attention_mask_and_positions(
            full_sequence_length, prompt_length, context_length, generation_step, max_generation_length, stride,
            num_blocks, device, doc_ids,
        ):
            anchors = [context_length + b * stride for b in range(num_blocks)]
            visible = dense_mask(anchors, prompt_length, generation_step)
            mask = torch.zeros(visible.shape).masked_fill(~visible, -1e9)[None, None]
            positions = [*range(prompt_length), *(a + g for g in range(generation_step) for a in anchors)]
            return mask, torch.tensor(positions)[None]
    """,
    "openrlhf/trainer/__init__.py": "",
    "openrlhf/trainer/ray/__init__.py": "from vllm import LLM",
    "openrlhf/trainer/ray/ebft_actor.py": """
        import ray
        import torch
        from bench.baselines import published
        from ebft_kernels import StridedLayout

        def layout_of(prompts, args):
            return StridedLayout.strided(
                len(prompts) // args.n_samples_per_prompt, prompts.shape[1], context=args.context_max_len,
                stride=args.stride, horizon=args.generate_max_len, samples=args.n_samples_per_prompt,
            )

        @ray.remote(num_gpus=1)
        class EBFTPolicyModelActor:
            def generate_strided_blocks(
                self, prompt_token_ids, doc_ids, stride, context_length, generate_length, temperature, top_p,
                document_masking,
            ):
                assert torch.cuda.current_device() == torch.device("cpu")
                rows, layout = prompt_token_ids, layout_of(prompt_token_ids, self.args)
                with torch.inference_mode():
                    prompts = rows[:: layout.samples]
                    temperature = temperature or 1e-6
                    return published._generate(self.actor.model, prompts, layout, temperature, None)

        class ActorEBFTTrainer:
            def training_step(self, experience, rl, ce, kl, step):
                layout = layout_of(experience.prompts, self.args)
                sequences = experience.full_sequences
                log_probs, text = published._log_probs(self.actor.model, sequences, layout, self.args.temperature)
                loss = -rl * (experience.match.advantage[..., None] * log_probs).mean() - ce * text.mean()
                self.strategy.backward(loss, self.actor, self.actor_optim)
                self.strategy.optimizer_step(self.actor_optim, self.actor, self.actor_scheduler, name="actor")
    """,
    "openrlhf/trainer/ray/ebft_critic.py": """
        import ray
        import torch
        from bench.baselines import published

        @ray.remote(num_gpus=1)
        class EBFTCriticModelActor:
            @torch.no_grad()
            def forward(self, sequences, layout, options):
                return published._features(self.critic.model, sequences, layout, options)
    """,
    "openrlhf/trainer/ppo_utils/__init__.py": "",
    "openrlhf/trainer/ppo_utils/ebft_experience_maker.py": """
        from types import SimpleNamespace

        import ray
        import torch
        from bench.baselines.features import match_by_batched_svd
        from ebft_trainer.config import EBFTOptions
        from ..ray.ebft_actor import layout_of

        class SamplesGenerator:
            def __init__(self, group, strategy, tokenizer):
                self.group, self.args = group, strategy.args

            def generate_samples(self, prompts, documents, masks):
                rows, args = torch.stack(prompts).repeat_interleave(self.args.n_samples_per_prompt, 0), self.args
                reference = self.group._actor_handlers[0].generate_strided_blocks.remote(
                    prompt_token_ids=rows, doc_ids=None, stride=args.stride, context_length=args.context_max_len,
                    generate_length=args.generate_max_len, temperature=args.temperature, top_p=args.top_p,
                    document_masking=args.document_masking,
                )
                (ready,), pending = ray.wait([reference], num_returns=1)
                return [SimpleNamespace(prompts=rows, full_sequences=ray.get(ready))]

        class RemoteExperienceMaker:
            def __init__(self, actors, critics, rewards, initial, kl_controller, strategy):
                self.critics, self.args = critics, strategy.args

            def assign_sample_indices(self, samples):
                return samples

            def make_experience(self, samples):
                (sample,), layout = samples, layout_of(samples[0].prompts, self.args)
                results = ray.get(self.critics.async_run_method_batch(
                    method_name="forward", sequences=[sample.full_sequences], layout=[layout],
                    options=[EBFTOptions(samples=layout.samples)],
                ))
                sample.match = match_by_batched_svd(*results[0][0])
                sample.rewards = sample.match.reward.transpose(1, 2).flatten(0, 1)
                return samples

            def compute_advantages_and_returns(self, samples):
                (sample,) = samples
                sample.advantages = sample.match.advantage.transpose(1, 2).flatten(0, 1)
                return samples
    """,
}


@pytest.fixture
def checkout(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.splitlines()
        path.write_text("\n".join(line[8:] if line.startswith(" " * 8) else line for line in lines) + "\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "openrlhf"]:
        del sys.modules[name]


@pytest.fixture
def setup(checkout):
    return step.Setup(SHAPE, Geometry(batch=2, length=72), torch.float32, {"ebft_openrlhf": checkout})


def test_a_peer_agrees_and_is_timed_beside_the_others(setup):
    setup.check_peers()
    before = [p.clone() for p in setup.model.parameters()]
    seconds = setup.time([step.OURS, "ebft_openrlhf"], rounds=1)
    phases = seconds["ebft_openrlhf"]
    assert set(phases) == set(step.PHASES) and min(phases.values()) > 0
    assert all(torch.equal(x, y) for x, y in zip(before, setup.model.parameters(), strict=True))
    assert setup.peak_bytes("ebft_openrlhf") >= 0
    assert not [name for name, module in sys.modules.items() if isinstance(module, ebft_openrlhf._Stub)]


def test_every_difference_is_told(setup, monkeypatch):
    peer = ebft_openrlhf.Peer

    class Other(peer):
        def mask_and_positions(self):
            mask, positions = super().mask_and_positions()
            return mask.logical_not(), positions + 1

        def greedy(self, prompt):
            return super().greedy(prompt) + 1

        def step(self, prompt):
            made = super().step(prompt)
            return made._replace(rewards=made.rewards + 1e-3, gradient=made.gradient * 1.001)

    monkeypatch.setattr(ebft_openrlhf, "Peer", Other)
    with pytest.raises(RuntimeError, match="ebft_openrlhf: attention masks differ; positions differ; .* greedy tokens"):
        setup.check_peers()
    found = disagreements(
        lambda *made: Other(setup._checkouts["ebft_openrlhf"], *made),
        setup.model,
        setup.prompt,
        setup.layout,
        setup.options,
    )
    assert [text.split(":")[0] for text in found[3:]] == ["rewards of the peer", "gradients of the peer"]


@pytest.mark.parametrize("argument", ["ebft_openrlhf", "someone=.", "=."])
def test_a_peer_must_be_named(argument):
    with pytest.raises(ValueError, match=r"--peer: expected NAME=DIR with NAME one of ebft_openrlhf; got"):
        peers.parse(argument)


def test_a_checkout_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        peers.parse(f"ebft_openrlhf={tmp_path / 'nothing'}")
    assert peers.parse(f"ebft_openrlhf={tmp_path}") == ("ebft_openrlhf", tmp_path)
    with pytest.raises(ValueError, match="expected a checkout of sjelassi/ebft_openrlhf .* has no openrlhf.models"):
        ebft_openrlhf.load(tmp_path)


def test_only_one_checkout_in_a_process(checkout, tmp_path_factory):
    ebft_openrlhf.load(checkout)
    other = tmp_path_factory.mktemp("other")
    for name in FILES:
        path = other / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    with pytest.raises(ValueError, match="expected one checkout in a process"):
        ebft_openrlhf.load(other)


@pytest.mark.parametrize(("name", "value"), [("whitening", "feature"), ("estimator", "reinforce"), ("pooling", "mean")])
def test_options_that_it_cannot_translate(setup, name, value):
    options = step.EBFTOptions(**{name: value})
    with pytest.raises(ValueError, match=f"{name}: expected .* with this peer, got '{value}'"):
        ebft_openrlhf.Peer(Path("."), setup.model, setup.layout, options)


def test_a_remainder_that_it_refuses(setup):
    with pytest.raises(ValueError, match="layout: expected length - horizon - context to be a multiple of stride"):
        ebft_openrlhf.Peer(Path("."), setup.model, Geometry(length=75).layout(), setup.options)
