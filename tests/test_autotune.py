"""With EBFT_KERNELS_AUTOTUNE=1 a tile serves the calls that are like the one that it was the fastest for, no others."""

from __future__ import annotations

import pytest
import torch

from ebft_kernels import _triton
from ebft_kernels._tiles import attention_tiles
from ebft_kernels._triton import Target, Tile, launch

pytest.importorskip("triton")
TILES = [Tile({"BLOCK": block}, 4) for block in (64, 32, 16)]


class Kernel:
    """Stands for a compiled kernel; none is run."""


@pytest.fixture
def tuned(monkeypatch):
    """The numbers of programs that were launched for their results; tiles are timed by what a test says."""
    launched, seconds, timing = [], {}, []

    def launcher(_kernel, grid, _args, options):
        timing.append(options["BLOCK"]) if timing else launched.append(grid[0])

    def do_bench(run):
        timing.append(None)
        run()
        block = timing[-1]
        timing.clear()
        return seconds.get(block, 1.0)

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(_triton, "_autotune", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_triton, "_FASTEST", {})
    with _triton.assume(Target("sm_90", 132, 227 << 10), launcher):
        yield launched, seconds


def call(x: torch.Tensor, *args: object, kernel: object = Kernel, tiles=TILES, **constants: object) -> None:
    launch(
        kernel,
        lambda sizes: (-(-x.numel() // sizes["BLOCK"]),),
        x,
        *args,
        device=torch.device("cuda", 0),
        tiles=tiles,
        **constants,
    )


def test_every_kind_of_call_has_the_tile_that_is_fastest_for_it(tuned):
    launched, seconds = tuned
    seconds[32] = 0.5
    call(torch.zeros(640), 0.5, None)
    seconds[16] = 0.1  # from now on the smallest is the fastest, where it is timed anew
    calls = {
        "the same again": ((torch.zeros(640), 0.5, None), {}, 32),
        "another number": ((torch.zeros(640), 0.7, None), {}, 32),
        "a length of the same power of two": ((torch.zeros(704), 0.5, None), {}, 32),
        "another dtype": ((torch.zeros(640, dtype=torch.bfloat16), 0.5, None), {}, 16),
        "another class of length": ((torch.zeros(6400), 0.5, None), {}, 16),
        "an option that was not there": ((torch.zeros(640), 0.5, 3.0), {}, 16),
        "another compile-time argument": ((torch.zeros(640), 0.5, None), {"FULL": True}, 16),
        "another kernel": ((torch.zeros(640), 0.5, None), {"kernel": object()}, 16),
        "other tiles": ((torch.zeros(640), 0.5, None), {"tiles": TILES[1:]}, 16),
    }
    for name, (arguments, options, block) in calls.items():
        launched.clear()
        call(*arguments, **options)
        assert launched == [-(-arguments[0].numel() // block)], name


def test_tiles_of_one_dtype_are_never_used_for_another(tuned):
    """Those of attention in float32 are smaller than those for 16 bits, which would not fit."""
    launched, _ = tuned
    target = Target("sm_90", 132, 227 << 10)
    for dtype in (torch.bfloat16, torch.float32):
        tiles = attention_tiles("forward", target, 128, 128, dtype.itemsize)
        x = torch.zeros(1, 2, 4096, 128, dtype=dtype)
        launched.clear()
        renamed = [tile._replace(sizes={"BLOCK": tile.sizes["BLOCK_M"]}) for tile in tiles]
        call(x, tiles=renamed)
        assert launched[0] in {-(-x.numel() // tile.sizes["BLOCK"]) for tile in renamed}
