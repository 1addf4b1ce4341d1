// What each token of a packed row sees (arXiv:2603.12248). A packed row of S = P + A*n*G tokens is
//
//   [ prompt 0 .. P-1 | rollout tokens in the order (anchor a, sample j, step g) ]
//
// and its row sees the keys [prefix_start, prefix_end) of the prompt and [own_start, row] of its own rollout.
#pragma once

#include "config.h"

namespace ebft {

// The sizes of a packed row: P, A, n and G.
struct PackedSizes {
  int64_t prompt;
  int64_t anchors;
  int64_t samples;
  int64_t horizon;

  EBFT_FN int64_t packed() const { return prompt + anchors * samples * horizon; }
};

struct RowGeometry {
  int64_t position;  // within its document
  int32_t prefix_start;
  int32_t prefix_end;
  int32_t own_start;
};

// Of row `row` of a batch element with `anchors` [A], -1 = none, and `prompt_start` [P], where documents start.
EBFT_FN RowGeometry row_geometry(const PackedSizes& sizes, int64_t row, const int32_t* anchors,
                                 const int32_t* prompt_start) {
  if (row < sizes.prompt) {
    const int32_t start = prompt_start[row], next = int32_t(row) + 1;
    return {row - start, start, next, next};
  }
  const int64_t token = row - sizes.prompt, step = token % sizes.horizon;
  const int32_t anchor = anchors[token / (sizes.samples * sizes.horizon)], end = anchor > 0 ? anchor : 0;
  // The document of the last prompt token that the row sees; where it sees none, that of the first.
  const int32_t start = sizes.prompt > 0 ? prompt_start[end > 0 ? end - 1 : 0] : 0;
  return {end - start + step, start, end, int32_t(row - step)};
}

// The end of the tokens of its own rollout that a row sees. `full`: the later ones too.
EBFT_FN int64_t own_end(const PackedSizes& sizes, int64_t row, bool full) {
  return full && row >= sizes.prompt ? row + sizes.horizon - (row - sizes.prompt) % sizes.horizon : row + 1;
}

}  // namespace ebft
