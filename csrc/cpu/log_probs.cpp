#include "log_probs.h"

#include "parallel.h"

namespace ebft::cpu {
namespace {

// Calls body(row, logits of the row, its targets) for all rows of a tile.
template <class Body>
void for_each_row(const Execution& execution, const LogitsTile& tile, const Body& body) {
  const int64_t row_bytes = tile.columns * element_bytes(tile.dtype), together = std::max<int64_t>(1, 65536 / row_bytes);
  const int64_t groups = (tile.rows + together - 1) / together;
  for_each(groups, thread_count(execution.threads, groups, tile.rows * row_bytes), [&](int64_t group, int) {
    const int64_t begin = group * together, end = std::min(begin + together, tile.rows);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t offset = tile.offsets[row];
      const RowTargets targets = {tile.targets + offset, tile.offsets[row + 1] - offset, tile.first};
      body(row, static_cast<char*>(tile.data) + row * row_bytes, targets);
    }
  });
}

}  // namespace

void softmax_add(const Execution& execution, const LogitsTile& tile, void* largest, void* total, void* at_target) {
  const Kernels& kernels = kernels_for(execution.isa, tile.dtype);
  const int64_t bytes = element_bytes(sum_dtype(tile.dtype));
  for_each_row(execution, tile, [&](int64_t row, void* logits, const RowTargets& targets) {
    const auto at = [&](void* sums, int64_t index) { return static_cast<char*>(sums) + index * bytes; };
    kernels.softmax_add(logits, tile.columns, tile.softcap, targets, at(largest, row), at(total, row),
                        at(at_target, tile.offsets[row]));
  });
}

void softmax_gradient(const Execution& execution, const LogitsTile& tile, const void* largest, const void* log_total,
                      const void* whole_upstream, const void* upstream) {
  const Kernels& kernels = kernels_for(execution.isa, tile.dtype);
  const int64_t bytes = element_bytes(sum_dtype(tile.dtype));
  for_each_row(execution, tile, [&](int64_t row, void* logits, const RowTargets& targets) {
    const auto at = [&](const void* sums, int64_t index) { return static_cast<const char*>(sums) + index * bytes; };
    kernels.softmax_gradient(logits, tile.columns, tile.softcap, targets, at(largest, row), at(log_total, row),
                             at(whole_upstream, row), at(upstream, tile.offsets[row]));
  });
}

}  // namespace ebft::cpu
