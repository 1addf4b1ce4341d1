"""Argument checks shared by all ops. Every message names the argument, what was expected and what came.

The checks read shapes, dtypes and devices, never values: they cost no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32)

#: Sizes and positions are 32-bit numbers in kernels.
INT_LIMIT = 2**31

# The ops compute in at least float32; options reach their kernels as numbers of that.
_FLOAT32 = torch.finfo(torch.float32)


def check_option(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}; got {value!r}")


def check_int(name: str, value: object, *, minimum: int, bounded: bool = True) -> None:
    """Raise TypeError / ValueError unless ``value`` is an int of at least ``minimum`` and, ``bounded``, below 2^31."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    if bounded and value >= INT_LIMIT:
        raise ValueError(f"{name}: expected less than 2^31, got {value}")


def check_positive(name: str, value: object) -> None:
    """Raise TypeError / ValueError unless ``value`` is a number above zero that float32 holds in full precision."""
    _check_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    if not _FLOAT32.tiny <= value <= _FLOAT32.max:
        raise ValueError(
            f"{name}: expected what float32 can hold, {_FLOAT32.tiny:.3g} to {_FLOAT32.max:.3g}, got {value}"
        )


def check_finite(name: str, value: object) -> None:
    """Raise TypeError / ValueError unless ``value`` is 0 or a finite number that float32 holds in full precision."""
    _check_number(name, value)
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if value and not _FLOAT32.tiny <= abs(value) <= _FLOAT32.max:
        raise ValueError(
            f"{name}: expected 0 or what float32 can hold, {_FLOAT32.tiny:.3g} to {_FLOAT32.max:.3g}, got {value}"
        )


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_tensor(
    name: str,
    x: object,
    shape: str,
    sizes: dict[str, int],
    *,
    dtype: Iterable[torch.dtype] | torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Check type, shape, dtype and device of one tensor argument.

    Args:
        name: the argument's name, for the message.
        x: the argument.
        shape: space-separated letters of the shape alphabet, for example ``"B H S D"``; a number stands for itself,
            and ``...`` at the beginning or the end for any number of dimensions.
        sizes: what is already known of the letters. Letters seen here for the first time are entered into it, so that
            later arguments are checked against earlier ones.
        dtype: what is accepted; None accepts anything.
        device: what is required; None accepts anything.

    Raises:
        TypeError: ``x`` is no tensor, or has another dtype.
        ValueError: another shape or another device.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor [{', '.join(shape.split())}], got {type(x).__name__}")
    letters = shape.split()
    named = [letter for letter in letters if letter != "..."]
    surplus = x.ndim - len(named)
    actual = x.shape[surplus:] if letters[0] == "..." and surplus >= 0 else x.shape[: len(named)]
    expected = [int(letter) if letter.isdigit() else sizes.get(letter) for letter in named]
    if (
        surplus < 0
        or (surplus > 0 and len(named) == len(letters))
        or any(e is not None and e != a for e, a in zip(expected, actual, strict=True))
    ):
        known = (f"{letter}={sizes[letter]}" if letter in sizes else letter for letter in letters)
        raise ValueError(f"{name}: expected shape [{', '.join(known)}], got {list(x.shape)}")
    for letter, size in zip(named, actual, strict=True):
        if not letter.isdigit():
            sizes.setdefault(letter, size)
    if dtype is not None:
        check_dtype(name, x, dtype)
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def check_dtype(name: str, x: Tensor, dtype: Iterable[torch.dtype] | torch.dtype) -> None:
    """Raise TypeError unless ``x`` has the dtype, or one of the dtypes, ``dtype``."""
    accepted = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    if x.dtype not in accepted:
        names = " or ".join(str(d).removeprefix("torch.") for d in accepted)
        raise TypeError(f"{name}: expected dtype {names}, got {str(x.dtype).removeprefix('torch.')}")
