"""The two tasks, Python source and docstring-to-body pairs, and how often what is sampled is Python."""

from __future__ import annotations

import ast
import codeop
import random
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ebft_kernels import StridedLayout
from ebft_trainer import EBFTOptions, sample_rollouts
from ebft_trainer.corpus import SourceFile, family, stdlib_sources
from ebft_trainer.data import Row
from ebft_trainer.demo import text_rows
from ebft_trainer.rows import build_rows
from ebft_trainer.sources import Document

TASKS = ("code", "pairs")
PROMPT_TOKENS = 32
SAMPLES = 4


@dataclass(frozen=True)
class Prompt:
    """What is continued to see whether Python comes out: token ids, and those that really follow."""

    ids: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Task:
    """Rows of each split, and the test split's prompts."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    prompts: list[Prompt]


def training_files(count: int) -> list[SourceFile]:
    """``count`` files of the corpus' train split, evenly spaced; all if there are no more."""
    files = stdlib_sources("train")
    return files if count >= len(files) else [files[i * len(files) // count] for i in range(count)]


def held_out_files() -> tuple[list[SourceFile], list[SourceFile]]:
    """Validation and test: the corpus' held-out files, every third family of modules for validation."""
    files = stdlib_sources("held_out")
    validation = set(sorted({family(file.name) for file in files})[::3])
    return tuple([file for file in files if (family(file.name) in validation) == wanted] for wanted in (True, False))


def build_task(name: str, tokenizer: Any, settings: Any) -> Task:
    """The task called ``name``; evaluation's rows and prompts are a fixed random choice of ``settings``' sizes."""
    validation, test = held_out_files()
    rows = _code_rows if name == "code" else _pair_rows
    prompts = _code_prompts if name == "code" else _pair_prompts
    return Task(
        rows(training_files(settings.train_files), tokenizer, settings.length),
        _choose(rows(validation, tokenizer, settings.length), settings.validation_rows),
        _choose(rows(test, tokenizer, settings.length), settings.test_rows),
        _choose(list(prompts(test, tokenizer, settings)), settings.test_prompts),
    )


def _choose(items: list[Any], count: int) -> list[Any]:
    return items if count >= len(items) else random.Random(0).sample(items, count)


def _code_rows(files: Sequence[SourceFile], tokenizer: Any, length: int) -> list[Row]:
    return text_rows(files, tokenizer, length)


def _pair_rows(files: Sequence[SourceFile], tokenizer: Any, length: int) -> list[Row]:
    documents = [Document(file.name, prompt=p, completion=c) for file in files for p, c in docstring_pairs(file.text)]
    return build_rows(documents, tokenizer, EBFTOptions(), length=length)[0]


def docstring_pairs(source: str) -> Iterator[tuple[str, str]]:
    """(signature and docstring, rest of the body) of each function with both, without its indentation."""
    lines = source.splitlines(keepends=True)
    for node in _walk(source):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or ast.get_docstring(node) is None:
            continue
        end = node.body[0].end_lineno
        if len(node.body) < 2 or node.body[1].lineno <= end:
            continue
        text = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        if not text.endswith("\n"):
            text += "\n"
        parts = text.splitlines(keepends=True)
        split = end - node.lineno + 1
        prompt, completion = "".join(parts[:split]), "".join(parts[split:])
        if is_python(prompt, completion, ended=True):
            yield prompt, completion


def _walk(source: str) -> list[ast.AST]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(ast.walk(ast.parse(source)))


def _pair_prompts(files: Sequence[SourceFile], tokenizer: Any, settings: Any) -> Iterator[Prompt]:
    """Prompts that leave a row of ``settings.length`` room for what is sampled."""
    for file in files:
        for pair in docstring_pairs(file.text):
            prompt, completion = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair)
            if len(prompt) + settings.sampled_tokens <= settings.length:
                yield Prompt(prompt, [*completion, tokenizer.eos_token_id])


def _code_prompts(files: Sequence[SourceFile], tokenizer: Any, settings: Any) -> Iterator[Prompt]:
    """The first tokens of each top-level statement that is long enough: parsing needs nothing from before it."""
    for file in files:
        lines = file.text.splitlines(keepends=True)
        for node in ast.parse(file.text).body:
            first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", ()))])
            ids = tokenizer("".join(lines[first - 1 : node.end_lineno]), add_special_tokens=False)["input_ids"]
            if len(ids) >= PROMPT_TOKENS + settings.sampled_tokens:
                yield Prompt(ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:])


def is_python(prompt: str, completion: str, *, ended: bool) -> bool:
    """Whether a program that starts with ``prompt`` goes on with ``completion``.

    If the completion ended itself, both together must parse. If it was cut off, what counts is its text up to its last
    line break (without one: no): it must parse, or be the beginning of something that does, such as an open bracket.
    """
    if not ended:
        whole_lines, line_break, _ = completion.rpartition("\n")
        if not line_break:
            return False
        completion = whole_lines + line_break
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if ended:
                ast.parse(prompt + completion)
            else:
                codeop.compile_command(prompt + completion, symbol="exec")
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
        return False
    return True


@torch.no_grad()
def parse_rate(
    model: nn.Module, prompts: Sequence[Prompt], tokenizer: Any, *, tokens: int, temperature: float
) -> float:
    """The share of `SAMPLES` continuations of ``tokens`` tokens per prompt for which :func:`is_python` holds.

    The random numbers are the same at every call.
    """
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
    rows = torch.full((len(prompts), int(lengths.max()) + tokens), tokenizer.pad_token_id)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt.ids)] = torch.tensor(prompt.ids)
    # The padding behind a prompt stands for the window, which no rollout sees.
    layout = StridedLayout.from_anchors(lengths[:, None], rows.shape[1], horizon=tokens, samples=SAMPLES)
    device = next(model.parameters()).device
    drawn, _ = sample_rollouts(
        model,
        rows.to(device),
        layout.to(device),
        temperature=temperature,
        eos_token_ids=[tokenizer.eos_token_id],
        generator=torch.Generator(device).manual_seed(0),
    )
    judged = [
        _judge(prompt, completion, tokenizer)
        for prompt, completions in zip(prompts, drawn[:, 0].tolist(), strict=True)
        for completion in completions
    ]
    return sum(judged) / len(judged)


def real_parse_rate(prompts: Sequence[Prompt], tokenizer: Any, *, tokens: int) -> float:
    """The same of the real continuations, cut off after ``tokens`` tokens."""
    return sum(_judge(prompt, prompt.continuation[:tokens], tokenizer) for prompt in prompts) / len(prompts)


def _judge(prompt: Prompt, completion: Tensor | list[int], tokenizer: Any) -> bool:
    ended = tokenizer.eos_token_id in completion
    if ended:
        completion = completion[: completion.index(tokenizer.eos_token_id)]
    start, whole = tokenizer.batch_decode([prompt.ids, prompt.ids + completion], clean_up_tokenization_spaces=False)
    # A character whose last bytes the completion brings is shown as a replacement at the end of the prompt.
    start = start.rstrip("\N{REPLACEMENT CHARACTER}")
    return is_python(start, whole[len(start) :], ended=ended)
