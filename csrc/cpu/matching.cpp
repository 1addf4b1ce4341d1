#include "matching.h"

#include "memory.h"
#include "parallel.h"

namespace ebft::cpu {
namespace {

int threads_for(const Execution& execution, const Features& x) {
  const int64_t rows = x.anchors() * (x.rollouts_per_anchor + 1);
  return thread_count(execution.threads, x.anchors(), rows * x.features * element_bytes(x.dtype));
}

const char* address(const Features& x, const Operand& operand, int64_t anchor) {
  const char* data = static_cast<const char*>(operand.data);
  for (size_t axis = x.leading.size(); axis-- > 0; anchor /= x.leading[axis]) {
    data += anchor % x.leading[axis] * operand.strides[axis];
  }
  return data;
}

// Points rows[0, n) at the rollouts of an anchor and rows[n] at its target.
void find_rows(const Features& x, int64_t anchor, const void** rows) {
  const char* rollouts = address(x, x.rollouts, anchor);
  for (int i = 0; i < x.rollouts_per_anchor; ++i) rows[i] = rollouts + i * x.rollouts.strides.back();
  rows[x.rollouts_per_anchor] = address(x, x.targets, anchor);
}

template <class T, class Size>
void match_all(Size n, const Execution& execution, const Features& x, int groups, const MatchingOptions& options,
               const MatchingOutputs& outputs) {
  const Kernels& kernels = kernels_for(execution.isa, x.dtype);
  const int threads = threads_for(execution, x);
  const int width = n + 1;
  const int64_t part = x.features / groups, part_bytes = part * element_bytes(x.dtype);
  Scratch<const void*> rows(threads, width);
  Scratch<double> memory(threads, width * width + matching_memory(n));
  for_each(x.anchors(), threads, [&](int64_t anchor, int thread) {
    const void** row = rows.of(thread);
    double* gram = memory.of(thread);
    Matching<Size> matching = matching_begin(n, gram + width * width);
    find_rows(x, anchor, row);
    for (int group = 0; group < groups; ++group) {
      kernels.gram(row, width, part, gram);
      matching_add(matching, gram, options.whitening);
      for (int i = 0; i < width; ++i) row[i] = static_cast<const char*>(row[i]) + part_bytes;
    }
    const auto at = [&](void* to) { return static_cast<T*>(to) + anchor * n; };
    matching_finish(matching, options,
                    MatchingResults<T>{static_cast<T*>(outputs.loss) + anchor, at(outputs.alignment),
                                       at(outputs.diversity), at(outputs.reward), at(outputs.advantage)});
  });
}

// Calls run(Fixed<n>) for the usual numbers of rollouts and run(n) for the others.
template <class Run>
void with_size(int n, const Run& run) {
  switch (n) {
    case 2: return run(Fixed<2>());
    case 4: return run(Fixed<4>());
    case 8: return run(Fixed<8>());
    default: return run(n);
  }
}

}  // namespace

int64_t Features::anchors() const {
  int64_t count = 1;
  for (int64_t size : leading) count *= size;
  return count;
}

void feature_matching(const Execution& execution, const Features& features, int groups, const MatchingOptions& options,
                      const MatchingOutputs& outputs) {
  with_size(features.rollouts_per_anchor, [&](auto n) {
    if (features.dtype == Dtype::float64) return match_all<double>(n, execution, features, groups, options, outputs);
    match_all<float>(n, execution, features, groups, options, outputs);
  });
}

void mean_embedding_forward(const Execution& execution, const Features& features, bool unbiased, void* loss,
                            void* difference) {
  const Kernels& kernels = kernels_for(execution.isa, features.dtype);
  const int threads = threads_for(execution, features), n = features.rollouts_per_anchor;
  const bool is_double = features.dtype == Dtype::float64;
  expect_writes(difference, features.anchors() * features.features * (is_double ? 8 : 4));
  Scratch<const void*> rows(threads, n + 1);
  for_each(features.anchors(), threads, [&](int64_t anchor, int thread) {
    const void** row = rows.of(thread);
    find_rows(features, anchor, row);
    void* out = static_cast<char*>(difference) + anchor * features.features * (is_double ? 8 : 4);
    double spread = 0;
    const double square =
        kernels.mean_difference(row, n, row[n], features.features, out, unbiased ? &spread : nullptr);
    const double value = mean_embedding_loss(n, unbiased, square, spread);
    is_double ? void(static_cast<double*>(loss)[anchor] = value) : void(static_cast<float*>(loss)[anchor] = value);
  });
}

void mean_embedding_backward(const Execution& execution, const Features& features, bool unbiased, const void* grad,
                             const void* difference, void* grad_rollouts, void* grad_targets) {
  const Kernels& kernels = kernels_for(execution.isa, features.dtype);
  const int threads = threads_for(execution, features), n = features.rollouts_per_anchor;
  const bool is_double = features.dtype == Dtype::float64;
  const int64_t row_bytes = features.features * element_bytes(features.dtype);
  expect_writes(grad_rollouts, features.anchors() * n * row_bytes);
  expect_writes(grad_targets, features.anchors() * row_bytes);
  Scratch<const void*> rows(threads, n + 1);
  for_each(features.anchors(), threads, [&](int64_t anchor, int thread) {
    const void** row = rows.of(thread);
    find_rows(features, anchor, row);
    const double upstream =
        is_double ? static_cast<const double*>(grad)[anchor] : double(static_cast<const float*>(grad)[anchor]);
    kernels.mean_embedding_gradients(
        row, n, static_cast<const char*>(difference) + anchor * features.features * (is_double ? 8 : 4),
        features.features, mean_embedding_gradient(n, unbiased, upstream),
        static_cast<char*>(grad_rollouts) + anchor * n * row_bytes,
        static_cast<char*>(grad_targets) + anchor * row_bytes);
  });
}

}  // namespace ebft::cpu
