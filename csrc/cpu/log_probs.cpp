#include "log_probs.h"

#include "parallel.h"

namespace ebft::cpu {
namespace {

// Calls body(row) for all rows, on one thread as many together as have 64 KiB.
template <class Body>
void for_each_row(const Execution& execution, int64_t rows, int64_t row_bytes, const Body& body) {
  const int64_t together = std::max<int64_t>(1, 65536 / row_bytes), groups = (rows + together - 1) / together;
  for_each(groups, thread_count(execution.threads, groups, rows * row_bytes), [&](int64_t group, int) {
    const int64_t begin = group * together, end = std::min(begin + together, rows);
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// Calls body(row, logits of the row, its targets) for all rows of a tile.
template <class Body>
void for_each_row(const Execution& execution, const LogitsTile& tile, const Body& body) {
  const int64_t row_bytes = tile.columns * element_bytes(tile.dtype);
  for_each_row(execution, tile.rows, row_bytes, [&](int64_t row) {
    const int64_t offset = tile.offsets[row];
    const RowTargets targets = {tile.targets + offset, tile.offsets[row + 1] - offset, tile.first};
    body(row, static_cast<char*>(tile.data) + row * row_bytes, targets);
  });
}

}  // namespace

void softmax_add(const Execution& execution, const LogitsTile& tile, void* largest, void* total, void* at_target) {
  const Kernels& kernels = kernels_for(execution.isa, tile.dtype);
  const int64_t bytes = element_bytes(sum_dtype(tile.dtype));
  for_each_row(execution, tile, [&](int64_t row, void* logits, const RowTargets& targets) {
    const auto at = [&](void* sums, int64_t index) { return static_cast<char*>(sums) + index * bytes; };
    kernels.softmax_add(logits, tile.columns, tile.factor, tile.softcap, targets, at(largest, row), at(total, row),
                        at(at_target, tile.offsets[row]));
  });
}

void softmax_gradient(const Execution& execution, const LogitsTile& tile, const void* largest, const void* log_total,
                      const void* whole_upstream, const void* upstream) {
  const Kernels& kernels = kernels_for(execution.isa, tile.dtype);
  const int64_t bytes = element_bytes(sum_dtype(tile.dtype));
  for_each_row(execution, tile, [&](int64_t row, void* logits, const RowTargets& targets) {
    const auto at = [&](const void* sums, int64_t index) { return static_cast<const char*>(sums) + index * bytes; };
    kernels.softmax_gradient(logits, tile.columns, tile.factor, tile.softcap, targets, at(largest, row), at(log_total, row),
                             at(whole_upstream, row), at(upstream, tile.offsets[row]));
  });
}

void softmax_blocks(const Execution& execution, const LogitsBlocks& blocks, void* largest, void* total) {
  const Kernels& kernels = kernels_for(execution.isa, blocks.dtype);
  const int64_t bytes = element_bytes(blocks.dtype), sum_bytes = element_bytes(sum_dtype(blocks.dtype));
  for_each_row(execution, blocks.rows, blocks.columns * bytes, [&](int64_t row) {
    for (int64_t block = 0; block < blocks.per_row(); ++block) {
      const int64_t first = block * blocks.size, count = std::min(blocks.size, blocks.columns - first);
      const void* logits = static_cast<const char*>(blocks.data) + (row * blocks.columns + first) * bytes;
      const auto at = [&](void* sums) { return static_cast<char*>(sums) + (row * blocks.per_row() + block) * sum_bytes; };
      kernels.softmax_add(logits, count, 1, 0, RowTargets{}, at(largest), at(total), nullptr);
    }
  });
}

}  // namespace ebft::cpu
