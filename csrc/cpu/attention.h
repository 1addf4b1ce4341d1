// One decoding step of strided attention, on several threads.
#pragma once

#include "kernels.h"
#include "layout.h"

namespace ebft::cpu {

// A tensor [B, heads, rows, size] whose last axis is contiguous; strides in bytes.
struct HeadTensor {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct StepSizes {
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;   // divides `heads`: neighbouring heads share keys and values
  int64_t key_size;   // D
  int64_t value_size; // Dv
  PackedSizes packed;
  int64_t step;
};

struct StepOptions {
  double scale;
  double softcap;  // 0: none
  int64_t window;  // 0: none
};

// Writes attention [B, A*n, H, Dv], contiguous, of the queries [B, H, A*n, D] of one step to the keys [B, Hkv, S, D] and
// values [B, Hkv, S, Dv] of their prefix and of their own rollout. `ranges` are
// without the window; `sinks` [H], or null. Throws std::out_of_range if a row sees what no rollout can see.
void strided_attention_step(const Execution& execution, Dtype dtype, const StepSizes& sizes, const HeadTensor& queries,
                            const HeadTensor& keys, const HeadTensor& values, const double* sinks,
                            const KeyRanges& ranges, const StepOptions& options, void* out);

}  // namespace ebft::cpu
