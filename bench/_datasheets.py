"""What manufacturers' data sheets promise, and the least time that work takes by them."""

from __future__ import annotations

from typing import NamedTuple


class Accelerator(NamedTuple):
    """Rates of one product, as its data sheet has them: dense, without sparsity.

    Attributes:
        name: the product.
        arch: the architecture that its kernels are compiled for.
        bf16: bfloat16 operations per second of the matrix units.
        fp64: float64 operations per second of the ordinary units.
        bandwidth: bytes per second of the main memory.
    """

    name: str
    arch: str
    bf16: float
    fp64: float
    bandwidth: float

    def microseconds(self, *, operations: float = 0, double_operations: float = 0, moved: float = 0) -> float:
        """The least time for ``operations`` in bfloat16, some in float64 and ``moved`` bytes, all overlapped."""
        return 1e6 * max(operations / self.bf16, double_operations / self.fp64, moved / self.bandwidth)


#: NVIDIA A100, H100, H200 and HGX B200 data sheets (per GPU, half of the rates "with sparsity"); AMD MI300X data sheet.
ACCELERATORS = (
    Accelerator("A100 80GB SXM", "sm_80", 312e12, 9.7e12, 2039e9),
    Accelerator("H100 SXM", "sm_90", 989e12, 34e12, 3350e9),
    Accelerator("H200", "sm_90", 989e12, 34e12, 4800e9),
    Accelerator("B200", "sm_100", 2250e12, 37e12, 8000e9),
    Accelerator("MI300X", "gfx942", 1307e12, 81.7e12, 5300e9),
)
