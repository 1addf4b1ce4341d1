"""The emulation finds what it is there to find: each kernel of broken.cu has one mistake."""

from __future__ import annotations

import pytest
import torch

ORDERS = (0, 1, 2)
SOUND, ENDS_EARLY, WAITS_ELSEWHERE, SHUFFLES_ALONE = range(4)
UNWRITTEN, UNWRITTEN_DYNAMIC, FORGETS_A_BARRIER, OVERWRITES_TOO_EARLY, BEYOND = range(4, 9)


def run(emulation, which: int, order: int) -> tuple[torch.Tensor, str]:
    out = torch.full((64,), torch.nan, dtype=torch.float64)
    emulation.set_order(order)
    message = emulation.run_broken(which, out.data_ptr())
    emulation.set_order(0)
    return out, message


@pytest.mark.parametrize("order", ORDERS)
def test_a_sound_kernel_runs(emulation, order):
    out, message = run(emulation, SOUND, order)
    assert not message and (out == sum(range(64))).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("which", "message"),
    [
        (ENDS_EARLY, r"thread 0 waits at __syncthreads \(broken.cu:\d+\) for thread 37, which has ended"),
        (WAITS_ELSEWHERE, r"thread 0 waits at __syncthreads .* for thread 32, which waits at __syncthreads"),
        (SHUFFLES_ALONE, r"thread 1 waits at __shfl_xor_sync \(broken.cu:\d+\) for thread 0, which has ended"),
        (BEYOND, "byte 512 of 512 bytes of shared memory was written"),
    ],
)
def test_a_launch_fails_and_says_where(emulation, which, message, order):
    _, said = run(emulation, which, order)
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(said)
    assert said.split()[0].endswith("_kernel")
    assert "(1 blocks of 64 threads, 512 bytes of shared memory): cudaErrorLaunchFailure: " in said


@pytest.mark.parametrize("which", (UNWRITTEN, UNWRITTEN_DYNAMIC))
def test_unwritten_shared_memory_is_nan(emulation, which):
    run(emulation, SOUND, 0)
    for _ in range(2):
        out, message = run(emulation, which, 0)
        assert not message and out.isnan().nonzero().flatten().tolist() == [5]


def test_a_race_shows_when_threads_run_in_another_order(emulation):
    ascending, descending, shuffled = (run(emulation, FORGETS_A_BARRIER, order)[0] for order in ORDERS)
    assert not torch.equal(ascending, descending) and not torch.equal(ascending, shuffled)


@pytest.mark.parametrize("order", ORDERS)
def test_warps_run_ahead_of_others_that_have_not_read_yet(emulation, order):
    """Each thread should add 0 + 0 and 1 + 1; the second warp to run adds what the first has written since."""
    out, message = run(emulation, OVERWRITES_TOO_EARLY, order)
    assert not message and not torch.equal(out, torch.full_like(out, 2))
