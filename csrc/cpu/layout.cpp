#include "layout.h"

#include "parallel.h"

#include <cstring>
#include <stdexcept>

namespace ebft::cpu {

void layout_geometry(int threads, const PackedSizes& sizes, int64_t batch, const int32_t* anchors,
                     const int32_t* prompt_start, int64_t* positions, const RangeArrays<int32_t>& ranges) {
  for (int64_t i = 0; i < batch * sizes.anchors; ++i) {
    if (anchors[i] > sizes.prompt) throw std::out_of_range("anchors: one is beyond the prompt");
  }
  const int64_t packed = sizes.packed(), rows = batch * packed, row_bytes = 20, piece = 1024;
  threads = thread_count(threads, (rows + piece - 1) / piece, rows * row_bytes);
  for_each((rows + piece - 1) / piece, threads, [&](int64_t i, int) {
    const int64_t end = std::min(rows, (i + 1) * piece);
    for (int64_t index = i * piece; index < end; ++index) {
      const int64_t b = index / packed;
      const RowGeometry row =
          row_geometry(sizes, index % packed, anchors + b * sizes.anchors, prompt_start + b * sizes.prompt);
      positions[index] = row.position;
      ranges.prefix_start[index] = row.prefix_start;
      ranges.prefix_end[index] = row.prefix_end;
      ranges.own_start[index] = row.own_start;
    }
  });
}

void dense_mask(int threads, const PackedSizes& sizes, int64_t batch, const KeyRanges& ranges, bool full,
                uint8_t* mask) {
  const int64_t packed = sizes.packed(), rows = batch * packed;
  for (int64_t i = 0; i < rows; ++i) {
    const bool ordered = 0 <= ranges.prefix_start[i] && ranges.prefix_end[i] <= ranges.own_start[i];
    if (!ordered || ranges.prefix_end[i] < 0 || ranges.own_start[i] > i % packed + 1) {
      throw std::out_of_range("key ranges: expected a prefix before the row's own tokens, and both before their end");
    }
  }
  threads = thread_count(threads, rows, rows * packed);
  for_each(rows, threads, [&](int64_t i, int) {
    const int64_t end = ranges.prefix_end[i], start = std::min<int64_t>(ranges.prefix_start[i], end);
    const int64_t own = ranges.own_start[i], own_last = own_end(sizes, i % packed, full);
    uint8_t* row = mask + i * packed;
    std::memset(row, 0, start);
    std::memset(row + start, 1, end - start);
    std::memset(row + end, 0, own - end);
    std::memset(row + own, 1, own_last - own);
    std::memset(row + own_last, 0, packed - own_last);
  });
}

}  // namespace ebft::cpu
