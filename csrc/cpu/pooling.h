// Pooling of hidden states into features, on several threads.
#pragma once

#include "../core/pooling.h"
#include "kernels.h"

#include <vector>

namespace ebft::cpu {

// One layer [B, S, C] whose last axis is contiguous; strides in bytes.
struct Layer {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
};

// The tokens of rollouts and windows: which rows of the packed hidden states they are, and which count.
struct Tokens {
  int64_t batch;                // B
  int64_t packed;               // S
  int64_t anchors;              // A
  int64_t samples;              // n
  int64_t steps;                // K
  const int64_t* rollout_rows;  // [B, A, n, K]
  const int64_t* target_rows;   // [B, A, K]
  const bool* counted;          // [B, A, K], or null: all count

  int64_t rollouts() const { return batch * anchors * samples; }
  int64_t targets() const { return batch * anchors; }
};

struct PoolingOptions {
  Pooling pooling;
  Normalization normalization;
};

// Writes the features of rollouts and windows, contiguous, in float32 (float64 for float64 hidden states). Throws
// std::out_of_range if a row is not below S.
void pool_features(const Execution& execution, Dtype dtype, const std::vector<Layer>& layers, int64_t channels,
                   const Tokens& tokens, const PoolingOptions& options, void* rollouts, void* targets);

// Writes the gradients of all hidden states to `grads`, in their type, from those of the features: each row of `grads`
// once, the contributions of overlapping windows added in their order.
void pool_features_backward(const Execution& execution, Dtype dtype, const std::vector<Layer>& layers,
                            int64_t channels, const Tokens& tokens, const PoolingOptions& options,
                            const void* grad_rollouts, const void* grad_targets, const std::vector<Layer>& grads);

}  // namespace ebft::cpu
