"""The emulation finds what it is there to find: each kernel of broken.cu has one mistake."""

from __future__ import annotations

import pytest
import torch

ORDERS = (0, 1, 2)
SOUND, ENDS_EARLY, WAITS_ELSEWHERE, SHUFFLES_ALONE = range(4)
UNWRITTEN, UNWRITTEN_DYNAMIC, FORGETS_A_BARRIER, OVERWRITES_TOO_EARLY, BEYOND = range(4, 9)


def run(emulated, which: int, order: int) -> tuple[torch.Tensor, str]:
    out = torch.full((64,), torch.nan, dtype=torch.float64)
    emulated.library.emulation_set_order(order)
    status = emulated.library.emulation_run_broken(which, out.data_ptr())
    emulated.library.emulation_set_order(0)
    assert bool(status.error) == bool(status.message)
    return out, status.message.decode()


@pytest.mark.parametrize("order", ORDERS)
def test_a_sound_kernel_runs(emulated, order):
    out, message = run(emulated, SOUND, order)
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
def test_a_launch_fails_and_says_where(emulated, which, message, order):
    _, said = run(emulated, which, order)
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(said)
    assert said.split()[0].endswith("_kernel")
    assert "(1 blocks of 64 threads, 512 bytes of shared memory): cudaErrorLaunchFailure: " in said


@pytest.mark.parametrize("which", (UNWRITTEN, UNWRITTEN_DYNAMIC))
def test_unwritten_shared_memory_is_nan(emulated, which):
    run(emulated, SOUND, 0)
    for _ in range(2):
        out, message = run(emulated, which, 0)
        assert not message and out.isnan().nonzero().flatten().tolist() == [5]


def test_a_race_shows_when_threads_run_in_another_order(emulated):
    ascending, descending, shuffled = (run(emulated, FORGETS_A_BARRIER, order)[0] for order in ORDERS)
    assert not torch.equal(ascending, descending) and not torch.equal(ascending, shuffled)


@pytest.mark.parametrize("order", ORDERS)
def test_warps_run_ahead_of_others_that_have_not_read_yet(emulated, order):
    """Each thread should add 0 + 0 and 1 + 1; the second warp to run adds what the first has written since."""
    out, message = run(emulated, OVERWRITES_TOO_EARLY, order)
    assert not message and not torch.equal(out, torch.full_like(out, 2))
