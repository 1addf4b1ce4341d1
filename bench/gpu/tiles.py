"""The short lists of tiles timed on this GPU by the library's own choice at run time, the winners as a patch."""

from __future__ import annotations

import ast
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from ebft_kernels import _tiles, _triton
from ebft_kernels._tiles import attention_tiles
from ebft_kernels._triton import Target, Tile

from .. import _cases
from ..shapes import ModelShape
from .job import Job

#: Kernel -> its row of the table, for heads of which size.
_ROWS = {
    "strided_attention_fwd_kernel": "forward",
    "strided_attention_dq_kernel": "dq",
    "strided_attention_dkdv_kernel": "dkdv",
    "strided_attention_step_kernel": "step",
}


class Choice(NamedTuple):
    """One kernel at one shape: the candidates, the first of which is taken without being asked, and their seconds."""

    kernel: str
    row: str
    size: int
    tiles: tuple[Tile, ...]
    seconds: tuple[float, ...]


def run(job: Job) -> None:
    """Run every op at the shapes of models with EBFT_KERNELS_AUTOTUNE=1; the interpreter has nothing to choose from."""
    os.environ["EBFT_KERNELS_AUTOTUNE"] = "1"
    on_gpu, choices = job.on_gpu("tiles timed by EBFT_KERNELS_AUTOTUNE=1"), []
    for model in job.models():
        with job.attempt(f"{model.name}: tiles", needs=5) as enough:
            if not enough:
                continue
            found = [*_timed(job, model)] if on_gpu else [*_made_up(model)]
            choices += found
            for choice in found:
                times = {str(_numbers(tile)): x for tile, x in zip(choice.tiles, choice.seconds, strict=True)}
                job.write(
                    "tile", model=model.name, **choice._replace(tiles=(), seconds=())._asdict() | {"times": times}
                )
    target = _triton.target_of(job.device) if on_gpu else _H100
    source = Path(_tiles.__file__).read_text(encoding="utf-8")
    job.write("patch", patch=patch(source, family(target), choices))


#: Whose lists a rehearsal pretends to have timed.
_H100 = Target("sm_90", 132, 227 << 10)


def _made_up(model: ModelShape) -> Iterator[Choice]:
    """Where the second candidate is always the better one."""
    for kernel, row in _ROWS.items():
        tiles = tuple(attention_tiles(row, _H100, model.head_dim, model.head_dim, 2))
        yield Choice(kernel, row, model.head_dim, tiles, tuple(1.0 + (index != 1) for index in range(len(tiles))))


def _timed(job: Job, model: ModelShape) -> Iterator[Choice]:
    import triton.testing

    found: list[Choice] = []
    do_bench, fastest, seconds = triton.testing.do_bench, _triton._fastest, []

    def noted(run: object) -> float:
        seconds.append(do_bench(run) / 1e3)
        return seconds[-1]

    def noting(kernel, grid, args, device, tiles, constants):
        seconds.clear()
        tile = fastest(kernel, grid, args, device, tiles, constants)
        if seconds:  # else it was known from an earlier call
            row = "own" if constants.get("OWN") else _ROWS.get(kernel.__name__, "")
            size = max(constants.get("D", 0), constants.get("DV", 0))
            found.append(Choice(kernel.__name__, row, size, tuple(tiles), tuple(seconds)))
        return tile

    layout = job.geometry.layout().to(job.device)
    calls = [
        _cases.attention(model, layout, torch.bfloat16),
        _cases.attention_step(model, layout, torch.bfloat16),
        _cases.matching(model, layout),
    ]
    with mock.patch.object(triton.testing, "do_bench", noted), mock.patch.object(_triton, "_fastest", noting):
        for call in calls:
            outputs = call.forward()
            if call.differentiable:
                torch.autograd.backward(outputs, [torch.randn_like(out) for out in outputs])
    yield from found


def family(target: Target) -> str:
    """The part of the table that 16-bit attention on this GPU is looked up in."""
    return _tiles._family(target)


def _numbers(tile: Tile) -> tuple[int, ...]:
    return (*tile.sizes.values(), tile.num_warps, tile.num_stages)


def winners(choices: Iterable[Choice]) -> Mapping[tuple[str, int], tuple[int, ...]]:
    """Row and class of head size -> the candidate that is best over all shapes, relative to the first."""
    grouped: dict[tuple[str, int], list[Choice]] = {}
    for choice in choices:
        if choice.row:
            grouped.setdefault((choice.row, (choice.size > 64) + (choice.size > 128)), []).append(choice)
    best = {}
    for key, group in grouped.items():
        totals = [0.0] * len(group[0].tiles)
        for choice in group:
            if choice.tiles != group[0].tiles:
                continue
            totals = [total + x / choice.seconds[0] for total, x in zip(totals, choice.seconds, strict=True)]
        index = totals.index(min(totals))
        if index:
            best[key] = _numbers(group[0].tiles[index])
    return best


def patch(source: str, name: str, choices: Iterable[Choice]) -> str:
    """A unified diff of ``_tiles.py`` that puts this family's winners first; "" where the guesses are the winners."""
    lines = source.splitlines(keepends=True)
    start = next(index for index, line in enumerate(lines) if line.startswith(f'    "{name}": {{'))
    changed = [*lines]
    for (row, size_class), numbers in winners(choices).items():
        at = next(index for index in range(start, len(lines)) if lines[index].startswith(f'        "{row}": ('))
        entries = list(ast.literal_eval(re.search(r"\(.*\)", changed[at]).group()))
        entries[min(size_class, len(entries) - 1)] = numbers
        changed[at] = f'        "{row}": ({", ".join(map(str, entries))}),\n'
    path = "ebft_kernels/_tiles.py"
    return "".join(difflib.unified_diff(lines, changed, f"a/{path}", f"b/{path}"))
