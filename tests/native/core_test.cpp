// Runs the kernels on buffers that end where their data ends, compiled with AddressSanitizer and UBSan: every dtype,
// instruction set and width, at addresses that are aligned to elements only. Compares with plain loops on the way.

#include "../../csrc/core/half.h"
#include "../../csrc/cpu/attention.h"
#include "../../csrc/cpu/layout.h"
#include "../../csrc/cpu/log_probs.h"
#include "../../csrc/cpu/matching.h"
#include "../../csrc/cpu/pooling.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <vector>

using namespace ebft;

namespace {

void check(bool condition, const char* what) {
  if (condition) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

double random_number() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(state >> 11) * 0x1p-53 - 0.5;
}

template <class T>
T from_double(double x) {
  return T(x);
}
template <>
BFloat16 from_double(double x) { return to_bfloat16(float(x)); }
template <>
Float16 from_double(double x) { return to_float16(float(x)); }

double to_double(double x) { return x; }
double to_double(float x) { return x; }
double to_double(BFloat16 x) { return to_float(x); }
double to_double(Float16 x) { return to_float(x); }

// `count` elements that start one element after an aligned address and end where the memory ends.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(new T[count + 1]()), count_(count) {}
  T* data() { return memory_.get() + 1; }
  T& operator[](int64_t i) { return data()[i]; }
  void fill_randomly() {
    for (int64_t i = 0; i < count_; ++i) data()[i] = from_double<T>(random_number());
  }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t count_;
};

template <class T, class Result>
void run(cpu::Isa isa, cpu::Dtype dtype, int n, int64_t width, int groups) {
  const int64_t anchors = 3, row = sizeof(T) * width, tolerance_terms = width + n;
  const double tolerance = 64 * tolerance_terms * (sizeof(Result) == 8 ? 0x1p-52 : 0x1p-23);
  Buffer<T> x(anchors * n * width), y(anchors * width);
  x.fill_randomly();
  y.fill_randomly();
  const cpu::Features features = {
      dtype, {1, anchors}, n, width, {x.data(), {0, n * row, row}}, {y.data(), {0, row}}};

  Buffer<Result> loss(anchors), results[4] = {Buffer<Result>(anchors * n), Buffer<Result>(anchors * n),
                                              Buffer<Result>(anchors * n), Buffer<Result>(anchors * n)};
  for (const Whitening whitening : {Whitening::none, Whitening::sample, Whitening::feature}) {
    const MatchingOptions options = {whitening, Estimator::rloo, 1.0, 1.0};
    cpu::feature_matching({isa, 2}, features, groups, options,
                          {loss.data(), results[0].data(), results[1].data(), results[2].data(), results[3].data()});
  }
  Buffer<Result> embedding(anchors), difference(anchors * width), grad(anchors);
  Buffer<T> grad_x(anchors * n * width), grad_y(anchors * width);
  grad.fill_randomly();
  for (const bool unbiased : {true, false}) {
    if (unbiased && n == 1) continue;
    cpu::mean_embedding_forward({isa, 2}, features, unbiased, embedding.data(), difference.data());
    cpu::mean_embedding_backward({isa, 2}, features, unbiased, grad.data(), difference.data(), grad_x.data(),
                                 grad_y.data());
  }
  for (int64_t a = 0; a < anchors; ++a) {
    double square = 0;
    for (int64_t f = 0; f < width; ++f) {
      double mean = 0;
      for (int j = 0; j < n; ++j) mean += to_double(x[(a * n + j) * width + f]) / n;
      const double d = mean - to_double(y[a * width + f]);
      square += d * d;
      check(std::fabs(difference[a * width + f] - d) <= tolerance, "the difference of the means");
      const double expected = to_double(from_double<T>(-2 * double(grad[a]) * difference[a * width + f]));
      check(std::fabs(to_double(grad_y[a * width + f]) - expected) <= 0x1p-7 * std::fabs(expected) + 1e-6,
            "the gradient of the target");
    }
    check(std::fabs(loss[a] - square) <= tolerance, "the loss of feature matching");
    check(std::fabs(embedding[a] - square) <= tolerance, "the mean-embedding loss");
  }
}

// Two layers of 2 packed rows of 5 tokens; 2 anchors, 2 rollouts, 2 steps. Some tokens do not count, some are shared.
template <class T, class Result>
void run_pooling(cpu::Isa isa, cpu::Dtype dtype, int64_t channels) {
  const int64_t batch = 2, packed = 5, anchors = 2, samples = 2, steps = 2, depth = 2;
  const int64_t row = sizeof(T) * channels;
  Buffer<T> hidden[] = {Buffer<T>(batch * packed * channels), Buffer<T>(batch * packed * channels)};
  Buffer<T> grads[] = {Buffer<T>(batch * packed * channels), Buffer<T>(batch * packed * channels)};
  std::vector<cpu::Layer> layers, grad_layers;
  for (int l = 0; l < depth; ++l) {
    hidden[l].fill_randomly();
    layers.push_back({hidden[l].data(), packed * row, row});
    grad_layers.push_back({grads[l].data(), packed * row, row});
  }
  Buffer<int64_t> rollout_rows(batch * anchors * samples * steps), target_rows(batch * anchors * steps);
  const std::unique_ptr<bool[]> counted(new bool[batch * anchors * steps]);
  for (int64_t i = 0; i < batch * anchors * samples * steps; ++i) rollout_rows[i] = i * 3 % packed;
  for (int64_t i = 0; i < batch * anchors * steps; ++i) {
    target_rows[i] = i * 2 % packed;
    counted[i] = i % 3 != 0;
  }
  for (const Pooling pooling : {Pooling::last_token, Pooling::concat, Pooling::token, Pooling::mean}) {
    for (const Normalization normalization : {Normalization::none, Normalization::per_layer, Normalization::joint}) {
      const int64_t taken = pooling == Pooling::last_token ? 1 : steps;
      const int64_t width = FeatureLayout(pooling, depth, taken, channels).size;
      const cpu::Tokens tokens = {batch, packed,       anchors, samples, taken, rollout_rows.data(), target_rows.data(),
                                  counted.get()};
      Buffer<Result> rollouts(batch * anchors * samples * width), targets(batch * anchors * width);
      cpu::pool_features({isa, 2}, dtype, layers, channels, tokens, {pooling, normalization}, rollouts.data(),
                         targets.data());
      cpu::pool_features_backward({isa, 2}, dtype, layers, channels, tokens, {pooling, normalization},
                                  rollouts.data(), targets.data(), grad_layers);
      if (pooling != Pooling::mean || normalization != Normalization::joint) continue;
      for (int64_t i = 0; i < batch * anchors; ++i) {
        for (int64_t f = 0; f < width; ++f) {
          double expected = 0;
          for (int64_t k = 0; k < steps; ++k) {
            const int64_t first = (i / anchors * packed + target_rows[i * steps + k]) * channels;
            double square = 0;
            for (int64_t c = 0; c < channels; ++c) {
              square += std::pow(to_double(hidden[0][first + c]), 2) + std::pow(to_double(hidden[1][first + c]), 2);
            }
            const double x = to_double(hidden[f / channels][first + f % channels]);
            if (counted[i * steps + k]) expected += x / std::sqrt(square) / double(steps);
          }
          check(std::fabs(targets[i * width + f] - expected) <= 1e-6, "the mean of normalised tokens");
        }
      }
    }
  }
}

const PackedSizes packed_sizes = {70, 2, 2, 3};

struct Geometry {
  Buffer<int64_t> positions;
  Buffer<int32_t> prefix_start, prefix_end, own_start;

  explicit Geometry(int64_t count) : positions(count), prefix_start(count), prefix_end(count), own_start(count) {}
  cpu::KeyRanges ranges() { return {prefix_start.data(), prefix_end.data(), own_start.data()}; }
};

// Two packed rows, the second of two documents.
Geometry geometry() {
  const int64_t batch = 2, packed = packed_sizes.packed();
  Geometry g(batch * packed);
  Buffer<int32_t> anchors(batch * packed_sizes.anchors), prompt_start(batch * packed_sizes.prompt);
  const int32_t where[] = {3, 69, 66, -1};
  for (int i = 0; i < 4; ++i) anchors[i] = where[i];
  for (int64_t i = 0; i < 40; ++i) prompt_start[packed_sizes.prompt + 30 + i] = 30;
  cpu::layout_geometry(2, packed_sizes, batch, anchors.data(), prompt_start.data(), g.positions.data(),
                       {g.prefix_start.data(), g.prefix_end.data(), g.own_start.data()});
  return g;
}

void run_layout() {
  const int64_t batch = 2, packed = packed_sizes.packed();
  Geometry g = geometry();
  for (const bool full : {false, true}) {
    Buffer<uint8_t> mask(batch * packed * packed);
    cpu::dense_mask(2, packed_sizes, batch, g.ranges(), full, mask.data());
    for (int64_t i = 0; i < batch * packed; ++i) {
      for (int64_t key = 0; key < packed; ++key) {
        const bool own = key >= g.own_start[i] && key < own_end(packed_sizes, i % packed, full);
        const bool seen = own || (key >= g.prefix_start[i] && key < g.prefix_end[i]);
        check(mask[i * packed + key] == seen, "the dense mask");
      }
    }
  }
}

// A packed row of two samples at each of two anchors, with a window: what every row sees.
struct Ranges {
  static constexpr int64_t prompt = 21, horizon = 3, packed = prompt + 4 * horizon;
  std::vector<int32_t> prefix_start, prefix_end, own_start;

  Ranges() : prefix_start(packed), prefix_end(packed), own_start(packed) {
    for (int32_t row = 0; row < packed; ++row) {
      const int32_t step = (row - int32_t(prompt)) % int32_t(horizon), end = row < prompt + 2 * horizon ? 0 : 18;
      const bool in_prompt = row < prompt;
      prefix_end[row] = in_prompt ? row + 1 : end;
      prefix_start[row] = in_prompt && row > 9 ? row - 9 : end / 3;
      own_start[row] = in_prompt ? row + 1 : row - step;
    }
  }
  bool sees(int64_t row, int64_t key) const {
    return (key >= prefix_start[row] && key < prefix_end[row]) || (key >= own_start[row] && key <= row);
  }
};

// Attention and its gradients for the output's gradient `grad` against plain loops over all pairs.
template <class T, class Result>
void run_attention(cpu::Isa isa, cpu::Dtype dtype, int64_t kv_heads, int64_t repeat, int64_t size, int64_t value_size) {
  const Ranges ranges;
  const int64_t heads = kv_heads * repeat, rows = ranges.packed, steps = 4;
  const double tolerance = sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 2e-5 : 0.05, scale = 0.7, softcap = 2.5;
  Buffer<T> q(heads * rows * size), k(kv_heads * rows * size), v(kv_heads * rows * value_size);
  Buffer<T> out(heads * rows * value_size), grad(heads * rows * value_size), of_step(heads * steps * value_size);
  Buffer<T> grad_q(heads * rows * size), grad_k(kv_heads * rows * size), grad_v(kv_heads * rows * value_size);
  Buffer<T> step_q(heads * steps * size);
  Buffer<Result> lse(heads * rows);
  Buffer<double> sinks(heads);
  for (Buffer<T>* x : {&q, &k, &v, &grad}) x->fill_randomly();
  sinks.fill_randomly();
  const auto tensor = [](Buffer<T>& x, int64_t count, int64_t width) {
    return cpu::Heads{x.data(), 0, int64_t(sizeof(T)) * count * width, int64_t(sizeof(T)) * width};
  };
  cpu::Attention x = {1, kv_heads, repeat, rows, 0, 1, rows, ranges.prompt, ranges.horizon, size, value_size,
                      tensor(q, rows, size), tensor(k, rows, size), tensor(v, rows, value_size),
                      ranges.prefix_start.data(), ranges.prefix_end.data(), ranges.own_start.data(), false, scale,
                      softcap, sinks.data()};
  cpu::strided_attention({isa, 2}, dtype, x, tensor(out, rows, value_size), lse.data());
  cpu::strided_attention_backward({isa, 2}, dtype, x, tensor(out, rows, value_size), lse.data(),
                                  tensor(grad, rows, value_size), tensor(grad_q, rows, size),
                                  tensor(grad_k, rows, size), tensor(grad_v, rows, value_size));
  std::vector<double> to_k(kv_heads * rows * size), to_v(kv_heads * rows * value_size);
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t shared = h / repeat * rows;
    for (int64_t i = 0; i < rows; ++i) {
      std::vector<double> weight(rows), slope(rows), result(value_size), to_q(size);
      double total = std::exp(sinks[h]), along = 0;
      for (int64_t key = 0; key < rows; ++key) {
        if (!ranges.sees(i, key)) continue;
        double product = 0;
        for (int64_t d = 0; d < size; ++d) {
          product += to_double(q[(h * rows + i) * size + d]) * to_double(k[(shared + key) * size + d]);
        }
        const double bounded = std::tanh(scale * product / softcap);
        slope[key] = 1 - bounded * bounded;
        total += weight[key] = std::exp(softcap * bounded);
      }
      for (int64_t key = 0; key < rows; ++key) {
        weight[key] /= total;
        for (int64_t d = 0; d < value_size; ++d) {
          result[d] += weight[key] * to_double(v[(shared + key) * value_size + d]);
          to_v[(shared + key) * value_size + d] += weight[key] * to_double(grad[(h * rows + i) * value_size + d]);
        }
      }
      for (int64_t d = 0; d < value_size; ++d) {
        along += result[d] * to_double(grad[(h * rows + i) * value_size + d]);
        check(std::fabs(to_double(out[(h * rows + i) * value_size + d]) - result[d]) <= tolerance, "attention");
      }
      for (int64_t key = 0; key < rows; ++key) {
        double product = -along;
        for (int64_t d = 0; d < value_size; ++d) {
          product += to_double(grad[(h * rows + i) * value_size + d]) * to_double(v[(shared + key) * value_size + d]);
        }
        const double of_score = weight[key] * product * slope[key] * scale;
        for (int64_t d = 0; d < size; ++d) {
          to_q[d] += of_score * to_double(k[(shared + key) * size + d]);
          to_k[(shared + key) * size + d] += of_score * to_double(q[(h * rows + i) * size + d]);
        }
      }
      for (int64_t d = 0; d < size; ++d) {
        check(std::fabs(to_double(grad_q[(h * rows + i) * size + d]) - to_q[d]) <= tolerance, "the gradient of q");
      }
    }
  }
  for (int64_t i = 0; i < kv_heads * rows * size; ++i) {
    check(std::fabs(to_double(grad_k[i]) - to_k[i]) <= 4 * tolerance, "the gradient of k");
  }
  for (int64_t i = 0; i < kv_heads * rows * value_size; ++i) {
    check(std::fabs(to_double(grad_v[i]) - to_v[i]) <= 4 * tolerance, "the gradient of v");
  }
  // The second step of every rollout, whose later tokens do not exist yet.
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t r = 0; r < steps; ++r) {
      for (int64_t d = 0; d < size; ++d) {
        step_q[(h * steps + r) * size + d] = q[(h * rows + ranges.prompt + r * ranges.horizon + 1) * size + d];
      }
    }
  }
  x.rows = steps, x.first = ranges.prompt + 1, x.spacing = ranges.horizon, x.q = tensor(step_q, steps, size);
  Buffer<Result> lse_of_step(heads * steps);
  cpu::strided_attention({isa, 2}, dtype, x, tensor(of_step, steps, value_size), lse_of_step.data());
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t r = 0; r < steps; ++r) {
      for (int64_t d = 0; d < value_size; ++d) {
        const int64_t row = ranges.prompt + r * ranges.horizon + 1;
        const double expected = to_double(out[(h * rows + row) * value_size + d]);
        check(std::fabs(to_double(of_step[(h * steps + r) * value_size + d]) - expected) <= tolerance, "one step");
      }
    }
  }
}

// Two tiles of logits, of `columns` and 3: no target in the first row, in the second one in each tile and one twice.
template <class T, class S>
void run_softmax(cpu::Isa isa, cpu::Dtype dtype, int64_t columns, double softcap) {
  const int64_t rows = 2, count = 4, all = columns + 3;
  const double factor = 1.5;
  Buffer<T> first(rows * columns), second(rows * 3);
  Buffer<S> largest(rows), total(rows), whole(rows), at_target(count), upstream(count);
  Buffer<int64_t> targets(count), offsets(rows + 1);
  first.fill_randomly(), second.fill_randomly(), upstream.fill_randomly();
  targets[0] = columns / 2, targets[1] = columns + 2, targets[2] = columns / 2, targets[3] = columns;
  offsets[0] = offsets[1] = 0, offsets[2] = count;
  whole[0] = 0, whole[1] = upstream[0] + upstream[1] + upstream[2] + upstream[3];
  for (int64_t row = 0; row < rows; ++row) largest[row] = S(-1e30), total[row] = 0;
  const auto data = [&](int64_t row, int64_t column) {
    return to_double(column < columns ? first[row * columns + column] : second[row * 3 + column - columns]);
  };
  const auto logit = [&](int64_t row, int64_t column) {
    return softcap > 0 ? softcap * std::tanh(factor * data(row, column)) : factor * data(row, column);
  };
  std::vector<double> log_sums, targeted, gradients;
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (int64_t column = 0; column < all; ++column) sum += std::exp(logit(row, column));
    for (int64_t column = 0; column < all; ++column) {
      const double x = logit(row, column), slope = softcap > 0 ? 1 - x * x / (softcap * softcap) : 1;
      double gradient = to_double(whole[row]) * std::exp(x) / sum;
      for (int64_t k = offsets[row]; k < offsets[row + 1]; ++k) {
        gradient -= to_double(upstream[k]) * (column == targets[k]);
      }
      gradients.push_back(slope * gradient);
    }
    log_sums.push_back(std::log(sum));
    for (int64_t k = offsets[row]; k < offsets[row + 1]; ++k) targeted.push_back(logit(row, targets[k]));
  }
  const cpu::Execution run{isa, 1};
  const cpu::LogitsTile tiles[] = {
      {dtype, first.data(), rows, columns, 0, targets.data(), offsets.data(), factor, softcap},
      {dtype, second.data(), rows, 3, columns, targets.data(), offsets.data(), factor, softcap}};
  for (const auto& tile : tiles) cpu::softmax_add(run, tile, largest.data(), total.data(), at_target.data());
  const double tolerance = 10 * (sizeof(T) == 8 ? 0x1p-52 : sizeof(T) == 4 ? 0x1p-22 : 0x1p-8);
  const double sums = sizeof(S) == 8 ? 1e-13 : 1e-5;
  for (int64_t row = 0; row < rows; ++row) {
    total[row] = S(std::log(to_double(total[row])));
    check(std::fabs(to_double(total[row]) + to_double(largest[row]) - log_sums[row]) <= sums, "log-sum-exp");
  }
  for (int64_t k = 0; k < count; ++k) {
    check(std::fabs(to_double(at_target[k]) - targeted[k]) <= sums, "logit of a target");
  }
  for (const auto& tile : tiles) {
    cpu::softmax_gradient(run, tile, largest.data(), total.data(), whole.data(), upstream.data());
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < all; ++column) {
      const double expected = gradients[row * all + column];
      check(std::fabs(data(row, column) - expected) <= tolerance, "gradient of the logits");
    }
  }
}

void run_all(cpu::Isa isa) {
  for (const int64_t columns : {1, 7, 16, 33, 1024, 1030}) {
    for (const double softcap : {0.0, 2.0}) {
      run_softmax<double, double>(isa, cpu::Dtype::float64, columns, softcap);
      run_softmax<float, float>(isa, cpu::Dtype::float32, columns, softcap);
      run_softmax<BFloat16, float>(isa, cpu::Dtype::bfloat16, columns, softcap);
      run_softmax<Float16, float>(isa, cpu::Dtype::float16, columns, softcap);
    }
  }
  for (const auto& [kv_heads, repeat, size, value_size] :
       {std::tuple{1, 1, 1, 3}, {2, 3, 17, 8}, {1, 2, 40, 33}, {1, 70, 3, 5}}) {
    run_attention<double, double>(isa, cpu::Dtype::float64, kv_heads, repeat, size, value_size);
    run_attention<float, float>(isa, cpu::Dtype::float32, kv_heads, repeat, size, value_size);
    run_attention<BFloat16, float>(isa, cpu::Dtype::bfloat16, kv_heads, repeat, size, value_size);
    run_attention<Float16, float>(isa, cpu::Dtype::float16, kv_heads, repeat, size, value_size);
  }
  for (const int64_t channels : {1, 3, 8, 17, 70}) {
    run_pooling<double, double>(isa, cpu::Dtype::float64, channels);
    run_pooling<float, float>(isa, cpu::Dtype::float32, channels);
    run_pooling<BFloat16, float>(isa, cpu::Dtype::bfloat16, channels);
    run_pooling<Float16, float>(isa, cpu::Dtype::float16, channels);
  }
  for (const int n : {1, 2, 3, 4, 5, 6, 8, 9, 12}) {
    for (const int64_t width : {1, 2, 3, 7, 8, 9, 31, 1030}) {
      for (const int groups : {1, 2}) {
        if (width % groups || (width > 100 && n != 4 && n != 9)) continue;
        run<double, double>(isa, cpu::Dtype::float64, n, width, groups);
        run<float, float>(isa, cpu::Dtype::float32, n, width, groups);
        run<BFloat16, float>(isa, cpu::Dtype::bfloat16, n, width, groups);
        run<Float16, float>(isa, cpu::Dtype::float16, n, width, groups);
      }
    }
  }
}

// Eigenvalues of very different sizes, degenerate ones, and matrices that are diagonal or zero.
void check_eigen(int n, double ratio) {
  std::vector<double> root(n * n), a(n * n), vectors(n * n);
  double largest = 0;
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < n; ++k) root[i * n + k] = random_number() * std::pow(ratio, k);
  }
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < n; ++k) {
      for (int f = 0; f < n; ++f) a[i * n + k] += root[i * n + f] * root[k * n + f];
    }
    largest = std::fmax(largest, a[i * n + i]);
  }
  for (double& x : a) x /= 2 * largest;
  const std::vector<double> matrix = a;
  symmetric_eigen(n, a.data(), vectors.data());
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < n; ++k) {
      double rebuilt = 0, product = 0;
      for (int e = 0; e < n; ++e) {
        rebuilt += vectors[e * n + i] * a[e * n + e] * vectors[e * n + k];
        product += vectors[i * n + e] * vectors[k * n + e];
      }
      check(std::fabs(rebuilt - matrix[i * n + k]) <= 100 * n * 0x1p-53, "V^T diag(a) V");
      check(std::fabs(product - (i == k)) <= 100 * n * 0x1p-53, "V V^T");
    }
  }
}

void check_half() {
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const Float16 half = {uint16_t(bits)};
    const BFloat16 brain = {uint16_t(bits)};
    if (to_float(half) == to_float(half)) check(to_float16(to_float(half)).bits == bits, "float16");
    if (to_float(brain) == to_float(brain)) check(to_bfloat16(to_float(brain)).bits == bits, "bfloat16");
  }
}

}  // namespace

int main() {
  check_half();
  for (const int n : {1, 2, 3, 4, 8, 16, 17, 40}) {
    for (const double ratio : {1.0, 0.5, 1e-3, 0.0}) check_eigen(n, ratio);
  }
  run_layout();
  for (int isa = 0; isa < cpu::isa_count(); ++isa) run_all(cpu::Isa(isa));
  std::printf("passed\n");
}
