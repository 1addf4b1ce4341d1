// Softmax statistics of logits that are known tile by tile, and the gradient of a tile, on several threads.
#pragma once

#include "kernels.h"

namespace ebft::cpu {

// Columns `first` to `first + columns` of the logits of some rows, contiguous; sums are float32 (float64 for float64).
// Each row has any number of targets; T of all rows of all tiles lie row after row.
struct LogitsTile {
  Dtype dtype;
  void* data;  // [rows, columns]
  int64_t rows, columns, first;
  const int64_t* targets;  // [T], counted from column 0
  const int64_t* offsets;  // [rows + 1], where the targets of each row begin
  double factor;
  double softcap;  // the logits are softcap * tanh(factor * data), or factor * data where it is 0
};

// Brings the largest logit so far and the sum of exp(logit - largest), each [rows], and the logits of the targets that
// are in this tile, [T], up to date.
void softmax_add(const Execution& execution, const LogitsTile& tile, void* largest, void* total, void* at_target);

// Overwrites the tile with the sum of upstream * (softmax - onehot(target)) over a row's targets, times the slope of
// tanh, from the largest logit, the logarithm of the sum and the sum of upstream, each [rows], and upstream [T].
void softmax_gradient(const Execution& execution, const LogitsTile& tile, const void* largest, const void* log_total,
                      const void* whole_upstream, const void* upstream);

// Logits [rows, columns], contiguous, in blocks of `size` columns, of which the last may be shorter.
struct LogitsBlocks {
  Dtype dtype;
  const void* data;
  int64_t rows, columns, size;

  int64_t per_row() const { return (columns + size - 1) / size; }
};

// Brings the largest logit and the sum of exp(logit - largest) of each block, each [rows, blocks], up to date.
void softmax_blocks(const Execution& execution, const LogitsBlocks& blocks, void* largest, void* total);

}  // namespace ebft::cpu
