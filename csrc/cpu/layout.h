// The large tensors of a layout of packed rows: positions, key ranges and the dense mask, each number written once.
#pragma once

#include "../core/layout.h"

namespace ebft::cpu {

// What each packed row sees, [B, S] each, contiguous.
template <class Int32>
struct RangeArrays {
  Int32* prefix_start;
  Int32* prefix_end;
  Int32* own_start;
};
using KeyRanges = RangeArrays<const int32_t>;

// Writes position ids [B, S] and key ranges from anchors [B, A], -1 = none, and `prompt_start` [B, P], all contiguous.
// Throws std::out_of_range if an anchor is beyond the prompt.
void layout_geometry(int threads, const PackedSizes& sizes, int64_t batch, const int32_t* anchors,
                     const int32_t* prompt_start, int64_t* positions, const RangeArrays<int32_t>& ranges);

// Writes the mask [B, S, S], 1 where a row sees a key. `full`: a rollout token sees the later tokens of its rollout too.
// Throws std::out_of_range if a row sees keys beyond S, or its prefix reaches into its own rollout.
void dense_mask(int threads, const PackedSizes& sizes, int64_t batch, const KeyRanges& ranges, bool full,
                uint8_t* mask);

}  // namespace ebft::cpu
