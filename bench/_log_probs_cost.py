"""Operations and bytes of log-probabilities from hidden states, by several ways to compute them."""

from __future__ import annotations

from typing import NamedTuple

from ebft_kernels.logprob._tiled import tile_shape

from .shapes import ModelShape

#: Goal: time over that of the products alone, recomputation included.
LOG_PROBS_GOAL = 1.6
#: Goal: bytes besides inputs, outputs and statistics.
LOG_PROBS_MEMORY = 600e6
#: bf16 operations and bytes per second of an H100: a product of 8192 x 8192 matrices, and a copy.
RATES = 798e12, 3.0e12
#: Of the scored rows: a row for each of the 127 anchors of a prompt of 1024 tokens, times 4 samples and 8 tokens.
ROWS = 4064
#: Bytes of a logit, and of a number of the gradients: bfloat16, and float32 where sums are kept.
_SHORT, _WIDE = 2, 4
# An accumulator of 128 rows and this many channels is half of the registers of a processor.
_CHANNELS = 256


class LogProbsCost(NamedTuple):
    """One way to compute log-probabilities and all gradients.

    Attributes:
        how: in words.
        products: matrix products of rows x channels x vocabulary.
        operations: of all of them.
        logits: bytes of logits that are written and read outside the products that use them up.
        gradients: bytes by which gradients are summed up over tiles.
        memory: bytes held besides inputs, outputs and statistics.
    """

    how: str
    products: int
    operations: int
    logits: int
    gradients: int
    memory: int

    @property
    def seconds(self) -> float:
        """Of the products, and of the bytes one after the other with them."""
        return self.operations / RATES[0] + (self.logits + self.gradients) / RATES[1]


def log_probs_costs(model: ModelShape, rows: int = ROWS) -> list[LogProbsCost]:
    """The products alone, then the ways."""
    channels, vocabulary = model.hidden, model.vocab
    logits, hidden, weight = rows * vocabulary, rows * channels, vocabulary * channels
    tile = tile_shape(rows, vocabulary, _WIDE, None, "cuda")
    narrow = max(256, (256 << 20) // (_WIDE * vocabulary)), vocabulary

    def cost(how: str, products: int, per_logit: int, tile: tuple[int, int], per_tile_logit: int) -> LogProbsCost:
        row_tiles, column_tiles = (-(-size // part) for size, part in zip((rows, vocabulary), tile, strict=True))
        sums = gradient_bytes(hidden, column_tiles) + gradient_bytes(weight, row_tiles)
        held = tile[0] * tile[1] * per_tile_logit
        held += (_WIDE + _SHORT) * (hidden * (column_tiles > 1) + weight * (row_tiles > 1))
        return LogProbsCost(how, products, 2 * products * hidden * vocabulary, per_logit * logits, sums, held)

    half = tile[0], tile[1] // 2
    repeats = -(-channels // _CHANNELS)
    return [
        cost("products alone, logits kept", 3, 0, (rows, vocabulary), 0)._replace(gradients=0, memory=_SHORT * logits),
        cost("products alone, logits twice", 4, 0, (rows, vocabulary), 0)._replace(gradients=0),
        cost("large tiles, one kernel per pass", 4, pass_bytes(_SHORT), tile, _SHORT),
        cost("the same, logits in float32", 4, pass_bytes(_WIDE, _SHORT), half, _WIDE + _SHORT),
        cost("large tiles, passes of PyTorch", 4, pytorch_pass_bytes(_SHORT), tile, _SHORT + _WIDE),
        cost("tiles of all columns, passes of PyTorch", 4, pytorch_pass_bytes(_SHORT), narrow, _SHORT + _WIDE),
        cost("logits in registers", 3 + 2 * repeats, 0, (rows, vocabulary), 0),
    ]


def pass_bytes(itemsize: int, gradient: int | None = None) -> int:
    """Per logit: written by the product and read by the kernel, which on the way back writes its gradient."""
    return 2 * itemsize + 2 * itemsize + (itemsize if gradient is None else gradient)


def pytorch_pass_bytes(itemsize: int) -> int:
    """Per logit in float32: cast, largest, difference, exponential, sum; cast, two differences, exponential, product,
    cast. Every pass in place reads and writes."""
    forward = itemsize + (itemsize + _WIDE) + _WIDE + 2 * _WIDE + 2 * _WIDE + _WIDE
    return forward + itemsize + (itemsize + _WIDE) + 4 * 2 * _WIDE + (_WIDE + itemsize)


def gradient_bytes(numbers: int, tiles: int) -> int:
    """Of a gradient: written once by the product, or zeros to which the products of ``tiles`` are added, then cast."""
    if tiles == 1:
        return _SHORT * numbers
    return numbers * (_WIDE + tiles * (2 * _SHORT + 2 * _WIDE) + _WIDE + _SHORT)
