#include "attention.h"

#include "parallel.h"

#include <cmath>
#include <stdexcept>

namespace ebft::cpu {
namespace {

// Enough for the packing of keys and values to weigh little beside the products with them, few enough for the scratch
// memory to stay in the second cache.
constexpr int64_t tile_rows = 192;

const char* at(const HeadTensor& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const char*>(x.data) + batch * x.batch_stride + head * x.head_stride + row * x.row_stride;
}

// What the rollout `number` = a * n + j of a batch element sees in this step.
struct Visible {
  int64_t start;
  int64_t end;
  int64_t own;
  int64_t own_count;
};

Visible visible_to(const StepSizes& sizes, const StepOptions& options, const KeyRanges& ranges, int64_t batch,
                   int64_t number) {
  const int64_t row = sizes.packed.prompt + number * sizes.packed.horizon + sizes.step;
  const int64_t index = batch * sizes.packed.packed() + row;
  RowGeometry seen = {0, ranges.prefix_start[index], ranges.prefix_end[index], ranges.own_start[index]};
  if (options.window > 0) seen = within_window(seen, row, options.window);
  return {seen.prefix_start, seen.prefix_end, seen.own_start, row + 1 - seen.own_start};
}

void check_ranges(const StepSizes& sizes, const StepOptions& options, const KeyRanges& ranges) {
  for (int64_t batch = 0; batch < sizes.batch; ++batch) {
    for (int64_t number = 0; number < sizes.packed.anchors * sizes.packed.samples; ++number) {
      const Visible seen = visible_to(sizes, options, ranges, batch, number);
      const bool own = seen.own_count >= 1 && seen.own_count <= sizes.step + 1;
      if (seen.start < 0 || seen.end > sizes.packed.prompt || !own) throw std::out_of_range("key ranges: expected keys that a rollout can see");
    }
  }
}

}  // namespace

void strided_attention_step(const Execution& execution, Dtype dtype, const StepSizes& sizes, const HeadTensor& queries,
                            const HeadTensor& keys, const HeadTensor& values, const double* sinks,
                            const KeyRanges& ranges, const StepOptions& options, void* out) {
  check_ranges(sizes, options, ranges);
  const Kernels& kernels = kernels_for(execution.isa, dtype);
  // The heads that share keys are neighbouring rows of a tile, as are the rollouts of an anchor, which share a prefix.
  const int64_t repeat = sizes.heads / sizes.kv_heads, rollouts = sizes.packed.anchors * sizes.packed.samples;
  const int64_t rows = rollouts * repeat, tiles = (rows + tile_rows - 1) / tile_rows;
  const int64_t groups = sizes.batch * sizes.kv_heads, width = sizes.value_size * element_bytes(dtype);
  const int64_t bytes = groups * rows * (sizes.key_size + sizes.value_size) * element_bytes(dtype);
  const int threads = thread_count(execution.threads, groups * tiles, bytes);
  const int64_t most_rows = std::min(rows, tile_rows);
  const int64_t memory_size = kernels.attention_memory(int(most_rows), sizes.key_size, sizes.value_size);
  Scratch<AttentionRow> row_scratch(threads, most_rows);
  Scratch<char> memory(threads, memory_size * element_bytes(sum_dtype(dtype)));
  for_each(groups * tiles, threads, [&](int64_t i, int thread) {
    // The last anchors, which see most, first: threads finish together.
    const int64_t group = i % groups, first = (tiles - 1 - i / groups) * tile_rows;
    const int64_t batch = group / sizes.kv_heads, kv_head = group % sizes.kv_heads;
    const int count = int(std::min(tile_rows, rows - first));
    AttentionRow* row = row_scratch.of(thread);
    for (int k = 0; k < count; ++k) {
      const int64_t number = (first + k) / repeat, head = kv_head * repeat + (first + k) % repeat;
      const Visible seen = visible_to(sizes, options, ranges, batch, number);
      row[k] = {at(queries, batch, head, number),
                seen.start,
                seen.end,
                at(keys, batch, kv_head, seen.own),
                at(values, batch, kv_head, seen.own),
                seen.own_count,
                sinks ? sinks[head] : -INFINITY,
                static_cast<char*>(out) + ((batch * rollouts + number) * sizes.heads + head) * width};
    }
    kernels.attend({row, count, at(keys, batch, kv_head, 0), at(values, batch, kv_head, 0), keys.row_stride,
                    values.row_stride, sizes.key_size, sizes.value_size, options.scale, options.softcap},
                   memory.of(thread));
  });
}

}  // namespace ebft::cpu
