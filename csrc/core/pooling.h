// Pooling of hidden states (arXiv:2603.12248): the feature of one token is its hidden states at L layers side by side,
// divided by their norm; the feature of a rollout, or of a window of ground truth, is made of those of its K tokens.
#pragma once

#include "config.h"

namespace ebft {

// In the order of the tables in ebft_kernels/pooling/modes.py; a test compares the names.
enum class Pooling : int { last_token, mean, concat, token };
constexpr const char* pooling_names[] = {"last_token", "mean", "concat", "token"};
constexpr int poolings = sizeof pooling_names / sizeof *pooling_names;

enum class Normalization : int { joint, per_layer, none };
constexpr const char* normalization_names[] = {"joint", "per_layer", "none"};
constexpr int normalizations = sizeof normalization_names / sizeof *normalization_names;

// Where the hidden state of one layer of one token stands in a feature, in elements.
struct FeatureLayout {
  int64_t size;  // of the feature of one rollout, or window
  int64_t layer;
  int64_t step;

  EBFT_FN FeatureLayout(Pooling pooling, int64_t layers, int64_t steps, int64_t channels)
      : size(layers * channels), layer(channels), step(0) {
    if (pooling == Pooling::concat || pooling == Pooling::token) size *= steps;
    if (pooling == Pooling::token) step = layers * channels;
    if (pooling == Pooling::concat) {
      layer = steps * channels;
      step = channels;
    }
  }
};

// As torch.nn.functional.normalize.
constexpr double shortest_token = 1e-12;

// 1 / norm, from the square of the norm.
EBFT_FN double token_scale(double square) { return 1 / at_least(sqrt(square), shortest_token); }

// d/dx of <x / |x|, g> = grad * g + token * x
struct TokenGradient {
  double grad;
  double token;
};

// From |x|^2 and <x, g>. A token so short that it is divided by a constant has no part along itself to lose.
EBFT_FN TokenGradient token_gradient(double square, double along) {
  const double scale = token_scale(square);
  return {scale, sqrt(square) > shortest_token ? -along * scale * scale * scale : 0};
}

}  // namespace ebft
