"""`EBFTTrainer`: Energy-Based Fine-Tuning inside `transformers.Trainer`."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import has_length, speed_metrics

from ebft_kernels.integrations.transformers import check_length, evaluation_mode, facts

from .calibration import BINS, calibration_error, calibration_sums
from .card import model_card, write_card
from .checkpoint import check_writable
from .completions import Anchor, Completions, CompletionsFile, print_table, send
from .config import EBFTConfig
from .evaluate import evaluation_metrics, evaluation_sums
from .feature_maps import build_feature_map
from .features import FeatureMap, FeatureNetwork, has_adapters
from .metrics import MetricSums
from .monitor import CollapseWarning, gradient_norms
from .precision import WeightsMoved, check_dtypes
from .recovery import RecoveringTrainer
from .scoring import loss_weights
from .set_up import check_frozen, check_rows, checked_collator, checked_model, frozen_reference
from .step import EBFTStep, ebft_step
from .tokens import agreed_options, masked_token_ids
from .verifiers import Verifier, load_verifier

logger = logging.getLogger(__name__)

#: Seconds that an evaluation may go on for after its first batch without a word.
LONG_EVALUATION = 30.0


class EBFTTrainer(RecoveringTrainer):
    """`transformers.Trainer` with the loss of EBFT (arXiv:2603.12248).

    Overrides how a loss is computed, what is logged, evaluation, and how a checkpoint is written; gradient
    accumulation, schedulers, mixed precision and distributed training are those of transformers and accelerate.

    The frozen feature network is made from the model **as given here**. To resume a run, start from the same initial
    model (`train(resume_from_checkpoint=...)` loads the trained weights afterwards); to evaluate a trained model, pass
    the `feature_network` that it was trained with.

    The two terms of the loss are means over all rollouts and tokens of an optimizer step, whatever micro-batch or rank
    they are in: accumulating four batches of one row, or two ranks with two rows each, is the same as one batch of
    four, also where their numbers of anchors differ.

    A step whose loss or gradient is not finite leaves the weights as they are, while the schedule of the learning rate,
    which ends with the last step, goes on. Such steps are counted in the log as
    ``nonfinite_steps`` and are in no other number of it; after ``args.max_nonfinite_steps`` in a row the run saves its
    state and ends with an error. With fp16 the gradient scaler judges the gradients; under DeepSpeed, which cannot
    skip a step, a loss that is not finite ends the run at once.

    A checkpoint appears under its name when it is complete, so that a process may be killed at any moment.

    Each step's randomness comes from the seed, the step, the micro-batch and the rank alone, so that a run that was
    interrupted and resumed samples the same rollouts as one that was not.
    """

    # `compute_loss` returns a share of the whole step's mean; transformers is not to divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: EBFTConfig,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        feature_network: FeatureMap | None = None,
        verifier: Verifier | None = None,
        reference_model: nn.Module | None = None,
        processing_class: Any = None,
        data_collator: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        """Check the model and every row of the data, then make the feature network.

        Args:
            model: a causal language model of transformers, with PEFT adapters or without.
            args: method and training options.
            train_dataset: rows with ``input_ids`` and optionally ``attention_mask``, ``completion_mask``,
                ``document_ids``; a list, or any dataset. All rows are read once here, unless they have no length.
            eval_dataset: the same, or a dict of several; must have a length.
            feature_network: what to compare in; default: what ``args`` say, usually a frozen copy of ``model`` as it is
                now (with PEFT: the model without adapters).
            verifier: gives a reward to each rollout; default: ``args.verifier`` on text decoded by
                ``processing_class``. Without ``verifier_coef`` it is only measured, in evaluation.
            reference_model: frozen, for ``args.kl_coef``; default: ``model`` as it is now, a whole copy that the
                feature network then shares; with PEFT a copy of what is trained alone, or with ``args.kl_reference =
                "base"`` the model without adapters.
            processing_class: the tokenizer, saved with each checkpoint; its padding token fills batches.
            data_collator: default: `EBFTCollator`. Another one returns ``input_ids`` and ``layout``, the
                `StridedLayout` of the batch, and optionally ``completion_mask``: it decides where anchors stand.
            callbacks: as for `Trainer`.
            optimizers: as for `Trainer`.

        Raises:
            ValueError: the model cannot be run on strided rows, at the length of the longest or at all, or is another
                one in train mode (dropout); it has nothing to train, merged adapters or a load-balancing loss that it
                does not give; ZeRO-3 has spread its weights already, or its 4-bit weights are packed for inference; a
                token that rollouts, padding or rows need has no row in its embedding or head; a row has no room for a
                rollout, or more positions than the model; what is to be frozen shares weights that are trained; one
                process is to drive several devices; accelerate would not shard.
            TypeError: ``args`` is not an `EBFTConfig`.
            CheckpointError: nothing can be written to ``args.output_dir``.
        """
        if not isinstance(args, EBFTConfig):
            raise TypeError(f"args: expected an EBFTConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"args: expected one device per process, got {args.n_gpu}; start with torchrun or accelerate"
            )
        training = train_dataset is not None
        model = checked_model(model, args, training=training)
        self.options = agreed_options(model, processing_class, args)
        # Of the first log line.
        self._once = {"masked_token_ids": masked} if (masked := masked_token_ids(model, self.options)) else {}
        self._said = False
        collator = checked_collator(data_collator, model, processing_class, args, self.options.vocabulary)
        eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        datasets = {"train_dataset": train_dataset, **eval_datasets}
        longest = max(check_rows(name, dataset, collator) for name, dataset in datasets.items())
        if args.log_completions and processing_class is None:
            raise ValueError("processing_class: expected the tokenizer that log_completions decodes with, got None")
        if verifier is None and args.verifier is not None:
            verifier = load_verifier(args.verifier, processing_class)
        if args.verifier_coef and verifier is None:
            raise ValueError(f"verifier: expected one with verifier_coef = {args.verifier_coef}, got None")
        if training:
            check_frozen(model, feature_network, reference_model)
        reference = frozen_reference(model, args, reference_model)
        frozen = reference if reference_model is None and isinstance(reference, nn.Module) else None
        if feature_network is None and (args.rl_coef > 0 or eval_dataset is not None):
            feature_network = build_feature_map(
                model if frozen is None else frozen, processing_class, args, share=frozen is not None
            )
        if args.should_save:
            check_writable(args.output_dir)
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if use_cache is not None and not args.use_cache:
            # transformers would leave it off in what is saved; forwards are told each time.
            self.model.config.use_cache = use_cache
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(f"fsdp: accelerate does not shard on {args.device}; it needs an accelerator per process")
        if args.grad_norm_terms and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("grad_norm_terms: expected False with FSDP or DeepSpeed, whose gradients are sharded")
        if training:
            check_dtypes(self.model, fp16=args.fp16, masters=self.is_deepspeed_enabled)
        self.feature_network = feature_network
        if isinstance(feature_network, nn.Module):
            self.feature_network = feature_network.to(args.device)
        if args.shard_feature_network and feature_network is not None:
            if not isinstance(feature_network, FeatureNetwork):
                kind = type(feature_network).__name__
                raise ValueError(f"shard_feature_network: expected a FeatureNetwork to shard, got {kind}")
            feature_network.shard()
        self.verifier = verifier
        self.reference_model = reference
        if isinstance(reference, nn.Module):
            self.reference_model = _UnderAutocast(reference.to(args.device), self.accelerator)
        self._reference_is_given = reference_model is not None
        # Of the longest prompt, where it is known; None: checked.
        self._length_to_check: int | None = min(longest, facts(model).positions or longest)
        if longest and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._check_length()
        # What releases that do not know `loss_is_scaled_for_ga` go by.
        self.model_accepts_loss_kwargs = True
        self._step_and_micro_batch = (-1, -1)
        self.add_callback(CollapseWarning)
        self._completions = CompletionsFile(args.output_dir)
        self._weights_moved = WeightsMoved()
        self.add_callback(self._weights_moved)

    def _check_length(self, length: int = 0) -> None:
        """Once, at the length that is trained: on the device, and where ranks share the weights when all are there."""
        length, self._length_to_check = self._length_to_check or length, None
        check_length(self.model_wrapped, length).require()
        if self._reference_is_given:
            check_length(self.reference_model, length).require()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one optimizer step, and what they weigh: see `loss_weights`, summed over all ranks."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # A finished run was resumed; transformers would train one more step.
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        return batches, self.accelerator.reduce(sum(_weights(batch).to(device) for batch in batches), "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """What one micro-batch adds to the loss of an optimizer step that weighs ``num_items_in_batch`` (None: itself).

        Times the number of ranks, over which the gradients are averaged.
        """
        layout = inputs["layout"]
        if not layout.num_valid:
            raise ValueError("layout: expected at least one valid anchor in the batch, got none")
        self._say_what_holds()
        if self._length_to_check is not None:
            lengths = self.accelerator.gather(torch.tensor([layout.length], device=self.args.device))
            self._check_length(int(lengths.max()))
        step, micro_batch = self._step_and_micro_batch
        micro_batch = micro_batch + 1 if step == self.state.global_step else 0
        self._step_and_micro_batch = (self.state.global_step, micro_batch)
        self._metrics.start(new_step=micro_batch == 0)
        layout = layout.to(inputs["input_ids"].device)
        weights = loss_weights(layout, inputs.get("completion_mask"))
        if num_items_in_batch is None:
            shares = torch.ones_like(weights)
        else:
            shares = self.accelerator.num_processes * weights / num_items_in_batch.clamp_min(1)
        result = ebft_step(
            model,
            self.feature_network,
            inputs["input_ids"],
            layout,
            self.options,
            token_mask=inputs.get("completion_mask"),
            generator=self._generator(self.args.seed, "train", self.state.global_step, micro_batch),
            shares=shares,
            verifier=self.verifier,
            reference_model=self.reference_model,
        )
        norms = self._gradient_norms(model, result, micro_batch)
        self._metrics.add({**result.metrics, **norms, "loss": result.loss}, weights)
        loss = result.loss.detach()
        self._losses.append(loss)
        # The step is skipped; transformers' running sum of losses is not to be NaN from here on.
        loss = result.loss.where(loss.isfinite(), 0.0)
        return (loss, {"step": result}) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; beside the weights stands a model card, unless this is a checkpoint's."""
        super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero() and not _internal_call:
            write_card(output_dir or self.args.output_dir, self._card())

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write README.md into ``args.output_dir``: objective, data, options, metrics. `push_to_hub` calls it.

        Args:
            language, license, tags, tasks, dataset_tags, dataset_args: lines of the card's head, if given.
            model_name: default: the folder's name.
            finetuned_from: default: what the model was loaded from.
            dataset: what it was trained on.
        """
        head = {
            "language": language,
            "license": license,
            "tags": tags,
            "pipeline_tag": tasks,
            "datasets": dataset_tags,
            "dataset_args": dataset_args,
        }
        head = {name: value for name, value in head.items() if value}
        if self.is_world_process_zero():
            write_card(self.args.output_dir, self._card(model_name, finetuned_from, dataset, head))

    def _card(
        self,
        name: str | None = None,
        base: str | None = None,
        dataset: str | list[str] | None = None,
        head: dict[str, Any] | None = None,
    ) -> str:
        evaluations = [line for line in self.state.log_history if "eval_loss" in line]
        return model_card(
            name or Path(self.args.output_dir).resolve().name,
            self.args,
            base_model=base or getattr(self.model.config, "name_or_path", ""),
            library="peft" if has_adapters(self.model) else "transformers",
            datasets=[dataset] if isinstance(dataset, str) else dataset or (),
            evaluations=evaluations if len(evaluations) < 2 else [evaluations[0], evaluations[-1]],
            steps=self.state.global_step,
            parameters=head,
        )

    def _gradient_norms(self, model: nn.Module, result: EBFTStep, micro_batch: int) -> dict[str, Tensor]:
        """Of each term on the first micro-batch of a step that is logged, if asked for."""
        step = self.state.global_step + 1
        logged = step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)
        if not self.args.grad_norm_terms or micro_batch or not logged:
            return {}
        return gradient_norms(result.terms, [x for x in model.parameters() if x.requires_grad])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means, since the last training log, of every metric of `ebft_step`, and two speeds.

        ``loss`` is the mean over the steps that were taken, NaN if all were skipped.
        """
        if "loss" in logs:
            logs = {**logs, **self._metrics.means(self.accelerator), **self._weights_moved.take(), **self._once}
            self._once = {}
            self._metrics = MetricSums()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on ``args.eval_rows`` rows: the same rows and the same random numbers at every call.

        Returns:
            ``eval_cross_entropy`` (nats per token; also as ``eval_loss``), ``eval_perplexity``,
            ``eval_calibration_error`` (`calibration_error`), and for rollouts of the trained horizon
            ``eval_rollout_entropy``, ``eval_entropy_gap``, ``eval_log_prob_gap``, ``eval_feature_matching_loss`` and
            ``eval_alignment`` (`evaluation_metrics`); the last two also per horizon 1..G, named ``eval_alignment_h1``
            and so on; with a verifier ``eval_verifier_reward``.

        Raises:
            ValueError: there is no dataset, or it has no length or no rows.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {key: value for part in parts for key, value in part.items()}
        if dataset is None or not has_length(dataset) or len(dataset) == 0:
            raise ValueError(f"eval_dataset: expected rows with a length above 0, got {type(dataset).__name__}")
        if self.feature_network is None:
            raise ValueError(
                "feature_network: expected one, got None: pass it, or eval_dataset, to the trainer's set-up"
            )
        started = time.perf_counter()
        wall_clock = time.time()
        rows = _chosen_rows(len(dataset), self.args.eval_rows, self.args.eval_seed)
        self._say_what_holds()
        if self.is_world_process_zero():
            logger.info("evaluation: %d of %d rows (eval_rows)", len(rows), len(dataset))
        shown = None
        if self.args.log_completions and self.is_world_process_zero():
            shown = Completions(self.processing_class, self.options)
        sums = self._evaluation_sums(dataset, rows, shown)
        metrics = evaluation_metrics(sums[: -3 * BINS], self.args.horizon)
        metrics["calibration_error"] = calibration_error(sums[-3 * BINS :])
        metrics["loss"] = metrics["cross_entropy"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics.update(speed_metrics(metric_key_prefix, wall_clock, num_samples=len(rows)))
        self.log(metrics)
        if shown is not None:
            self._log_completions(shown.anchors(), metric_key_prefix)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._metrics.leave_out(time.perf_counter() - started)
        return metrics

    def _log_completions(self, anchors: list[Anchor], name: str) -> None:
        step = self.state.global_step
        print_table(anchors, f"step {step}, {name}")
        self._completions.write(anchors, name, step)
        reported = {"report_to": self.args.report_to, "callbacks": self.callback_handler.callbacks}
        send(anchors, f"{name}/completions", step, **reported)

    def _evaluation_sums(self, dataset: Any, rows: Sequence[int], shown: Completions | None = None) -> Tensor:
        """The summed statistics of ``rows``; batches go to the ranks in turn, each rank runs equally many."""
        size, ranks = self.args.eval_batch_size, self.accelerator.num_processes
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        mine = range(self.accelerator.process_index, -(-len(batches) // ranks) * ranks, ranks)
        self.callback_handler.eval_dataloader = mine
        sums = []
        # The model is not prepared for evaluation alone: accelerate would take it for prepared when training starts.
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and not self.accelerator._models:
            raise ValueError("evaluate: with FSDP or DeepSpeed it runs from training only; set eval_on_start=True")
        started = time.perf_counter()
        with evaluation_mode(self.model_wrapped), self.accelerator.autocast():
            for number in mine:
                batch = self.data_collator([dataset[i] for i in batches[number % len(batches)]])
                batch = {name: value.to(self.args.device) for name, value in batch.items()}
                generator = self._generator(self.args.eval_seed, "eval", number)
                result = evaluation_sums(
                    self.model_wrapped,
                    self.feature_network,
                    batch,
                    self.options,
                    generator=generator,
                    verifier=self.verifier,
                    completions=shown,
                )
                calibration = calibration_sums(
                    self.model_wrapped,
                    batch["input_ids"],
                    batch["layout"],
                    token_mask=batch.get("completion_mask"),
                    vocabulary=self.options.vocabulary,
                )
                result = torch.cat([result, calibration])
                sums.append(result if number < len(batches) else torch.zeros_like(result))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
                if len(sums) == 1:
                    self._say_duration(len(rows), len(mine), time.perf_counter() - started)
        return self.accelerator.reduce(torch.stack(sums).cpu().double().sum(0).to(self.args.device))

    def _say_what_holds(self) -> None:
        """Once, before anything is computed: what model and tokenizer were found to agree on."""
        if self._said or not self.is_world_process_zero():
            return
        self._said = True
        logger.info("rollouts end with the tokens %s", self.options.eos_token_ids or "(none)")
        if masked := self._once.get("masked_token_ids"):
            first = self.options.vocabulary
            logger.info("%d rows of the head, from id %d on, are neither sampled nor scored", masked, first)

    def _say_duration(self, rows: int, batches: int, first: float) -> None:
        """After the first batch, if there is a wait to come."""
        if self.is_world_process_zero() and first * (batches - 1) >= LONG_EVALUATION:
            logger.warning(
                "evaluation: %d rows in %d batches of %.0f seconds, about %.1f minutes in all; eval_rows (--eval-rows) "
                "makes it shorter",
                *(rows, batches, first, first * batches / 60),
            )

    def _generator(self, seed: int, *parts: str | int) -> torch.Generator:
        key = (seed, *parts) if parts[0] == "eval" else (seed, *parts, self.args.process_index)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        return torch.Generator(self.args.device).manual_seed(int.from_bytes(digest, "big", signed=True))


class _UnderAutocast(nn.Module):
    """The reference model in the policy's precision: rounding that both share does not count as divergence."""

    def __init__(self, module: nn.Module, accelerator: Any) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self._autocast = accelerator.autocast

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._autocast():
            return self.module(*args, **kwargs)


def _weights(batch: dict[str, Any]) -> Tensor:
    return loss_weights(batch["layout"].to(batch["input_ids"].device), batch.get("completion_mask"))


def _chosen_rows(count: int, wanted: int, seed: int) -> list[int]:
    """``wanted`` of ``count`` row numbers, ascending; all if there are no more."""
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()[:wanted])
