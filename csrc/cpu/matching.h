// Feature matching and the mean-embedding loss of many anchors, on several threads.
#pragma once

#include "../core/matching.h"
#include "kernels.h"

#include <vector>

namespace ebft::cpu {

// A tensor [leading..., n, F] or [leading..., F] whose last axis is contiguous. One stride, in bytes, for each leading
// axis and, for rollouts, one for the axis of length n.
struct Operand {
  const void* data;
  std::vector<int64_t> strides;
};

// The features of rollouts [leading..., n, F] and targets [leading..., F].
struct Features {
  Dtype dtype;
  std::vector<int64_t> leading;
  int rollouts_per_anchor;
  int64_t features;
  Operand rollouts;
  Operand targets;

  int64_t anchors() const;
};

// The addresses of contiguous results, [leading...] and four times [leading..., n]; float64 for float64 features, else
// float32.
struct MatchingOutputs {
  void* loss;
  void* alignment;
  void* diversity;
  void* reward;
  void* advantage;
};

// `groups` divides the number of features.
void feature_matching(const Execution& execution, const Features& features, int groups, const MatchingOptions& options,
                      const MatchingOutputs& outputs);

// Writes the loss [leading...] and mean_j x_j - y [leading..., F], contiguous, of the type of MatchingOutputs.
void mean_embedding_forward(const Execution& execution, const Features& features, bool unbiased, void* loss,
                            void* difference);

// Writes the gradients of the rollouts [leading..., n, F] and the targets [leading..., F], contiguous, in the type of
// the features, from the upstream gradient [leading...] and the difference that the forward pass wrote, both
// contiguous. Does not read the targets, and the rollouts only if `unbiased`.
void mean_embedding_backward(const Execution& execution, const Features& features, bool unbiased, const void* grad,
                             const void* difference, void* grad_rollouts, void* grad_targets);

}  // namespace ebft::cpu
