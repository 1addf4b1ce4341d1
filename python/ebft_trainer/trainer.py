"""`EBFTTrainer`: Energy-Based Fine-Tuning inside `transformers.Trainer`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import has_length, speed_metrics

from ebft_kernels.integrations.transformers import check_model, output_head

from .calibration import BINS, calibration_error, calibration_sums
from .config import EBFTConfig
from .data import EBFTCollator, rows_without_anchor
from .evaluate import evaluation_metrics, evaluation_sums
from .features import FeatureNetwork
from .monitor import CollapseWarning, gradient_norms
from .rollout import evaluation_mode
from .step import EBFTStep, ebft_step


class EBFTTrainer(Trainer):
    """`transformers.Trainer` with the loss of EBFT (arXiv:2603.12248).

    Overrides `compute_loss`, `evaluate` and `log`, nothing else: gradient accumulation, checkpoints, schedulers, mixed
    precision and distributed training are those of transformers and accelerate.

    The frozen feature network is made from the model **as given here**. To resume a run, start from the same initial
    model (`train(resume_from_checkpoint=...)` loads the trained weights afterwards); to evaluate a trained model, pass
    the `feature_network` that it was trained with.

    The loss is a mean over the rollouts (and tokens) of a micro-batch, and micro-batches and ranks weigh the same: with
    equal numbers of rollouts in each, accumulating four batches of one row is the same as one batch of four.

    Each step's randomness comes from the seed, the step, the micro-batch and the rank alone, so that a run that was
    interrupted and resumed samples the same rollouts as one that was not.
    """

    # `compute_loss` returns a mean per micro-batch; transformers is to divide it by their number.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: EBFTConfig,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        feature_network: FeatureNetwork | None = None,
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
            feature_network: default: a frozen copy of ``model`` as it is now (with PEFT: the model without adapters).
            processing_class: the tokenizer, saved with each checkpoint; its padding token fills batches.
            data_collator: default: `EBFTCollator`. Another one returns ``input_ids`` and ``layout``, the
                `StridedLayout` of the batch, and optionally ``completion_mask``: it decides where anchors stand.
            callbacks: as for `Trainer`.
            optimizers: as for `Trainer`.

        Raises:
            ValueError: the model cannot be run on strided rows; a row has no room for a rollout; one process is to
                drive several devices.
            TypeError: ``args`` is not an `EBFTConfig`.
        """
        if not isinstance(args, EBFTConfig):
            raise TypeError(f"args: expected an EBFTConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"args: expected one device per process, got {args.n_gpu}; start with torchrun or accelerate"
            )
        # Without the autocast of an earlier trainer, which would round the logits that the two checks compare.
        model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
        check_model(model).require()
        output_head(model)
        if data_collator is None:
            pad = getattr(processing_class, "pad_token_id", None)
            data_collator = EBFTCollator(args, pad_token_id=0 if pad is None else pad)
        eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, dataset in {"train_dataset": train_dataset, **eval_datasets}.items():
            _check_rows(name, dataset, data_collator)
        if feature_network is None and (args.rl_coef > 0 or eval_dataset is not None):
            feature_network = FeatureNetwork(model, args.feature_layers, pooling=args.pooling, normalize=args.normalize)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.grad_norm_terms and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("grad_norm_terms: expected False with FSDP or DeepSpeed, whose gradients are sharded")
        self.feature_network = None if feature_network is None else feature_network.to(args.device)
        self._metrics = _MetricSums()
        self._step_and_micro_batch = (-1, -1)
        self.add_callback(CollapseWarning)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,  # noqa: ARG002 (transformers passes it by name)
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """The loss of one micro-batch: a mean over its valid anchors and rollouts."""
        layout = inputs["layout"]
        if not layout.num_valid:
            raise ValueError("layout: expected at least one valid anchor in the batch, got none")
        step, micro_batch = self._step_and_micro_batch
        micro_batch = micro_batch + 1 if step == self.state.global_step else 0
        self._step_and_micro_batch = (self.state.global_step, micro_batch)
        self._metrics.start(new_step=micro_batch == 0)
        result = ebft_step(
            model,
            self.feature_network,
            inputs["input_ids"],
            layout.to(inputs["input_ids"].device),
            self.args,
            token_mask=inputs.get("completion_mask"),
            generator=self._generator(self.args.seed, "train", self.state.global_step, micro_batch),
        )
        self._metrics.add(result.metrics | self._gradient_norms(model, result, micro_batch))
        return (result.loss, {"step": result}) if return_outputs else result.loss

    def _gradient_norms(self, model: nn.Module, result: EBFTStep, micro_batch: int) -> dict[str, Tensor]:
        """Of each term on the first micro-batch of a step that is logged, if asked for."""
        step = self.state.global_step + 1
        if not self.args.grad_norm_terms or micro_batch or step % self.state.logging_steps:
            return {}
        return gradient_norms(result.terms, [x for x in model.parameters() if x.requires_grad])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means, since the last training log, of every metric of `ebft_step`, and two speeds."""
        if "loss" in logs:
            logs = {**logs, **self._metrics.means(self.accelerator)}
            self._metrics = _MetricSums()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on ``args.eval_rows`` rows: the same rows and the same random numbers at every call.

        Returns:
            ``eval_cross_entropy`` (nats per token; also as ``eval_loss``), ``eval_perplexity``,
            ``eval_calibration_error`` (`calibration_error`), and for rollouts of the trained horizon
            ``eval_rollout_entropy``, ``eval_entropy_gap``, ``eval_feature_matching_loss`` and ``eval_alignment``
            (`evaluation_metrics`); the last two also per horizon 1..G, named ``eval_alignment_h1`` and so on.

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
        sums = self._evaluation_sums(dataset, rows)
        metrics = evaluation_metrics(sums[: -3 * BINS], self.args.horizon)
        metrics["calibration_error"] = calibration_error(sums[-3 * BINS :])
        metrics["loss"] = metrics["cross_entropy"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics.update(speed_metrics(metric_key_prefix, wall_clock, num_samples=len(rows)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._metrics.leave_out(time.perf_counter() - started)
        return metrics

    def _evaluation_sums(self, dataset: Any, rows: Sequence[int]) -> Tensor:
        """The summed statistics of ``rows``; batches go to the ranks in turn, each rank runs equally many."""
        size, ranks = self.args.eval_batch_size, self.accelerator.num_processes
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        mine = range(self.accelerator.process_index, -(-len(batches) // ranks) * ranks, ranks)
        self.callback_handler.eval_dataloader = mine
        sums = []
        # The model is not prepared for evaluation alone: accelerate would take it for prepared when training starts.
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and not self.accelerator._models:
            raise ValueError("evaluate: with FSDP or DeepSpeed it runs from training only; set eval_on_start=True")
        with evaluation_mode(self.model_wrapped), self.accelerator.autocast():
            for number in mine:
                batch = self.data_collator([dataset[i] for i in batches[number % len(batches)]])
                batch = {name: value.to(self.args.device) for name, value in batch.items()}
                generator = self._generator(self.args.eval_seed, "eval", number)
                result = evaluation_sums(
                    self.model_wrapped, self.feature_network, batch, self.args, generator=generator
                )
                calibration = calibration_sums(
                    self.model_wrapped, batch["input_ids"], batch["layout"], token_mask=batch.get("completion_mask")
                )
                result = torch.cat([result, calibration])
                sums.append(result if number < len(batches) else torch.zeros_like(result))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return self.accelerator.reduce(torch.stack(sums).cpu().double().sum(0).to(self.args.device))

    def _generator(self, seed: int, *parts: str | int) -> torch.Generator:
        key = (seed, *parts) if parts[0] == "eval" else (seed, *parts, self.args.process_index)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        return torch.Generator(self.args.device).manual_seed(int.from_bytes(digest, "big", signed=True))


class _MetricSums:
    """Sums of metrics between two log lines; tensors stay on their device until they are logged."""

    def __init__(self) -> None:
        self._steps = 0
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._started: float | None = None

    def start(self, *, new_step: bool) -> None:
        self._steps += new_step
        if self._started is None:
            self._started = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        if self._started is not None:
            self._started += seconds

    def add(self, metrics: dict[str, Tensor | float]) -> None:
        for name, value in metrics.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self, accelerator: Any) -> dict[str, float]:
        """Means over micro-batches and ranks, tokens per second of all ranks, seconds per optimizer step."""
        if self._started is None:
            return {}
        device = accelerator.device
        values = torch.stack([torch.as_tensor(x, device=device, dtype=torch.float32) for x in self._sums.values()])
        means = (accelerator.reduce(values, "mean").cpu().double() / torch.tensor(list(self._counts.values()))).tolist()
        out = dict(zip(self._sums, means, strict=True))
        elapsed = time.perf_counter() - self._started
        if "tokens" in out:
            out["tokens_per_second"] = out["tokens"] * self._counts["tokens"] * accelerator.num_processes / elapsed
        return {**out, "seconds/step": elapsed / self._steps}


def _chosen_rows(count: int, wanted: int, seed: int) -> list[int]:
    """``wanted`` of ``count`` row numbers, ascending; all if there are no more."""
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()[:wanted])


def _check_rows(name: str, dataset: Any, collator: Any) -> None:
    """Raise ValueError for the first row without room for a rollout; a dataset without a length is not read."""
    if dataset is None or not has_length(dataset):
        return
    if len(dataset) == 0:
        raise ValueError(f"{name}: expected at least one row, got none")
    for number, reason in rows_without_anchor(dataset, collator):
        raise ValueError(f"{name}: row {number}: {reason}")
