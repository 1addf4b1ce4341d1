// What the threads of strided attention share: tiles of its query rows, and the prompt's keys laid out for products.
#pragma once

#include "attention.h"

namespace ebft::cpu {

// The `repeat` query heads that share keys are rows of the same matrix: row r of head h of a group is folded row
// r * repeat + h. So many folded rows are worked on at once, against so many keys.
constexpr int64_t tile_rows = 64, key_block = 128;

// The widest panel (product.h) of all instruction sets: sizes are padded to a multiple of it where memory is set aside.
constexpr int64_t most_panel = 32;

constexpr int64_t padded(int64_t size) { return (size + most_panel - 1) / most_panel * most_panel; }

// The prompt's keys and values of one head as right-hand sides of products, in sums (float, or double for float64).
// `across`: a column for each key; `down`: a row.
struct PromptKeys {
  void* keys_across;
  void* keys_down;      // for the backward pass
  void* values_across;  // likewise
  void* values_down;    // for the forward pass
};

// Query rows [begin, end), whole rollouts, of the heads that share one key and value head.
struct AttentionTile {
  const Attention& attention;
  PromptKeys prompt;
  int64_t batch;
  int64_t kv_head;
  int64_t begin;
  int64_t end;
  void* scratch;  // attention_scratch(attention) sums, aligned to 64 bytes
};

struct AttentionGradients {
  Heads out;
  const void* lse;  // [B, H, S] sums
  Heads grad;
  Heads grad_q;
  Heads grad_k;
  Heads grad_v;
  void* prompt_keys;    // [P, padded D] sums over the tiles so far
  void* prompt_values;  // [P, padded Dv]
};

}  // namespace ebft::cpu
