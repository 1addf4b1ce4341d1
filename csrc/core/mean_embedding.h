// The mean-embedding loss || mean_j x_j - y ||^2 of one anchor and its gradients (arXiv:2603.12248).
//
// unbiased: the terms k = j of the mean of <x_j, x_k> are left out, which takes the spread of the rollouts off again:
//
//   1/(n(n-1)) sum_{j != k} <x_j, x_k> = |mean|^2 - sum_j |x_j - mean|^2 / (n(n-1))
//
// This form does not cancel: the loss is a sum of squares of differences less another one.
#pragma once

#include "config.h"

namespace ebft {

EBFT_FN double mean_embedding_loss(int n, bool unbiased, double squared_difference, double squared_spread) {
  return unbiased ? squared_difference - squared_spread / (double(n) * (n - 1)) : squared_difference;
}

// d(loss)/dy = target * (mean - y);  d(loss)/dx_j = rollout * (mean - y) + spread * (x_j - mean).
struct MeanEmbeddingGradient {
  double target;
  double rollout;
  double spread;
};

// For the upstream gradient `grad` of the loss.
EBFT_FN MeanEmbeddingGradient mean_embedding_gradient(int n, bool unbiased, double grad) {
  return {-2 * grad, 2 * grad / n, unbiased ? -2 * grad / (double(n) * (n - 1)) : 0};
}

}  // namespace ebft
