#include "pooling.h"

#include "memory.h"
#include "parallel.h"

#include <stdexcept>

namespace ebft::cpu {
namespace {

// Rollouts and windows alike are items: first the B*A*n rollouts, then the B*A windows.
struct Item {
  int64_t batch;
  int64_t anchor;       // b * A + a
  int64_t number;       // among the rollouts, or among the windows
  bool is_target;
  const int64_t* rows;  // [K]
};

Item item_of(const Tokens& tokens, int64_t i) {
  const bool is_target = i >= tokens.rollouts();
  const int64_t number = is_target ? i - tokens.rollouts() : i;
  const int64_t anchor = is_target ? number : number / tokens.samples;
  return {anchor / tokens.anchors, anchor, number, is_target,
          (is_target ? tokens.target_rows : tokens.rollout_rows) + number * tokens.steps};
}

bool counts(const Tokens& tokens, int64_t anchor, int64_t step) {
  return !tokens.counted || tokens.counted[anchor * tokens.steps + step];
}

double weight_of(const Tokens& tokens, const PoolingOptions& options, const Item& item, int64_t step) {
  if (!counts(tokens, item.anchor, step)) return 0;
  return options.pooling == Pooling::mean ? 1.0 / double(tokens.steps) : 1;
}

char* row_of(const Layer& layer, int64_t batch, int64_t row) {
  return static_cast<char*>(layer.data) + batch * layer.batch_stride + row * layer.row_stride;
}

void check_rows(const Tokens& tokens) {
  const int64_t items = tokens.rollouts() + tokens.targets();
  for (int64_t i = 0; i < items; ++i) {
    const Item item = item_of(tokens, i);
    for (int64_t k = 0; k < tokens.steps; ++k) {
      if (item.rows[k] < 0 || item.rows[k] >= tokens.packed) throw std::out_of_range("rows: one is not below S");
    }
  }
}

// For every packed row the tokens that are made of it and count: (item, step) as item * K + step, of row r those from begin[r] to
// begin[r + 1], in ascending order.
struct Uses {
  std::vector<int64_t> begin;
  std::vector<int64_t> tokens;
  int64_t most = 0;

  explicit Uses(const Tokens& t) : begin(t.batch * t.packed + 1), tokens((t.rollouts() + t.targets()) * t.steps) {
    const auto for_each_token = [&](auto&& visit) {
      for (int64_t i = 0; i < t.rollouts() + t.targets(); ++i) {
        const Item item = item_of(t, i);
        for (int64_t k = 0; k < t.steps; ++k) {
          if (counts(t, item.anchor, k)) visit(item.batch * t.packed + item.rows[k], i * t.steps + k);
        }
      }
    };
    for_each_token([&](int64_t row, int64_t) { ++begin[row + 1]; });
    for (size_t row = 1; row < begin.size(); ++row) {
      most = std::max(most, begin[row]);
      begin[row] += begin[row - 1];
    }
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for_each_token([&](int64_t row, int64_t token) { tokens[next[row]++] = token; });
  }
};

}  // namespace

void pool_features(const Execution& execution, Dtype dtype, const std::vector<Layer>& layers, int64_t channels,
                   const Tokens& tokens, const PoolingOptions& options, void* rollouts, void* targets) {
  check_rows(tokens);
  const Kernels& kernels = kernels_for(execution.isa, dtype);
  const int64_t items = tokens.rollouts() + tokens.targets(), steps = tokens.steps, depth = int64_t(layers.size());
  const int64_t sum_bytes = element_bytes(sum_dtype(dtype));
  const FeatureLayout place(options.pooling, depth, steps, channels);
  const int threads =
      thread_count(execution.threads, items, items * steps * depth * channels * element_bytes(dtype));
  expect_writes(rollouts, tokens.rollouts() * place.size * sum_bytes);
  expect_writes(targets, tokens.targets() * place.size * sum_bytes);
  Scratch<const void*> row_scratch(threads, steps);
  // What stands for tokens that do not count: what these hold may be no number, and 0 times that is none either.
  const std::vector<char> nothing(size_t(channels * element_bytes(dtype)));
  Scratch<double> scale_scratch(threads, steps * depth);
  for_each(items, threads, [&](int64_t i, int thread) {
    const Item item = item_of(tokens, i);
    double* scales = scale_scratch.of(thread);  // [L, K]
    for (int64_t k = 0; k < steps; ++k) {
      const double weight = weight_of(tokens, options, item, k);
      double joint = 0;
      for (int64_t l = 0; l < depth; ++l) {
        double& scale = scales[l * steps + k] = weight;
        if (options.normalization == Normalization::none || weight == 0) continue;
        const double square = kernels.square(row_of(layers[l], item.batch, item.rows[k]), channels);
        scale *= token_scale(square);
        joint += square;
      }
      for (int64_t l = 0; options.normalization == Normalization::joint && weight != 0 && l < depth; ++l) {
        scales[l * steps + k] = weight * token_scale(joint);
      }
    }
    char* out = static_cast<char*>(item.is_target ? targets : rollouts) + item.number * place.size * sum_bytes;
    const void** rows = row_scratch.of(thread);
    for (int64_t l = 0; l < depth; ++l) {
      for (int64_t k = 0; k < steps; ++k) {
        rows[k] = counts(tokens, item.anchor, k) ? row_of(layers[l], item.batch, item.rows[k]) : nothing.data();
      }
      const double* scale = scales + l * steps;
      char* to = out + l * place.layer * sum_bytes;
      if (options.pooling == Pooling::mean) {
        kernels.weighted_sum(rows, scale, int(steps), channels, to);
        continue;
      }
      for (int64_t k = 0; k < steps; ++k) {
        kernels.weighted_sum(rows + k, scale + k, 1, channels, to + k * place.step * sum_bytes);
      }
    }
  });
}

void pool_features_backward(const Execution& execution, Dtype dtype, const std::vector<Layer>& layers,
                            int64_t channels, const Tokens& tokens, const PoolingOptions& options,
                            const void* grad_rollouts, const void* grad_targets, const std::vector<Layer>& grads) {
  check_rows(tokens);
  const Uses uses(tokens);
  const Kernels& kernels = kernels_for(execution.isa, dtype);
  const int64_t rows = tokens.batch * tokens.packed, depth = int64_t(layers.size());
  const int64_t sum_bytes = element_bytes(sum_dtype(dtype));
  const FeatureLayout place(options.pooling, depth, tokens.steps, channels);
  const int threads = thread_count(execution.threads, rows, rows * depth * channels * element_bytes(dtype));
  for (const Layer& grad : grads) expect_writes(grad.data, rows * channels * element_bytes(dtype));
  Scratch<const void*> grad_scratch(threads, uses.most * depth);
  Scratch<double> scale_scratch(threads, uses.most + 2 * depth);
  for_each(rows, threads, [&](int64_t row, int thread) {
    const int64_t batch = row / tokens.packed, position = row % tokens.packed;
    const int64_t first = uses.begin[row], count = uses.begin[row + 1] - first;
    const void** from = grad_scratch.of(thread);  // [L, count]
    double *squares = scale_scratch.of(thread), *alongs = squares + depth, *weights = alongs + depth;
    for (int64_t u = 0; u < count; ++u) {
      const int64_t token = uses.tokens[first + u], step = token % tokens.steps;
      const Item item = item_of(tokens, token / tokens.steps);
      const char* grad = static_cast<const char*>(item.is_target ? grad_targets : grad_rollouts);
      weights[u] = weight_of(tokens, options, item, step);
      for (int64_t l = 0; l < depth; ++l) {
        from[l * count + u] = grad + (item.number * place.size + l * place.layer + step * place.step) * sum_bytes;
      }
    }
    double square = 0, along = 0;
    for (int64_t l = 0; count > 0 && options.normalization != Normalization::none && l < depth; ++l) {
      kernels.products(row_of(layers[l], batch, position), from + l * count, weights, int(count), channels,
                       squares + l, alongs + l);
      square += squares[l];
      along += alongs[l];
    }
    for (int64_t l = 0; l < depth; ++l) {
      char* out = row_of(grads[l], batch, position);
      if (count == 0) {
        std::fill(out, out + channels * element_bytes(dtype), 0);
        continue;
      }
      TokenGradient g = {1, 0};
      if (options.normalization == Normalization::joint) g = token_gradient(square, along);
      if (options.normalization == Normalization::per_layer) g = token_gradient(squares[l], alongs[l]);
      kernels.gradient(row_of(layers[l], batch, position), g.token, g.grad, from + l * count, weights, int(count),
                       channels, out);
    }
  });
}

}  // namespace ebft::cpu
