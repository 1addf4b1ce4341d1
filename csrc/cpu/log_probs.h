// Softmax statistics of logits that are known tile by tile, and the gradient of a tile, on several threads.
#pragma once

#include "kernels.h"

namespace ebft::cpu {

// Columns `first` to `first + columns` of the logits of some rows, contiguous; sums are float32 (float64 for float64).
struct LogitsTile {
  Dtype dtype;
  void* data;  // [rows, columns]
  int64_t rows, columns, first;
  const int64_t* targets;  // [rows], counted from column 0
  double softcap;          // the logits are softcap * tanh(data), or data itself where it is 0
};

// Brings the largest logit so far, the sum of exp(logit - largest) and, if it is in this tile, the logit of the target,
// each [rows], up to date.
void softmax_add(const Execution& execution, const LogitsTile& tile, void* largest, void* total, void* at_target);

// Overwrites the tile with upstream * (softmax - onehot(target)) * d logits / d data, from the largest logit, the
// logarithm of the sum and upstream, each [rows].
void softmax_gradient(const Execution& execution, const LogitsTile& tile, const void* largest, const void* log_total,
                      const void* upstream);

}  // namespace ebft::cpu
