"""One step of Energy-Based Fine-Tuning: sample, compare in feature space, score. Usable in any training loop."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ebft_kernels import FeatureMatching, StridedLayout, feature_matching
from ebft_kernels._checks import check_tensor
from ebft_kernels.integrations.transformers import router_loss_coefficient, router_losses

from .credit import entropy_penalty, kl_penalty, reward_advantages
from .features import has_adapters
from .quantized import keep_gradients
from .replay import RecordedRollouts, recorded_rollouts, say
from .rollout import before_end, end_tokens, is_end, sample_rollouts
from .scoring import (
    check_batch,
    policy_log_probs,
    prompt_log_probs,
    reference_log_probs,
    rollout_mask,
    rollout_weights,
    scored_prompt_tokens,
)

if TYPE_CHECKING:
    from .config import EBFTOptions
    from .features import FeatureMap, StartingAdapters
    from .verifiers import Verifier


class EBFTStep(NamedTuple):
    """What :func:`ebft_step` returns. What was not computed is None: all but the loss where there are no rollouts.

    Attributes:
        loss: scalar, to be differentiated.
        rollouts: [B, A, n, G] int64, the sampled tokens.
        log_probs: [B, A, n, G], of these tokens under the policy at the sampling temperature, 0 after a rollout's end;
            no gradient.
        match: feature-matching losses, rewards and advantages.
        metrics: scalar tensors without gradient, and Python floats; see :func:`ebft_step`.
        terms: the loss's terms by name, with their coefficients and shares, each to be differentiated as the loss.
        verifier_reward: [B, A, n], what the verifier gave.
    """

    loss: Tensor
    rollouts: Tensor | None
    log_probs: Tensor | None
    match: FeatureMatching | None
    metrics: dict[str, Tensor | float]
    terms: dict[str, Tensor]
    verifier_reward: Tensor | None = None


def ebft_step(
    model: nn.Module,
    feature_network: FeatureMap | None,
    prompt: Tensor,
    layout: StridedLayout,
    config: EBFTOptions,
    *,
    token_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    verifier: Verifier | None = None,
    reference_model: nn.Module | StartingAdapters | None = None,
    shares: Tensor | None = None,
) -> EBFTStep:
    """The whole method for one batch (arXiv:2603.12248); call ``.loss.backward()`` on what comes back.

        loss = rl_coef       * mean_i( - feature_advantage_i  * mean_g log p_T(token_ig) )
             + verifier_coef * mean_i( - verifier_advantage_i * mean_g log p_T(token_ig) )
             + ce_coef       * mean_t( - log p_1(x_t) )
             + kl_coef       * KL of p_T from the reference model   (:func:`ebft_trainer.credit.kl_penalty`)
             - entropy_coef  * entropy of the rollouts under p_T    (:func:`ebft_trainer.credit.entropy_penalty`)
             + the model's coefficient * its load-balancing loss over the prompts' tokens

    over the rollouts i of valid anchors, at the sampling temperature T (1 where sampling is greedy), and over the
    prompt tokens t with a token of their document before them. With a token mask only counted tokens enter the means
    over g and t, and rollouts without any are left out. A term whose coefficient is 0 is not computed and not among the
    metrics; without any term over rollouts none are drawn. The last term is that of mixtures of experts whose config
    has ``output_router_logits``, as transformers adds it.

    Advantages are of one kind of reward each, and are mixed, not the rewards: the baseline of feature matching is not
    that of rewards which do not depend on the other rollouts (:func:`ebft_trainer.credit.reward_advantages`). Where the
    estimator is linear ("rloo", "reinforce") that is the advantage of the mixed reward.

    A rollout ends with the first of the ``eos_token_ids``. What stands after it has no log-probability, no feature and
    no credit. The mean over g still divides by the tokens that count in the rollout's window: dividing by a length that
    was drawn would no longer give the gradient of the expected reward.

    Rollouts are sampled in eval mode. The policy's forward runs through ``model`` itself in the mode that it is in,
    over the prompt and the first G-1 tokens of each rollout: rows that sampling has just run, with the same weights.
    With ``config.replay_rollouts`` it is replayed where that gives the same gradients, and otherwise computed; the log
    says which, and why (:func:`ebft_kernels.integrations.transformers.replay_obstacle`). Features and rewards take no
    gradient.

    Metrics, over the rollouts, and tokens of rollouts, that count:
        ``loss/rl``, ``loss/verifier``, ``loss/ce``, ``loss/kl``, ``loss/entropy``, ``loss/router``: the terms without
            coefficients.
        ``feature_matching_loss``, ``alignment``, ``diversity``, ``reward``: means.
        ``reward_std``: spread of the rewards of one anchor: root of their mean squared distance from their mean.
        ``advantage_std``: standard deviation of the advantages.
        ``verifier_reward``, ``verifier_reward_std``, ``verifier_advantage_std``: the same of the verifier.
        ``duplicate_rate``: fraction of rollouts equal to an earlier one of their anchor.
        ``eos_rate``: fraction of rollouts that ended, where there are tokens that end one.
        ``entropy``: mean of - log p_T of the sampled tokens, an unbiased estimate unless top-k or top-p is used.
        ``log_prob_gap``: mean absolute difference between a token's log-probability when it was sampled and in the
            policy's forward: rounding, and what the model draws in train mode (dropout), which it should not; 0 where
            the forward is replayed and computes none (of a head in 16 bits it does).
        ``valid_anchors``: anchors that count; ``tokens``: of the packed rows, all included.
        ``seconds/rollout``, ``seconds/features``, ``seconds/matching``, ``seconds/verifier``, ``seconds/reference``,
            ``seconds/policy`` (forward and loss): the host's time, which on an accelerator is the time to submit the
            work.

    Args:
        model: a transformers causal language model, wrapped or not.
        feature_network: the frozen network, or another :class:`ebft_trainer.FeatureMap`; None only with
            ``rl_coef = 0``.
        prompt: [B, P] int64.
        layout: of the packed rows, on the prompt's device.
        config: the method's options; geometry and kind of the features are those of layout and feature network, the
            verifier is not looked up.
        token_mask: [B, P] bool, prompt tokens that count (completions); None: all.
        generator: of the rollouts.
        verifier: gives a reward to each rollout (:class:`ebft_trainer.TextVerifier`); None only with
            ``verifier_coef = 0``.
        reference_model: frozen, for ``kl_coef``; it costs its weights and one forward, no logits of all tokens. For a
            PEFT model its :class:`ebft_trainer.StartingAdapters`, or None: the model with its adapters off.
        shares: [2], factors of the terms of ``loss`` over rollouts and over prompt tokens, where several batches make
            one optimizer step: what this batch has of :func:`ebft_trainer.scoring.loss_weights` of them all. None: 1.
            They are in no metric.

    Raises:
        ValueError: no valid anchor, no feature network, verifier or reference where one is needed, a shape or device
            (also of features and rewards) that does not fit, a model that cannot be run strided.
        TypeError: another type or dtype.
    """
    check_batch(prompt, layout, token_mask)
    keep_gradients(model)
    if shares is None:
        shares = torch.ones(2, device=layout.device)
    else:
        check_tensor("shares", shares, "2", {}, device=layout.device)
    if not (config.rl_coef or config.verifier_coef or config.kl_coef or config.entropy_coef):
        return _cross_entropy_step(model, prompt, layout, config, token_mask, shares)
    if not layout.num_valid:
        raise ValueError("layout: expected at least one valid anchor in the batch, got none")
    _check_parts(model, feature_network, verifier, reference_model, config)

    clock = _Clock()
    recorded = recorded_rollouts(model, layout, config)
    drawn = _draw(model, prompt, layout, config, token_mask, generator, recorded)
    if recorded is not None and (obstacle := recorded.forward.obstacle):
        say(model, obstacle)
        recorded = None
    clock.lap("rollout")
    metrics = drawn.metrics()
    advantages: dict[str, Tensor] = {}
    match = rewards = reference = None
    if config.rl_coef:
        match = _matched(feature_network, drawn, config, clock)
        advantages["rl"] = match.advantage
        metrics |= _matching_metrics(match, drawn)
    if config.verifier_coef:
        rewards = _verified(verifier, drawn)
        advantages["verifier"] = reward_advantages(rewards, config.estimator)
        metrics |= _reward_metrics(rewards, advantages["verifier"], drawn, "verifier_")
        clock.lap("verifier")
    temperature = config.temperature or 1.0
    scored = {"temperature": temperature, "vocabulary": config.vocabulary}
    if config.kl_coef:
        reference = reference_log_probs(model, reference_model, prompt, drawn.tokens, layout, **scored)
        clock.lap("reference")
    with router_losses(model) as router:
        log_probs, text_log_probs = policy_log_probs(
            model,
            prompt,
            drawn.tokens,
            layout,
            **scored,
            score_prompt=config.ce_coef != 0,
            recorded=recorded,
        )
    losses = _losses(drawn, log_probs, advantages, reference, config)
    if text_log_probs is not None:
        losses["ce"] = _masked_mean(-text_log_probs, scored_prompt_tokens(layout, token_mask))
    terms = {name: getattr(config, f"{name}_coef") * shares[int(name == "ce")] * term for name, term in losses.items()}
    _add_router_loss(model, router, losses, terms, shares)
    log_probs = drawn.until_end(log_probs.detach())
    metrics |= {f"loss/{name}": term.detach() for name, term in losses.items()}
    metrics["entropy"] = -drawn.mean(log_probs)
    metrics["log_prob_gap"] = drawn.mean((log_probs - drawn.log_probs).abs())
    metrics["tokens"] = float(layout.batch_size * layout.packed_length)
    clock.lap("policy")
    return EBFTStep(sum(terms.values()), drawn.tokens, log_probs, match, metrics | clock.seconds, terms, rewards)


def _losses(
    drawn: _Drawn,
    log_probs: Tensor,
    advantages: dict[str, Tensor],
    reference: Tensor | None,
    config: EBFTOptions,
) -> dict[str, Tensor]:
    """The terms over rollouts by name, each without its coefficient, from log-probabilities [B, A, n, G]."""
    log_probs = drawn.until_end(log_probs)
    losses = {name: -drawn.loss_mean(_per_token(x) * log_probs) for name, x in advantages.items()}
    if reference is not None:
        penalty = kl_penalty(drawn.counted(log_probs), drawn.counted(reference), config.kl_estimator)
        losses["kl"] = drawn.loss_mean(penalty)
    if config.entropy_coef:
        losses["entropy"] = drawn.loss_mean(entropy_penalty(drawn.counted(log_probs)))
    return losses


class _Clock:
    """Seconds between laps, by the name of what was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, name: str) -> None:
        now = perf_counter()
        self.seconds[f"seconds/{name}"] = now - self._last
        self._last = now


class _Drawn(NamedTuple):
    """The rollouts of a batch, and which of their tokens count how much."""

    prompt: Tensor  # [B, P]
    layout: StridedLayout
    token_mask: Tensor | None  # [B, P]
    tokens: Tensor  # [B, A, n, G]
    log_probs: Tensor  # [B, A, n, G]
    alive: Tensor | None  # [B, A, n, G], up to a rollout's end; None: they never end
    ended: Tensor | None  # [B, A, n]
    weights: Tensor  # [B, A, G], see `rollout_weights`

    @property
    def sizes(self) -> dict[str, int]:
        return {"B": self.layout.batch_size, "A": self.layout.num_anchors, "n": self.layout.samples}

    @property
    def masks(self) -> dict[str, Tensor | None]:
        """What a feature map and a verifier are told of tokens that do not count."""
        return {"token_mask": self.token_mask, "rollout_mask": rollout_mask(self.alive, self.layout, self.token_mask)}

    def until_end(self, x: Tensor) -> Tensor:
        """x [B, A, n, G], 0 after the end; what stands there is not read."""
        return x if self.alive is None else x.where(self.alive, 0)

    def counted(self, x: Tensor) -> Tensor:
        """x [B, A, n, G], 0 for every token that does not count."""
        return self.until_end(x).where(self.weights[:, :, None] > 0, 0)

    def loss_mean(self, x: Tensor) -> Tensor:
        """Mean over rollouts of the mean over the window's tokens of x [B, A, n, G], 0 after the end."""
        return _mean(x, self.weights)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of x over rollouts [B, A, n], or over their tokens [B, A, n, G]."""
        if x.ndim == 3:
            return _mean(x[..., None], self.weights)
        if self.alive is None:
            return _mean(x, self.weights)
        share = _mean(self.alive.to(self.weights.dtype), self.weights)
        return _mean(self.until_end(x), self.weights) / share.where(share > 0, 1)

    def metrics(self) -> dict[str, Tensor | float]:
        """Of the tokens alone."""
        found: dict[str, Tensor | float] = {
            "duplicate_rate": self.mean(_duplicates(self.tokens)),
            "valid_anchors": self.weights.any(-1).sum(),
        }
        if self.ended is not None:
            found["eos_rate"] = self.mean(self.ended)
        return found


def _draw(
    model: nn.Module,
    prompt: Tensor,
    layout: StridedLayout,
    config: EBFTOptions,
    token_mask: Tensor | None,
    generator: torch.Generator | None,
    recorded: RecordedRollouts | None,
) -> _Drawn:
    ends = end_tokens(model, config.eos_token_ids)
    tokens, log_probs = sample_rollouts(
        model,
        prompt,
        layout,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        eos_token_ids=ends,
        vocabulary=config.vocabulary,
        generator=generator,
        recorded=recorded,
        cuda_graphs=config.cuda_graphs,
    )
    weights = rollout_weights(layout, token_mask)
    alive = ended = None
    if ends:
        alive = before_end(tokens, ends)
        ended = is_end(tokens[..., -1], ends)  # all after the end are such too
    return _Drawn(prompt, layout, token_mask, tokens, log_probs, alive, ended, weights)


@torch.no_grad()
def _matched(feature_network: FeatureMap, drawn: _Drawn, config: EBFTOptions, clock: _Clock) -> FeatureMatching:
    layout = drawn.layout
    features = feature_network(layout.pack(drawn.prompt, drawn.tokens), layout, **drawn.masks)
    for name, x, shape in zip(("rollout", "target"), features, ("B A n ...", "B A ..."), strict=True):
        check_tensor(f"the feature map's {name} features", x, shape, drawn.sizes, device=layout.device)
    clock.lap("features")
    match = feature_matching(
        *features,
        whitening=config.whitening,
        alignment_coef=config.alignment_coef,
        diversity_coef=config.diversity_coef,
        estimator=config.estimator,
        groups=getattr(feature_network, "groups", 1),
        valid=None if layout.num_valid == layout.valid.numel() else layout.valid,  # a number that the host knows
    )
    clock.lap("matching")
    return match


@torch.no_grad()
def _verified(verifier: Verifier, drawn: _Drawn) -> Tensor:
    rewards = verifier(drawn.prompt, drawn.tokens, drawn.layout, **drawn.masks)
    check_tensor("the verifier's rewards", rewards, "B A n", drawn.sizes, device=drawn.layout.device)
    return rewards.to(drawn.log_probs.dtype).where(drawn.layout.valid[:, :, None], 0)


def _check_parts(
    model: nn.Module,
    feature_network: FeatureMap | None,
    verifier: Verifier | None,
    reference_model: nn.Module | StartingAdapters | None,
    config: EBFTOptions,
) -> None:
    if config.rl_coef and feature_network is None:
        raise ValueError(f"feature_network: expected one with rl_coef = {config.rl_coef}, got None")
    if config.verifier_coef and verifier is None:
        raise ValueError(f"verifier: expected one with verifier_coef = {config.verifier_coef}, got None")
    if config.kl_coef and reference_model is None and not has_adapters(model):
        raise ValueError(
            f"reference_model: expected one with kl_coef = {config.kl_coef} and a model without PEFT adapters, got None"
        )


def _cross_entropy_step(
    model: nn.Module,
    prompt: Tensor,
    layout: StridedLayout,
    config: EBFTOptions,
    token_mask: Tensor | None,
    shares: Tensor,
) -> EBFTStep:
    start = perf_counter()
    options = {"token_mask": token_mask, "vocabulary": config.vocabulary}
    with router_losses(model) as router:
        log_probs, counted = prompt_log_probs(model, prompt, layout, **options)
    losses = {"ce": _masked_mean(-log_probs, counted)}
    terms = {"ce": config.ce_coef * shares[1] * losses["ce"]}
    _add_router_loss(model, router, losses, terms, shares)
    metrics: dict[str, Tensor | float] = {f"loss/{name}": term.detach() for name, term in losses.items()}
    metrics |= {"tokens": float(prompt.numel()), "seconds/policy": perf_counter() - start}
    return EBFTStep(sum(terms.values()), None, None, None, metrics, terms)


def _add_router_loss(
    model: nn.Module, found: list[Tensor], losses: dict[str, Tensor], terms: dict[str, Tensor], shares: Tensor
) -> None:
    """Enter the load-balancing loss of the policy's forward, if there is one, among the losses and the terms."""
    for loss in found:
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                "model: its load-balancing loss has no gradient; gradient checkpointing needs use_reentrant=False for "
                "it; config.output_router_logits = False trains without it"
            )
        losses["router"] = loss
        terms["router"] = router_loss_coefficient(model) * shares[1] * loss


def _matching_metrics(match: FeatureMatching, drawn: _Drawn) -> dict[str, Tensor | float]:
    """Means of what matching found, [B, A, n] (or with a G axis)."""
    loss = match.loss[:, :, None] if match.loss.ndim == 3 else match.loss[:, :, None, None]
    return {
        "feature_matching_loss": _mean(loss, drawn.weights),
        "alignment": drawn.mean(match.alignment),
        "diversity": drawn.mean(match.diversity),
        **_reward_metrics(match.reward, match.advantage, drawn),
    }


def _reward_metrics(reward: Tensor, advantage: Tensor, drawn: _Drawn, prefix: str = "") -> dict[str, Tensor | float]:
    within_anchor = reward - reward.mean(2, keepdim=True)
    over_all = advantage - drawn.mean(advantage)
    return {
        f"{prefix}reward": drawn.mean(reward),
        f"{prefix}reward_std": drawn.mean(within_anchor.square()).sqrt(),
        f"{prefix}advantage_std": drawn.mean(over_all.square()).sqrt(),
    }


def _duplicates(rollouts: Tensor) -> Tensor:
    """[B, A, n] bool: equal to an earlier rollout of the anchor."""
    equal = (rollouts[:, :, :, None] == rollouts[:, :, None]).all(-1)  # [B, A, n, n]
    return equal.tril(-1).any(-1)


def _per_token(x: Tensor) -> Tensor:
    """[B, A, n] -> [B, A, n, 1]; with features per token [B, A, n, G] already."""
    return x if x.ndim == 4 else x[..., None]


def _mean(x: Tensor, weights: Tensor) -> Tensor:
    """Mean of x [B, A, n, G] (1 for a size that does not matter) with the weights [B, A, G] of its tokens."""
    return (x * weights[:, :, None]).sum() / x.shape[2]


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp_min(1)
