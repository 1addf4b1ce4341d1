// Feature matching of one anchor, given the inner products of its n rollouts x_i and its target y (arXiv:2603.12248).
//
// The caller computes a Gram matrix for each part of the features that is whitened separately and hands them over one
// after the other: matching_begin, matching_add for each part, matching_finish. All of it is float64: directions are
// dropped at 1e-5 of the largest singular value, which is 1e-10 of the largest eigenvalue of the Gram matrix.
#pragma once

#include "config.h"
#include "eigen.h"

namespace ebft {

enum class Whitening : int { none, sample, feature };
enum class Estimator : int { rloo, reinforce, group_norm };

struct MatchingOptions {
  Whitening whitening;
  Estimator estimator;
  double alignment_coef;
  double diversity_coef;
};

// Where the results of one anchor go: one number, and n each.
template <class T>
struct MatchingResults {
  T* loss;
  T* alignment;
  T* diversity;
  T* reward;
  T* advantage;
};

// Doubles that the caller provides for `Matching::memory`.
EBFT_FN constexpr int64_t matching_memory(int64_t n) { return 3 * n * n + 5 * n; }

// The sums over the parts of F, and scratch.
template <class Size>
struct Matching {
  Size n;
  double* memory;
  double loss;

  EBFT_FN double* products() { return memory; }                    // [n,n] whitened rollouts with each other
  EBFT_FN double* matrix() { return memory + n * n; }              // [n,n] scratch
  EBFT_FN double* vectors() { return memory + 2 * n * n; }         // [n,n] scratch
  EBFT_FN double* cross() { return memory + 3 * n * n; }           // [n] each rollout with the target as it meets it
  EBFT_FN double* target() { return memory + 3 * n * n + n; }      // [n] square of the target as each rollout meets it
  EBFT_FN double* row(int i) { return memory + 3 * n * n + (2 + i) * n; }  // [n] scratch, i < 3
};

template <class Size>
EBFT_FN Matching<Size> matching_begin(Size n, double* memory) {
  Matching<Size> m{n, memory, 0.0};
  for (int i = 0; i < n * n; ++i) m.products()[i] = 0;
  for (int i = 0; i < n; ++i) m.cross()[i] = m.target()[i] = 0;
  return m;
}

// || mean_j x_j - y ||^2 of one part, from its Gram matrix [n+1,n+1].
template <class Size>
EBFT_FN double squared_distance(Size n, const double* gram) {
  double pairs = 0, cross = 0;
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < n; ++k) pairs += gram[i * (n + 1) + k];
    cross += gram[i * (n + 1) + n];
  }
  return pairs / (double(n) * n) - 2 * cross / n + gram[n * (n + 1) + n];
}

// The power of two that brings the largest diagonal element of K to between 1/2 and 1; 0 if K is not finite, or zero.
template <class Size>
EBFT_FN double scale_of(Size n, const double* gram) {
  double largest = 0;
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < n; ++k) {
      if (!is_finite(gram[i * (n + 1) + k])) return 0;
    }
    largest = gram[i * (n + 1) + i] > largest ? gram[i * (n + 1) + i] : largest;
  }
  int exponent = 0;
  frexp(largest, &exponent);
  exponent = exponent > 1000 ? 1000 : exponent < -1000 ? -1000 : exponent;
  return largest > 0 ? ldexp(1.0, -exponent) : 0;
}

// Adds a part of F that is whitened on its own. With K = sum_e lambda_e u_e u_e^T over the directions that are kept:
//
//   sample:   W = sum_e lambda_e^(-1/2) u_e u_e^T; rollout i meets (sum_j W_ij) y
//   feature:  <x_i, y> = (K^+ v)_i and |y| = |K^+ v|
//
// and both give <x_i, x_k> = (sum_e u_e u_e^T)_ik. A part that is not finite counts as K = 0, and as NaN through v.
template <class Size>
EBFT_FN void add_whitened(Matching<Size>& m, const double* gram, Whitening whitening) {
  const Size n = m.n;
  const int width = n + 1;
  const double scale = scale_of(n, gram), cutoff = 1e-10;
  double *a = m.matrix(), *u = m.vectors(), *met = m.row(0), *row_sum = m.row(1);
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < n; ++k) a[i * n + k] = scale > 0 ? gram[i * width + k] * scale : 0;
    met[i] = row_sum[i] = 0;
  }
  symmetric_eigen(n, a, u);
  double largest = 0;
  for (int e = 0; e < n; ++e) largest = a[e * n + e] > largest ? a[e * n + e] : largest;
  int rank = 0;
  for (int e = 0; e < n; ++e) rank += a[e * n + e] > cutoff * largest;
  // The projection is summed over the directions that are kept, or taken off by those that are dropped, whichever are
  // fewer: it is exactly the identity when nothing is dropped.
  const bool by_kept = 2 * rank < n;
  for (int i = 0; !by_kept && i < n; ++i) m.products()[i * n + i] += 1;
  for (int e = 0; e < n; ++e, u += n) {
    const double value = a[e * n + e];
    const bool kept = value > cutoff * largest;
    double along_v = 0, along_ones = 0, inverse = 0;
    for (int i = 0; i < n; ++i) {
      along_v += u[i] * gram[i * width + n];
      along_ones += u[i];
    }
    if (kept) inverse = whitening == Whitening::sample ? sqrt(scale / value) : scale / value;
    for (int i = 0; i < n; ++i) {
      met[i] += u[i] * inverse * along_v;
      row_sum[i] += u[i] * inverse * along_ones;
      for (int k = 0; kept == by_kept && k < n; ++k) {
        m.products()[i * n + k] += by_kept ? u[i] * u[k] : -(u[i] * u[k]);
      }
    }
  }
  double square = 0;
  for (int i = 0; i < n; ++i) square += met[i] * met[i];
  for (int i = 0; i < n; ++i) {
    const bool sample = whitening == Whitening::sample;
    m.cross()[i] += sample ? row_sum[i] * met[i] : met[i];
    m.target()[i] += sample ? row_sum[i] * row_sum[i] * gram[n * width + n] : square;
  }
}

// Adds one part of F, from its Gram matrix [n+1,n+1] of the rollouts and, last, the target.
template <class Size>
EBFT_FN void matching_add(Matching<Size>& m, const double* gram, Whitening whitening) {
  const Size n = m.n;
  m.loss += squared_distance(n, gram);
  if (whitening != Whitening::none) return add_whitened(m, gram, whitening);
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < n; ++k) m.products()[i * n + k] += gram[i * (n + 1) + k];
    m.cross()[i] += gram[i * (n + 1) + n];
    m.target()[i] += gram[n * (n + 1) + n];
  }
}

// What each of n rewards gained over its baseline.
template <class Size>
EBFT_FN double advantage_of(Size n, int i, const double* alignment, const double* diversity, const double* reward,
                            const MatchingOptions& options) {
  if (options.estimator == Estimator::reinforce) return reward[i];
  if (options.estimator == Estimator::group_norm) {
    double mean = 0, square = 0;
    for (int k = 0; k < n; ++k) mean += reward[k];
    mean /= n;
    for (int k = 0; k < n; ++k) square += (reward[k] - mean) * (reward[k] - mean);
    const double spread = n > 1 ? sqrt(square / (n - 1)) : 0;
    return (reward[i] - mean) / (spread + 1e-9);
  }
  double advantage = reward[i];
  double alignments = 0, diversities = 0;
  for (int k = 0; k < n; ++k) {
    alignments += alignment[k];
    diversities += diversity[k];
  }
  if (n > 1) advantage -= options.alignment_coef / (n - 1) * (alignments - alignment[i]);
  // The diversity that the others would have had without rollout i: each of theirs contains it.
  if (n > 2) advantage += options.diversity_coef / (n - 2) * (diversities - 2 * diversity[i]);
  return advantage;
}

template <class Size, class T>
EBFT_FN void matching_finish(Matching<Size>& m, const MatchingOptions& options, MatchingResults<T> results) {
  const Size n = m.n;
  const double epsilon = 1e-8;  // as torch.nn.functional.cosine_similarity
  double *alignment = m.row(0), *diversity = m.row(1), *reward = m.row(2);
  for (int i = 0; i < n; ++i) {
    const double norm = at_least(sqrt(at_least(m.products()[i * n + i], 0)), epsilon);
    const double target_norm = at_least(sqrt(at_least(m.target()[i], 0)), epsilon);
    alignment[i] = 2 * m.cross()[i] / (norm * target_norm);
    double others = 0;
    for (int k = 0; k < n; ++k) others += k == i ? 0 : m.products()[i * n + k];
    diversity[i] = n > 1 ? others * (2.0 / (n - 1)) : 0;
    reward[i] = options.alignment_coef * alignment[i] - options.diversity_coef * diversity[i];
  }
  *results.loss = T(at_least(m.loss, 0));
  for (int i = 0; i < n; ++i) {
    results.alignment[i] = T(alignment[i]);
    results.diversity[i] = T(diversity[i]);
    results.reward[i] = T(reward[i]);
    results.advantage[i] = T(advantage_of(n, i, alignment, diversity, reward, options));
  }
}

}  // namespace ebft
