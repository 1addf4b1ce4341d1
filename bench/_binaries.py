"""What a compiled kernel says about itself: registers, spills, shared memory, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

# Matrix units: Ampere to Ada and consumer Blackwell, Hopper, data-centre Blackwell, AMD.
TENSOR_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "MFMA")
# From global memory to registers or straight to shared memory, and back; B128 is AMD's 16 bytes per lane.
WIDE_LOADS = ("LDG.128", "LDGSTS.128", "UTMALDG")
WIDE_STORES = ("STG.128", "UTMASTG")


class Binary(NamedTuple):
    """One compiled kernel.

    Attributes:
        registers: per thread (AMD: vector registers of both kinds per lane).
        spilled: bytes per thread (AMD: registers) that went to memory for want of registers.
        shared: bytes of shared memory per program.
        tensor_columns: columns of tensor memory per program.
        multiplies_16_bit: whether the program that was compiled holds a matrix product of 16-bit operands.
        instructions: how often each instruction of interest stands in the code.
    """

    registers: int
    spilled: int
    shared: int
    tensor_columns: int
    multiplies_16_bit: bool
    instructions: dict[str, int]

    def has(self, instructions: tuple[str, ...]) -> bool:
        """Whether one of them stands in the code."""
        return any(self.instructions.get(name) for name in instructions)


def read_binary(compiled: Any) -> Binary:
    """Read what Triton's compiler returned."""
    asm, metadata = compiled.asm, compiled.metadata
    common = {
        "shared": metadata.shared,
        "tensor_columns": getattr(metadata, "tmem_size", 0) or 0,
        "multiplies_16_bit": multiplies_16_bit(asm["ttir"]),
    }
    if "amdgcn" in asm:
        return Binary(**amd_resources(asm["amdgcn"]), instructions=amd_instructions(asm["amdgcn"]), **common)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(asm["cubin"])
        resources = nvidia_resources(tool("cuobjdump", "-res-usage", str(path)))
        instructions = nvidia_instructions(tool("nvdisasm", "-c", str(path)))
    return Binary(**resources, instructions=instructions, **common)


def multiplies_16_bit(ttir: str) -> bool:
    """Whether Triton's own intermediate code holds a ``tt.dot`` of float16 or bfloat16 operands."""
    return re.search(r"tt\.dot .*: tensor<\d+x\d+x(?:bf16|f16)>", ttir) is not None


def nvidia_resources(usage: str) -> dict[str, int]:
    """Registers and stack of the one function in the output of ``cuobjdump -res-usage``.

    The kernels have no arrays of their own, so what stands on the stack was spilled there.
    """
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def nvidia_instructions(code: str) -> dict[str, int]:
    """Counts in disassembled code; "LDG.128" is a 16-byte load from global memory whatever its cache hints are."""
    counts: Counter[str] = Counter()
    for name in re.findall(r"\b((?:HMMA|HGMMA|UTCHMMA|LDG|STG|LDGSTS|UTMALDG|UTMASTG)(?:\.\w+)*)\b", code):
        family, *modifiers = name.split(".")
        if family.startswith(("LDG", "STG")):
            width = next((x for x in ("128", "64") if x in modifiers), "32 or less")
            family = f"{family}.{width}"
        counts[family] += 1
    return dict(counts)


def amd_resources(code: str) -> dict[str, int]:
    """Registers and spills from the metadata at the end of AMD assembly."""
    found = {name: int(value) for name, value in re.findall(r"^\s+[-.\s]*\.(\w+):\s+(\d+)$", code, flags=re.M)}
    return {"registers": found["vgpr_count"], "spilled": found["vgpr_spill_count"] + found["sgpr_spill_count"]}


def amd_instructions(code: str) -> dict[str, int]:
    """Counts in AMD assembly, under the names used for NVIDIA's loads and stores."""
    counts: Counter[str] = Counter()
    for name in re.findall(r"^\s+(v_mfma\w*|(?:global|buffer)_(?:load|store)_\w+)", code, flags=re.M):
        if name.startswith("v_mfma"):
            counts["MFMA"] += 1
        else:
            kind = "LDG" if "_load_" in name else "STG"
            width = {"dwordx4": "128", "dwordx2": "64"}.get(name.rsplit("_", 1)[-1], "32 or less")
            counts[f"{kind}.{width}"] += 1
    return dict(counts)


def tool(name: str, *arguments: str) -> str:
    """What one of NVIDIA's tools says, of those that Triton brings along."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout
