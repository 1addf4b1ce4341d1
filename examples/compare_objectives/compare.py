"""Base, SFT, RLVR, EBFT and EBFT with cross-entropy from the same start, on the same number of rows and steps.

    python examples/compare_objectives/compare.py OUTPUT --scale small [--minutes N]
    python examples/compare_objectives/compare.py OUTPUT --scale small --report [--write docs/experiments.md]

Every finished cell (a run with one task, start, objective, learning rate and seed) is a line of OUTPUT/results.jsonl;
cells that are there are not run again. README.md in this folder says what is compared and how.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from tables import report, update_document
from tasks import TASKS, Task, build_task, parse_rate, real_parse_rate, training_files
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from ebft_trainer import EBFTConfig, EBFTOptions, EBFTTrainer, FeatureNetwork
from ebft_trainer.config import device_arguments
from ebft_trainer.demo_model import MODEL_FOLDER
from ebft_trainer.demo_model.train_model import Recipe, build_model, encode, save, train_weights
from ebft_trainer.plots import write_json

STARTS = ("weak", "warm")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "rlvr": {"objective": "rlvr"},
    "ebft": {"objective": "ebft"},
    "ebft+ce": {"objective": "ebft", "ce_coef": 1.0},
}
# Forward passes over the rows of a step: policy, rollouts, features (these as deep as the deepest tapped layer).
PASSES = {"sft": 1, "rlvr": 2, "ebft": 3, "ebft+ce": 3}
VERIFIER = "parses_as_python"
SELECTION_SEED = 0
RESULTS, SETTINGS, WEAK = "results.jsonl", "settings.json", "weak"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of a scale. The budget of a run is ``steps`` optimizer steps of ``rows_per_step`` rows."""

    length: int
    rows_per_step: int
    steps: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    train_files: int
    validation_rows: int
    test_rows: int
    test_prompts: int
    sampled_tokens: int
    weak_steps: int


SCALES = {
    "toy": Settings(
        length=64,
        rows_per_step=1,
        steps=1,
        learning_rates=(1e-4, 1e-3),
        seeds=(1, 2),
        train_files=6,
        validation_rows=1,
        test_rows=1,
        test_prompts=2,
        sampled_tokens=8,
        weak_steps=1,
    ),
    "small": Settings(
        length=96,
        rows_per_step=2,
        steps=16,
        learning_rates=(2e-5, 1e-4, 5e-4),
        seeds=(1, 2, 3),
        train_files=64,
        validation_rows=24,
        test_rows=32,
        test_prompts=32,
        sampled_tokens=32,
        weak_steps=40,
    ),
    "full": Settings(
        length=192,
        rows_per_step=4,
        steps=40,
        learning_rates=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
        seeds=(1, 2, 3),
        train_files=256,
        validation_rows=48,
        test_rows=96,
        test_prompts=96,
        sampled_tokens=48,
        weak_steps=100,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. ``stage``: ``base`` (nothing is trained), ``select`` (evaluated on validation) or ``test``."""

    stage: str
    task: str
    start: str
    objective: str = "base"
    learning_rate: float = 0.0
    seed: int = SELECTION_SEED


class Results:
    """The finished cells of a folder, in the order in which they were finished.

    Raises:
        ValueError: the folder holds results of other settings, or of another Python (whose library is other text).
    """

    def __init__(self, folder: Path, scale: str) -> None:
        self.path = folder / RESULTS
        made_with = {
            "scale": scale,
            **asdict(SCALES[scale]),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        made_with = json.loads(json.dumps(made_with))
        if (folder / SETTINGS).exists():
            found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            differing = [name for name in made_with if made_with[name] != found.get(name)]
            if differing:
                name = differing[0]
                raise ValueError(
                    f"OUTPUT: expected results with {name} = {made_with[name]}, got {found.get(name)} in "
                    f"{str(folder)!r}"
                )
        else:
            write_json(folder / SETTINGS, made_with)
        self.made_with = made_with
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        self.lines = [json.loads(line) for line in text.splitlines()]

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """What came out of ``cell``, if it is finished."""
        return next((line for line in self.lines if line["cell"] == asdict(cell)), None)

    def add(self, cell: Cell, outcome: dict[str, Any]) -> None:
        """Append one line, in one write: several processes may do so, and a killed one leaves no half line."""
        line = {"cell": asdict(cell), **outcome}
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Workshop:
    """What cells share, made when the first of them needs it: tokenizer, tasks, starts and their frozen copies."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self._tasks: dict[str, Task] = {}
        self._starts: dict[str, tuple[Any, FeatureNetwork]] = {}

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(MODEL_FOLDER)

    def task(self, name: str) -> Task:
        if name not in self._tasks:
            self._tasks[name] = build_task(name, self.tokenizer, self.settings)
        return self._tasks[name]

    def start(self, name: str) -> tuple[Any, FeatureNetwork]:
        """The model to start from, and the frozen network that it is trained and evaluated with."""
        if name not in self._starts:
            folder = MODEL_FOLDER if name == "warm" else self._weak_folder()
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self._starts[name] = model, FeatureNetwork(model)
        return self._starts[name]

    def _weak_folder(self) -> Path:
        """The shipped model's recipe, architecture and tokenizer, cut to ``weak_steps`` steps on the training files."""
        folder = self.folder / WEAK
        if folder.exists():
            return folder
        print(f"training the weak start: {self.settings.weak_steps} steps", flush=True)
        recipe = Recipe(steps=self.settings.weak_steps)
        model = build_model(recipe, self.tokenizer)
        train_weights(model, encode(self.tokenizer, training_files(self.settings.train_files)), recipe, print)
        with tempfile.TemporaryDirectory(dir=self.folder) as unfinished:
            save(model, self.tokenizer, Path(unfinished, WEAK))
            try:
                os.rename(Path(unfinished, WEAK), folder)
            except OSError:  # A process beside this one was first, with the same weights.
                if not folder.exists():
                    raise
        return folder


def run_cell(cell: Cell, workshop: Workshop) -> dict[str, Any]:
    """Train from the start and evaluate: metrics, and the cost of a step."""
    began = time.perf_counter()
    settings, task = workshop.settings, workshop.task(cell.task)
    start, feature_network = workshop.start(cell.start)
    count = settings.steps * settings.rows_per_step
    if count > len(task.train):
        raise ValueError(f"train_files: expected {count} rows for {cell.task!r}, got {len(task.train)}")
    trainer = EBFTTrainer(
        copy.deepcopy(start),
        _config(cell, settings),
        train_dataset=random.Random(cell.seed).sample(task.train, count),
        eval_dataset=task.validation if cell.stage == "select" else task.test,
        feature_network=feature_network,
        processing_class=workshop.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    outcome: dict[str, Any] = {}
    if cell.stage != "base":
        processor = time.process_time()
        trainer.train()
        outcome["cpu_seconds_per_step"] = (time.process_time() - processor) / settings.steps
        log = next(line for line in trainer.state.log_history if "tokens" in line)
        outcome["tokens_per_step"] = PASSES[cell.objective] * log["tokens"]
    skipped = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch")
    metrics = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items() if k not in skipped}
    if cell.stage != "select":
        sampled = {"tokens": settings.sampled_tokens, "temperature": trainer.args.temperature}
        metrics["parse_rate"] = parse_rate(trainer.model, task.prompts, workshop.tokenizer, **sampled)
    if cell.stage == "base":
        real = real_parse_rate(task.prompts, workshop.tokenizer, tokens=settings.sampled_tokens)
        metrics["parse_rate_of_real_text"] = real
    return {"metrics": metrics, **outcome, "seconds": time.perf_counter() - began}


def _config(cell: Cell, settings: Settings) -> EBFTConfig:
    return EBFTConfig(
        output_dir=tempfile.gettempdir(),  # Nothing is saved.
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **device_arguments(),
        seed=cell.seed,
        max_steps=settings.steps,
        learning_rate=cell.learning_rate,
        per_device_train_batch_size=settings.rows_per_step,
        per_device_eval_batch_size=16,
        logging_steps=settings.steps,
        eval_rows=max(settings.validation_rows, settings.test_rows),
        verifier=VERIFIER,
        **OBJECTIVES.get(cell.objective, {"objective": "sft"}),
    )


def objective_value(objective: str, metrics: dict[str, float]) -> float:
    """What an objective minimises, measured: the learning rate with the lowest value on validation is taken."""
    options = EBFTOptions(**OBJECTIVES[objective])
    return (
        options.rl_coef * metrics["feature_matching_loss"]
        - options.verifier_coef * metrics["verifier_reward"]
        + options.ce_coef * metrics["cross_entropy"]
    )


def validation_values(
    results: Results, settings: Settings, task: str, start: str, objective: str
) -> dict[float, float]:
    """`objective_value` for each learning rate of the grid whose run is finished."""
    found = {cell.learning_rate: results.find(cell) for cell in _selection(settings, task, start, objective)}
    return {rate: objective_value(objective, line["metrics"]) for rate, line in found.items() if line is not None}


def _selection(settings: Settings, task: str, start: str, objective: str) -> Iterator[Cell]:
    for learning_rate in settings.learning_rates:
        yield Cell(stage="select", task=task, start=start, objective=objective, learning_rate=learning_rate)


def cells(results: Results, settings: Settings, tasks: Iterable[str]) -> Iterator[Cell]:
    """All cells in the order in which they are run, each to be finished before the next is asked for.

    An objective's tests come after the runs that choose its learning rate.
    """
    for task in tasks:
        for start in STARTS:
            yield Cell(stage="base", task=task, start=start)
            for objective in OBJECTIVES:
                yield from _selection(settings, task, start, objective)
                values = validation_values(results, settings, task, start, objective)
                rate = min(values, key=values.__getitem__)
                for seed in settings.seeds:
                    yield Cell(stage="test", task=task, start=start, objective=objective, learning_rate=rate, seed=seed)


def run(folder: Path, scale: str, *, tasks: Sequence[str] = TASKS, minutes: float | None = None) -> int:
    """Run the cells that are not finished; none is started after ``minutes``. Returns how many were run."""
    settings, results = SCALES[scale], Results(folder, scale)
    workshop, began, done = Workshop(folder, settings), time.monotonic(), 0
    transformers.utils.logging.disable_progress_bar()
    for cell in cells(results, settings, tasks):
        if results.find(cell) is not None:
            continue
        if minutes is not None and time.monotonic() - began >= 60 * minutes:
            print(f"{minutes:g} minutes are over: the same command goes on from here")
            break
        outcome = run_cell(cell, workshop)
        results.add(cell, outcome)
        done += 1
        rate = f"{cell.learning_rate:g}, seed {cell.seed}"
        print(f"{cell.stage} {cell.task} {cell.start} {cell.objective} {rate}: {outcome['seconds']:.1f} s", flush=True)
    return done


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder of the results, of one scale")
    parser.add_argument("--scale", choices=SCALES, default="small", help="(small)")
    parser.add_argument("--task", choices=TASKS, help="run the cells of one task only, as beside another process")
    parser.add_argument("--minutes", type=float, help="start no new cell after so many minutes")
    parser.add_argument("--report", action="store_true", help="run nothing, print the tables")
    parser.add_argument("--write", type=Path, metavar="FILE", help="with --report: put them into this document")
    options = parser.parse_args(arguments)
    if options.write and not options.report:
        parser.error("--write: expected together with --report")
    if options.report and not (options.output / RESULTS).exists():
        parser.error(f"OUTPUT: expected a folder with {RESULTS}, got {str(options.output)!r}")
    if not options.report:
        tasks = TASKS if options.task is None else (options.task,)
        run(options.output, options.scale, tasks=tasks, minutes=options.minutes)
        return
    settings, results = SCALES[options.scale], Results(options.output, options.scale)
    validation = {
        (task, start, objective): validation_values(results, settings, task, start, objective)
        for task in TASKS
        for start in STARTS
        for objective in OBJECTIVES
    }
    text = report(results.lines, results.made_with, validation)
    if options.write:
        update_document(options.write, options.scale, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
